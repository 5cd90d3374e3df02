//! The fused row products of [`super::dot`] in AVX-512 intrinsics.
#![allow(unsafe_code, reason = "AVX-512 intrinsics; an `Isa` of that level proves that the machine has them")]

use std::arch::x86_64::*;

use super::simd::{Isa, Level};
use super::weight::{PackedRow, Row};

/// Calls `put` with the products of each stored row; see [`super::dot::dot_rows`].
///
/// # Panics
/// If `isa` is not AVX-512 or the lengths differ.
pub(crate) fn dots<'w, const M: usize>(
    isa: Isa,
    count: usize,
    row: impl Fn(usize) -> Row<'w>,
    x: [&[f32]; M],
    put: impl FnMut(usize, [f32; M]),
) {
    assert!(isa.level() == Level::Avx512);
    let k = x[0].len();
    assert!(x.iter().all(|x| x.len() == k));
    // SAFETY: the level proves the features; all of `x` have `k` elements.
    unsafe { each(count, row, x.map(|x| x.as_ptr()), k, put) }
}

/// # Safety
/// `k` elements at each of `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
unsafe fn each<'w, const M: usize>(
    count: usize,
    row: impl Fn(usize) -> Row<'w>,
    x: [*const f32; M],
    k: usize,
    mut put: impl FnMut(usize, [f32; M]),
) {
    for j in 0..count {
        let row = row(j);
        match row {
            Row::F32(w) => assert!(w.len() == k),
            Row::F16(w) | Row::BF16(w) => assert!(w.len() == 2 * k),
            Row::Packed(p) => {
                assert!(
                    p.codes.len() == (usize::from(p.bits) * k).div_ceil(8) && p.scales.len() * p.group == k
                );
                assert!(p.zeros.is_none_or(|z| z.len() == p.scales.len()));
                assert!(p.bits <= 8 && (p.group == k || p.group.is_multiple_of(16)));
            }
        }
        // SAFETY: the lengths were checked above.
        let y = unsafe {
            match row {
                Row::F32(w) => floats::<M, Single>(w.as_ptr(), x, k),
                Row::F16(w) => floats::<M, Half>(w.as_ptr().cast(), x, k),
                Row::BF16(w) => floats::<M, Brain>(w.as_ptr().cast(), x, k),
                Row::Packed(p) if p.bits == 8 => packed8::<M>(p, x),
                Row::Packed(p) if super::dot::by_pairs(&p, k) => packed4::<M>(p, x, k),
                Row::Packed(p) => packed_any::<M>(p, x),
            }
        };
        put(j, y);
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

/// Asks for the cache line that will be read a little later. The hardware looks ahead as well, but not as far.
#[inline(always)]
fn ahead(p: *const u8) {
    // SAFETY: SSE is part of the architecture; a prefetch reads nothing, at whatever address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(DISTANCE).cast()) }
}

/// How far [`ahead`] looks, in bytes.
const DISTANCE: usize = 2048;

/// The first `n` of sixteen lanes.
pub(super) fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

/// # Safety
/// `k` elements at `w` and at each of `x`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
unsafe fn floats<const M: usize, F: Float>(w: *const F::Stored, x: [*const f32; M], k: usize) -> [f32; M] {
    const U: usize = 4;
    let mut acc = [[_mm512_setzero_ps(); U]; M];
    let mut i = 0;
    while i + 16 * U <= k {
        for line in 0..size_of::<F::Stored>() {
            ahead(w.wrapping_add(i).cast::<u8>().wrapping_add(64 * line));
        }
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
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn packed8<const M: usize>(p: PackedRow<'_>, x: [*const f32; M]) -> [f32; M] {
    const U: usize = 4;
    let mut acc = [[_mm512_setzero_ps(); U]; M];
    for (g, codes) in p.codes.chunks_exact(p.group).enumerate() {
        let (scale, zero) = p.params(g);
        let (scale, zero) = (_mm512_set1_ps(scale), _mm512_set1_ps(zero));
        let value = |bytes: __m128i| {
            let code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
            _mm512_mul_ps(scale, _mm512_sub_ps(code, zero))
        };
        let (base, n) = (g * p.group, codes.len());
        let mut i = 0;
        while i + 16 * U <= n {
            ahead(codes.as_ptr().wrapping_add(i));
            for u in 0..U {
                let at = i + 16 * u;
                // SAFETY: `at + 16 <= n`, in the group's codes and in its part of `x`.
                let w = value(unsafe { _mm_loadu_si128(codes.as_ptr().add(at).cast()) });
                for (acc, x) in acc.iter_mut().zip(x) {
                    // SAFETY: as above.
                    acc[u] = _mm512_fmadd_ps(unsafe { _mm512_loadu_ps(x.add(base + at)) }, w, acc[u]);
                }
            }
            i += 16 * U;
        }
        while i < n {
            let mask = first((n - i).min(16));
            // SAFETY: the mask keeps to elements of this group; lanes outside it multiply by 0.
            let w = value(unsafe { _mm_maskz_loadu_epi8(mask, codes.as_ptr().add(i).cast()) });
            for (acc, x) in acc.iter_mut().zip(x) {
                // SAFETY: as above.
                acc[0] = _mm512_fmadd_ps(unsafe { _mm512_maskz_loadu_ps(mask, x.add(base + i)) }, w, acc[0]);
            }
            i += 16;
        }
    }
    acc.map(|a| _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a[0], a[1]), _mm512_add_ps(a[2], a[3]))))
}

/// Codes of any width up to 8 bits.
///
/// # Safety
/// Rows of `p.scales.len() * p.group` elements at each of `x`, and their codes in `p.codes`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn packed_any<const M: usize>(p: PackedRow<'_>, x: [*const f32; M]) -> [f32; M] {
    let bits = usize::from(p.bits);
    // Sixteen codes lie in `2 * bits` bytes. Each lane takes the two bytes that its code touches and shifts it down.
    let (mut touched, mut shift) = ([0x80u8; 64], [0u32; 16]);
    for lane in 0..16 {
        touched[4 * lane] = (lane * bits / 8) as u8;
        touched[4 * lane + 1] = (lane * bits / 8 + 1) as u8;
        shift[lane] = (lane * bits % 8) as u32;
    }
    // SAFETY: both arrays hold 64 bytes.
    let (touched, shift) =
        unsafe { (_mm512_loadu_si512(touched.as_ptr().cast()), _mm512_loadu_si512(shift.as_ptr().cast())) };
    let keep = _mm512_set1_epi32((1 << bits) - 1);
    let mut acc = [_mm512_setzero_ps(); M];
    for (g, &scale) in p.scales.iter().enumerate() {
        let (_, zero) = p.params(g);
        let (scale, zero) = (_mm512_set1_ps(scale), _mm512_set1_ps(zero));
        for i in (0..p.group).step_by(16) {
            let from = (g * p.group + i) * bits / 8;
            ahead(p.codes.as_ptr().wrapping_add(from));
            let here = first((p.codes.len() - from).min(16));
            // SAFETY: the mask keeps to the row's bytes.
            let bytes = unsafe { _mm_maskz_loadu_epi8(here, p.codes.as_ptr().add(from).cast()) };
            let pairs = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), touched);
            let codes = _mm512_and_si512(_mm512_srlv_epi32(pairs, shift), keep);
            let w = _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_cvtepi32_ps(codes), zero));
            let mask = first((p.group - i).min(16));
            for (acc, x) in acc.iter_mut().zip(x) {
                // SAFETY: the mask keeps to the group; lanes outside it multiply by 0.
                let x = unsafe { _mm512_maskz_loadu_ps(mask, x.add(g * p.group + i)) };
                *acc = _mm512_fmadd_ps(x, w, *acc);
            }
        }
    }
    acc.map(|a| _mm512_reduce_add_ps(a))
}

/// `code - zero` for each code and zero point of four bits.
static DIFFERENCES: [[f32; 16]; 16] = {
    let mut table = [[0f32; 16]; 16];
    let (mut zero, mut code) = (0, 0);
    while zero < 16 {
        while code < 16 {
            table[zero][code] = code as f32 - zero as f32;
            code += 1;
        }
        (zero, code) = (zero + 1, 0);
    }
    table
};

/// # Safety
/// `k` elements at each of `x`, in [`super::dot::Layout::SplitPairs`]; groups as `each` checks them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn packed4<const M: usize>(p: PackedRow<'_>, x: [*const f32; M], k: usize) -> [f32; M] {
    // SAFETY: promised by the caller.
    let mut sum = unsafe {
        match p.group {
            32 => groups4::<M, 1>(p, x, 1),
            64 => groups4::<M, 2>(p, x, 2),
            128 => groups4::<M, 4>(p, x, 4),
            n => groups4::<M, 0>(p, x, n / 32),
        }
    };
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

/// The full runs of 32 codes of each group, of which there are `FIXED` or, if that is 0, `blocks`.
///
/// # Safety
/// As [`packed4`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn groups4<const M: usize, const FIXED: usize>(
    p: PackedRow<'_>,
    mut x: [*const f32; M],
    blocks: usize,
) -> [f32; M] {
    let mut acc = [[_mm512_setzero_ps(); 4]; M];
    let blocks = if FIXED == 0 { blocks } else { FIXED };
    let mut codes = p.codes.as_ptr();
    for (g, &scale) in p.scales.iter().enumerate() {
        let zero = p.zeros.map_or(p.zero as u8, |z| z[g]);
        // All sixteen values of the group: a code is then looked up, and its value exact.
        let differences = match DIFFERENCES.get(usize::from(zero)) {
            // SAFETY: a row of the table has sixteen elements.
            Some(row) => unsafe { _mm512_loadu_ps(row.as_ptr()) },
            None => {
                // SAFETY: as above.
                let codes = unsafe { _mm512_loadu_ps(DIFFERENCES[0].as_ptr()) };
                _mm512_sub_ps(codes, _mm512_set1_ps(f32::from(zero)))
            }
        };
        let table = _mm512_mul_ps(_mm512_set1_ps(scale), differences);
        ahead(codes.cast());
        for b in 0..blocks {
            let u = b % 2 * 2;
            // SAFETY: each group has `blocks` full runs of 16 bytes, and `x` 32 elements for each.
            let bytes = unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(16 * b).cast())) };
            let low = _mm512_permutexvar_ps(bytes, table);
            let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table);
            for (acc, x) in acc.iter_mut().zip(x) {
                // SAFETY: as above.
                let (even, odd) =
                    unsafe { (_mm512_loadu_ps(x.add(32 * b)), _mm512_loadu_ps(x.add(32 * b + 16))) };
                acc[u] = _mm512_fmadd_ps(even, low, acc[u]);
                acc[u + 1] = _mm512_fmadd_ps(odd, high, acc[u + 1]);
            }
        }
        codes = codes.wrapping_add(p.group / 2);
        x = x.map(|x| x.wrapping_add(p.group));
    }
    acc.map(|a| _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a[0], a[1]), _mm512_add_ps(a[2], a[3]))))
}
