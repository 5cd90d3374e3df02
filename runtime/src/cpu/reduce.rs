//! Reductions along the last axis and over all elements, each in one fixed order.
//!
//! Sums run in sixteen `f64` lanes that are folded as a tree, so they are the same on every instruction set.

use super::pool::Pool;
use super::simd::{Isa, Kernel, Lanes, exp, max};

/// Elements of one partial sum of [`sum`].
const SUM_CHUNK: usize = 64 * 1024;

/// What [`reduce_rows`] makes of a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReduceOp {
    /// Sum in `f64`, rounded once.
    Sum,
    /// Mean in `f64`, rounded once.
    Mean,
    /// Largest element; NaN if there is one, `-inf` for an empty row.
    Max,
}

/// Reduces `x[rows, n]` to `out[rows]`.
///
/// # Panics
/// If a length does not fit.
pub fn reduce_rows(pool: &Pool, isa: Isa, op: ReduceOp, x: &[f32], n: usize, out: &mut [f32]) {
    assert_eq!(x.len(), out.len() * n, "rows of {n} and their results");
    let rows = (32 * 1024usize).div_ceil(n.max(1));
    pool.for_chunks(out, rows, |chunk, out| {
        for (i, out) in out.iter_mut().enumerate() {
            let row = &x[(chunk * rows + i) * n..][..n];
            *out = match op {
                ReduceOp::Sum => isa.run(Sum(row)) as f32,
                ReduceOp::Mean => (isa.run(Sum(row)) / n as f64) as f32,
                ReduceOp::Max => isa.run(Max(row)),
            };
        }
    });
}

/// The sum of all elements: `f64` partial sums of 65536 elements, added in order.
pub fn sum(pool: &Pool, isa: Isa, x: &[f32]) -> f64 {
    pool.map(x.len().div_ceil(SUM_CHUNK), |i| {
        isa.run(Sum(&x[i * SUM_CHUNK..x.len().min((i + 1) * SUM_CHUNK)]))
    })
    .into_iter()
    .sum()
}

/// Maximum and `ln Σ e^x` of one row: `x[i] - logsumexp` is the log-probability of `i`.
pub fn log_softmax_stats(isa: Isa, row: &[f32]) -> (f32, f64) {
    isa.run(Stats(row))
}

/// Softmax of each row of `x[rows, n]`.
///
/// # Panics
/// If a length does not fit.
pub fn softmax_rows(pool: &Pool, isa: Isa, x: &[f32], n: usize, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "input and output of a softmax");
    if x.is_empty() {
        return;
    }
    assert!(n > 0 && x.len().is_multiple_of(n), "rows of {n} in {} elements", x.len());
    let rows = (16 * 1024usize).div_ceil(n);
    pool.for_chunks(out, rows * n, |chunk, out| {
        let x = &x[chunk * rows * n..][..out.len()];
        for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
            out.copy_from_slice(x);
            isa.run(Softmax(out));
        }
    });
}

/// Index of the largest element, the first of equal ones; of the first NaN if there is one; 0 for an empty row.
pub fn argmax(isa: Isa, row: &[f32]) -> usize {
    isa.run(ArgMax(row))
}

/// What is summed; a trait and not a closure so that it is inlined always.
trait Term: Copy {
    fn of(self, x: f32) -> f64;
}

/// `x`
#[derive(Clone, Copy)]
struct Plain;
/// `x²`
#[derive(Clone, Copy)]
struct Square;

impl Term for Plain {
    #[inline(always)]
    fn of(self, x: f32) -> f64 {
        f64::from(x)
    }
}

impl Term for Square {
    #[inline(always)]
    fn of(self, x: f32) -> f64 {
        f64::from(x) * f64::from(x)
    }
}

/// A sum in sixteen lanes of `f64`.
#[inline(always)]
fn lanes<T: Term>(x: &[f32], term: T) -> f64 {
    let mut acc = [0f64; 16];
    let (blocks, tail) = x.as_chunks::<16>();
    for b in blocks {
        for l in 0..16 {
            acc[l] += term.of(b[l]);
        }
    }
    for (l, &x) in tail.iter().enumerate() {
        acc[l] += term.of(x);
    }
    let a: [f64; 8] = std::array::from_fn(|i| acc[i] + acc[i + 8]);
    let b: [f64; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
    (b[0] + b[2]) + (b[1] + b[3])
}

/// `Σ x²` in `f64`.
#[inline(always)]
pub(crate) fn sum_squares(x: &[f32]) -> f64 {
    lanes(x, Square)
}

/// The largest element of a row.
#[inline(always)]
pub(crate) fn max_of(x: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; 32];
    let (blocks, tail) = x.as_chunks::<32>();
    for b in blocks {
        for l in 0..32 {
            acc[l] = max(acc[l], b[l]);
        }
    }
    acc.into_iter().chain(tail.iter().copied()).fold(f32::NEG_INFINITY, max)
}

/// Replaces a row by `e^(x - max)` and yields the sum.
#[inline(always)]
pub(crate) fn exp_in_place(row: &mut [f32]) -> f64 {
    let top = max_of(row);
    for x in row.iter_mut() {
        *x = exp(*x - top);
    }
    row_sum(row)
}

/// The sum in sixteen lanes of `f64`: zeros at the end change nothing.
#[inline(always)]
pub(crate) fn row_sum(row: &[f32]) -> f64 {
    lanes(row, Plain)
}

struct Sum<'a>(&'a [f32]);
impl Kernel for Sum<'_> {
    type Output = f64;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f64 {
        lanes(self.0, Plain)
    }
}

struct Max<'a>(&'a [f32]);
impl Kernel for Max<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        max_of(self.0)
    }
}

struct Stats<'a>(&'a [f32]);
impl Kernel for Stats<'_> {
    type Output = (f32, f64);
    #[inline(always)]
    fn run<L: Lanes>(self) -> (f32, f64) {
        let top = max_of(self.0);
        let (mut sum, mut buf) = (0f64, [0f32; 512]);
        for x in self.0.chunks(512) {
            for (b, &x) in buf.iter_mut().zip(x) {
                *b = exp(x - top);
            }
            sum += lanes(&buf[..x.len()], Plain);
        }
        (top, f64::from(top) + sum.ln())
    }
}

struct ArgMax<'a>(&'a [f32]);
impl Kernel for ArgMax<'_> {
    type Output = usize;
    #[inline(always)]
    fn run<L: Lanes>(self) -> usize {
        let top = max_of(self.0);
        for (i, block) in self.0.chunks(256).enumerate() {
            let mut found = false;
            for &x in block {
                found |= (x == top) | x.is_nan();
            }
            if found {
                return 256 * i + block.iter().position(|&x| x == top || x.is_nan()).unwrap_or(0);
            }
        }
        0
    }
}

struct Softmax<'a>(&'a mut [f32]);
impl Kernel for Softmax<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let inv = (1.0 / exp_in_place(self.0)) as f32;
        for x in self.0.iter_mut() {
            *x *= inv;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{bits, close, noise, pools};
    use super::*;

    #[test]
    fn rows_are_reduced_alike_everywhere() {
        for (rows, n) in [(0, 3), (2, 0), (1, 1), (7, 5), (3, 1000), (900, 49)] {
            let x = noise(rows * n, 5);
            for op in [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Max] {
                let want: Vec<f64> = (0..rows)
                    .map(|r| {
                        let row = x[r * n..(r + 1) * n].iter().map(|&v| f64::from(v));
                        match op {
                            ReduceOp::Sum => row.sum(),
                            ReduceOp::Mean => row.sum::<f64>() / n as f64,
                            ReduceOp::Max => row.fold(f64::NEG_INFINITY, f64::max),
                        }
                    })
                    .collect();
                let mut first = None;
                for isa in Isa::available() {
                    for pool in &pools() {
                        let mut out = vec![0.0; rows];
                        reduce_rows(pool, isa, op, &x, n, &mut out);
                        if n > 0 {
                            close(&out, &want, 1e-6, "reduce_rows");
                        }
                        assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out), "{}", isa.name());
                    }
                }
            }
        }
    }

    #[test]
    fn the_full_sum_is_one_number() {
        let x = noise(200_003, 6);
        let want: f64 = x.iter().map(|&v| f64::from(v)).sum();
        let mut first = None;
        for isa in Isa::available() {
            for pool in &pools() {
                let got = sum(pool, isa, &x);
                assert!((got - want).abs() < 1e-8);
                assert_eq!(*first.get_or_insert(got), got);
                assert_eq!(sum(pool, isa, &[]), 0.0);
            }
        }
    }

    #[test]
    fn softmax_and_its_logarithm() {
        for (rows, n) in [(1, 1), (3, 37), (2, 5000)] {
            let x: Vec<f32> = noise(rows * n, 7).iter().map(|v| v * 30.0).collect();
            let mut want = Vec::new();
            for row in x.chunks(n) {
                let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|&v| f64::from(v - top).exp()).sum();
                want.extend(row.iter().map(|&v| f64::from(v - top).exp() / sum));
                for isa in Isa::available() {
                    let (got_top, lse) = log_softmax_stats(isa, row);
                    assert_eq!(got_top, top);
                    assert!((lse - f64::from(top) - sum.ln()).abs() < 1e-6);
                }
            }
            let mut first = None;
            for isa in Isa::available() {
                for pool in &pools() {
                    let mut out = vec![0.0; x.len()];
                    softmax_rows(pool, isa, &x, n, &mut out);
                    close(&out, &want, 1e-6, "softmax");
                    assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out));
                }
            }
        }
    }

    #[test]
    fn argmax_takes_the_first() {
        for isa in Isa::available() {
            assert_eq!(argmax(isa, &[]), 0);
            assert_eq!(argmax(isa, &[f32::NEG_INFINITY]), 0);
            let mut v = vec![0.0; 100];
            (v[41], v[77]) = (3.0, 3.0);
            assert_eq!(argmax(isa, &v), 41);
            v[90] = f32::NAN;
            assert_eq!(argmax(isa, &v), 90);
        }
    }
}
