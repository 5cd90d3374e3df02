//! Choosing scales and codes, and back: [`qrmc_ir::grid`] over the rows of a tensor, on all threads.

use qrmc_ir::grid::{self, QParam};
use qrmc_ir::{Data, Elem, EngineError, Op, QuantSpec, TensorType};
use qrmc_lowering::Arg;

use super::Machine;
use super::exec::{In, Slice, wrong_kind};
use super::prims::floats;
use crate::cpu::simd::{Kernel, Lanes};

/// Elements that one task handles, about.
const CHUNK: usize = 32 * 1024;

pub(super) fn run(
    m: &Machine,
    op: &Op,
    types: &[(Arg, TensorType)],
    ins: &[In<'_>],
    outs: &mut [(Vec<usize>, Data)],
) -> Result<(), EngineError> {
    let cols = ins[0].shape.last().copied().unwrap_or(1);
    let rows = ins[0].shape.iter().product::<usize>() / cols.max(1);
    let run_of = |spec: QuantSpec| grid::run_length(spec, rows, cols);
    match op {
        Op::QParams(spec, rule) => {
            let (run, x) = (run_of(*spec), ins[0].widened()?);
            let (scales, rest) = outs.split_at_mut(1);
            let scales = floats(&mut scales[0])?;
            let mut zeros = match rest.first_mut() {
                Some((_, Data::U8(z))) => Some(&mut z[..scales.len()]),
                _ => None,
            };
            let per_task = (CHUNK / run).max(1);
            let groups = x.len() / run.max(1);
            let chosen: Vec<Vec<QParam>> = m.pool.map(groups.div_ceil(per_task), |task| {
                let from = task * per_task * run;
                let to = x.len().min(from + per_task * run);
                x[from..to].chunks(run).map(|g| grid::qparam(g, *spec, *rule)).collect()
            });
            for (i, q) in chosen.iter().flatten().enumerate() {
                scales[i] = q.scale;
                if let Some(z) = &mut zeros {
                    z[i] = q.zero as u8;
                }
            }
            Ok(())
        }
        Op::QCast(spec) => {
            let (run, x, q) = (run_of(*spec), ins[0].widened()?, sides(&ins[1..])?);
            let per_task = (CHUNK / run).max(1) * run;
            let len = x.len();
            let (pool, isa) = (&m.pool, m.isa);
            match &mut outs[0].1 {
                Data::U8(y) => pool.for_chunks(&mut y[..len], per_task, |c, y| {
                    let x = &x[c * per_task..][..y.len()];
                    let q = &q[c * per_task / run..];
                    isa.run(Quantize { x, q, run, spec: *spec, put: |i, code| y[i] = code as u8 });
                }),
                Data::I8(y) => pool.for_chunks(&mut y[..len], per_task, |c, y| {
                    let x = &x[c * per_task..][..y.len()];
                    let q = &q[c * per_task / run..];
                    isa.run(Quantize { x, q, run, spec: *spec, put: |i, code| y[i] = code as i8 });
                }),
                _ => return Err(wrong_kind()),
            }
            Ok(())
        }
        Op::DCast => {
            let Elem::Quant(spec) = types[0].1.elem else { return Err(wrong_kind()) };
            let (run, q) = (run_of(spec), sides(&ins[1..])?);
            let codes = ins[0].data()?;
            let per_task = (CHUNK / run).max(1) * run;
            let y = floats(&mut outs[0])?;
            m.pool.for_chunks(y, per_task, |c, y| {
                let at = c * per_task;
                for (g, y) in y.chunks_mut(run).enumerate() {
                    let from = at + g * run;
                    let q = q[from / run];
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
        _ => Err(wrong_kind()),
    }
}

/// Scale and zero point of each run.
fn sides(ins: &[In<'_>]) -> Result<Vec<QParam>, EngineError> {
    let scales = ins[0].widened()?;
    let zeros = ins.get(1).map(In::u8).transpose()?;
    let zero = |i: usize| zeros.map_or(0, |z| i32::from(z[i]));
    Ok(scales.iter().enumerate().map(|(i, &scale)| QParam { scale, zero: zero(i) }).collect())
}

struct Quantize<'a, F> {
    x: &'a [f32],
    q: &'a [QParam],
    run: usize,
    spec: QuantSpec,
    put: F,
}

impl<F: FnMut(usize, i32)> Kernel for Quantize<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        for (g, x) in self.x.chunks(self.run).enumerate() {
            let q = self.q[g];
            for (i, &x) in x.iter().enumerate() {
                (self.put)(g * self.run + i, grid::quantize(x, q, self.spec));
            }
        }
    }
}
