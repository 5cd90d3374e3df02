//! Kernels that read dense operands.

use qrmc_ir::{DimEnv, EngineError, Op, ReduceOp, RopeAttr, UnaryOp};
use qrmc_lowering::{Kernel, Spread};

use super::exec::{In, Sizes, Slice, SliceMut, wrong_kind};
use super::{Machine, products};
use crate::cpu;

/// Elements that one task moves, about.
const CHUNK: usize = 32 * 1024;

/// A result: its shape and room for its elements.
pub(super) type Out<'a> = (Sizes, SliceMut<'a>);

/// The elements of an `f32` result.
pub(super) fn floats<'o>(out: &'o mut Out<'_>) -> Result<&'o mut [f32], EngineError> {
    match &mut out.1 {
        SliceMut::F32(v) => Ok(v),
        _ => Err(wrong_kind()),
    }
}

pub(super) fn run(
    m: &Machine,
    kernel: &Kernel,
    dims: &DimEnv,
    ins: &[In<'_>],
    out: &mut Out<'_>,
) -> Result<(), EngineError> {
    let (pool, isa) = (&m.pool, m.isa);
    let out_shape = out.0.clone();
    match kernel {
        Kernel::OuterMiddle => products::outer_middle(m, ins, out),
        Kernel::Bf16(op) => products::bf16(m, op, ins, out),
        Kernel::OnGrid { casts, split } => products::on_grid(m, casts, *split, ins, out),
        Kernel::Map { ins: spread, steps } => map(m, spread, steps, ins, out),
        // These have other operands and results; the caller runs them.
        Kernel::Quantize(..) | Kernel::Linear(_) | Kernel::CacheAppend(_) | Kernel::Rows { .. } => {
            Err(wrong_kind())
        }
        Kernel::Op(op) => match op {
            Op::Gather => gather(m, ins, out),
            Op::RmsNorm(eps) => {
                let n = out_shape.last().copied().unwrap_or(1);
                let mut gain = ins[1].widened()?;
                if gain.len() != n {
                    gain = vec![gain[0]; n].into();
                }
                cpu::rms_norm(pool, isa, ins[0].f32()?, n, Some(&gain), eps.0 as f32, floats(out)?);
                Ok(())
            }
            Op::Softmax => {
                let n = out_shape.last().copied().unwrap_or(1);
                cpu::reduce::softmax_rows(pool, isa, ins[0].f32()?, n, floats(out)?);
                Ok(())
            }
            Op::Silu => {
                cpu::unary(pool, isa, cpu::UnaryOp::Silu, ins[0].f32()?, floats(out)?);
                Ok(())
            }
            Op::Unary(u) => unary(m, *u, &ins[0], out),
            Op::Binary(b) => {
                let (x, y) = (ins[0].widened()?, ins[1].widened()?);
                let shapes = (&ins[0].shape[..], &ins[1].shape[..]);
                cpu::binary(pool, isa, *b, (&x, shapes.0), (&y, shapes.1), floats(out)?);
                Ok(())
            }
            Op::Reduce(r, axis) => reduce(m, *r, usize::from(*axis), &ins[0], out),
            Op::MatMul { trans_b } => products::matmul(m, *trans_b, ins, out),
            Op::Rope(attr) => rope(m, attr, ins, out),
            Op::CausalMask { square } => {
                let total = out_shape.last().copied().unwrap_or(1);
                let past = if *square { 0 } else { dims.past };
                for (i, row) in floats(out)?.chunks_mut(total.max(1)).enumerate() {
                    let see = past + i + 1;
                    row.iter_mut()
                        .enumerate()
                        .for_each(|(j, y)| *y = if j < see { 0.0 } else { f32::NEG_INFINITY });
                }
                Ok(())
            }
            Op::Const { data, .. } => {
                floats(out)?.iter_mut().zip(data).for_each(|(y, x)| *y = x.0 as f32);
                Ok(())
            }
            Op::Cast(_) => cast(op, &ins[0], out),
            Op::Transpose(perm) => {
                let perm: Vec<usize> = perm.iter().map(|&p| usize::from(p)).collect();
                cpu::transpose(pool, isa, &ins[0].widened()?, &ins[0].shape, &perm, floats(out)?);
                Ok(())
            }
            Op::Slice { axis, start, len } => {
                let at = usize::from(*axis);
                let (outer, inner) = split(&ins[0].shape, at);
                let (n, start, len) = (ins[0].shape[at], *start as usize, *len as usize);
                let (x, y) = (ins[0].widened()?, floats(out)?);
                for_rows(pool, &mut y[..outer * len * inner], len * inner, |o, y| {
                    let from = (o * n + start) * inner;
                    y.copy_from_slice(&x[from..from + len * inner]);
                });
                Ok(())
            }
            Op::Concat(_) | Op::CacheAppend => {
                let at = if let Op::Concat(axis) = op { usize::from(*axis) } else { 1 };
                let (outer, inner) = split(&out_shape, at);
                let (a, b) = (ins[0].widened()?, ins[1].widened()?);
                let (na, nb) = (ins[0].shape[at] * inner, ins[1].shape[at] * inner);
                for_rows(pool, &mut floats(out)?[..outer * (na + nb)], na + nb, |o, y| {
                    y[..na].copy_from_slice(&a[o * na..(o + 1) * na]);
                    y[na..].copy_from_slice(&b[o * nb..(o + 1) * nb]);
                });
                Ok(())
            }
            Op::ModeMul { inner } => {
                let (x, mat, n) = (&ins[0], ins[1].widened()?, out_shape.last().copied().unwrap_or(1));
                let l = ins[1].shape.last().copied().unwrap_or(1);
                cpu::mode_mul(pool, isa, &x.widened()?, n, (&mat, l, *inner as usize), floats(out)?);
                Ok(())
            }
            Op::Hadamard { block, inverse } => {
                let (x, n) = (ins[0].widened()?, out_shape.last().copied().unwrap_or(1));
                let signs = ins.get(1).map(In::widened).transpose()?;
                let how = (*block as usize, *inverse);
                cpu::hadamard(pool, isa, &x, n, how, signs.as_deref(), floats(out)?, &m.scratch);
                Ok(())
            }
            Op::BroadcastLike => broadcast(m, &ins[0], out),
            Op::Outer => products::outer(m, ins, out),
            Op::Inverse => {
                let n = out_shape.last().copied().unwrap_or(1);
                let x = ins[0].widened()?;
                for (y, x) in floats(out)?.chunks_mut((n * n).max(1)).zip(x.chunks((n * n).max(1))) {
                    let mut wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                    qrmc_ir::linalg::invert(&mut wide, n);
                    y.iter_mut().zip(wide).for_each(|(y, x)| *y = x as f32);
                }
                Ok(())
            }
            Op::Reshape(_)
            | Op::Weight(_)
            | Op::Call(_)
            | Op::Attention(_)
            | Op::AttentionGrad(_)
            | Op::Edge
            | Op::Clip(_)
            | Op::ClipRange(_)
            | Op::ClipRangeGrad(_)
            | Op::FakeQuant(..)
            | Op::FakeQuantGrad(..)
            | Op::QParams(..)
            | Op::QCast(_)
            | Op::DCast => {
                Err(EngineError::System(format!("`{}` reached the CPU without a kernel", op.text().0)))
            }
        },
    }
}

/// Calls `fill` with each row of `len` elements of `y` and its place, on all threads.
fn for_rows(pool: &cpu::Pool, y: &mut [f32], len: usize, fill: impl Fn(usize, &mut [f32]) + Sync) {
    let len = len.max(1);
    let per_task = (CHUNK / len).max(1);
    pool.for_chunks(y, per_task * len, |c, y| {
        y.chunks_mut(len).enumerate().for_each(|(i, y)| fill(c * per_task + i, y));
    });
}

fn split(shape: &[usize], axis: usize) -> (usize, usize) {
    (shape[..axis].iter().product(), shape[axis + 1..].iter().product())
}

/// Elementwise operations in one pass.
fn map(
    m: &Machine,
    spread: &[Spread],
    steps: &[(Op, Vec<usize>)],
    ins: &[In<'_>],
    out: &mut Out<'_>,
) -> Result<(), EngineError> {
    let n = out.0.last().copied().unwrap_or(1);
    let wide = ins.iter().map(In::widened).collect::<Result<Vec<_>, _>>()?;
    let ins: Vec<cpu::MapIn<'_>> = wide
        .iter()
        .zip(spread)
        .map(|(x, spread)| match spread {
            Spread::All => cpu::MapIn::All(x),
            Spread::Vector => cpu::MapIn::Vector(x),
            Spread::Rows => cpu::MapIn::Rows(x),
            Spread::One => cpu::MapIn::One(x[0]),
        })
        .collect();
    let step = |(op, args): &(Op, Vec<usize>)| {
        let op = match op {
            Op::Silu => Some(cpu::MapOp::Unary(cpu::UnaryOp::Silu)),
            Op::Unary(u) => in_vectors(*u).map(cpu::MapOp::Unary),
            Op::Binary(b) => Some(cpu::MapOp::Binary(*b)),
            _ => None,
        };
        let (first, last) = args.first().zip(args.last())?;
        Some(cpu::MapStep { op: op?, args: [*first, *last] })
    };
    let steps: Vec<cpu::MapStep> = steps.iter().map(step).collect::<Option<_>>().ok_or_else(wrong_kind)?;
    cpu::map(&m.pool, m.isa, &ins, &steps, n, floats(out)?);
    Ok(())
}

/// The operation as vector instructions do it, if they do.
fn in_vectors(op: UnaryOp) -> Option<cpu::UnaryOp> {
    Some(match op {
        UnaryOp::Neg => cpu::UnaryOp::Neg,
        UnaryOp::Abs => cpu::UnaryOp::Abs,
        UnaryOp::Exp => cpu::UnaryOp::Exp,
        UnaryOp::Log => cpu::UnaryOp::Log,
        UnaryOp::Sqrt => cpu::UnaryOp::Sqrt,
        UnaryOp::Rsqrt => cpu::UnaryOp::Rsqrt,
        UnaryOp::Recip => cpu::UnaryOp::Recip,
        UnaryOp::Sigmoid => cpu::UnaryOp::Sigmoid,
        // Angles are large; only `f64` keeps their remainder by a turn.
        UnaryOp::Cos | UnaryOp::Sin => return None,
    })
}

fn unary(m: &Machine, op: UnaryOp, x: &In<'_>, out: &mut Out<'_>) -> Result<(), EngineError> {
    let (x, y) = (x.widened()?, floats(out)?);
    match in_vectors(op) {
        Some(op) => cpu::unary(&m.pool, m.isa, op, &x, y),
        None => {
            let f = if op == UnaryOp::Cos { f64::cos } else { f64::sin };
            y.iter_mut().zip(x.iter()).for_each(|(y, &x)| *y = f(f64::from(x)) as f32);
        }
    }
    Ok(())
}

fn gather(m: &Machine, ins: &[In<'_>], out: &mut Out<'_>) -> Result<(), EngineError> {
    let (n, k) = (ins[0].shape[0], ins[0].shape[1]);
    let ids = ins[1].i32()?;
    if let Some(bad) = ids.iter().find(|i| usize::try_from(**i).map_or(true, |i| i >= n)) {
        return Err(EngineError::System(format!(
            "token id {bad} is outside the embedding table of {n} rows: the tokenizer belongs to another model"
        )));
    }
    let view = match ins[0].data {
        Slice::Const(c) => c.view(),
        Slice::F32(v) => Some(cpu::WeightView::F32(v)),
        _ => None,
    };
    cpu::gather_rows(&m.pool, m.isa, &view.ok_or_else(wrong_kind)?, n, ids, k, floats(out)?);
    Ok(())
}

fn reduce(m: &Machine, op: ReduceOp, axis: usize, x: &In<'_>, out: &mut Out<'_>) -> Result<(), EngineError> {
    let data = x.widened()?;
    let data = &data[..];
    let n = x.shape[axis];
    let op = match op {
        ReduceOp::Sum => cpu::reduce::ReduceOp::Sum,
        ReduceOp::Mean => cpu::reduce::ReduceOp::Mean,
        ReduceOp::Max => cpu::reduce::ReduceOp::Max,
    };
    if axis + 1 == x.shape.len() {
        cpu::reduce::reduce_rows(&m.pool, m.isa, op, data, n, floats(out)?);
    } else {
        let (_, inner) = split(&x.shape, axis);
        cpu::reduce_middle(&m.pool, m.isa, op, data, (n, inner), floats(out)?);
    }
    Ok(())
}

/// The place in a tensor of leading dimensions `dims` of the element at place `i` of the common leading dimensions.
pub(super) fn broadcast_index(i: usize, common: &[usize], dims: &[usize]) -> usize {
    let (mut rest, mut at, mut stride) = (i, 0, 1);
    let skip = common.len() - dims.len();
    for (axis, &n) in common.iter().enumerate().rev() {
        let x = rest % n;
        rest /= n;
        if axis >= skip {
            let d = dims[axis - skip];
            at += stride * if d == 1 { 0 } else { x };
            stride *= d;
        }
    }
    at
}

fn rope(m: &Machine, attr: &RopeAttr, ins: &[In<'_>], out: &mut Out<'_>) -> Result<(), EngineError> {
    let (x, pos) = (ins[0].widened()?, ins[1].i32()?);
    let width = out.0.last().copied().unwrap_or(1);
    let turns = m.turns.of(attr, pos)?;
    let y = floats(out)?;
    // A vector is the same row for every position.
    y.chunks_mut(x.len().max(1)).for_each(|y| y.copy_from_slice(&x[..y.len()]));
    turns.turn(&m.pool, m.isa, pos, width, y);
    Ok(())
}

/// Repeats elements along the axes that have size 1, or are not there.
fn broadcast(m: &Machine, x: &In<'_>, out: &mut Out<'_>) -> Result<(), EngineError> {
    let shape = out.0.clone();
    let (data, y) = (x.widened()?, floats(out)?);
    let skip = shape.len() - x.shape.len();
    let n = shape.last().copied().unwrap_or(1).max(1);
    let single = x.shape.last().is_none_or(|m| *m != n);
    let width = if single { 1 } else { n };
    let lead = &shape[..shape.len().saturating_sub(1)];
    let dims = &x.shape[..lead.len().saturating_sub(skip)];
    for_rows(&m.pool, y, n, |r, y| {
        let at = broadcast_index(r, lead, dims) * width;
        match single {
            true => y.fill(data[at]),
            false => y.copy_from_slice(&data[at..at + n]),
        }
    });
    Ok(())
}

fn cast(op: &Op, x: &In<'_>, out: &mut Out<'_>) -> Result<(), EngineError> {
    let Op::Cast(elem) = op else { return Err(wrong_kind()) };
    let wide: Vec<f32> = match x.data()? {
        Slice::I32(v) => v.iter().map(|&x| x as f32).collect(),
        Slice::I8(v) => v.iter().map(|&x| f32::from(x)).collect(),
        Slice::U8(v) => v.iter().map(|&x| f32::from(x)).collect(),
        Slice::F32(_) | Slice::Const(_) => x.widened()?.into_owned(),
    };
    match &mut out.1 {
        SliceMut::F32(y) => {
            let round = |x: f32| match elem {
                qrmc_ir::Elem::F16 => half::f16::from_f32(x).to_f32(),
                qrmc_ir::Elem::BF16 => half::bf16::from_f32(x).to_f32(),
                _ => x,
            };
            y.iter_mut().zip(wide).for_each(|(y, x)| *y = round(x));
        }
        SliceMut::I32(y) => y.iter_mut().zip(wide).for_each(|(y, x)| *y = x as i32),
        SliceMut::I8(y) => y.iter_mut().zip(wide).for_each(|(y, x)| *y = x as i8),
        SliceMut::U8(y) => y.iter_mut().zip(wide).for_each(|(y, x)| *y = x as u8),
    }
    Ok(())
}
