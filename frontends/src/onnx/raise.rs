//! Terms that are the definition of a large operation become it.

use super::term::{Bin, Fit, Red, T, Term, Terms, Un, Vector};

impl Terms {
    /// What `a * b` is the definition of.
    pub(super) fn product(&mut self, a: T, b: T) -> Option<T> {
        match *self.get(b) {
            Term::Un(Un::Sigmoid, x) if x == a => {
                let (n, pos) = (self.n(a), self.pos(a));
                return Some(self.put(Term::Silu(a), n, pos));
            }
            _ => {}
        }
        let x = self.normed(a, b);
        x.or_else(|| self.dequantized(a, b)).or_else(|| self.hadamard(a, b)).or_else(|| self.integers(a, b))
    }

    /// `x / sqrt(mean(x²) + eps) * gain`
    fn normed(&mut self, a: T, b: T) -> Option<T> {
        let gain = self.vector(b)?;
        let Term::Bin(Bin::Mul, p, q, _) = *self.get(a) else { return None };
        for (x, r) in [(p, q), (q, p)] {
            let Term::Un(Un::Recip, root) = *self.get(r) else { continue };
            let Term::Un(Un::Sqrt, sum) = *self.get(root) else { continue };
            let Term::Bin(Bin::Add, u, v, _) = *self.get(sum) else { continue };
            let (mean, eps) = if self.number(v).is_some() { (u, v) } else { (v, u) };
            let (Some(eps), Term::Reduce(Red::Mean, squares, run)) = (self.number(eps), self.get(mean))
            else {
                continue;
            };
            let run = *run;
            if *self.get(*squares) == Term::Bin(Bin::Mul, x, x, Fit::Same) && (gain.n == run || gain.n == 1) {
                return Some(self.norm(x, gain, eps, run));
            }
        }
        None
    }

    pub(super) fn norm(&mut self, x: T, gain: Vector, eps: f32, run: u64) -> T {
        let x = self.settled(x);
        let one = gain.literal.as_ref().filter(|v| v.iter().all(|g| *g == v[0])).map(|v| v[..1].into());
        let gain = if one.is_some() { Vector { literal: one, n: 1, ..gain } } else { gain };
        let (n, pos) = (self.n(x), self.pos(x));
        self.put(Term::Norm { x, gain, eps: eps.to_bits(), run }, n, pos)
    }

    /// A term that is a stored vector, or one number.
    pub(super) fn vector(&self, t: T) -> Option<Vector> {
        match self.get(t) {
            Term::Vector(v) => Some(v.clone()),
            Term::Scalar(b, origin) => {
                Some(Vector { literal: Some(vec![*b].into()), tensor: *origin, first: 0, n: 1 })
            }
            _ => None,
        }
    }

    /// `x cos + (-high, low) sin`
    pub(super) fn turned(&mut self, a: T, b: T) -> Option<T> {
        let (x, cos) = self.by_table(a)?;
        let (turned, sin) = self.by_table(b)?;
        let Term::Join(minus, low, half, _) = *self.get(turned) else { return None };
        let Term::Un(Un::Neg, high) = *self.get(minus) else { return None };
        let period = 2 * half;
        let part = |start| Term::Part { x, period, start, len: half };
        if *self.get(high) != part(half) || *self.get(low) != part(0) {
            return None;
        }
        let attr = self.rotary(cos, sin, period as usize, period as usize)?;
        Some(self.rope(x, attr))
    }

    /// The operands of a product with a table of the positions.
    fn by_table(&self, t: T) -> Option<(T, T)> {
        let Term::Bin(Bin::Mul, a, b, Fit::Same | Fit::Tile) = *self.get(t) else { return None };
        match (self.get(a), self.get(b)) {
            (_, Term::Table(_)) => Some((a, b)),
            (Term::Table(_), _) => Some((b, a)),
            _ => None,
        }
    }

    /// Runs of `a` and `b` one after the other.
    pub(super) fn join(&mut self, a: T, b: T, la: u64, lb: u64) -> T {
        if let Some(t) = self.turned_halves(a, b, la, lb) {
            return t;
        }
        let (n, pos) = (self.n(a) + self.n(b), self.pos(a));
        self.put(Term::Join(a, b, la, lb), n, pos)
    }

    /// `(low cos - high sin, high cos + low sin)`
    fn turned_halves(&mut self, a: T, b: T, la: u64, lb: u64) -> Option<T> {
        let (Term::Bin(Bin::Sub, p, q, _), Term::Bin(Bin::Add, r, s, _)) = (self.get(a), self.get(b)) else {
            return None;
        };
        let (low, cos) = self.by_table(*p)?;
        let (high, sin) = self.by_table(*q)?;
        let same = self.by_table(*r)? == (high, cos) && self.by_table(*s)? == (low, sin);
        let Term::Part { x, period, start: 0, len } = *self.get(low) else { return None };
        let whole = *self.get(high) == Term::Part { x, period, start: len, len };
        if !(same && whole && la == len && lb == len && period == 2 * len) {
            return None;
        }
        let attr = self.rotary(cos, sin, period as usize, len as usize)?;
        Some(self.rope(x, attr))
    }

    /// `x` times a power of the Walsh-Hadamard matrix, and the norm.
    fn hadamard(&mut self, a: T, b: T) -> Option<T> {
        let norm = self.number(b)?;
        let mut factors = Vec::new();
        let mut x = a;
        while let Term::Mode { x: inside, m, inner, count: 1 } = self.get(x).clone() {
            factors.push((m.few(&self.model.tensors)?, inner));
            x = inside;
        }
        let block: u64 = factors.iter().map(|(m, _)| (m.len() as u64).isqrt()).product();
        if factors.is_empty() || norm.to_bits() != ((1.0 / (block as f64).sqrt()) as f32).to_bits() {
            return None;
        }
        factors.reverse();
        let same = |want: &[qrmc_ir::hadamard::Factor]| {
            want.len() == factors.len()
                && want.iter().zip(&factors).all(|(w, (have, inner))| {
                    w.inner == *inner
                        && have.iter().copied().eq(w.entries.iter().map(|&e| f32::from(e).to_bits()))
                })
        };
        let made = |inverse: &bool| qrmc_ir::hadamard::factors(block, *inverse).is_some_and(|w| same(&w));
        let inverse = [false, true].into_iter().find(made)?;
        let (n, pos) = (self.n(x), self.pos(x));
        Some(self.put(Term::Hadamard { x, block, inverse }, n, pos))
    }
}
