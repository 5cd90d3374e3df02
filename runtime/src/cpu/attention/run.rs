//! One run of keys and values against the query rows of a task, in one order for every number of rows.

use super::super::gemm::MatRef;
use super::super::reduce::{exp_below, max_of};
#[cfg(target_arch = "x86_64")]
use super::super::simd::Level;
use super::super::simd::{Isa, Kernel, Lanes};
#[cfg(target_arch = "x86_64")]
use super::avx512;

/// Rows of a left side that are multiplied together.
const ROWS: usize = 4;
/// Columns of scores that are computed together.
const COLUMNS: usize = 64;

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
    /// Keys of the run, transposed: `[head_dim, stride]`.
    pub(super) keys: &'a [f32],
    pub(super) stride: usize,
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
        scores: &mut [f32],
        values: &mut [f32],
        stats: &mut [(f32, f32)],
    ) {
        let Some(dim) = q.first().map(|q| q.len()) else { return };
        let seen = limits.iter().take_while(|&&n| n == 0).count();
        let mut from = seen;
        while from < q.len() {
            let rows = from..q.len().min(from + ROWS);
            let most = limits[rows.end - 1];
            let keys = most.next_multiple_of(COLUMNS).min(self.stride);
            let keys = MatRef::strided(self.keys, dim, keys, self.stride, 1);
            let part = &mut scores[rows.start * self.stride..rows.end * self.stride];
            let mut outs: [&mut [f32]; ROWS] = Default::default();
            outs.iter_mut().zip(part.chunks_exact_mut(self.stride)).for_each(|(o, p)| *o = p);
            add_rows(isa, &q[rows.clone()], keys, &mut outs[..rows.len()], false);
            from = rows.end;
        }
        isa.run(Weights { scores, stride: self.stride, scale: self.scale, limits, stats });
        from = seen;
        while from < q.len() {
            let rows = from..q.len().min(from + ROWS);
            let mut outs: [&mut [f32]; ROWS] = Default::default();
            let part = &mut values[rows.start * dim..rows.end * dim];
            outs.iter_mut().zip(part.chunks_exact_mut(dim)).for_each(|(o, p)| *o = p);
            let weights: [&[f32]; ROWS] = std::array::from_fn(|i| {
                let row = rows.start + i;
                if row < rows.end { &scores[row * self.stride..][..self.stride] } else { &[] }
            });
            self.weigh(isa, &weights[..rows.len()], &limits[rows.clone()], &mut outs[..rows.len()]);
            from = rows.end;
        }
    }

    /// The weighted values of up to four rows.
    fn weigh(&self, isa: Isa, weights: &[&[f32]], limits: &[usize], outs: &mut [&mut [f32]]) {
        let (common, mut at) = (limits[0], 0);
        for piece in self.values {
            let (count, dim) = (piece.rows(), piece.cols());
            let shared = common.saturating_sub(at).min(count);
            if shared > 0 {
                let weights: [&[f32]; ROWS] =
                    std::array::from_fn(|i| weights.get(i).map_or(&[][..], |w| &w[at..]));
                add_rows(isa, &weights[..limits.len()], piece.part(0, 0, shared, dim), outs, at > 0);
            }
            for (i, &limit) in limits.iter().enumerate() {
                let mine = limit.saturating_sub(at).min(count);
                if mine > shared {
                    let rest = piece.part(shared, 0, mine - shared, dim);
                    let keep = at + shared > 0;
                    add_rows(isa, &[&weights[i][at + shared..]], rest, &mut outs[i..=i], keep);
                }
            }
            at += count;
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
            let row = &mut row[..limit];
            for s in row.iter_mut() {
                *s *= self.scale;
            }
            let top = max_of(row);
            *stat = (top, exp_below(row, top) as f32);
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
                let (old, new) =
                    (super::super::simd::exp(*top - both), super::super::simd::exp(new_top - both));
                for (a, &v) in acc.iter_mut().zip(values) {
                    *a = *a * old + v * new;
                }
                *sum = *sum * f64::from(old) + f64::from(new_sum) * f64::from(new);
                *top = both;
            }
        }
    }
}
