//! The numbers of methods.md §4.5, and properties of rounding with moved errors.

use std::sync::Arc;

use qrmc_ir::grid::{QParam, dequantize, qparam, quantize};
use qrmc_ir::{
    Engine, EngineError, Func, Grain, Module, NoWeights, Prepared, QuantSpec, Rule, Tensor, WeightSource,
    interp, linalg,
};

use super::GptqOptions;
use super::gram::{Gram, Panel};
use super::layer::factor;
use super::round::{Job, Rounded, Shared};
use crate::calibrate::NoStore;
use crate::pass::{LayerLoss, PassCx, Report};
use crate::unit::Unit;

/// The reference interpreter as an engine.
struct Interpreter;

struct Ready(Module, Func);

impl Engine for Interpreter {
    fn prepare(&self, m: &Module, f: &Func, _: &dyn WeightSource) -> Result<Box<dyn Prepared>, EngineError> {
        Ok(Box::new(Ready(m.clone(), f.clone())))
    }
}

impl Prepared for Ready {
    fn run(&self, args: &[&Tensor]) -> Result<Vec<Tensor>, EngineError> {
        let args: Vec<Tensor> = args.iter().map(|t| (*t).clone()).collect();
        Ok(interp::run(&self.0, &self.1, &NoWeights, &args, &self.1.results)?)
    }
}

struct Quiet;

impl Report for Quiet {
    fn progress(&mut self, _: &str, _: usize, _: usize, _: &str) {}
    fn loss(&mut self, _: &str, _: LayerLoss) {}
    fn flops(&mut self, _: &str, _: f64) {}
}

fn with_cx<R>(f: impl FnOnce(&Unit, &mut PassCx<'_>) -> R) -> R {
    let unit = Unit::new(Module::default(), Arc::new(NoWeights));
    let mut cx = PassCx {
        engine: &Interpreter,
        calibration: None,
        store: Arc::new(NoStore),
        source_key: String::new(),
        report: &mut Quiet,
    };
    f(&unit, &mut cx)
}

/// `factor * xᵀ x` of tokens `[.., n]`.
fn gram_of(x: &[f32], n: usize, factor: f64) -> Gram {
    let mut gram = Gram::new(n);
    // In two panels, as wide inputs come.
    let half = n / 2;
    for (from, rows) in [(0, half), (half, n - half)] {
        let at = |i: usize, j: usize| x.chunks(n).map(|t| f64::from(t[i]) * f64::from(t[j])).sum::<f64>();
        let data: Vec<f32> = (from..from + rows)
            .flat_map(|i| (from..n).map(move |j| (i, j)))
            .map(|(i, j)| at(i, j) as f32)
            .collect();
        gram.add(&Interpreter, &Panel { from, data: &data }, factor);
    }
    gram
}

/// `H` itself.
fn square_of(x: &[f32], n: usize, factor: f64) -> Vec<f64> {
    let at = |i: usize, j: usize| x.chunks(n).map(|t| f64::from(t[i]) * f64::from(t[j])).sum::<f64>();
    (0..n * n).map(|e| factor * f64::from(at(e / n, e % n) as f32)).collect()
}

/// Numbers in `[-1, 1)` from a seed.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let draws = crate::check::seeded_tokens(seed, n, 65536);
    draws.as_i32().unwrap().iter().map(|&r| r as f32 / 32768.0 - 1.0).collect()
}

struct Case {
    w: Vec<f32>,
    spec: QuantSpec,
    rule: Rule,
    options: GptqOptions,
}

struct Outcome {
    rounded: Rounded,
    order: Vec<usize>,
    dead: Vec<usize>,
    damping: Option<f64>,
    events: Vec<String>,
}

fn round(case: &Case, gram: &mut Gram) -> Outcome {
    with_cx(|unit, cx| {
        let n = gram.diag().len();
        let (mut events, mut order) = (Vec::new(), (0..n).collect::<Vec<usize>>());
        let dead = gram.take_dead();
        if case.options.order {
            order.sort_by(|&a, &b| gram.diag()[b].total_cmp(&gram.diag()[a]));
        }
        let damping = factor(&case.options, cx, gram, &order, &mut events);
        let w = Tensor::f32([case.w.len() / n, n], case.w.clone());
        let job = Job { w, spec: case.spec, rule: case.rule };
        let shared = Shared { gram, order: &order, dead: &dead, damping };
        let rounded = job.round(unit, cx, &case.options, &shared).unwrap();
        Outcome { rounded, order, dead, damping, events }
    })
}

fn nearest(case: &Case, n: usize) -> Vec<u8> {
    let code = |row: &[f32]| -> Vec<u8> {
        let run = if let Grain::Group(g) = case.spec.grain { g as usize } else { n };
        let of = |x: &[f32]| {
            let q = qparam(x, case.spec, case.rule);
            x.iter().map(|&x| (quantize(x, q, case.spec) - case.spec.qmin()) as u8).collect::<Vec<u8>>()
        };
        row.chunks(run).flat_map(of).collect()
    };
    case.w.chunks(n).flat_map(code).collect()
}

const W: [f32; 8] = [0.9, -0.35, 0.22, 0.61, -0.2, 0.75, 0.41, -0.58];
const X: [f32; 16] = [1.0, 0.8, 2.0, 0.5, 0.5, 0.7, 1.5, 0.1, 2.0, 1.5, 3.5, 0.9, -0.6, -0.5, -1.0, -0.4];

// methods.md §4.5 [golden].
#[test]
fn golden() {
    let want_h = [5.61, 4.45, 10.35, 2.59, 3.63, 8.4, 2.02, 19.5, 4.7, 1.23];
    let plain =
        [2.58517, -0.17379, -0.92389, -1.53437, 3.15821, -1.34178, -0.0561, 0.61467, -2.21389, 0.8754];
    let ordered =
        [1.7412, -1.37171, -2.34153, 0.07584, 2.19124, -1.67082, -1.76274, 1.31533, -2.03611, 0.8754];
    let above = |m: &[f64]| -> Vec<f64> {
        (0..4).flat_map(|i| (i..4).map(move |j| (i, j))).map(|(i, j)| m[i * 4 + j]).collect()
    };
    for (have, want) in above(&square_of(&X, 4, 1.0)).iter().zip(want_h) {
        assert!((have - want).abs() < 1e-5, "{have} {want}");
    }
    for (order, perm, u, codes) in
        [(false, [0, 1, 2, 3], plain, [7, 0, 3, 6]), (true, [2, 0, 1, 3], ordered, [7, 1, 3, 5])]
    {
        let case = Case {
            w: W.to_vec(),
            spec: QuantSpec::asym(3, Grain::Group(4)),
            rule: Rule::MinMax,
            options: GptqOptions { order, ..GptqOptions::default() },
        };
        // Two sequences: 2 / n is 1.
        let mut gram = gram_of(&X, 4, 1.0);
        let out = round(&case, &mut gram);
        assert_eq!(out.order, perm);
        assert_eq!((out.dead.len(), out.events.len()), (0, 0));
        for (have, want) in above(&gram.upper(0, 4)).iter().zip(u) {
            assert!((have - want).abs() < 1e-5 * 5.0, "{have} {want}");
        }
        let (have, sides) = out.rounded.parts();
        assert_eq!(sides[0], QParam { scale: 0.178_571_43, zero: 2 });
        assert_eq!(sides[1], QParam { scale: 0.189_999_98, zero: 3 });
        assert_eq!(have[..4], codes);
        assert_eq!(have[4..], [2, 7, 5, 0]);
        assert_eq!(nearest(&case, 4), [7, 0, 3, 5, 2, 7, 5, 0]);
        let wide: Vec<f64> = W.iter().map(|&x| f64::from(x)).collect();
        let norm = gram.quadratic(&Interpreter, &wide);
        assert!((out.rounded.losses[0] * norm - 0.09244).abs() < 1e-5);
        if !order {
            assert!((out.rounded.losses[1] * norm - 0.01773).abs() < 1e-5);
        }
    }
}

#[test]
fn factors_and_losses_of_large_matrices() {
    // More than one block of rows, and more than one strip.
    let n = 300;
    let x = noise(n * 350, 1);
    let h = square_of(&x, n, 0.5);
    let mut gram = gram_of(&x, n, 0.5);
    let order: Vec<usize> = (0..n).map(|i| (i * 7) % n).collect();
    assert!(gram.factor(&Interpreter, &order, 0.25));
    let u = gram.upper(0, n);
    // Uᵀ U (H + damping) is the identity.
    let mut left = vec![0.0; n * n];
    let upper = linalg::MatView::new(&u, n, n, n);
    linalg::add_product(upper.t(), upper, 1.0, &mut left, n);
    let damped: Vec<f64> = (0..n * n)
        .map(|e| h[order[e / n] * n + order[e % n]] + if e / n == e % n { 0.25 } else { 0.0 })
        .collect();
    let mut one = vec![0.0; n * n];
    let (left, right) = (linalg::MatView::new(&left, n, n, n), linalg::MatView::new(&damped, n, n, n));
    linalg::add_product(left, right, 1.0, &mut one, n);
    for (e, x) in one.iter().enumerate() {
        let want = f64::from(u8::from(e / n == e % n));
        assert!((x - want).abs() < 1e-9, "{e}: {x}");
    }
    // Rows beyond a block are the rest of U, and H is still there.
    let beyond = gram.beyond(40, 200);
    for (r, c) in [(0, 0), (159, 99), (3, 50)] {
        let at = r * beyond.strides.0 + c * beyond.strides.1;
        assert_eq!(beyond.data[at], u[(40 + r) * n + 200 + c]);
    }
    let d: Vec<f64> = noise(3 * n, 2).into_iter().map(f64::from).collect();
    let want: f64 = d.chunks(n).map(|d| (0..n * n).map(|e| d[e / n] * h[e] * d[e % n]).sum::<f64>()).sum();
    assert!((gram.quadratic(&Interpreter, &d) - want).abs() < 1e-9 * want);
}

/// The method as it is written down, on explicit matrices: no blocks, nothing is put off.
fn reference(case: &Case, x: &[f32], n: usize, factor: f64) -> Vec<u8> {
    let mut h = square_of(x, n, factor);
    let mean = (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64;
    (0..n).for_each(|i| h[i * n + i] += case.options.damp * mean);
    linalg::invert(&mut h, n);
    // The upper factor of the inverse, a row at a time.
    let mut u = vec![0.0; n * n];
    for i in 0..n {
        for j in i..n {
            let s: f64 = (0..i).map(|p| u[p * n + i] * u[p * n + j]).sum();
            u[i * n + j] = if i == j { (h[i * n + i] - s).sqrt() } else { (h[i * n + j] - s) / u[i * n + i] };
        }
    }
    let run = if let Grain::Group(g) = case.spec.grain { g as usize } else { n };
    let mut codes = Vec::new();
    for row in case.w.chunks(n) {
        let mut w: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
        let mut q = QParam { scale: 1.0, zero: 0 };
        for i in 0..n {
            if i % run == 0 {
                let group: Vec<f32> = w[i..i + run].iter().map(|&x| x as f32).collect();
                q = qparam(&group, case.spec, case.rule);
            }
            let code = quantize(w[i] as f32, q, case.spec);
            let e = (w[i] - f64::from(dequantize(code, q))) / u[i * n + i];
            (i..n).for_each(|j| w[j] -= e * u[i * n + j]);
            codes.push((code - case.spec.qmin()) as u8);
        }
    }
    codes
}

#[test]
fn blocks_do_not_show_and_groups_see_every_error_before_them() {
    let (n, rows) = (48, 5);
    let x = noise(n * 60, 3);
    for spec in [
        QuantSpec::asym(3, Grain::Group(12)),
        QuantSpec::sym(4, Grain::Group(8)),
        QuantSpec::asym(4, Grain::Row),
    ] {
        for rule in [Rule::MinMax, Rule::Mse] {
            for block in [1, 8, 13, 128] {
                let options = GptqOptions { block, ..GptqOptions::default() };
                let case = Case { w: noise(rows * n, 4), spec, rule, options };
                let out = round(&case, &mut gram_of(&x, n, 0.1));
                assert_eq!(out.rounded.parts().0, reference(&case, &x, n, 0.1), "{spec} {rule} {block}");
                assert!(out.rounded.losses[1] < out.rounded.losses[0]);
                if !spec.signed {
                    assert_ne!(out.rounded.parts().0, nearest(&case, n));
                }
            }
        }
    }
}

#[test]
fn stale_groups_are_those_of_the_start_of_the_block() {
    let (n, rows) = (32, 3);
    let x = noise(n * 40, 5);
    let case = |stale, block| Case {
        w: noise(rows * n, 6),
        spec: QuantSpec::asym(3, Grain::Group(8)),
        rule: Rule::MinMax,
        options: GptqOptions { stale, block, ..GptqOptions::default() },
    };
    let sides =
        |stale, block| round(&case(stale, block), &mut gram_of(&x, n, 0.1)).rounded.parts().1.to_vec();
    // One block: all scales are those of the weight itself. Blocks that are groups: nothing is stale.
    let w = noise(rows * n, 6);
    let own: Vec<QParam> =
        w.chunks(8).map(|g| qparam(g, QuantSpec::asym(3, Grain::Group(8)), Rule::MinMax)).collect();
    assert_eq!(sides(true, 32), own);
    assert_eq!(sides(true, 8), sides(false, 128));
    assert_ne!(sides(true, 32), sides(false, 32));
}

#[test]
fn independent_inputs_mean_rounding_to_nearest() {
    let (n, rows) = (64, 7);
    let mut identity = vec![0.0f32; n * n];
    (0..n).for_each(|i| identity[i * n + i] = 1.0);
    for order in [false, true] {
        for spec in [QuantSpec::asym(4, Grain::Group(16)), QuantSpec::sym(3, Grain::Row)] {
            for rule in [Rule::MinMax, Rule::Mse] {
                let options = GptqOptions { order, ..GptqOptions::default() };
                let case = Case { w: noise(rows * n, 7), spec, rule, options };
                let out = round(&case, &mut gram_of(&identity, n, 1.0));
                assert_eq!(out.rounded.parts().0, nearest(&case, n));
                assert!((out.rounded.losses[0] - out.rounded.losses[1]).abs() < 1e-12);
            }
        }
    }
}

#[test]
fn dead_inputs_get_zero_weights() {
    let (n, rows) = (24, 4);
    let mut x = noise(n * 40, 8);
    let is_dead = |j: usize| j % 5 == 2;
    x.chunks_mut(n).for_each(|t| (0..n).filter(|j| is_dead(*j)).for_each(|j| t[j] = 0.0));
    for (order, grain) in [(false, Grain::Group(8)), (true, Grain::Group(8)), (false, Grain::Row)] {
        let case = Case {
            w: noise(rows * n, 9),
            spec: QuantSpec::asym(4, grain),
            rule: Rule::MinMax,
            options: GptqOptions { order, ..GptqOptions::default() },
        };
        let out = round(&case, &mut gram_of(&x, n, 1.0));
        assert_eq!(out.dead, (0..n).filter(|j| is_dead(*j)).collect::<Vec<_>>());
        let (codes, sides) = out.rounded.parts();
        for row in 0..rows {
            for &j in &out.dead {
                let side = if grain == Grain::Row { row } else { row * 3 + j / 8 };
                assert_eq!(i32::from(codes[row * n + j]), sides[side].zero);
            }
        }
        if grain == Grain::Row {
            // A row's scale counts the weights of dead inputs.
            let own: Vec<QParam> = case.w.chunks(n).map(|r| qparam(r, case.spec, case.rule)).collect();
            assert_eq!(sides, own);
        }
    }
}

#[test]
fn dependent_inputs_are_damped() {
    let (n, rows) = (40, 3);
    let one = noise(n, 10);
    let equal: Vec<f32> = std::iter::repeat_n(one.clone(), 30).flatten().collect();
    // Fewer tokens than inputs, and an input that repeats another.
    let mut twins = noise(n * 60, 11);
    twins.chunks_mut(n).for_each(|t| t[n - 1] = t[0]);
    for (name, x) in [("one token", one), ("equal tokens", equal), ("twins", twins)] {
        for damp in [0.01, 0.0] {
            let case = Case {
                w: noise(rows * n, 12),
                spec: QuantSpec::asym(3, Grain::Row),
                rule: Rule::MinMax,
                options: GptqOptions { damp, ..GptqOptions::default() },
            };
            let out = round(&case, &mut gram_of(&x, n, 1.0));
            assert!(out.rounded.moved, "{name}");
            let damping = out.damping.unwrap();
            assert!(damping > 0.0 && damping.is_finite(), "{name} {damp}: {damping}");
            assert_eq!(out.events.len(), usize::from(damp == 0.0), "{name}: {:?}", out.events);
            let [before, after] = out.rounded.losses;
            assert!(after <= before && after.is_finite(), "{name}: {before} {after}");
        }
    }
}

#[test]
fn without_factors_all_is_rounded_to_nearest() {
    let (n, rows) = (16, 2);
    let case = Case {
        w: noise(rows * n, 13),
        spec: QuantSpec::asym(4, Grain::Row),
        rule: Rule::Mse,
        options: GptqOptions::default(),
    };
    let mut gram = Gram::new(n);
    gram.add(&Interpreter, &Panel { from: 0, data: &vec![f32::INFINITY; n * n] }, 1.0);
    assert!(!gram.is_finite());
    let gram = gram_of(&noise(n * 20, 14), n, 1.0);
    let order: Vec<usize> = (0..n).collect();
    let rounded = with_cx(|unit, cx| {
        let job = Job { w: Tensor::f32([rows, n], case.w.clone()), spec: case.spec, rule: case.rule };
        let shared = Shared { gram: &gram, order: &order, dead: &[], damping: None };
        job.round(unit, cx, &case.options, &shared).unwrap()
    });
    assert_eq!((rounded.moved, rounded.parts().0.to_vec()), (false, nearest(&case, n)));
    assert_eq!(rounded.losses[0], rounded.losses[1]);
}
