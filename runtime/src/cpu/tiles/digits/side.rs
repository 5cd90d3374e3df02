//! What is on the left of a product, before it is cut.

use super::PIECE;

/// What is on the left of a product `[m, k]`.
#[derive(Clone, Copy, Debug)]
pub enum Side<'a> {
    /// `m * k` floats.
    Floats(&'a [f32]),
    /// Unsigned codes with a scale and a zero point for each run of a row.
    Unsigned {
        /// `m * k` codes.
        codes: &'a [u8],
        /// Their width, up to 8.
        bits: u8,
        /// `m * k / run` scales.
        scales: &'a [f32],
        /// `m * k / run` zero points.
        zeros: &'a [u8],
        /// Neighbours that share a scale: all of a row, or see [`Side::runs`].
        run: usize,
    },
    /// Signed codes with a scale for each run of a row.
    Signed {
        /// `m * k` codes.
        codes: &'a [i8],
        /// `m * k / run` scales.
        scales: &'a [f32],
        /// Neighbours that share a scale.
        run: usize,
    },
}

impl Side<'_> {
    /// Whether codes with a scale for each `run` neighbours are multiplied with weights whose rows have groups of `group`: one
    /// divides the other, and a run is whole pieces.
    pub fn runs(run: usize, group: usize) -> bool {
        run > 0 && run.is_multiple_of(PIECE) && (run.is_multiple_of(group) || group.is_multiple_of(run))
    }

    /// Neighbours in a row of `k` that share a scale.
    pub(super) fn run(&self, k: usize) -> usize {
        match *self {
            Side::Floats(_) => k,
            Side::Unsigned { run, .. } | Side::Signed { run, .. } => run,
        }
    }

    /// Whether elements take three digits.
    pub(super) fn is_wide(&self, k: usize) -> bool {
        match *self {
            Side::Floats(_) => true,
            Side::Unsigned { bits, run, .. } => bits == 8 && run < k,
            Side::Signed { .. } => false,
        }
    }

    /// Panics unless this is `[m, k]`.
    pub(super) fn check(&self, m: usize, k: usize) {
        let runs = m * k.checked_div(self.run(k)).unwrap_or(1);
        let lens = match *self {
            Side::Floats(x) => (x.len(), runs, runs),
            Side::Unsigned { codes, bits, scales, zeros, .. } => {
                assert!(bits <= 8, "codes of {bits} bits");
                (codes.len(), scales.len(), zeros.len())
            }
            Side::Signed { codes, scales, .. } => (codes.len(), scales.len(), runs),
        };
        assert_eq!(lens, (m * k, runs, runs), "elements, scales and zero points of a left side [{m}, {k}]");
    }
}
