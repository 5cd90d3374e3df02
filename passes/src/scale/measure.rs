//! The functions of the IR that the search runs, and the loss of a candidate.

use qrmc_ir::{
    BinaryOp, Builder, Diag, Dim, Elem, Func, Module, Op, ReduceOp, Rule, Sym, Tensor, TensorType, UnaryOp,
    ValueId, extract,
};

use super::{Edge, ScaleOptions};
use crate::annotate::weight_spec;
use crate::calibrate::rest_args;
use crate::pass::{PassCx, PassError};
use crate::unit::Unit;

/// `@candidate(s) -> w'..`: the weights of an edge as rounding with these scales would leave them.
pub(super) fn candidate(o: &ScaleOptions, unit: &Unit, f: &Func, e: &Edge) -> Result<Func, Diag> {
    let weights: Vec<ValueId> = e.linears.iter().map(|l| l.w).collect();
    let plain = extract(&unit.module, f, "candidate", &[], &weights)?;
    let spec = weight_spec(o.w, o.group, o.sym, o.scale);
    let mut b = Builder::new(&unit.module, "candidate");
    let n = f.ty(e.x).shape.last().and_then(Dim::fixed).unwrap_or(0);
    let s = b.param(Some("s"), TensorType::new(Elem::F32, [n]));
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

/// `sum((a - b)²)` as one number of the rank of `a`.
pub(crate) fn squared_error(b: &mut Builder<'_>, a: ValueId, other: ValueId) -> Result<ValueId, Diag> {
    let d = b.binary(BinaryOp::Sub, a, other)?;
    let mut y = b.binary(BinaryOp::Mul, d, d)?;
    for axis in (0..b.ty(y).shape.rank()).rev() {
        y = b.op1(Op::Reduce(ReduceOp::Sum, axis as u8), &[y])?;
    }
    Ok(y)
}

/// `@block(x, pos, k_past, v_past, w..) -> compared`: the part of the layer behind an edge, weights as arguments.
fn block(unit: &Unit, f: &Func, e: &Edge) -> Result<Func, Diag> {
    let cut: Vec<ValueId> = std::iter::once(e.x)
        .chain(f.params[1..].iter().copied())
        .chain(e.linears.iter().map(|l| l.w))
        .collect();
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
    let mut b = Builder::new(module, "gram");
    let ty = TensorType::new(Elem::F32, vec![Dim::Fixed(1), Sym::S.into(), Dim::from(n)]);
    let x = b.param(Some("x"), ty);
    let xt = b.op1(Op::Transpose(vec![0, 2, 1]), &[x])?;
    let g = b.op1(Op::MatMul { trans_b: false }, &[xt, x])?;
    Ok(b.finish(&[g]))
}

/// `@gram_loss(w', w, gram) -> sum((w' - w) gram (w' - w)ᵀ)` over rows.
fn gram_loss(module: &Module, rows: usize, n: usize) -> Result<Func, Diag> {
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
pub(super) fn abs_sum(module: &Module, ty: &TensorType) -> Result<Func, Diag> {
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

/// How the loss of a candidate is computed.
pub(super) enum Measure {
    /// By running the block on every token. The loss function, its inputs, and the reference outputs.
    Run { func: Box<dyn qrmc_ir::Prepared>, xs: Vec<Tensor>, references: Vec<Tensor>, elements: f64 },
    /// By the Gram matrix of the input; exact where the product itself is compared.
    Gram { func: Box<dyn qrmc_ir::Prepared>, weight: Tensor, gram: Tensor, elements: f64 },
}

impl Measure {
    pub(super) fn new(
        unit: &Unit,
        cx: &mut PassCx<'_>,
        f: &Func,
        e: &Edge,
        xs: Vec<Tensor>,
        references: Vec<Tensor>,
        coarse: bool,
    ) -> Result<Self, PassError> {
        let m = &unit.module;
        let elements = references.iter().map(|t| t.len() as f64).sum();
        if let ([l], true) = (&e.linears[..], e.compared == e.linears[0].y) {
            let weight = cx.run(unit, &extract(m, f, "original", &[], &[l.w])?, &[])?.remove(0);
            let (rows, n) = (weight.shape()[0], weight.shape()[1]);
            let gram = gram_of(unit, cx, &xs, n)?;
            let func = cx.engine.prepare(m, &gram_loss(m, rows, n)?, &unit.weights)?;
            return Ok(Measure::Gram { func, weight, gram, elements });
        }
        // What a coarse product loses is a millionth of the losses that are compared.
        let engine = cx.engine.coarse().filter(|_| coarse).unwrap_or(cx.engine);
        let func = engine.prepare(m, &loss(unit, &block(unit, f, e)?)?, &unit.weights)?;
        Ok(Measure::Run { func, xs, references, elements })
    }

    /// Mean squared error of the compared output with these weights; `None` as soon as it is seen to be above `limit`.
    pub(super) fn loss(
        &self,
        cx: &mut PassCx<'_>,
        unit: &Unit,
        ws: &[Tensor],
        limit: f64,
    ) -> Result<Option<f64>, PassError> {
        match self {
            Measure::Gram { func, weight, gram, elements } => {
                let n = gram.shape()[0] as f64;
                cx.report.flops("scale", 2.0 * weight.len() as f64 * n);
                Ok(Some(scalar(&func.run(&[&ws[0], weight, gram])?[0]) / elements))
            }
            Measure::Run { func, xs, references, elements } => {
                let mut total = 0.0;
                for (x, reference) in xs.iter().zip(references) {
                    let rest = rest_args(unit, x);
                    let mut args: Vec<&Tensor> = std::iter::once(x).chain(&rest).chain(ws).collect();
                    args.push(reference);
                    total += scalar(&func.run(&args)?[0]);
                    cx.report.flops("scale", self.flops(x, ws));
                    // Every batch adds something that is not negative.
                    if total / elements > limit {
                        return Ok(None);
                    }
                }
                Ok(Some(total / elements))
            }
        }
    }

    /// Operations in the products of one batch, attention aside.
    fn flops(&self, x: &Tensor, ws: &[Tensor]) -> f64 {
        let n = x.shape().last().copied().unwrap_or(1).max(1);
        let tokens = (x.len() / n) as f64;
        let searched: usize = ws.iter().map(Tensor::len).sum();
        // Behind the searched weights comes one of the shape of the last: o_proj after q, k, v; down_proj after gate, up.
        let behind = ws.first().map_or(0, Tensor::len);
        2.0 * tokens * (searched + behind) as f64
    }
}

/// `xᵀ x` over all batches, `[n, n]`.
pub(crate) fn gram_of(
    unit: &Unit,
    cx: &mut PassCx<'_>,
    xs: &[Tensor],
    n: usize,
) -> Result<Tensor, PassError> {
    let func = cx.engine.prepare(&unit.module, &gram(&unit.module, n)?, &unit.weights)?;
    let mut sums = Vec::new();
    for x in xs {
        let rows = x.len() / n.max(1);
        accumulate(&mut sums, &func.run(&[&x.clone().reshaped([1, rows, n])])?[0]);
        cx.report.flops("gram", 2.0 * rows as f64 * (n * n) as f64);
    }
    Ok(Tensor::f32([n, n], sums.iter().map(|&x| x as f32).collect()))
}
