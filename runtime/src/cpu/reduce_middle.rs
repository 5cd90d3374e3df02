//! Reductions along an axis that is not the last, each in one fixed order.

use super::pool::Pool;
use super::reduce::ReduceOp;
use super::simd::{Isa, Kernel, Lanes, max};

/// Reduces `x[outer, n, inner]` to `out[outer, inner]`: sums in `f64`, row after row.
///
/// # Panics
/// If a length does not fit.
pub fn reduce_middle(
    pool: &Pool,
    isa: Isa,
    op: ReduceOp,
    x: &[f32],
    (n, inner): (usize, usize),
    out: &mut [f32],
) {
    assert_eq!(x.len(), out.len() * n, "rows of {inner} and their results");
    if out.is_empty() {
        return;
    }
    let per_task = (64 * 1024 / n.max(1)).max(COLUMNS).next_multiple_of(COLUMNS);
    pool.for_chunks(out, per_task, |c, mut out| {
        let mut at = c * per_task;
        while !out.is_empty() {
            let (o, col) = (at / inner, at % inner);
            let (part, rest) = out.split_at_mut((inner - col).min(out.len()).min(COLUMNS));
            isa.run(Columns { op, x: &x[o * n * inner..][..n * inner], inner, col, out: part });
            at += part.len();
            out = rest;
        }
    });
}

/// Columns that are reduced at a time.
const COLUMNS: usize = 64;

/// Up to [`COLUMNS`] columns from `col` on of rows of `inner` elements.
struct Columns<'a> {
    op: ReduceOp,
    x: &'a [f32],
    inner: usize,
    col: usize,
    out: &'a mut [f32],
}

impl Kernel for Columns<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Columns { op, x, inner, col, out } = self;
        let len = out.len();
        if op == ReduceOp::Max {
            out.fill(f32::NEG_INFINITY);
            for row in x.chunks_exact(inner) {
                for (o, &x) in out.iter_mut().zip(&row[col..col + len]) {
                    *o = max(*o, x);
                }
            }
            return;
        }
        let mut acc = [0f64; COLUMNS];
        let acc = &mut acc[..len];
        for row in x.chunks_exact(inner) {
            for (a, &x) in acc.iter_mut().zip(&row[col..col + len]) {
                *a += f64::from(x);
            }
        }
        let count = if op == ReduceOp::Mean { (x.len() / inner).max(1) as f64 } else { 1.0 };
        for (o, &a) in out.iter_mut().zip(&*acc) {
            *o = (a / count) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{noise, pools3};
    use super::*;

    #[test]
    fn middle_axes_are_reduced_alike_everywhere() {
        for (outer, n, inner) in [(1, 300, 577), (5, 7, 3), (3, 0, 4), (2, 1, 64), (70, 9, 65), (0, 3, 2)] {
            let x = noise(outer * n * inner, 6);
            for op in [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Max] {
                let want: Vec<f64> = (0..outer * inner)
                    .map(|at| {
                        let (o, i) = (at / inner, at % inner);
                        let column = (0..n).map(|r| f64::from(x[(o * n + r) * inner + i]));
                        match op {
                            ReduceOp::Sum => column.sum(),
                            ReduceOp::Mean => column.sum::<f64>() / n.max(1) as f64,
                            ReduceOp::Max => column.fold(f64::NEG_INFINITY, f64::max),
                        }
                    })
                    .collect();
                let want: Vec<f32> = want.into_iter().map(|w| w as f32).collect();
                for isa in Isa::available() {
                    for pool in &pools3() {
                        let mut out = vec![f32::NAN; outer * inner];
                        reduce_middle(pool, isa, op, &x, (n, inner), &mut out);
                        assert!(out == want, "{op:?} [{outer}, {n}, {inner}] {}", isa.name());
                    }
                }
            }
        }
    }
}
