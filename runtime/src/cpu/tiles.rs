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

use super::pool::{Pool, Scratch, SharedMut};
use path::Kind;
use plain::Plain;

#[cfg(target_arch = "x86_64")]
mod amx;
mod digits;
mod layout;
mod path;
mod plain;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vnni;

pub use digits::{Digits, Side};
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
#[cfg(target_arch = "x86_64")]
const UNIT_ROWS: usize = 8;
/// Bytes of codes that one task reads, about.
const TASK: usize = 32 * 1024;

/// `out[m, n] = x Wᵀ` for `x[m, k]` and a weight `W[n, k]`.
///
/// # Panics
/// If `x` was cut for other groups, or a length does not fit.
pub fn product(pool: &Pool, path: IntPath, x: &Digits, w: &Tiles, out: &mut [f32], scratch: &Scratch) {
    let (m, n) = (x.rows, w.n);
    assert_eq!((x.group, x.groups), (w.group, w.groups()), "groups of the two sides of a product");
    assert_eq!(out.len(), m * n, "output of a product [{m}, {n}]");
    if out.is_empty() {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if let Kind::Amx(_) = path.0
        && m >= UNIT_ROWS
    {
        return amx::product(pool, x, w, out, scratch);
    }
    let _ = scratch;
    let out = SharedMut::new(out);
    let at_once = TASK.div_ceil(w.block_bytes().max(1));
    pool.for_each(w.blocks().div_ceil(at_once), |task| {
        for block in task * at_once..w.blocks().min((task + 1) * at_once) {
            let lanes = LANES.min(n - block * LANES);
            for first in (0..m).step_by(ROWS) {
                let mut y = [[0.0; LANES]; ROWS];
                let y = &mut y[..ROWS.min(m - first)];
                match path.0 {
                    Kind::Plain(isa) => isa.run(Plain { x, w, block, first, y }),
                    // SAFETY: the machine has what the path says; one with a matrix unit has VNNI as well.
                    #[cfg(target_arch = "x86_64")]
                    Kind::Vnni | Kind::Amx(_) => unsafe { vnni::sums(x, w, block, first, y) },
                }
                for (r, y) in y.iter().enumerate() {
                    // SAFETY: the columns of a block are written by one task.
                    let out = unsafe { out.part((first + r) * n + block * LANES, lanes) };
                    finish(x.finish(first + r), y, w.weighted(block), out);
                }
            }
        }
    });
}

/// Rows of the left side that share the unpacked codes.
const ROWS: usize = 4;

/// What is left to do with the sums of a row: the shift of the left side, and its scale.
#[inline(always)]
fn finish((shift, scale): (f32, f32), y: &Sums, weighted: &[f32; LANES], out: &mut [f32]) {
    for (lane, out) in out.iter_mut().enumerate() {
        *out = (y[lane] + shift * weighted[lane]) * scale;
    }
}
