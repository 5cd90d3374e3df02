//! The arithmetic of affine integer grids: the only copy of rounding, clamping, scales and zero points.
//!
//! Everything is `f32`, rounding is half to even, and codes are chosen with the scale as stored.

use crate::quant::{Grain, QuantSpec, Rule};

/// Least range of a weight group before it is divided by the number of steps (methods.md §1.2).
const MIN_RANGE: f32 = 1e-5;
/// Steps of the clip search of [`Rule::Mse`] and the exponent of its error.
const MSE_STEPS: u32 = 80;
const MSE_NORM: f32 = 2.4;

/// Scale and zero point of the elements that share them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct QParam {
    /// Positive and, for finite data within the range of the scale type, finite.
    pub scale: f32,
    /// In the range of the codes; 0 for schemes without a zero point.
    pub zero: i32,
}

/// Range of the data, as the rules see it.
#[derive(Clone, Copy)]
struct Range {
    min: f32,
    max: f32,
}

impl Range {
    fn of(data: &[f32]) -> Self {
        let mut r = Range { min: f32::INFINITY, max: f32::NEG_INFINITY };
        for &x in data {
            r.min = r.min.min(x);
            r.max = r.max.max(x);
        }
        if data.is_empty() { Range { min: 0.0, max: 0.0 } } else { r }
    }

    fn with_zero(self) -> Self {
        Range { min: self.min.min(0.0), max: self.max.max(0.0) }
    }

    fn magnitude(self) -> f32 {
        self.max.max(-self.min)
    }
}

/// Chooses scale and zero point for the elements of one group (methods.md §1.1, §1.2, §1.3).
pub fn qparam(data: &[f32], spec: QuantSpec, rule: Rule) -> QParam {
    let range = Range::of(data);
    match rule {
        Rule::Awq if spec.zero => awq(range, spec),
        Rule::Awq | Rule::MinMax => minmax(range.with_zero(), spec),
        Rule::Mse => mse(data, range.with_zero(), spec).0,
    }
}

/// As [`qparam`] with [`Rule::Mse`], and the step `0..80` that was kept.
pub fn qparam_mse(data: &[f32], spec: QuantSpec) -> (QParam, u32) {
    mse(data, Range::of(data).with_zero(), spec)
}

fn stored(scale: f32, spec: QuantSpec) -> f32 {
    let rounded = spec.scale.round(scale);
    if rounded > 0.0 || scale.is_nan() { rounded } else { scale.max(f32::MIN_POSITIVE) }
}

fn minmax(range: Range, spec: QuantSpec) -> QParam {
    let floor = if spec.grain == Grain::Token { 0.0 } else { MIN_RANGE };
    if !spec.zero {
        let m = range.magnitude().max(floor);
        return symmetric(m, spec);
    }
    let r = if range.min == 0.0 && range.max == 0.0 { Range { min: -1.0, max: 1.0 } } else { range };
    asymmetric(r, (r.max - r.min).max(floor), spec)
}

fn symmetric(m: f32, spec: QuantSpec) -> QParam {
    let steps = ((1i32 << (spec.bits - 1)) - 1) as f32;
    let scale = if m == 0.0 { 1.0 } else { m / steps };
    QParam { scale: stored(scale, spec), zero: 0 }
}

fn asymmetric(r: Range, width: f32, spec: QuantSpec) -> QParam {
    let scale = stored(width / ((1i32 << spec.bits) - 1) as f32, spec);
    let zero = (-r.min / scale).round_ties_even() as i32 + spec.qmin();
    QParam { scale, zero: zero.clamp(spec.qmin(), spec.qmax()) }
}

fn awq(range: Range, spec: QuantSpec) -> QParam {
    let scale = stored((range.max - range.min).max(MIN_RANGE) / ((1i32 << spec.bits) - 1) as f32, spec);
    let zero = -(range.min / scale).round_ties_even() as i32 + spec.qmin();
    QParam { scale, zero: zero.clamp(spec.qmin(), spec.qmax()) }
}

fn mse(data: &[f32], range: Range, spec: QuantSpec) -> (QParam, u32) {
    let (m, r) = if spec.zero {
        let r = if range.min == 0.0 && range.max == 0.0 { Range { min: -1.0, max: 1.0 } } else { range };
        (0.0, r)
    } else {
        (range.magnitude().max(MIN_RANGE), range)
    };
    let mut best = (QParam { scale: 1.0, zero: 0 }, 0, f32::INFINITY);
    for i in 0..MSE_STEPS {
        let p = 1.0 - i as f32 / 100.0;
        let q = if spec.zero {
            let shrunk = Range { min: p * r.min, max: p * r.max };
            asymmetric(shrunk, shrunk.max - shrunk.min, spec)
        } else {
            symmetric(p * m, spec)
        };
        let error: f32 =
            data.iter().map(|&x| (dequantize(quantize(x, q, spec), q) - x).abs().powf(MSE_NORM)).sum();
        if error < best.2 {
            best = (q, i, error);
        }
    }
    (best.0, best.1)
}

/// The code of `x`: `clamp(round(x / scale) + zero)`.
#[inline(always)]
pub fn quantize(x: f32, q: QParam, spec: QuantSpec) -> i32 {
    // A saturating float to int conversion would make NaN a valid-looking code; the callers refuse NaN before.
    let t = (x / q.scale).round_ties_even();
    let t = t.clamp(-16_777_216.0, 16_777_216.0) as i32;
    (t + q.zero).clamp(spec.qmin(), spec.qmax())
}

/// `scale * (code - zero)`.
#[inline(always)]
pub fn dequantize(code: i32, q: QParam) -> f32 {
    q.scale * (code - q.zero) as f32
}

/// Length along the last axis of the runs that share a scale, for rows of `cols` elements of a matrix
/// with `rows` rows.
pub fn run_length(spec: QuantSpec, rows: usize, cols: usize) -> usize {
    match spec.grain {
        Grain::Tensor => rows * cols,
        Grain::Row | Grain::Token => cols,
        Grain::Group(g) => g as usize,
    }
    .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::ScaleType;

    const R0: [f32; 8] = [0.1, -0.4, 0.35, 1.0, -0.05, 0.22, -0.61, 0.48];
    const R1: [f32; 8] = [0.3, 0.2, 0.1, 0.05, -0.02, 0.15, 0.27, 0.6];

    fn codes(data: &[f32], q: QParam, spec: QuantSpec) -> Vec<i32> {
        data.iter().map(|&x| quantize(x, q, spec)).collect()
    }

    // methods.md §1.1 [golden]: dynamic per token.
    #[test]
    fn per_token_golden() {
        let row = [0.5, -1.25, 2.0, 0.0, 3.1, -0.3, 0.75, -2.2];
        for (bits, scale, zero, want) in [
            (4, 0.353_333_35, 6, [7, 2, 12, 6, 15, 5, 8, 0]),
            (8, 0.020_784_315, 106, [130, 46, 202, 106, 255, 92, 142, 0]),
        ] {
            let spec = QuantSpec::asym(bits, Grain::Token);
            let q = qparam(&row, spec, Rule::MinMax);
            assert_eq!((q.scale, q.zero), (scale, zero));
            assert_eq!(codes(&row, q, spec), want);
        }
        let row = [0.5, 1.25, 2.0, 0.25];
        let spec = QuantSpec::asym(4, Grain::Token);
        let q = qparam(&row, spec, Rule::MinMax);
        assert_eq!((q.scale, q.zero), (0.133_333_34, 0));
        assert_eq!(codes(&row, q, spec), [4, 9, 15, 2]);
        let zeros = qparam(&[0.0; 4], spec, Rule::MinMax);
        assert_eq!(dequantize(quantize(0.0, zeros, spec), zeros), 0.0);
    }

    // methods.md §1.2 [golden]: weights, per row.
    #[test]
    fn weight_golden() {
        let check = |bits, sym: bool, rule, row: &[f32; 8], scale: f32, zero, step: u32, want: [i32; 8]| {
            let spec = if sym { QuantSpec::sym(bits, Grain::Row) } else { QuantSpec::asym(bits, Grain::Row) };
            let q = qparam(row, spec, rule);
            assert_eq!((q.scale, q.zero), (scale, zero), "w{bits} sym={sym} {rule}");
            assert_eq!(codes(row, q, spec), want, "w{bits} sym={sym} {rule}");
            if rule == Rule::Mse {
                assert_eq!(qparam_mse(row, spec).1, step);
            }
        };
        let s4 = ([1, -3, 2, 7, 0, 2, -4, 3], [4, 2, 1, 1, 0, 2, 3, 7]);
        check(4, true, Rule::MinMax, &R0, 0.142_857_15, 0, 0, s4.0);
        check(4, true, Rule::MinMax, &R1, 0.085_714_29, 0, 0, s4.1);
        check(4, true, Rule::Mse, &R0, 0.142_857_15, 0, 0, s4.0);
        check(4, true, Rule::Mse, &R1, 0.084_000_01, 0, 2, s4.1);
        let a4 = [7, 2, 9, 15, 6, 8, 0, 10];
        check(4, false, Rule::MinMax, &R0, 0.107_333_33, 6, 0, a4);
        check(4, false, Rule::MinMax, &R1, 0.041_333_333, 0, 0, [7, 5, 2, 1, 0, 4, 7, 15]);
        check(4, false, Rule::Mse, &R0, 0.107_333_33, 6, 0, a4);
        check(4, false, Rule::Mse, &R1, 0.039_266_665, 0, 5, [8, 5, 3, 1, 0, 4, 7, 15]);
        check(3, false, Rule::Mse, &R0, 0.2254, 3, 2, [3, 1, 5, 7, 3, 4, 0, 5]);
        check(3, false, Rule::Mse, &R1, 0.087_685_72, 0, 1, [3, 2, 1, 1, 0, 2, 3, 7]);
        check(8, true, Rule::Mse, &R0, 0.007_874_016, 0, 0, [13, -51, 44, 127, -6, 28, -77, 61]);
        check(8, true, Rule::Mse, &R1, 0.004_724_409_4, 0, 0, [64, 42, 21, 11, -4, 32, 57, 127]);
    }

    // methods.md §1.3 [golden]: AWQ leaves zero out of an all-positive range.
    #[test]
    fn awq_golden() {
        let row = [0.3, 0.2, 0.1, 0.05, 0.02, 0.15, 0.27, 0.6];
        let spec = QuantSpec::asym(4, Grain::Row);
        let q = qparam(&row, spec, Rule::Awq);
        assert_eq!((q.scale, q.zero), (0.038_666_67, 0));
        assert_eq!(codes(&row, q, spec), [8, 5, 3, 1, 1, 4, 7, 15]);
        assert!((dequantize(15, q) - 0.58).abs() < 1e-6);
    }

    // methods.md §7.5: quantize(dequantize(codes)) gives the same codes.
    #[test]
    fn codes_survive_the_round_trip() {
        for bits in 2..=8 {
            for scale in [ScaleType::F32, ScaleType::F16, ScaleType::BF16] {
                let spec = QuantSpec { scale, ..QuantSpec::asym(bits, Grain::Row) };
                let q = qparam(&R0, spec, Rule::MinMax);
                for code in spec.qmin()..=spec.qmax() {
                    assert_eq!(quantize(dequantize(code, q), q, spec), code);
                }
            }
        }
    }
}
