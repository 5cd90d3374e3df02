//! Choosing scales and codes, and back: [`qrmc_ir::grid`] over the rows of a tensor, on all threads.

use qrmc_ir::grid::{self, FakeGrad, QParam};
use qrmc_ir::{Elem, EngineError, Grain, Op, QuantSpec, Rule};

use super::Machine;
use super::exec::{In, Slice, SliceMut, wrong_kind};
use super::prims::{Out, floats};
use crate::cpu::simd::{Kernel, Lanes};

/// Elements that one task handles, about.
const CHUNK: usize = 32 * 1024;

pub(super) fn run(
    m: &Machine,
    op: &Op,
    elem: Elem,
    ins: &[In<'_>],
    outs: &mut [Out<'_>],
) -> Result<(), EngineError> {
    let cols = ins[0].shape.last().copied().unwrap_or(1);
    let rows = ins[0].shape.iter().product::<usize>() / cols.max(1);
    let run_of = |spec: QuantSpec| grid::run_length(spec, rows, cols);
    match op {
        Op::QParams(spec, rule) => put_params(&params(m, (*spec, *rule), ins)?, outs),
        Op::QCast(spec) if spec.grain == Grain::Channel => {
            let (x, q) = (ins[0].widened()?, sides(&ins[1..])?);
            let code = |i: usize, x: f32| grid::quantize(x, q[i % cols.max(1)], *spec);
            let all = x.iter().enumerate().map(|(i, &x)| code(i, x));
            match &mut outs[0].1 {
                SliceMut::U8(y) => y.iter_mut().zip(all).for_each(|(y, c)| *y = c as u8),
                SliceMut::I8(y) => y.iter_mut().zip(all).for_each(|(y, c)| *y = c as i8),
                _ => return Err(wrong_kind()),
            }
            Ok(())
        }
        Op::QCast(spec) => {
            cast(m, *spec, &ins[0].widened()?, &sides(&ins[1..])?, run_of(*spec), &mut outs[0])
        }
        Op::DCast => {
            let Elem::Quant(spec) = elem else { return Err(wrong_kind()) };
            let (run, q) = (run_of(spec), sides(&ins[1..])?);
            let codes = ins[0].data()?;
            let per_task = (CHUNK / run).max(1) * run;
            let y = floats(&mut outs[0])?;
            m.pool.for_chunks(y, per_task, |c, y| {
                let at = c * per_task;
                for (g, y) in y.chunks_mut(run).enumerate() {
                    let from = at + g * run;
                    let q = q[grid::scale_index(spec, from, run, cols)];
                    match codes {
                        Slice::U8(v) => {
                            y.iter_mut()
                                .zip(&v[from..])
                                .for_each(|(y, &c)| *y = grid::dequantize(i32::from(c), q));
                        }
                        Slice::I8(v) => {
                            y.iter_mut()
                                .zip(&v[from..])
                                .for_each(|(y, &c)| *y = grid::dequantize(i32::from(c), q));
                        }
                        _ => {}
                    }
                }
            });
            Ok(())
        }
        Op::FakeQuant(spec, rule) => {
            let (x, run) = (ins[0].widened()?, run_of(*spec));
            let factors = Factors::of(&ins[1..], cols, run)?;
            let per_task = (CHUNK / run).max(1);
            m.pool.for_chunks(floats(&mut outs[0])?, per_task * run, |c, y| {
                let (x, first) = (&x[c * per_task * run..][..y.len()], c * per_task);
                m.isa.run(Fake { x, y, first, factors: &factors, spec: *spec, rule: *rule });
            });
            Ok(())
        }
        Op::FakeQuantGrad(spec, rule) => fake_quant_grad(m, (*spec, *rule), run_of(*spec), ins, outs),
        Op::ClipRange(spec) => {
            let (x, run) = (ins[0].widened()?, run_of(*spec));
            let sides = (ins[1].widened()?, ins[2].widened()?);
            let per_task = (CHUNK / run).max(1);
            m.pool.for_chunks(floats(&mut outs[0])?, per_task * run, |c, y| {
                let (x, first) = (&x[c * per_task * run..][..y.len()], c * per_task);
                m.isa.run(Clip { x, y, run, hi: &sides.0[first..], lo: &sides.1[first..] });
            });
            Ok(())
        }
        Op::ClipRangeGrad(spec) => clip_range_grad(m, run_of(*spec), ins, outs),
        _ => Err(wrong_kind()),
    }
}

/// Scales, zero points if the scheme has them, and codes of the first operand; the others are factors on its range.
pub(super) fn quantize(
    m: &Machine,
    (spec, rule): (QuantSpec, Rule),
    ins: &[In<'_>],
    outs: &mut [Out<'_>],
) -> Result<(), EngineError> {
    let Some((codes, sides)) = outs.split_last_mut() else { return Err(wrong_kind()) };
    let chosen = params(m, (spec, rule), ins)?;
    put_params(&chosen, sides)?;
    let cols = ins[0].shape.last().copied().unwrap_or(1);
    let x = ins[0].widened()?;
    cast(m, spec, &x, &chosen, grid::run_length(spec, x.len() / cols.max(1), cols), codes)
}

/// Writes scales, and zero points if there is a place for them.
fn put_params(chosen: &[QParam], outs: &mut [Out<'_>]) -> Result<(), EngineError> {
    let (scales, rest) = outs.split_at_mut(1);
    let scales = floats(&mut scales[0])?;
    scales.iter_mut().zip(chosen).for_each(|(s, q)| *s = q.scale);
    if let Some((_, SliceMut::U8(zeros))) = rest.first_mut() {
        zeros.iter_mut().zip(chosen).for_each(|(z, q)| *z = q.zero as u8);
    }
    Ok(())
}

/// The codes of `x`, whose runs have the scales and zero points `q`.
fn cast(
    m: &Machine,
    spec: QuantSpec,
    x: &[f32],
    q: &[QParam],
    run: usize,
    out: &mut Out<'_>,
) -> Result<(), EngineError> {
    let per_task = (CHUNK / run).max(1) * run;
    let (pool, isa) = (&m.pool, m.isa);
    match &mut out.1 {
        SliceMut::U8(y) => pool.for_chunks(&mut y[..x.len()], per_task, |c, y| {
            let (x, q) = (&x[c * per_task..][..y.len()], &q[c * per_task / run..]);
            isa.run(Quantize { x, y, q, run, spec, code: |c| c as u8 });
        }),
        SliceMut::I8(y) => pool.for_chunks(&mut y[..x.len()], per_task, |c, y| {
            let (x, q) = (&x[c * per_task..][..y.len()], &q[c * per_task / run..]);
            isa.run(Quantize { x, y, q, run, spec, code: |c| c as i8 });
        }),
        _ => return Err(wrong_kind()),
    }
    Ok(())
}

/// Scale and zero point of each run of the first operand; the others are factors on its range.
fn params(m: &Machine, (spec, rule): (QuantSpec, Rule), ins: &[In<'_>]) -> Result<Vec<QParam>, EngineError> {
    let cols = ins[0].shape.last().copied().unwrap_or(1);
    let rows = ins[0].shape.iter().product::<usize>() / cols.max(1);
    let run = grid::run_length(spec, rows, cols);
    let (x, factors) = (ins[0].widened()?, Factors::of(&ins[1..], cols, run)?);
    let per_task = (CHUNK / run).max(1);
    let chosen: Vec<Vec<QParam>> = m.pool.map((x.len() / run).div_ceil(per_task), |task| {
        let x = &x[task * per_task * run..x.len().min((task + 1) * per_task * run)];
        m.isa.run(Params { x, first: task * per_task, factors: &factors, spec, rule })
    });
    Ok(chosen.concat())
}

/// The scales of the rows that a `fake_quant` of these operands rounds to.
pub(super) fn row_scales(m: &Machine, op: &Op, ins: &[In<'_>]) -> Result<Vec<f32>, EngineError> {
    let Op::FakeQuant(spec, rule) = *op else { return Err(wrong_kind()) };
    Ok(params(m, (spec, rule), ins)?.iter().map(|q| q.scale).collect())
}

/// Factors on the ends of the ranges of runs.
struct Factors<'a> {
    hi: std::borrow::Cow<'a, [f32]>,
    lo: std::borrow::Cow<'a, [f32]>,
    run: usize,
    per_row: usize,
}

impl<'a> Factors<'a> {
    fn of(given: &[In<'a>], cols: usize, run: usize) -> Result<Self, EngineError> {
        let (hi, lo) = match given {
            [hi, lo, ..] => (hi.widened()?, lo.widened()?),
            _ => (vec![1.0].into(), vec![1.0].into()),
        };
        Ok(Factors { hi, lo, run, per_row: (cols / run.max(1)).max(1) })
    }

    /// Which factor a run has.
    #[inline(always)]
    fn index(&self, run: usize) -> usize {
        grid::factor_of(run, self.per_row, self.hi.len())
    }

    #[inline(always)]
    fn at(&self, run: usize) -> (f32, f32) {
        let i = self.index(run);
        (self.hi[i], self.lo[i])
    }
}

struct Params<'a> {
    x: &'a [f32],
    first: usize,
    factors: &'a Factors<'a>,
    spec: QuantSpec,
    rule: Rule,
}

impl Kernel for Params<'_> {
    type Output = Vec<QParam>;

    #[inline(always)]
    fn run<L: Lanes>(self) -> Vec<QParam> {
        let mut out = Vec::with_capacity(self.x.len() / self.factors.run);
        for (i, x) in self.x.chunks(self.factors.run).enumerate() {
            let (hi, lo) = self.factors.at(self.first + i);
            out.push(grid::qparam_scaled(x, self.spec, self.rule, hi, lo));
        }
        out
    }
}

struct Fake<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
    first: usize,
    factors: &'a Factors<'a>,
    spec: QuantSpec,
    rule: Rule,
}

impl Kernel for Fake<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let run = self.factors.run;
        for (i, (x, y)) in self.x.chunks(run).zip(self.y.chunks_mut(run)).enumerate() {
            grid::fake_run(x, self.spec, self.rule, self.factors.at(self.first + i), y);
        }
    }
}

struct Clip<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
    run: usize,
    hi: &'a [f32],
    lo: &'a [f32],
}

impl Kernel for Clip<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (i, (x, y)) in self.x.chunks(self.run).zip(self.y.chunks_mut(self.run)).enumerate() {
            grid::clip_range_run(x, (self.hi[i], self.lo[i]), y);
        }
    }
}

/// What the gradient of runs works on; the gradients of the factors come back by run.
struct Grad<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
    first: usize,
    how: How<'a>,
}

#[derive(Clone, Copy)]
enum How<'a> {
    Fake(&'a Factors<'a>, QuantSpec, Rule),
    Clip { run: usize, hi: &'a [f32], lo: &'a [f32] },
}

impl Kernel for Grad<'_> {
    type Output = Vec<FakeGrad>;

    #[inline(always)]
    fn run<L: Lanes>(self) -> Vec<FakeGrad> {
        let run = match self.how {
            How::Fake(f, ..) => f.run,
            How::Clip { run, .. } => run,
        };
        let mut out = Vec::with_capacity(self.x.len() / run);
        for (i, ((x, dy), dx)) in
            self.x.chunks(run).zip(self.dy.chunks(run)).zip(self.dx.chunks_mut(run)).enumerate()
        {
            let at = self.first + i;
            out.push(match self.how {
                How::Fake(f, spec, rule) => grid::fake_grad_run(x, dy, spec, rule, f.at(at), dx),
                How::Clip { hi, lo, .. } => grid::clip_range_grad_run(x, dy, (hi[at], lo[at]), dx),
            });
        }
        out
    }
}

/// Runs the gradient over all runs; the gradients of the factors in the order of the runs.
fn grads(m: &Machine, how: How<'_>, run: usize, (x, dy): (&[f32], &[f32]), dx: &mut [f32]) -> Vec<FakeGrad> {
    let per_task = (CHUNK / run).max(1);
    let parts = m.pool.map_chunks(dx, per_task * run, |c, dx| {
        let (at, len) = (c * per_task * run, dx.len());
        m.isa.run(Grad { x: &x[at..at + len], dy: &dy[at..at + len], dx, first: c * per_task, how })
    });
    parts.concat()
}

fn fake_quant_grad(
    m: &Machine,
    (spec, rule): (QuantSpec, Rule),
    run: usize,
    ins: &[In<'_>],
    outs: &mut [Out<'_>],
) -> Result<(), EngineError> {
    let (dy, given) = (ins[ins.len() - 1].widened()?, &ins[1..ins.len() - 1]);
    let cols = ins[0].shape.last().copied().unwrap_or(1);
    let factors = Factors::of(given, cols, run)?;
    let x = ins[0].widened()?;
    let all = grads(m, How::Fake(&factors, spec, rule), run, (&x, &dy), floats(&mut outs[0])?);
    if !given.is_empty() {
        let mut sums = vec![FakeGrad::default(); factors.hi.len()];
        for (i, g) in all.iter().enumerate() {
            let sum = &mut sums[factors.index(i)];
            *sum = FakeGrad { hi: sum.hi + g.hi, lo: sum.lo + g.lo };
        }
        floats(&mut outs[1])?.iter_mut().zip(&sums).for_each(|(y, s)| *y = s.hi as f32);
        floats(&mut outs[2])?.iter_mut().zip(&sums).for_each(|(y, s)| *y = s.lo as f32);
    }
    Ok(())
}

fn clip_range_grad(m: &Machine, run: usize, ins: &[In<'_>], outs: &mut [Out<'_>]) -> Result<(), EngineError> {
    let (x, hi, lo, dy) = (ins[0].widened()?, ins[1].widened()?, ins[2].widened()?, ins[3].widened()?);
    let all = grads(m, How::Clip { run, hi: &hi, lo: &lo }, run, (&x, &dy), floats(&mut outs[0])?);
    floats(&mut outs[1])?.iter_mut().zip(&all).for_each(|(y, g)| *y = g.hi as f32);
    floats(&mut outs[2])?.iter_mut().zip(&all).for_each(|(y, g)| *y = g.lo as f32);
    Ok(())
}

/// Scale and zero point of each run.
fn sides(ins: &[In<'_>]) -> Result<Vec<QParam>, EngineError> {
    let scales = ins[0].widened()?;
    let zeros = ins.get(1).map(In::u8).transpose()?;
    let zero = |i: usize| zeros.map_or(0, |z| i32::from(z[i]));
    Ok(scales.iter().enumerate().map(|(i, &scale)| QParam { scale, zero: zero(i) }).collect())
}

/// [`grid::quantize`] of all elements. A product with the inverse of the scale stands for the quotient where both round to
/// the same number for sure: a division takes several times as long.
struct Quantize<'a, C, F> {
    x: &'a [f32],
    y: &'a mut [C],
    q: &'a [QParam],
    run: usize,
    spec: QuantSpec,
    code: F,
}

impl<C, F: Fn(i32) -> C> Kernel for Quantize<'_, C, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Quantize { x, y, q, run, spec, code } = self;
        let (least, most) = (spec.qmin(), spec.qmax());
        for ((x, y), q) in x.chunks(run).zip(y.chunks_mut(run)).zip(q) {
            // That of a scale beyond all others is no inverse any more, and nothing is sure then.
            let inverse = Some(1.0 / q.scale).filter(|i| i.is_normal()).unwrap_or(f32::NAN);
            let (x, x_rest) = x.as_chunks::<SPAN>();
            let (y, y_rest) = y.as_chunks_mut::<SPAN>();
            for (x, y) in x.iter().zip(y) {
                let mut codes = [0i32; SPAN];
                let mut unsure = 0;
                for (c, &x) in codes.iter_mut().zip(x) {
                    let t = x * inverse;
                    // Rounds half to even, and leaves the whole number in the low bits.
                    let moved = t + ROUND;
                    // Not so for NaN.
                    let sure = t.abs() < LARGEST && (t - (moved - ROUND)).abs() < 0.5 - MARGIN;
                    unsure |= i32::from(!sure);
                    let whole = moved.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
                    *c = whole.wrapping_add(q.zero).clamp(least, most);
                }
                if unsure == 0 {
                    y.iter_mut().zip(codes).for_each(|(y, c)| *y = code(c));
                } else {
                    y.iter_mut().zip(x).for_each(|(y, x)| *y = code(grid::quantize(*x, *q, spec)));
                }
            }
            y_rest.iter_mut().zip(x_rest).for_each(|(y, x)| *y = code(grid::quantize(*x, *q, spec)));
        }
    }
}

/// Elements that are divided by their scale together.
const SPAN: usize = 32;
/// Below this magnitude, a product with the inverse of a scale is within [`MARGIN`] of the quotient: both are within two
/// units in the last place, which are `2^-14` each at most.
const LARGEST: f32 = 512.0;
const MARGIN: f32 = 1.0 / 4096.0;
/// `1.5 * 2^23`: the last place of a sum with it is 1.
const ROUND: f32 = 12_582_912.0;
