//! `clip-search`: bounds on weights before rounding (AWQ, methods.md §3 steps 5 and 6).
//!
//! For every row and group, the bound `max|w| * (1 - i / grid)` that moves the group's share of the product least on
//! a sample of tokens. That error is a quadratic form in the Gram matrix of the group's inputs.

use qrmc_ir::{
    BinaryOp, Builder, Diag, Dim, Elem, Func, FuncId, Grain, Module, Op, QuantSpec, ReduceOp, Rule, Sym,
    Tensor, TensorType, ValueId, extract, rewrite,
};

use crate::calibrate::{LayerResult, LayerRun, Stream, observe, walk_layers};
use crate::edges::{linears, role};
use crate::options::{OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::skip::Skip;
use crate::unit::Unit;

/// Tokens in the sample, about (methods.md §3 step 5).
const SAMPLE: usize = 512;

options! {
    /// Options of `clip-search`.
    struct ClipSearchOptions {
        /// steps of the full range; half of them are tried
        grid: u32 = 20,
        /// largest share of the range that is cut off
        shrink: f64 = 0.5,
        /// layers and linear layers that are left alone
        skip: Skip = Skip(vec!["q_proj".into(), "k_proj".into()]),
    }
}

/// The pass.
pub(crate) struct ClipSearch(pub(crate) ClipSearchOptions);

impl Pass for ClipSearch {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "clip-search",
            summary: "AWQ's search: bound each group of annotated weights where that moves the product least",
            preserves: Preserves::Exact,
            accepts: (Stage::Annotated, Stage::Annotated),
            calibrates: true,
            transforms: false,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn legal(&self, module: &Module) -> Result<(), Diag> {
        if self.0.grid == 0 || !(0.0..1.0).contains(&self.0.shrink) {
            let m = format!("`clip-search`: grid {} and shrink {}", self.0.grid, self.0.shrink);
            return Err(Diag::new("Q0602", m).hint("grid is at least 1, shrink is from 0 to below 1"));
        }
        // What is skipped by default need not be there.
        let given = self.0.skip != ClipSearchOptions::default().skip;
        if given { self.0.skip.on(module).map(|_| ()) } else { Ok(()) }
    }

    fn run(&self, unit: &mut Unit, cx: &mut PassCx<'_>) -> Result<(), PassError> {
        let o = self.0.clone();
        let name = self.call().to_string();
        let mut work = |unit: &Unit, cx: &mut PassCx<'_>, run: &LayerRun<'_>| search_layer(&o, unit, cx, run);
        walk_layers(unit, cx, (&name, Stream::Before), &mut work, &mut |u, f, r, _| insert(u, f, r))
    }
}

/// A linear layer whose weight is annotated.
struct Target {
    role: String,
    x: ValueId,
    /// The float weight under the quantizer.
    w: ValueId,
    spec: QuantSpec,
    rule: Rule,
}

fn targets(module: &Module, f: &Func, skip: &Skip, index: usize) -> Vec<Target> {
    let skip = skip.resolve(module);
    linears(f)
        .iter()
        .filter_map(|l| match f.def_node(l.w)? {
            n if matches!(n.op, Op::FakeQuant(..)) => {
                let Op::FakeQuant(spec, rule) = n.op else { return None };
                Some(Target { role: role(module, f, l), x: l.x, w: n.ins[0], spec, rule })
            }
            _ => None,
        })
        .filter(|t| !skip.linear(index, &t.role))
        .collect()
}

fn group_size(spec: QuantSpec, n: usize) -> usize {
    match spec.grain {
        Grain::Group(g) => g as usize,
        _ => n,
    }
}

/// `@sums(x [1, m, groups, g]) -> [1, groups, g, g]`: for each group `xᵀ x`.
fn group_gram(module: &Module, groups: usize, g: usize) -> Result<Func, Diag> {
    let mut b = Builder::new(module, "group_gram");
    let dims = vec![Dim::Fixed(1), Sym::S.into(), Dim::from(groups), Dim::from(g)];
    let x = b.param(Some("x"), TensorType::new(Elem::F32, dims));
    let cols = b.op1(Op::Transpose(vec![0, 2, 3, 1]), &[x])?;
    let rows = b.op1(Op::Transpose(vec![0, 2, 1, 3]), &[x])?;
    let y = b.op1(Op::MatMul { trans_b: false }, &[cols, rows])?;
    Ok(b.finish(&[y]))
}

/// `@extent(w [n, k]) -> max|w|` of each row and group, `[n, groups, 1]`.
fn extent(module: &Module, n: usize, k: usize, g: usize) -> Result<Func, Diag> {
    let mut b = Builder::new(module, "extent");
    let w = b.param(Some("w"), TensorType::new(Elem::F32, [n, k]));
    let w = b.op1(Op::Unary(qrmc_ir::UnaryOp::Abs), &[w])?;
    let w = b.op1(Op::Reshape([n, k / g, g].into()), &[w])?;
    let y = b.op1(Op::Reduce(ReduceOp::Max, 2), &[w])?;
    Ok(b.finish(&[y]))
}

/// `@error(w [n, k], bound [n, groups], gram [groups, g, g]) -> [groups, n, 1]`: squared error of each group's share
/// of the product, summed over the sample.
fn error(module: &Module, t: &Target, n: usize, k: usize) -> Result<Func, Diag> {
    let g = group_size(t.spec, k);
    let groups = k / g;
    let mut b = Builder::new(module, "error");
    let w = b.param(Some("w"), TensorType::new(Elem::F32, [n, k]));
    let bound = b.param(Some("bound"), TensorType::new(Elem::F32, [n, groups]));
    let gram = b.param(Some("gram"), TensorType::new(Elem::F32, [groups, g, g]));
    let clipped = b.op1(Op::Clip(t.spec), &[w, bound])?;
    let rounded = b.op1(Op::FakeQuant(t.spec, t.rule), &[clipped])?;
    let d = b.binary(BinaryOp::Sub, rounded, w)?;
    let d = b.op1(Op::Reshape([n, groups, g].into()), &[d])?;
    let d = b.op1(Op::Transpose(vec![1, 0, 2]), &[d])?;
    let m = b.op1(Op::MatMul { trans_b: false }, &[d, gram])?;
    let y = b.binary(BinaryOp::Mul, m, d)?;
    let y = b.op1(Op::Reduce(ReduceOp::Sum, 2), &[y])?;
    Ok(b.finish(&[y]))
}

/// Every `stride`-th row of all batches, `[1, rows, n]`.
fn sample(xs: &[Tensor], n: usize) -> Tensor {
    let tokens: usize = xs.iter().map(|t| t.len() / n.max(1)).sum();
    let stride = (tokens / SAMPLE).max(1);
    let mut rows = Vec::new();
    let mut at = 0usize;
    for x in xs {
        for row in x.as_f32().unwrap_or(&[]).chunks(n.max(1)) {
            if at.is_multiple_of(stride) {
                rows.extend_from_slice(row);
            }
            at += 1;
        }
    }
    Tensor::f32([1, rows.len() / n.max(1), n], rows)
}

fn search_layer(
    o: &ClipSearchOptions,
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
) -> Result<(LayerResult, Vec<Tensor>), PassError> {
    let m = &unit.module;
    let f = m.func(run.func);
    let targets = targets(m, f, &o.skip, run.index);
    let mut xs: Vec<ValueId> = targets.iter().map(|t| t.x).collect();
    xs.sort_unstable();
    xs.dedup();
    // Inputs as the float model has them: quantizers are the identity in front of what is searched.
    let (fed, next) = observe(unit, cx, run, &xs)?;
    let samples: Vec<Tensor> = xs
        .iter()
        .zip(&fed)
        .map(|(x, list)| sample(list, f.ty(*x).shape.last().and_then(Dim::fixed).unwrap_or(1)))
        .collect();
    drop(fed);
    let mut result = LayerResult::new();
    let count = (o.shrink * f64::from(o.grid)) as u32;
    for t in &targets {
        if cx.report.interrupted() {
            return Err(PassError::Interrupted);
        }
        let at = xs.iter().position(|x| *x == t.x).unwrap_or(0);
        let w = cx.run(unit, &extract(m, f, "weight", &[], &[t.w])?, &[])?.remove(0);
        let (n, k) = (w.shape()[0], w.shape()[1]);
        let g = group_size(t.spec, k);
        let (groups, rows) = (k / g, samples[at].shape()[1]);
        let x = samples[at].clone().reshaped([1, rows, groups, g]);
        let gram = cx.run(unit, &group_gram(m, groups, g)?, &[&x])?.remove(0).reshaped([groups, g, g]);
        let extents = cx.run(unit, &extent(m, n, k, g)?, &[&w])?.remove(0);
        let extents = extents.as_f32().unwrap_or(&[]).to_vec();
        let error = cx.engine.prepare(m, &error(m, t, n, k)?, &unit.weights)?;
        let mut best = vec![(f32::INFINITY, 0.0f32); n * groups];
        let (mut before, mut after) = (0.0, 0.0);
        for i in 0..count.max(1) {
            let keep = 1.0 - f64::from(i) / f64::from(o.grid);
            let bound: Vec<f32> = extents.iter().map(|&e| (f64::from(e) * keep) as f32).collect();
            let bound = Tensor::f32([n, groups], bound);
            let errors = error.run(&[&w, &bound, &gram])?.remove(0);
            cx.report.flops("clip-search", 2.0 * (n * k * g) as f64);
            let (errors, bound) = (errors.as_f32().unwrap_or(&[]), bound.as_f32().unwrap_or(&[]));
            for group in 0..groups {
                for row in 0..n {
                    let e = errors[group * n + row];
                    let b = &mut best[row * groups + group];
                    if i == 0 {
                        before += f64::from(e);
                    }
                    if e < b.0 {
                        *b = (e, bound[row * groups + group]);
                    }
                }
            }
        }
        if let Some(bad) = best.iter().position(|b| !b.0.is_finite()) {
            return Err(PassError::Calibration {
                what: format!(
                    "no bound gives a finite error on row {} of {} in @{}",
                    bad / groups,
                    t.role,
                    f.name
                ),
                hint: "activations overflow on the calibration text; look at the text and the source weights"
                    .into(),
            });
        }
        after += best.iter().map(|b| f64::from(b.0)).sum::<f64>();
        let per = (rows * n) as f64;
        result.push((
            format!("{}.bound", t.role),
            Tensor::f32([n, groups], best.iter().map(|b| b.1).collect()),
        ));
        let losses = vec![before / per, after / per];
        result.push((format!("{}.loss", t.role), Tensor::new([2], qrmc_ir::Data::F64(losses))));
    }
    Ok((result, next))
}

fn insert(unit: &mut Unit, func: FuncId, result: LayerResult) -> Result<(), PassError> {
    for (key, tensor) in result {
        let Some(wanted) = key.strip_suffix(".bound") else { continue };
        let name = unit.module.func(func).name.clone();
        let id = unit.define(&format!("{name}.{wanted}.bound"), tensor)?;
        let m = &unit.module;
        let old = m.func(func);
        let target = targets(m, old, &Skip::default(), 0).into_iter().find(|t| t.role == wanted);
        let Some(target) = target else {
            return Err(Diag::new("Q0101", format!("@{name} has no annotated {wanted}")).into());
        };
        let new = rewrite(m, old, |b, node, ins| match node.op {
            Op::FakeQuant(spec, rule) if node.ins[0] == target.w => {
                let bound = b.weight(id);
                let clipped = b.op1(Op::Clip(spec), &[ins[0], bound])?;
                b.op(Op::FakeQuant(spec, rule), &[clipped]).map(Some)
            }
            _ => Ok(None),
        })?;
        unit.module.funcs[func.0 as usize] = new;
    }
    Ok(())
}
