//! How the codes of a weight lie in memory.

use bytes::Bytes;

use super::form::{Form, piece_bytes, planes, stored_lines};
use super::stored::Stored;
use super::{LANES, LINE, PIECE};

/// A weight `[n, k]` in the order in which the kernels read it. Copies share their memory.
#[derive(Clone, PartialEq, Debug)]
pub struct Tiles {
    pub(super) form: Form,
    /// By block of sixteen rows, group, and piece: see [`Tiles::next_piece`].
    codes: Stored<u8>,
    /// By block, group and row; 0 for rows beyond the last.
    scales: Stored<f32>,
    zeros: Zeros,
    /// `Σ s (c - z)` of each row, what an offset of the left side is multiplied by.
    weighted: Stored<f32>,
}

/// The zero points in terms of unsigned codes.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Zeros {
    All(u8),
    /// By block, group and row.
    Each(Stored<u8>),
}

impl Tiles {
    pub(super) fn of(
        form: Form,
        codes: Stored<u8>,
        scales: Stored<f32>,
        zeros: Zeros,
        weighted: Stored<f32>,
    ) -> Self {
        Tiles { form, codes, scales, zeros, weighted }
    }

    /// A weight whose [`Tiles::parts`] lie in shared bytes; `None` if a part has another length than the form needs, lies at
    /// an odd address, or the host is big-endian.
    pub fn shared(form: Form, parts: [Bytes; 4]) -> Option<Self> {
        if [0, 1, 2, 3].map(|i| parts[i].len()) != form.lengths() {
            return None;
        }
        let [codes, scales, zeros, weighted] = parts;
        let zeros = match form.zero {
            Some(z) => Zeros::All(z),
            None => Zeros::Each(Stored::shared(zeros)?),
        };
        let (codes, scales) = (Stored::shared(codes)?, Stored::shared(scales)?);
        Some(Tiles::of(form, codes, scales, zeros, Stored::shared(weighted)?))
    }

    /// The bytes of codes, scales, zero points and weighted sums, as they lie in memory.
    pub fn parts(&self) -> [&[u8]; 4] {
        let zeros: &[u8] = if let Zeros::Each(z) = &self.zeros { z } else { &[] };
        [&self.codes, self.scales.bytes(), zeros, self.weighted.bytes()]
    }

    /// Shape, codes, groups and zero points.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.parts().iter().map(|p| p.len()).sum()
    }

    /// Rows and columns of the weight.
    pub fn shape(&self) -> (usize, usize) {
        (self.form.n, self.form.k)
    }

    /// Neighbours along a row that share a scale.
    pub fn group(&self) -> usize {
        self.form.group
    }

    /// Row `row` as floats.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not as long as one.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.form.n && out.len() == self.form.k,
            "row {row} of {}, {} columns",
            self.form.n,
            out.len()
        );
        let (block, lane) = (row / LANES, row % LANES);
        let mut codes = [0; PIECE / 4 * LINE];
        let mut rest = self.block_codes(block);
        for (g, out) in out.chunks_exact_mut(self.form.group).enumerate() {
            let (scale, zero) = (self.scales(block, g)[lane], f32::from(self.zero(block, g, lane)));
            for (i, out) in out.chunks_mut(PIECE).enumerate() {
                let (stored, lines, later) = self.next_piece(rest, i);
                rest = later;
                unpack(stored, lines, self.form.bits, &mut codes);
                for (j, o) in out.iter_mut().enumerate() {
                    *o = scale * (f32::from(codes[j / 4 * LINE + 4 * lane + j % 4]) - zero);
                }
            }
        }
    }

    pub(super) fn blocks(&self) -> usize {
        self.form.blocks()
    }

    pub(super) fn groups(&self) -> usize {
        self.form.groups()
    }

    /// Bytes of the codes of sixteen rows.
    pub(super) fn block_bytes(&self) -> usize {
        self.form.block_bytes()
    }

    /// All pieces of a block, one after another.
    #[inline(always)]
    pub(super) fn block_codes(&self, block: usize) -> &[u8] {
        self.codes(block..block + 1)
    }

    /// All pieces of some blocks, one block after another.
    #[inline(always)]
    pub(super) fn codes(&self, blocks: std::ops::Range<usize>) -> &[u8] {
        let each = self.block_bytes();
        &self.codes[blocks.start * each..blocks.end * each]
    }

    /// The first piece of `rest`, which is number `i` of its group, the lines that it holds, and what follows.
    ///
    /// It is the codes `64 i ..` of the group for the rows of the block. Line `l` holds the codes `4 l .. 4 l + 4` of each row,
    /// row after row, a byte each; the last line is filled up with codes that the left side multiplies by 0. A plane of `p`
    /// bits keeps the lines `s`, `s + t`, `s + 2 t`, … in the bits `0..p`, `p..2 p`, … of its line `s < t`.
    #[inline(always)]
    pub(super) fn next_piece<'a>(&self, rest: &'a [u8], i: usize) -> (&'a [u8], usize, &'a [u8]) {
        let lines = (self.form.group - i * PIECE).min(PIECE).div_ceil(4);
        let (now, later) = rest.split_at(piece_bytes(lines, self.form.bits));
        (now, lines, later)
    }

    /// Scales of the rows of a block.
    #[inline(always)]
    pub(super) fn scales(&self, block: usize, group: usize) -> &[f32; LANES] {
        let at = (block * self.groups() + group) * LANES;
        self.scales[at..at + LANES].as_array().unwrap_or_else(|| unreachable!("sixteen"))
    }

    /// The zero point of one row.
    fn zero(&self, block: usize, group: usize, lane: usize) -> u8 {
        match &self.zeros {
            Zeros::All(z) => *z,
            Zeros::Each(all) => all[(block * self.groups() + group) * LANES + lane],
        }
    }

    /// Zero points of the rows of a block.
    #[inline(always)]
    pub(super) fn zeros(&self, block: usize, group: usize) -> [u8; LANES] {
        match &self.zeros {
            Zeros::All(z) => [*z; LANES],
            Zeros::Each(all) => {
                let at = (block * self.groups() + group) * LANES;
                *all[at..at + LANES].as_array().unwrap_or_else(|| unreachable!("sixteen"))
            }
        }
    }

    /// `Σ s (c - z)` of the rows of a block.
    #[inline(always)]
    pub(super) fn weighted(&self, block: usize) -> &[f32; LANES] {
        let at = block * LANES;
        self.weighted[at..at + LANES].as_array().unwrap_or_else(|| unreachable!("sixteen"))
    }
}

/// An expression for each line of a full piece, with its number as a constant: what depends on the number is known when this
/// is compiled.
#[cfg(target_arch = "x86_64")]
macro_rules! every_line {
    ($l:ident => $do:expr) => {
        every_line!(@ $l => $do; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $l:ident => $do:expr; $($n:literal)*) => {
        {$({
            let $l: usize = $n;
            $do
        })*}
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use every_line;

/// The lines of a piece, a code a byte.
#[inline(always)]
pub(super) fn unpack(stored: &[u8], lines: usize, bits: u8, out: &mut [u8; PIECE / 4 * LINE]) {
    let (mut at, mut base) = (0, 0);
    for p in planes(bits) {
        let count = stored_lines(lines, p);
        let mask = ((1u16 << p) - 1) as u8;
        for line in 0..lines {
            let (from, shift) = (at + line % count * LINE, line / count * usize::from(p));
            for i in 0..LINE {
                let part = (stored[from + i] >> shift & mask) << base;
                let o = &mut out[line * LINE + i];
                *o = if base == 0 { part } else { *o | part };
            }
        }
        at += count * LINE;
        base += p;
    }
}
