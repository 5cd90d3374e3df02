//! `scale`: per-channel scales inserted on the edges that feed linear layers.
//!
//! A scale pair divides an activation channel by `s` and multiplies the matching weight columns by `s`. The function
//! stays; what changes is which weights rounding hurts. The search is AWQ's (arXiv 2306.00978, in the form of
//! methods.md §3): `s = mean|x|^r`, normalised, for 20 ratios, kept where the output of the block moves least.
//!
//! Everything heavy is a function of the IR that the engine runs. Where the compared output is the product itself, its
//! squared error over all tokens is a quadratic form in the Gram matrix of the input, and the tokens need not be
//! visited for each ratio.

use qrmc_ir::{
    BinaryOp, Builder, Diag, Dim, Func, FuncId, Module, Op, Place as At, ReduceOp, Rule, ScaleType, Tensor, UnaryOp,
    ValueId, extract, rewrite,
};

use crate::annotate::{check_group, weight_spec};
use crate::calibrate::{LayerResult, LayerRun, walk_layers};
use crate::edges::{Linear, linears};
use crate::options::{Bits, Group, OptionValue, options};
use crate::pass::{LayerLoss, Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::unit::Unit;

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
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn run(&self, unit: &mut Unit, cx: &mut PassCx<'_>) -> Result<(), PassError> {
        check_group(unit, self.0.group)?;
        if self.0.grid == 0 {
            return Err(Diag::new("Q0602", "`scale`: a grid of 0 ratios").hint("AWQ tries 20").into());
        }
        let options = self.0.clone();
        let name = self.call().to_string();
        let mut work = |unit: &Unit, cx: &mut PassCx<'_>, run: &LayerRun<'_>| search_layer(&options, unit, cx, run);
        let mut apply = |unit: &mut Unit, cx: &mut PassCx<'_>, index, func, result| insert(unit, cx, index, func, result);
        walk_layers(unit, cx, &name, &mut work, &mut apply)
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
fn edges(module: &Module, f: &Func) -> Result<Vec<Edge>, Diag> {
    let all = linears(f);
    let users = f.users();
    let mut out: Vec<Edge> = Vec::new();
    for l in &all {
        if let Some(e) = out.iter_mut().find(|e| e.x == l.x) {
            e.linears.push(*l);
            continue;
        }
        let Some(producer) = f.def_node(l.x) else { continue };
        let compared = match producer.op {
            // The whole block behind a norm: what is added to the residual stream.
            Op::RmsNorm(_) => block_output(f, l.x)?,
            Op::Binary(BinaryOp::Mul) => l.y,
            // The published search scales this edge only where both weights are of one shape: without grouped heads.
            Op::Attention(a) if a.heads == a.kv_heads && is_square(f, l) => l.y,
            _ => continue,
        };
        out.push(Edge { x: l.x, linears: vec![*l], compared });
    }
    // A value that something else reads too cannot be scaled for the linear layers alone.
    out.retain(|e| users[e.x.0 as usize].iter().all(|u| e.linears.iter().any(|l| l.node == *u)));
    let _ = module;
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
            if let (Some(other), Some(block)) = (other, block) {
                if f.ty(*other) == f.ty(*block) {
                    return Ok(*block);
                }
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

/// `@candidate(s) -> w'..`: the weights of an edge as rounding with these scales would leave them.
fn candidate(o: &ScaleOptions, unit: &Unit, f: &Func, e: &Edge) -> Result<Func, Diag> {
    let weights: Vec<ValueId> = e.linears.iter().map(|l| l.w).collect();
    let plain = extract(&unit.module, f, "candidate", &[], &weights)?;
    let spec = weight_spec(o.w, o.group, o.sym, o.scale);
    let mut b = Builder::new(&unit.module, "candidate");
    let n = f.ty(e.x).shape.last().and_then(Dim::fixed).unwrap_or(0);
    let s = b.param(Some("s"), qrmc_ir::TensorType::new(qrmc_ir::Elem::F32, [n]));
    let ws = inline(&mut b, &plain, &[])?;
    let mut outs = Vec::new();
    for w in ws {
        let scaled = b.binary(BinaryOp::Mul, w, s)?;
        let rounded = b.op1(Op::FakeQuant(spec, Rule::Awq), &[scaled])?;
        outs.push(b.binary(BinaryOp::Div, rounded, s)?);
    }
    Ok(b.finish(&outs))
}

/// Copies the nodes of `f` into `b`, with `args` for its parameters; gives its results.
pub(crate) fn inline(b: &mut Builder<'_>, f: &Func, args: &[ValueId]) -> Result<Vec<ValueId>, Diag> {
    let mut map = std::collections::HashMap::new();
    for (&p, &a) in f.params.iter().zip(args) {
        map.insert(p, a);
    }
    for node in &f.nodes {
        let ins: Vec<ValueId> = node.ins.iter().map(|v| map[v]).collect();
        let outs = match node.op {
            Op::Weight(w) => vec![b.weight(w)],
            _ => b.op(node.op.clone(), &ins)?,
        };
        map.extend(node.outs.iter().copied().zip(outs));
    }
    Ok(f.results.iter().map(|r| map[r]).collect())
}

/// `sum((a - b)²)` as `[1, 1, 1]`.
fn squared_error(b: &mut Builder<'_>, a: ValueId, other: ValueId) -> Result<ValueId, Diag> {
    let d = b.binary(BinaryOp::Sub, a, other)?;
    let mut y = b.binary(BinaryOp::Mul, d, d)?;
    for axis in (0..b.ty(y).shape.rank()).rev() {
        y = b.op1(Op::Reduce(ReduceOp::Sum, axis as u8), &[y])?;
    }
    Ok(y)
}

/// `@block(x, pos, k_past, v_past, w..) -> compared`: the part of the layer behind an edge, weights as arguments.
fn block(unit: &Unit, f: &Func, e: &Edge) -> Result<Func, Diag> {
    let cut: Vec<ValueId> =
        std::iter::once(e.x).chain(f.params[1..].iter().copied()).chain(e.linears.iter().map(|l| l.w)).collect();
    extract(&unit.module, f, "block", &cut, &[e.compared])
}

/// `@loss(x, pos, k_past, v_past, w.., reference) -> sum of squared differences`
fn loss(unit: &Unit, block: &Func) -> Result<Func, Diag> {
    let mut b = Builder::new(&unit.module, "loss");
    let mut args: Vec<ValueId> = block.params.iter().map(|&p| b.param(None, block.ty(p).clone())).collect();
    let reference = b.param(Some("reference"), block.ty(block.results[0]).clone());
    let y = inline(&mut b, block, &args)?[0];
    args.clear();
    let total = squared_error(&mut b, y, reference)?;
    Ok(b.finish(&[total]))
}

/// `@gram(x [1, m, n]) -> [1, n, n]`: `xᵀ x`
pub(crate) fn gram(module: &Module, n: usize) -> Result<Func, Diag> {
    use qrmc_ir::{Elem, Sym, TensorType};
    let mut b = Builder::new(module, "gram");
    let ty = TensorType::new(Elem::F32, vec![Dim::Fixed(1), Sym::S.into(), Dim::from(n)]);
    let x = b.param(Some("x"), ty);
    let xt = b.op1(Op::Transpose(vec![0, 2, 1]), &[x])?;
    let g = b.op1(Op::MatMul { trans_b: false }, &[xt, x])?;
    Ok(b.finish(&[g]))
}

/// `@gram_loss(w', w, gram) -> sum((w' - w) gram (w' - w)ᵀ)` over rows.
fn gram_loss(module: &Module, rows: usize, n: usize) -> Result<Func, Diag> {
    use qrmc_ir::{Elem, TensorType};
    let mut b = Builder::new(module, "gram_loss");
    let w2 = b.param(None, TensorType::new(Elem::F32, [rows, n]));
    let w = b.param(None, TensorType::new(Elem::F32, [rows, n]));
    let g = b.param(None, TensorType::new(Elem::F32, [n, n]));
    let d = b.binary(BinaryOp::Sub, w2, w)?;
    let m = b.op1(Op::MatMul { trans_b: false }, &[d, g])?;
    let y = b.binary(BinaryOp::Mul, m, d)?;
    let y = b.op1(Op::Reduce(ReduceOp::Sum, 1), &[y])?;
    let y = b.op1(Op::Reduce(ReduceOp::Sum, 0), &[y])?;
    Ok(b.finish(&[y]))
}

/// `@absmean(x) -> sum over tokens of |x|`, `[1, 1, n]`
fn abs_sum(module: &Module, ty: &qrmc_ir::TensorType) -> Result<Func, Diag> {
    let mut b = Builder::new(module, "abs_sum");
    let x = b.param(Some("x"), ty.clone());
    let a = b.op1(Op::Unary(UnaryOp::Abs), &[x])?;
    let a = b.op1(Op::Reduce(ReduceOp::Sum, 1), &[a])?;
    let a = b.op1(Op::Reduce(ReduceOp::Sum, 0), &[a])?;
    Ok(b.finish(&[a]))
}

/// Adds the elements of `t` to sums in double precision.
pub(crate) fn accumulate(sums: &mut Vec<f64>, t: &Tensor) {
    let v = t.as_f32().unwrap_or(&[]);
    sums.resize(v.len(), 0.0);
    sums.iter_mut().zip(v).for_each(|(s, &x)| *s += f64::from(x));
}

fn scalar(t: &Tensor) -> f64 {
    t.as_f32().and_then(|v| v.first()).map_or(f64::NAN, |&x| f64::from(x))
}

fn key_of(f: &Func, x: ValueId) -> String {
    f.show(x).to_string().trim_start_matches('%').to_owned()
}

/// The search on one layer: for each edge, its scales and the losses without and with them.
fn search_layer(
    o: &ScaleOptions,
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
) -> Result<LayerResult, PassError> {
    let f = unit.module.func(run.func).clone();
    let edges = edges(&unit.module, &f)?;
    let mut result = LayerResult::new();
    // All inputs of the edges at once: the layer up to them runs once.
    let xs: Vec<ValueId> = edges.iter().map(|e| e.x).collect();
    let inputs = extract(&unit.module, &f, "inputs", &f.params, &xs)?;
    let inputs = cx.engine.prepare(&unit.module, &inputs, &unit.weights)?;
    let mut fed: Vec<Vec<Tensor>> = vec![Vec::new(); edges.len()];
    for x in run.stream {
        let args = run.args(unit, x);
        for (list, t) in fed.iter_mut().zip(inputs.run(&args.each_ref())?) {
            list.push(t);
        }
    }
    for (e, xs) in edges.iter().zip(fed) {
        let n = f.ty(e.x).shape.last().and_then(Dim::fixed).unwrap_or(0);
        let tokens: usize = xs.iter().map(|t| t.len() / n.max(1)).sum();
        let abs = cx.engine.prepare(&unit.module, &abs_sum(&unit.module, f.ty(e.x))?, &unit.weights)?;
        let mut sums = Vec::new();
        for x in &xs {
            accumulate(&mut sums, &abs.run(&[x])?[0]);
        }
        let x_mean: Vec<f64> = sums.iter().map(|s| s / tokens.max(1) as f64).collect();
        let candidate = cx.engine.prepare(&unit.module, &candidate(o, unit, &f, e)?, &unit.weights)?;
        let measure = Measure::new(unit, cx, run, &f, e, xs, tokens)?;
        let mut best: Option<(Vec<f32>, f64)> = None;
        let mut plain = f64::NAN;
        for i in 0..o.grid {
            if cx.report.interrupted() {
                return Err(PassError::Interrupted);
            }
            let s = scales(&x_mean, f64::from(i) / f64::from(o.grid));
            let weights = candidate.run(&[&Tensor::f32([n], s.clone())])?;
            let loss = measure.loss(cx, unit, run, &weights)?;
            if i == 0 {
                plain = loss;
            }
            if loss < best.as_ref().map_or(f64::INFINITY, |b| b.1) {
                best = Some((s, loss));
            }
        }
        let Some((s, loss)) = best else {
            let value = f.show(e.x);
            return Err(PassError::Calibration {
                what: format!("no ratio gives a finite loss on {value} of @{}", f.name),
                hint: "activations overflow on the calibration text; look at the text and the source weights".into(),
            });
        };
        let key = key_of(&f, e.x);
        result.push((format!("{key}.s"), Tensor::f32([n], s)));
        result.push((format!("{key}.loss"), Tensor::new([2], qrmc_ir::Data::F64(vec![plain, loss]))));
    }
    Ok(result)
}

/// How the loss of a candidate is computed.
enum Measure {
    /// By running the block on every token. The loss function, its inputs, and the reference outputs.
    Run { func: Box<dyn qrmc_ir::Prepared>, xs: Vec<Tensor>, references: Vec<Tensor>, elements: f64 },
    /// By the Gram matrix of the input; exact where the product itself is compared.
    Gram { func: Box<dyn qrmc_ir::Prepared>, weight: Tensor, gram: Tensor, elements: f64 },
}

impl Measure {
    fn new(
        unit: &Unit,
        cx: &mut PassCx<'_>,
        run: &LayerRun<'_>,
        f: &Func,
        e: &Edge,
        xs: Vec<Tensor>,
        tokens: usize,
    ) -> Result<Self, PassError> {
        let m = &unit.module;
        let weights: Vec<ValueId> = e.linears.iter().map(|l| l.w).collect();
        let originals = cx.run(unit, &extract(m, f, "originals", &[], &weights)?, &[])?;
        let product = e.linears.len() == 1 && e.compared == e.linears[0].y;
        if let (true, [weight]) = (product, &originals[..]) {
            let (rows, n) = (weight.shape()[0], weight.shape()[1]);
            let gram = gram_of(unit, cx, &xs, n)?;
            let func = cx.engine.prepare(m, &gram_loss(m, rows, n)?, &unit.weights)?;
            let elements = (tokens * rows) as f64;
            return Ok(Measure::Gram { func, weight: weight.clone(), gram, elements });
        }
        let block = block(unit, f, e)?;
        let reference = cx.engine.prepare(m, &block, &unit.weights)?;
        let mut references = Vec::with_capacity(xs.len());
        for x in &xs {
            let args = block_args(unit, run, x, &originals);
            let args: Vec<&Tensor> = args.iter().collect();
            references.append(&mut reference.run(&args)?);
        }
        let elements = references.iter().map(|t| t.len() as f64).sum();
        let func = cx.engine.prepare(m, &loss(unit, &block)?, &unit.weights)?;
        Ok(Measure::Run { func, xs, references, elements })
    }

    /// Mean squared error of the compared output with these weights.
    fn loss(&self, cx: &mut PassCx<'_>, unit: &Unit, run: &LayerRun<'_>, ws: &[Tensor]) -> Result<f64, PassError> {
        match self {
            Measure::Gram { func, weight, gram, elements } => {
                let n = gram.shape()[0] as f64;
                cx.report.flops("scale", 2.0 * weight.len() as f64 * n);
                Ok(scalar(&func.run(&[&ws[0], weight, gram])?[0]) / elements)
            }
            Measure::Run { func, xs, references, elements } => {
                let mut total = 0.0;
                for (x, reference) in xs.iter().zip(references) {
                    let mut args = block_args(unit, run, x, ws);
                    args.push(reference.clone());
                    let args: Vec<&Tensor> = args.iter().collect();
                    total += scalar(&func.run(&args)?[0]);
                    let n = x.shape().last().copied().unwrap_or(1).max(1);
                    let products: usize = ws.iter().map(Tensor::len).sum();
                    cx.report.flops("scale", 2.0 * (x.len() / n) as f64 * products as f64);
                }
                Ok(total / elements)
            }
        }
    }
}

/// `xᵀ x` over all batches, `[n, n]`.
pub(crate) fn gram_of(unit: &Unit, cx: &mut PassCx<'_>, xs: &[Tensor], n: usize) -> Result<Tensor, PassError> {
    let func = cx.engine.prepare(&unit.module, &gram(&unit.module, n)?, &unit.weights)?;
    let mut sums = Vec::new();
    for x in xs {
        let rows = x.len() / n.max(1);
        accumulate(&mut sums, &func.run(&[&x.clone().reshaped([1, rows, n])])?[0]);
        cx.report.flops("gram", 2.0 * rows as f64 * (n * n) as f64);
    }
    Ok(Tensor::f32([n, n], sums.iter().map(|&x| x as f32).collect()))
}

fn block_args(unit: &Unit, run: &LayerRun<'_>, x: &Tensor, weights: &[Tensor]) -> Vec<Tensor> {
    let mut args = run.args(unit, x).to_vec();
    args.extend(weights.iter().cloned());
    args
}

/// Puts the scale pairs of one layer into the graph.
fn insert(
    unit: &mut Unit,
    cx: &mut PassCx<'_>,
    index: usize,
    func: FuncId,
    result: LayerResult,
) -> Result<(), PassError> {
    for (key, tensor) in result {
        if let Some(what) = key.strip_suffix(".loss") {
            if let qrmc_ir::Data::F64(v) = tensor.data() {
                let loss = LayerLoss { layer: index, what: what.to_owned(), before: v[0], after: v[1] };
                cx.report.loss("scale", loss);
            }
            continue;
        }
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
    cx.report.progress("scale", index + 1, unit.module.layers().len(), "");
    Ok(())
}

/// `x` becomes `x / s` for the linear layers that read it, and their weights `w * s`. The name of `x` moves to what
/// the linear layers read.
pub(crate) fn insert_scale(module: &Module, f: &Func, x: ValueId, s: qrmc_ir::WeightId) -> Result<Func, Diag> {
    let readers: Vec<ValueId> = linears(f).iter().filter(|l| l.x == x).map(|l| l.y).collect();
    let name = f.value(x).name.clone();
    let mut divided = None;
    rewrite(module, f, |b, node, ins| {
        if !node.outs.first().is_some_and(|y| readers.contains(y)) {
            return Ok(None);
        }
        let scale = b.weight(s);
        let v = match divided {
            Some(v) => v,
            None => {
                let v = b.binary(BinaryOp::Div, ins[0], scale)?;
                if let Some(name) = &name {
                    b.name(v, name);
                }
                *divided.insert(v)
            }
        };
        let w = b.binary(BinaryOp::Mul, ins[1], scale)?;
        Ok(Some(vec![b.linear(v, w)?]))
    })
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
