//! The arithmetic of affine integer grids: the only copy of rounding, clamping, scales and zero points.
//!
//! Everything is `f32`, rounding is half to even, and codes are chosen with the scale as stored.

use crate::quant::{Grain, QuantSpec, Rule};

mod grad;

pub use grad::{FakeGrad, clip_range_grad_run, fake_grad_run};

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
    /// Two passes of comparisons: these become vector instructions, which [`f32::min`] and two results at a time do not.
    /// What is no number is left out.
    #[inline(always)]
    fn of(data: &[f32]) -> Self {
        if data.is_empty() {
            return Range { min: 0.0, max: 0.0 };
        }
        Range { min: -Range::most::<true>(data), max: Range::most::<false>(data) }
    }

    /// The largest of the elements, or of their opposites.
    #[inline(always)]
    fn most<const OPPOSITE: bool>(data: &[f32]) -> f32 {
        const LANES: usize = 32;
        let mut acc = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = data.as_chunks::<LANES>();
        for x in chunks {
            for i in 0..LANES {
                let x = if OPPOSITE { -x[i] } else { x[i] };
                acc[i] = if x > acc[i] { x } else { acc[i] };
            }
        }
        for i in 0..rest.len() {
            let x = if OPPOSITE { -rest[i] } else { rest[i] };
            acc[i] = if x > acc[i] { x } else { acc[i] };
        }
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                acc[i] = if acc[i + width] > acc[i] { acc[i + width] } else { acc[i] };
            }
            width /= 2;
        }
        acc[0]
    }

    fn with_zero(self) -> Self {
        Range { min: self.min.min(0.0), max: self.max.max(0.0) }
    }

    /// `[-1, 1]` in place of a range that is a point.
    fn or_unit(self) -> Self {
        if self.min == 0.0 && self.max == 0.0 { Range { min: -1.0, max: 1.0 } } else { self }
    }

    fn magnitude(self) -> f32 {
        self.max.max(-self.min)
    }
}

/// Chooses scale and zero point for the elements of one group (methods.md §1.1, §1.2, §1.3).
pub fn qparam(data: &[f32], spec: QuantSpec, rule: Rule) -> QParam {
    qparam_scaled(data, spec, rule, 1.0, 1.0)
}

/// As [`qparam`], with factors on the upper and lower end of the range, which only [`Rule::Dynamic`] heeds.
#[inline(always)]
pub fn qparam_scaled(data: &[f32], spec: QuantSpec, rule: Rule, hi: f32, lo: f32) -> QParam {
    let range = Range::of(data);
    match rule {
        Rule::Awq if spec.zero => awq(range, spec),
        Rule::Awq | Rule::MinMax => minmax(range.with_zero(), MIN_RANGE, spec),
        Rule::Mse => mse(data, range.with_zero(), spec).0,
        Rule::Dynamic => {
            let r = range.with_zero();
            minmax(Range { min: r.min * lo, max: r.max * hi }, 0.0, spec)
        }
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

fn minmax(range: Range, floor: f32, spec: QuantSpec) -> QParam {
    if !spec.zero {
        return symmetric(range.magnitude().max(floor), spec);
    }
    let r = range.or_unit();
    asymmetric(r, (r.max - r.min).max(floor), spec)
}

fn symmetric(m: f32, spec: QuantSpec) -> QParam {
    let scale = if m == 0.0 { 1.0 } else { m / steps(spec) };
    QParam { scale: stored(scale, spec), zero: 0 }
}

/// How many steps of the scale the range is cut into.
fn steps(spec: QuantSpec) -> f32 {
    if spec.zero { ((1i32 << spec.bits) - 1) as f32 } else { ((1i32 << (spec.bits - 1)) - 1) as f32 }
}

fn asymmetric(r: Range, width: f32, spec: QuantSpec) -> QParam {
    let scale = stored(width / steps(spec), spec);
    let zero = (-r.min / scale).round_ties_even() as i32 + spec.qmin();
    QParam { scale, zero: zero.clamp(spec.qmin(), spec.qmax()) }
}

fn awq(range: Range, spec: QuantSpec) -> QParam {
    let scale = stored((range.max - range.min).max(MIN_RANGE) / steps(spec), spec);
    let zero = -(range.min / scale).round_ties_even() as i32 + spec.qmin();
    QParam { scale, zero: zero.clamp(spec.qmin(), spec.qmax()) }
}

#[inline(always)]
fn mse(data: &[f32], range: Range, spec: QuantSpec) -> (QParam, u32) {
    let (m, r) = (range.magnitude().max(MIN_RANGE), range.or_unit());
    let mut best = (QParam { scale: 1.0, zero: 0 }, 0, f32::INFINITY);
    for i in 0..MSE_STEPS {
        let p = 1.0 - i as f32 / 100.0;
        let q = if spec.zero {
            let shrunk = Range { min: p * r.min, max: p * r.max };
            asymmetric(shrunk, shrunk.max - shrunk.min, spec)
        } else {
            symmetric(p * m, spec)
        };
        let error = mse_error(data, q, spec);
        if error < best.2 {
            best = (q, i, error);
        }
    }
    (best.0, best.1)
}

/// `sum |snap(x) - x|^2.4`, in partial sums, so that the order of additions is the same at every vector width; four
/// vectors of them, since one waits for its chain of operations.
#[inline(always)]
fn mse_error(data: &[f32], q: QParam, spec: QuantSpec) -> f32 {
    const LANES: usize = 64;
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = data.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            sums[i] += pow_norm((snap(x[i], q, spec) - x[i]).abs());
        }
    }
    for i in 0..rest.len() {
        sums[i] += pow_norm((snap(rest[i], q, spec) - rest[i]).abs());
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

/// `x^2.4` for `x >= 0`, to about 2e-6: `x² * 2^(0.4 log2 x)` with polynomials, so that loops over it vectorize.
#[inline(always)]
fn pow_norm(x: f32) -> f32 {
    const LOG2: [f32; 8] = [
        1.442_694_9,
        -0.721_352_76,
        0.480_924_04,
        -0.360_241_98,
        0.287_075_6,
        -0.248_821_81,
        0.234_209_85,
        -0.146_203_53,
    ];
    const EXP2: [f32; 6] =
        [1.000_000_1, std::f32::consts::LN_2, 0.240_221_07, 0.055_503_27, 0.009_676_037, 0.001_340_043_3];
    // Adding and taking away 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const SQRT_HALF: u32 = 0x3f35_04f3;
    let shifted = x.to_bits().wrapping_sub(SQRT_HALF);
    let exponent = ((shifted as i32) >> 23) as f32;
    let t = f32::from_bits((shifted & 0x007f_ffff) + SQRT_HALF) - 1.0;
    let log = LOG2.iter().rev().fold(0.0, |a, c| a * t + c) * t;
    let y = (MSE_NORM - 2.0) * (exponent + log);
    let r = y + ROUND;
    let f = y - (r - ROUND);
    let power = EXP2.iter().rev().fold(0.0, |a, c| a * f + c);
    let scale = f32::from_bits(((r.to_bits() as i32 - ROUND.to_bits() as i32 + 127) << 23) as u32);
    x * x * (power * scale)
}

/// The value that `x` becomes: `dequantize(quantize(x))`, without leaving the floats.
#[inline(always)]
pub fn snap(x: f32, q: QParam, spec: QuantSpec) -> f32 {
    let zero = q.zero as f32;
    let code = ((x / q.scale).round_ties_even() + zero).clamp(spec.qmin() as f32, spec.qmax() as f32);
    q.scale * (code - zero)
}

/// Scale and zero point of a run from its data, and the run as they leave it.
#[inline(always)]
pub fn fake_run(x: &[f32], spec: QuantSpec, rule: Rule, factors: (f32, f32), y: &mut [f32]) {
    let q = qparam_scaled(x, spec, rule, factors.0, factors.1);
    for (y, &x) in y.iter_mut().zip(x) {
        *y = snap(x, q, spec);
    }
}

/// Limits a run to `[lo * min, hi * max]` of itself.
#[inline(always)]
pub fn clip_range_run(x: &[f32], (hi, lo): (f32, f32), y: &mut [f32]) {
    let r = Range::of(x);
    let (low, high) = (lo * r.min, hi * r.max);
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x.max(low).min(high);
    }
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
/// with `rows` rows. Channels have no runs: see [`scale_index`].
pub fn run_length(spec: QuantSpec, rows: usize, cols: usize) -> usize {
    match spec.grain {
        Grain::Tensor => rows * cols,
        Grain::Row | Grain::Token => cols,
        Grain::Group(g) => g as usize,
        Grain::Channel => 1,
    }
    .max(1)
}

/// Which of `count` factors a run has, for rows of `per_row` runs: neighbours share one, and rows have the same.
#[inline(always)]
pub fn factor_of(run: usize, per_row: usize, count: usize) -> usize {
    run % per_row * count / per_row
}

/// Which scale element `at` of a matrix of `cols` columns has, for runs of [`run_length`] elements.
#[inline(always)]
pub fn scale_index(spec: QuantSpec, at: usize, run: usize, cols: usize) -> usize {
    if spec.grain == Grain::Channel { at % cols } else { at / run }
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
        for (bits, clip, scale, zero, want) in [
            (4, 1.0, 0.353_333_35, 6, [7, 2, 12, 6, 15, 5, 8, 0]),
            (4, 0.9, 0.317_999_96, 6, [8, 2, 12, 6, 15, 5, 8, 0]),
            (4, 0.95, 0.335_666_66, 6, [7, 2, 12, 6, 15, 5, 8, 0]),
            (8, 1.0, 0.020_784_315, 106, [130, 46, 202, 106, 255, 92, 142, 0]),
            (3, 0.95, 0.719_285_67, 3, [4, 1, 6, 3, 7, 3, 4, 0]),
        ] {
            let spec = QuantSpec::asym(bits, Grain::Token);
            let q = qparam_scaled(&row, spec, Rule::Dynamic, clip, clip);
            assert_eq!((q.scale, q.zero), (scale, zero));
            assert_eq!(codes(&row, q, spec), want);
        }
        let row = [0.5, 1.25, 2.0, 0.25];
        let spec = QuantSpec::asym(4, Grain::Token);
        let q = qparam(&row, spec, Rule::Dynamic);
        assert_eq!((q.scale, q.zero), (0.133_333_34, 0));
        assert_eq!(codes(&row, q, spec), [4, 9, 15, 2]);
        let zeros = qparam(&[0.0; 4], spec, Rule::Dynamic);
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

    #[test]
    fn powers_are_close_enough_to_choose_by() {
        assert_eq!(pow_norm(0.0), 0.0);
        for i in 0..20_000 {
            let x = (i as f32 * 0.002 - 20.0).exp2();
            let want = f64::from(x).powf(2.4);
            let gap = (f64::from(pow_norm(x)) - want).abs() / want;
            assert!(gap < 2e-6, "{x}: off by {gap:e}");
        }
    }

    #[test]
    fn snapping_is_quantizing_and_back() {
        for bits in 2..=8 {
            for spec in [QuantSpec::asym(bits, Grain::Row), QuantSpec::sym(bits, Grain::Row)] {
                let q = qparam(&R0, spec, Rule::MinMax);
                for i in -400..400 {
                    let x = i as f32 * 0.005;
                    assert_eq!(snap(x, q, spec), dequantize(quantize(x, q, spec), q));
                }
            }
        }
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
