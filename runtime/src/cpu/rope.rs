//! Rotary position embedding in the "rotate half" (NEOX) form.

use super::pool::Pool;
use super::simd::{Isa, Kernel, Lanes};

/// Rotates each head of `x[rows, heads * head_dim]` into `out` of the same shape.
///
/// `cos` and `sin` are `[positions, head_dim / 2]`; row `r` of `x` takes row `r % positions` of them. So a table
/// `[S, ..]` serves a batch `[B * S, ..]` whose sequences stand at the same positions, and a table `[B * S, ..]`
/// one in which they differ.
///
/// # Panics
/// If a length does not fit.
#[allow(clippy::too_many_arguments, reason = "two sizes and two tables")]
pub fn rope(
    pool: &Pool,
    isa: Isa,
    x: &[f32],
    heads: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
    out: &mut [f32],
) {
    assert_eq!(x.len(), out.len(), "input and output of a rotation");
    let Some(plan) = Plan::new(x.len(), heads, head_dim, cos, sin) else { return };
    pool.for_chunks(out, plan.rows * plan.width, |chunk, out| {
        let first = chunk * plan.rows;
        isa.run(Rotate { plan, first, x: Some(&x[first * plan.width..][..out.len()]), out });
    });
}

/// [`rope`] where input and output are the same memory.
///
/// # Panics
/// If a length does not fit.
pub fn rope_inplace(
    pool: &Pool,
    isa: Isa,
    x: &mut [f32],
    heads: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
) {
    let Some(plan) = Plan::new(x.len(), heads, head_dim, cos, sin) else { return };
    pool.for_chunks(x, plan.rows * plan.width, |chunk, out| {
        isa.run(Rotate { plan, first: chunk * plan.rows, x: None, out });
    });
}

#[derive(Clone, Copy)]
struct Plan<'a> {
    half: usize,
    width: usize,
    rows: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl<'a> Plan<'a> {
    /// `None` if there is nothing to do.
    fn new(len: usize, heads: usize, head_dim: usize, cos: &'a [f32], sin: &'a [f32]) -> Option<Self> {
        let (half, width) = (head_dim / 2, heads * head_dim);
        if len == 0 {
            return None;
        }
        assert!(head_dim > 0 && head_dim.is_multiple_of(2), "a head of {head_dim} has no halves");
        assert!(width > 0 && len.is_multiple_of(width), "rows of {width} in {len} elements");
        assert!(cos.len() == sin.len() && !cos.is_empty() && cos.len().is_multiple_of(half), "rotary tables");
        Some(Plan { half, width, rows: (16 * 1024usize).div_ceil(width), cos, sin })
    }
}

struct Rotate<'a> {
    plan: Plan<'a>,
    /// Row of the whole tensor with which `out` begins.
    first: usize,
    /// `None`: `out` holds the input.
    x: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Plan { half, width, cos, sin, .. } = self.plan;
        let positions = cos.len() / half;
        if let Some(x) = self.x {
            self.out.copy_from_slice(x);
        }
        for (r, row) in self.out.chunks_exact_mut(width).enumerate() {
            let at = (self.first + r) % positions * half;
            let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
            for head in row.chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (low[i], high[i]);
                    low[i] = a * cos[i] - b * sin[i];
                    high[i] = b * cos[i] + a * sin[i];
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
    fn rotates_halves_on_every_path() {
        for (batch, seq, heads, dim) in [(1, 1, 1, 2), (2, 5, 3, 8), (1, 90, 9, 64), (3, 4, 2, 128)] {
            let (half, width) = (dim / 2, heads * dim);
            let x = noise(batch * seq * width, 3);
            let angles: Vec<f64> = (0..seq * half)
                .map(|i| (i / half) as f64 / 1e4f64.powf((i % half) as f64 / half as f64))
                .collect();
            let cos: Vec<f32> = angles.iter().map(|a| a.cos() as f32).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin() as f32).collect();
            let want: Vec<f64> = (0..x.len())
                .map(|i| {
                    let (row, d) = (i / width, i % dim);
                    let a = angles[row % seq * half + d % half];
                    let (v, base) = (f64::from(x[i]), i - d);
                    if d < half {
                        v * a.cos() - f64::from(x[base + d + half]) * a.sin()
                    } else {
                        v * a.cos() + f64::from(x[base + d - half]) * a.sin()
                    }
                })
                .collect();
            let mut first = None;
            for isa in Isa::available() {
                for pool in &pools() {
                    let mut out = vec![0.0; x.len()];
                    rope(pool, isa, &x, heads, dim, &cos, &sin, &mut out);
                    close(&out, &want, 1e-6, "rope");
                    assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out), "{}", isa.name());
                    let mut same = x.clone();
                    rope_inplace(pool, isa, &mut same, heads, dim, &cos, &sin);
                    assert_eq!(bits(&same), bits(&out));
                }
            }
        }
    }
}
