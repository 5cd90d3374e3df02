//! The fused row products of [`super::dot`] in AVX-512 intrinsics.
#![allow(unsafe_code, reason = "AVX-512 intrinsics; an `Isa` of that level proves that the machine has them")]

use std::arch::x86_64::*;

use super::simd::{Isa, Level};
use super::weight::{PackedRow, Row};

/// See [`super::dot::dot`].
///
/// # Panics
/// If `isa` is not AVX-512 or the lengths differ.
#[inline]
pub(crate) fn dot<const M: usize>(isa: Isa, row: Row<'_>, x: [&[f32]; M]) -> [f32; M] {
    assert!(isa.level() == Level::Avx512);
    let k = x[0].len();
    assert!(x.iter().all(|x| x.len() == k));
    match row {
        Row::F32(w) => assert!(w.len() == k),
        Row::F16(w) | Row::BF16(w) => assert!(w.len() == 2 * k),
        Row::Packed(p) => {
            assert!(p.codes.len() == (usize::from(p.bits) * k).div_ceil(8) && p.group > 0);
            assert!(k.is_multiple_of(p.group) && p.scales.len() == k / p.group);
            assert!(p.zeros.is_none_or(|z| z.len() == p.scales.len()));
            assert!(p.bits == 8 || p.bits == 4 && (p.group == k || p.group.is_multiple_of(32)));
        }
    }
    let x = x.map(|x| x.as_ptr());
    // SAFETY: the level proves the features; the lengths were checked above.
    unsafe {
        match row {
            Row::F32(w) => floats::<M, Single>(w.as_ptr(), x, k),
            Row::F16(w) => floats::<M, Half>(w.as_ptr().cast(), x, k),
            Row::BF16(w) => floats::<M, Brain>(w.as_ptr().cast(), x, k),
            Row::Packed(p) if p.bits == 8 => packed8::<M>(p, x),
            Row::Packed(p) => packed4::<M>(p, x, k),
        }
    }
}

/// A stored float type. The pointers need not be aligned.
trait Float {
    type Stored: Copy;
    /// # Safety
    /// AVX-512 F, BW and VL; 16 elements at `p`.
    unsafe fn load(p: *const Self::Stored) -> __m512;
    /// # Safety
    /// AVX-512 F, BW and VL; the elements of `mask` at `p`.
    unsafe fn load_some(mask: __mmask16, p: *const Self::Stored) -> __m512;
}

struct Single;
struct Half;
struct Brain;

impl Float for Single {
    type Stored = f32;
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_some(mask: __mmask16, p: *const f32) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { _mm512_maskz_loadu_ps(mask, p) }
    }
}

impl Float for Half {
    type Stored = i16;
    #[inline(always)]
    unsafe fn load(p: *const i16) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_some(mask: __mmask16, p: *const i16) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)) }
    }
}

/// Sixteen bfloat16 widened.
#[inline(always)]
unsafe fn widen(h: __m256i) -> __m512 {
    // SAFETY: AVX-512 F is promised by the callers.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(h))) }
}

impl Float for Brain {
    type Stored = i16;
    #[inline(always)]
    unsafe fn load(p: *const i16) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { widen(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_some(mask: __mmask16, p: *const i16) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { widen(_mm256_maskz_loadu_epi16(mask, p)) }
    }
}

/// The first `n` of sixteen lanes.
fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

/// # Safety
/// `k` elements at `w` and at each of `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
unsafe fn floats<const M: usize, F: Float>(w: *const F::Stored, x: [*const f32; M], k: usize) -> [f32; M] {
    const U: usize = 4;
    let mut acc = [[_mm512_setzero_ps(); U]; M];
    let mut i = 0;
    while i + 16 * U <= k {
        for u in 0..U {
            let at = i + 16 * u;
            // SAFETY: `at + 16 <= k`.
            let w = unsafe { F::load(w.add(at)) };
            for (acc, x) in acc.iter_mut().zip(x) {
                // SAFETY: `at + 16 <= k`.
                acc[u] = _mm512_fmadd_ps(unsafe { _mm512_loadu_ps(x.add(at)) }, w, acc[u]);
            }
        }
        i += 16 * U;
    }
    let mut u = 0;
    while i < k {
        let mask = first((k - i).min(16));
        // SAFETY: the mask keeps to elements below `k`.
        let w = unsafe { F::load_some(mask, w.add(i)) };
        for (acc, x) in acc.iter_mut().zip(x) {
            // SAFETY: as above.
            acc[u] = _mm512_fmadd_ps(unsafe { _mm512_maskz_loadu_ps(mask, x.add(i)) }, w, acc[u]);
        }
        (i, u) = (i + 16, u + 1);
    }
    acc.map(|a| _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a[0], a[1]), _mm512_add_ps(a[2], a[3]))))
}

/// # Safety
/// Rows of `p.codes.len()` elements at each of `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn packed8<const M: usize>(p: PackedRow<'_>, x: [*const f32; M]) -> [f32; M] {
    let mut acc = [[_mm512_setzero_ps(); 2]; M];
    for (g, codes) in p.codes.chunks_exact(p.group).enumerate() {
        let (scale, zero) = p.params(g);
        let (scale, zero) = (_mm512_set1_ps(scale), _mm512_set1_ps(zero));
        let base = g * p.group;
        let mut i = 0;
        while i < codes.len() {
            for u in 0..2 {
                let at = i + 16 * u;
                if at >= codes.len() {
                    break;
                }
                let mask = first((codes.len() - at).min(16));
                // SAFETY: the mask keeps to elements of this group, in `codes` and in `x`.
                let bytes = unsafe { _mm_maskz_loadu_epi8(mask, codes.as_ptr().add(at).cast()) };
                let w = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
                let w = _mm512_mul_ps(scale, _mm512_sub_ps(w, zero));
                for (acc, x) in acc.iter_mut().zip(x) {
                    // SAFETY: as above; lanes outside the mask multiply by 0.
                    let x = unsafe { _mm512_maskz_loadu_ps(mask, x.add(base + at)) };
                    acc[u] = _mm512_fmadd_ps(x, w, acc[u]);
                }
            }
            i += 32;
        }
    }
    acc.map(|a| _mm512_reduce_add_ps(_mm512_add_ps(a[0], a[1])))
}

/// # Safety
/// `k` elements at each of `x`, in [`super::dot::Layout::SplitPairs`]; groups as `dot` checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn packed4<const M: usize>(p: PackedRow<'_>, x: [*const f32; M], k: usize) -> [f32; M] {
    let mut acc = [[_mm512_setzero_ps(); 2]; M];
    let ramp = _mm512_cvtepi32_ps(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    let blocks = p.group / 32;
    let mut codes = p.codes.as_ptr();
    for g in 0..p.scales.len() {
        let (scale, zero) = p.params(g);
        // All sixteen values of the group: a code is then looked up, and its value exact.
        let table = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_sub_ps(ramp, _mm512_set1_ps(zero)));
        let base = g * p.group;
        for b in 0..blocks {
            let at = base + 32 * b;
            // SAFETY: group `g` has `blocks` full runs of 16 bytes; `x` has the 32 elements at `at`.
            let bytes = unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(16 * b).cast())) };
            let low = _mm512_permutexvar_ps(bytes, table);
            let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table);
            for (acc, x) in acc.iter_mut().zip(x) {
                // SAFETY: as above.
                let (even, odd) = unsafe { (_mm512_loadu_ps(x.add(at)), _mm512_loadu_ps(x.add(at + 16))) };
                acc[0] = _mm512_fmadd_ps(even, low, acc[0]);
                acc[1] = _mm512_fmadd_ps(odd, high, acc[1]);
            }
        }
        codes = codes.wrapping_add(p.group / 2);
    }
    let mut sum = acc.map(|a| _mm512_reduce_add_ps(_mm512_add_ps(a[0], a[1])));
    // Only a row of one group can have a rest.
    for i in p.group / 32 * 32..if p.group == k { k } else { 0 } {
        let (scale, zero) = p.params(0);
        let w = scale * (f32::from(p.codes[i / 2] >> (4 * (i % 2)) & 15) - zero);
        for (sum, x) in sum.iter_mut().zip(x) {
            // SAFETY: `i < k`.
            *sum = unsafe { *x.add(i) }.mul_add(w, *sum);
        }
    }
    sum
}
