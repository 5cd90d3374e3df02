//! Packing the operands of split products into tiles of high and low parts.

use super::{BLOCK, DEPTH, PART};
use crate::cpu::simd::{Isa, Kernel, Lanes};

/// An operand `[rows, k]` of a product over `k`.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// Row after row.
    Rows(&'a [f32]),
    /// Stored transposed, `[k, rows]`.
    Columns(&'a [f32]),
}

/// Whether both are the same elements in memory.
impl PartialEq for Operand<'_> {
    fn eq(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
            && std::ptr::eq(self.data(), other.data())
    }
}

impl<'a> Operand<'a> {
    pub(super) fn data(&self) -> &'a [f32] {
        match *self {
            Operand::Rows(x) | Operand::Columns(x) => x,
        }
    }

    /// Packs this many parts of the 32 rows from `first` on. `PAIRED` is the order of a right operand.
    pub(super) fn pack<const PARTS: usize, const PAIRED: bool>(
        self,
        isa: Isa,
        (rows, k): (usize, usize),
        first: usize,
        out: &mut [u16],
    ) {
        match self {
            Operand::Rows(x) => isa.run(ByRows::<PARTS, PAIRED> { x, rows, k, first, out }),
            Operand::Columns(x) => isa.run(ByColumns::<PARTS, PAIRED> { x, rows, k, first, out }),
        }
    }
}

/// The nearest bfloat16 of `x`, as bits.
#[inline(always)]
fn nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
}

/// High and low part of `x`; the low one only where two are asked for.
#[inline(always)]
fn parts<const PARTS: usize>(x: f32) -> (u32, u32) {
    let high = nearest(x);
    (high, if PARTS == 2 { nearest(x - f32::from_bits(high << 16)) } else { 0 })
}

/// Packs 32 rows from `first` of `x[rows, k]`, stored by rows, zeros beyond its ends. For each step: two tiles of high
/// parts, and two of low ones if there are two parts, each of 16 rows. `PAIRED` is the order of a right operand: pairs of inner elements, then rows.
struct ByRows<'a, const PARTS: usize, const PAIRED: bool> {
    x: &'a [f32],
    rows: usize,
    k: usize,
    first: usize,
    out: &'a mut [u16],
}

impl<const PARTS: usize, const PAIRED: bool> Kernel for ByRows<'_, PARTS, PAIRED> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (step, out) in self.out.chunks_exact_mut(PARTS * PART).enumerate() {
            let (high, low) = out.split_at_mut(PART);
            let from = step * DEPTH;
            for r in 0..BLOCK {
                let row = if self.first + r < self.rows {
                    &self.x[(self.first + r) * self.k..][..self.k]
                } else {
                    &[]
                };
                let line = line::<DEPTH>(row, from);
                let (mut h, mut l) = ([0u16; DEPTH], [0u16; DEPTH]);
                for i in 0..DEPTH {
                    let (a, b) = parts::<PARTS>(line[i]);
                    h[i] = a as u16;
                    l[i] = b as u16;
                }
                let (tile, row) = (r / 16 * 16 * DEPTH, r % 16);
                for (part, line) in [(&mut *high, &h), (&mut *low, &l)].into_iter().take(PARTS) {
                    if PAIRED {
                        for p in 0..DEPTH / 2 {
                            let at = tile + p * 32 + 2 * row;
                            part[at..at + 2].copy_from_slice(&line[2 * p..2 * p + 2]);
                        }
                    } else {
                        part[tile + row * DEPTH..][..DEPTH].copy_from_slice(line);
                    }
                }
            }
        }
    }
}

/// The elements of a row from `from` on, zeros beyond its end.
#[inline(always)]
fn line<const N: usize>(row: &[f32], from: usize) -> [f32; N] {
    match row.get(from..).and_then(<[f32]>::first_chunk) {
        Some(full) => *full,
        None => {
            let mut line = [0.0; N];
            let rest = row.get(from..).unwrap_or(&[]);
            line[..rest.len()].copy_from_slice(rest);
            line
        }
    }
}

/// As [`ByRows`] for `x[k, rows]`.
struct ByColumns<'a, const PARTS: usize, const PAIRED: bool> {
    x: &'a [f32],
    rows: usize,
    k: usize,
    first: usize,
    out: &'a mut [u16],
}

impl<const PARTS: usize, const PAIRED: bool> Kernel for ByColumns<'_, PARTS, PAIRED> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (step, out) in self.out.chunks_exact_mut(PARTS * PART).enumerate() {
            // Two inner elements of each row in 32 bits.
            let mut pairs = [[[0u32; BLOCK]; DEPTH / 2]; 2];
            let [highs, lows] = &mut pairs;
            for (p, (high, low)) in highs.iter_mut().zip(lows).enumerate() {
                let mut lines = [[0.0f32; BLOCK]; 2];
                for (e, to) in lines.iter_mut().enumerate() {
                    let i = step * DEPTH + 2 * p + e;
                    if i < self.k {
                        *to = line(&self.x[i * self.rows..][..self.rows], self.first);
                    }
                }
                for r in 0..BLOCK {
                    let ((a, a_low), (b, b_low)) = (parts::<PARTS>(lines[0][r]), parts::<PARTS>(lines[1][r]));
                    high[r] = a | b << 16;
                    low[r] = a_low | b_low << 16;
                }
            }
            for (part, pairs) in out.chunks_exact_mut(PART).zip(&pairs) {
                let part: &mut [u32] = bytemuck::cast_slice_mut(part);
                for (tile, part) in part.chunks_exact_mut(16 * DEPTH / 2).enumerate() {
                    if PAIRED {
                        for p in 0..DEPTH / 2 {
                            part[p * 16..p * 16 + 16].copy_from_slice(&pairs[p][tile * 16..tile * 16 + 16]);
                        }
                    } else {
                        for r in 0..16 {
                            let mut line = [0u32; DEPTH / 2];
                            for p in 0..DEPTH / 2 {
                                line[p] = pairs[p][tile * 16 + r];
                            }
                            part[r * DEPTH / 2..(r + 1) * DEPTH / 2].copy_from_slice(&line);
                        }
                    }
                }
            }
        }
    }
}
