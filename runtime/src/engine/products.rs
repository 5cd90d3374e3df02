//! Products of matrices, and the gradient of attention, which is made of them.

use qrmc_ir::{AttnAttr, Elem, EngineError, Grain, Op, QuantSpec};
use qrmc_lowering::LinearPart;
use smallvec::SmallVec;

use super::consts::Constant;
use super::exec::{In, Slice, wrong_kind};
use super::prims::{Out, broadcast_index, floats};
use super::quantize::row_scales;
use super::{Factors, Machine, Stored, UNIT_ROWS};
use crate::cpu::tiles::{self, Part, Side, Tiles};
use crate::cpu::{self, AttnShape, MatRef};

/// Up to this many rows and columns, a product over many terms is done in registers.
const SMALL: usize = 64;

/// A product on the matrix unit, if it is one of those: `outer`, or a plain matrix on the right, which serves all rows of
/// a batch at once. `a` and `b` are the elements of the operands.
fn on_unit(
    m: &Machine,
    factors: Factors,
    op: &Op,
    ins: &[In<'_>],
    (a, b): (&[f32], &[f32]),
    out: &mut Out<'_>,
) -> Result<bool, EngineError> {
    let n = out.0.last().copied().unwrap_or(1);
    let (left, right, shape) = match op {
        Op::MatMul { trans_b } if ins[1].shape.len() == 2 => {
            let k = ins[0].shape.last().copied().unwrap_or(1);
            let right = if *trans_b { Stored::Rows(b) } else { Stored::Columns(b) };
            (Stored::Rows(a), right, (a.len() / k.max(1), k, n))
        }
        Op::Outer => (Stored::Columns(a), Stored::Columns(b), (out.0[0], a.len() / out.0[0].max(1), n)),
        _ => return Ok(false),
    };
    Ok(m.unit_product(factors, left, right, shape, floats(out)?))
}

/// A product of factors that are rounded to bfloat16 first.
pub(super) fn bf16(m: &Machine, op: &Op, ins: &[In<'_>], out: &mut Out<'_>) -> Result<(), EngineError> {
    let (a, b) = (ins[0].widened()?, ins[1].widened()?);
    if on_unit(m, Factors::Bf16, op, ins, (&a, &b), out)? {
        return Ok(());
    }
    let round = |x: &[f32]| -> Vec<f32> { x.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect() };
    let (a, b) = (round(&a), round(&b));
    let rounded = |i: usize, data| In { shape: ins[i].shape.clone(), data: Slice::F32(data) };
    let ins = [rounded(0, &a), rounded(1, &b)];
    match op {
        Op::MatMul { trans_b } => matmul(m, *trans_b, &ins, out),
        Op::Outer => outer(m, &ins, out),
        _ => Err(wrong_kind()),
    }
}

/// `x wᵀ` of two results of `fake_quant`: a product of codes on a coarse engine, any other product elsewhere.
pub(super) fn on_grid(
    m: &Machine,
    casts: &[Op; 2],
    split: usize,
    ins: &[In<'_>],
    out: &mut Out<'_>,
) -> Result<(), EngineError> {
    let (factors, given) = ins.split_at(2);
    let (k, n) = (factors[1].shape[1], factors[1].shape[0]);
    let rows = factors[0].shape.iter().product::<usize>() / k.max(1);
    if m.coarse && rows >= UNIT_ROWS {
        let (of_x, of_w) = given.split_at(split);
        let scales = (row_scales(m, &casts[0], of_x)?, row_scales(m, &casts[1], of_w)?);
        let usable = |scales: &[f32]| scales.iter().all(|s| s.is_normal() && (1.0 / s).is_normal());
        if usable(&scales.0) && usable(&scales.1) {
            let (x, w) = (factors[0].widened()?, factors[1].widened()?);
            let y = floats(out)?;
            let (x, w) = (Stored::OnGrid(&x, &scales.0), Stored::OnGrid(&w, &scales.1));
            if m.unit_product(Factors::Bf16, x, w, (rows, k, n), y) {
                return Ok(());
            }
        }
    }
    matmul(m, true, factors, out)
}

/// `x wᵀ`, and a bias, for one `x` and each of some weights. `elem` is the type of the first operand.
pub(super) fn linear(
    m: &Machine,
    parts: &[LinearPart],
    elem: Elem,
    ins: &[In<'_>],
    outs: &mut [Out<'_>],
) -> Result<(), EngineError> {
    let k = ins[0].shape.last().copied().unwrap_or(1);
    let run = |spec: QuantSpec| if let Grain::Group(g) = spec.grain { g as usize } else { k };
    // Rows of a tensor with one scale have it each.
    let rows = ins[0].shape.iter().product::<usize>() / k.max(1);
    let shared = match elem {
        Elem::Quant(QuantSpec { grain: Grain::Tensor, .. }) => Some(vec![ins[1].widened()?[0]; rows]),
        _ => None,
    };
    let side = match (elem, ins[0].data()?) {
        (Elem::Quant(spec), Slice::U8(codes)) => {
            let (scales, zeros) = (ins[1].f32()?, ins[2].u8()?);
            Side::Unsigned { codes, bits: spec.bits, scales, zeros, run: run(spec) }
        }
        (Elem::Quant(spec), Slice::I8(codes)) => {
            let scales = match &shared {
                Some(scales) => &scales[..],
                None => ins[1].f32()?,
            };
            Side::Signed { codes, scales, run: run(spec) }
        }
        _ => Side::Floats(ins[0].f32()?),
    };
    let tiles = |p: &LinearPart| match ins[p.weight].data {
        Slice::Const(Constant::Tiles(w)) => Some(w),
        _ => None,
    };
    let mut done = vec![false; parts.len()];
    while let Some(first) = done.iter().position(|d| !d) {
        let Some(group) = tiles(&parts[first]).map(Tiles::group) else {
            dense(m, &parts[first], ins, &mut outs[first])?;
            done[first] = true;
            continue;
        };
        // Weights with groups of one length share the cut of the left side.
        let mut added: SmallVec<[_; 4]> = SmallVec::new();
        for p in parts {
            let floats = |at: Option<usize>| at.map(|at| ins[at].widened()).transpose();
            added.push((floats(p.bias)?, floats(p.add)?));
        }
        let mut together = Vec::new();
        for (i, out) in outs.iter_mut().enumerate() {
            if let Some(w) = tiles(&parts[i]).filter(|w| !done[i] && w.group() == group) {
                let (bias, add) = &added[i];
                together.push(Part { w, bias: bias.as_deref(), add: add.as_deref(), out: floats(out)? });
                done[i] = true;
            }
        }
        let (rows, k) = (together[0].out.len() / together[0].w.shape().0, together[0].w.shape().1);
        let mut digits = m.digits.take();
        digits.cut(&m.pool, m.isa, side, (rows, k), group);
        tiles::product(&m.pool, m.path, &digits, &mut together, &m.scratch);
        m.digits.give(digits);
    }
    Ok(())
}

/// `x wᵀ`, and a bias, for a weight that is no tiles.
fn dense(m: &Machine, part: &LinearPart, ins: &[In<'_>], out: &mut Out<'_>) -> Result<(), EngineError> {
    let (pool, isa, weight) = (&m.pool, m.isa, &ins[part.weight]);
    let (n, k) = (weight.shape[0], weight.shape[1]);
    let x = ins[0].f32()?;
    let rows = x.len() / k.max(1);
    let view = match weight.data {
        Slice::Const(c) => c.view(),
        Slice::F32(v) => Some(cpu::WeightView::F32(v)),
        _ => None,
    };
    let y = floats(out)?;
    let view = view.ok_or_else(wrong_kind)?;
    let split = matches!(&view, cpu::WeightView::F32(w) if m.unit_product(Factors::F32, Stored::Rows(x), Stored::Rows(w), (rows, k, n), y));
    if !split {
        cpu::linear(pool, isa, x, (rows, k), &view, n, y, &m.scratch);
    }
    let bias = part.bias.map(|at| ins[at].widened()).transpose()?;
    let add = part.add.map(|at| ins[at].widened()).transpose()?;
    if bias.is_none() && add.is_none() {
        return Ok(());
    }
    let each = n.max(1) * 64;
    pool.for_chunks(y, each, |c, rows| {
        for (r, row) in rows.chunks_mut(n).enumerate() {
            if let Some(bias) = &bias {
                row.iter_mut().zip(bias.iter()).for_each(|(y, b)| *y += b);
            }
            if let Some(add) = &add {
                row.iter_mut().zip(&add[c * each + r * n..]).for_each(|(y, a)| *y += a);
            }
        }
    });
    Ok(())
}

/// A matrix product; leading dimensions broadcast.
pub(super) fn matmul(
    m: &Machine,
    trans_b: bool,
    ins: &[In<'_>],
    out: &mut Out<'_>,
) -> Result<(), EngineError> {
    let shape = out.0.clone();
    let (a, b) = (&ins[0], &ins[1]);
    let (ra, rb) = (a.shape.len(), b.shape.len());
    let (rows, k) = (a.shape[ra - 2], a.shape[ra - 1]);
    let n = shape[shape.len() - 1];
    let (av, bv) = (a.widened()?, b.widened()?);
    if on_unit(m, Factors::F32, &Op::MatMul { trans_b }, ins, (&av, &bv), out)? {
        return Ok(());
    }
    let y = floats(out)?;
    let right = |data| {
        if trans_b { MatRef::new(data, n, k).t() } else { MatRef::new(data, k, n) }
    };
    // A plain matrix on the right serves all rows of a batch at once.
    if rb == 2 {
        let rows = av.len() / k.max(1);
        cpu::matmul(&m.pool, m.isa, MatRef::new(&av, rows, k), right(&bv), y, n);
        return Ok(());
    }
    let lead = &shape[..shape.len() - 2];
    let batch: usize = lead.iter().product();
    if a.shape[..ra - 2] == *lead && b.shape[..rb - 2] == *lead {
        let (am, bm) = (MatRef::new(&av, rows, k), right(&bv));
        cpu::matmul_batched(&m.pool, m.isa, batch, (am, rows * k), (bm, n * k), y, (n, rows * n));
        return Ok(());
    }
    for i in 0..batch {
        let at = |s: &[usize]| broadcast_index(i, lead, &s[..s.len() - 2]);
        let (ia, ib) = (at(&a.shape), at(&b.shape));
        let am = MatRef::new(&av[ia * rows * k..], rows, k);
        cpu::matmul(
            &m.pool,
            m.isa,
            am,
            right(&bv[ib * n * k..]),
            &mut y[i * rows * n..(i + 1) * rows * n],
            n,
        );
    }
    Ok(())
}

/// `aᵀ b` over all leading positions.
pub(super) fn outer(m: &Machine, ins: &[In<'_>], out: &mut Out<'_>) -> Result<(), EngineError> {
    let (rows, cols) = (out.0[0], out.0[1]);
    let (a, b) = (ins[0].widened()?, ins[1].widened()?);
    let (a, b) = (&a[..], &b[..]);
    let count = a.len() / rows.max(1);
    if cols > 0 && rows.max(cols) <= SMALL && count > SMALL && !std::ptr::eq(a, b) {
        cpu::outer_small(&m.pool, m.isa, (a, b), (rows, cols), floats(out)?, &m.scratch);
        return Ok(());
    }
    if on_unit(m, Factors::F32, &Op::Outer, ins, (a, b), out)? {
        return Ok(());
    }
    if rows == cols && std::ptr::eq(a, b) {
        cpu::gram(&m.pool, MatRef::new(a, count, rows), floats(out)?);
        return Ok(());
    }
    let (a, b) = (MatRef::new(a, count, rows), MatRef::new(b, count, cols));
    cpu::matmul(&m.pool, m.isa, a.t(), b, floats(out)?, cols);
    Ok(())
}

/// `Σ a bᵀ` over the last axis and all leading positions.
pub(super) fn outer_middle(m: &Machine, ins: &[In<'_>], out: &mut Out<'_>) -> Result<(), EngineError> {
    let sizes = (out.0[0], out.0[1], ins[0].shape.last().copied().unwrap_or(1));
    let (a, b) = (ins[0].widened()?, ins[1].widened()?);
    cpu::outer_middle(&m.pool, m.isa, (&a, &b), sizes, floats(out)?, &m.scratch);
    Ok(())
}

/// Gradients of the three operands of an attention.
pub(super) fn attention_grad(
    m: &Machine,
    a: &AttnAttr,
    ins: &[In<'_>],
    outs: &mut [Out<'_>],
) -> Result<(), EngineError> {
    let [batch, seq, width] = ins[0].shape[..] else { return Err(wrong_kind()) };
    let shape = AttnShape {
        batch,
        seq,
        past: ins[1].shape[1] - seq,
        heads: a.heads as usize,
        kv_heads: a.kv_heads as usize,
        head_dim: width / a.heads as usize,
    };
    let data = [ins[0].f32()?, ins[1].f32()?, ins[2].f32()?, ins[3].f32()?];
    let [dq, dk, dv] = outs else { return Err(wrong_kind()) };
    let outs = [floats(dq)?, floats(dk)?, floats(dv)?];
    cpu::attention_grad(&m.pool, m.isa, &shape, a.scale.0 as f32, data, outs, &m.scratch);
    Ok(())
}
