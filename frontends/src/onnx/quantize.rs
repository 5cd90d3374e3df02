//! Quantizers that are written out in standard operators, as `qrmc export --format onnx` writes them.
//!
//! A candidate is taken apart as far as its operands; then the formula is built from these, and must be the same term.

use std::rc::Rc;

use qrmc_ir::{Grain, QuantSpec};

use super::matrix::{Body, Matrix, Order};
use super::term::{Bin, Fit, Pos, Red, T, Term, Terms, Un, Vector};

/// Codes as they are computed.
struct Codes {
    x: T,
    scale: T,
    zero: Option<T>,
    bits: u8,
    signed: bool,
}

impl Terms {
    fn bin_of(&self, t: T, op: Bin) -> Option<(T, T)> {
        match *self.get(t) {
            Term::Bin(o, a, b, _) if o == op => Some((a, b)),
            _ => None,
        }
    }

    /// `clamp(round(x / scale) + zero)`
    fn codes(&self, t: T) -> Option<Codes> {
        let Term::Limit(inner, low, high) = *self.get(t) else { return None };
        let (low, high) = (f32::from_bits(low), f32::from_bits(high));
        let (bits, signed) = (2..=8u8).find_map(|b| {
            let half = (1 << (b - 1)) as f32;
            let full = 2.0 * half;
            let unsigned = (low, high) == (0.0, full - 1.0);
            ((low, high) == (-half, half - 1.0)).then_some((b, true)).or(unsigned.then_some((b, false)))
        })?;
        let (rounded, zero) = match self.bin_of(inner, Bin::Add) {
            Some((r, z)) => (r, Some(z)),
            None => (inner, None),
        };
        let Term::Un(Un::Round, quotient) = *self.get(rounded) else { return None };
        let (x, scale) = self.bin_of(quotient, Bin::Div)?;
        Some(Codes { x, scale, zero, bits, signed })
    }

    /// `scale * (code - zero)` as the quantizer that it is.
    pub(super) fn dequantized(&mut self, a: T, scale: T) -> Option<T> {
        let (code, zero) = match self.bin_of(a, Bin::Sub) {
            Some((c, z)) => (c, Some(z)),
            None => (a, None),
        };
        let c = self.codes(code)?;
        if c.scale != scale || c.zero != zero || c.signed == c.zero.is_some() {
            return None;
        }
        let (n, pos) = (self.n(c.x), self.pos(c.x));
        if let Some(v) = self.vector(scale) {
            let zero = match zero {
                None => None,
                Some(z) => Some(self.vector(z)?),
            };
            let grain = match v.n {
                1 => Grain::Tensor,
                each if each == n => Grain::Channel,
                _ => return None,
            };
            let spec = QuantSpec { signed: c.signed, zero: zero.is_some(), ..QuantSpec::sym(c.bits, grain) };
            return Some(self.put(Term::Static { x: c.x, spec, scale: v, zero }, n, pos));
        }
        let grain = self.grain(c.x, scale);
        let spec = if c.signed { QuantSpec::sym(c.bits, grain) } else { QuantSpec::asym(c.bits, grain) };
        let factors = self.factors(scale, spec)?;
        if self.parameters(c.x, spec, factors) != (scale, zero) {
            return None;
        }
        let factors = factors.map(|f| self.shortest(f));
        Some(self.put(Term::Quant { x: c.x, spec, factors }, n, pos))
    }

    /// Vectors of factors of one length without what both repeat: runs share them evenly.
    fn shortest(&mut self, (hi, lo): (T, T)) -> (T, T) {
        let literal = |t: T| match self.get(t) {
            Term::Vector(Vector { literal: Some(v), tensor, .. }) => Some((v.clone(), *tensor)),
            _ => None,
        };
        let (Some(hi_of), Some(lo_of)) = (literal(hi), literal(lo)) else { return (hi, lo) };
        let (n, both) = (hi_of.0.len(), [hi_of, lo_of]);
        let same = |k: &usize| {
            let even = |v: &[u32]| v.chunks(n / k).all(|run| run.iter().all(|x| *x == run[0]));
            n.is_multiple_of(*k) && both.iter().all(|(v, _)| v.len() == n && even(v))
        };
        let Some(k) = (1..n).find(same) else { return (hi, lo) };
        let mut put = |(v, tensor): &(std::sync::Arc<[u32]>, Option<usize>)| {
            let literal: std::sync::Arc<[u32]> = v.chunks(n / k).map(|run| run[0]).collect();
            let term = match k {
                1 => Term::Scalar(literal[0], *tensor),
                _ => Term::Vector(Vector { literal: Some(literal), tensor: *tensor, first: 0, n: k as u64 }),
            };
            self.put(term, k as u64, Pos::Any)
        };
        (put(&both[0]), put(&both[1]))
    }

    /// The factors on both ends of the range, as far as they can be seen.
    fn factors(&self, scale: T, spec: QuantSpec) -> Option<Option<(T, T)>> {
        let Term::Select(good, ..) = *self.get(scale) else { return None };
        let (scale, _) = self.bin_of(good, Bin::Greater)?;
        let (hi, lo) = if spec.zero {
            let (width, _) = self.bin_of(scale, Bin::Div)?;
            let (span, _) = self.bin_of(width, Bin::Max)?;
            let (max, min) = self.bin_of(span, Bin::Sub)?;
            let (Term::Select(_, _, max), Term::Select(_, _, min)) = (self.get(max), self.get(min)) else {
                return None;
            };
            (*max, *min)
        } else {
            let Term::Select(_, _, quotient) = *self.get(scale) else { return None };
            let (size, _) = self.bin_of(quotient, Bin::Div)?;
            let (both, _) = self.bin_of(size, Bin::Max)?;
            let (max, low) = self.bin_of(both, Bin::Max)?;
            let Term::Un(Un::Neg, min) = *self.get(low) else { return None };
            (max, min)
        };
        Some(match (self.bin_of(hi, Bin::Mul), self.bin_of(lo, Bin::Mul)) {
            (Some((_, hi)), Some((_, lo))) => Some((hi, lo)),
            _ => None,
        })
    }

    /// The formula of scale and zero point with the rule `dynamic`.
    fn parameters(&mut self, x: T, spec: QuantSpec, factors: Option<(T, T)>) -> (T, Option<T>) {
        let run = match spec.grain {
            Grain::Group(g) => u64::from(g),
            _ => self.n(x),
        };
        let nothing = self.scalar(0.0);
        let [max, min] = [(Red::Max, Bin::Max), (Red::Min, Bin::Min)].map(|(end, with)| {
            let end = self.reduce(end, x, run);
            self.bin(with, end, nothing, Fit::Same)
        });
        let (max, min) = match factors {
            Some((hi, lo)) => {
                (self.bin(Bin::Mul, max, hi, Fit::Same), self.bin(Bin::Mul, min, lo, Fit::Same))
            }
            None => (max, min),
        };
        if !spec.zero {
            let low = self.un(Un::Neg, min);
            let both = self.bin(Bin::Max, max, low, Fit::Same);
            let size = self.bin(Bin::Max, both, nothing, Fit::Same);
            let steps = self.scalar(((1i32 << (spec.bits - 1)) - 1) as f32);
            let scale = self.bin(Bin::Div, size, steps, Fit::Same);
            let empty = self.bin(Bin::Equal, size, nothing, Fit::Same);
            let unit = self.scalar(1.0);
            let scale = self.select(empty, unit, scale);
            return (self.never_zero(scale), None);
        }
        let [top, bottom] = [max, min].map(|end| self.bin(Bin::Equal, end, nothing, Fit::Same));
        let empty = self.bin(Bin::And, top, bottom, Fit::Same);
        let [max, min] = [(max, 1.0), (min, -1.0)].map(|(end, unit)| {
            let unit = self.scalar(unit);
            self.select(empty, unit, end)
        });
        let width = self.bin(Bin::Sub, max, min, Fit::Same);
        let width = self.bin(Bin::Max, width, nothing, Fit::Same);
        let steps = self.scalar(((1i32 << spec.bits) - 1) as f32);
        let scale = self.bin(Bin::Div, width, steps, Fit::Same);
        let scale = self.never_zero(scale);
        let low = self.un(Un::Neg, min);
        let zero = self.bin(Bin::Div, low, scale, Fit::Same);
        let zero = self.un(Un::Round, zero);
        (scale, Some(self.limit(zero, spec.qmin() as f32, spec.qmax() as f32)))
    }

    fn never_zero(&mut self, scale: T) -> T {
        let (nothing, least) = (self.scalar(0.0), self.scalar(f32::MIN_POSITIVE));
        let good = self.bin(Bin::Greater, scale, nothing, Fit::Same);
        let other = self.bin(Bin::Max, scale, least, Fit::Same);
        self.select(good, scale, other)
    }

    /// `scale_x scale_w (codes_x W - zero_x sums)`, a product of codes with codes, as the linear layer that it is.
    pub(super) fn integers(&mut self, a: T, b: T) -> Option<T> {
        let scale_w = self.vector(b)?;
        let (whole, scale_x) = self.bin_of(a, Bin::Mul)?;
        let (dot, shift) = self.bin_of(whole, Bin::Sub)?;
        let (zero, sums) = self.bin_of(shift, Bin::Mul)?;
        let Term::Dot(codes, w) = self.get(dot).clone() else { return None };
        let sums = self.vector(sums)?;
        let model = self.model.clone();
        let (Body::Codes { codes: tensor, zero: zeros, spec, .. }, Some(sums), Some(scale)) =
            (&w.body, sums.tensor, scale_w.tensor)
        else {
            return None;
        };
        // What is taken off must be what the zero points of the input stand for.
        let of = |z: Option<usize>, row: usize| {
            z.map_or(128, |z| {
                let z = &model.tensors[z].bytes;
                i64::from(z[if z.len() == 1 { 0 } else { row }])
            })
        };
        let have = super::known::Known::stored(&model.tensors[sums], sums)?;
        let cols = w.cols as usize;
        let rows = model.tensors[*tensor].bytes.chunks(cols.max(1)).enumerate();
        let want = rows.map(|(r, c)| c.iter().map(|&c| i64::from(c) - of(*zeros, r)).sum::<i64>());
        if !have.as_ints()?.iter().copied().eq(want) {
            return None;
        }
        let grain = if scale_w.n == 1 { Grain::Tensor } else { Grain::Row };
        let body = Body::Codes {
            codes: *tensor,
            scale,
            zero: *zeros,
            spec: QuantSpec { grain, ..*spec },
            order: Order::Rows,
            repeat: 1,
        };
        let value = self.bin(Bin::Sub, codes, zero, Fit::Spread);
        let x = self.bin(Bin::Mul, value, scale_x, Fit::Spread);
        let Term::Quant { .. } = self.get(x) else { return None };
        Some(self.linear(x, Rc::new(Matrix { body, ..(*w).clone() })))
    }
}

impl Vector {
    /// The elements, as little-endian floats.
    ///
    /// # Errors
    /// If they are no floats.
    pub(super) fn floats(&self, terms: &[super::file::Stored]) -> Result<Vec<f32>, String> {
        if let Some(v) = &self.literal {
            return Ok(v.iter().map(|&b| f32::from_bits(b)).collect());
        }
        let t = self.tensor.map(|t| &terms[t]).ok_or("a vector of nothing")?;
        let all = super::known::Known::stored(t, 0).ok_or_else(|| format!("`{}` is large", t.name))?;
        let all = all.as_floats().ok_or_else(|| format!("`{}` holds no floats", t.name))?;
        Ok(all[self.first as usize..(self.first + self.n) as usize].to_vec())
    }
}
