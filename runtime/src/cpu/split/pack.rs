//! Packing the operands of split products into tiles of high and low parts.
#![allow(unsafe_code, reason = "threads write disjoint parts of one packed operand")]

use super::{BLOCK, DEPTH, PART};
use crate::cpu::pool::{Pool, SharedMut};
use crate::cpu::simd::{Isa, Kernel, Lanes};
use crate::cpu::transpose::turned;

/// An operand `[rows, k]` of a product over `k`.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// Row after row.
    Rows(&'a [f32]),
    /// Stored transposed, `[k, rows]`.
    Columns(&'a [f32]),
    /// Row after row, each of whole numbers below 257 times the row's scale; all scales and their inverses are finite.
    /// With [`Parts::High`](super::Parts::High) the product is one of the whole numbers, so its factors are exact.
    OnGrid(&'a [f32], &'a [f32]),
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
            Operand::Rows(x) | Operand::Columns(x) | Operand::OnGrid(x, _) => x,
        }
    }

    /// The scale of each row, if rows have one.
    pub(super) fn scales(&self) -> Option<&'a [f32]> {
        match *self {
            Operand::OnGrid(_, scales) => Some(scales),
            Operand::Rows(_) | Operand::Columns(_) => None,
        }
    }

    /// Packs this many parts of all rows, in blocks of 32 rows, each with its steps in order. `PAIRED` is the order of a
    /// right operand.
    pub(super) fn pack<const PARTS: usize, const PAIRED: bool>(
        self,
        pool: &Pool,
        isa: Isa,
        (rows, k): (usize, usize),
        out: &mut [u16],
    ) {
        let (each, steps) = (PARTS * PART, k.div_ceil(DEPTH));
        match self {
            Operand::Rows(x) | Operand::OnGrid(x, _) => {
                pool.for_chunks(out, (steps * each).max(1), |block, out| {
                    let (first, scales) = (block * BLOCK, self.scales());
                    isa.run(ByRows::<PARTS, PAIRED> { x, rows, k, first, scales, out });
                })
            }
            // What lies together is the rows of one inner element: a task takes few of those and all rows.
            Operand::Columns(x) => {
                let out = SharedMut::new(out);
                pool.for_each(steps, |step| {
                    for block in 0..rows.div_ceil(BLOCK) {
                        // SAFETY: inside `out`, and each step of each block is written once.
                        let out = unsafe { out.part((block * steps + step) * each, each) };
                        isa.run(ByColumns::<PARTS, PAIRED> { x, rows, k, first: block * BLOCK, step, out });
                    }
                });
            }
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
/// parts, and two of low ones if there are two parts, each of 16 rows. `PAIRED` is the order of a right operand: pairs of
/// inner elements, then rows.
struct ByRows<'a, const PARTS: usize, const PAIRED: bool> {
    x: &'a [f32],
    rows: usize,
    k: usize,
    first: usize,
    scales: Option<&'a [f32]>,
    out: &'a mut [u16],
}

impl<const PARTS: usize, const PAIRED: bool> Kernel for ByRows<'_, PARTS, PAIRED> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let mut inverse = [1.0f32; BLOCK];
        for (to, scale) in
            inverse.iter_mut().zip(self.scales.and_then(|s| s.get(self.first..)).unwrap_or(&[]))
        {
            *to = 1.0 / scale;
        }
        for (step, out) in self.out.chunks_exact_mut(PARTS * PART).enumerate() {
            let (high, low) = out.split_at_mut(PART);
            let from = step * DEPTH;
            for (r, inverse) in inverse.iter().enumerate() {
                let row = if self.first + r < self.rows {
                    &self.x[(self.first + r) * self.k..][..self.k]
                } else {
                    &[]
                };
                let line = line::<DEPTH>(row, from);
                let (mut h, mut l) = ([0u16; DEPTH], [0u16; DEPTH]);
                for i in 0..DEPTH {
                    let (a, b) = parts::<PARTS>(line[i] * inverse);
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

/// As [`ByRows`] for one step of `x[k, rows]`.
struct ByColumns<'a, const PARTS: usize, const PAIRED: bool> {
    x: &'a [f32],
    rows: usize,
    k: usize,
    first: usize,
    step: usize,
    out: &'a mut [u16],
}

impl<const PARTS: usize, const PAIRED: bool> Kernel for ByColumns<'_, PARTS, PAIRED> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        // Two inner elements of each row in 32 bits.
        let mut pairs = [[[0u32; BLOCK]; DEPTH / 2]; 2];
        let [highs, lows] = &mut pairs;
        for (p, (high, low)) in highs.iter_mut().zip(lows).enumerate() {
            let mut lines = [[0.0f32; BLOCK]; 2];
            for (e, to) in lines.iter_mut().enumerate() {
                let i = self.step * DEPTH + 2 * p + e;
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
        for (part, pairs) in self.out.chunks_exact_mut(PART).zip(&pairs) {
            let part: &mut [u32] = bytemuck::cast_slice_mut(part);
            for (tile, part) in part.chunks_exact_mut(16 * DEPTH / 2).enumerate() {
                if PAIRED {
                    for p in 0..DEPTH / 2 {
                        part[p * 16..p * 16 + 16].copy_from_slice(&pairs[p][tile * 16..tile * 16 + 16]);
                    }
                } else {
                    for (r, p) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
                        let mut t = [[0; 8]; 8];
                        for (t, pairs) in t.iter_mut().zip(&pairs[p..p + 8]) {
                            t.copy_from_slice(&pairs[tile * 16 + r..][..8]);
                        }
                        for (i, line) in turned(t).iter().enumerate() {
                            part[(r + i) * DEPTH / 2 + p..][..8].copy_from_slice(line);
                        }
                    }
                }
            }
        }
    }
}
