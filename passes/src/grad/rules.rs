//! One rule an operation: the gradients of its operands from that of its result.

use qrmc_ir::{BinaryOp, Builder, Diag, Dim, Elem, Op, ReduceOp, Shape, UnaryOp, ValueId};

use super::GradOptions;

/// Whether an operation is differentiated as it is, not by its definition.
pub(super) fn has_rule(op: &Op) -> bool {
    !matches!(op, Op::Silu | Op::Softmax | Op::RmsNorm(_) | Op::CacheAppend | Op::Edge | Op::Clip(_))
}

type Back = Result<Vec<Option<ValueId>>, Diag>;

/// Gradients of the operands that are `wanted`; `None` where there is none.
pub(super) fn back(
    b: &mut Builder<'_>,
    o: &GradOptions,
    op: &Op,
    ins: &[ValueId],
    outs: &[ValueId],
    dy: ValueId,
    wanted: &[bool],
) -> Back {
    let y = outs[0];
    let one = |b: &mut Builder<'_>, op: Op, ins: &[ValueId]| b.op1(op, ins).map(|d| vec![Some(d)]);
    match op {
        Op::Unary(u) => Ok(vec![unary(b, *u, ins[0], y, dy)?]),
        Op::Binary(op) => binary(b, *op, ins, y, dy, wanted),
        Op::Reduce(r, axis) => reduce(b, *r, *axis, ins[0], y, dy),
        Op::MatMul { trans_b } => matmul(b, o, *trans_b, ins, dy, wanted),
        // Numbers are rounded to another type straight through.
        Op::Cast(_) => Ok(vec![if b.ty(ins[0]).elem.is_float() { Some(dy) } else { None }]),
        Op::Reshape(_) => one(b, Op::Reshape(b.ty(ins[0]).shape.clone()), &[dy]),
        Op::Transpose(perm) => {
            let mut inverse = vec![0; perm.len()];
            perm.iter().enumerate().for_each(|(i, &p)| inverse[usize::from(p)] = i as u8);
            one(b, Op::Transpose(inverse), &[dy])
        }
        Op::Slice { axis, start, len } => slice(b, (*axis, *start, *len), ins[0], dy),
        Op::Concat(axis) => concat(b, *axis, ins, dy),
        Op::BroadcastLike => Ok(vec![Some(sum_to(b, dy, ins[0])?), None]),
        Op::Inverse => inverse(b, y, dy),
        Op::ModeMul { inner } => mode_mul(b, *inner, ins, dy, wanted),
        Op::Hadamard { block, inverse } => hadamard(b, (*block, *inverse), ins, dy, wanted),
        // Rotating by the negative positions turns back.
        Op::Rope(_) => {
            let at = b.op1(Op::Cast(Elem::F32), &[ins[1]])?;
            let at = b.op1(Op::Unary(UnaryOp::Neg), &[at])?;
            let at = b.op1(Op::Cast(Elem::I32), &[at])?;
            let d = b.op1(op.clone(), &[dy, at])?;
            Ok(vec![Some(sum_to(b, d, ins[0])?), None])
        }
        Op::Attention(a) => {
            let d = b.op(Op::AttentionGrad(*a), &[ins[0], ins[1], ins[2], dy])?;
            Ok(d.into_iter().map(Some).collect())
        }
        Op::FakeQuant(spec, rule) => {
            let d = b.op(Op::FakeQuantGrad(*spec, *rule), &[ins, &[dy]].concat())?;
            Ok(d.into_iter().map(Some).collect())
        }
        Op::ClipRange(spec) => {
            let d = b.op(Op::ClipRangeGrad(*spec), &[ins, &[dy]].concat())?;
            Ok(d.into_iter().map(Some).collect())
        }
        _ => {
            let m = format!("`{}` has no gradient", op.text().0);
            Err(Diag::new("Q0608", m).hint("what is trained must not pass through it"))
        }
    }
}

fn unary(
    b: &mut Builder<'_>,
    op: UnaryOp,
    x: ValueId,
    y: ValueId,
    dy: ValueId,
) -> Result<Option<ValueId>, Diag> {
    use BinaryOp::{Div, Mul, Sub};
    Ok(Some(match op {
        UnaryOp::Neg => b.op1(Op::Unary(UnaryOp::Neg), &[dy])?,
        UnaryOp::Abs => {
            // The sign: 1 where x >= 0, else -1.
            let zero = b.scalar(0.0);
            let two = b.scalar(2.0);
            let one = b.scalar(1.0);
            let positive = b.binary(BinaryOp::Ge, x, zero)?;
            let twice = b.binary(Mul, positive, two)?;
            let sign = b.binary(Sub, twice, one)?;
            b.binary(Mul, dy, sign)?
        }
        UnaryOp::Exp => b.binary(Mul, dy, y)?,
        UnaryOp::Log => b.binary(Div, dy, x)?,
        UnaryOp::Sqrt => {
            let two = b.scalar(2.0);
            let twice = b.binary(Mul, y, two)?;
            b.binary(Div, dy, twice)?
        }
        UnaryOp::Rsqrt => {
            // y = x^-1/2, y' = -y³ / 2.
            let half = b.scalar(-0.5);
            let square = b.binary(Mul, y, y)?;
            let cube = b.binary(Mul, square, y)?;
            let slope = b.binary(Mul, cube, half)?;
            b.binary(Mul, dy, slope)?
        }
        UnaryOp::Recip => {
            let square = b.binary(Mul, y, y)?;
            let d = b.binary(Mul, dy, square)?;
            b.op1(Op::Unary(UnaryOp::Neg), &[d])?
        }
        UnaryOp::Sigmoid => {
            let one = b.scalar(1.0);
            let rest = b.binary(Sub, one, y)?;
            let slope = b.binary(Mul, y, rest)?;
            b.binary(Mul, dy, slope)?
        }
        UnaryOp::Cos => {
            let sin = b.op1(Op::Unary(UnaryOp::Sin), &[x])?;
            let d = b.binary(Mul, dy, sin)?;
            b.op1(Op::Unary(UnaryOp::Neg), &[d])?
        }
        UnaryOp::Sin => {
            let cos = b.op1(Op::Unary(UnaryOp::Cos), &[x])?;
            b.binary(Mul, dy, cos)?
        }
    }))
}

fn binary(
    b: &mut Builder<'_>,
    op: BinaryOp,
    ins: &[ValueId],
    y: ValueId,
    dy: ValueId,
    wanted: &[bool],
) -> Back {
    let (x, z) = (ins[0], ins[1]);
    let mut out = vec![None, None];
    for (side, out) in out.iter_mut().enumerate() {
        if !wanted[side] {
            continue;
        }
        let other = ins[1 - side];
        let d = match (op, side) {
            (BinaryOp::Add, _) | (BinaryOp::Sub, 0) => dy,
            (BinaryOp::Sub, _) => b.op1(Op::Unary(UnaryOp::Neg), &[dy])?,
            (BinaryOp::Mul, _) => b.binary(BinaryOp::Mul, dy, other)?,
            (BinaryOp::Div, 0) => b.binary(BinaryOp::Div, dy, z)?,
            (BinaryOp::Div, _) => {
                let slope = b.binary(BinaryOp::Div, y, z)?;
                let d = b.binary(BinaryOp::Mul, dy, slope)?;
                b.op1(Op::Unary(UnaryOp::Neg), &[d])?
            }
            // The operand that is taken gets the gradient; of equal ones, the first.
            (BinaryOp::Max | BinaryOp::Min, _) => {
                let first = match op {
                    BinaryOp::Max => b.binary(BinaryOp::Ge, x, z)?,
                    _ => b.binary(BinaryOp::Ge, z, x)?,
                };
                let mask = if side == 0 {
                    first
                } else {
                    let one = b.scalar(1.0);
                    b.binary(BinaryOp::Sub, one, first)?
                };
                b.binary(BinaryOp::Mul, dy, mask)?
            }
            (BinaryOp::Ge, _) => continue,
        };
        *out = Some(sum_to(b, d, ins[side])?);
    }
    Ok(out)
}

/// Sums a gradient over the axes along which its operand was repeated.
fn sum_to(b: &mut Builder<'_>, d: ValueId, like: ValueId) -> Result<ValueId, Diag> {
    let (have, want) = (b.ty(d).shape.clone(), b.ty(like).shape.clone());
    if have == want {
        return Ok(d);
    }
    let extra = have.rank() - want.rank();
    let mut d = d;
    // Outer axes first: they leave the least behind.
    for axis in 0..have.rank() {
        let gone = axis < extra || (want.0[axis - extra] == Dim::Fixed(1) && have.0[axis] != Dim::Fixed(1));
        if gone {
            d = b.op1(Op::Reduce(ReduceOp::Sum, axis as u8), &[d])?;
        }
    }
    if b.ty(d).shape == want { Ok(d) } else { b.op1(Op::Reshape(want), &[d]) }
}

fn reduce(b: &mut Builder<'_>, op: ReduceOp, axis: u8, x: ValueId, y: ValueId, dy: ValueId) -> Back {
    let d = match op {
        ReduceOp::Sum => dy,
        ReduceOp::Mean => match b.ty(x).shape.0[usize::from(axis)] {
            Dim::Fixed(n) => {
                let count = b.scalar(n as f64);
                b.binary(BinaryOp::Div, dy, count)?
            }
            Dim::Sym(_) => {
                // The number of positions is the sum of ones.
                let one = b.scalar(1.0);
                let ones = b.op1(Op::BroadcastLike, &[one, x])?;
                let count = b.op1(Op::Reduce(ReduceOp::Sum, axis), &[ones])?;
                b.binary(BinaryOp::Div, dy, count)?
            }
        },
        ReduceOp::Max => {
            // Equal largest elements share the gradient.
            let mask = b.binary(BinaryOp::Ge, x, y)?;
            let count = b.op1(Op::Reduce(ReduceOp::Sum, axis), &[mask])?;
            let share = b.binary(BinaryOp::Div, dy, count)?;
            return Ok(vec![Some(b.binary(BinaryOp::Mul, mask, share)?)]);
        }
    };
    Ok(vec![Some(b.op1(Op::BroadcastLike, &[d, x])?)])
}

fn matmul(
    b: &mut Builder<'_>,
    o: &GradOptions,
    trans_b: bool,
    ins: &[ValueId],
    dy: ValueId,
    wanted: &[bool],
) -> Back {
    let (mut x, mut w, mut dy) = (ins[0], ins[1], dy);
    // Rows of tokens times a matrix: the small products that make transforms stay as they are.
    let floats = [x, w].iter().all(|v| b.ty(*v).elem == Elem::F32);
    if o.bf16 && floats && b.ty(x).shape.rank() > 2 && b.ty(w).shape.rank() == 2 {
        for v in [&mut x, &mut w, &mut dy] {
            let half = b.op1(Op::Cast(Elem::BF16), &[*v])?;
            *v = b.op1(Op::Cast(Elem::F32), &[half])?;
        }
    }
    let mut out = vec![None, None];
    if wanted[0] {
        let d = b.op1(Op::MatMul { trans_b: !trans_b }, &[dy, w])?;
        out[0] = Some(sum_to(b, d, ins[0])?);
    }
    if wanted[1] {
        // A matrix that serves all rows gets the sum over them.
        let d = if b.ty(w).shape.rank() == 2 {
            if trans_b { b.op1(Op::Outer, &[dy, x])? } else { b.op1(Op::Outer, &[x, dy])? }
        } else {
            let (left, right) = if trans_b { (dy, x) } else { (x, dy) };
            let left = b.swap_last(left)?;
            b.op1(Op::MatMul { trans_b: false }, &[left, right])?
        };
        out[1] = Some(sum_to(b, d, ins[1])?);
    }
    Ok(out)
}

fn slice(b: &mut Builder<'_>, (axis, start, len): (u8, u64, u64), x: ValueId, dy: ValueId) -> Back {
    let full = b.ty(x).shape.0[usize::from(axis)].fixed().unwrap_or(0) as u64;
    let mut d = dy;
    let zeros = |b: &mut Builder<'_>, len: u64| -> Result<ValueId, Diag> {
        let like = b.op1(Op::Slice { axis, start: 0, len }, &[x])?;
        let zero = b.scalar(0.0);
        b.op1(Op::BroadcastLike, &[zero, like])
    };
    if start > 0 {
        let before = zeros(b, start)?;
        d = b.op1(Op::Concat(axis), &[before, d])?;
    }
    if start + len < full {
        let after = zeros(b, full - start - len)?;
        d = b.op1(Op::Concat(axis), &[d, after])?;
    }
    Ok(vec![Some(d)])
}

fn concat(b: &mut Builder<'_>, axis: u8, ins: &[ValueId], dy: ValueId) -> Back {
    let size = |b: &Builder<'_>, v: ValueId| b.ty(v).shape.0[usize::from(axis)];
    match (size(b, ins[0]), size(b, ins[1])) {
        (Dim::Fixed(m), Dim::Fixed(n)) => {
            let first = b.op1(Op::Slice { axis, start: 0, len: m }, &[dy])?;
            let second = b.op1(Op::Slice { axis, start: m, len: n }, &[dy])?;
            Ok(vec![Some(first), Some(second)])
        }
        _ => Err(Diag::new("Q0608", "a cache of unknown length has no gradient")
            .hint("train on functions whose caches are cut off")),
    }
}

/// `d(m⁻¹) = -m⁻¹ dm m⁻¹`, so that `dm = -yᵀ dy yᵀ`.
fn inverse(b: &mut Builder<'_>, y: ValueId, dy: ValueId) -> Back {
    let t = b.swap_last(y)?;
    let left = b.op1(Op::MatMul { trans_b: false }, &[t, dy])?;
    let d = b.op1(Op::MatMul { trans_b: true }, &[left, y])?;
    Ok(vec![Some(b.op1(Op::Unary(UnaryOp::Neg), &[d])?)])
}

fn mode_mul(b: &mut Builder<'_>, inner: u64, ins: &[ValueId], dy: ValueId, wanted: &[bool]) -> Back {
    let (x, m) = (ins[0], ins[1]);
    let mut out = vec![None, None];
    if wanted[0] {
        let t = b.swap_last(m)?;
        out[0] = Some(b.op1(Op::ModeMul { inner }, &[dy, t])?);
    }
    if wanted[1] {
        let dims: Vec<u64> = b.ty(m).shape.0.iter().map(|d| d.fixed().unwrap_or(1) as u64).collect();
        let (count, size) = if dims.len() == 3 { (dims[0], dims[1]) } else { (1, dims[0]) };
        let n = b.ty(x).shape.last().and_then(Dim::fixed).unwrap_or(0) as u64;
        let part = n / count;
        let mut grads = Vec::new();
        for c in 0..count {
            let mut rows = [x, dy];
            for v in &mut rows {
                *v = matrix_rows(b, *v, (c * part, part), (size, inner))?;
            }
            grads.push(b.op1(Op::Outer, &rows)?);
        }
        let mut d = grads[0];
        if dims.len() == 3 {
            let one = Shape(vec![Dim::Fixed(1), Dim::Fixed(size), Dim::Fixed(size)]);
            for g in &mut grads {
                *g = b.op1(Op::Reshape(one.clone()), &[*g])?;
            }
            d = grads[0];
            for g in &grads[1..] {
                d = b.op1(Op::Concat(0), &[d, *g])?;
            }
        }
        out[1] = Some(d);
    }
    Ok(out)
}

/// The part of the last axis that one matrix serves, as rows that it multiplies.
fn matrix_rows(
    b: &mut Builder<'_>,
    x: ValueId,
    (start, part): (u64, u64),
    (size, inner): (u64, u64),
) -> Result<ValueId, Diag> {
    let mut shape = b.ty(x).shape.0.clone();
    let axis = shape.len() - 1;
    let mut x = x;
    if shape[axis] != Dim::Fixed(part) {
        x = b.op1(Op::Slice { axis: axis as u8, start, len: part }, &[x])?;
    }
    shape.pop();
    shape.extend([part / (size * inner), size, inner].map(Dim::Fixed));
    if inner == 1 {
        shape.pop();
        return b.op1(Op::Reshape(Shape(shape)), &[x]);
    }
    let x = b.op1(Op::Reshape(Shape(shape)), &[x])?;
    b.swap_last(x)
}

fn hadamard(
    b: &mut Builder<'_>,
    (block, inverse): (u64, bool),
    ins: &[ValueId],
    dy: ValueId,
    wanted: &[bool],
) -> Back {
    if wanted.get(1) == Some(&true) {
        return Err(Diag::new("Q0608", "the signs of a Hadamard transform have no gradient"));
    }
    // Orthogonal: the transpose is the inverse.
    let mut again = ins.to_vec();
    again[0] = dy;
    let d = b.op1(Op::Hadamard { block, inverse: !inverse }, &again)?;
    Ok(vec![Some(d), None][..ins.len()].to_vec())
}
