//! The sums in byte products of AVX2.
#![allow(unsafe_code, reason = "AVX2 intrinsics; a path of this kind proves that the machine has them")]

use std::arch::x86_64::*;

use super::digits::Digits;
use super::layout::{Tiles, every_line, unpack};
use super::plain::fold;
use super::{LANES, LINE, PIECE, Sums};

/// Half of a line: the codes of eight rows.
const HALF: usize = LINE / 2;

/// Adds the float sums of block `block` of the weight with the rows `first..first + y.len()` to `y`.
///
/// # Safety
/// The machine has AVX2.
pub(super) unsafe fn sums(x: &Digits, w: &Tiles, block: usize, first: usize, y: &mut [Sums]) {
    let mut first = first;
    for y in y.chunks_mut(2) {
        // SAFETY: promised by the caller.
        unsafe {
            match (y.len(), x.count) {
                (1, 1) => rows::<1, 1>(x, w, block, first, y),
                (1, _) => rows::<1, 3>(x, w, block, first, y),
                (_, 1) => rows::<2, 1>(x, w, block, first, y),
                _ => rows::<2, 3>(x, w, block, first, y),
            }
        }
        first += y.len();
    }
}

/// # Safety
/// As [`sums`]; `y` has `M` rows, and the digits are `COUNT`.
#[target_feature(enable = "avx2")]
unsafe fn rows<const M: usize, const COUNT: usize>(
    x: &Digits,
    w: &Tiles,
    block: usize,
    first: usize,
    y: &mut [Sums],
) {
    let pieces = w.form.group.div_ceil(PIECE);
    let per_block = x.block.div_ceil(PIECE);
    let mut rest = w.block_codes(block);
    for g in 0..w.groups() {
        for b in 0..x.blocks_of_group() {
            let mut acc = [[[_mm256_setzero_si256(); 2]; COUNT]; M];
            for i in b * per_block..pieces.min((b + 1) * per_block) {
                let (stored, lines, later) = w.next_piece(rest, i);
                rest = later;
                let at = g * x.padded_group() + i * PIECE;
                let left: [[*const i8; COUNT]; M] = std::array::from_fn(|r| {
                    std::array::from_fn(|d| x.plane(first + r, d)[at..at + 4 * lines].as_ptr())
                });
                // SAFETY: the left side has four digits for each line; the pieces hold what `next_piece` says.
                unsafe {
                    match (w.form.bits, lines == PIECE / 4) {
                        (4, true) => full::<M, COUNT, 4>(&mut acc, stored, left),
                        (8, true) => full::<M, COUNT, 8>(&mut acc, stored, left),
                        (3, true) => full::<M, COUNT, 3>(&mut acc, stored, left),
                        _ => {
                            let mut codes = [0; PIECE / 4 * LINE];
                            unpack(stored, lines, w.form.bits, &mut codes);
                            for l in 0..lines {
                                let line = codes.as_ptr().add(l * LINE);
                                add_line::<M, COUNT, 8>(
                                    &mut acc,
                                    l,
                                    [load(line), load(line.add(HALF))],
                                    left,
                                );
                            }
                        }
                    }
                }
            }
            let (n, zeros) = (g * x.blocks_of_group() + b, w.zeros(block, g).map(i32::from));
            for (r, (y, acc)) in y.iter_mut().zip(&acc).enumerate() {
                let acc: [[i32; LANES]; COUNT] = std::array::from_fn(|d| {
                    let mut lanes = [0; LANES];
                    for (half, lanes) in acc[d].iter().zip(lanes.as_chunks_mut::<8>().0) {
                        // SAFETY: eight lanes of 32 bits.
                        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), *half) };
                    }
                    lanes
                });
                let sums = std::array::from_fn(|d| x.sum(first + r, d, n));
                fold(y, &acc, &zeros, w.scales(block, g), sums, x.step(first + r, n));
            }
        }
    }
}

/// Adds the products of a full piece of codes of `BITS` bits.
///
/// # Safety
/// As [`rows`]; a full piece is stored, and 64 digits lie at each of `left`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn full<const M: usize, const COUNT: usize, const BITS: u8>(
    acc: &mut [[[__m256i; 2]; COUNT]; M],
    stored: &[u8],
    left: [[*const i8; COUNT]; M],
) {
    let p = stored.as_ptr();
    // SAFETY: promised by the caller.
    every_line!(l => unsafe {
        add_line::<M, COUNT, BITS>(acc, l, [half_line::<BITS>(p, l), half_line::<BITS>(p.add(HALF), l)], left);
    });
}

/// Half of line `l` of a full piece of codes of 3, 4 or 8 bits.
///
/// # Safety
/// A full piece of codes of `BITS` bits at `p`, or half a line behind its start.
#[inline(always)]
unsafe fn half_line<const BITS: u8>(p: *const u8, l: usize) -> __m256i {
    // SAFETY: promised by the caller: a plane of `w` bits holds `2 w` lines.
    unsafe {
        match BITS {
            8 => load(p.add(l * LINE)),
            4 => bits(load(p.add(l % 8 * LINE)), 4 * (l / 8), 0x0f),
            _ => {
                let low = bits(load(p.add(l % 4 * LINE)), 2 * (l / 4), 3);
                let top = bits(load(p.add((4 + l % 2) * LINE)), l / 2, 1);
                _mm256_or_si256(low, _mm256_slli_epi16::<2>(top))
            }
        }
    }
}

/// The bits of `mask` of each byte, from bit `down` on. Bits that come over from the neighbour byte are masked away.
#[inline]
#[target_feature(enable = "avx2")]
fn bits(bytes: __m256i, down: usize, mask: i8) -> __m256i {
    let moved = if down == 0 { bytes } else { _mm256_srl_epi16(bytes, _mm_cvtsi64_si128(down as i64)) };
    _mm256_and_si256(moved, _mm256_set1_epi8(mask))
}

/// # Safety
/// 32 bytes at `p`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(p: *const u8) -> __m256i {
    // SAFETY: promised by the caller.
    unsafe { _mm256_loadu_si256(p.cast()) }
}

/// Adds the products of a line of codes of `BITS` bits with four digits of each row.
///
/// # Safety
/// AVX2; four digits at `4 l` of each of `left`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_line<const M: usize, const COUNT: usize, const BITS: u8>(
    acc: &mut [[[__m256i; 2]; COUNT]; M],
    l: usize,
    codes: [__m256i; 2],
    left: [[*const i8; COUNT]; M],
) {
    let ones = _mm256_set1_epi16(1);
    // Two products of a code below 128 and a signed byte fit 16 bits; the upper bit of a code is multiplied for itself.
    let low = codes.map(|c| if BITS == 8 { _mm256_and_si256(c, _mm256_set1_epi8(0x7f)) } else { c });
    let high = codes.map(|c| _mm256_and_si256(_mm256_srli_epi16::<7>(c), _mm256_set1_epi8(1)));
    for (acc, left) in acc.iter_mut().zip(left) {
        for (acc, p) in acc.iter_mut().zip(left) {
            // SAFETY: promised by the caller.
            let four = _mm256_set1_epi32(unsafe { p.add(4 * l).cast::<i32>().read_unaligned() });
            for half in 0..2 {
                let of_low = _mm256_madd_epi16(_mm256_maddubs_epi16(low[half], four), ones);
                acc[half] = _mm256_add_epi32(acc[half], of_low);
                if BITS == 8 {
                    let of_high = _mm256_madd_epi16(_mm256_maddubs_epi16(high[half], four), ones);
                    acc[half] = _mm256_add_epi32(acc[half], _mm256_slli_epi32::<7>(of_high));
                }
            }
        }
    }
}
