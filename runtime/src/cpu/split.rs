//! Products of `f32` matrices as products of bfloat16 parts, on the matrix unit (AMX).
//!
//! With [`Parts::Both`] each factor is cut into a high and a low part, `x = h + l`, both rounded to nearest;
//! `h h' + h l' + l h'` is summed in `f32`. What is left out and what rounding loses is at most about `2^-16` of
//! `|x| |x'|` for each pair: enough for comparing losses, not a replacement for `f32` where results are kept. With
//! [`Parts::High`] it is `h h'` alone, as in training with bfloat16 products. The sum over the inner dimension runs in
//! one fixed order, so the bytes do not depend on threads.
#![allow(unsafe_code, reason = "AMX has no stable intrinsics; its instructions are written out")]

use std::arch::asm;

use super::pool::{Pool, Scratch, SharedMut};
use super::simd::Isa;

mod pack;

pub use pack::Operand;

/// Rows and columns of a block that one pass over the inner dimension computes: two tiles by two.
const BLOCK: usize = 32;
/// Inner elements of a tile.
const DEPTH: usize = 32;
/// 16-bit elements of the tiles of one part in a packed step: two tiles.
const PART: usize = 2 * 16 * DEPTH;
/// Row blocks that one task computes against all columns of its share.
const TASK_BLOCKS: usize = 8;
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
        if detect() && permit() { Some(Amx(())) } else { None }
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
        let steps = k.div_ceil(DEPTH);
        let (rows, cols) = (m.div_ceil(BLOCK), n.div_ceil(BLOCK));
        // Two 16-bit parts take as much room as one float; 16 floats more let the data start on a cache line.
        let mut left = scratch.take(rows * steps * step / 2 + 16);
        let mut right = scratch.take(cols * steps * step / 2 + 16);
        let (left, right) = (aligned(&mut left), aligned(&mut right));
        let isa = Isa::detect();
        pool.for_chunks(left, steps * step, |i, out| a.pack::<PARTS, false>(isa, (m, k), i * BLOCK, out));
        pool.for_chunks(right, steps * step, |i, out| b.pack::<PARTS, true>(isa, (n, k), i * BLOCK, out));
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

/// This thread's tile registers, given back when dropped.
struct Tiles;

impl Tiles {
    fn configure() -> Self {
        let mut config = [0u8; 64];
        config[0] = 1;
        for t in 0..8 {
            // Bytes of a row, and rows.
            config[16 + 2 * t] = 64;
            config[48 + t] = 16;
        }
        // SAFETY: only an `Amx` calls this; the configuration is a valid palette 1 in 64 readable bytes.
        unsafe { asm!("ldtilecfg [{0}]", in(reg) config.as_ptr(), options(nostack, readonly)) };
        Tiles
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the tiles were configured by `configure` on this thread; a `Tiles` stays in its task.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// `out[32, 32] = a b`, or `out + a b` if `add`, over packed operands of `steps` steps; rows of `out` are `stride`
/// elements apart.
///
/// # Safety
/// The tiles of this thread are configured as [`Tiles::configure`] does. The block at `out` is valid and written by
/// nobody else.
unsafe fn multiply<const PARTS: usize>(
    a: &[u16],
    b: &[u16],
    steps: usize,
    add: bool,
    out: *mut f32,
    stride: usize,
) {
    assert!(a.len() == steps * PARTS * PART && b.len() == a.len());
    /// The loop over steps; what it reads of each is `$body`, and `$bytes` long in each operand.
    macro_rules! tiles {
        ($bytes:literal, $($body:literal),*) => {
            asm!(
                "test {z}, {z}",
                "jz 4f",
                "tileloadd tmm0, [{c} + {t}*1]",
                "tileloadd tmm1, [{c} + {t}*1 + 64]",
                "tileloadd tmm2, [{d} + {t}*1]",
                "tileloadd tmm3, [{d} + {t}*1 + 64]",
                "jmp 5f",
                "4:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "5:",
                "test {n}, {n}",
                "jz 3f",
                "2:",
                "tileloadd tmm4, [{a} + {s}*1]",
                "tileloadd tmm5, [{a} + {s}*1 + 1024]",
                "tileloadd tmm6, [{b} + {s}*1]",
                "tileloadd tmm7, [{b} + {s}*1 + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                $($body,)*
                concat!("add {a}, ", $bytes),
                concat!("add {b}, ", $bytes),
                "dec {n}",
                "jnz 2b",
                "3:",
                "tilestored [{c} + {t}*1], tmm0",
                "tilestored [{c} + {t}*1 + 64], tmm1",
                "tilestored [{d} + {t}*1], tmm2",
                "tilestored [{d} + {t}*1 + 64], tmm3",
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                n = inout(reg) steps => _,
                z = in(reg) u64::from(add),
                c = in(reg) out,
                d = in(reg) out.add(16 * stride),
                s = in(reg) 64usize,
                t = in(reg) 4 * stride,
                options(nostack),
            )
        };
    }
    // SAFETY: each step reads as many bytes from `a` and from `b` as `add` skips, and their lengths were checked; the
    // stores write the four quarters of the block at `out`. The compiler knows no tile registers, so it keeps nothing in
    // them.
    unsafe {
        if PARTS == 1 {
            tiles!("2048",);
        } else {
            tiles!(
                "4096",
                "tileloadd tmm4, [{a} + {s}*1 + 2048]",
                "tileloadd tmm5, [{a} + {s}*1 + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm4, [{a} + {s}*1]",
                "tileloadd tmm5, [{a} + {s}*1 + 1024]",
                "tileloadd tmm6, [{b} + {s}*1 + 2048]",
                "tileloadd tmm7, [{b} + {s}*1 + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7"
            );
        }
    }
}

/// Whether the processor has tiles and bfloat16 products on them (CPUID leaf 7, EDX bits 24 and 22).
fn detect() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    __cpuid(0).eax >= 7 && {
        let edx = __cpuid_count(7, 0).edx;
        edx >> 24 & 1 == 1 && edx >> 22 & 1 == 1
    }
}

/// Asks Linux to let this process use tiles: `arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)`.
fn permit() -> bool {
    if !cfg!(target_os = "linux") {
        return false;
    }
    let result: i64;
    // SAFETY: the system call takes two numbers and touches no memory of this process.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") 158i64 => result,
            in("rdi") 0x1023,
            in("rsi") 18,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
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
}
