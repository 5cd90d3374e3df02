//! The sums in plain loops, which LLVM vectorizes.

use super::digits::Digits;
use super::layout::{Tiles, unpack};
use super::{LANES, LINE, PIECE, ROWS, Sums};
use crate::cpu::simd::{Kernel, Lanes};

/// Adds the float sums of block `block` of the weight with the rows `first..first + y.len()` to `y`.
pub(super) struct Plain<'a> {
    pub(super) x: &'a Digits,
    pub(super) w: &'a Tiles,
    pub(super) block: usize,
    pub(super) first: usize,
    /// At most 4.
    pub(super) y: &'a mut [Sums],
}

impl Kernel for Plain<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        match self.x.count {
            1 => sums::<1>(self),
            _ => sums::<3>(self),
        }
    }
}

#[inline(always)]
fn sums<const COUNT: usize>(p: Plain<'_>) {
    let Plain { x, w, block, first, y } = p;
    let mut codes = [0u8; PIECE / 4 * LINE];
    let pieces = w.form.group.div_ceil(PIECE);
    let per_block = x.block.div_ceil(PIECE);
    let mut rest = w.block_codes(block);
    for g in 0..w.groups() {
        for b in 0..x.blocks_of_group() {
            let mut acc = [[[0i32; LANES]; COUNT]; ROWS];
            for i in b * per_block..pieces.min((b + 1) * per_block) {
                let (stored, lines, later) = w.next_piece(rest, i);
                rest = later;
                unpack(stored, lines, w.form.bits, &mut codes);
                let at = g * x.padded_group() + i * PIECE;
                for (r, acc) in acc.iter_mut().enumerate().take(y.len()) {
                    for (d, acc) in acc.iter_mut().enumerate() {
                        let plane = &x.plane(first + r, d)[at..at + 4 * lines];
                        for (a, line) in plane.as_chunks::<4>().0.iter().zip(codes.as_chunks::<LINE>().0) {
                            add_line(acc, a, line);
                        }
                    }
                }
            }
            let (n, zeros) = (g * x.blocks_of_group() + b, w.zeros(block, g));
            for (r, y) in y.iter_mut().enumerate() {
                let sums = std::array::from_fn(|d| x.sum(first + r, d, n));
                fold(y, &acc[r], &zeros.map(i32::from), w.scales(block, g), sums, x.step(first + r, n));
            }
        }
    }
}

#[inline(always)]
fn add_line(acc: &mut [i32; LANES], a: &[i8; 4], line: &[u8; LINE]) {
    for lane in 0..LANES {
        for j in 0..4 {
            acc[lane] += i32::from(line[4 * lane + j]) * i32::from(a[j]);
        }
    }
}

/// Adds the sum of a block to the float sums: what every path must do in this order. `acc` are sums with unsigned codes by
/// digit, `sums` those of the digits alone.
#[inline(always)]
pub(super) fn fold<const COUNT: usize>(
    y: &mut Sums,
    acc: &[[i32; LANES]; COUNT],
    zeros: &[i32; LANES],
    scales: &[f32; LANES],
    sums: [i32; COUNT],
    step: f32,
) {
    for lane in 0..LANES {
        let part = |d: usize| acc[d][lane] - zeros[lane] * sums[d];
        let whole = match COUNT {
            1 => part(0) as f32,
            _ => (part(2) * 256 + part(1)) as f32 * 256.0 + part(0) as f32,
        };
        // A step is a power of two; its product with a scale could be too small for all of its bits.
        y[lane] += scales[lane] * (step * whole);
    }
}
