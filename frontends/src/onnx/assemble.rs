//! Operators that take known tensors apart and put them together.

use super::file::Node;
use super::fold::{axis, broadcast};
use super::known::{Data, Known, each, product};

type Made = Result<Known, String>;

pub(super) fn tile(x: &Known, repeats: &[i64]) -> Made {
    let counts: Vec<usize> = repeats.iter().map(|&r| usize::try_from(r).unwrap_or(0)).collect();
    if counts.len() != x.dims.len() {
        return Err("a tile of another rank".into());
    }
    counts.iter().enumerate().try_fold(x.clone(), |k, (axis, &c)| {
        product(&[k.count(), c])?;
        let rows: Vec<usize> = (0..c).flat_map(|_| 0..k.dims[axis]).collect();
        k.along(axis, &rows, &[rows.len()])
    })
}

pub(super) fn concat(ins: &[Option<&Known>], a: i64) -> Made {
    let all: Option<Vec<&Known>> = ins.iter().copied().collect();
    let all = all.filter(|v| !v.is_empty()).ok_or("an operand is missing")?;
    let at = axis(a, all[0].dims.len())?;
    let same = |k: &&&Known| {
        k.dims.len() == all[0].dims.len()
            && k.dims.iter().zip(&all[0].dims).enumerate().all(|(i, (x, y))| i == at || x == y)
    };
    if !all.iter().all(|k| same(&k)) {
        return Err("sizes that do not fit one behind the other".into());
    }
    let mut dims = all[0].dims.clone();
    dims[at] = all.iter().map(|k| k.dims[at]).sum();
    product(&dims)?;
    let outer: usize = dims[..at].iter().product();
    macro_rules! join {
        ($as:ident, $variant:ident) => {{
            let parts: Option<Vec<(&[_], usize)>> = all
                .iter()
                .map(|k| match &k.data {
                    Data::$variant(v) => Some((&v[..], k.around(at)[1] * k.around(at)[2])),
                    _ => None,
                })
                .collect();
            parts.map(|p| {
                Data::$variant(
                    (0..outer)
                        .flat_map(|o| p.iter().flat_map(move |(v, n)| v[o * n..(o + 1) * n].iter().copied()))
                        .collect(),
                )
            })
        }};
    }
    let data = join!(as_ints, Ints).or_else(|| join!(as_floats, Floats)).or_else(|| join!(as_bools, Bools));
    Ok(Known { dims, data: data.ok_or("operands of several types")?, origin: None })
}

/// The rows that an index names, which may count from the end.
pub(super) fn rows(index: &[i64], n: usize) -> Result<Vec<usize>, String> {
    index.iter().map(|&i| axis(i, n).map_err(|_| format!("index {i} of {n}"))).collect()
}

pub(super) fn gather(x: &Known, index: &Known, a: i64) -> Made {
    let at = axis(a, x.dims.len())?;
    let ints = index.as_ints().ok_or("an index of no integers")?;
    product(&[index.count(), x.around(at)[0].max(1), x.around(at)[2].max(1)])?;
    x.along(at, &rows(ints, x.dims[at])?, &index.dims)
}

pub(super) fn gather_nd(x: &Known, index: &Known) -> Made {
    let (Some(ints), Some(&depth)) = (index.as_ints(), index.dims.last()) else {
        return Err("no index".into());
    };
    if depth == 0 || depth > x.dims.len() {
        return Err(format!("an index of {depth} axes into {}", x.dims.len()));
    }
    let inner: usize = x.dims[depth..].iter().product();
    let mut dims = index.dims[..index.dims.len() - 1].to_vec();
    dims.extend(&x.dims[depth..]);
    product(&dims)?;
    let mut at = Vec::new();
    for tuple in ints.chunks(depth) {
        let mut place = 0;
        for (&i, &n) in tuple.iter().zip(&x.dims) {
            place = place * n + axis(i, n).map_err(|_| format!("index {i} of {n}"))?;
        }
        at.extend((0..inner).map(|i| place * inner + i));
    }
    Ok(x.picked(dims, &at))
}

pub(super) fn select(cond: &Known, a: &Known, b: &Known) -> Made {
    let Data::Bools(_) = cond.data else { return Err("a condition that is none".into()) };
    let dims = broadcast(&broadcast(&cond.dims, &a.dims)?, &b.dims)?;
    let [c, a, b] = [cond, a, b].map(|k| k.expanded(&dims));
    let (c, a, b) = (c?, a?, b?);
    let Data::Bools(c) = c.data else { unreachable!("looked at above") };
    fn pick<T: Copy>(c: &[bool], a: &[T], b: &[T]) -> Vec<T> {
        c.iter().zip(a.iter().zip(b)).map(|(&c, (&a, &b))| if c { a } else { b }).collect()
    }
    let data = match (&a.data, &b.data) {
        (Data::Ints(a), Data::Ints(b)) => Data::Ints(pick(&c, a, b)),
        (Data::Floats(a), Data::Floats(b)) => Data::Floats(pick(&c, a, b)),
        (Data::Bools(a), Data::Bools(b)) => Data::Bools(pick(&c, a, b)),
        _ => return Err("operands of several types".into()),
    };
    Ok(Known { dims, data, origin: None })
}

pub(super) fn cumulated(x: &Known, a: i64) -> Made {
    let [outer, n, inner] = x.around(axis(a, x.dims.len())?);
    let Data::Ints(v) = &x.data else { return Err("sums of no integers".into()) };
    let mut v = v.clone();
    for o in 0..outer {
        for at in (o * n + 1) * inner..(o * n + n) * inner {
            v[at] = v[at].wrapping_add(v[at - inner]);
        }
    }
    Ok(Known { data: Data::Ints(v), origin: None, ..x.clone() })
}

pub(super) fn triangle(x: &Known, k: i64, upper: bool) -> Made {
    let [.., m, n] = x.dims[..] else { return Err("a triangle of no matrix".into()) };
    let keep = |i: usize| {
        let (row, col) = ((i / n % m) as i64, (i % n) as i64);
        if upper { col >= row + k } else { col <= row + k }
    };
    fn zeroed<T: Copy + Default>(v: &[T], keep: impl Fn(usize) -> bool) -> Vec<T> {
        v.iter().enumerate().map(|(i, &x)| if keep(i) { x } else { T::default() }).collect()
    }
    Ok(Known { data: each!(&x.data, v => zeroed(v, keep)), origin: None, ..x.clone() })
}

pub(super) fn product_of_matrices(a: &Known, b: &Known) -> Made {
    let (Some(x), Some(y)) = (a.as_floats(), b.as_floats()) else { return Err("no floats".into()) };
    let ([lead_a @ .., m, k], [lead_b @ .., k2, n]) = (&a.dims[..], &b.dims[..]) else {
        return Err("a product of vectors".into());
    };
    let (one_a, one_b) = (lead_a.iter().all(|&d| d == 1), lead_b.iter().all(|&d| d == 1));
    if k != k2 || !(one_a || one_b || lead_a == lead_b) {
        return Err(format!("a product of {:?} and {:?}", a.dims, b.dims));
    }
    let lead = if one_a { lead_b } else { lead_a };
    let batch: usize = lead.iter().product();
    let (own, each) = (if one_a { 0 } else { m * k }, if one_b { 0 } else { k * n });
    let dims = [lead, &[*m, *n]].concat();
    product(&[product(&dims)?, (*k).max(1)])?;
    let mut out = Vec::with_capacity(batch * m * n);
    for at in 0..batch {
        for i in 0..*m {
            for j in 0..*n {
                let term = |l: usize| x[at * own + i * k + l] * y[at * each + l * n + j];
                out.push((0..*k).map(term).sum());
            }
        }
    }
    Ok(Known::floats(dims, out))
}

pub(super) fn reduce(node: &Node, x: &Known, axes: Option<Vec<i64>>) -> Made {
    let rank = x.dims.len();
    let mut at = match axes {
        Some(a) if !a.is_empty() => a.iter().map(|&a| axis(a, rank)).collect::<Result<Vec<_>, _>>()?,
        _ if node.int("noop_with_empty_axes") == Some(1) => return Ok(x.clone()),
        _ => (0..rank).collect(),
    };
    at.sort_unstable();
    let mut k = x.clone();
    for &a in at.iter().rev() {
        k = super::arith::reduced(&node.op, &k, k.around(a))?.with_axis(&k.dims, a);
    }
    if node.int("keepdims") == Some(0) {
        let dims: Vec<usize> = (0..rank).filter(|i| !at.contains(i)).map(|i| k.dims[i]).collect();
        k.dims = dims;
    }
    Ok(k)
}
