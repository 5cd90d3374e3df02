//! One run of keys and values against the query rows of a task, in one order for every number of rows.

use super::super::gemm::MatRef;
use super::super::reduce::{max_of, row_sum};
#[cfg(target_arch = "x86_64")]
use super::super::simd::Level;
use super::super::simd::{Isa, Kernel, Lanes, exp};
use super::PANEL;
#[cfg(target_arch = "x86_64")]
use super::avx512;

/// Rows of a left side that are multiplied together.
const ROWS: usize = 4;

/// `out[i] += a[i] b`, or `out[i] = a[i] b` where not `keep`: up to four rows `a[i]` of `b.rows()` elements, products added
/// from the first row of `b` to the last, each sum on its own.
pub(super) fn add_rows(isa: Isa, a: &[&[f32]], b: MatRef<'_>, outs: &mut [&mut [f32]], keep: bool) {
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        return avx512::add_rows(isa, a, b, outs, keep);
    }
    isa.run(AddRows { a, b, outs, keep });
}

struct AddRows<'a, 'o> {
    a: &'a [&'a [f32]],
    b: MatRef<'a>,
    outs: &'a mut [&'o mut [f32]],
    keep: bool,
}

impl Kernel for AddRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (a, out) in self.a.iter().zip(self.outs) {
            let out = &mut out[..self.b.cols()];
            if !self.keep {
                out.fill(0.0);
            }
            for (k, &a) in a[..self.b.rows()].iter().enumerate() {
                for (o, &b) in out.iter_mut().zip(self.b.row(k)) {
                    *o = L::mul_add(a, b, *o);
                }
            }
        }
    }
}

/// Writes `x[rows, cols]` transposed: element `(i, j)` to `out[j * stride + i]`.
pub(super) fn turn(isa: Isa, x: MatRef<'_>, out: &mut [f32], stride: usize) {
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        return avx512::turn(isa, x, out, stride);
    }
    let _ = isa;
    for i in 0..x.rows() {
        for (j, &x) in x.row(i).iter().enumerate() {
            out[j * stride + i] = x;
        }
    }
}

/// The part of an attention that falls to one run of keys: for each query row the largest score, the sum of the
/// exponentials below it, and the values weighted by these.
pub(super) struct Run<'a> {
    /// Keys of the run, [`PANEL`] by [`PANEL`]: `[head_dim, PANEL]` each.
    pub(super) keys: &'a [&'a [f32]],
    /// Values of the run, piece after piece, `[positions, head_dim]` each.
    pub(super) values: &'a [MatRef<'a>],
    pub(super) scale: f32,
}

impl Run<'_> {
    /// Computes the run for query rows `[head_dim]`. Row `i` sees the first `limits[i]` keys, which do not decrease; one
    /// that sees none is left alone. `scores` has `stride` elements for each row; `values` becomes `[rows, head_dim]`.
    pub(super) fn compute(
        &self,
        isa: Isa,
        q: &[&[f32]],
        limits: &[usize],
        (scores, stride): (&mut [f32], usize),
        values: &mut [f32],
        stats: &mut [(f32, f32)],
    ) {
        let Some(dim) = q.first().map(|q| q.len()) else { return };
        // Rows that see something beyond the first `at` keys.
        let beyond = |at: usize| limits.partition_point(|&n| n <= at);
        for (panel, keys) in self.keys.iter().enumerate() {
            let (at, keys) = (panel * PANEL, MatRef::new(keys, dim, PANEL));
            let mut from = beyond(at);
            while from < q.len() {
                let rows = from..q.len().min(from + ROWS);
                let part = &mut scores[rows.start * stride..rows.end * stride];
                let mut outs: [&mut [f32]; ROWS] = Default::default();
                let parts = part.chunks_exact_mut(stride).map(|row| &mut row[at..at + PANEL]);
                outs.iter_mut().zip(parts).for_each(|(o, p)| *o = p);
                add_rows(isa, &q[rows.clone()], keys, &mut outs[..rows.len()], false);
                from = rows.end;
            }
        }
        isa.run(Weights { scores, stride, scale: self.scale, limits, stats });
        let mut at = 0;
        for &piece in self.values {
            let mut from = beyond(at);
            while from < q.len() {
                let rows = from..q.len().min(from + ROWS);
                let mut outs: [&mut [f32]; ROWS] = Default::default();
                let part = &mut values[rows.start * dim..rows.end * dim];
                outs.iter_mut().zip(part.chunks_exact_mut(dim)).for_each(|(o, p)| *o = p);
                let weights: [&[f32]; ROWS] = std::array::from_fn(|i| {
                    let row = rows.start + i;
                    if row < rows.end { &scores[row * stride + at..(row + 1) * stride] } else { &[] }
                });
                let mine = |limit: usize| (limit - at).min(piece.rows());
                let shared = mine(limits[rows.start]);
                let (weights, outs) = (&weights[..rows.len()], &mut outs[..rows.len()]);
                add_rows(isa, weights, piece.part(0, 0, shared, dim), outs, at > 0);
                for (i, &limit) in limits[rows.clone()].iter().enumerate() {
                    let count = mine(limit) - shared;
                    if count > 0 {
                        let rest = piece.part(shared, 0, count, dim);
                        add_rows(isa, &[&weights[i][shared..]], rest, &mut outs[i..=i], true);
                    }
                }
                from = rows.end;
            }
            at += piece.rows();
        }
    }
}

/// Turns scores into exponentials below their maximum, and yields the maximum and the sum of each row.
struct Weights<'a> {
    scores: &'a mut [f32],
    stride: usize,
    scale: f32,
    limits: &'a [usize],
    stats: &'a mut [(f32, f32)],
}

impl Kernel for Weights<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let rows = self.scores.chunks_exact_mut(self.stride);
        for ((row, &limit), stat) in rows.zip(self.limits).zip(self.stats) {
            // Whole vectors: what is not seen is computed with the rest and then put aside.
            let whole = limit.next_multiple_of(PANEL).min(row.len());
            let row = &mut row[..whole];
            for s in row.iter_mut() {
                *s *= self.scale;
            }
            let top = max_of(&row[..limit]);
            for s in row.iter_mut() {
                *s = exp(*s - top);
            }
            row[limit..].fill(0.0);
            *stat = (top, row_sum(row) as f32);
        }
    }
}

/// What the runs of a query row give together, run after run.
pub(super) struct Joined<'a> {
    /// `[rows, head_dim]`
    pub(super) values: &'a mut [f32],
    /// Largest score and sum of each row; the sum is 0 before the first run.
    pub(super) stats: &'a mut [(f32, f64)],
}

/// Adds the next run to what is joined so far.
pub(super) struct Join<'a, 'j> {
    pub(super) joined: &'a mut Joined<'j>,
    pub(super) values: &'a [f32],
    pub(super) stats: &'a [(f32, f32)],
    pub(super) limits: &'a [usize],
    pub(super) first: bool,
}

impl Kernel for Join<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Some(dim) = self.values.len().checked_div(self.stats.len()).filter(|&d| d > 0) else { return };
        let rows = self.joined.values.chunks_exact_mut(dim).zip(self.joined.stats.iter_mut());
        let new = self.values.chunks_exact(dim).zip(self.stats).zip(self.limits);
        for ((acc, (top, sum)), ((values, &(new_top, new_sum)), &limit)) in rows.zip(new) {
            if self.first {
                acc.copy_from_slice(values);
                (*top, *sum) = (new_top, f64::from(new_sum));
            } else if limit > 0 {
                let both = super::super::simd::max(*top, new_top);
                let (old, new) = (exp(*top - both), exp(new_top - both));
                for (a, &v) in acc.iter_mut().zip(values) {
                    *a = *a * old + v * new;
                }
                *sum = *sum * f64::from(old) + f64::from(new_sum) * f64::from(new);
                *top = both;
            }
        }
    }
}
