//! Root-mean-square normalisation.

use super::pool::Pool;
use super::reduce::sum_squares;
use super::simd::{Isa, Kernel, Lanes};

/// Normalises each run of `n` elements: `out = x / sqrt(mean(x²) + eps) * gain`.
///
/// `x` and `out` are `[rows, n]`; `gain` is `[n]`, or absent where it was folded away. For a norm per head give
/// `n = head_dim`. The sum of squares is taken in `f64`.
///
/// # Panics
/// If a length does not fit.
pub fn rms_norm(pool: &Pool, isa: Isa, x: &[f32], n: usize, gain: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "input and output of a norm");
    assert!(gain.is_none_or(|g| g.len() == n), "gain of a norm over {n}");
    if n == 0 || x.is_empty() {
        return;
    }
    assert!(x.len().is_multiple_of(n), "rows of {n} in {} elements", x.len());
    let rows = (16 * 1024usize).div_ceil(n);
    pool.for_chunks(out, rows * n, |chunk, out| {
        let x = &x[chunk * rows * n..][..out.len()];
        isa.run(Rows { x, n, gain, eps, out });
    });
}

struct Rows<'a> {
    x: &'a [f32],
    n: usize,
    gain: Option<&'a [f32]>,
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (x, out) in self.x.chunks_exact(self.n).zip(self.out.chunks_exact_mut(self.n)) {
            let mean = (sum_squares(x) / self.n as f64) as f32;
            let inv = 1.0 / (mean + self.eps).sqrt();
            match self.gain {
                Some(gain) => {
                    for ((o, &x), &g) in out.iter_mut().zip(x).zip(gain) {
                        *o = (x * inv) * g;
                    }
                }
                None => {
                    for (o, &x) in out.iter_mut().zip(x) {
                        *o = x * inv;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{bits, close, noise, pools};
    use super::*;

    #[test]
    fn matches_the_definition_on_every_path() {
        for (rows, n) in [(0, 5), (1, 1), (3, 7), (5, 64), (700, 33), (4, 1024)] {
            let (x, g) = (noise(rows * n, 1), noise(n, 2));
            for gain in [None, Some(&g[..])] {
                let want: Vec<f64> = (0..rows * n)
                    .map(|i| {
                        let row = &x[i / n * n..][..n];
                        let mean = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n as f64;
                        f64::from(x[i]) / (mean + f64::from(1e-5f32)).sqrt()
                            * gain.map_or(1.0, |g| f64::from(g[i % n]))
                    })
                    .collect();
                let mut first = None;
                for isa in Isa::available() {
                    for pool in &pools() {
                        let mut out = vec![f32::NAN; rows * n];
                        rms_norm(pool, isa, &x, n, gain, 1e-5, &mut out);
                        close(&out, &want, 1e-6, "rms_norm");
                        assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out), "{}", isa.name());
                    }
                }
            }
        }
    }
}
