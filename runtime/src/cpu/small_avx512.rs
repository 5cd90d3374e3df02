//! Eight rows of a small product at a time, in AVX-512 intrinsics.
#![allow(unsafe_code, reason = "AVX-512 intrinsics; an `Isa` of that level proves that the machine has them")]

use std::arch::x86_64::*;

use super::dot_avx512::first;
use super::gemm::MatRef;
use super::simd::{Isa, Level};
use super::small::{ROWS, Sides};

/// As [`super::small::product`].
///
/// # Panics
/// If `isa` is not AVX-512 or the lengths do not fit.
pub(super) fn product(isa: Isa, a: MatRef<'_>, s: &mut Sides<'_>) {
    let (rows, k) = (a.rows(), a.cols());
    assert!(isa.level() == Level::Avx512 && rows <= ROWS);
    assert!(s.n == 0 || k == 0 || s.b.len() >= (k - 1) * s.stride + s.n);
    assert!(s.n == 0 || rows == 0 || s.out.len() >= (rows - 1) * s.out_stride + s.n);
    for c in (0..if rows == 0 { 0 } else { s.n }).step_by(32) {
        // SAFETY: the level proves the features; columns `c..n` of `b` and `out` are inside, and masks keep to them.
        unsafe {
            match s.n - c {
                rest @ 17.. => tile::<2>(a, s, c, first((rest - 16).min(16))),
                rest => tile::<1>(a, s, c, first(rest)),
            }
        }
    }
}

/// Columns from `c` on: `V` vectors, of which `last` are in the last.
///
/// # Safety
/// `a` has 1 to [`ROWS`] rows. These columns of the first `a.cols()` rows of `s.b`, and of `a.rows()` rows of `s.out`, are
/// valid.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile<const V: usize>(a: MatRef<'_>, s: &mut Sides<'_>, c: usize, last: __mmask16) {
    let mask = |i: usize| if i + 1 == V { last } else { !0 };
    let (rows, (down, across)) = (a.rows(), a.strides());
    // What is computed beyond the last row is thrown away.
    let at: [usize; ROWS] = std::array::from_fn(|r| r.min(rows - 1) * down);
    let mut acc = [[_mm512_setzero_ps(); V]; ROWS];
    for j in 0..a.cols() {
        let (x, row) = (a.as_ptr().wrapping_add(j * across), s.b.as_ptr().wrapping_add(j * s.stride + c));
        let mut v = [_mm512_setzero_ps(); V];
        for (i, v) in v.iter_mut().enumerate() {
            // SAFETY: the mask keeps to columns below `n`.
            *v = unsafe { _mm512_maskz_loadu_ps(mask(i), row.wrapping_add(16 * i)) };
        }
        for r in 0..ROWS {
            // SAFETY: an element of `a`.
            let x = _mm512_set1_ps(unsafe { *x.wrapping_add(at[r]) });
            for i in 0..V {
                acc[r][i] = _mm512_fmadd_ps(x, v[i], acc[r][i]);
            }
        }
    }
    let scale = _mm512_set1_ps(s.scale);
    for (r, acc) in acc.iter().enumerate().take(rows) {
        let row = s.out.as_mut_ptr().wrapping_add(r * s.out_stride + c);
        for (i, acc) in acc.iter().enumerate() {
            let at = row.wrapping_add(16 * i);
            // SAFETY: as above, in rows below `rows`.
            unsafe {
                let y = match s.add {
                    true => _mm512_fmadd_ps(*acc, scale, _mm512_maskz_loadu_ps(mask(i), at)),
                    false => _mm512_mul_ps(*acc, scale),
                };
                _mm512_mask_storeu_ps(at, mask(i), y);
            }
        }
    }
}
