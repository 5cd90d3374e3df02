//! Rotary embeddings that tables of cosines and sines stand for.

use std::f64::consts::TAU;

use qrmc_ir::{Real, RopeAttr, RopeScaling};

use super::file::Type;
use super::term::{T, Term, Terms};

/// Relative difference of a frequency from that of its formula, as single floats differ when they are computed on several
/// machines.
const NEAR: f64 = 1e-5;

/// How far an element of a table may be from what it was rounded from, to a type of 16 bits.
pub(super) fn rounding(ty: Type) -> f64 {
    match ty {
        Type::F16 => 1.0 / 2048.0,
        Type::BF16 => 1.0 / 256.0,
        _ => 0.0,
    }
}

/// Embeddings without scaling that tables `[positions, half]` in 16 bits may stand for, the roundest base first. The second
/// frequency is followed from position to position, as each doubling halves its error.
pub(super) fn coarse(cos: &[f32], sin: &[f32], half: usize) -> Vec<RopeAttr> {
    if half < 2 {
        return Vec::new();
    }
    let angle = |p: usize| f64::from(sin[p * half + 1]).atan2(f64::from(cos[p * half + 1]));
    let rows = cos.len().min(sin.len()) / half;
    let mut f = 0.0;
    for p in (0..).map(|i| 1usize << i).take_while(|&p| p < rows) {
        let off = (angle(p) - f * p as f64).rem_euclid(TAU);
        f += if off > TAU / 2.0 { off - TAU } else { off } / p as f64;
    }
    let theta = f.powf(-(half as f64));
    if f <= 0.0 || !theta.is_finite() {
        return Vec::new();
    }
    let rounded = (0..5).filter_map(|digits: usize| format!("{theta:.digits$e}").parse().ok().map(Real));
    let attr = |theta| RopeAttr { head_dim: 2 * half as u32, theta, scaling: RopeScaling::None };
    rounded.map(attr).collect()
}

/// Whether a row of cosines and one of sines are those of an embedding at a position, as far as they are rounded.
pub(super) fn fits(attr: &RopeAttr, at: usize, [cos, sin]: [&[f32]; 2], rounding: f64) -> bool {
    let factor = attr.attention_factor();
    let frequencies = attr.inv_freq();
    frequencies.len() == cos.len()
        && frequencies.iter().zip(cos.iter().zip(sin)).all(|(&f, (&c, &s))| {
            // As graphs compute it: a product of single floats, of which the last bit is theirs.
            let angle = at as f32 * f as f32;
            let near = 1e-4 + 2e-6 * f64::from(angle) + rounding * factor.abs();
            let (sin, cos) = f64::from(angle).sin_cos();
            (cos * factor - f64::from(c)).abs() <= near && (sin * factor - f64::from(s)).abs() <= near
        })
}

/// Cosines and sines of an embedding at some positions, `[positions, head_dim]`: both halves of a row are the same.
pub(super) fn table(attr: &RopeAttr, positions: std::ops::Range<usize>) -> [Vec<f32>; 2] {
    let (frequencies, factor) = (attr.inv_freq(), attr.attention_factor());
    [f64::cos, f64::sin].map(|of| {
        let row = |p: usize| {
            let half =
                || frequencies.iter().map(move |&f| (of(f64::from(p as f32 * f as f32)) * factor) as f32);
            half().chain(half()).collect::<Vec<f32>>()
        };
        positions.clone().flat_map(row).collect()
    })
}

/// The embedding without scaling whose angles at position 1 are these, if there is one.
pub(super) fn plain(cos: &[f32], sin: &[f32]) -> Option<RopeAttr> {
    let half = cos.len();
    let angles: Vec<f64> = cos.iter().zip(sin).map(|(&c, &s)| f64::from(s).atan2(f64::from(c))).collect();
    let last = *angles.last()?;
    if half < 2 || last <= 0.0 {
        return None;
    }
    let theta = last.powf(-(half as f64) / (half as f64 - 1.0));
    // Configurations have round numbers.
    let digits = 10f64.powf(4.0 - theta.log10().floor());
    let round = (theta * digits).round() / digits;
    [round, theta].into_iter().find_map(|theta| {
        let attr = RopeAttr { head_dim: 2 * half as u32, theta: Real(theta), scaling: RopeScaling::None };
        let near = |(f, a): (&f64, &f64)| ((f - a) / f).abs() < NEAR;
        attr.inv_freq().iter().zip(&angles).all(near).then_some(attr)
    })
}

impl Terms {
    /// The embedding of heads of `d` channels that tables of `width` numbers a position stand for. One that is found is
    /// remembered: later probes look at positions from which no frequency can be read.
    pub(super) fn rotary(&mut self, cos: T, sin: T, d: usize, width: usize) -> Option<RopeAttr> {
        let half = d / 2;
        let rows = |t: T| -> Option<Vec<Vec<f32>>> {
            let Term::Table(v) = self.get(t) else { return None };
            if self.n(t) != width as u64 || width < half {
                return None;
            }
            let rows = v.chunks(width).map(|r| r.iter().map(|&b| f32::from_bits(b)).collect::<Vec<f32>>());
            // Both halves of a row are the same where it is as wide as a head.
            let rows: Vec<Vec<f32>> = rows.collect();
            let same = rows.iter().all(|r| width == half || r[..half] == r[half..]);
            same.then(|| rows.into_iter().map(|r| r[..half].to_vec()).collect())
        };
        let (cos, sin) = (rows(cos)?, rows(sin)?);
        if cos.len() != sin.len() {
            return None;
        }
        if let Some(second) = 1usize.checked_sub(self.first)
            && let (Some(c), Some(s)) = (cos.get(second), sin.get(second))
            && let Some(found) = plain(c, s)
            && !self.ropes.contains(&found)
        {
            self.ropes.push(found);
        }
        let all = |a: &&RopeAttr| {
            a.head_dim as usize == d
                && cos.iter().zip(&sin).enumerate().all(|(i, (c, s))| fits(a, self.first + i, [c, s], 0.0))
        };
        self.ropes.iter().find(all).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(attr: &RopeAttr, at: usize) -> [Vec<f32>; 2] {
        let angle = |f: &f64| f64::from(at as f32 * *f as f32);
        [f64::cos, f64::sin].map(|g| attr.inv_freq().iter().map(|f| g(angle(f)) as f32).collect())
    }

    #[test]
    fn bases_are_read_from_the_second_row() {
        for (theta, head_dim) in [(10_000.0, 64), (500_000.0, 128), (1e6, 128), (100_000.0, 16), (250.0, 8)] {
            let attr = RopeAttr { head_dim, theta: Real(theta), scaling: RopeScaling::None };
            let [c, s] = row(&attr, 1);
            assert_eq!(plain(&c, &s), Some(attr), "{theta}");
        }
    }

    #[test]
    fn bases_are_read_from_tables_of_16_bits() {
        for (theta, head_dim, rows) in [(10_000.0, 64, 512), (500_000.0, 128, 4096), (1e6, 16, 256)] {
            let attr = RopeAttr { head_dim, theta: Real(theta), scaling: RopeScaling::None };
            let all: Vec<[Vec<f32>; 2]> = (0..rows).map(|p| row(&attr, p)).collect();
            let table = |i: usize| -> Vec<f32> {
                let values = all.iter().flat_map(|r| &r[i]);
                values.map(|&x| half::f16::from_f32(x).to_f32()).collect()
            };
            let (c, s) = (table(0), table(1));
            let n = head_dim as usize / 2;
            let fits = |a: &&RopeAttr| {
                let rows = c.chunks(n).zip(s.chunks(n)).enumerate();
                rows.into_iter().all(|(p, (c, s))| fits(a, p, [c, s], rounding(Type::F16)))
            };
            let found = coarse(&c, &s, n);
            assert_eq!(found.iter().find(fits), Some(&attr), "{theta}: {found:?}");
        }
    }

    #[test]
    fn scaled_frequencies_are_no_plain_ones() {
        let scaling =
            RopeScaling::Llama3 { factor: Real(8.0), low: Real(1.0), high: Real(4.0), original: 64 };
        let attr = RopeAttr { head_dim: 16, theta: Real(500_000.0), scaling };
        let [c, s] = row(&attr, 1);
        assert_eq!(plain(&c, &s), None);
        let [c, s] = row(&attr, 33_000);
        assert!(fits(&attr, 33_000, [&c, &s], 0.0) && !fits(&attr, 33_001, [&c, &s], 0.0));
    }
}
