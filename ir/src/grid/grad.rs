//! Gradients through the grid: straight through the rounding, exact through scales and ends of ranges (methods.md
//! §7.3). The zero point's rounding gives no gradient; a code that is clamped gives none to its element.

use super::{MIN_RANGE, Range, qparam_scaled, steps};
use crate::quant::{QuantSpec, Rule};

/// Gradients with respect to the factors on the ends of a range.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct FakeGrad {
    /// Upper end.
    pub hi: f64,
    /// Lower end.
    pub lo: f64,
}

/// Partial sums, and elements that loops take at a time: plain loops over arrays, which vectorize where closures and
/// zipped chunks do not.
const LANES: usize = 16;

/// Place of the first element that equals `x`.
#[inline(always)]
fn place(data: &[f32], x: f32) -> usize {
    let (chunks, _) = data.as_chunks::<LANES>();
    let mut from = 0;
    for c in chunks {
        let mut hits = 0u32;
        for v in c {
            hits |= u32::from(*v == x);
        }
        if hits != 0 {
            break;
        }
        from += LANES;
    }
    data[from..].iter().position(|v| *v == x).map_or(0, |i| from + i)
}

/// Gradient of [`super::fake_run`] on one run: writes `dx`, gives the gradients of the factors.
///
/// With the residual `r = round(x / s) - x / s` held fixed, `y = s (clamp(x / s + r + z) - z)`; inside the clamp
/// `dy/dx = 1`, and everywhere `dy/ds = code - z - [inside] x / s`.
#[inline(always)]
pub fn fake_grad_run(
    x: &[f32],
    dy: &[f32],
    spec: QuantSpec,
    rule: Rule,
    (hi, lo): (f32, f32),
    dx: &mut [f32],
) -> FakeGrad {
    let q = qparam_scaled(x, spec, rule, hi, lo);
    let (zero, qmin, qmax) = (q.zero as f32, spec.qmin() as f32, spec.qmax() as f32);
    let mut sums = [0.0f32; LANES];
    let (xs, dys) = (x.as_chunks::<LANES>(), dy.as_chunks::<LANES>());
    let (dxs, dx_rest) = dx.as_chunks_mut::<LANES>();
    for ((x, dy), dx) in xs.0.iter().zip(dys.0).zip(dxs) {
        for i in 0..LANES {
            let t = x[i] / q.scale;
            let code = t.round_ties_even() + zero;
            let kept = clamped(code, qmin, qmax);
            let inside = if kept == code { 1.0 } else { 0.0 };
            dx[i] = inside * dy[i];
            sums[i] += dy[i] * (kept - zero - inside * t);
        }
    }
    for i in 0..dx_rest.len() {
        let t = xs.1[i] / q.scale;
        let code = t.round_ties_even() + zero;
        let kept = clamped(code, qmin, qmax);
        let inside = if kept == code { 1.0 } else { 0.0 };
        dx_rest[i] = inside * dys.1[i];
        sums[i] += dys.1[i] * (kept - zero - inside * t);
    }
    let ds = sums.iter().map(|s| f64::from(*s)).sum::<f64>();
    ends(x, spec, rule, (hi, lo), ds / f64::from(steps(spec)), dx)
}

/// `x` within bounds, NaN as it is, without the check of the bounds that [`f32::clamp`] makes.
#[inline(always)]
fn clamped(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// Spreads the gradient of the range's width (or magnitude) over its ends.
#[inline(always)]
fn ends(
    x: &[f32],
    spec: QuantSpec,
    rule: Rule,
    (hi, lo): (f32, f32),
    width: f64,
    dx: &mut [f32],
) -> FakeGrad {
    let plain = Range::of(x).with_zero();
    let (hi, lo) = if rule == Rule::Dynamic { (hi, lo) } else { (1.0, 1.0) };
    let (high, low) = (hi * plain.max, lo * plain.min);
    let size = if spec.zero { high - low } else { high.max(-low) };
    if size == 0.0 || (rule == Rule::MinMax && size < MIN_RANGE) {
        return FakeGrad::default();
    }
    let (d_high, d_low) = match spec.zero {
        true => (width, -width),
        false if high >= -low => (width, 0.0),
        false => (0.0, -width),
    };
    // A range that ends at the zero that was included has no element there.
    if plain.max > 0.0 {
        dx[place(x, plain.max)] += (d_high * f64::from(hi)) as f32;
    }
    if plain.min < 0.0 {
        dx[place(x, plain.min)] += (d_low * f64::from(lo)) as f32;
    }
    FakeGrad { hi: d_high * f64::from(plain.max), lo: d_low * f64::from(plain.min) }
}

/// Gradient of [`super::clip_range_run`] on one run: writes `dx`, gives the gradients of the factors.
#[inline(always)]
pub fn clip_range_grad_run(x: &[f32], dy: &[f32], (hi, lo): (f32, f32), dx: &mut [f32]) -> FakeGrad {
    let r = Range::of(x);
    let (low, high) = (lo * r.min, hi * r.max);
    let (mut above, mut below) = ([0.0f32; LANES], [0.0f32; LANES]);
    let (xs, dys) = (x.as_chunks::<LANES>(), dy.as_chunks::<LANES>());
    let (dxs, dx_rest) = dx.as_chunks_mut::<LANES>();
    for ((x, dy), dx) in xs.0.iter().zip(dys.0).zip(dxs) {
        for i in 0..LANES {
            let (over, under) = outside(x[i], low, high);
            dx[i] = if over | under { 0.0 } else { dy[i] };
            above[i] += if over { dy[i] } else { 0.0 };
            below[i] += if under { dy[i] } else { 0.0 };
        }
    }
    for i in 0..dx_rest.len() {
        let (over, under) = outside(xs.1[i], low, high);
        dx_rest[i] = if over | under { 0.0 } else { dys.1[i] };
        above[i] += if over { dys.1[i] } else { 0.0 };
        below[i] += if under { dys.1[i] } else { 0.0 };
    }
    let sum = |v: &[f32; LANES]| v.iter().map(|s| f64::from(*s)).sum::<f64>();
    let (d_high, d_low) = (sum(&above), sum(&below));
    dx[place(x, r.max)] += (d_high * f64::from(hi)) as f32;
    dx[place(x, r.min)] += (d_low * f64::from(lo)) as f32;
    FakeGrad { hi: d_high * f64::from(r.max), lo: d_low * f64::from(r.min) }
}

/// Whether `x` is limited from above, or from below: the upper limit is applied last, so it wins where they cross.
#[inline(always)]
fn outside(x: f32, low: f32, high: f32) -> (bool, bool) {
    let over = x.max(low) > high;
    (over, (x < low) & !over)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::clip_range_run;
    use crate::quant::Grain;

    fn data(seed: u32, n: usize) -> Vec<f32> {
        let mut s = seed;
        let mut next = || {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 24) as f32 * 2.0 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// What the fake quantizer computes with its roundings held fixed, in `f64`.
    fn surrogate(
        x: &[f64],
        base: &[f32],
        spec: QuantSpec,
        rule: Rule,
        at: (f64, f64),
        base_at: (f32, f32),
    ) -> Vec<f64> {
        let q = qparam_scaled(base, spec, rule, base_at.0, base_at.1);
        let ends = |v: &[f64]| v.iter().fold((0.0f64, 0.0f64), |(lo, hi), x| (lo.min(*x), hi.max(*x)));
        let (min, max) = ends(x);
        let (min, max) = if rule == Rule::Dynamic { (min * at.1, max * at.0) } else { (min, max) };
        let size = if spec.zero { max - min } else { max.max(-min) };
        let scale = size / f64::from(steps(spec));
        let (zero, qmin, qmax) = (f64::from(q.zero), f64::from(spec.qmin()), f64::from(spec.qmax()));
        x.iter()
            .zip(base)
            .map(|(x, b)| {
                let t = b / q.scale;
                let code = t.round_ties_even() + q.zero as f32;
                let residual = f64::from(t.round_ties_even()) - f64::from(*b) / f64::from(q.scale);
                let code = if f64::from(code) < qmin {
                    qmin
                } else if f64::from(code) > qmax {
                    qmax
                } else {
                    x / scale + residual + zero
                };
                scale * (code - zero)
            })
            .collect()
    }

    #[test]
    fn fake_quant_gradient_is_the_finite_difference() {
        for (i, (spec, rule, at)) in [
            (QuantSpec::asym(4, Grain::Token), Rule::Dynamic, (0.8f32, 0.7f32)),
            (QuantSpec::asym(8, Grain::Token), Rule::Dynamic, (0.98, 0.98)),
            (QuantSpec::sym(4, Grain::Token), Rule::Dynamic, (0.6, 0.9)),
            (QuantSpec::sym(4, Grain::Row), Rule::MinMax, (1.0, 1.0)),
            (QuantSpec::asym(3, Grain::Row), Rule::MinMax, (1.0, 1.0)),
        ]
        .into_iter()
        .enumerate()
        {
            let (x, dy) = (data(i as u32 + 1, 37), data(i as u32 + 90, 37));
            let mut dx = vec![0.0; 37];
            let g = fake_grad_run(&x, &dy, spec, rule, at, &mut dx);
            let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let loss = |x: &[f64], hi: f64, lo: f64| -> f64 {
                let y = surrogate(x, &x_base(&wide), spec, rule, (hi, lo), at);
                y.iter().zip(&dy).map(|(y, d)| y * f64::from(*d)).sum()
            };
            fn x_base(x: &[f64]) -> Vec<f32> {
                x.iter().map(|x| *x as f32).collect()
            }
            let (hi, lo, h) = (f64::from(at.0), f64::from(at.1), 1e-6);
            for j in 0..x.len() {
                let mut moved = wide.clone();
                moved[j] += h;
                let up = loss(&moved, hi, lo);
                moved[j] -= 2.0 * h;
                let fd = (up - loss(&moved, hi, lo)) / (2.0 * h);
                assert!(
                    (fd - f64::from(dx[j])).abs() < 2e-4 * (1.0 + fd.abs()),
                    "{spec} dx[{j}]: {fd} {}",
                    dx[j]
                );
            }
            let fd_hi = (loss(&wide, hi + h, lo) - loss(&wide, hi - h, lo)) / (2.0 * h);
            let fd_lo = (loss(&wide, hi, lo + h) - loss(&wide, hi, lo - h)) / (2.0 * h);
            if rule == Rule::Dynamic {
                assert!((fd_hi - g.hi).abs() < 1e-4 * (1.0 + fd_hi.abs()), "{spec}: {fd_hi} {}", g.hi);
                assert!((fd_lo - g.lo).abs() < 1e-4 * (1.0 + fd_lo.abs()), "{spec}: {fd_lo} {}", g.lo);
            }
        }
    }

    #[test]
    fn clip_range_gradient_is_the_finite_difference() {
        let (x, dy, at) = (data(8, 41), data(6, 41), (0.6f32, 0.7f32));
        let mut dx = vec![0.0; 41];
        let g = clip_range_grad_run(&x, &dy, at, &mut dx);
        let loss = |x: &[f32], at: (f32, f32)| -> f64 {
            let mut y = vec![0.0; 41];
            clip_range_run(x, at, &mut y);
            y.iter().zip(&dy).map(|(y, d)| f64::from(*y) * f64::from(*d)).sum()
        };
        let h = 1e-3f32;
        for j in 0..x.len() {
            let (mut up, mut down) = (x.clone(), x.clone());
            up[j] += h;
            down[j] -= h;
            let fd = (loss(&up, at) - loss(&down, at)) / f64::from(2.0 * h);
            // An element within a step of a bound has no derivative there.
            let near = [0.6 * 0.98, -0.7 * 0.98].iter().any(|b| (x[j] - b).abs() < 3.0 * h);
            assert!(near || (fd - f64::from(dx[j])).abs() < 2e-3, "dx[{j}]: {fd} {}", dx[j]);
        }
        let fd = (loss(&x, (at.0 + 1e-3, at.1)) - loss(&x, (at.0 - 1e-3, at.1))) / 2e-3;
        assert!((fd - g.hi).abs() < 1e-2, "{fd} {}", g.hi);
        let fd = (loss(&x, (at.0, at.1 + 1e-3)) - loss(&x, (at.0, at.1 - 1e-3))) / 2e-3;
        assert!((fd - g.lo).abs() < 1e-2, "{fd} {}", g.lo);
    }

    #[test]
    fn degenerate_runs_have_finite_gradients() {
        for x in [vec![0.0f32; 8], vec![3.0; 8], vec![-2.0; 8], vec![1e-30; 8]] {
            for spec in [QuantSpec::asym(4, Grain::Token), QuantSpec::sym(4, Grain::Token)] {
                let (dy, mut dx) = (vec![1.0; 8], vec![0.0; 8]);
                let g = fake_grad_run(&x, &dy, spec, Rule::Dynamic, (0.9, 0.9), &mut dx);
                assert!(dx.iter().all(|d| d.is_finite()) && g.hi.is_finite() && g.lo.is_finite());
                let g = clip_range_grad_run(&x, &dy, (0.9, 0.9), &mut dx);
                assert!(dx.iter().all(|d| d.is_finite()) && g.hi.is_finite() && g.lo.is_finite());
            }
        }
    }
}
