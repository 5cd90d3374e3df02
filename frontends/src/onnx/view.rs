//! How a tensor of the graph lays out a term: each axis is a list of digits of sequence, position and channel. Reshapes,
//! transpositions and expansions change the layout alone.

use super::term::{Fit, T};

/// What a digit counts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Kind {
    /// Sequences.
    Batch,
    /// Positions.
    Pos,
    /// Channels, `stride` apart.
    Chan,
    /// Nothing: elements are repeated.
    Rep,
}

/// A digit of an index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Digit {
    pub(super) kind: Kind,
    pub(super) size: usize,
    pub(super) stride: u64,
}

impl Digit {
    pub(super) fn batch(size: usize) -> Self {
        Digit { kind: Kind::Batch, size, stride: 0 }
    }

    pub(super) fn pos(size: usize) -> Self {
        Digit { kind: Kind::Pos, size, stride: 0 }
    }

    pub(super) fn chan(size: usize, stride: u64) -> Self {
        Digit { kind: Kind::Chan, size, stride }
    }
}

/// The digits of an axis, the first counts slowest; none for an axis of size 1.
pub(super) type Axis = Vec<Digit>;

/// A tensor of the graph.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Real {
    pub(super) t: T,
    pub(super) axes: Vec<Axis>,
}

pub(super) fn size(axis: &Axis) -> usize {
    axis.iter().map(|d| d.size).product()
}

/// Neighbouring digits of channels that count on are one.
fn merged(axis: Axis) -> Axis {
    let mut out: Axis = Vec::new();
    for d in axis {
        match out.last_mut() {
            Some(p)
                if p.kind == Kind::Chan && d.kind == Kind::Chan && p.stride == d.stride * d.size as u64 =>
            {
                *p = Digit::chan(p.size * d.size, d.stride);
            }
            _ => out.push(d),
        }
    }
    out
}

/// All digits of some axes, as one axis.
pub(super) fn flat(axes: &[Axis]) -> Axis {
    merged(axes.concat())
}

impl Real {
    /// `[sequences, positions, channels]`
    pub(super) fn rows(t: T, batch: usize, positions: usize, channels: usize) -> Self {
        let axes =
            vec![vec![Digit::batch(batch)], vec![Digit::pos(positions)], vec![Digit::chan(channels, 1)]];
        Real {
            t,
            axes: axes
                .into_iter()
                .map(|a| if a[0].kind == Kind::Chan && a[0].size == 1 { vec![] } else { a })
                .collect(),
        }
    }

    pub(super) fn dims(&self) -> Vec<usize> {
        self.axes.iter().map(size).collect()
    }

    /// The same tensor in other sizes.
    ///
    /// # Errors
    /// If a size cuts through a digit that cannot be cut.
    pub(super) fn reshaped(&self, dims: &[usize]) -> Result<Self, String> {
        let bad =
            || format!("a reshape of {:?} to {dims:?} mixes sequences, positions and channels", self.dims());
        let mut left = self.axes.concat().into_iter().collect::<std::collections::VecDeque<_>>();
        let mut axes = Vec::new();
        for &want in dims {
            let (mut axis, mut have) = (Vec::new(), 1);
            // A digit of size 1, such as the only sequence, stands where there is an axis for it.
            while let Some(&d) = left.front() {
                if have == want && !(d.size == 1 && want == 1 && axis.is_empty()) {
                    break;
                }
                left.pop_front();
                if d.size > 0 && want % (have * d.size) == 0 {
                    axis.push(d);
                    have *= d.size;
                    continue;
                }
                let part = want / have;
                let cut = want % have == 0
                    && part > 0
                    && d.size % part == 0
                    && matches!(d.kind, Kind::Chan | Kind::Rep);
                if !cut {
                    return Err(bad());
                }
                let rest = d.size / part;
                axis.push(Digit { size: part, stride: d.stride * rest as u64, ..d });
                left.push_front(Digit { size: rest, ..d });
                have = want;
            }
            if have != want {
                return Err(bad());
            }
            axes.push(merged(axis));
        }
        // What is left has size 1.
        if let (false, Some(last)) = (left.is_empty(), axes.last_mut()) {
            last.extend(left);
        }
        Ok(Real { t: self.t, axes })
    }

    pub(super) fn transposed(&self, perm: &[usize]) -> Result<Self, String> {
        let mut sorted = perm.to_vec();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..self.axes.len()) {
            return Err(format!("`perm` {perm:?} does not permute {} axes", self.axes.len()));
        }
        Ok(Real { t: self.t, axes: perm.iter().map(|&p| self.axes[p].clone()).collect() })
    }

    /// The same tensor with new axes of size 1 at these places of the result.
    pub(super) fn unsqueezed(&self, at: &[usize]) -> Self {
        let mut axes = self.axes.clone();
        at.iter().for_each(|&a| axes.insert(a, Vec::new()));
        Real { t: self.t, axes }
    }

    /// Repeated to these sizes.
    pub(super) fn expanded(&self, dims: &[usize]) -> Result<Self, String> {
        let mut axes = self.axes.clone();
        while axes.len() < dims.len() {
            axes.insert(0, Vec::new());
        }
        let lead = axes.len() - dims.len();
        for (axis, &want) in axes[lead..].iter_mut().zip(dims) {
            if size(axis) == 1 && want != 1 {
                axis.push(Digit { kind: Kind::Rep, size: want, stride: 0 });
            } else if size(axis) != want && want != 1 {
                return Err(format!("sizes {:?} do not broadcast to {dims:?}", self.dims()));
            }
        }
        Ok(Real { t: self.t, axes })
    }

    /// The channels of the last axis and how far they are apart; `None` if it holds something else.
    pub(super) fn last(&self) -> Option<(u64, u64)> {
        match self.axes.last().map(|a| &a[..]) {
            Some([d]) if d.kind == Kind::Chan => Some((d.size as u64, d.stride)),
            Some([]) => Some((1, 1)),
            _ => None,
        }
    }

    /// Whether it is `[.., channels]` with all channels in their order, and nothing repeated.
    pub(super) fn is_rows(&self, n: u64) -> bool {
        let lead = &self.axes[..self.axes.len().saturating_sub(1)];
        let plain = |d: &Digit| matches!(d.kind, Kind::Batch | Kind::Pos);
        self.last() == Some((n, 1)) && lead.iter().flatten().all(plain)
    }
}

/// The axes of the result of an elementwise operation, and how the second operand's channels belong to the first's.
///
/// # Errors
/// If neither holds the channels of the other.
pub(super) fn aligned(a: &[Axis], na: u64, b: &[Axis], nb: u64) -> Result<(Vec<Axis>, Fit), String> {
    if na < nb {
        return aligned(b, nb, a, na);
    }
    let rank = a.len().max(b.len());
    let axis = |all: &[Axis], i: usize| -> Axis {
        (i + all.len()).checked_sub(rank).map_or_else(Vec::new, |i| all[i].clone())
    };
    let mut axes = Vec::new();
    let (mut wide, mut narrow) = (Vec::new(), Vec::new());
    for i in 0..rank {
        let (x, y) = (axis(a, i), axis(b, i));
        let kinds = |v: &Axis| v.iter().map(|d| (d.kind, d.size)).collect::<Vec<_>>();
        if y.is_empty() || kinds(&x) == kinds(&y) {
            wide.extend(x.iter().zip(&y).filter(|(d, _)| d.kind == Kind::Chan).map(|(d, _)| *d));
            narrow.extend(y.iter().filter(|d| d.kind == Kind::Chan).copied());
            axes.push(x);
        } else if x.is_empty() && y.iter().all(|d| d.kind != Kind::Chan) {
            axes.push(y);
        } else {
            return Err(format!("operands whose axis {i} counts different things"));
        }
    }
    // The narrow operand's digits are some of the wide one's: the fastest, or those above a run.
    let strides = |v: &[Digit], by: u64| v.iter().map(|d| (d.size, d.stride / by)).collect::<Vec<_>>();
    let count: u64 = narrow.iter().map(|d| d.size as u64).product();
    let run = na / nb.max(1);
    if count != nb {
        return Err(format!("an operand of {nb} channels of which {count} are read"));
    }
    if run == 0 {
        return Err("operands without channels".into());
    }
    let fit = if strides(&wide, 1) == strides(&narrow, 1) {
        if na == nb { Fit::Same } else { Fit::Tile }
    } else if na.is_multiple_of(nb.max(1))
        && wide.iter().all(|d| d.stride % run == 0)
        && strides(&wide, run) == strides(&narrow, 1)
    {
        Fit::Spread
    } else {
        return Err(format!("operands of {na} and {nb} channels that do not lie alike"));
    };
    Ok((axes, fit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn real() -> Real {
        Real::rows(0, 2, 3, 24)
    }

    #[test]
    fn heads_are_digits_of_channels() {
        let heads = real().reshaped(&[2, 3, 4, 6]).unwrap().transposed(&[0, 2, 1, 3]).unwrap();
        assert_eq!(heads.dims(), [2, 4, 3, 6]);
        assert_eq!(heads.axes[1], [Digit::chan(4, 6)]);
        let back = heads.transposed(&[0, 2, 1, 3]).unwrap().reshaped(&[2, 3, 24]).unwrap();
        assert_eq!(back, real());
        assert!(heads.reshaped(&[2, 12, 6]).unwrap().axes[1].len() == 2);
        assert!(heads.reshaped(&[8, 18]).is_ok() && heads.reshaped(&[2, 4, 18]).is_ok());
        assert!(heads.reshaped(&[16, 9]).is_err());
    }

    #[test]
    fn repeats_are_digits_too() {
        let heads = real().reshaped(&[2, 3, 2, 12]).unwrap().transposed(&[0, 2, 1, 3]).unwrap();
        let twice =
            heads.unsqueezed(&[2]).expanded(&[2, 2, 5, 3, 12]).unwrap().reshaped(&[2, 10, 3, 12]).unwrap();
        let kinds: Vec<Kind> = twice.axes[1].iter().map(|d| d.kind).collect();
        assert_eq!(kinds, [Kind::Chan, Kind::Rep]);
    }

    #[test]
    fn one_sequence_stays_in_its_place() {
        let one = Real::rows(0, 1, 3, 8);
        let heads = one.reshaped(&[1, 3, 2, 4]).unwrap();
        assert_eq!(heads.axes[0], [Digit::batch(1)]);
        assert_eq!(heads.reshaped(&[1, 3, 8]).unwrap(), one);
        assert_eq!(one.reshaped(&[3, 8]).unwrap().dims(), [3, 8]);
    }

    #[test]
    fn narrow_operands_are_spread_or_tiled() {
        let split = real().reshaped(&[2, 3, 4, 6]).unwrap();
        let mut stat = split.clone();
        stat.axes[2] = vec![Digit::chan(4, 1)];
        stat.axes[3] = vec![];
        assert_eq!(aligned(&split.axes, 24, &stat.axes, 4).unwrap().1, Fit::Spread);
        let gain = vec![vec![Digit::chan(6, 1)]];
        assert_eq!(aligned(&split.axes, 24, &gain, 6).unwrap().1, Fit::Tile);
        assert_eq!(aligned(&gain, 6, &split.axes, 24).unwrap().1, Fit::Tile);
        // One number for each head lies nowhere among the channels of a head.
        let wrong = vec![vec![Digit::chan(4, 1)], vec![], vec![]];
        assert!(aligned(&split.axes, 24, &wrong, 4).is_err());
    }
}
