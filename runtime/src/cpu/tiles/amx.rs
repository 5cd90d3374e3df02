//! The sums on the matrix unit.
#![allow(unsafe_code, reason = "AMX has no stable intrinsics; its instructions are written out")]

use std::arch::asm;
use std::ops::Range;

use super::digits::Digits;
use super::layout::{Tiles, unpack};
use super::plain::fold;
use super::{ACROSS, LANES, LINE, PIECE, Shared, Sums};
use crate::cpu::pool::Scratch;
use crate::cpu::simd::{Isa, Kernel, Lanes};
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
/// The machine has a matrix unit for bytes, and the process may use it; the columns of a block are written by one task.
pub(super) unsafe fn run(x: &Digits, p: &Shared<'_>, blocks: Range<usize>, scratch: &Scratch) {
    let (isa, w, from) = (Isa::detect(), p.w, blocks.start);
    let pieces = w.group.div_ceil(PIECE);
    let each = w.groups() * pieces * TILE;
    let mut room = scratch.take(ACROSS * each / 4 + 16);
    let skip = room.as_ptr().align_offset(64).min(16);
    let right: &mut [i8] = bytemuck::cast_slice_mut(&mut room[skip..]);
    for (right, block) in right.chunks_exact_mut(each).zip(blocks.clone()) {
        isa.run(Unpack { w, block, out: right });
    }
    let right =
        |block: usize, at: usize, count: usize| &right[(block - from) * each + at * TILE..][..count * TILE];
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
                        multiply_rows(x, first, at, right, run, i > span.start, acc);
                    }
                }
                for block in blocks.clone() {
                    let (acc, y) = (&acc[block - from], &mut y[block - from][..count]);
                    isa.run(Fold { x, w, block, first, at: (g, b), acc, y });
                }
            }
        }
        for block in blocks.clone() {
            // SAFETY: promised by the caller.
            unsafe { p.put(x, block, first, &y[block - from][..count]) };
        }
    }
}

/// The codes of a block as signed bytes less what their zero points are for widths below eight bits, and less 128 for eight.
struct Unpack<'a> {
    w: &'a Tiles,
    block: usize,
    out: &'a mut [i8],
}

impl Kernel for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Unpack { w, block, out } = self;
        let pieces = w.group.div_ceil(PIECE);
        let mut codes = [0u8; TILE];
        for (at, out) in out.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
            let (g, i) = (at / pieces, at % pieces);
            let (stored, lines) = w.piece(block, g, i);
            unpack(stored, lines, w.bits, &mut codes);
            let zeros = if w.bits < 8 { w.zeros(block, g) } else { [128; LANES] };
            let mut each = [0u8; LINE];
            for (j, z) in each.iter_mut().enumerate() {
                *z = zeros[j / 4];
            }
            let (used, unused) = out.split_at_mut(lines * LINE);
            for (out, codes) in used.as_chunks_mut::<LINE>().0.iter_mut().zip(codes.as_chunks::<LINE>().0) {
                for j in 0..LINE {
                    out[j] = codes[j].wrapping_sub(each[j]) as i8;
                }
            }
            unused.fill(0);
        }
    }
}

/// Adds the sums of a block of the inner dimension to the float sums of the rows from `first` on.
struct Fold<'a> {
    x: &'a Digits,
    w: &'a Tiles,
    block: usize,
    first: usize,
    /// Group, and block of the inner dimension in it.
    at: (usize, usize),
    acc: &'a Block,
    y: &'a mut [Sums],
}

impl Kernel for Fold<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Fold { x, w, block, first, at: (g, b), acc, y } = self;
        let n = g * x.blocks_of_group() + b;
        // What the codes were taken off already.
        let zeros = if w.bits < 8 { [0; LANES] } else { w.zeros(block, g).map(|z| i32::from(z) - 128) };
        let scales = w.scales(block, g);
        for (r, y) in y.iter_mut().enumerate() {
            let step = x.step(first + r, n);
            if x.count == 1 {
                fold::<1>(y, &[acc.0[r / 16][r % 16]], &zeros, scales, [x.sum(first + r, 0, n)], step);
            } else {
                let sums = [0, 1, 2].map(|d| x.sum(first + r, d, n));
                fold::<3>(y, &[acc.0[0][r], acc.0[1][r], acc.0[2][r]], &zeros, scales, sums, step);
            }
        }
    }
}

/// Sums of the rows from `first` on, from the digits at `at` on, with the codes of some pieces.
fn multiply_rows(
    x: &Digits,
    first: usize,
    at: usize,
    right: &[i8],
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
        if x.count == 1 {
            multiply([planes.as_ptr(), planes.as_ptr().add(16 * row)], row, right, pieces, add, out);
        } else {
            let a = [0, 1, 2].map(|d| planes.as_ptr().add(d * x.stride));
            multiply(a, row, right, pieces, add, out);
        }
    }
}

/// `out[i][16, 16] += a_i b` for the tiles `a_i`, whose rows are `stride` bytes apart, over `pieces` pieces; from 0 if `add`
/// is not set. The codes of `b` lie one piece after another.
///
/// # Safety
/// The tiles of this thread are configured. Sixteen rows of `64 * pieces` bytes at each of `a`.
unsafe fn multiply<const A: usize>(
    a: [*const i8; A],
    stride: usize,
    b: &[i8],
    pieces: usize,
    add: bool,
    out: &mut Block,
) {
    assert!(pieces > 0 && b.len() == pieces * TILE);
    let out = out.0.as_mut_ptr().cast::<u8>();
    if A == 2 {
        // SAFETY: what is read was promised by the caller or is checked above; the stores fill two tiles of `out`.
        unsafe {
            asm!(
                "test {z}, {z}",
                "jz 4f",
                "tileloadd tmm0, [{c} + {s}*1]",
                "tileloadd tmm1, [{c} + {s}*1 + 1024]",
                "jmp 2f",
                "4:",
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm4, [{b} + {s}*1]",
                "tileloadd tmm3, [{a0} + {t}*1]",
                "tdpbssd tmm0, tmm3, tmm4",
                "tileloadd tmm3, [{a1} + {t}*1]",
                "tdpbssd tmm1, tmm3, tmm4",
                "add {a0}, 64",
                "add {a1}, 64",
                "add {b}, 1024",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {s}*1], tmm0",
                "tilestored [{c} + {s}*1 + 1024], tmm1",
                a0 = inout(reg) a[0] => _,
                a1 = inout(reg) a[1] => _,
                b = inout(reg) b.as_ptr() => _,
                n = inout(reg) pieces => _,
                z = in(reg) u64::from(add),
                c = in(reg) out,
                s = in(reg) 64usize,
                t = in(reg) stride,
                options(nostack),
            );
        }
    } else {
        assert!(A == 3);
        // SAFETY: as above, with three tiles.
        unsafe {
            asm!(
                "test {z}, {z}",
                "jz 4f",
                "tileloadd tmm0, [{c} + {s}*1]",
                "tileloadd tmm1, [{c} + {s}*1 + 1024]",
                "tileloadd tmm2, [{c} + {s}*1 + 2048]",
                "jmp 2f",
                "4:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "2:",
                "tileloadd tmm4, [{b} + {s}*1]",
                "tileloadd tmm3, [{a0} + {t}*1]",
                "tdpbssd tmm0, tmm3, tmm4",
                "tileloadd tmm3, [{a1} + {t}*1]",
                "tdpbssd tmm1, tmm3, tmm4",
                "tileloadd tmm3, [{a2} + {t}*1]",
                "tdpbssd tmm2, tmm3, tmm4",
                "add {a0}, 64",
                "add {a1}, 64",
                "add {a2}, 64",
                "add {b}, 1024",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {s}*1], tmm0",
                "tilestored [{c} + {s}*1 + 1024], tmm1",
                "tilestored [{c} + {s}*1 + 2048], tmm2",
                a0 = inout(reg) a[0] => _,
                a1 = inout(reg) a[1] => _,
                a2 = inout(reg) a[A - 1] => _,
                b = inout(reg) b.as_ptr() => _,
                n = inout(reg) pieces => _,
                z = in(reg) u64::from(add),
                c = in(reg) out,
                s = in(reg) 64usize,
                t = in(reg) stride,
                options(nostack),
            );
        }
    }
}
