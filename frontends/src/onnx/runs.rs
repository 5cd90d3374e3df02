//! Runs of channels and positions: cut out, and joined.

use super::eval::{Eval, Made, Val, one};
use super::file::Node;
use super::fold;
use super::product::channels;
use super::term::{Red, Term};
use super::view::{Axis, Digit, Kind, Real, flat, size};

impl Eval {
    pub(super) fn concat(&mut self, node: &Node, ins: &[Option<Val>]) -> Option<Made> {
        // Nothing, in front of or behind something.
        let cache = |v: &Val| matches!(v, Val::Real(r) if matches!(self.terms.get(r.t), Term::Past(_)));
        let some = ins.iter().flatten().filter(|v| cache(v) || self.dims(v).iter().product::<usize>() > 0);
        let some: Vec<&Val> = some.collect();
        let (a, b) = match some[..] {
            [Val::Real(a)] => return Some(one(a.clone())),
            [Val::Real(a), Val::Real(b)] => (a.clone(), b.clone()),
            _ => return None,
        };
        Some(fold::axis(node.int("axis").unwrap_or(0), a.axes.len()).and_then(|at| self.joined(&a, &b, at)))
    }

    fn joined(&mut self, a: &Real, b: &Real, at: usize) -> Made {
        let rank = a.axes.len();
        let others = a.axes.len() == b.axes.len()
            && a.axes.iter().zip(&b.axes).enumerate().all(|(i, (x, y))| i == at || sizes(x) == sizes(y));
        if !others {
            return Err("operands that do not lie alike".into());
        }
        let positions = |a: &Axis| matches!(a[..], [d] if d.kind == Kind::Pos);
        if positions(&a.axes[at]) && positions(&b.axes[at]) {
            let past = matches!(self.terms.get(a.t), Term::Past(_));
            if !past || self.terms.n(a.t) != self.terms.n(b.t) || chans(a) != chans(b) {
                return Err("positions behind others that are no cache".into());
            }
            let mut axes = a.axes.clone();
            axes[at] = vec![Digit::pos(self.probe.all())];
            return one(Real { t: self.terms.append(a.t, b.t), axes });
        }
        let (Some((la, 1)), Some((lb, 1)), true) = (a.last(), b.last(), at + 1 == rank) else {
            return Err("operands joined along no channels".into());
        };
        let t = self.terms.join(a.t, b.t, la, lb);
        let mut axes = a.axes.clone();
        axes[at] = channels(la + lb, 1);
        for d in axes[..at].iter_mut().flatten().filter(|d| d.kind == Kind::Chan) {
            d.stride = d.stride / la * (la + lb);
        }
        one(Real { t, axes })
    }

    pub(super) fn sliced(&mut self, x: &Real, all: Vec<(usize, Vec<usize>)>) -> Made {
        let mut out = x.clone();
        for (axis, rows) in all {
            let have = out.dims()[axis];
            let (Some(&start), true) = (rows.first(), rows.windows(2).all(|w| w[1] == w[0] + 1)) else {
                return Err("nothing, or places that are no run".into());
            };
            if rows.len() == have {
                continue;
            }
            if axis + 1 != out.axes.len() {
                return Err(format!(
                    "a part of axis {axis}: only runs of channels are cut; a graph that gives some positions alone is not read"
                ));
            }
            out = self.part(&out, start as u64, rows.len() as u64)?;
        }
        one(out)
    }

    fn part(&mut self, x: &Real, start: u64, len: u64) -> Result<Real, String> {
        let Some((period, 1)) = x.last() else { return Err("a part of no channels".into()) };
        let mut axes = x.axes.clone();
        let last = axes.len() - 1;
        for d in axes.iter_mut().flatten().filter(|d| d.kind == Kind::Chan) {
            d.stride = d.stride / period.max(1) * len;
        }
        axes[last] = channels(len, 1);
        Ok(Real { t: self.terms.part(x.t, period, start, len), axes })
    }

    pub(super) fn split(&mut self, node: &Node, x: &Real, sizes: Option<Vec<i64>>) -> Made {
        let rank = x.axes.len();
        let at = fold::axis(node.int("axis").unwrap_or(0), rank)?;
        let n = x.dims()[at] as i64;
        let count = node.outputs.len() as i64;
        let sizes = sizes
            .or_else(|| node.ints("split").map(<[i64]>::to_vec))
            .unwrap_or_else(|| vec![n / count; count as usize]);
        let fits = sizes.iter().all(|&s| (1..=n).contains(&s)) && sizes.iter().sum::<i64>() == n;
        if at + 1 != rank || !fits {
            return Err(format!("a split of {n} into {sizes:?}"));
        }
        let mut start = 0;
        let mut out = Vec::new();
        for s in sizes {
            out.push(Val::Real(self.part(x, start, s as u64)?));
            start += s as u64;
        }
        Ok(out)
    }

    pub(super) fn reduce(&mut self, op: &str, node: &Node, x: &Real, axes: Option<Vec<i64>>) -> Made {
        let rank = x.axes.len();
        let last = axes.is_some_and(|a| a.len() == 1 && (a[0] == -1 || a[0] == rank as i64 - 1));
        let (Some((run, 1)), true, true) = (x.last(), last, node.int("keepdims") != Some(0)) else {
            return Err("a reduction along another axis than the last, or without keeping it".into());
        };
        let op = match op {
            "ReduceMean" => Red::Mean,
            "ReduceMax" => Red::Max,
            _ => Red::Min,
        };
        let mut out = Real { t: self.terms.reduce(op, x.t, run), axes: x.axes.clone() };
        out.axes[rank - 1] = vec![];
        for d in out.axes.iter_mut().flatten().filter(|d| d.kind == Kind::Chan) {
            if d.stride % run != 0 {
                return Err("a reduction over channels that lie apart".into());
            }
            d.stride /= run;
        }
        one(out)
    }
}

pub(super) fn squeezed(x: &Real, axes: Option<Vec<i64>>) -> Result<Real, String> {
    let rank = x.axes.len();
    let gone = match axes {
        None => (0..rank).filter(|&i| size(&x.axes[i]) == 1).collect(),
        Some(a) => a.iter().map(|&a| fold::axis(a, rank)).collect::<Result<Vec<_>, _>>()?,
    };
    if let Some(a) = gone.iter().find(|&&a| size(&x.axes[a]) != 1) {
        return Err(format!("axis {a} is not 1"));
    }
    let axes = (0..rank).filter(|i| !gone.contains(i)).map(|i| x.axes[i].clone()).collect();
    Ok(Real { t: x.t, axes })
}

fn sizes(a: &Axis) -> Vec<(Kind, usize)> {
    a.iter().map(|d| (d.kind, d.size)).collect()
}

/// The digits of channels, slowest first.
fn chans(r: &Real) -> Vec<Digit> {
    flat(&r.axes).into_iter().filter(|d| d.kind == Kind::Chan).collect()
}
