//! One stored row against a few rows of `x`: what a matrix product is when memory sets the pace.

#[cfg(target_arch = "x86_64")]
use super::dot_avx512;
#[cfg(target_arch = "x86_64")]
use super::simd::Level;
use super::simd::{Isa, Kernel, Lanes, bf16_to_f32, f16_to_f32};
#[cfg(target_arch = "x86_64")]
use super::tile_avx512;
use super::weight::{PackedRow, Row};

/// How `x` must lie for a row of weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Layout {
    /// As it is.
    Natural,
    /// In each full run of 32 the 16 even elements first, then the 16 odd ones: the order in which
    /// the low and high halves of 16 bytes hold codes of four bits. See [`split_pairs`].
    SplitPairs,
    /// There is no fused kernel: dequantise the row and use [`Row::F32`].
    Unfused,
}

/// How `x` must lie for these rows of `k` elements.
pub(crate) fn layout(isa: Isa, row: &Row<'_>, k: usize) -> Layout {
    #[cfg(target_arch = "x86_64")]
    let every_width = isa.level() == Level::Avx512;
    #[cfg(not(target_arch = "x86_64"))]
    let every_width = false;
    match row {
        Row::Packed(p) if by_pairs(p, k) => Layout::SplitPairs,
        Row::Packed(p) => match p.group.is_multiple_of(16) || p.group == k {
            true if p.bits == 8 || every_width => Layout::Natural,
            _ => Layout::Unfused,
        },
        _ => Layout::Natural,
    }
}

/// Whether there is a kernel for these codes of four bits.
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

#[inline(always)]
fn one<L: Lanes, const M: usize>(row: Row<'_>, x: [&[f32]; M]) -> [f32; M] {
    let mut acc = [[0f32; 16]; M];
    let k = x[0].len();
    let x = x.map(|x| &x[..k]);
    match row {
        Row::F32(w) => {
            let (blocks, _) = w.as_chunks::<16>();
            for (b, w) in blocks.iter().enumerate() {
                step::<L, M>(&mut acc, w, x, 16 * b);
            }
            tail::<L, M>(&mut acc, x, k / 16 * 16, k, |i| w[i]);
        }
        Row::F16(w) => {
            let (halves, _) = w.as_chunks::<2>();
            sixteen::<L, M>(&mut acc, x, halves, f16_to_f32);
        }
        Row::BF16(w) => {
            let (halves, _) = w.as_chunks::<2>();
            sixteen::<L, M>(&mut acc, x, halves, bf16_to_f32);
        }
        Row::Packed(p) if p.bits == 8 => packed8::<L, M>(&mut acc, x, p),
        Row::Packed(p) => packed4::<L, M>(&mut acc, x, p),
    }
    acc.map(fold)
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
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        while count - done >= 4 {
            let w = [row(done), row(done + 1), row(done + 2), row(done + 3)];
            for (i, outs) in outs.chunks_mut(4).enumerate() {
                tile_avx512::tile(isa, w, |r| x(4 * i + r), outs, at + done);
            }
            done += 4;
        }
    }
    dot_rows(isa, count - done, |j| Row::F32(row(done + j)), x, outs, at + done);
}

/// Sixteen products added to sixteen lanes.
#[inline(always)]
fn step<L: Lanes, const M: usize>(acc: &mut [[f32; 16]; M], w: &[f32; 16], x: [&[f32]; M], at: usize) {
    for (acc, x) in acc.iter_mut().zip(x) {
        let x = &x[at..at + 16];
        for l in 0..16 {
            acc[l] = L::mul_add(x[l], w[l], acc[l]);
        }
    }
}

/// The elements `from..to`, fewer than the kernel's block, one by one.
#[inline(always)]
fn tail<L: Lanes, const M: usize>(
    acc: &mut [[f32; 16]; M],
    x: [&[f32]; M],
    from: usize,
    to: usize,
    w: impl Fn(usize) -> f32,
) {
    for i in from..to {
        let w = w(i);
        for (acc, x) in acc.iter_mut().zip(x) {
            acc[i % 16] = L::mul_add(x[i], w, acc[i % 16]);
        }
    }
}

#[inline(always)]
fn sixteen<L: Lanes, const M: usize>(
    acc: &mut [[f32; 16]; M],
    x: [&[f32]; M],
    halves: &[[u8; 2]],
    widen: impl Fn(u16) -> f32,
) {
    let (blocks, _) = halves.as_chunks::<16>();
    for (b, w) in blocks.iter().enumerate() {
        let mut wide = [0f32; 16];
        for l in 0..16 {
            wide[l] = widen(u16::from_le_bytes(w[l]));
        }
        step::<L, M>(acc, &wide, x, 16 * b);
    }
    let k = halves.len();
    tail::<L, M>(acc, x, k / 16 * 16, k, |i| widen(u16::from_le_bytes(halves[i])));
}

#[inline(always)]
fn packed8<L: Lanes, const M: usize>(acc: &mut [[f32; 16]; M], x: [&[f32]; M], p: PackedRow<'_>) {
    for (g, codes) in p.codes.chunks_exact(p.group).enumerate() {
        let ((scale, zero), base) = (p.params(g), g * p.group);
        let (blocks, _) = codes.as_chunks::<16>();
        for (b, codes) in blocks.iter().enumerate() {
            let mut w = [0f32; 16];
            for l in 0..16 {
                w[l] = scale * (f32::from(codes[l]) - zero);
            }
            step::<L, M>(acc, &w, x, base + 16 * b);
        }
        let whole = codes.len() / 16 * 16;
        tail::<L, M>(acc, x, base + whole, base + codes.len(), |i| {
            scale * (f32::from(codes[i - base]) - zero)
        });
    }
}

#[inline(always)]
fn packed4<L: Lanes, const M: usize>(acc: &mut [[f32; 16]; M], x: [&[f32]; M], p: PackedRow<'_>) {
    let k = x[0].len();
    for (g, codes) in p.codes.chunks(p.group.div_ceil(2)).enumerate() {
        let ((scale, zero), base) = (p.params(g), g * p.group);
        let (blocks, _) = codes.as_chunks::<16>();
        let whole = (p.group / 32).min(blocks.len());
        for (b, codes) in blocks[..whole].iter().enumerate() {
            let (mut low, mut high) = ([0f32; 16], [0f32; 16]);
            for l in 0..16 {
                low[l] = scale * (f32::from(codes[l] & 15) - zero);
                high[l] = scale * (f32::from(codes[l] >> 4) - zero);
            }
            step::<L, M>(acc, &low, x, base + 32 * b);
            step::<L, M>(acc, &high, x, base + 32 * b + 16);
        }
        tail::<L, M>(acc, x, base + 32 * whole, (base + p.group).min(k), |i| {
            let i = i - base;
            scale * (f32::from(codes[i / 2] >> (4 * (i % 2)) & 15) - zero)
        });
    }
}

/// The sum of sixteen lanes as a tree.
#[inline(always)]
pub(crate) fn fold(lanes: [f32; 16]) -> f32 {
    let a: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let b: [f32; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
    (b[0] + b[2]) + (b[1] + b[3])
}
