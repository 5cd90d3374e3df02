//! The sums on the matrix unit.
#![allow(unsafe_code, reason = "AMX has no stable intrinsics; its instructions are written out")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::digits::Digits;
use super::layout::{Tiles, every_line, unpack};
use super::vnni::{line, whole};
use super::{ACROSS, LANES, LINE, PIECE, Shared, Sums};
use crate::cpu::pool::Scratch;
use crate::cpu::split::Tiles as Registers;

/// Pieces of one pass over the blocks: what it reads of the left side stays in the first-level cache.
const RUN: usize = 8;
/// Codes of a piece of one block.
const TILE: usize = PIECE / 4 * LINE;
/// Rows of the left side of one pass: two tiles of one digit, or one of each of three.
const ROWS: usize = 32;

/// Sums of a block of the weight with up to three tiles of the left side.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Block([[[i32; LANES]; 16]; 3]);

/// Computes some blocks of a part, at most [`ACROSS`].
///
/// # Safety
/// The machine has a matrix unit for bytes, and the process may use it, and AVX-512 F, BW, DQ and VL; the columns of a block
/// are written by one task.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn run(x: &Digits, p: &Shared<'_>, blocks: Range<usize>, scratch: &Scratch) {
    let (w, from) = (p.w, blocks.start);
    let pieces = w.group.div_ceil(PIECE);
    let each = w.groups() * pieces * TILE;
    // Whole pieces of bytes are tiles as they are stored.
    let stored = w.bits == 8 && w.group.is_multiple_of(PIECE);
    let mut room = scratch.take(if stored { 0 } else { ACROSS * each / 4 + 16 });
    let skip = room.as_ptr().align_offset(64).min(room.len()).min(16);
    let codes: &mut [u8] = bytemuck::cast_slice_mut(&mut room[skip..]);
    if !stored {
        for (codes, block) in codes.chunks_exact_mut(each).zip(blocks.clone()) {
            // SAFETY: promised by the caller.
            unsafe { unpack_block(w, block, codes) };
        }
    }
    let right = |block: usize, at: usize, count: usize| {
        let all = if stored { w.block_codes(block) } else { &codes[(block - from) * each..][..each] };
        let all = &all[at * TILE..(at + count) * TILE];
        if w.bits == 8 { Right::Unsigned(all) } else { Right::Signed(all) }
    };
    let _registers = Registers::configure();
    let mut acc = [Block([[[0; LANES]; 16]; 3]); ACROSS];
    let rows = if x.count == 1 { ROWS } else { ROWS / 2 };
    for first in (0..x.rows).step_by(rows) {
        let count = rows.min(x.rows - first);
        let mut y = [[[0.0; LANES]; ROWS]; ACROSS];
        for g in 0..w.groups() {
            for b in 0..x.blocks_of_group() {
                let per_block = x.block.div_ceil(PIECE);
                let span = b * per_block..pieces.min((b + 1) * per_block);
                for i in span.clone().step_by(RUN) {
                    let run = RUN.min(span.end - i);
                    let at = g * x.padded_group() + i * PIECE;
                    for block in blocks.clone() {
                        let acc = &mut acc[block - from];
                        let right = right(block, g * pieces + i, run);
                        multiply_rows(x, (first, count), at, right, run, i > span.start, acc);
                    }
                }
                for block in blocks.clone() {
                    let (acc, y) = (&acc[block - from], &mut y[block - from][..count]);
                    let at = (g, g * x.blocks_of_group() + b);
                    // SAFETY: promised by the caller.
                    unsafe {
                        match (x.count, w.bits) {
                            (1, 8) => add_sums::<1, true>(x, w, block, first, at, acc, y),
                            (1, _) => add_sums::<1, false>(x, w, block, first, at, acc, y),
                            (_, 8) => add_sums::<3, true>(x, w, block, first, at, acc, y),
                            _ => add_sums::<3, false>(x, w, block, first, at, acc, y),
                        }
                    }
                }
            }
        }
        for block in blocks.clone() {
            // SAFETY: promised by the caller.
            unsafe { p.put(x, block, first, &y[block - from][..count]) };
        }
    }
}

/// The codes of a block, a byte each, whole pieces; those of less than 8 bits less their zero points.
///
/// # Safety
/// The machine has AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack_block(w: &Tiles, block: usize, out: &mut [u8]) {
    let pieces = w.group.div_ceil(PIECE);
    let mut rest = w.block_codes(block);
    // The four bytes of each row of a line.
    let each = _mm512_set1_epi32(0x0101_0101);
    for (at, out) in out.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
        let (stored, lines, later) = w.next_piece(rest, at % pieces);
        rest = later;
        let zeros = if w.bits < 8 { w.zeros(block, at / pieces) } else { [0; LANES] };
        // SAFETY: sixteen zero points.
        let zeros = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(zeros.as_ptr().cast()) });
        let zeros = _mm512_mullo_epi32(zeros, each);
        let (p, to) = (stored.as_ptr(), out.as_mut_ptr());
        // SAFETY: the lines of `out` are as many as those of a full piece.
        let put = |l: usize, codes: __m512i| unsafe {
            _mm512_storeu_si512(to.add(l * LINE).cast(), _mm512_sub_epi8(codes, zeros));
        };
        match (w.bits, lines == PIECE / 4) {
            // SAFETY: a full piece of this width is stored.
            (3, true) => every_line!(l => put(l, unsafe { line::<3>(p, l) })),
            // SAFETY: as above.
            (4, true) => every_line!(l => put(l, unsafe { line::<4>(p, l) })),
            _ => {
                let mut codes = [0; TILE];
                unpack(stored, lines, w.bits, &mut codes);
                for l in 0..PIECE / 4 {
                    // What fills up a piece is 0 on this side.
                    let now = if l < lines {
                        // SAFETY: a line of the buffer.
                        unsafe { _mm512_loadu_si512(codes.as_ptr().add(l * LINE).cast()) }
                    } else {
                        zeros
                    };
                    put(l, now);
                }
            }
        }
    }
}

/// Adds the sums of a block of the inner dimension, in group `at.0` and number `at.1` of the row, to the float sums of the
/// rows from `first` on, in the order of [`fold`](super::plain::fold). The zero points of `BYTES` are still to be taken off.
///
/// # Safety
/// The machine has AVX-512 F, BW, DQ and VL; the digits are `COUNT`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn add_sums<const COUNT: usize, const BYTES: bool>(
    x: &Digits,
    w: &Tiles,
    block: usize,
    first: usize,
    at: (usize, usize),
    acc: &Block,
    y: &mut [Sums],
) {
    // SAFETY: sixteen scales, sixteen zero points.
    let (scales, zeros) = unsafe {
        let zeros = w.zeros(block, at.0);
        let zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(zeros.as_ptr().cast()));
        (_mm512_loadu_ps(w.scales(block, at.0).as_ptr()), zeros)
    };
    let sums = x.sums_of(first, y.len(), at.1);
    let steps = x.steps_of(first, y.len(), at.1);
    for (r, y) in y.iter_mut().enumerate() {
        let part = |d: usize| {
            let tile = if COUNT == 1 { &acc.0[r / 16][r % 16] } else { &acc.0[d][r % 16] };
            // SAFETY: sixteen sums.
            let sum = unsafe { _mm512_loadu_si512(tile.as_ptr().cast()) };
            if BYTES {
                _mm512_sub_epi32(sum, _mm512_mullo_epi32(zeros, _mm512_set1_epi32(sums.at(r, d))))
            } else {
                sum
            }
        };
        let step = if COUNT == 1 { 1.0 } else { steps.at(r, 0) };
        let mut parts = [_mm512_setzero_si512(); COUNT];
        for (d, p) in parts.iter_mut().enumerate() {
            *p = part(d);
        }
        let whole = whole(parts, step);
        // SAFETY: sixteen floats.
        unsafe {
            let sum = _mm512_add_ps(_mm512_loadu_ps(y.as_ptr()), _mm512_mul_ps(scales, whole));
            _mm512_storeu_ps(y.as_mut_ptr(), sum);
        }
    }
}

/// Sums of the rows from `first` on, from the digits at `at` on, with the codes of some pieces.
fn multiply_rows(
    x: &Digits,
    (first, count): (usize, usize),
    at: usize,
    right: Right<'_>,
    pieces: usize,
    add: bool,
    out: &mut Block,
) {
    let row = x.count * x.stride;
    let planes = &x.planes()[first * row + at..];
    // Past the last row that is asked for, tiles read the rows that fill up; past the last digit, the end of the row.
    let rows = if x.count == 1 { ROWS } else { ROWS / 2 };
    assert!(at + pieces * PIECE <= x.stride && planes.len() + at >= rows * row);
    // SAFETY: all rows of the tiles lie in the planes, by the check above.
    unsafe {
        let a = planes.as_ptr();
        if x.count > 1 {
            multiply([0, 1, 2].map(|d| a.add(d * x.stride)), row, right, pieces, add, out);
        } else if count > 16 {
            multiply([a, a.add(16 * row)], row, right, pieces, add, out);
        } else {
            multiply([a], row, right, pieces, add, out);
        }
    }
}

/// Codes of pieces one after another, a byte each.
#[derive(Clone, Copy)]
enum Right<'a> {
    /// As they are stored.
    Unsigned(&'a [u8]),
    /// Less their zero points.
    Signed(&'a [u8]),
}

/// `out[i][16, 16] += a_i b` for the tiles `a_i`, whose rows are `stride` bytes apart, over `pieces` pieces; from 0 if `add`
/// is not set.
///
/// # Safety
/// The tiles of this thread are configured. Sixteen rows of `64 * pieces` bytes at each of `a`.
unsafe fn multiply<const A: usize>(
    a: [*const i8; A],
    stride: usize,
    b: Right<'_>,
    pieces: usize,
    add: bool,
    out: &mut Block,
) {
    let (Right::Unsigned(codes) | Right::Signed(codes)) = b;
    assert!(pieces > 0 && codes.len() == pieces * TILE);
    let out = out.0.as_mut_ptr().cast::<u8>();
    /// The loop over pieces: what it does with a sum before, with a piece of the second and third tile, and after.
    macro_rules! tiles {
        ($dp:literal, [$($load:literal),*], [$($zero:literal),*], [$($more:expr),*], [$($store:literal),*]) => {
            asm!(
                "test {z}, {z}",
                "jz 4f",
                "tileloadd tmm0, [{c} + {s}*1]",
                $($load,)*
                "jmp 2f",
                "4:",
                "tilezero tmm0",
                $($zero,)*
                "2:",
                "tileloadd tmm4, [{b} + {s}*1]",
                "tileloadd tmm3, [{a0} + {t}*1]",
                concat!($dp, " tmm0, tmm3, tmm4"),
                $($more,)*
                "add {a0}, 64",
                "add {a1}, 64",
                "add {a2}, 64",
                "add {b}, 1024",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {s}*1], tmm0",
                $($store,)*
                a0 = inout(reg) a[0] => _,
                a1 = inout(reg) a[A / 2] => _,
                a2 = inout(reg) a[A - 1] => _,
                b = inout(reg) codes.as_ptr() => _,
                n = inout(reg) pieces => _,
                z = in(reg) u64::from(add),
                c = in(reg) out,
                s = in(reg) 64usize,
                t = in(reg) stride,
                options(nostack),
            )
        };
    }
    macro_rules! by_count {
        ($dp:literal) => {
            match A {
                1 => tiles!($dp, [], [], [], []),
                2 => tiles!(
                    $dp,
                    ["tileloadd tmm1, [{c} + {s}*1 + 1024]"],
                    ["tilezero tmm1"],
                    ["tileloadd tmm3, [{a1} + {t}*1]", concat!($dp, " tmm1, tmm3, tmm4")],
                    ["tilestored [{c} + {s}*1 + 1024], tmm1"]
                ),
                _ => tiles!(
                    $dp,
                    ["tileloadd tmm1, [{c} + {s}*1 + 1024]", "tileloadd tmm2, [{c} + {s}*1 + 2048]"],
                    ["tilezero tmm1", "tilezero tmm2"],
                    [
                        "tileloadd tmm3, [{a1} + {t}*1]",
                        concat!($dp, " tmm1, tmm3, tmm4"),
                        "tileloadd tmm3, [{a2} + {t}*1]",
                        concat!($dp, " tmm2, tmm3, tmm4")
                    ],
                    ["tilestored [{c} + {s}*1 + 1024], tmm1", "tilestored [{c} + {s}*1 + 2048], tmm2"]
                ),
            }
        };
    }
    // SAFETY: what is read was promised by the caller or is checked above; the stores fill up to three tiles of `out`.
    unsafe {
        match b {
            Right::Unsigned(_) => by_count!("tdpbsud"),
            Right::Signed(_) => by_count!("tdpbssd"),
        }
    }
}
