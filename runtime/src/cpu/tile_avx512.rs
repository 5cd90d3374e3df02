//! Four stored rows of floats at a time against four rows of `x`, in AVX-512 intrinsics.
#![allow(unsafe_code, reason = "AVX-512 intrinsics; an `Isa` of that level proves that the machine has them")]

use std::arch::x86_64::*;

use super::dot_avx512::first;
use super::simd::{Isa, Level};

/// Four rows of floats against one to four rows of `x`: product `(j, i)` becomes `outs[i][at + j]`.
///
/// # Panics
/// If `isa` is not AVX-512, the lengths differ or there are more than four outputs.
pub(crate) fn tile<'x>(
    isa: Isa,
    w: [&[f32]; 4],
    x: impl Fn(usize) -> &'x [f32],
    outs: &mut [&mut [f32]],
    at: usize,
) {
    let k = w[0].len();
    // Absent rows are computed as copies of the first.
    let rows: [&[f32]; 4] = std::array::from_fn(|i| x(if i < outs.len() { i } else { 0 }));
    assert!(isa.level() == Level::Avx512 && outs.len() <= 4);
    assert!(w.iter().chain(&rows).all(|r| r.len() == k));
    let (w, rows) = (w.map(|r| r.as_ptr()), rows.map(|r| r.as_ptr()));
    // SAFETY: the level proves the features; all rows have `k` elements.
    let sums = unsafe {
        match outs.len() {
            0 => return,
            1 | 2 => {
                let [a, b] = tile_of::<2>(w, [rows[0], rows[1]], k);
                [a, b, a, b]
            }
            _ => tile_of::<4>(w, rows, k),
        }
    };
    for (out, sums) in outs.iter_mut().zip(sums) {
        out[at..at + 4].copy_from_slice(&sums);
    }
}

/// # Safety
/// `k` elements at each of `w` and `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile_of<const M: usize>(w: [*const f32; 4], x: [*const f32; M], k: usize) -> [[f32; 4]; M] {
    let mut acc = [[_mm512_setzero_ps(); 4]; M];
    for i in (0..k / 16 * 16).step_by(16) {
        // SAFETY: `i + 16 <= k`.
        let w = w.map(|w| unsafe { _mm512_loadu_ps(w.add(i)) });
        for (acc, x) in acc.iter_mut().zip(x) {
            // SAFETY: as above.
            let x = unsafe { _mm512_loadu_ps(x.add(i)) };
            for j in 0..4 {
                acc[j] = _mm512_fmadd_ps(x, w[j], acc[j]);
            }
        }
    }
    if !k.is_multiple_of(16) {
        let (i, mask) = (k / 16 * 16, first(k % 16));
        // SAFETY: the mask keeps to elements below `k`.
        let w = w.map(|w| unsafe { _mm512_maskz_loadu_ps(mask, w.add(i)) });
        for (acc, x) in acc.iter_mut().zip(x) {
            // SAFETY: as above.
            let x = unsafe { _mm512_maskz_loadu_ps(mask, x.add(i)) };
            for j in 0..4 {
                acc[j] = _mm512_fmadd_ps(x, w[j], acc[j]);
            }
        }
    }
    acc.map(|a| {
        // Four sums of sixteen lanes at once: first within each 128 bits, then across them.
        let (ab_low, ab_high) = (_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
        let (cd_low, cd_high) = (_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
        let (ab, cd) = (_mm512_add_ps(ab_low, ab_high), _mm512_add_ps(cd_low, cd_high));
        let sum = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
        let half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps::<1>(sum));
        let quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
        let mut out = [0f32; 4];
        // SAFETY: four elements.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), quarter) };
        out
    })
}
