//! `smooth`: SmoothQuant's scales between norms and the linear layers behind them (methods.md §5).

use qrmc_ir::{Builder, Diag, Dim, Func, Op, ReduceOp, Tensor, TensorType, UnaryOp, ValueId};

use crate::calibrate::{LayerResult, LayerRun, Stream, observe, walk_layers};
use crate::edges::{Linear, inputs, key};
use crate::options::{OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::scale::insert;
use crate::scale::measure::inline;
use crate::skip::{Skip, Skipped};
use crate::unit::Unit;

/// Least scale, and least magnitude of a weight's column.
const FLOOR: f64 = 1e-5;

options! {
    /// Options of `smooth`.
    struct SmoothOptions {
        /// how much of the range moves from activations into weights: s = max|x|^alpha / max|w|^(1-alpha)
        alpha: f64 = 0.85,
        /// layers and linear layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

/// The pass.
pub(crate) struct Smooth(pub(crate) SmoothOptions);

impl Pass for Smooth {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "smooth",
            summary: "move range from the activations behind norms into the weights that read them (SmoothQuant)",
            preserves: Preserves::Within(1e-4),
            accepts: (Stage::Float, Stage::Float),
            calibrates: true,
            transforms: true,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn legal(&self, module: &qrmc_ir::Module) -> Result<(), Diag> {
        self.0.skip.on(module)?;
        if (0.0..=1.0).contains(&self.0.alpha) {
            return Ok(());
        }
        Err(Diag::new("Q0602", format!("`smooth`: alpha is {}", self.0.alpha))
            .hint("from 0, all range stays in the activations, to 1; 0.85 is published"))
    }

    fn run(&self, unit: &mut Unit, cx: &mut PassCx<'_>) -> Result<(), PassError> {
        let skip = self.0.skip.on(&unit.module)?;
        let name = self.call().to_string();
        let alpha = self.0.alpha;
        let mut work =
            |unit: &Unit, cx: &mut PassCx<'_>, run: &LayerRun<'_>| measure(alpha, &skip, unit, cx, run);
        walk_layers(unit, cx, (&name, Stream::Before), &mut work, &mut |u, f, r, _| insert(u, f, r))
    }
}

/// The values behind norms that feed linear layers and nothing else.
fn edges(f: &Func, skip: &Skipped, unit: &Unit, index: usize) -> Vec<(ValueId, Vec<Linear>)> {
    let users = f.users();
    let mut out = inputs(f);
    out.retain(|(x, _)| f.def_node(*x).is_some_and(|n| matches!(n.op, Op::RmsNorm(_))));
    let role = |l: &Linear| crate::edges::role(&unit.module, f, l);
    out.retain(|(x, list)| {
        let only = users[x.0 as usize].iter().all(|u| list.iter().any(|l| l.node == *u));
        only && !list.iter().any(|l| skip.linear(index, &role(l)))
    });
    out
}

/// `s = clamp(max|x|^alpha / max|w|^(1 - alpha))` by channel.
pub(crate) fn scales(xmax: &[f32], wmax: &[f32], alpha: f64) -> Vec<f32> {
    let one = |(x, w): (&f32, &f32)| {
        let w = f64::from(*w).max(FLOOR);
        (f64::from(*x).powf(alpha) / w.powf(1.0 - alpha)).max(FLOOR) as f32
    };
    xmax.iter().zip(wmax).map(one).collect()
}

/// The largest magnitude by channel of an input of linear layers over all batches, and of the columns of their weights.
pub(crate) fn magnitudes(
    unit: &Unit,
    cx: &PassCx<'_>,
    f: &Func,
    x: ValueId,
    readers: &[Linear],
    batches: &[Tensor],
) -> Result<(Vec<f32>, Vec<f32>), PassError> {
    let [max, min] = ends(unit, cx, f.ty(x), batches)?;
    let xmax = max.iter().zip(&min).map(|(a, b)| a.max(-b)).collect();
    let mut wmax = Vec::new();
    let weights: Vec<ValueId> = readers.iter().map(|l| l.w).collect();
    for t in &cx.run(unit, &column_max(unit, f, &weights)?, &[])? {
        widen(&mut wmax, t);
    }
    Ok((xmax, wmax))
}

/// The largest and the smallest value by channel over all batches of a value of this type.
pub(crate) fn ends(
    unit: &Unit,
    cx: &PassCx<'_>,
    ty: &TensorType,
    batches: &[Tensor],
) -> Result<[Vec<f32>; 2], PassError> {
    let func = cx.engine.prepare(&unit.module, &maxima(&unit.module, ty)?, &unit.weights)?;
    let mut most = [Vec::new(), Vec::new()];
    for t in batches {
        for (most, t) in most.iter_mut().zip(func.run(&[t])?) {
            widen(most, &t);
        }
    }
    most[1].iter_mut().for_each(|x| *x = -*x);
    Ok(most)
}

/// `@maxima(x [B, S, n]) -> max of x [1, 1, n], max of -x [1, 1, n]`
fn maxima(module: &qrmc_ir::Module, ty: &TensorType) -> Result<Func, Diag> {
    let mut b = Builder::new(module, "maxima");
    let x = b.param(Some("x"), ty.clone());
    let negated = b.op1(Op::Unary(UnaryOp::Neg), &[x])?;
    let mut outs = [x, negated];
    for v in &mut outs {
        for axis in (0..b.ty(*v).shape.rank().saturating_sub(1)).rev() {
            *v = b.op1(Op::Reduce(ReduceOp::Max, axis as u8), &[*v])?;
        }
    }
    Ok(b.finish(&outs))
}

/// `@column_max() -> [1, n]` for each weight: the largest magnitude in each column.
fn column_max(unit: &Unit, f: &Func, weights: &[ValueId]) -> Result<Func, Diag> {
    let plain = qrmc_ir::extract(&unit.module, f, "weights", &[], weights)?;
    let mut b = Builder::new(&unit.module, "column_max");
    let mut outs = Vec::new();
    for w in inline(&mut b, &plain, &[])? {
        let a = b.op1(Op::Unary(UnaryOp::Abs), &[w])?;
        outs.push(b.op1(Op::Reduce(ReduceOp::Max, 0), &[a])?);
    }
    Ok(b.finish(&outs))
}

/// Elementwise maximum; `most` is empty before the first.
fn widen(most: &mut Vec<f32>, t: &Tensor) {
    let v = t.as_f32().unwrap_or(&[]);
    most.resize(v.len(), f32::NEG_INFINITY);
    most.iter_mut().zip(v).for_each(|(m, x)| *m = m.max(*x));
}

fn measure(
    alpha: f64,
    skip: &Skipped,
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
) -> Result<(LayerResult, Vec<Tensor>), PassError> {
    let f = unit.module.func(run.func).clone();
    let edges = edges(&f, skip, unit, run.index);
    let wanted: Vec<ValueId> = edges.iter().map(|(x, _)| *x).collect();
    let (values, next) = observe(unit, cx, run, &wanted)?;
    let mut result = LayerResult::new();
    for ((x, list), batches) in edges.iter().zip(values) {
        let n = f.ty(*x).shape.last().and_then(Dim::fixed).unwrap_or(0);
        let (xmax, wmax) = magnitudes(unit, cx, &f, *x, list, &batches)?;
        result.push((format!("{}.s", key(&f, *x)), Tensor::f32([n], scales(&xmax, &wmax, alpha))));
    }
    Ok((result, next))
}

#[cfg(test)]
mod tests {
    use super::scales;

    // methods.md §5 [golden].
    #[test]
    fn scales_golden() {
        let want = [4.136_152_03, 0.636_525_06, 10.0];
        for (have, want) in scales(&[4.0, 0.5, 10.0], &[0.2, 0.4, 0.1], 0.85).iter().zip(want) {
            assert!((f64::from(*have) - want).abs() < 1e-6 * want, "{have} {want}");
        }
    }
}
