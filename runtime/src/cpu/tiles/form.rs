//! Sizes of weights in tiles.

use serde::{Deserialize, Serialize};

use super::{LANES, LINE, PIECE};

/// What a weight in tiles is of, which decides how long its parts are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Form {
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// Width of a code, 2 to 8.
    pub bits: u8,
    /// Neighbours along a row that share a scale; divides `k`.
    pub group: usize,
    /// The zero point of all rows and groups, in terms of unsigned codes; `None` if each has its own.
    pub zero: Option<u8>,
}

impl Form {
    /// Bytes of the codes, the scales, the zero points and the weighted sums, see [`Tiles::parts`](super::Tiles::parts).
    pub fn lengths(&self) -> [usize; 4] {
        let each = self.blocks() * self.groups() * LANES;
        let zeros = if self.zero.is_none() { each } else { 0 };
        [self.blocks() * self.block_bytes(), 4 * each, zeros, 4 * self.blocks() * LANES]
    }

    pub(super) fn blocks(&self) -> usize {
        self.n.div_ceil(LANES)
    }

    pub(super) fn groups(&self) -> usize {
        self.k / self.group
    }

    pub(super) fn group_bytes(&self) -> usize {
        let (full, rest) = (self.group / PIECE, self.group % PIECE);
        full * piece_bytes(PIECE / 4, self.bits) + piece_bytes(rest.div_ceil(4), self.bits)
    }

    /// Bytes of the codes of sixteen rows.
    pub(super) fn block_bytes(&self) -> usize {
        self.groups() * self.group_bytes()
    }
}

/// Widths of the bit planes that codes are cut into, the lowest bits first.
pub(super) fn planes(bits: u8) -> impl Iterator<Item = u8> {
    let small = [4, 2, 1].into_iter().filter(move |p| bits < 8 && bits & p != 0);
    (bits == 8).then_some(8).into_iter().chain(small)
}

/// Stored lines of a plane of `width` bits for this many lines of four codes a row.
pub(super) fn stored_lines(lines: usize, width: u8) -> usize {
    (lines * usize::from(width)).div_ceil(8)
}

pub(super) fn piece_bytes(lines: usize, bits: u8) -> usize {
    planes(bits).map(|p| stored_lines(lines, p) * LINE).sum()
}
