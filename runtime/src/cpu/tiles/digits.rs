//! The left side of a product as signed bytes.
#![allow(unsafe_code, reason = "each task writes the parts of its own rows")]

mod side;

use super::{PIECE, UNIT_ROWS};
use crate::cpu::pool::{Pool, SharedMut};
use crate::cpu::simd::{Isa, Kernel, Lanes};

pub use side::Side;

/// Inner elements over which floats share an exponent, and whose products with codes of 8 bits fit 32 bits when the
/// upper two digits are joined.
const FLOAT_BLOCK: usize = 256;
/// Inner elements over which products of two bytes fit 32 bits.
const CODE_BLOCK: usize = 32 * 1024;
/// Digits of a float: 24 bits.
const FLOAT_DIGITS: usize = 3;
/// The largest magnitude that three signed digits hold on both sides.
const FLOAT_TOP: f32 = (127 * 65_536 + 127 * 256 + 127) as f32;
/// Rows are filled up to a multiple of this, for the matrix unit.
const ROWS: usize = 32;
/// Elements that one task cuts, about.
const TASK: usize = 16 * 1024;

/// The left side of a product, cut for one way to group the inner dimension.
///
/// An element `x` of an inner block is `step (d0 + 256 d1 + 65536 d2 + shift)` with digits in `-128..=127`. Codes have one
/// digit, the step is the row's scale, and the shift is what their zero point leaves after the digit took 128 off; floats
/// have three digits, no shift, and a power of two for each block as the step: what they lose is at most `step / 2`, where
/// `step` is at most `2^-21` of the largest magnitude of the block. Codes whose row has several scales have these as steps of
/// their blocks, and no shift: with a zero point, those of 8 bits are numbers of nine, which take three digits as floats do.
#[derive(Clone, Debug, Default)]
pub struct Digits {
    pub(super) rows: usize,
    /// Digits of an element.
    pub(super) count: usize,
    /// Bytes of one digit of a row.
    pub(super) stride: usize,
    pub(super) group: usize,
    pub(super) groups: usize,
    /// Inner elements whose products are summed as whole numbers; the last block of a group may be shorter.
    pub(super) block: usize,
    /// By row and digit, whole lines of memory each.
    planes: Vec<Line>,
    /// By row, digit and block.
    sums: Vec<i32>,
    /// Whether blocks have steps of their own.
    pub(super) stepped: bool,
    /// By row and block, or by row.
    steps: Vec<f32>,
    shifts: Vec<f32>,
}

/// A row of a tile that crosses the end of a line of memory takes twice as long to read.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([i8; PIECE]);

impl Digits {
    /// Cuts `x[m, k]` for weights whose rows have groups of `group`; what was held before is lost, and its memory used again.
    ///
    /// A block of floats with a NaN or an infinity has a step of NaN, and so has what is computed from it.
    ///
    /// # Panics
    /// If `group` does not divide `k`, or a length does not fit.
    pub fn cut(&mut self, pool: &Pool, isa: Isa, x: Side<'_>, (m, k): (usize, usize), group: usize) {
        assert!(group > 0 && k.is_multiple_of(group), "groups of {group} in rows of {k}");
        x.check(m, k);
        let run = x.run(k);
        self.rows = m;
        self.stepped = run < k || matches!(x, Side::Floats(_));
        self.count = if x.is_wide(k) { FLOAT_DIGITS } else { 1 };
        (self.group, self.groups) = (group, k / group);
        let most = if self.count == 1 { CODE_BLOCK } else { FLOAT_BLOCK };
        self.block = match run < group {
            // The scales change inside of a group of the weight.
            true => (PIECE..=most.min(run))
                .rev()
                .find(|b| run.is_multiple_of(*b) && b.is_multiple_of(PIECE))
                .unwrap_or(PIECE),
            false => group.min(most),
        };
        assert!(run >= k || Side::runs(run, group), "scales of {run} beside groups of {group}");
        // A tile reads whole pieces, past the end of the row.
        self.stride = (self.groups * self.padded_group() + PIECE).next_multiple_of(size_of::<Line>());
        let (count, stride, blocks) = (self.count, self.stride, self.blocks());
        let steps = if self.stepped { blocks } else { 1 };
        let rows = if m < UNIT_ROWS { m } else { m.next_multiple_of(ROWS) };
        // Codes that fill up a piece are multiplied by 0. Rows that fill up a tile may hold anything.
        if !group.is_multiple_of(PIECE) {
            self.planes.clear();
        }
        self.planes.resize(rows * count * stride / size_of::<Line>(), Line([0; PIECE]));
        self.sums.resize(m * count * blocks, 0);
        self.steps.resize(m * steps, 0.0);
        self.shifts.resize(m, 0.0);
        let cut = Cut { x, k, group, padded: self.padded_group(), block: self.block, stride };
        let (planes, sums) = (bytemuck::cast_slice_mut(&mut self.planes), SharedMut::new(&mut self.sums));
        let planes = SharedMut::new(planes);
        let (all_steps, shifts) = (SharedMut::new(&mut self.steps), SharedMut::new(&mut self.shifts));
        let at_once = TASK.div_ceil(k.max(1));
        pool.for_each(m.div_ceil(at_once), |task| {
            for row in task * at_once..m.min((task + 1) * at_once) {
                // SAFETY: the parts of a row are this task's alone.
                let (planes, sums, steps, shift) = unsafe {
                    (
                        planes.part(row * count * stride, count * stride),
                        sums.part(row * count * blocks, count * blocks),
                        all_steps.part(row * steps, steps),
                        shifts.part(row, 1),
                    )
                };
                isa.run(CutRow { cut: &cut, row, planes, sums, steps, shift: &mut shift[0] });
            }
        });
    }

    /// Bytes of a group in a row of a plane.
    pub(super) fn padded_group(&self) -> usize {
        self.group.next_multiple_of(4)
    }

    /// Blocks of a group.
    pub(super) fn blocks_of_group(&self) -> usize {
        self.group.div_ceil(self.block.max(1))
    }

    /// Blocks of a row.
    fn blocks(&self) -> usize {
        self.groups * self.blocks_of_group()
    }

    /// Where digit `d` of a row starts.
    #[inline(always)]
    pub(super) fn plane(&self, row: usize, d: usize) -> &[i8] {
        &self.planes()[(row * self.count + d) * self.stride..][..self.stride]
    }

    /// The digits of all rows; from eight rows on, these are filled up to a multiple of 32.
    #[inline(always)]
    pub(super) fn planes(&self) -> &[i8] {
        bytemuck::cast_slice(&self.planes)
    }

    /// The sums of a digit over the blocks of a row.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn sums(&self, row: usize, d: usize) -> &[i32] {
        let blocks = self.blocks();
        &self.sums[(row * self.count + d) * blocks..][..blocks]
    }

    /// The steps of the blocks of a row, if they have some of their own.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn steps(&self, row: usize) -> &[f32] {
        let blocks = if self.stepped { self.blocks() } else { 0 };
        &self.steps[row * blocks..][..blocks]
    }

    /// The sums of one block, for the digits of `rows` rows from `first` on.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn sums_of(&self, first: usize, rows: usize, block: usize) -> OfRows<'_, i32> {
        let blocks = self.blocks();
        let span = first * self.count * blocks..(first + rows) * self.count * blocks;
        OfRows { all: &self.sums[span], block, blocks, count: self.count }
    }

    /// The steps of one block, for `rows` rows from `first` on, if blocks have some of their own.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn steps_of(&self, first: usize, rows: usize, block: usize) -> OfRows<'_, f32> {
        let blocks = if self.stepped { self.blocks() } else { 0 };
        OfRows { all: &self.steps[first * blocks..(first + rows) * blocks], block, blocks, count: 1 }
    }

    /// The sum of a digit over a block, blocks being counted along the row.
    #[inline(always)]
    pub(super) fn sum(&self, row: usize, d: usize, block: usize) -> i32 {
        self.sums[(row * self.count + d) * self.blocks() + block]
    }

    /// What the sum of products over a block is multiplied by.
    #[inline(always)]
    pub(super) fn step(&self, row: usize, block: usize) -> f32 {
        if self.stepped { self.steps[row * self.blocks() + block] } else { 1.0 }
    }

    /// The shift of a row, and what its result is multiplied by.
    #[inline(always)]
    pub(super) fn finish(&self, row: usize) -> (f32, f32) {
        (self.shifts[row], if self.stepped { 1.0 } else { self.steps[row] })
    }
}

/// What some rows have for each of their blocks, at one block.
#[cfg(target_arch = "x86_64")]
pub(super) struct OfRows<'a, T> {
    all: &'a [T],
    block: usize,
    blocks: usize,
    count: usize,
}

#[cfg(target_arch = "x86_64")]
impl<T: Copy> OfRows<'_, T> {
    /// That of digit `d` of row `r`.
    #[inline(always)]
    pub(super) fn at(&self, r: usize, d: usize) -> T {
        self.all[(r * self.count + d) * self.blocks + self.block]
    }
}

/// What all rows share.
struct Cut<'a> {
    x: Side<'a>,
    k: usize,
    group: usize,
    padded: usize,
    block: usize,
    stride: usize,
}

/// One row: its planes one after another, its sums by digit and block.
struct CutRow<'a> {
    cut: &'a Cut<'a>,
    row: usize,
    planes: &'a mut [i8],
    sums: &'a mut [i32],
    steps: &'a mut [f32],
    shift: &'a mut f32,
}

impl Kernel for CutRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let CutRow { cut, row, planes, sums, steps, shift } = self;
        let span = row * cut.k..(row + 1) * cut.k;
        *shift = 0.0;
        match cut.x {
            Side::Floats(x) => {
                let blocks = steps.len();
                let (d0, rest) = planes.split_at_mut(cut.stride);
                let (d1, d2) = rest.split_at_mut(cut.stride);
                for (b, (x, at, _)) in cut.blocks(&x[span]).enumerate() {
                    let to = at..at + x.len();
                    steps[b] = digits(x, &mut d0[to.clone()], &mut d1[to.clone()], &mut d2[to.clone()]);
                    sums[b] = sum(&d0[to.clone()]);
                    sums[blocks + b] = sum(&d1[to.clone()]);
                    sums[2 * blocks + b] = sum(&d2[to]);
                }
            }
            Side::Unsigned { codes, bits: 8, scales, zeros, run } if run < cut.k => {
                let blocks = steps.len();
                let (d0, rest) = planes.split_at_mut(cut.stride);
                let (d1, d2) = rest.split_at_mut(cut.stride);
                for (b, (codes, at, from)) in cut.blocks(&codes[span]).enumerate() {
                    let of = (row * cut.k + from) / run;
                    steps[b] = scales[of];
                    let to = at..at + codes.len();
                    for ((d0, d1), &c) in d0[to.clone()].iter_mut().zip(&mut d1[to.clone()]).zip(codes) {
                        let x = i16::from(c) - i16::from(zeros[of]);
                        *d0 = x as i8;
                        *d1 = ((x - i16::from(*d0)) >> 8) as i8;
                    }
                    d2[to.clone()].fill(0);
                    sums[b] = sum(&d0[to.clone()]);
                    sums[blocks + b] = sum(&d1[to]);
                    sums[2 * blocks + b] = 0;
                }
            }
            Side::Unsigned { codes, bits, scales, zeros, run } => {
                steps[0] = scales[row * cut.k / run];
                for (b, (codes, at, from)) in cut.blocks(&codes[span]).enumerate() {
                    let of = (row * cut.k + from) / run;
                    // Codes of eight bits less their zero point would need nine.
                    let offset = if bits < 8 { zeros[of] } else { 128 };
                    *shift = f32::from(i16::from(offset) - i16::from(zeros[of]));
                    if run < cut.k {
                        steps[b] = scales[of];
                    }
                    let out = &mut planes[at..at + codes.len()];
                    for (d, &c) in out.iter_mut().zip(codes) {
                        *d = c.wrapping_sub(offset) as i8;
                    }
                    sums[b] = sum(out);
                }
            }
            Side::Signed { codes, scales, run } => {
                steps[0] = scales[row * cut.k / run];
                for (b, (codes, at, from)) in cut.blocks(&codes[span]).enumerate() {
                    if run < cut.k {
                        steps[b] = scales[(row * cut.k + from) / run];
                    }
                    let out = &mut planes[at..at + codes.len()];
                    out.copy_from_slice(codes);
                    sums[b] = sum(out);
                }
            }
        }
    }
}

impl Cut<'_> {
    /// The blocks of a row, where their digits go, and where in the row they begin.
    #[inline(always)]
    fn blocks<'x, T>(&self, row: &'x [T]) -> impl Iterator<Item = (&'x [T], usize, usize)> {
        let (block, padded, size) = (self.block, self.padded, self.group);
        row.chunks(size).enumerate().flat_map(move |(g, group)| {
            let at = move |b: usize| (g * padded + b * block, g * size + b * block);
            group.chunks(block).enumerate().map(move |(b, x)| (x, at(b).0, at(b).1))
        })
    }
}

#[inline(always)]
fn sum(digits: &[i8]) -> i32 {
    digits.iter().map(|&d| i32::from(d)).sum()
}

/// Cuts a block of floats into digits, the lowest first, and gives the step.
#[inline(always)]
fn digits(x: &[f32], d0: &mut [i8], d1: &mut [i8], d2: &mut [i8]) -> f32 {
    const ABS: u32 = 0x7fff_ffff;
    let mut most = 0u32;
    for x in x {
        most = most.max(x.to_bits() & ABS);
    }
    if !f32::from_bits(most).is_finite() {
        d0.fill(0);
        d1.fill(0);
        d2.fill(0);
        return f32::NAN;
    }
    // The exponent that gives the largest magnitude 23 binary places, or 22 where it would not fit three digits.
    let exponent = |places: u32| (most >> 23).saturating_sub(places).max(1);
    let inverse = |e: u32| f32::from_bits((254 - e) << 23);
    let fits = |e: u32| (f32::from_bits(most) * inverse(e)).round_ties_even() <= FLOAT_TOP;
    let e = if fits(exponent(22)) { exponent(22) } else { exponent(21) };
    let inverse = inverse(e);
    for (((x, d0), d1), d2) in x.iter().zip(d0).zip(d1).zip(d2) {
        // Adding 1.5 * 2^52 rounds half to even, and the whole number then stands in the low bits.
        const ROUND: f64 = 6_755_399_441_055_744.0;
        let t = (f64::from(x * inverse) + ROUND).to_bits() as i32;
        let low = ((t + 128) & 255) - 128;
        let t = (t - low) >> 8;
        let middle = ((t + 128) & 255) - 128;
        *d0 = low as i8;
        *d1 = middle as i8;
        *d2 = ((t - middle) >> 8) as i8;
    }
    f32::from_bits(e << 23)
}
