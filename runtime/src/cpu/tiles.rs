//! Products with weights of 2 to 8 bits in integer arithmetic.
//!
//! A weight `W[n, k]` holds codes `c`, and for each run of `group` codes of a row a scale `s` and a zero point `z`:
//! its elements are `s (c - z)`. The left side is cut into signed bytes, see [`Digits`]: the codes of a quantized
//! activation are one byte each, floats become three bytes of a fixed-point number each. Then every sum
//! `P = Σ a (c - z)` over a block of the inner dimension is a sum of whole numbers and exact, whatever the order and the
//! instructions. What is left is float arithmetic on these sums in one order that all paths share, so that the result has
//! the same bits on every path, at any number of rows and of threads.
//!
//! The codes of sixteen rows lie side by side, four of each row together: it is how matrix instructions and byte products
//! read them, so one layout serves one row of activations and many. Codes of other widths than four and eight bits are
//! cut into planes of four, two and one bit.

#![allow(unsafe_code, reason = "tasks write disjoint columns of one output")]

use std::ops::Range;

use smallvec::SmallVec;

use super::pool::{Pool, Scratch, SharedMut};
use super::simd::{Kernel, Lanes};
use path::Kind;
use plain::Plain;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod build;
mod digits;
mod form;
mod layout;
mod path;
mod plain;
mod stored;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vnni;

pub use digits::{Digits, Side};
pub use form::Form;
pub use layout::Tiles;
pub use path::IntPath;

/// Rows of a weight that lie side by side.
const LANES: usize = 16;
/// Codes of a row in one piece, the depth of a tile.
const PIECE: usize = 64;
/// Bytes of a line: four codes of each of the sixteen rows, a byte each where they are not packed.
const LINE: usize = 4 * LANES;

/// Float sums of one block of sixteen rows of the weight, one array for each row of the left side.
type Sums = [f32; LANES];

/// Rows of the left side from which the matrix unit pays.
const UNIT_ROWS: usize = 8;
/// Blocks of sixteen rows of the weight that one task unpacks for the matrix unit: what is read of the left side serves all
/// of them.
const ACROSS: usize = 4;
/// Rows of the left side that the matrix unit takes at once.
const TILE_ROWS: usize = 16;
/// Rows of the left side for which it pays to unpack the codes once more.
const STRIP: usize = 128;
/// Bytes of codes that one task reads, about.
const TASK: usize = 8 * 1024;

/// One of the weights that a left side is multiplied with.
#[derive(Debug)]
pub struct Part<'a> {
    /// `[n, k]`
    pub w: &'a Tiles,
    /// Added to each row of the product, `[n]`.
    pub bias: Option<&'a [f32]>,
    /// Added to the product, after the bias, `[m, n]`.
    pub add: Option<&'a [f32]>,
    /// `[m, n]`
    pub out: &'a mut [f32],
}

/// A part that tasks share.
struct Shared<'a> {
    w: &'a Tiles,
    bias: Option<&'a [f32]>,
    add: Option<&'a [f32]>,
    /// Blocks that one task takes.
    at_once: usize,
    out: SharedMut<'a, f32>,
}

impl Shared<'_> {
    /// Writes the rows from `first` on of a block.
    ///
    /// # Safety
    /// These rows of a block are written by one task.
    #[inline(always)]
    unsafe fn put(&self, x: &Digits, block: usize, first: usize, y: &[Sums]) {
        let (n, at) = (self.w.form.n, block * LANES);
        let lanes = LANES.min(n - at);
        let weighted = self.w.weighted(block);
        let mut bias = [0.0; LANES];
        if let Some(all) = self.bias {
            bias[..lanes].copy_from_slice(&all[at..at + lanes]);
        }
        for (r, y) in y.iter().enumerate() {
            let at = (first + r) * n + at;
            // SAFETY: promised by the caller.
            let out = unsafe { self.out.part(at, lanes) };
            let (shift, scale) = x.finish(first + r);
            let done = |lane: usize| (y[lane] + shift * weighted[lane]) * scale + bias[lane];
            // A block of known length is a few vector instructions; the last one may be shorter.
            match (out.as_mut_array::<LANES>(), self.add) {
                (Some(out), None) => *out = std::array::from_fn(done),
                (Some(out), Some(add)) => {
                    let add = add[at..]
                        .first_chunk::<LANES>()
                        .unwrap_or_else(|| unreachable!("as long as the output"));
                    *out = std::array::from_fn(|lane| done(lane) + add[lane]);
                }
                (None, add) => put_some(out, done, add.map(|add| &add[at..])),
            }
        }
    }
}

/// The first rows of a block.
#[cold]
#[inline(never)]
fn put_some(out: &mut [f32], done: impl Fn(usize) -> f32, add: Option<&[f32]>) {
    for (lane, y) in out.iter_mut().enumerate() {
        *y = done(lane) + add.map_or(0.0, |add| add[lane]);
    }
}

/// `out[m, n] = x Wᵀ`, with what is added to it, for `x[m, k]` and each of some weights `W[n, k]`.
///
/// # Panics
/// If `x` was cut for other groups, or a length does not fit.
pub fn product(pool: &Pool, path: IntPath, x: &Digits, parts: &mut [Part<'_>], scratch: &Scratch) {
    let m = x.rows;
    for p in parts.iter() {
        let n = p.w.form.n;
        assert_eq!(
            (x.group, x.groups),
            (p.w.form.group, p.w.groups()),
            "groups of the two sides of a product"
        );
        assert_eq!(p.out.len(), m * n, "output of a product [{m}, {n}]");
        assert!(p.bias.is_none_or(|b| b.len() == n), "bias of a product [{m}, {n}]");
        assert!(p.add.is_none_or(|a| a.len() == m * n), "what is added to a product [{m}, {n}]");
    }
    if m == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    let unit = matches!(path.kind, Kind::Amx(_)) && m >= UNIT_ROWS;
    #[cfg(not(target_arch = "x86_64"))]
    let unit = false;
    let at_once = |w: &Tiles| if unit { ACROSS } else { TASK.div_ceil(w.block_bytes().max(1)) };
    let parts: SmallVec<[Shared<'_>; 4]> = parts
        .iter_mut()
        .map(|p| Shared {
            w: p.w,
            bias: p.bias,
            add: p.add,
            at_once: at_once(p.w),
            out: SharedMut::new(&mut *p.out),
        })
        .collect();
    // Strips of rows come first: what goes over rows before and after has its first rows on the same threads.
    let strips = if unit { (m / STRIP).clamp(1, pool.threads()) } else { 1 };
    let strip = m.div_ceil(strips).next_multiple_of(TILE_ROWS);
    let tasks = |p: &Shared<'_>| p.w.blocks().div_ceil(p.at_once);
    let across = parts.iter().map(tasks).sum::<usize>();
    pool.for_each(m.div_ceil(strip) * across, |task| {
        let first = task / across * strip;
        let rows = first..m.min(first + strip);
        let mut task = task % across;
        for p in &parts {
            let count = tasks(p);
            if task < count {
                let from = task * p.at_once;
                let blocks = from..p.w.blocks().min(from + p.at_once);
                // SAFETY: the rows of a block are in one task each.
                unsafe { run(path, unit, x, p, rows, blocks, scratch) };
                return;
            }
            task -= count;
        }
    });
}

/// Computes some rows of some blocks of a part.
///
/// # Safety
/// As [`Shared::put`].
unsafe fn run(
    path: IntPath,
    unit: bool,
    x: &Digits,
    p: &Shared<'_>,
    rows: Range<usize>,
    blocks: Range<usize>,
    scratch: &Scratch,
) {
    #[cfg(target_arch = "x86_64")]
    if unit {
        // SAFETY: promised by the caller.
        return unsafe { amx::run(x, p, rows, blocks, scratch) };
    }
    let _ = (unit, scratch);
    for block in blocks {
        for first in rows.clone().step_by(ROWS) {
            let mut y = [[0.0; LANES]; ROWS];
            let y = &mut y[..ROWS.min(rows.end - first)];
            match path.kind {
                Kind::Plain => path.isa.run(Plain { x, w: p.w, block, first, y }),
                // SAFETY: the machine has what the path says.
                #[cfg(target_arch = "x86_64")]
                Kind::Avx2 => unsafe { avx2::sums(x, p.w, block, first, y) },
                // SAFETY: the machine has what the path says; one with a matrix unit has VNNI as well.
                #[cfg(target_arch = "x86_64")]
                Kind::Vnni | Kind::Amx(_) => unsafe { vnni::sums(x, p.w, block, first, y) },
            }
            // The columns of this block are ours, as the caller promised.
            path.isa.run(Put { p, x, block, first, y });
        }
    }
}

/// [`Shared::put`]; whoever makes one keeps its promise.
struct Put<'a, 'p> {
    p: &'a Shared<'p>,
    x: &'a Digits,
    block: usize,
    first: usize,
    y: &'a [Sums],
}

impl Kernel for Put<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        // SAFETY: promised by whoever made this.
        unsafe { self.p.put(self.x, self.block, self.first, self.y) };
    }
}

/// Rows of the left side that share the unpacked codes.
const ROWS: usize = 4;
