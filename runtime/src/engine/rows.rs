//! Kernels that go over the same rows together.

use std::sync::{Mutex, PoisonError};

use qrmc_ir::{Dim, DimEnv, Elem, EngineError, Sym, Tensor, TensorType};
use qrmc_lowering::{Arg, Kernel, RowStep, Step, host_elem};
use smallvec::SmallVec;

use super::exec::{In, Slice, SliceMut, State, Watch, dispatch, sizes, slice, slice_mut, wrong_kind};
use super::memory::empty;
use super::{Machine, prims::Out};
use crate::cpu::ScratchBuf;
use crate::cpu::rows::RowsMut;

/// Bytes of all values of the rows that one task takes: they stay in the cache of a core.
const ROWS_BYTES: usize = 192 * 1024;
/// Tasks that the rows are cut into at least, if there are as many.
const TASKS: usize = 16;

/// How an operand lies over the rows.
#[derive(Clone, Copy)]
enum Lie {
    /// So many elements for each row.
    Rows(usize),
    /// One for each place in a sequence.
    Places,
    /// The same for all rows.
    All,
}

/// A value that is computed.
enum Made<'a> {
    /// Rows of a result.
    Result(SliceMut<'a>),
    /// Rows that are gone afterwards.
    Inner(ScratchBuf<'a>),
    /// While it is being computed.
    Out,
}

impl Made<'_> {
    fn slice(&self) -> Result<Slice<'_>, EngineError> {
        Ok(match self {
            Made::Result(SliceMut::F32(x)) => Slice::F32(x),
            Made::Result(SliceMut::I32(x)) => Slice::I32(x),
            Made::Result(SliceMut::I8(x)) => Slice::I8(x),
            Made::Result(SliceMut::U8(x)) => Slice::U8(x),
            Made::Inner(x) => Slice::F32(x),
            Made::Out => return Err(wrong_kind()),
        })
    }

    fn slice_mut(&mut self) -> Result<SliceMut<'_>, EngineError> {
        Ok(match self {
            Made::Result(x) => x.again(),
            Made::Inner(x) => SliceMut::F32(x),
            Made::Out => return Err(wrong_kind()),
        })
    }
}

/// Runs a [`Kernel::Rows`]: `types` are those of its operands, `leaving` the values that are its results.
pub(super) fn run(
    m: &Machine,
    dims: &DimEnv,
    (steps, leaving): (&[RowStep], &[usize]),
    types: &[(Arg, TensorType)],
    ins: &[In<'_>],
    outs: SmallVec<[Out<'_>; 4]>,
) -> Result<(), EngineError> {
    let rows = dims.batch * dims.seq;
    if rows == 0 {
        return Ok(());
    }
    let lies: SmallVec<[Lie; 16]> = types.iter().zip(ins).map(|((_, ty), x)| lie(ty, x, rows)).collect();
    let row = DimEnv { batch: 1, seq: 1, past: dims.past };
    let width = |ty: &TensorType| sizes(ty, &row).iter().product::<usize>();
    let read = lies.iter().map(|l| if let Lie::Rows(n) = l { *n } else { 0 }).sum::<usize>();
    let made = steps.iter().flat_map(|s| &s.outs).map(width).sum::<usize>();
    let fit = ROWS_BYTES / (4 * (read + made)).max(1);
    let at_once = fit.min(rows.div_ceil(TASKS)).max(1);
    let failed: Mutex<Option<EngineError>> = Mutex::new(None);
    let results = RowsMut::new(outs.into_iter().map(|(_, data)| data), rows);
    results.for_each(&m.pool, (dims.seq, at_once), |first, count, parts| {
        let few = DimEnv { batch: 1, seq: count, past: dims.past };
        let done = (|| {
            let mut made: SmallVec<[Made<'_>; 16]> = SmallVec::new();
            let mut parts: SmallVec<[Option<SliceMut<'_>>; 4]> = parts.into_iter().map(Some).collect();
            for ty in steps.iter().flat_map(|s| &s.outs) {
                let leaves = leaving.iter().position(|&v| v == ins.len() + made.len());
                made.push(match leaves.and_then(|at| parts[at].take()) {
                    Some(part) => Made::Result(part),
                    None if ty.elem == Elem::F32 => Made::Inner(m.scratch.take(count * width(ty))),
                    None => return Err(wrong_kind()),
                });
            }
            let mut next = 0;
            for step in steps {
                let these = next..next + step.outs.len();
                let mut taken: SmallVec<[Made<'_>; 4]> =
                    made[these.clone()].iter_mut().map(|v| std::mem::replace(v, Made::Out)).collect();
                {
                    let mut args: SmallVec<[In<'_>; 8]> = SmallVec::new();
                    for (v, ty) in &step.ins {
                        let data = match v.checked_sub(ins.len()) {
                            Some(at) => made[at].slice()?,
                            None => part(ins[*v].data()?, lies[*v], (first, count), dims.seq)?,
                        };
                        args.push(In { shape: sizes(ty, &few), data });
                    }
                    let mut outs: SmallVec<[Out<'_>; 4]> = SmallVec::new();
                    for (v, ty) in taken.iter_mut().zip(&step.outs) {
                        outs.push((sizes(ty, &few), v.slice_mut()?));
                    }
                    let elem = |i: usize| step.ins[i].1.elem;
                    dispatch(m, &step.kernel, &few, &elem, &args, &mut outs)?;
                }
                for (v, back) in made[these].iter_mut().zip(taken) {
                    *v = back;
                }
                next += step.outs.len();
            }
            Ok(())
        })();
        if let Err(e) = done {
            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

fn lie(ty: &TensorType, x: &In<'_>, rows: usize) -> Lie {
    match ty.shape.0[..] {
        [Dim::Sym(Sym::B), Dim::Sym(Sym::S), ..] => Lie::Rows(x.shape.iter().product::<usize>() / rows),
        [Dim::Sym(Sym::S)] => Lie::Places,
        _ => Lie::All,
    }
}

/// What some rows, in a sequence of `seq`, have of an operand.
fn part<'a>(
    x: Slice<'a>,
    lie: Lie,
    (first, count): (usize, usize),
    seq: usize,
) -> Result<Slice<'a>, EngineError> {
    let span = match lie {
        Lie::All => return Ok(x),
        Lie::Rows(n) => first * n..(first + count) * n,
        Lie::Places => first % seq..first % seq + count,
    };
    Ok(match x {
        Slice::F32(x) => Slice::F32(&x[span]),
        Slice::I32(x) => Slice::I32(&x[span]),
        Slice::I8(x) => Slice::I8(&x[span]),
        Slice::U8(x) => Slice::U8(&x[span]),
        Slice::Const(_) => return Err(wrong_kind()),
    })
}

impl<'a> State<'a, '_> {
    /// Runs the kernels of a [`Kernel::Rows`] one by one on all rows, shows them, and then runs the step as it is: the bits must
    /// be the same.
    pub(super) fn rows_apart(&mut self, step: &'a Step, watch: &mut dyn Watch) -> Result<(), EngineError> {
        let Kernel::Rows { steps, outs, .. } = &step.kernel else { return Err(wrong_kind()) };
        let m = &*self.loaded.machine;
        let mut values: Vec<Tensor> = self.seen(step, step.ins.iter())?;
        let mut next = values.len();
        for s in steps {
            let types: Vec<(Arg, TensorType)> =
                s.ins.iter().map(|(v, ty)| (Arg::Buffer(*v as u32), ty.clone())).collect();
            let args: Vec<Tensor> =
                s.ins.iter().map(|(v, ty)| values[*v].clone().reshaped(&sizes(ty, &self.dims)[..])).collect();
            let made = (next as u32..).zip(&s.outs).map(|(v, ty)| (v, ty.clone())).collect();
            let alone = Step { kernel: s.kernel.clone(), ins: types, outs: made };
            let wanted = watch.wants(&alone);
            let mut data = Vec::new();
            for ty in &s.outs {
                data.push(empty(host_elem(ty.elem), sizes(ty, &self.dims).iter().product()));
            }
            {
                let mut ins: SmallVec<[In<'_>; 8]> = SmallVec::new();
                for t in &args {
                    ins.push(In { shape: t.shape().iter().copied().collect(), data: slice(t.data())? });
                }
                let mut outs: SmallVec<[Out<'_>; 4]> = SmallVec::new();
                for (d, ty) in data.iter_mut().zip(&s.outs) {
                    let shape = sizes(ty, &self.dims);
                    let len = shape.iter().product();
                    outs.push((shape, slice_mut(d, len)?));
                }
                let elem = |i: usize| s.ins[i].1.elem;
                dispatch(m, &s.kernel, &self.dims, &elem, &ins, &mut outs)?;
            }
            let results: Vec<Tensor> = data
                .into_iter()
                .zip(&s.outs)
                .map(|(d, ty)| Tensor::new(&sizes(ty, &self.dims)[..], d))
                .collect();
            if wanted {
                watch.see(&alone, &args, &results)?;
            }
            next += results.len();
            values.extend(results);
        }
        self.step(step)?;
        let types: Vec<(Arg, TensorType)> =
            step.outs.iter().map(|(b, ty)| (Arg::Buffer(*b), ty.clone())).collect();
        let together = self.seen(step, types.iter())?;
        for (have, &v) in together.iter().zip(outs) {
            if !same_bits(have, &values[v]) {
                let what = format!("`{}` gives other bits for a few rows than for all", step.kernel);
                return Err(EngineError::System(what));
            }
        }
        Ok(())
    }
}

fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    match (a.as_f32(), b.as_f32()) {
        (Some(a), Some(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()),
        _ => a.data() == b.data(),
    }
}
