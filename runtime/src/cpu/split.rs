//! Products of `f32` matrices as products of bfloat16 parts, on the matrix unit (AMX).
//!
//! With [`Parts::Both`] each factor is cut into a high and a low part, `x = h + l`, both rounded to nearest;
//! `h h' + h l' + l h'` is summed in `f32`. What is left out and what rounding loses is at most about `2^-16` of
//! `|x| |x'|` for each pair: enough for comparing losses, not a replacement for `f32` where results are kept. With
//! [`Parts::High`] it is `h h'` alone, as in training with bfloat16 products. The sum over the inner dimension runs in
//! one fixed order, so the bytes do not depend on threads.
#![allow(unsafe_code, reason = "tasks write disjoint blocks of one output")]

use super::pool::{Pool, Scratch, SharedMut};
use super::simd::Isa;

mod pack;
mod unit;

pub use pack::Operand;
pub(super) use unit::Tiles;
use unit::multiply;

/// Rows and columns of a block that one pass over the inner dimension computes: two tiles by two.
const BLOCK: usize = 32;
/// Inner elements of a tile.
const DEPTH: usize = 32;
/// 16-bit elements of the tiles of one part in a packed step: two tiles.
const PART: usize = 2 * 16 * DEPTH;
/// Row blocks that one task computes against all columns of its share.
const TASK_BLOCKS: usize = 4;
/// Steps of one pass over the rows: 24 KiB of the right side.
const RUN: usize = 6;

/// What of its factors a product keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parts {
    /// High and low part: errors of `2^-15`.
    Both,
    /// The nearest bfloat16: errors of `2^-7`.
    High,
}

/// The matrix unit of this process. There is no other way to get one than to ask for it.
#[derive(Clone, Copy, Debug)]
pub struct Amx(());

impl Amx {
    /// Asks the machine and the system for the matrix unit; call before threads are started.
    pub fn request() -> Option<Amx> {
        if unit::detect() && unit::permit() { Some(Amx(())) } else { None }
    }

    /// Whether the unit multiplies bytes, too.
    pub(super) fn multiplies_bytes(self) -> bool {
        unit::detect_bytes()
    }

    /// `out[m, n] = a bᵀ` for `a[m, k]` and `b[n, k]`; `out` is row-major and dense.
    ///
    /// The two may be one operand: then each block and its mirror image are computed once.
    ///
    /// # Panics
    /// If a length does not fit.
    #[allow(clippy::too_many_arguments, reason = "two operands, a result, and where and how")]
    pub fn product(
        self,
        pool: &Pool,
        parts: Parts,
        a: Operand<'_>,
        b: Operand<'_>,
        shape: (usize, usize, usize),
        out: &mut [f32],
        scratch: &Scratch,
    ) {
        match parts {
            Parts::Both => self.product_of::<2>(pool, a, b, shape, out, scratch),
            Parts::High => self.product_of::<1>(pool, a, b, shape, out, scratch),
        }
    }

    fn product_of<const PARTS: usize>(
        self,
        pool: &Pool,
        a: Operand<'_>,
        b: Operand<'_>,
        (m, k, n): (usize, usize, usize),
        out: &mut [f32],
        scratch: &Scratch,
    ) {
        let step = PARTS * PART;
        let lens = (a.data().len(), b.data().len(), out.len());
        assert_eq!(lens, (m * k, n * k, m * n), "a product [{m}, {k}] x [{k}, {n}]");
        if m == 0 || n == 0 {
            return;
        }
        let mirrored = m == n && a == b;
        let scales = a.scales().zip(b.scales());
        assert_eq!(a.scales().is_some(), b.scales().is_some(), "one operand on a grid");
        let count = scales.map_or((m, n), |(a, b)| (a.len(), b.len()));
        assert_eq!(count, (m, n), "scales of the rows of a product [{m}, {k}] x [{k}, {n}]");
        let steps = k.div_ceil(DEPTH);
        let (rows, cols) = (m.div_ceil(BLOCK), n.div_ceil(BLOCK));
        // Two 16-bit parts take as much room as one float; 16 floats more let the data start on a cache line.
        let mut left = scratch.take(rows * steps * step / 2 + 16);
        let mut right = scratch.take(cols * steps * step / 2 + 16);
        let (left, right) = (aligned(&mut left), aligned(&mut right));
        let isa = Isa::detect();
        a.pack::<PARTS, false>(pool, isa, (m, k), left);
        b.pack::<PARTS, true>(pool, isa, (n, k), right);
        let (left, right) = (&*left, &*right);
        // Column shares keep both threads busy when there are few rows.
        let share = if rows >= 4 * TASK_BLOCKS { cols } else { cols.div_ceil(4) };
        let (down, across) = (rows.div_ceil(TASK_BLOCKS), cols.div_ceil(share));
        let out = SharedMut::new(out);
        pool.for_each(down * across, |task| {
            // The last rows have the most to do in a mirrored product.
            let (r0, c0) = ((down - 1 - task / across) * TASK_BLOCKS, task % across * share);
            let _tiles = Tiles::configure();
            let mut edge = Box::new(Aligned([[0.0; BLOCK * BLOCK]; TASK_BLOCKS]));
            let r1 = rows.min(r0 + TASK_BLOCKS);
            for c in c0..cols.min(c0 + share) {
                let r0 = if mirrored { r0.max(c).min(r1) } else { r0 };
                let width = BLOCK.min(n - c * BLOCK);
                let height = |r: usize| BLOCK.min(m - r * BLOCK);
                let at = |r: usize| r * BLOCK * n + c * BLOCK;
                // A block that is also written turned, or in part, is finished beside `out`.
                let aside = |r: usize| (height(r), width) != (BLOCK, BLOCK) || mirrored;
                // A run of the right side stays in the first-level cache while all rows pass it.
                for from in (0..steps.max(1)).step_by(RUN) {
                    let run = RUN.min(steps - from);
                    let b = &right[(c * steps + from) * step..(c * steps + from + run) * step];
                    for r in r0..r1 {
                        let a = &left[(r * steps + from) * step..(r * steps + from + run) * step];
                        let (to, stride) = match aside(r) {
                            false => (out.ptr_at(at(r)), n),
                            true => (edge.0[r % TASK_BLOCKS].as_mut_ptr(), BLOCK),
                        };
                        // SAFETY: this thread's tiles are configured, and an `Amx` proves that the machine has them;
                        // the block lies inside `out` or `edge` and is this task's alone.
                        unsafe { multiply::<PARTS>(a, b, run, from > 0, to, stride) };
                    }
                }
                if let Some((down, across)) = scales {
                    let across = &across[c * BLOCK..][..width];
                    for (r, i) in (r0..r1).flat_map(|r| (0..height(r)).map(move |i| (r, i))) {
                        let row = match aside(r) {
                            // SAFETY: inside `out`; each block is written by one task.
                            false => unsafe { out.part(at(r) + i * n, width) },
                            true => &mut edge.0[r % TASK_BLOCKS][i * BLOCK..][..width],
                        };
                        let s = down[r * BLOCK + i];
                        row.iter_mut().zip(across).for_each(|(y, t)| *y = *y * s * t);
                    }
                }
                for r in (r0..r1).filter(|&r| aside(r)) {
                    let block = &edge.0[r % TASK_BLOCKS];
                    for i in 0..height(r) {
                        // SAFETY: inside `out`; each block is written by one task.
                        let row = unsafe { out.part(at(r) + i * n, width) };
                        row.copy_from_slice(&block[i * BLOCK..i * BLOCK + width]);
                    }
                    for j in (0..width).filter(|_| mirrored && r > c) {
                        // SAFETY: inside `out`; the mirror image of a block belongs to the task of the block.
                        let row = unsafe { out.part((c * BLOCK + j) * n + r * BLOCK, height(r)) };
                        row.iter_mut().enumerate().for_each(|(i, y)| *y = block[i * BLOCK + j]);
                    }
                }
            }
        });
    }
}

#[repr(align(64))]
struct Aligned([[f32; BLOCK * BLOCK]; TASK_BLOCKS]);

/// The part of a buffer that starts on a cache line, as 16-bit elements.
fn aligned(buf: &mut [f32]) -> &mut [u16] {
    let skip = buf.as_ptr().align_offset(64).min(16);
    let len = buf.len() - 16;
    bytemuck::cast_slice_mut(&mut buf[skip..skip + len])
}

#[cfg(test)]
mod tests {
    use super::super::testing::{bits, noise, pools3};
    use super::*;

    fn turned(x: &[f32], rows: usize, k: usize) -> Vec<f32> {
        (0..rows * k).map(|at| x[at % rows * k + at / rows]).collect()
    }

    fn check(parts: Parts, out: &[f32], a: &[f32], w: &[f32], (m, k, n): (usize, usize, usize)) {
        let most = if parts == Parts::Both { 2f64.powi(-15) } else { 2f64.powi(-7) };
        let cut = |x: f32| if parts == Parts::High { half::bf16::from_f32(x).to_f32() } else { x };
        for (at, &y) in out.iter().enumerate() {
            let (i, j) = (at / n, at % n);
            let pairs = (0..k).map(|p| (f64::from(a[i * k + p]), f64::from(w[j * k + p])));
            let (sum, size) = pairs.fold((0.0, 0.0), |(s, z), (x, y)| (s + x * y, z + (x * y).abs()));
            let error = (f64::from(y) - sum).abs();
            assert!(error <= size * most, "[{m}, {k}, {n}] at {i}, {j}: off by {error} of {size}");
            let kept: f64 = (0..k).map(|p| f64::from(cut(a[i * k + p])) * f64::from(cut(w[j * k + p]))).sum();
            assert!((f64::from(y) - kept).abs() <= size * 2f64.powi(-15), "[{m}, {k}, {n}] at {i}, {j}");
        }
    }

    #[test]
    fn close_to_exact_products_and_alike_on_any_threads_and_layouts() {
        let Some(amx) = Amx::request() else { return };
        for (m, k, n) in [(1, 1, 1), (33, 31, 40), (64, 576, 192), (70, 300, 97), (300, 64, 33)] {
            let (a, w) = (noise(m * k, 1), noise(n * k, 2));
            let (at, wt) = (turned(&a, m, k), turned(&w, n, k));
            for parts in [Parts::Both, Parts::High] {
                let mut first = None;
                for pool in &pools3() {
                    for a in [Operand::Rows(&a), Operand::Columns(&at)] {
                        for b in [Operand::Rows(&w), Operand::Columns(&wt)] {
                            let mut out = vec![7.0; m * n];
                            amx.product(pool, parts, a, b, (m, k, n), &mut out, &Scratch::new());
                            assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out));
                        }
                    }
                }
                let out: Vec<f32> = first.unwrap().into_iter().map(f32::from_bits).collect();
                check(parts, &out, &a, &w, (m, k, n));
            }
        }
    }

    #[test]
    fn a_matrix_times_itself_is_symmetric() {
        let Some(amx) = Amx::request() else { return };
        for (n, k) in [(1, 3), (31, 70), (64, 33), (300, 40), (1100, 10)] {
            let x = noise(n * k, 3);
            let xt = turned(&x, n, k);
            for pool in &pools3() {
                for (a, parts) in [
                    (Operand::Rows(&x), Parts::Both),
                    (Operand::Columns(&xt), Parts::Both),
                    (Operand::Rows(&x), Parts::High),
                ] {
                    let mut out = vec![7.0; n * n];
                    amx.product(pool, parts, a, a, (n, k, n), &mut out, &Scratch::new());
                    check(parts, &out, &x, &x, (n, k, n));
                    assert!((0..n * n).all(|at| at / n / BLOCK == at % n / BLOCK
                        || out[at].to_bits() == out[at % n * n + at / n].to_bits()));
                }
            }
        }
    }

    #[test]
    fn on_grids_products_are_of_whole_numbers() {
        let Some(amx) = Amx::request() else { return };
        for (m, k, n) in [(64, 32, 32), (70, 100, 33), (1, 5, 3), (130, 700, 40)] {
            let whole =
                |len, seed| noise(len, seed).iter().map(|x| (x * 127.0).round()).collect::<Vec<f32>>();
            let on = |codes: &[f32], scales: &[f32]| -> Vec<f32> {
                codes.iter().enumerate().map(|(i, c)| c * scales[i / k]).collect()
            };
            let (c, d) = (whole(m * k, 1), whole(n * k, 2));
            let scales = |len, seed| noise(len, seed).iter().map(|s| s.abs() + 1e-3).collect::<Vec<f32>>();
            let (s, t) = (scales(m, 3), scales(n, 4));
            let (x, w) = (on(&c, &s), on(&d, &t));
            for pool in &pools3() {
                let mut out = vec![f32::NAN; m * n];
                let (a, b) = (Operand::OnGrid(&x, &s), Operand::OnGrid(&w, &t));
                amx.product(pool, Parts::High, a, b, (m, k, n), &mut out, &Scratch::new());
                for (at, y) in out.iter().enumerate() {
                    let (i, j) = (at / n, at % n);
                    let sum: f32 = (0..k).map(|p| c[i * k + p] * d[j * k + p]).sum();
                    assert_eq!(*y, sum * s[i] * t[j], "[{m}, {k}, {n}] at {i}, {j}");
                }
            }
        }
    }
}
