//! `y = x Wᵀ` on weights as they are stored.
#![allow(unsafe_code, reason = "several threads write disjoint columns of one output")]

use super::dot::{Layout, layout, split_pairs};
use super::gemm::{DOT_ROWS, MatRef, columns_at_once, dot_block, matmul};
use super::pool::{Pool, Scratch, SharedMut};
use super::simd::Isa;
use super::weight::{Dequantize, Row, WeightView};

/// Most rows of a stored weight that exist as floats at the same time.
const PANEL: usize = 1024;

/// `out[m, n] = x[m, k] Wᵀ` for a weight `W[n, k]`, in `f32`.
///
/// With few rows of `x` each stored row is read once and dequantised in registers; otherwise panels of at most
/// 1024 rows are dequantised into `scratch` and multiplied as matrices.
///
/// # Panics
/// If a length does not fit the shape.
#[allow(clippy::too_many_arguments, reason = "three sizes and the operands of one matrix product")]
pub fn linear(
    pool: &Pool,
    isa: Isa,
    x: &[f32],
    (m, k): (usize, usize),
    w: &WeightView<'_>,
    n: usize,
    out: &mut [f32],
    scratch: &Scratch,
) {
    w.check(n, k);
    assert_eq!(x.len(), m * k, "input of a linear [{m}, {k}]");
    assert_eq!(out.len(), m * n, "output of a linear [{m}, {n}]");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        return out.fill(0.0);
    }
    if m <= DOT_ROWS {
        return fused(pool, isa, x, (m, k), w, n, out, scratch);
    }
    if let WeightView::F32(w) = w {
        return matmul(pool, isa, MatRef::new(x, m, k), MatRef::new(w, n, k).t(), out, n);
    }
    let mut panel = scratch.take(PANEL.min(n) * k);
    let rows = columns_at_once(4 * k, n);
    for from in (0..n).step_by(PANEL) {
        let count = PANEL.min(n - from);
        let panel = &mut panel[..count * k];
        pool.for_chunks(panel, rows * k, |chunk, out| {
            for (i, out) in out.chunks_exact_mut(k).enumerate() {
                isa.run(Dequantize { row: w.row(from + chunk * rows + i, k), out });
            }
        });
        matmul(pool, isa, MatRef::new(x, m, k), MatRef::new(panel, count, k).t(), &mut out[from..], n);
    }
}

/// A few rows of `x` against each stored row in turn.
#[allow(clippy::too_many_arguments, reason = "as `linear`")]
fn fused(
    pool: &Pool,
    isa: Isa,
    x: &[f32],
    (m, k): (usize, usize),
    w: &WeightView<'_>,
    n: usize,
    out: &mut [f32],
    scratch: &Scratch,
) {
    let layout = layout(&w.row(0, k), k);
    let mut split;
    let x = if layout == Layout::SplitPairs {
        split = scratch.take(m * k);
        split_pairs(x, k, &mut split);
        &split[..]
    } else {
        x
    };
    let run = columns_at_once(w.row_bytes(k), n);
    let out = SharedMut::new(out);
    pool.for_each(n.div_ceil(run), |task| {
        let from = task * run;
        let count = run.min(n - from);
        // SAFETY: each task writes its own columns.
        let mut outs: Vec<&mut [f32]> =
            (0..m).map(|r| unsafe { out.part(r * n + from, count) }).collect();
        let rows = |r: usize| &x[r * k..(r + 1) * k];
        if layout == Layout::Unfused {
            let mut buf = scratch.take(k);
            for j in 0..count {
                isa.run(Dequantize { row: w.row(from + j, k), out: &mut buf });
                dot_block(isa, Row::F32(&buf), rows, j, &mut outs);
            }
        } else {
            for j in 0..count {
                dot_block(isa, w.row(from + j, k), rows, j, &mut outs);
            }
        }
    });
}
