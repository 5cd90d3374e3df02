//! Weights as they are stored, and their rows as `f32`.

use super::pool::Pool;
use super::simd::{Isa, Kernel, Lanes, bf16_to_f32, f16_to_f32};

/// The stored elements of a weight `[n, k]`, row-major.
#[derive(Clone, Copy, Debug)]
pub enum WeightView<'a> {
    /// `n * k` floats.
    F32(&'a [f32]),
    /// Little-endian half precision, `2 * n * k` bytes at any address.
    F16(&'a [u8]),
    /// Little-endian bfloat16, `2 * n * k` bytes at any address.
    BF16(&'a [u8]),
    /// Integer codes in the canonical dense storage (see `qrmc_ir::RawWeight`): a bit stream, least significant
    /// bit first, each row on a byte boundary, signed codes stored plus `2^(bits-1)`.
    ///
    /// An element is `scale * (code - zero) as f32`, the product rounded once.
    Packed {
        /// 2 to 8.
        bits: u8,
        /// Two's complement codes without zero points.
        signed: bool,
        /// `n * ceil(bits * k / 8)` bytes.
        codes: &'a [u8],
        /// Neighbours along a row that share a scale; divides `k`.
        group: usize,
        /// `[n, k / group]`.
        scales: &'a [f32],
        /// `[n, k / group]`, in the range of the codes; 0 if absent. Not with signed codes.
        zeros: Option<&'a [u8]>,
    },
}

/// One row of packed codes with what is needed to read it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedRow<'a> {
    pub(crate) bits: u8,
    pub(crate) codes: &'a [u8],
    pub(crate) group: usize,
    pub(crate) scales: &'a [f32],
    pub(crate) zeros: Option<&'a [u8]>,
    /// The zero point where `zeros` is absent, in terms of stored codes.
    pub(crate) zero: f32,
}

impl PackedRow<'_> {
    /// Scale and zero point of a group.
    #[inline(always)]
    pub(crate) fn params(&self, group: usize) -> (f32, f32) {
        (self.scales[group], self.zeros.map_or(self.zero, |z| f32::from(z[group])))
    }
}

/// One row of a weight.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Row<'a> {
    F32(&'a [f32]),
    F16(&'a [u8]),
    BF16(&'a [u8]),
    Packed(PackedRow<'a>),
}

impl<'a> WeightView<'a> {
    /// Bytes of one row of `k` elements, scales aside.
    pub fn row_bytes(&self, k: usize) -> usize {
        match self {
            WeightView::F32(_) => 4 * k,
            WeightView::F16(_) | WeightView::BF16(_) => 2 * k,
            WeightView::Packed { bits, .. } => (usize::from(*bits) * k).div_ceil(8),
        }
    }

    /// Panics unless this holds `n` rows of `k` elements.
    pub(crate) fn check(&self, n: usize, k: usize) {
        match *self {
            WeightView::F32(w) => assert_eq!(w.len(), n * k, "elements of a weight [{n}, {k}]"),
            WeightView::F16(w) | WeightView::BF16(w) => {
                assert_eq!(w.len(), 2 * n * k, "bytes of a 16-bit weight [{n}, {k}]");
            }
            WeightView::Packed { bits, signed, codes, group, scales, zeros } => {
                assert!((2..=8).contains(&bits), "codes of {bits} bits");
                assert!(group > 0 && k.is_multiple_of(group), "groups of {group} in rows of {k}");
                assert_eq!(codes.len(), n * self.row_bytes(k), "bytes of codes of a weight [{n}, {k}]");
                assert_eq!(scales.len(), n * (k / group), "scales of a weight [{n}, {k}] by {group}");
                assert!(zeros.is_none_or(|z| !signed && z.len() == scales.len()), "zero points of a weight");
            }
        }
    }

    /// Reads rows of `k` elements one after another.
    pub(crate) fn reader(&self, k: usize) -> RowReader<'a> {
        let groups = if let WeightView::Packed { group, .. } = self { k / group } else { 0 };
        RowReader { view: *self, k, bytes: self.row_bytes(k), groups }
    }
}

/// The rows of a weight, with what all of them share computed once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowReader<'a> {
    view: WeightView<'a>,
    k: usize,
    bytes: usize,
    groups: usize,
}

impl<'a> RowReader<'a> {
    /// Row `r`.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> Row<'a> {
        let (k, bytes, groups) = (self.k, self.bytes, self.groups);
        match self.view {
            WeightView::F32(w) => Row::F32(&w[r * k..][..k]),
            WeightView::F16(w) => Row::F16(&w[r * bytes..][..bytes]),
            WeightView::BF16(w) => Row::BF16(&w[r * bytes..][..bytes]),
            WeightView::Packed { bits, signed, codes, group, scales, zeros } => Row::Packed(PackedRow {
                bits,
                codes: &codes[r * bytes..][..bytes],
                group,
                scales: &scales[r * groups..][..groups],
                zeros: zeros.map(|z| &z[r * groups..][..groups]),
                zero: if signed { f32::from(1u8 << (bits - 1)) } else { 0.0 },
            }),
        }
    }
}

/// Row `row` of `view` (rows of `out.len()` elements) as floats.
///
/// # Panics
/// If the row is outside the weight.
pub fn dequantize_row(isa: Isa, view: &WeightView<'_>, row: usize, out: &mut [f32]) {
    let k = out.len();
    isa.run(Dequantize { row: view.reader(k).row(row), out });
}

/// Rows `ids` of a weight `[n, k]`, one after another: `out` is `[ids.len(), k]`.
///
/// # Panics
/// If an id is outside `0..n` or a length does not fit.
pub fn gather_rows(
    pool: &Pool,
    isa: Isa,
    view: &WeightView<'_>,
    n: usize,
    ids: &[i32],
    k: usize,
    out: &mut [f32],
) {
    view.check(n, k);
    assert_eq!(out.len(), ids.len() * k, "output of {} rows of {k}", ids.len());
    if k == 0 {
        return;
    }
    let rows = (32 * 1024usize).div_ceil(k);
    pool.for_chunks(out, rows * k, |chunk, out| {
        for (i, out) in out.chunks_mut(k).enumerate() {
            let id = ids[chunk * rows + i];
            let row = usize::try_from(id).ok().filter(|&r| r < n);
            dequantize_row(isa, view, row.unwrap_or_else(|| panic!("row {id} of a weight of {n} rows")), out);
        }
    });
}

/// Columns `from..from + count` of all rows of a weight `[n, k]`, one after another: `out` is `[n, count]`.
///
/// # Panics
/// If a length does not fit.
pub fn read_part(isa: Isa, view: &WeightView<'_>, k: usize, from: usize, count: usize, out: &mut [f32]) {
    assert!(from + count <= k && out.len().is_multiple_of(count.max(1)), "columns {from}+{count} of {k}");
    view.check(out.len() / count.max(1), k);
    isa.run(Part { reader: view.reader(k), k, from, count, out });
}

struct Part<'a> {
    reader: RowReader<'a>,
    k: usize,
    from: usize,
    count: usize,
    out: &'a mut [f32],
}

impl Kernel for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Part { reader, k, from, count, out } = self;
        if from.is_multiple_of(8) {
            for (r, out) in out.chunks_exact_mut(count).enumerate() {
                fill(&reader.row(r), from, out);
            }
            return;
        }
        let mut row = vec![0.0; k];
        for (r, out) in out.chunks_exact_mut(count).enumerate() {
            fill(&reader.row(r), 0, &mut row);
            out.copy_from_slice(&row[from..from + count]);
        }
    }
}

/// Writes one row as floats.
pub(crate) struct Dequantize<'a> {
    pub(crate) row: Row<'a>,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Dequantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        fill(&self.row, 0, self.out);
    }
}

/// Elements `at..at + out.len()` of a row, `at` being a multiple of 8.
#[inline(always)]
pub(crate) fn fill(row: &Row<'_>, at: usize, out: &mut [f32]) {
    let n = out.len();
    match *row {
        Row::F32(w) => out.copy_from_slice(&w[at..at + n]),
        Row::F16(w) => {
            let (halves, _) = w[2 * at..2 * (at + n)].as_chunks::<2>();
            for (o, &b) in out.iter_mut().zip(halves) {
                *o = f16_to_f32(u16::from_le_bytes(b));
            }
        }
        Row::BF16(w) => {
            let (halves, _) = w[2 * at..2 * (at + n)].as_chunks::<2>();
            for (o, &b) in out.iter_mut().zip(halves) {
                *o = bf16_to_f32(u16::from_le_bytes(b));
            }
        }
        Row::Packed(p) => {
            let bits = usize::from(p.bits);
            let codes = &p.codes[at * bits / 8..((at + n) * bits).div_ceil(8)];
            match bits {
                2 => unpack::<2>(codes, out),
                3 => unpack::<3>(codes, out),
                4 => unpack4(codes, out),
                5 => unpack::<5>(codes, out),
                6 => unpack::<6>(codes, out),
                7 => unpack::<7>(codes, out),
                _ => {
                    for (o, &c) in out.iter_mut().zip(codes) {
                        *o = f32::from(c);
                    }
                }
            }
            let (mut group, mut left, mut rest) = (at / p.group, p.group - at % p.group, out);
            while !rest.is_empty() {
                let (now, later) = rest.split_at_mut(left.min(rest.len()));
                let (scale, zero) = p.params(group);
                for o in now {
                    *o = scale * (*o - zero);
                }
                (group, left, rest) = (group + 1, p.group, later);
            }
        }
    }
}

/// Codes of four bits as floats.
#[inline(always)]
fn unpack4(bytes: &[u8], out: &mut [f32]) {
    let (pairs, rest) = out.as_chunks_mut::<2>();
    for (o, &b) in pairs.iter_mut().zip(bytes) {
        *o = [f32::from(b & 15), f32::from(b >> 4)];
    }
    if let (Some(o), Some(&b)) = (rest.first_mut(), bytes.last()) {
        *o = f32::from(b & 15);
    }
}

/// Codes of `BITS` bits as floats. Eight codes fill `BITS` bytes.
#[inline(always)]
fn unpack<const BITS: usize>(bytes: &[u8], out: &mut [f32]) {
    let eight = |bytes: &[u8]| -> [f32; 8] {
        let mut word = [0u8; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        let word = u64::from_le_bytes(word);
        std::array::from_fn(|i| ((word >> (i * BITS)) as u32 & ((1 << BITS) - 1)) as f32)
    };
    let (full, rest) = out.as_chunks_mut::<8>();
    let (words, tail) = bytes.split_at(full.len() * BITS);
    for (o, w) in full.iter_mut().zip(words.as_chunks::<BITS>().0) {
        *o = eight(w);
    }
    if !rest.is_empty() {
        rest.copy_from_slice(&eight(tail)[..rest.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{bits, pools};
    use super::*;
    use qrmc_ir::pack::pack_row;

    #[test]
    fn every_width_is_read_exactly() {
        for b in 2..=8u8 {
            for (k, group) in [(1, 1), (7, 7), (13, 13), (24, 8), (96, 32), (100, 100), (65, 5)] {
                let n = 3;
                let codes: Vec<u8> = (0..n * k).map(|i| (i * 37 % (1 << b)) as u8).collect();
                let mut stream = Vec::new();
                codes.chunks(k).for_each(|r| pack_row(r.iter().copied(), b, &mut stream));
                let scales: Vec<f32> = (0..n * k / group).map(|i| 0.37 + i as f32 * 0.011).collect();
                let zeros: Vec<u8> = (0..n * k / group).map(|i| (i * 5 % (1 << b)) as u8).collect();
                for (signed, zeros) in [(false, None), (false, Some(&zeros[..])), (true, None)] {
                    let view =
                        WeightView::Packed { bits: b, signed, codes: &stream, group, scales: &scales, zeros };
                    view.check(n, k);
                    let want: Vec<f32> = (0..n * k)
                        .map(|i| {
                            let g = i / k * (k / group) + i % k / group;
                            let zero =
                                zeros.map_or(if signed { 1 << (b - 1) } else { 0 }, |z| i32::from(z[g]));
                            scales[g] * (i32::from(codes[i]) - zero) as f32
                        })
                        .collect();
                    for isa in Isa::available() {
                        for pool in &pools() {
                            let mut out = vec![0.0; 4 * k];
                            gather_rows(pool, isa, &view, n, &[2, 0, 1, 2], k, &mut out);
                            let want: Vec<f32> = [2, 0, 1, 2]
                                .iter()
                                .flat_map(|&r| want[r * k..(r + 1) * k].to_vec())
                                .collect();
                            assert_eq!(bits(&out), bits(&want), "{b} bits, k {k}, {}", isa.name());
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "row 3 of a weight of 3 rows")]
    fn an_id_outside_is_refused() {
        let pool = &pools()[0];
        gather_rows(pool, Isa::detect(), &WeightView::F32(&[0.0; 6]), 3, &[3], 2, &mut [0.0; 2]);
    }
}
