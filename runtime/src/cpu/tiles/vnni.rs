//! The sums in byte products of AVX-512 (VNNI).
#![allow(unsafe_code, reason = "AVX-512 intrinsics; a path of this kind proves that the machine has them")]

use std::arch::x86_64::*;

use super::digits::Digits;
use super::layout::{Tiles, every_line, unpack};
use super::{LINE, PIECE, Sums};

/// Adds the float sums of block `block` of the weight with the rows `first..first + y.len()` to `y`.
///
/// # Safety
/// The machine has AVX-512 F, BW, DQ, VL and VNNI.
pub(super) unsafe fn sums(x: &Digits, w: &Tiles, block: usize, first: usize, y: &mut [Sums]) {
    let mut first = first;
    let mut rest = y;
    while !rest.is_empty() {
        let now = match rest.len() {
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
        let (y, later) = rest.split_at_mut(now);
        // SAFETY: promised by the caller.
        unsafe {
            match (now, x.count) {
                (1, 1) => by_width::<1, 1, 4>(x, w, block, first, y),
                (1, _) => by_width::<1, 3, 2>(x, w, block, first, y),
                (2, 1) => by_width::<2, 1, 2>(x, w, block, first, y),
                (2, _) => by_width::<2, 3, 1>(x, w, block, first, y),
                (_, 1) => by_width::<4, 1, 2>(x, w, block, first, y),
                _ => by_width::<4, 3, 1>(x, w, block, first, y),
            }
        }
        (first, rest) = (first + now, later);
    }
}

/// # Safety
/// As [`sums`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn by_width<const M: usize, const COUNT: usize, const U: usize>(
    x: &Digits,
    w: &Tiles,
    block: usize,
    first: usize,
    y: &mut [Sums],
) {
    // SAFETY: as promised by the caller.
    unsafe {
        match w.form.bits {
            3 => rows::<M, COUNT, U, 3>(x, w, block, first, y),
            4 => rows::<M, COUNT, U, 4>(x, w, block, first, y),
            8 => rows::<M, COUNT, U, 8>(x, w, block, first, y),
            _ => rows::<M, COUNT, U, 0>(x, w, block, first, y),
        }
    }
}

/// # Safety
/// As [`sums`]; `y` has `M` rows, and the digits are `COUNT`. Codes of `BITS` bits are unpacked in registers, if that is
/// not 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows<const M: usize, const COUNT: usize, const U: usize, const BITS: u8>(
    x: &Digits,
    w: &Tiles,
    block: usize,
    first: usize,
    y: &mut [Sums],
) {
    let left: [[*const i8; COUNT]; M] =
        std::array::from_fn(|r| std::array::from_fn(|d| x.plane(first + r, d).as_ptr()));
    let sums: [[&[i32]; COUNT]; M] = std::array::from_fn(|r| std::array::from_fn(|d| x.sums(first + r, d)));
    let steps: [&[f32]; M] = std::array::from_fn(|r| x.steps(first + r));
    let mut out = [_mm512_setzero_ps(); M];
    let pieces = w.form.group.div_ceil(PIECE);
    let per_block = x.block.div_ceil(PIECE);
    let mut stored = w.block_codes(block);
    let mut n = 0;
    for g in 0..w.groups() {
        // SAFETY: sixteen scales.
        let scales = unsafe { _mm512_loadu_ps(w.scales(block, g).as_ptr()) };
        let zeros = match w.form.zero {
            Some(z) => _mm512_set1_epi32(i32::from(z)),
            // SAFETY: sixteen zero points.
            None => _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(w.zeros(block, g).as_ptr().cast()) }),
        };
        for b in 0..x.blocks_of_group() {
            let mut acc = [[[_mm512_setzero_si512(); U]; COUNT]; M];
            for i in b * per_block..pieces.min((b + 1) * per_block) {
                let (now, lines, later) = w.next_piece(stored, i);
                stored = later;
                let at = g * x.padded_group() + i * PIECE;
                assert!(at + 4 * lines <= x.stride);
                // SAFETY: inside of each plane, by the check above.
                let left = left.map(|planes| planes.map(|p| unsafe { p.add(at) }));
                if BITS > 0 && lines == PIECE / 4 {
                    let p = now.as_ptr();
                    // SAFETY: a full piece of this width is stored, and the left side has 64 digits from here on.
                    every_line!(l => unsafe { add_line(&mut acc, l, line::<BITS>(p, l), left) });
                } else {
                    let mut codes = [0; PIECE / 4 * LINE];
                    unpack(now, lines, w.form.bits, &mut codes);
                    for l in 0..lines {
                        // SAFETY: the buffer holds this line, and the left side has four digits for each line.
                        unsafe { add_line(&mut acc, l, load(codes.as_ptr().add(l * LINE)), left) };
                    }
                }
            }
            for (r, (out, acc)) in out.iter_mut().zip(&acc).enumerate() {
                let part = |d: usize| {
                    let sum = acc[d].iter().fold(_mm512_setzero_si512(), |s, a| _mm512_add_epi32(s, *a));
                    let all = sums[r][d][n];
                    let taken = match w.form.zero {
                        Some(z) => _mm512_set1_epi32(all.wrapping_mul(i32::from(z))),
                        None => _mm512_mullo_epi32(zeros, _mm512_set1_epi32(all)),
                    };
                    _mm512_sub_epi32(sum, taken)
                };
                let step = x.stepped.then(|| steps[r][n]);
                let mut parts = [_mm512_setzero_si512(); COUNT];
                for (d, p) in parts.iter_mut().enumerate() {
                    *p = part(d);
                }
                let whole = whole(parts, step);
                *out = _mm512_add_ps(*out, _mm512_mul_ps(scales, whole));
            }
            n += 1;
        }
    }
    for (y, out) in y.iter_mut().zip(out) {
        // SAFETY: sixteen floats.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), _mm512_add_ps(_mm512_loadu_ps(y.as_ptr()), out)) };
    }
}

/// The sum of a block from the sums of its digits, see [`fold`](super::plain::fold), times its step if it has one.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn whole<const COUNT: usize>(parts: [__m512i; COUNT], step: Option<f32>) -> __m512 {
    let low = _mm512_cvtepi32_ps(parts[0]);
    let whole = if COUNT == 1 {
        low
    } else {
        let high = _mm512_add_epi32(_mm512_slli_epi32::<8>(parts[COUNT - 1]), parts[COUNT / 2]);
        // The product is exact, so this rounds as a product and a sum do.
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0), low)
    };
    step.map_or(whole, |step| _mm512_mul_ps(whole, _mm512_set1_ps(step)))
}

/// Adds the products of a line of codes with four digits of each row.
///
/// # Safety
/// AVX-512 F and VNNI; four digits at `4 l` of each of `left`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn add_line<const M: usize, const COUNT: usize, const U: usize>(
    acc: &mut [[[__m512i; U]; COUNT]; M],
    l: usize,
    codes: __m512i,
    left: [[*const i8; COUNT]; M],
) {
    for (acc, left) in acc.iter_mut().zip(left) {
        for (acc, p) in acc.iter_mut().zip(left) {
            // SAFETY: promised by the caller.
            let four = unsafe { p.add(4 * l).cast::<i32>().read_unaligned() };
            acc[l % U] = _mm512_dpbusd_epi32(acc[l % U], codes, _mm512_set1_epi32(four));
        }
    }
}

/// # Safety
/// 64 bytes at `p`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(p: *const u8) -> __m512i {
    // SAFETY: promised by the caller.
    unsafe { _mm512_loadu_si512(p.cast()) }
}

/// Line `l` of a full piece of codes of 3, 4 or 8 bits. With a constant `l` it is one or two shifts and masks.
///
/// # Safety
/// A full piece of codes of `BITS` bits at `p`.
#[inline(always)]
pub(super) unsafe fn line<const BITS: u8>(p: *const u8, l: usize) -> __m512i {
    // SAFETY: promised by the caller: a plane of `w` bits holds `2 w` lines.
    unsafe {
        match BITS {
            8 => load(p.add(l * LINE)),
            4 => bits(load(p.add(l % 8 * LINE)), 4 * (l / 8), 0x0f),
            _ => {
                let low = bits(load(p.add(l % 4 * LINE)), 2 * (l / 4), 3);
                let top = bits(load(p.add((4 + l % 2) * LINE)), l / 2, 1);
                _mm512_or_si512(low, _mm512_slli_epi16::<2>(top))
            }
        }
    }
}

/// The bits of `mask` of each byte, from bit `down` on. Bits that come over from the neighbour byte are masked away.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn bits(bytes: __m512i, down: usize, mask: i8) -> __m512i {
    let moved = if down == 0 { bytes } else { _mm512_srl_epi16(bytes, _mm_cvtsi64_si128(down as i64)) };
    _mm512_and_si512(moved, _mm512_set1_epi8(mask))
}
