//! What the large operations mean, in primitives. Interpreter, gradients and targets without a kernel use this
//! one definition.

use crate::build::{Builder, prune};
use crate::diag::Diag;
use crate::module::{Func, Module, ValueId};
use crate::op::{AttnAttr, BinaryOp, Op, ReduceOp, UnaryOp};
use crate::quant::{Grain, QuantSpec};
use crate::rope::RopeAttr;
use crate::types::{Dim, Shape};

mod transform;

/// Writes the definition of `op` into `b`; `None` if `op` is a primitive.
///
/// # Errors
/// If the operands do not fit, as [`Builder::op`] says.
pub fn expand(b: &mut Builder<'_>, op: &Op, ins: &[ValueId]) -> Result<Option<Vec<ValueId>>, Diag> {
    let y = match op {
        Op::Silu => {
            let s = b.op1(Op::Unary(UnaryOp::Sigmoid), &[ins[0]])?;
            b.binary(BinaryOp::Mul, ins[0], s)?
        }
        Op::Softmax => softmax(b, ins[0])?,
        Op::RmsNorm(eps) => {
            let last = last_axis(b, ins[0]);
            let squares = b.binary(BinaryOp::Mul, ins[0], ins[0])?;
            let mean = b.op1(Op::Reduce(ReduceOp::Mean, last), &[squares])?;
            let eps = b.scalar(eps.0);
            let mean = b.binary(BinaryOp::Add, mean, eps)?;
            let r = b.op1(Op::Unary(UnaryOp::Rsqrt), &[mean])?;
            let normed = b.binary(BinaryOp::Mul, ins[0], r)?;
            b.binary(BinaryOp::Mul, normed, ins[1])?
        }
        Op::Rope(attr) => rope(b, attr, ins[0], ins[1])?,
        Op::Attention(attr) => attention(b, attr, ins)?,
        Op::AttentionGrad(attr) => return attention_grad(b, attr, ins).map(Some),
        Op::ModeMul { inner } => transform::mode_mul(b, *inner, ins[0], ins[1])?,
        Op::Hadamard { block, inverse } => {
            transform::hadamard(b, *block, *inverse, ins[0], ins.get(1).copied())?
        }
        Op::CacheAppend => b.op1(Op::Concat(1), ins)?,
        Op::Edge => ins[0],
        Op::Clip(spec) => clip(b, spec, ins[0], ins[1])?,
        Op::FakeQuant(spec, rule) => {
            let mut sides = b.op(Op::QParams(*spec, *rule), ins)?;
            let mut args = vec![ins[0]];
            args.append(&mut sides.clone());
            let codes = b.op1(Op::QCast(*spec), &args)?;
            sides.insert(0, codes);
            b.op1(Op::DCast, &sides)?
        }
        _ => return Ok(None),
    };
    Ok(Some(vec![y]))
}

/// The function with every large operation replaced by its definition.
///
/// # Errors
/// Only if the function breaks a type rule already.
pub fn expand_func(module: &Module, func: &Func) -> Result<Func, Diag> {
    let mut b = Builder::new(module, &func.name);
    let mut map = vec![ValueId(0); func.value_count()];
    for &p in &func.params {
        map[p.0 as usize] = b.param(func.value(p).name.as_deref(), func.ty(p).clone());
    }
    for node in &func.nodes {
        let ins: Vec<ValueId> = node.ins.iter().map(|v| map[v.0 as usize]).collect();
        let outs = match expand(&mut b, &node.op, &ins)? {
            Some(outs) => outs,
            None => b.op(node.op.clone(), &ins)?,
        };
        for (&old, &new) in node.outs.iter().zip(&outs) {
            map[old.0 as usize] = new;
            if let Some(name) = &func.value(old).name {
                b.name(new, name);
            }
        }
    }
    let results: Vec<ValueId> = func.results.iter().map(|r| map[r.0 as usize]).collect();
    Ok(prune(&b.finish(&results)))
}

fn last_axis(b: &Builder<'_>, v: ValueId) -> u8 {
    (b.ty(v).shape.rank().max(1) - 1) as u8
}

fn softmax(b: &mut Builder<'_>, x: ValueId) -> Result<ValueId, Diag> {
    let last = last_axis(b, x);
    let max = b.op1(Op::Reduce(ReduceOp::Max, last), &[x])?;
    let x = b.binary(BinaryOp::Sub, x, max)?;
    let e = b.op1(Op::Unary(UnaryOp::Exp), &[x])?;
    let sum = b.op1(Op::Reduce(ReduceOp::Sum, last), &[e])?;
    b.binary(BinaryOp::Div, e, sum)
}

/// `[B, S, h * d] -> [B, S, h, d]`
fn split_heads(b: &mut Builder<'_>, x: ValueId, d: u64) -> Result<ValueId, Diag> {
    let dims = &b.ty(x).shape.0;
    let width = dims.get(2).and_then(|d| d.fixed()).unwrap_or(0) as u64;
    let to = Shape(vec![dims[0], dims[1], Dim::Fixed(width / d.max(1)), Dim::Fixed(d)]);
    b.op1(Op::Reshape(to), &[x])
}

fn rope(b: &mut Builder<'_>, attr: &RopeAttr, x: ValueId, pos: ValueId) -> Result<ValueId, Diag> {
    let d = u64::from(attr.head_dim);
    let (seq, half) = (b.ty(pos).shape.0[0], d / 2);
    let mut shape = b.ty(x).shape.clone();
    shape.0[1] = seq;
    let freq = b.literal(&[half], &attr.inv_freq());
    let at = b.op1(Op::Cast(crate::Elem::F32), &[pos])?;
    let at = b.op1(Op::Reshape(Shape(vec![seq, Dim::Fixed(1)])), &[at])?;
    let angle = b.binary(BinaryOp::Mul, at, freq)?;
    let angle = b.op1(Op::Reshape(Shape(vec![seq, Dim::Fixed(1), Dim::Fixed(half)])), &[angle])?;
    let factor = b.scalar(attr.attention_factor());
    let mut turn = [angle; 2];
    for (v, op) in turn.iter_mut().zip([UnaryOp::Cos, UnaryOp::Sin]) {
        let t = b.op1(Op::Unary(op), &[angle])?;
        *v = b.binary(BinaryOp::Mul, t, factor)?;
    }
    let [cos, sin] = turn;
    let x = split_heads(b, x, d)?;
    let lo = b.op1(Op::Slice { axis: 3, start: 0, len: half }, &[x])?;
    let hi = b.op1(Op::Slice { axis: 3, start: half, len: half }, &[x])?;
    let mut mix = |p, q, op| -> Result<ValueId, Diag> {
        let p = b.binary(BinaryOp::Mul, p, cos)?;
        let q = b.binary(BinaryOp::Mul, q, sin)?;
        b.binary(op, p, q)
    };
    let new_lo = mix(lo, hi, BinaryOp::Sub)?;
    let new_hi = mix(hi, lo, BinaryOp::Add)?;
    let y = b.op1(Op::Concat(3), &[new_lo, new_hi])?;
    b.op1(Op::Reshape(shape), &[y])
}

/// Queries `[B, g, h / g, S, d]`, and keys and values `[B, g, 1, T, d]`.
fn split_attention(b: &mut Builder<'_>, attr: &AttnAttr, ins: &[ValueId]) -> Result<Vec<ValueId>, Diag> {
    let (h, g) = (u64::from(attr.heads), u64::from(attr.kv_heads));
    let width = b.ty(ins[0]).shape.last().and_then(Dim::fixed).unwrap_or(0) as u64;
    let mut out = Vec::new();
    for &x in ins {
        let dims = b.ty(x).shape.0.clone();
        let n = dims.last().and_then(|d| d.fixed()).unwrap_or(0) as u64;
        let shared = n / (width / h) / g;
        let split = vec![dims[0], dims[1], Dim::Fixed(g), Dim::Fixed(shared), Dim::Fixed(width / h)];
        let x = b.op1(Op::Reshape(Shape(split)), &[x])?;
        out.push(b.op1(Op::Transpose(vec![0, 2, 3, 1, 4]), &[x])?);
    }
    Ok(out)
}

/// Back from heads to `[B, S, n]`.
fn join_heads(b: &mut Builder<'_>, x: ValueId, to: Shape) -> Result<ValueId, Diag> {
    let x = b.op1(Op::Transpose(vec![0, 3, 1, 2, 4]), &[x])?;
    b.op1(Op::Reshape(to), &[x])
}

/// Probabilities from split queries and keys.
fn probabilities(b: &mut Builder<'_>, scale: f64, q: ValueId, k: ValueId) -> Result<ValueId, Diag> {
    let scores = b.op1(Op::MatMul { trans_b: true }, &[q, k])?;
    let scale = b.scalar(scale);
    let scores = b.binary(BinaryOp::Mul, scores, scale)?;
    let square = b.ty(k).shape.0[3] == b.ty(q).shape.0[3];
    let mask = b.op1(Op::CausalMask { square }, &[])?;
    let scores = b.binary(BinaryOp::Add, scores, mask)?;
    softmax(b, scores)
}

fn attention(b: &mut Builder<'_>, attr: &AttnAttr, ins: &[ValueId]) -> Result<ValueId, Diag> {
    let out = b.ty(ins[0]).shape.clone();
    let s = split_attention(b, attr, ins)?;
    let probs = probabilities(b, attr.scale.0, s[0], s[1])?;
    let y = b.op1(Op::MatMul { trans_b: false }, &[probs, s[2]])?;
    join_heads(b, y, out)
}

fn attention_grad(b: &mut Builder<'_>, attr: &AttnAttr, ins: &[ValueId]) -> Result<Vec<ValueId>, Diag> {
    let shapes: Vec<Shape> = ins.iter().map(|&v| b.ty(v).shape.clone()).collect();
    let s = split_attention(b, attr, ins)?;
    let (q, k, v, dy) = (s[0], s[1], s[2], s[3]);
    let probs = probabilities(b, attr.scale.0, q, k)?;
    let d_probs = b.op1(Op::MatMul { trans_b: true }, &[dy, v])?;
    let weighted = b.binary(BinaryOp::Mul, d_probs, probs)?;
    let mean = b.op1(Op::Reduce(ReduceOp::Sum, 4), &[weighted])?;
    let d_scores = b.binary(BinaryOp::Sub, d_probs, mean)?;
    let d_scores = b.binary(BinaryOp::Mul, d_scores, probs)?;
    let scale = b.scalar(attr.scale.0);
    let d_scores = b.binary(BinaryOp::Mul, d_scores, scale)?;
    let dq = b.op1(Op::MatMul { trans_b: false }, &[d_scores, k])?;
    let mut outs = vec![join_heads(b, dq, shapes[0].clone())?];
    for (left, right, shape) in [(d_scores, q, &shapes[1]), (probs, dy, &shapes[2])] {
        let left = b.op1(Op::Transpose(vec![0, 1, 2, 4, 3]), &[left])?;
        let y = b.op1(Op::MatMul { trans_b: false }, &[left, right])?;
        // Every query head of a group adds to the head that they share.
        let y = b.op1(Op::Reduce(ReduceOp::Sum, 2), &[y])?;
        outs.push(join_heads(b, y, shape.clone())?);
    }
    Ok(outs)
}

fn clip(b: &mut Builder<'_>, spec: &QuantSpec, w: ValueId, bound: ValueId) -> Result<ValueId, Diag> {
    let shape = b.ty(w).shape.clone();
    let mut bound = bound;
    let mut x = w;
    if let Grain::Group(g) = spec.grain {
        let mut split = b.ty(bound).shape.clone();
        split.0.push(Dim::Fixed(1));
        bound = b.op1(Op::Reshape(split.clone()), &[bound])?;
        if let Some(last) = split.0.last_mut() {
            *last = Dim::Fixed(u64::from(g));
        }
        x = b.op1(Op::Reshape(split), &[w])?;
    }
    let x = b.binary(BinaryOp::Min, x, bound)?;
    let low = b.op1(Op::Unary(UnaryOp::Neg), &[bound])?;
    let x = b.binary(BinaryOp::Max, x, low)?;
    b.op1(Op::Reshape(shape), &[x])
}
