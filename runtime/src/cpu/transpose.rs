//! Axes in another order.

use super::pool::Pool;
use super::simd::{Isa, Kernel, Lanes};

/// Elements that one task writes, about.
const CHUNK: usize = 32 * 1024;
/// Columns that are turned at a time, so that whole cache lines are read.
const TILE: usize = 32;
/// Rows that are turned at a time.
const RUN: usize = 256;
/// Rows and columns that are turned in registers.
const LANES: usize = 8;

/// `out` = `x` with axes permuted: axis `i` of the result is axis `perm[i]` of `x`, which has `shape`.
///
/// # Panics
/// If `perm` is no permutation of the axes or a length does not fit.
pub fn transpose(pool: &Pool, isa: Isa, x: &[f32], shape: &[usize], perm: &[usize], out: &mut [f32]) {
    assert_eq!(x.len(), shape.iter().product::<usize>(), "elements of {shape:?}");
    assert_eq!(x.len(), out.len(), "input and output of a transpose");
    let mut sorted = perm.to_vec();
    sorted.sort_unstable();
    assert!(sorted.iter().copied().eq(0..shape.len()), "{perm:?} orders the axes of {shape:?}");
    if x.is_empty() {
        return;
    }
    let axes = merged(shape, perm);
    match axes[..] {
        [] | [(_, 1)] => pool.for_chunks(out, CHUNK, |i, out| {
            out.copy_from_slice(&x[i * CHUNK..][..out.len()]);
        }),
        // The last two axes change places, in each of a list of matrices.
        [(cols, 1), (rows, _)] => turn(pool, isa, x, (rows, cols), out),
        [(_, whole), (cols, 1), (rows, step)] if step == cols && whole == rows * cols => {
            turn(pool, isa, x, (rows, cols), out);
        }
        [ref lead @ .., (n, step)] => {
            let per_task = (CHUNK / n).max(1);
            pool.for_chunks(out, per_task * n, |c, out| {
                for (r, out) in out.chunks_mut(n).enumerate() {
                    let (mut rest, mut at) = (c * per_task + r, 0);
                    for &(size, step) in lead.iter().rev() {
                        at += rest % size * step;
                        rest /= size;
                    }
                    match step {
                        1 => out.copy_from_slice(&x[at..at + n]),
                        _ => out.iter_mut().enumerate().for_each(|(i, y)| *y = x[at + i * step]),
                    }
                }
            });
        }
    }
}

/// Sizes of the result's axes and their steps in the operand; axes that stay neighbours are one, those of size 1 none.
fn merged(shape: &[usize], perm: &[usize]) -> Vec<(usize, usize)> {
    let step = |axis: usize| shape[axis + 1..].iter().product::<usize>();
    let mut axes: Vec<(usize, usize)> = Vec::new();
    for &axis in perm.iter().filter(|&&axis| shape[axis] != 1) {
        let (n, step) = (shape[axis], step(axis));
        match axes.last_mut() {
            Some((m, before)) if *before == n * step => (*m, *before) = (*m * n, step),
            _ => axes.push((n, step)),
        }
    }
    axes
}

/// Each matrix `[rows, cols]` of `x` turned to `[cols, rows]`.
fn turn(pool: &Pool, isa: Isa, x: &[f32], (rows, cols): (usize, usize), out: &mut [f32]) {
    // Whole tiles of result rows: their inputs are whole cache lines.
    let per_task = (CHUNK / rows).max(1).next_multiple_of(TILE);
    pool.for_chunks(out, per_task * rows, |c, mut out| {
        let mut first = c * per_task;
        while !out.is_empty() {
            let (matrix, col) = (first / cols, first % cols);
            let count = (cols - col).min(out.len() / rows);
            let (part, rest) = out.split_at_mut(count * rows);
            isa.run(Turn { x: &x[matrix * rows * cols..][..rows * cols], cols, col, out: part });
            first += count;
            out = rest;
        }
    });
}

/// Columns of `x[rows, cols]` from `col` on, as rows of `out`.
struct Turn<'a> {
    x: &'a [f32],
    cols: usize,
    col: usize,
    out: &'a mut [f32],
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Turn { x, cols, col, out } = self;
        let rows = x.len() / cols;
        let count = out.len() / rows;
        // Turned in a buffer, since result rows are often a multiple of 4096 bytes apart and push each other out of
        // the cache: each gets a long run at once.
        let mut buf = [[0.0f32; RUN]; TILE];
        for c in (0..count).step_by(TILE) {
            let width = TILE.min(count - c);
            for r in (0..rows).step_by(RUN) {
                let height = RUN.min(rows - r);
                let at = r * cols + col + c;
                let whole = (height / LANES * LANES, width / LANES * LANES);
                for i in (0..whole.0).step_by(LANES) {
                    for j in (0..whole.1).step_by(LANES) {
                        tile(&x[at + i * cols + j..], cols, &mut buf, (j, i));
                    }
                }
                for i in 0..height {
                    for j in if i < whole.0 { whole.1 } else { 0 }..width {
                        buf[j][i] = x[at + i * cols + j];
                    }
                }
                for j in 0..width {
                    out[(c + j) * rows + r..][..height].copy_from_slice(&buf[j][..height]);
                }
            }
        }
    }
}

/// Columns and rows of `x`, whose rows are `cols` apart, exchanged into the buffer from `(row, at)` on.
#[inline(always)]
fn tile(x: &[f32], cols: usize, buf: &mut [[f32; RUN]; TILE], (row, at): (usize, usize)) {
    for (j, line) in turned(corner(x, cols)).iter().enumerate() {
        buf[row + j][at..at + LANES].copy_from_slice(line);
    }
}

/// The first columns of the first rows of `x`, whose rows are `cols` apart.
#[inline(always)]
fn corner(x: &[f32], cols: usize) -> [[f32; LANES]; LANES] {
    let mut t = [[0.0; LANES]; LANES];
    for (i, t) in t.iter_mut().enumerate() {
        t.copy_from_slice(&x[i * cols..][..LANES]);
    }
    t
}

/// `x[rows, cols]` turned to `out[cols, rows]`, for matrices that fit the first-level cache.
pub(super) struct TurnSmall<'a> {
    pub x: &'a [f32],
    pub cols: usize,
    pub out: &'a mut [f32],
}

impl Kernel for TurnSmall<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let TurnSmall { x, cols, out } = self;
        let rows = x.len() / cols;
        let whole = (rows / LANES * LANES, cols / LANES * LANES);
        for i in (0..whole.0).step_by(LANES) {
            for j in (0..whole.1).step_by(LANES) {
                for (c, line) in turned(corner(&x[i * cols + j..], cols)).iter().enumerate() {
                    out[(j + c) * rows + i..][..LANES].copy_from_slice(line);
                }
            }
        }
        for i in 0..rows {
            for j in if i < whole.0 { whole.1 } else { 0 }..cols {
                out[j * rows + i] = x[i * cols + j];
            }
        }
    }
}

/// Rows and columns exchanged: few enough elements to be done in registers.
#[inline(always)]
pub(super) fn turned<T: Copy>(t: [[T; LANES]; LANES]) -> [[T; LANES]; LANES] {
    std::array::from_fn(|j| std::array::from_fn(|i| t[i][j]))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{noise, pools3};
    use super::*;

    fn naive(x: &[f32], shape: &[usize], perm: &[usize]) -> Vec<f32> {
        let out: Vec<usize> = perm.iter().map(|&p| shape[p]).collect();
        (0..x.len())
            .map(|at| {
                let (mut rest, mut place) = (at, vec![0; shape.len()]);
                for (axis, n) in out.iter().enumerate().rev() {
                    place[perm[axis]] = rest % n;
                    rest /= n;
                }
                x[place.iter().zip(shape).fold(0, |a, (i, n)| a * n + i)]
            })
            .collect()
    }

    #[test]
    fn every_order_matches_the_definition() {
        let cases: [(&[usize], &[usize]); 15] = [
            (&[], &[]),
            (&[7], &[0]),
            (&[40_000], &[0]),
            (&[16, 16], &[1, 0]),
            (&[33, 47], &[1, 0]),
            (&[1, 47], &[1, 0]),
            (&[700, 130], &[1, 0]),
            (&[5, 17, 33], &[0, 2, 1]),
            (&[3, 300, 70], &[0, 2, 1]),
            (&[3, 17, 9], &[2, 0, 1]),
            (&[2, 19, 3, 8], &[0, 2, 1, 3]),
            (&[2, 19, 1, 3, 8], &[0, 2, 3, 1, 4]),
            (&[2, 3, 4, 19, 8], &[0, 3, 1, 2, 4]),
            (&[5, 4, 3, 2], &[3, 2, 1, 0]),
            (&[3, 0, 4], &[2, 1, 0]),
        ];
        for (shape, perm) in cases {
            let x = noise(shape.iter().product(), 3);
            let want = naive(&x, shape, perm);
            for isa in Isa::available() {
                for pool in &pools3() {
                    let mut out = vec![f32::NAN; x.len()];
                    transpose(pool, isa, &x, shape, perm, &mut out);
                    assert!(out == want, "{shape:?} {perm:?} {}", isa.name());
                }
            }
        }
    }
}
