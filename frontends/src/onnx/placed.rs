//! Sums with a stored vector that has its positions in it: the bias that `part-bias` adds behind rounded keys. What a graph
//! computes of the vector and the positions is known numbers by then, so it is found again by value.

use qrmc_ir::{RopeAttr, hadamard};

use super::term::{Bin, Fit, Pos, T, Term, Terms, Vector};

/// A vector at each position, as candidates are compared: turned, and then transformed in blocks.
#[derive(Clone, Copy)]
struct Way {
    rope: RopeAttr,
    /// Block of the Hadamard transform behind it, and whether that is the inverse one.
    block: Option<(u64, bool)>,
}

impl Way {
    /// `v` at a position.
    fn at(&self, v: &[f32], position: usize) -> Vec<f64> {
        let (frequencies, factor) = (self.rope.inv_freq(), self.rope.attention_factor());
        let half = frequencies.len();
        let mut out = vec![0.0; v.len()];
        for (v, out) in v.chunks_exact(2 * half).zip(out.chunks_exact_mut(2 * half)) {
            for (i, f) in frequencies.iter().enumerate() {
                let (sin, cos) = f64::from(position as f32 * *f as f32).sin_cos();
                let [low, high] = [v[i], v[i + half]].map(|x| f64::from(x) * factor);
                (out[i], out[i + half]) = (low * cos - high * sin, high * cos + low * sin);
            }
        }
        let Some((block, inverse)) = self.block else { return out };
        for f in hadamard::factors(block, inverse).unwrap_or_default() {
            let (size, inner) = (f.size as usize, f.inner as usize);
            let from = out.clone();
            for (at, y) in out.iter_mut().enumerate() {
                let (outer, j, q) = (at / (size * inner), at / inner % size, at % inner);
                let x = |i: usize| from[(outer * size + i) * inner + q];
                *y = (0..size).map(|i| x(i) * f64::from(f.entries[i * size + j])).sum();
            }
        }
        let norm = 1.0 / (block as f64).sqrt();
        out.iter_mut().for_each(|y| *y *= norm);
        out
    }
}

fn length<'a>(v: impl Iterator<Item = &'a f32>) -> f64 {
    v.map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

impl Terms {
    /// `x` and a table of the positions, if that is a stored vector turned by an embedding, and perhaps transformed.
    pub(super) fn placed(&mut self, x: T, table: T) -> Option<T> {
        let Term::Table(bits) = self.get(table) else { return None };
        let n = self.n(table);
        if n != self.n(x) || n == 0 {
            return None;
        }
        let table: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
        let rows: Vec<&[f32]> = table.chunks(n as usize).collect();
        let (tensor, way) = self.nearest(&rows, n)?;
        let vector = Vector { literal: None, tensor: Some(tensor), first: 0, n };
        let mut y = self.put(Term::Vector(vector), n, Pos::Any);
        y = self.put(Term::Rope(y, way.rope), n, Pos::New);
        if let Some((block, inverse)) = way.block {
            y = self.put(Term::Hadamard { x: y, block, inverse }, n, Pos::New);
        }
        let x = self.settled(x);
        Some(self.put(Term::Bin(Bin::Add, x, y, Fit::Same), n, self.pos(x)))
    }

    /// The stored vector of `n` elements that comes nearest to the rows, which are those of the new positions, and its way
    /// there, if it comes as near as single floats do.
    fn nearest(&self, rows: &[&[f32]], n: u64) -> Option<(usize, Way)> {
        let ways: Vec<Way> = self.ropes.iter().flat_map(|rope| ways(*rope, n)).collect();
        let far = (self.first + rows.len()) as f64;
        let mut best: Option<(f64, usize, Way)> = None;
        for (tensor, stored) in self.model.tensors.iter().enumerate() {
            if stored.count() != n {
                continue;
            }
            let Some(v) = stored.floats() else { continue };
            let size = length(v.iter());
            for way in &ways {
                // Both transforms keep lengths, but for the factor of the embedding.
                let near = (1e-4 + 2e-6 * far) * size * way.rope.attention_factor();
                if (length(rows[0].iter()) - size * way.rope.attention_factor()).abs()
                    > near + f64::MIN_POSITIVE
                {
                    continue;
                }
                let off = rows.iter().enumerate().flat_map(|(i, row)| {
                    let want = way.at(&v, self.first + i);
                    want.into_iter().zip(*row).map(|(w, x)| (w - f64::from(*x)).abs()).collect::<Vec<_>>()
                });
                let off = off.fold(0.0, |m: f64, d| if d.is_nan() { f64::INFINITY } else { m.max(d) });
                if off <= near && best.as_ref().is_none_or(|(least, ..)| off < *least) {
                    best = Some((off, tensor, *way));
                }
            }
        }
        best.map(|(_, tensor, way)| (tensor, way))
    }

    /// The vector of a term that [`Terms::placed`] made.
    pub(super) fn placed_vector(&self, t: T) -> Option<T> {
        match *self.get(t) {
            Term::Hadamard { x, .. } => self.placed_vector(x),
            Term::Rope(x, _) if matches!(self.get(x), Term::Vector(_)) => Some(x),
            _ => None,
        }
    }
}

/// The embedding alone, and with a transform of heads behind it.
fn ways(rope: RopeAttr, n: u64) -> Vec<Way> {
    let d = u64::from(rope.head_dim);
    if d == 0 || !n.is_multiple_of(d) {
        return Vec::new();
    }
    // The inverse of a power of two is the transform itself.
    let inverses: &[bool] = if d.is_power_of_two() { &[false] } else { &[false, true] };
    let built = inverses.iter().filter(|inverse| hadamard::factors(d, **inverse).is_some());
    let blocks = built.map(|inverse| Some((d, *inverse)));
    std::iter::once(None).chain(blocks).map(|block| Way { rope, block }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrmc_ir::{Real, RopeScaling};

    #[test]
    fn a_way_keeps_lengths_and_turns_each_head() {
        let rope = RopeAttr { head_dim: 4, theta: Real(10_000.0), scaling: RopeScaling::None };
        let v = [1.0f32, 2.0, 3.0, 4.0, -1.0, 0.5, 0.0, 2.0];
        let plain = Way { rope, block: None };
        let (sin, cos) = 3.0f64.sin_cos();
        let y = plain.at(&v, 3);
        assert!((y[0] - (cos - 3.0 * sin)).abs() < 1e-6 && (y[2] - (3.0 * cos + sin)).abs() < 1e-6);
        let turned = Way { rope, block: Some((4, false)) }.at(&v, 3);
        let sum: f64 = y[..4].iter().sum();
        assert!((turned[0] - sum / 2.0).abs() < 1e-9);
        assert!((turned[1] - (y[0] - y[1] + y[2] - y[3]) / 2.0).abs() < 1e-9);
        let length = |y: &[f64]| y.iter().map(|x| x * x).sum::<f64>();
        assert!((length(&turned) - length(&y)).abs() < 1e-9);
    }
}
