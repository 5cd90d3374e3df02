//! `scale`: per-channel scales inserted on the edges that feed linear layers.
//!
//! A scale pair divides an activation channel by `s` and multiplies the matching weight columns by `s`. The function
//! stays; what changes is which weights rounding hurts. The search is AWQ's (arXiv 2306.00978, in the form of
//! methods.md §3): `s = mean|x|^r`, normalised, for 20 ratios, kept where the output of the block moves least.
//!
//! Everything heavy is a function of the IR that the engine runs. Where the compared output is the product itself, its
//! squared error over all tokens is a quadratic form in the Gram matrix of the input, and the tokens need not be
//! visited for each ratio.

pub(crate) mod measure;

use qrmc_ir::{BinaryOp, Diag, Dim, Func, FuncId, Module, Op, Place as At, ScaleType, Tensor, ValueId};

use crate::annotate::check_group;
use crate::calibrate::{LayerResult, LayerRun, Stream, observe, walk_layers};
use crate::edges::{Linear, inputs, key, role, transform_edge};
use crate::options::{Bits, Group, OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::skip::{Skip, Skipped};
use crate::unit::Unit;
use measure::{Measure, abs_sum, accumulate, candidate};

/// Smallest scale before normalisation (methods.md §3).
const MIN_SCALE: f64 = 1e-4;

options! {
    /// Options of `scale`.
    struct ScaleOptions {
        /// bits that the search rounds to
        w: Bits = Bits(4),
        /// weights that share a scale in the search
        group: Group = Group::Size(128),
        /// signed codes without a zero point
        sym: bool = false,
        /// type in which quantizer scales are stored
        scale: ScaleType = ScaleType::F32,
        /// ratios that are tried: r = 0, 1/n, .. (n-1)/n
        grid: u32 = 20,
        /// compare losses with the engine's coarse products (2^-15) where it has some
        coarse: bool = true,
        /// layers and linear layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

/// The pass.
pub(crate) struct Scale(pub(crate) ScaleOptions);

impl Pass for Scale {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "scale",
            summary: "AWQ's search: divide the channels that feed linear layers by scales, multiply the columns of the weights",
            preserves: Preserves::Within(1e-4),
            accepts: (Stage::Float, Stage::Float),
            calibrates: true,
            transforms: true,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn legal(&self, module: &Module) -> Result<(), Diag> {
        self.0.skip.on(module)?;
        if self.0.grid == 0 {
            return Err(Diag::new("Q0602", "`scale`: a grid of 0 ratios").hint("AWQ tries 20"));
        }
        check_group(module, self.0.group, 1)
    }

    fn run(&self, unit: &mut Unit, cx: &mut PassCx<'_>) -> Result<(), PassError> {
        let options = self.0.clone();
        let name = self.call().to_string();
        let mut work =
            |unit: &Unit, cx: &mut PassCx<'_>, run: &LayerRun<'_>| search_layer(&options, unit, cx, run);
        walk_layers(unit, cx, (&name, Stream::Before), &mut work, &mut |u, f, r, _| insert(u, f, r))
    }
}

/// An edge that may carry a scale pair.
struct Edge {
    /// The value that feeds the linear layers.
    x: ValueId,
    /// The linear layers.
    linears: Vec<Linear>,
    /// The output whose error decides.
    compared: ValueId,
}

/// The edges of a layer: what feeds linear layers and nothing else, and comes from where a scale can be folded.
fn edges(module: &Module, f: &Func, skip: &Skipped, index: usize) -> Result<Vec<Edge>, Diag> {
    let users = f.users();
    let mut out: Vec<Edge> = Vec::new();
    for (x, linears) in inputs(f) {
        let (Some(producer), l) = (f.def_node(x), linears[0]) else { continue };
        let compared = match producer.op {
            // The whole block behind a norm: what is added to the residual stream.
            Op::RmsNorm(_) => block_output(f, x)?,
            Op::Binary(BinaryOp::Mul) => l.y,
            // The published search scales this edge only where both weights are of one shape: without grouped heads.
            Op::Attention(a) if a.heads == a.kv_heads && is_square(f, &l) => l.y,
            _ => continue,
        };
        out.push(Edge { x, linears, compared });
    }
    // A value that something else reads too cannot be scaled for the linear layers alone.
    out.retain(|e| users[e.x.0 as usize].iter().all(|u| e.linears.iter().any(|l| l.node == *u)));
    out.retain(|e| !e.linears.iter().any(|l| skip.linear(index, &role(module, f, l))));
    Ok(out)
}

fn is_square(f: &Func, l: &Linear) -> bool {
    let dims = &f.ty(l.w).shape.0;
    dims.len() == 2 && dims[0] == dims[1]
}

/// The value behind `x` that is added to the residual stream: `%attn_out` or `%mlp_out`.
fn block_output(f: &Func, x: ValueId) -> Result<ValueId, Diag> {
    let mut reached = vec![false; f.value_count()];
    reached[x.0 as usize] = true;
    for node in &f.nodes {
        let from = node.ins.iter().any(|v| reached[v.0 as usize]);
        if from && matches!(node.op, Op::Binary(BinaryOp::Add)) {
            // An addition of something that does not come from `x` and is no weight is the residual.
            let other = node.ins.iter().find(|v| !reached[v.0 as usize]);
            let block = node.ins.iter().find(|v| reached[v.0 as usize]);
            if let (Some(other), Some(block)) = (other, block)
                && f.ty(*other) == f.ty(*block)
            {
                return Ok(*block);
            }
        }
        if from {
            node.outs.iter().for_each(|o| reached[o.0 as usize] = true);
        }
    }
    let place = At { func: Some(f.name.clone()), value: Some(f.show(x).to_string()), line: None };
    Err(Diag::new("Q0603", "the block behind this norm is not added to a residual stream").at(place))
}

/// `s = clamp(x_mean^r) / sqrt(max * min)`
pub(crate) fn scales(x_mean: &[f64], ratio: f64) -> Vec<f32> {
    let s: Vec<f64> = x_mean.iter().map(|x| x.powf(ratio).max(MIN_SCALE)).collect();
    let max = s.iter().copied().fold(0.0, f64::max);
    let min = s.iter().copied().fold(f64::INFINITY, f64::min);
    let norm = (max * min).sqrt();
    s.iter().map(|x| (x / norm) as f32).collect()
}

/// The order in which ratios are tried: none first, whose loss is reported, then from the middle outwards, where the
/// best ones are. The order shows in nothing but time.
fn order(grid: u32) -> Vec<u32> {
    let mut rest: Vec<u32> = (1..grid).collect();
    rest.sort_by_key(|i| (i.abs_diff(grid / 2), *i));
    std::iter::once(0).chain(rest).collect()
}

/// The search on one layer: for each edge, its scales and the losses without and with them.
fn search_layer(
    o: &ScaleOptions,
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
) -> Result<(LayerResult, Vec<Tensor>), PassError> {
    let f = unit.module.func(run.func).clone();
    let edges = edges(&unit.module, &f, &o.skip.resolve(&unit.module), run.index)?;
    let mut result = LayerResult::new();
    let wanted: Vec<ValueId> = edges.iter().map(|e| e.x).chain(edges.iter().map(|e| e.compared)).collect();
    let (mut values, next) = observe(unit, cx, run, &wanted)?;
    let compared = values.split_off(edges.len());
    for ((e, xs), references) in edges.iter().zip(values).zip(compared) {
        let n = f.ty(e.x).shape.last().and_then(Dim::fixed).unwrap_or(0);
        let tokens: usize = xs.iter().map(|t| t.len() / n.max(1)).sum();
        let abs = cx.engine.prepare(&unit.module, &abs_sum(&unit.module, f.ty(e.x))?, &unit.weights)?;
        let mut sums = Vec::new();
        for x in &xs {
            accumulate(&mut sums, &abs.run(&[x])?[0]);
        }
        let x_mean: Vec<f64> = sums.iter().map(|s| s / tokens.max(1) as f64).collect();
        let candidate = cx.engine.prepare(&unit.module, &candidate(o, unit, &f, e)?, &unit.weights)?;
        let measure = Measure::new(unit, cx, &f, e, xs, references, o.coarse)?;
        // Least loss, and of equal ones the first ratio's.
        let mut best: Option<(f64, u32, Vec<f32>)> = None;
        let mut plain = f64::NAN;
        for i in order(o.grid) {
            if cx.report.interrupted() {
                return Err(PassError::Interrupted);
            }
            let s = scales(&x_mean, f64::from(i) / f64::from(o.grid));
            let weights = candidate.run(&[&Tensor::f32([n], s.clone())])?;
            let limit = best.as_ref().map_or(f64::INFINITY, |b| b.0);
            let Some(loss) = measure.loss(cx, unit, &weights, limit)? else { continue };
            if i == 0 {
                plain = loss;
            }
            if best.as_ref().is_none_or(|b| (loss, i) < (b.0, b.1)) && loss.is_finite() {
                best = Some((loss, i, s));
            }
        }
        let Some((loss, _, s)) = best else {
            let value = f.show(e.x);
            return Err(PassError::Calibration {
                what: format!("no ratio gives a finite loss on {value} of @{}", f.name),
                hint: "activations overflow on the calibration text; look at the text and the source weights"
                    .into(),
            });
        };
        let name = key(&f, e.x);
        result.push((format!("{name}.s"), Tensor::f32([n], s)));
        result.push((format!("{name}.loss"), Tensor::new([2], qrmc_ir::Data::F64(vec![plain, loss]))));
    }
    Ok((result, next))
}

/// Puts the scale pairs of one layer into the graph.
pub(crate) fn insert(unit: &mut Unit, func: FuncId, result: LayerResult) -> Result<(), PassError> {
    for (key, tensor) in result {
        let Some(value) = key.strip_suffix(".s") else { continue };
        let name = unit.module.func(func).name.clone();
        let id = unit.define(&format!("{name}.{value}.scale"), tensor)?;
        let old = unit.module.func(func);
        let Some(x) = old.find(value) else {
            return Err(Diag::new("Q0101", format!("@{name} has no value %{value}")).into());
        };
        let new = insert_scale(&unit.module, old, x, id)?;
        unit.module.funcs[func.0 as usize] = new;
    }
    Ok(())
}

/// `x` becomes `x / s` for the linear layers that read it, and their weights `w * s`. The name of `x` moves to what
/// the linear layers read.
pub(crate) fn insert_scale(
    module: &Module,
    f: &Func,
    x: ValueId,
    s: qrmc_ir::WeightId,
) -> Result<Func, Diag> {
    transform_edge(
        module,
        f,
        x,
        |b, x| {
            let scale = b.weight(s);
            b.binary(BinaryOp::Div, x, scale)
        },
        |b, w, _| {
            let scale = b.weight(s);
            b.binary(BinaryOp::Mul, w, scale)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::scales;

    // methods.md §3 [golden].
    #[test]
    fn scales_golden() {
        let mean = [0.5, 2.0, 8.0, 0.01];
        for (ratio, want) in [
            (0.5, [1.329_573_97, 2.659_147_95, 5.318_295_90, 0.188_030_15]),
            (0.95, [1.718_121_06, 6.412_254_52, 23.931_380_05, 0.041_786_14]),
        ] {
            for (have, want) in scales(&mean, ratio).iter().zip(want) {
                assert!((f64::from(*have) - want).abs() < 1e-6 * want, "{have} {want}");
            }
        }
        assert_eq!(scales(&mean, 0.0), [1.0; 4]);
    }
}
