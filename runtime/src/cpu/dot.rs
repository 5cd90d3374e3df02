//! One stored row against a few rows of `x`: what a matrix product is when memory sets the pace.

#[cfg(target_arch = "x86_64")]
use super::dot_avx512;
use super::simd::{Isa, Kernel, Lanes, Level, bf16_to_f32, f16_to_f32};
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
pub(crate) fn layout(row: &Row<'_>, k: usize) -> Layout {
    match row {
        Row::Packed(p) => match p.bits {
            4 if p.group.is_multiple_of(32) || p.group == k => Layout::SplitPairs,
            8 if p.group.is_multiple_of(16) || p.group == k => Layout::Natural,
            _ => Layout::Unfused,
        },
        _ => Layout::Natural,
    }
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

/// The products of one row with `M` rows of `x`, all of the same length, `x` in the row's [`Layout`].
/// The result for a row of `x` does not depend on `M`.
#[inline]
pub(crate) fn dot<const M: usize>(isa: Isa, row: Row<'_>, x: [&[f32]; M]) -> [f32; M] {
    match isa.level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => dot_avx512::dot(isa, row, x),
        _ => isa.run(Dot { row, x }),
    }
}

struct Dot<'a, const M: usize> {
    row: Row<'a>,
    x: [&'a [f32]; M],
}

impl<const M: usize> Kernel for Dot<'_, M> {
    type Output = [f32; M];

    #[inline(always)]
    fn run<L: Lanes>(self) -> [f32; M] {
        let mut acc = [[0f32; 16]; M];
        let k = self.x[0].len();
        let x = self.x.map(|x| &x[..k]);
        match self.row {
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
        let w = w.map(|h| widen(u16::from_le_bytes(h)));
        step::<L, M>(acc, &w, x, 16 * b);
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
            let w = codes.map(|c| scale * (f32::from(c) - zero));
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
            let low = codes.map(|c| scale * (f32::from(c & 15) - zero));
            step::<L, M>(acc, &low, x, base + 32 * b);
            let high = codes.map(|c| scale * (f32::from(c >> 4) - zero));
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
