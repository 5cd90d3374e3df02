//! The sums on the matrix unit.
#![allow(unsafe_code, reason = "AMX has no stable intrinsics; its instructions are written out")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::digits::Digits;
use super::layout::{Tiles, every_line, unpack};
use super::vnni::{line, whole};
use super::{ACROSS, LANES, LINE, PIECE, Shared, TILE_ROWS as ROWS};
use crate::cpu::pool::Scratch;
use crate::cpu::split::Tiles as Registers;
use unit::{across_signed, across_unsigned, digits_signed, digits_unsigned, one_signed, one_unsigned};

mod unit;

/// Codes of a piece of one block.
const TILE: usize = PIECE / 4 * LINE;

/// Sums of sixteen rows: of three digits with one block of the weight, or of one digit with each of [`ACROSS`] blocks.
#[repr(align(64))]
struct Whole(MaybeUninit<[Sums; ACROSS]>);

/// Sums of sixteen rows with a block.
type Sums = [[i32; LANES]; ROWS];

/// Computes the rows `of` of some blocks of a part, at most [`ACROSS`].
///
/// # Safety
/// The machine has a matrix unit for bytes, and the process may use it, and AVX-512 F, BW, DQ and VL; these rows of a block are
/// written by one task.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn run(
    x: &Digits,
    p: &Shared<'_>,
    of: Range<usize>,
    blocks: Range<usize>,
    scratch: &Scratch,
) {
    let w = p.w;
    let each = w.groups() * w.form.group.div_ceil(PIECE) * TILE;
    // Whole pieces of bytes are tiles as they are stored.
    let stored = w.form.bits == 8 && w.form.group.is_multiple_of(PIECE);
    let mut room = scratch.take(if stored { 0 } else { ACROSS * each / 4 + 16 });
    let skip = room.as_ptr().align_offset(64).min(room.len()).min(16);
    let unpacked: &mut [u8] = bytemuck::cast_slice_mut(&mut room[skip..]);
    if !stored {
        for (codes, block) in unpacked.chunks_exact_mut(each).zip(blocks.clone()) {
            // SAFETY: promised by the caller.
            unsafe { unpack_block(w, block, codes) };
        }
    }
    let _registers = Registers::configure();
    // A few rows of all blocks: what is written of a row lies side by side.
    for first in of.clone().step_by(ROWS) {
        let rows = (first, ROWS.min(of.end - first));
        let mut from = blocks.start;
        while from < blocks.end {
            // Four blocks keep four sums going at once, three digits three.
            let now = if x.count == 1 && from + ACROSS <= blocks.end { ACROSS } else { 1 };
            let codes = if stored {
                w.codes(from..from + now)
            } else {
                &unpacked[(from - blocks.start) * each..][..now * each]
            };
            // SAFETY: promised by the caller.
            unsafe {
                match (x.count, w.form.bits, now) {
                    (1, 8, 1) => multiply::<1, true, 1>(x, p, from, rows, codes),
                    (1, _, 1) => multiply::<1, false, 1>(x, p, from, rows, codes),
                    (1, 8, _) => multiply::<1, true, ACROSS>(x, p, from, rows, codes),
                    (1, ..) => multiply::<1, false, ACROSS>(x, p, from, rows, codes),
                    (_, 8, _) => multiply::<3, true, 1>(x, p, from, rows, codes),
                    _ => multiply::<3, false, 1>(x, p, from, rows, codes),
                }
            }
            from += now;
        }
    }
}

/// The codes of a block, a byte each, whole pieces; those of less than 8 bits less their zero points.
///
/// # Safety
/// The machine has AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack_block(w: &Tiles, block: usize, out: &mut [u8]) {
    let pieces = w.form.group.div_ceil(PIECE);
    let mut rest = w.block_codes(block);
    // The four bytes of each row of a line.
    let each = _mm512_set1_epi32(0x0101_0101);
    for (at, out) in out.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
        let (stored, lines, later) = w.next_piece(rest, at % pieces);
        rest = later;
        let zeros = if w.form.bits < 8 { w.zeros(block, at / pieces) } else { [0; LANES] };
        // SAFETY: sixteen zero points.
        let zeros = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(zeros.as_ptr().cast()) });
        let zeros = _mm512_mullo_epi32(zeros, each);
        let (p, to) = (stored.as_ptr(), out.as_mut_ptr());
        // SAFETY: the lines of `out` are as many as those of a full piece.
        let put = |l: usize, codes: __m512i| unsafe {
            _mm512_storeu_si512(to.add(l * LINE).cast(), _mm512_sub_epi8(codes, zeros));
        };
        match (w.form.bits, lines == PIECE / 4) {
            // SAFETY: a full piece of this width is stored.
            (3, true) => every_line!(l => put(l, unsafe { line::<3>(p, l) })),
            // SAFETY: as above.
            (4, true) => every_line!(l => put(l, unsafe { line::<4>(p, l) })),
            _ => {
                let mut codes = [0; TILE];
                unpack(stored, lines, w.form.bits, &mut codes);
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

/// Computes up to sixteen rows of `N` blocks from `block` on. The zero points of `BYTES` are still to be taken off the codes.
///
/// # Safety
/// As [`run`]; the digits are `COUNT`, one if there are several blocks, and the tiles of this thread are configured.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn multiply<const COUNT: usize, const BYTES: bool, const N: usize>(
    x: &Digits,
    p: &Shared<'_>,
    block: usize,
    (first, count): (usize, usize),
    codes: &[u8],
) {
    let w = p.w;
    for r in first..first + count {
        // Asks for what is written at the end, so that loads need not wait behind these stores.
        for block in block..block + N {
            _mm_prefetch::<_MM_HINT_ET0>(p.out.ptr_at(r * w.form.n + block * LANES).cast());
        }
    }
    let each = codes.len() / N;
    let pieces = w.form.group.div_ceil(PIECE);
    let per_block = x.block.div_ceil(PIECE);
    let mut y = [[_mm512_setzero_ps(); ROWS]; N];
    // The unit fills one while the sums of the other are added.
    let mut whole = [const { Whole(MaybeUninit::uninit()) }; 2];
    let whole = whole.each_mut().map(|w| w.0.as_mut_ptr().cast::<Sums>());
    let mut before = None;
    let mut n = 0;
    for g in 0..w.groups() {
        for b in 0..x.blocks_of_group() {
            let span = b * per_block..pieces.min((b + 1) * per_block);
            let at = g * x.padded_group() + span.start * PIECE;
            let right = g * pieces + span.start;
            // SAFETY: promised by the caller.
            unsafe {
                sum::<COUNT, BYTES, N>(
                    x,
                    first,
                    at,
                    &codes[right * TILE..],
                    each,
                    span.len(),
                    whole[n % 2].cast(),
                );
                if let Some(at) = before {
                    for (i, y) in y.iter_mut().enumerate() {
                        add::<COUNT, BYTES>(
                            x,
                            w,
                            block + i,
                            (first, count),
                            at,
                            whole[(n + 1) % 2].add(i),
                            y,
                        );
                    }
                }
            }
            before = Some((g, n));
            n += 1;
        }
    }
    for (i, y) in y.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        unsafe {
            if let Some(at) = before {
                add::<COUNT, BYTES>(x, w, block + i, (first, count), at, whole[at.1 % 2].add(i), y);
            }
            put(x, p, block + i, (first, count), y);
        }
    }
}

/// Adds the sums of block `at.1` of the inner dimension, which is in group `at.0`, to the float sums, in the order of
/// [`fold`](super::plain::fold).
///
/// # Safety
/// As [`multiply`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn add<const COUNT: usize, const BYTES: bool>(
    x: &Digits,
    w: &Tiles,
    block: usize,
    (first, count): (usize, usize),
    at: (usize, usize),
    sums: *const Sums,
    y: &mut [__m512; ROWS],
) {
    // SAFETY: sixteen scales, sixteen zero points.
    let (scales, zeros) = unsafe {
        let zeros = if BYTES { w.zeros(block, at.0) } else { [0; LANES] };
        let zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(zeros.as_ptr().cast()));
        (_mm512_loadu_ps(w.scales(block, at.0).as_ptr()), zeros)
    };
    let of_rows = x.sums_of(first, count, at.1);
    let steps = x.steps_of(first, count, at.1);
    for (r, y) in y.iter_mut().enumerate() {
        // Rows past the last one are computed and dropped.
        let known = r.min(count - 1);
        let mut parts = [_mm512_setzero_si512(); COUNT];
        for (d, part) in parts.iter_mut().enumerate() {
            // SAFETY: sixteen sums.
            let sum = unsafe { _mm512_load_si512((*sums.add(d))[r].as_ptr().cast()) };
            *part = match BYTES {
                true => {
                    _mm512_sub_epi32(sum, _mm512_mullo_epi32(zeros, _mm512_set1_epi32(of_rows.at(known, d))))
                }
                false => sum,
            };
        }
        let step = x.stepped.then(|| steps.at(known, 0));
        *y = _mm512_add_ps(*y, _mm512_mul_ps(scales, whole(parts, step)));
    }
}

/// Writes the results, as [`Shared::put`] does.
///
/// # Safety
/// As [`multiply`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn put(x: &Digits, p: &Shared<'_>, block: usize, (first, count): (usize, usize), y: &[__m512; ROWS]) {
    let (n, at) = (p.w.form.n, block * LANES);
    let lanes = LANES.min(n - at);
    let mask = ((1u32 << lanes) - 1) as u16;
    // SAFETY: sixteen sums; the lanes of the mask are inside of the bias, and of each row of what is added and written, whose
    // lengths were checked.
    unsafe {
        let weighted = _mm512_loadu_ps(p.w.weighted(block).as_ptr());
        let bias = p.bias.map_or(_mm512_setzero_ps(), |b| _mm512_maskz_loadu_ps(mask, b[at..].as_ptr()));
        for (r, &y) in y.iter().enumerate() {
            if r < count {
                let at = (first + r) * n + at;
                let (shift, scale) = x.finish(first + r);
                let y = _mm512_add_ps(y, _mm512_mul_ps(_mm512_set1_ps(shift), weighted));
                let mut y = _mm512_add_ps(_mm512_mul_ps(y, _mm512_set1_ps(scale)), bias);
                if let Some(add) = p.add {
                    y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, add[at..at + lanes].as_ptr()));
                }
                _mm512_mask_storeu_ps(p.out.part(at, lanes).as_mut_ptr(), mask, y);
            }
        }
    }
}

/// Sums of sixteen rows from `first` on, of the digits from `at` on, with the codes of some pieces of `N` blocks, which lie
/// `each` bytes apart.
///
/// # Safety
/// The tiles of this thread are configured.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn sum<const COUNT: usize, const BYTES: bool, const N: usize>(
    x: &Digits,
    first: usize,
    at: usize,
    right: &[u8],
    each: usize,
    pieces: usize,
    out: *mut u8,
) {
    let row = x.count * x.stride;
    let planes = &x.planes()[first * row + at..];
    // Past the last row that is asked for, tiles read the rows that fill up; past the last digit, the end of the row.
    assert!(at + pieces * PIECE <= x.stride && planes.len() + at >= ROWS * row && pieces > 0);
    assert!(right.len() >= (N - 1) * each + pieces * TILE);
    let (a, b) = (planes.as_ptr(), right.as_ptr());
    for r in 0..ROWS {
        _mm_prefetch::<_MM_HINT_T0>(a.wrapping_add(r * row + 2 * pieces * PIECE));
    }
    // SAFETY: all rows of the tiles lie in the planes, and all pieces in the codes, by the checks above.
    unsafe {
        match (COUNT, N, BYTES) {
            (1, 1, true) => one_unsigned([a], row, [b], pieces, out),
            (1, 1, false) => one_signed([a], row, [b], pieces, out),
            (1, _, true) => across_unsigned([a], row, [0, 1, 2, 3].map(|i| b.add(i * each)), pieces, out),
            (1, _, false) => across_signed([a], row, [0, 1, 2, 3].map(|i| b.add(i * each)), pieces, out),
            (_, _, true) => digits_unsigned([0, 1, 2].map(|d| a.add(d * x.stride)), row, [b], pieces, out),
            (_, _, false) => digits_signed([0, 1, 2].map(|d| a.add(d * x.stride)), row, [b], pieces, out),
        }
    }
}
