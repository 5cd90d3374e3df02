//! The products of an attention in AVX-512 intrinsics. The sums have the order of the loops in [`super::run`].
#![allow(unsafe_code, reason = "AVX-512 intrinsics; an `Isa` of that level proves that the machine has them")]

use std::arch::x86_64::*;

use super::super::gemm::MatRef;
use super::super::simd::{Isa, Level};

/// Columns that are in registers at a time.
const WIDE: usize = 64;

/// As [`super::run::add_rows`].
///
/// # Panics
/// If `isa` is not AVX-512, there are no or more than four rows, or a length does not fit.
pub(super) fn add_rows(isa: Isa, a: &[&[f32]], b: MatRef<'_>, outs: &mut [&mut [f32]], keep: bool) {
    let (depth, n) = (b.rows(), b.cols());
    assert!(isa.level() == Level::Avx512 && a.len() == outs.len() && b.strides().1 == 1);
    assert!(a.iter().all(|a| a.len() >= depth) && outs.iter().all(|o| o.len() >= n));
    let (at, stride) = (b.as_ptr(), b.strides().0);
    // SAFETY: the level proves the features; the lengths were checked above, and `MatRef` keeps to its slice.
    unsafe {
        match (a, outs) {
            ([a], [o]) => tiles([a.as_ptr()], (at, stride, depth, n), [o.as_mut_ptr()], keep),
            ([a, b], [o, p]) => {
                tiles(
                    [a, b].map(|x| x.as_ptr()),
                    (at, stride, depth, n),
                    [o, p].map(|x| x.as_mut_ptr()),
                    keep,
                );
            }
            ([a, b, c], [o, p, q]) => {
                let outs = [o, p, q].map(|x| x.as_mut_ptr());
                tiles([a, b, c].map(|x| x.as_ptr()), (at, stride, depth, n), outs, keep);
            }
            ([a, b, c, d], [o, p, q, r]) => {
                let outs = [o, p, q, r].map(|x| x.as_mut_ptr());
                tiles([a, b, c, d].map(|x| x.as_ptr()), (at, stride, depth, n), outs, keep);
            }
            _ => unreachable!("one to four rows"),
        }
    }
}

/// # Safety
/// `depth` elements at each of `a`; `depth` rows of `n` elements at `b`, `stride` apart; `n` elements at each of `outs`, which
/// are not read unless `keep`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tiles<const M: usize>(
    a: [*const f32; M],
    (b, stride, depth, n): (*const f32, usize, usize, usize),
    outs: [*mut f32; M],
    keep: bool,
) {
    let mut at = 0;
    // SAFETY: the columns `at..at + WIDE`, and then the rest by masks, are below `n`.
    unsafe {
        while n - at >= WIDE {
            tile::<M, 4>(a, (b.add(at), stride, depth), outs.map(|o| o.add(at)), !0, keep);
            at += WIDE;
        }
        while at < n {
            let mask = if n - at >= 16 { !0 } else { (1 << (n - at)) - 1 };
            tile::<M, 1>(a, (b.add(at), stride, depth), outs.map(|o| o.add(at)), mask, keep);
            at += 16;
        }
    }
}

/// # Safety
/// As [`tiles`], for `N` times sixteen columns, of which `mask` leaves some out.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile<const M: usize, const N: usize>(
    a: [*const f32; M],
    (b, stride, depth): (*const f32, usize, usize),
    outs: [*mut f32; M],
    mask: __mmask16,
    keep: bool,
) {
    let mut acc = [[_mm512_setzero_ps(); N]; M];
    // SAFETY: promised by the caller; masks keep to the columns that are there.
    unsafe {
        if keep {
            for (acc, out) in acc.iter_mut().zip(outs) {
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm512_maskz_loadu_ps(mask, out.add(16 * j));
                }
            }
        }
        for k in 0..depth {
            let row = b.add(k * stride);
            let b: [__m512; N] = std::array::from_fn(|j| _mm512_maskz_loadu_ps(mask, row.add(16 * j)));
            for (acc, a) in acc.iter_mut().zip(a) {
                let a = _mm512_set1_ps(*a.add(k));
                for (acc, b) in acc.iter_mut().zip(b) {
                    *acc = _mm512_fmadd_ps(a, b, *acc);
                }
            }
        }
        for (acc, out) in acc.iter().zip(outs) {
            for (j, acc) in acc.iter().enumerate() {
                _mm512_mask_storeu_ps(out.add(16 * j), mask, *acc);
            }
        }
    }
}

/// Writes `x[rows, cols]` transposed: element `(i, j)` to `out[j * stride + i]`.
///
/// # Panics
/// If `isa` is not AVX-512 or a length does not fit.
pub(super) fn turn(isa: Isa, x: MatRef<'_>, out: &mut [f32], stride: usize) {
    let (rows, cols) = (x.rows(), x.cols());
    assert!(isa.level() == Level::Avx512 && x.strides().1 == 1 && rows <= stride);
    assert!(rows == 0 || cols == 0 || out.len() >= (cols - 1) * stride + rows);
    for i in (0..rows).step_by(16) {
        for j in (0..cols).step_by(16) {
            let (height, width) = (16.min(rows - i), 16.min(cols - j));
            // SAFETY: the level proves the features; the part lies inside `x`, and its image inside `out`.
            unsafe {
                let from = x.as_ptr().add(i * x.strides().0 + j);
                turn_16(from, x.strides().0, (height, width), out.as_mut_ptr().add(j * stride + i), stride);
            }
        }
    }
}

/// # Safety
/// `rows` times `cols` elements, at most sixteen each, at `x` and transposed at `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn turn_16(
    x: *const f32,
    x_stride: usize,
    (rows, cols): (usize, usize),
    out: *mut f32,
    stride: usize,
) {
    let mask = |n: usize| -> __mmask16 { if n == 16 { !0 } else { (1 << n) - 1 } };
    let mut r = [_mm512_setzero_ps(); 16];
    for (i, r) in r.iter_mut().enumerate().take(rows) {
        // SAFETY: promised by the caller; the mask keeps to `cols`.
        *r = unsafe { _mm512_maskz_loadu_ps(mask(cols), x.add(i * x_stride)) };
    }
    // Pairs of rows, then fours, within each 128 bits; then the 128 bits of rows four apart.
    let mut fours = [_mm512_setzero_ps(); 16];
    for i in (0..16).step_by(4) {
        let (ab, ab_high) = (_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i], r[i + 1]));
        let (cd, cd_high) = (_mm512_unpacklo_ps(r[i + 2], r[i + 3]), _mm512_unpackhi_ps(r[i + 2], r[i + 3]));
        fours[i] = _mm512_shuffle_ps::<0x44>(ab, cd);
        fours[i + 1] = _mm512_shuffle_ps::<0xee>(ab, cd);
        fours[i + 2] = _mm512_shuffle_ps::<0x44>(ab_high, cd_high);
        fours[i + 3] = _mm512_shuffle_ps::<0xee>(ab_high, cd_high);
    }
    for c in 0..4 {
        let (a, b, d, e) = (fours[c], fours[c + 4], fours[c + 8], fours[c + 12]);
        let (even_low, odd_low) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let (even_high, odd_high) = (_mm512_shuffle_f32x4::<0x88>(d, e), _mm512_shuffle_f32x4::<0xdd>(d, e));
        let turned = [
            (c, _mm512_shuffle_f32x4::<0x88>(even_low, even_high)),
            (c + 4, _mm512_shuffle_f32x4::<0x88>(odd_low, odd_high)),
            (c + 8, _mm512_shuffle_f32x4::<0xdd>(even_low, even_high)),
            (c + 12, _mm512_shuffle_f32x4::<0xdd>(odd_low, odd_high)),
        ];
        for (j, row) in turned {
            if j < cols {
                // SAFETY: promised by the caller; the mask keeps to `rows`.
                unsafe { _mm512_mask_storeu_ps(out.add(j * stride), mask(rows), row) };
            }
        }
    }
}
