//! Eight rows of a small product at a time, in AVX-512 intrinsics.
#![allow(unsafe_code, reason = "AVX-512 intrinsics; an `Isa` of that level proves that the machine has them")]

use std::arch::x86_64::*;

use super::dot_avx512::first;
use super::simd::{Isa, Level};
use super::small::{ROWS, Sides};

/// As [`super::small::product`].
///
/// # Panics
/// If `isa` is not AVX-512 or the lengths do not fit.
pub(super) fn product(isa: Isa, a: &[[f32; ROWS]], rows: usize, s: &mut Sides<'_>) {
    assert!(isa.level() == Level::Avx512 && rows <= ROWS);
    assert!(s.n == 0 || a.is_empty() || s.b.len() >= (a.len() - 1) * s.stride + s.n);
    assert!(s.n == 0 || rows == 0 || s.out.len() >= (rows - 1) * s.out_stride + s.n);
    for c in (0..s.n).step_by(32) {
        // SAFETY: the level proves the features; columns `c..n` of `b` and `out` are inside, and masks keep to them.
        unsafe {
            match s.n - c {
                rest @ 17.. => tile::<2>(a, rows, s, c, first((rest - 16).min(16))),
                rest => tile::<1>(a, rows, s, c, first(rest)),
            }
        }
    }
}

/// Columns from `c` on: `V` vectors, of which `last` are in the last.
///
/// # Safety
/// These columns of the first `a.len()` rows of `s.b`, and of `rows` rows of `s.out`, are valid.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile<const V: usize>(a: &[[f32; ROWS]], rows: usize, s: &mut Sides<'_>, c: usize, last: __mmask16) {
    let mask = |i: usize| if i + 1 == V { last } else { !0 };
    let mut acc = [[_mm512_setzero_ps(); V]; ROWS];
    for (j, x) in a.iter().enumerate() {
        let row = s.b.as_ptr().wrapping_add(j * s.stride + c);
        let mut v = [_mm512_setzero_ps(); V];
        for (i, v) in v.iter_mut().enumerate() {
            // SAFETY: the mask keeps to columns below `n`.
            *v = unsafe { _mm512_maskz_loadu_ps(mask(i), row.wrapping_add(16 * i)) };
        }
        for r in 0..ROWS {
            let x = _mm512_set1_ps(x[r]);
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
