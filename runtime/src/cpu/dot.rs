//! One stored row against a few rows of `x`: what a matrix product is when memory sets the pace.

#[cfg(target_arch = "x86_64")]
use super::dot_avx512;
#[cfg(target_arch = "x86_64")]
use super::simd::Level;
use super::simd::{Isa, Kernel, Lanes};
#[cfg(target_arch = "x86_64")]
use super::tile_avx512;
#[cfg(target_arch = "x86_64")]
use super::weight::PackedRow;
use super::weight::{Row, fill};

/// How `x` must lie for a row of weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Layout {
    /// As it is.
    Natural,
    /// In each full run of 32 the 16 even elements first, then the 16 odd ones: the order in which
    /// the low and high halves of 16 bytes hold codes of four bits. See [`split_pairs`].
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "only AVX-512 has a kernel that reads it")
    )]
    SplitPairs,
    /// There is no fused kernel: dequantise the row and use [`Row::F32`].
    Unfused,
}

/// How `x` must lie for these rows of `k` elements.
pub(crate) fn layout(isa: Isa, row: &Row<'_>, k: usize) -> Layout {
    match (row, isa.level()) {
        #[cfg(target_arch = "x86_64")]
        (Row::Packed(p), Level::Avx512) => {
            if by_pairs(p, k) {
                Layout::SplitPairs
            } else if p.group.is_multiple_of(16) || p.group == k {
                Layout::Natural
            } else {
                Layout::Unfused
            }
        }
        _ => {
            let _ = k;
            Layout::Natural
        }
    }
}

/// Whether AVX-512 takes these codes of four bits in [`Layout::SplitPairs`].
#[cfg(target_arch = "x86_64")]
pub(crate) fn by_pairs(p: &PackedRow<'_>, k: usize) -> bool {
    p.bits == 4 && (p.group.is_multiple_of(32) || p.group == k)
}

/// Reorders rows of `k` elements for [`Layout::SplitPairs`].
pub(crate) fn split_pairs(x: &[f32], k: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(k).zip(out.chunks_exact_mut(k)) {
        let ((xs, x_tail), (outs, out_tail)) = (x.as_chunks::<32>(), out.as_chunks_mut::<32>());
        for (x, out) in xs.iter().zip(outs) {
            for i in 0..16 {
                out[i] = x[2 * i];
                out[i + 16] = x[2 * i + 1];
            }
        }
        out_tail.copy_from_slice(x_tail);
    }
}

/// The products of stored rows with the rows of `x`, up to four of these at once: product `(j, i)` of stored row
/// `j < count` and row `i` of `x` becomes `outs[i][at + j]`. `x` lies in the rows' [`Layout`]. A product does not
/// depend on how many rows there are.
pub(crate) fn dot_rows<'w, 'x>(
    isa: Isa,
    count: usize,
    row: impl Fn(usize) -> Row<'w> + Copy,
    x: impl Fn(usize) -> &'x [f32],
    outs: &mut [&mut [f32]],
    at: usize,
) {
    let mut i = 0;
    while i < outs.len() {
        i += match &mut outs[i..] {
            [a, b, c, d, ..] => {
                let outs = [a, b, c, d].map(|o| &mut o[at..at + count]);
                few(isa, count, row, [x(i), x(i + 1), x(i + 2), x(i + 3)], outs);
                4
            }
            [a, b, ..] => {
                few(isa, count, row, [x(i), x(i + 1)], [a, b].map(|o| &mut o[at..at + count]));
                2
            }
            [a] => {
                few(isa, count, row, [x(i)], [&mut a[at..at + count]]);
                1
            }
            [] => break,
        }
    }
}

fn few<'w, const M: usize>(
    isa: Isa,
    count: usize,
    row: impl Fn(usize) -> Row<'w>,
    x: [&[f32]; M],
    mut outs: [&mut [f32]; M],
) {
    let put = |j: usize, y: [f32; M]| {
        for (out, y) in outs.iter_mut().zip(y) {
            out[j] = y;
        }
    };
    match isa.level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => dot_avx512::dots(isa, count, row, x, put),
        _ => isa.run(Dots { count, row, x, put }),
    }
}

struct Dots<'x, R, P, const M: usize> {
    count: usize,
    row: R,
    x: [&'x [f32]; M],
    put: P,
}

impl<'w, R: Fn(usize) -> Row<'w>, P: FnMut(usize, [f32; M]), const M: usize> Kernel for Dots<'_, R, P, M> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        for j in 0..self.count {
            (self.put)(j, one::<L, M>((self.row)(j), self.x));
        }
    }
}

/// Lanes of a product. Many, so that each loop over them is a loop that LLVM vectorises and does not unroll whole.
const LANES: usize = 128;

#[inline(always)]
fn one<L: Lanes, const M: usize>(row: Row<'_>, x: [&[f32]; M]) -> [f32; M] {
    let mut acc = [[0f32; LANES]; M];
    let mut buf = [0f32; LANES];
    let k = x[0].len();
    for at in (0..k).step_by(LANES) {
        let n = LANES.min(k - at);
        let w = match row {
            Row::F32(w) => &w[at..at + n],
            _ => {
                fill(&row, at, &mut buf[..n]);
                &buf[..n]
            }
        };
        for (acc, x) in acc.iter_mut().zip(x) {
            for ((a, &x), &w) in acc.iter_mut().zip(&x[at..at + n]).zip(w) {
                *a = L::mul_add(x, w, *a);
            }
        }
    }
    for acc in &mut acc {
        let mut width = LANES / 2;
        while width > 0 {
            let (low, high) = acc.split_at_mut(width);
            for (l, &h) in low.iter_mut().zip(&*high) {
                *l += h;
            }
            width /= 2;
        }
    }
    acc.map(|a| a[0])
}

/// [`dot_rows`] for rows of floats and many rows of `x`: four stored rows at a time where that pays.
pub(crate) fn dot_floats<'w, 'x>(
    isa: Isa,
    count: usize,
    row: impl Fn(usize) -> &'w [f32] + Copy,
    x: impl Fn(usize) -> &'x [f32] + Copy,
    outs: &mut [&mut [f32]],
    at: usize,
) {
    #[cfg(target_arch = "x86_64")]
    let done = if isa.level() == Level::Avx512 { count / 4 * 4 } else { 0 };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    #[cfg(target_arch = "x86_64")]
    for first in (0..done).step_by(4) {
        let w = [row(first), row(first + 1), row(first + 2), row(first + 3)];
        for (i, outs) in outs.chunks_mut(4).enumerate() {
            tile_avx512::tile(isa, w, |r| x(4 * i + r), outs, at + first);
        }
    }
    dot_rows(isa, count - done, |j| Row::F32(row(done + j)), x, outs, at + done);
}
