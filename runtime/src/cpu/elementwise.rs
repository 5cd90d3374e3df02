//! Elementwise arithmetic with numpy-style broadcasting. Same bits on every instruction set.

pub use qrmc_ir::BinaryOp;

use super::pool::Pool;
use super::simd::{self, Isa, Kernel, Lanes};

/// Elements that one task computes.
const CHUNK: usize = 16 * 1024;

/// An operation on one number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnaryOp {
    /// `-x`
    Neg,
    /// `|x|`
    Abs,
    /// `e^x`, see [`simd::exp`].
    Exp,
    /// Natural logarithm.
    Log,
    /// Square root, correctly rounded.
    Sqrt,
    /// `1 / sqrt(x)`
    Rsqrt,
    /// `1 / x`
    Recip,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// `x / (1 + e^-x)`
    Silu,
}

/// `out = op(x)`.
///
/// # Panics
/// If the lengths differ.
pub fn unary(pool: &Pool, isa: Isa, op: UnaryOp, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "input and output");
    pool.for_chunks(out, CHUNK, |i, out| one(isa, op, &x[i * CHUNK..][..out.len()], out));
}

/// `out = op(x)`, on this thread.
pub(super) fn one(isa: Isa, op: UnaryOp, x: &[f32], out: &mut [f32]) {
    match op {
        UnaryOp::Neg => isa.run(Map(x, out, Neg)),
        UnaryOp::Abs => isa.run(Map(x, out, Abs)),
        UnaryOp::Exp => isa.run(Map(x, out, Exp)),
        UnaryOp::Log => isa.run(Map(x, out, Log)),
        UnaryOp::Sqrt => isa.run(Map(x, out, Sqrt)),
        UnaryOp::Rsqrt => isa.run(Map(x, out, Rsqrt)),
        UnaryOp::Recip => isa.run(Map(x, out, Recip)),
        UnaryOp::Sigmoid => isa.run(Map(x, out, Sigmoid)),
        UnaryOp::Silu => isa.run(Map(x, out, Silu)),
    }
}

/// `out = op(a, b)` for row-major tensors of these shapes, aligned at their last dimensions; a dimension of 1 is
/// repeated. `out` has the shape of both together.
///
/// # Panics
/// If the shapes do not broadcast or a length does not fit.
pub fn binary(
    pool: &Pool,
    isa: Isa,
    op: BinaryOp,
    (a, a_shape): (&[f32], &[usize]),
    (b, b_shape): (&[f32], &[usize]),
    out: &mut [f32],
) {
    let plan = Plan::new(a_shape, b_shape);
    assert_eq!(a.len(), a_shape.iter().product::<usize>(), "elements of {a_shape:?}");
    assert_eq!(b.len(), b_shape.iter().product::<usize>(), "elements of {b_shape:?}");
    assert_eq!(out.len(), plan.len, "elements of {a_shape:?} with {b_shape:?}");
    pool.for_chunks(out, CHUNK, |i, out| {
        plan.runs(i * CHUNK, out, |at_a, at_b, out| {
            let n = out.len();
            let (a, b) = (Side::new(a, at_a, plan.inner.1, n), Side::new(b, at_b, plan.inner.2, n));
            two(isa, op, a, b, out);
        });
    });
}

/// `out = op(a, b)`, on this thread.
pub(super) fn two(isa: Isa, op: BinaryOp, a: Side<'_>, b: Side<'_>, out: &mut [f32]) {
    match op {
        BinaryOp::Add => isa.run(Zip(a, b, out, Add)),
        BinaryOp::Sub => isa.run(Zip(a, b, out, Sub)),
        BinaryOp::Mul => isa.run(Zip(a, b, out, Mul)),
        BinaryOp::Div => isa.run(Zip(a, b, out, Div)),
        BinaryOp::Min => isa.run(Zip(a, b, out, Min)),
        BinaryOp::Max => isa.run(Zip(a, b, out, Max)),
        BinaryOp::Ge => isa.run(Zip(a, b, out, Ge)),
    }
}

/// The common shape of two operands, with neighbouring dimensions merged where both operands allow it, so that
/// equal shapes become one run, and a vector or scalar operand one loop around it.
struct Plan {
    len: usize,
    /// Size, and the strides of `a` and `b`: outer dimensions, outermost first.
    outer: Vec<(usize, usize, usize)>,
    /// The last dimension; its strides are 0 or 1.
    inner: (usize, usize, usize),
}

impl Plan {
    fn new(a: &[usize], b: &[usize]) -> Self {
        let rank = a.len().max(b.len());
        let (mut step_a, mut step_b, mut len) = (1, 1, 1);
        let mut dims: Vec<(usize, usize, usize)> = Vec::new();
        for back in 1..=rank {
            let size = |s: &[usize]| if back > s.len() { 1 } else { s[s.len() - back] };
            let (na, nb) = (size(a), size(b));
            assert!(na == nb || na == 1 || nb == 1, "{a:?} and {b:?} do not broadcast");
            let n = if na == 1 { nb } else { na };
            let (sa, sb) = (if na == 1 { 0 } else { step_a }, if nb == 1 { 0 } else { step_b });
            (step_a, step_b, len) = (step_a * na, step_b * nb, len * n);
            if n == 1 {
                continue;
            }
            match dims.last_mut() {
                // `sa == 0` on both sides or contiguous on both sides.
                Some((m, ta, tb)) if sa == *ta * *m && sb == *tb * *m => *m *= n,
                _ => dims.push((n, sa, sb)),
            }
        }
        let inner = if dims.is_empty() { (1, 0, 0) } else { dims.remove(0) };
        dims.reverse();
        Plan { len, outer: dims, inner }
    }

    /// Splits `out`, which begins at element `from` of the result, where the last dimension ends, and calls
    /// `f(offset in a, offset in b, run)`.
    fn runs(&self, from: usize, mut out: &mut [f32], mut f: impl FnMut(usize, usize, &mut [f32])) {
        let (n, sa, sb) = self.inner;
        let mut at = from;
        while !out.is_empty() {
            let (mut row, col) = (at / n, at % n);
            let (mut at_a, mut at_b) = (col * sa, col * sb);
            for &(size, sa, sb) in self.outer.iter().rev() {
                at_a += row % size * sa;
                at_b += row % size * sb;
                row /= size;
            }
            let (run, rest) = out.split_at_mut((n - col).min(out.len()));
            at += run.len();
            f(at_a, at_b, run);
            out = rest;
        }
    }
}

/// A run of an operand.
#[derive(Clone, Copy)]
pub(super) enum Side<'a> {
    /// Its elements.
    Many(&'a [f32]),
    /// One number for all.
    One(f32),
}

impl<'a> Side<'a> {
    fn new(x: &'a [f32], at: usize, step: usize, n: usize) -> Self {
        if step == 0 { Side::One(x[at]) } else { Side::Many(&x[at..at + n]) }
    }
}

/// An operation as a type: unlike a closure it is inlined always, and so compiled for each instruction set.
trait Op1 {
    fn of(x: f32) -> f32;
}

/// See [`Op1`].
trait Op2 {
    fn of(a: f32, b: f32) -> f32;
}

macro_rules! ops {
    ($($op:ident: $kind:ident($($arg:ident),+) = $value:expr;)+) => {$(
        struct $op;
        impl $kind for $op {
            #[inline(always)]
            fn of($($arg: f32),+) -> f32 {
                $value
            }
        }
    )+};
}

ops! {
    Neg: Op1(x) = -x;
    Abs: Op1(x) = x.abs();
    Exp: Op1(x) = simd::exp(x);
    Log: Op1(x) = x.ln();
    Sqrt: Op1(x) = x.sqrt();
    Rsqrt: Op1(x) = 1.0 / x.sqrt();
    Recip: Op1(x) = 1.0 / x;
    Sigmoid: Op1(x) = simd::sigmoid(x);
    Silu: Op1(x) = simd::silu(x);
    Add: Op2(a, b) = a + b;
    Sub: Op2(a, b) = a - b;
    Mul: Op2(a, b) = a * b;
    Div: Op2(a, b) = a / b;
    Min: Op2(a, b) = simd::min(a, b);
    Max: Op2(a, b) = simd::max(a, b);
    Ge: Op2(a, b) = if a >= b { 1.0 } else { 0.0 };
}

/// `out = op(x)`.
struct Map<'a, O>(&'a [f32], &'a mut [f32], O);

impl<O: Op1> Kernel for Map<'_, O> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (o, &x) in self.1.iter_mut().zip(self.0) {
            *o = O::of(x);
        }
    }
}

/// `out = op(a, b)`.
struct Zip<'a, O>(Side<'a>, Side<'a>, &'a mut [f32], O);

impl<O: Op2> Kernel for Zip<'_, O> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Zip(a, b, out, _) = self;
        match (a, b) {
            (Side::Many(a), Side::Many(b)) => {
                for ((o, &a), &b) in out.iter_mut().zip(a).zip(b) {
                    *o = O::of(a, b);
                }
            }
            (Side::Many(a), Side::One(b)) => {
                for (o, &a) in out.iter_mut().zip(a) {
                    *o = O::of(a, b);
                }
            }
            (Side::One(a), Side::Many(b)) => {
                for (o, &b) in out.iter_mut().zip(b) {
                    *o = O::of(a, b);
                }
            }
            (Side::One(a), Side::One(b)) => out.fill(O::of(a, b)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{bits, close, noise, pools};
    use super::*;

    const BINARY: [BinaryOp; 7] = [
        BinaryOp::Add,
        BinaryOp::Sub,
        BinaryOp::Mul,
        BinaryOp::Div,
        BinaryOp::Min,
        BinaryOp::Max,
        BinaryOp::Ge,
    ];

    fn naive(op: BinaryOp, a: f32, b: f32) -> f32 {
        match op {
            BinaryOp::Add => a + b,
            BinaryOp::Sub => a - b,
            BinaryOp::Mul => a * b,
            BinaryOp::Div => a / b,
            BinaryOp::Min => a.min(b),
            BinaryOp::Max => a.max(b),
            BinaryOp::Ge => f32::from(u8::from(a >= b)),
        }
    }

    #[test]
    fn every_broadcast_matches_the_definition() {
        let cases: [(&[usize], &[usize]); 16] = [
            (&[], &[]),
            (&[1], &[]),
            (&[3, 5], &[3, 5]),
            (&[3, 5], &[5]),
            (&[5], &[3, 5]),
            (&[3, 5], &[1]),
            (&[], &[3, 5]),
            (&[3, 5], &[3, 1]),
            (&[3, 1], &[1, 5]),
            (&[2, 3, 4], &[3, 1]),
            (&[2, 1, 4, 1], &[3, 1, 7]),
            (&[1, 3, 1, 5], &[2, 1, 4, 1]),
            (&[130, 257], &[257]),
            (&[130, 257], &[130, 1]),
            (&[33_001], &[33_001]),
            (&[0, 4], &[4]),
        ];
        for (sa, sb) in cases {
            let rank = sa.len().max(sb.len());
            let at = |s: &[usize], d: usize| if d + s.len() < rank { 1 } else { s[d + s.len() - rank] };
            let shape: Vec<usize> =
                (0..rank).map(|d| if at(sa, d) == 1 { at(sb, d) } else { at(sa, d) }).collect();
            let pick = |s: &[usize], mut i: usize| {
                let (mut off, mut step) = (0, 1);
                for d in (0..rank).rev() {
                    off += if at(s, d) == 1 { 0 } else { i % shape[d] * step };
                    (i, step) = (i / shape[d], step * at(s, d));
                }
                off
            };
            let (a, b) = (noise(sa.iter().product(), 8), noise(sb.iter().product(), 9));
            let n: usize = shape.iter().product();
            for op in BINARY {
                let want: Vec<f32> = (0..n).map(|i| naive(op, a[pick(sa, i)], b[pick(sb, i)])).collect();
                for isa in Isa::available() {
                    for pool in &pools() {
                        let mut out = vec![f32::NAN; n];
                        binary(pool, isa, op, (&a, sa), (&b, sb), &mut out);
                        assert_eq!(bits(&out), bits(&want), "{op:?} {sa:?} {sb:?} {}", isa.name());
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "do not broadcast")]
    fn shapes_that_do_not_fit_are_refused() {
        binary(
            &pools()[0],
            Isa::PORTABLE,
            BinaryOp::Add,
            (&[0.0; 6], &[2, 3]),
            (&[0.0; 4], &[4]),
            &mut [0.0; 6],
        );
    }

    #[test]
    fn unary_matches_f64() {
        type Case = (UnaryOp, fn(f64) -> f64);
        let cases: [Case; 9] = [
            (UnaryOp::Neg, |x| -x),
            (UnaryOp::Abs, f64::abs),
            (UnaryOp::Exp, f64::exp),
            (UnaryOp::Log, f64::ln),
            (UnaryOp::Sqrt, f64::sqrt),
            (UnaryOp::Rsqrt, |x| 1.0 / x.sqrt()),
            (UnaryOp::Recip, |x| 1.0 / x),
            (UnaryOp::Sigmoid, |x| 1.0 / (1.0 + (-x).exp())),
            (UnaryOp::Silu, |x| x / (1.0 + (-x).exp())),
        ];
        for n in [0, 1, 5, 20_011] {
            for (op, f) in cases {
                let positive = matches!(op, UnaryOp::Log | UnaryOp::Sqrt | UnaryOp::Rsqrt);
                let x: Vec<f32> = noise(n, 4)
                    .iter()
                    .map(|v| if positive { v.abs() * 9.0 + 1e-3 } else { v * 9.0 })
                    .collect();
                let want: Vec<f64> = x.iter().map(|&v| f(f64::from(v))).collect();
                let mut first = None;
                for isa in Isa::available() {
                    for pool in &pools() {
                        let mut out = vec![0.0; n];
                        unary(pool, isa, op, &x, &mut out);
                        close(&out, &want, 5e-7, &format!("{op:?}"));
                        assert_eq!(
                            *first.get_or_insert_with(|| bits(&out)),
                            bits(&out),
                            "{op:?} {}",
                            isa.name()
                        );
                    }
                }
            }
        }
    }
}
