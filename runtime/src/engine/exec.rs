//! Running a program: operands are found, kernels called, results taken out.

use qrmc_ir::{Data, Diag, Dim, DimEnv, Elem, EngineError, Op, Place, Sym, Tensor, TensorType};
use qrmc_lowering::{Arg, Kernel, Step};
use smallvec::SmallVec;

use super::cache::{KvStore, Segments};
use super::consts::Constant;
use super::memory::{empty, grown};
use super::prims::Out;
use super::{Loaded, Machine, prims, products, quantize, rows};
pub(super) use crate::cpu::rows::SliceMut;

/// Sizes of an operand.
pub(super) type Sizes = SmallVec<[usize; 6]>;

/// An argument.
pub enum Input<'a> {
    /// A tensor.
    Tensor(&'a Tensor),
    /// A cache that is appended to in place, and the sequences whose rows these are: the other arguments hold the rows of all
    /// of them as one batch row.
    Cache(&'a mut KvStore, &'a Segments<'a>),
}

/// Elements of an operand.
#[derive(Clone, Copy)]
pub(super) enum Slice<'a> {
    F32(&'a [f32]),
    I32(&'a [i32]),
    I8(&'a [i8]),
    U8(&'a [u8]),
    Const(&'a Constant),
}

/// An operand of a kernel.
pub(super) struct In<'a> {
    pub(super) shape: Sizes,
    pub(super) data: Slice<'a>,
}

impl<'a> In<'a> {
    pub(super) fn f32(&self) -> Result<&'a [f32], EngineError> {
        match self.data {
            Slice::F32(v) => Ok(v),
            Slice::Const(Constant::Tensor(t)) => t.as_f32().ok_or_else(wrong_kind),
            _ => Err(wrong_kind()),
        }
    }

    /// Floats of any storage; 16-bit and packed constants are widened, which is fit for small operands only.
    pub(super) fn widened(&self) -> Result<std::borrow::Cow<'a, [f32]>, EngineError> {
        match self.data {
            Slice::Const(c @ (Constant::Half { .. } | Constant::Packed { .. })) => {
                match c.tensor().into_data() {
                    Data::F32(v) => Ok(v.into()),
                    _ => Err(wrong_kind()),
                }
            }
            _ => self.f32().map(Into::into),
        }
    }

    pub(super) fn i32(&self) -> Result<&'a [i32], EngineError> {
        match self.data {
            Slice::I32(v) => Ok(v),
            Slice::Const(Constant::Tensor(t)) => t.as_i32().ok_or_else(wrong_kind),
            _ => Err(wrong_kind()),
        }
    }

    pub(super) fn u8(&self) -> Result<&'a [u8], EngineError> {
        match self.data {
            Slice::U8(v) => Ok(v),
            Slice::Const(Constant::Tensor(t)) => match t.data() {
                Data::U8(v) => Ok(v),
                _ => Err(wrong_kind()),
            },
            _ => Err(wrong_kind()),
        }
    }

    pub(super) fn data(&self) -> Result<Slice<'a>, EngineError> {
        Ok(match self.data {
            Slice::Const(Constant::Tensor(t)) => slice(t.data())?,
            other => other,
        })
    }
}

/// The sizes of a value under given values of the symbols.
pub(super) fn sizes(ty: &TensorType, dims: &DimEnv) -> Sizes {
    ty.shape.0.iter().map(|&d| dims.size(d)).collect()
}

pub(super) fn wrong_kind() -> EngineError {
    EngineError::System("an operand has another storage than its kernel reads".into())
}

pub(super) fn slice(d: &Data) -> Result<Slice<'_>, EngineError> {
    Ok(match d {
        Data::F32(v) => Slice::F32(v),
        Data::I32(v) => Slice::I32(v),
        Data::I8(v) => Slice::I8(v),
        Data::U8(v) => Slice::U8(v),
        Data::F64(_) => return Err(wrong_kind()),
    })
}

/// The values of the symbols, from the arguments.
fn bind(loaded: &Loaded, args: &[Input<'_>]) -> Result<DimEnv, EngineError> {
    let program = loaded.program();
    let fault = |m: String| {
        EngineError::Ir(
            Diag::new("Q0402", m).at(Place { func: Some(program.name.clone()), ..Place::default() }),
        )
    };
    if args.len() != program.params.len() {
        return Err(fault(format!("{} arguments for {} parameters", args.len(), program.params.len())));
    }
    let mut seen: [Option<usize>; 4] = [None; 4];
    for (i, (ty, arg)) in program.params.iter().zip(args).enumerate() {
        let (fits, shape) = match arg {
            Input::Tensor(t) => (t.represents(ty.elem), t.shape().to_vec()),
            Input::Cache(c, s) => (program.cache(i as u32) == Some(c.form()), vec![1, s.past(), c.width()]),
        };
        let fits = fits
            && shape.len() == ty.shape.rank()
            && ty.shape.0.iter().zip(&shape).all(|(&d, &n)| match d {
                Dim::Fixed(want) => want == n as u64,
                Dim::Sym(s) => *seen[s as usize].get_or_insert(n) == n,
            });
        if !fits {
            return Err(fault(format!("argument {i} of shape {shape:?} is no {ty}")));
        }
    }
    let get = |s: Sym| seen[s as usize];
    let seq = get(Sym::S).unwrap_or(1);
    let past = get(Sym::P).or_else(|| get(Sym::T)?.checked_sub(seq)).unwrap_or(0);
    Ok(DimEnv { batch: get(Sym::B).unwrap_or(1), seq, past })
}

/// Gets each step with its operands before it and its results behind it; caches are shown as what their readers see.
pub trait Watch {
    /// Whether this step is to be shown: then its operands are copied.
    fn wants(&mut self, step: &Step) -> bool;

    /// A step that was wanted.
    ///
    /// # Errors
    /// What the run is to end with.
    fn see(&mut self, step: &Step, ins: &[Tensor], outs: &[Tensor]) -> Result<(), EngineError>;
}

pub(super) fn run(
    loaded: &Loaded,
    args: &mut [Input<'_>],
    mut watch: Option<&mut dyn Watch>,
) -> Result<Vec<Tensor>, EngineError> {
    let dims = bind(loaded, args)?;
    let program = &loaded.program;
    let mut state =
        State { loaded, dims, args, buffers: Vec::new(), cached: vec![None; program.buffers.len()] };
    state.buffers = program.buffers.iter().map(|b| empty(b.elem, 0)).collect();
    let mut lens: Vec<usize> = program.buffers.iter().map(|b| b.len(&dims)).collect();
    loaded.machine.spare.keep(&lens);
    for step in &program.steps {
        let grows = state.grown_argument(step).is_some();
        for (b, _) in step.outs.iter().filter(|_| !grows) {
            let (b, len) = (*b as usize, &mut lens[*b as usize]);
            // Buffers come to life at their first use.
            if *len > 0 {
                state.buffers[b] = loaded.machine.spare.take(program.buffers[b].elem, *len);
                *len = 0;
            }
        }
        if let (Some(watch), Kernel::Rows { .. }) = (&mut watch, &step.kernel) {
            state.rows_apart(step, &mut **watch)?;
            continue;
        }
        let Some(watch) = watch.as_mut().and_then(|w| if w.wants(step) { Some(w) } else { None }) else {
            state.step(step)?;
            continue;
        };
        let ins: Vec<Tensor> = state.seen(step, step.ins.iter())?;
        state.step(step)?;
        let outs: Vec<(Arg, TensorType)> =
            step.outs.iter().map(|(b, ty)| (Arg::Buffer(*b), ty.clone())).collect();
        watch.see(step, &ins, &state.seen(step, outs.iter())?)?;
    }
    let results = program.results.iter().enumerate();
    let last_use = |i: usize, a: Arg| !program.results[i + 1..].iter().any(|(b, _)| *b == a);
    let results = results.map(|(i, (arg, ty))| state.result(*arg, ty, last_use(i, *arg))).collect();
    loaded.machine.spare.give(state.buffers);
    results
}

pub(super) struct State<'a, 'i> {
    pub(super) loaded: &'a Loaded,
    pub(super) dims: DimEnv,
    pub(super) args: &'a mut [Input<'i>],
    buffers: Vec<Data>,
    /// The cache parameter that a buffer stands for, and the step that appended to it.
    pub(super) cached: Vec<Option<(usize, &'a Step)>>,
}

impl<'a> State<'a, '_> {
    fn sizes(&self, ty: &TensorType) -> Sizes {
        sizes(ty, &self.dims)
    }

    pub(super) fn operand(&self, arg: Arg, ty: &TensorType) -> Result<In<'_>, EngineError> {
        let shape = self.sizes(ty);
        let len: usize = shape.iter().product();
        let data = match arg {
            Arg::Const(c) => Slice::Const(&self.loaded.consts[c as usize]),
            Arg::Param(p) => match &self.args[p as usize] {
                Input::Tensor(t) => slice(t.data())?,
                Input::Cache(..) => return Err(wrong_kind()),
            },
            Arg::Buffer(b) => match &self.buffers[b as usize] {
                Data::F32(v) => Slice::F32(&v[..len]),
                Data::I32(v) => Slice::I32(&v[..len]),
                Data::I8(v) => Slice::I8(&v[..len]),
                Data::U8(v) => Slice::U8(&v[..len]),
                Data::F64(_) => return Err(wrong_kind()),
            },
        };
        Ok(In { shape, data })
    }

    fn result(&mut self, arg: Arg, ty: &TensorType, last: bool) -> Result<Tensor, EngineError> {
        let shape = ty.shape.resolve(&self.dims);
        if let Arg::Buffer(b) = arg {
            if self.cached[b as usize].is_some() {
                return Ok(Tensor::zeros([0]));
            }
            // A small result in the buffer of a larger value would keep all of it, and the next run go without.
            let (buffer, len) = (&mut self.buffers[b as usize], shape.iter().product::<usize>());
            if last && matches!(buffer, Data::F32(v) if v.len() == len) {
                return Ok(Tensor::new(shape, std::mem::replace(buffer, Data::U8(Vec::new()))));
            }
        }
        self.copied(arg, ty)
    }

    /// Operands or results of a step as tensors.
    pub(super) fn seen<'t>(
        &self,
        step: &Step,
        args: impl Iterator<Item = &'t (Arg, TensorType)>,
    ) -> Result<Vec<Tensor>, EngineError> {
        let one = |(arg, ty): &(Arg, TensorType)| {
            let held = match *arg {
                Arg::Buffer(b) => self.cached[b as usize].map(|(p, by)| (p, by, true)),
                Arg::Param(p) => Some((p as usize, step, false)),
                Arg::Const(_) => None,
            };
            match held.map(|(p, by, grown)| (&self.args[p], by, grown)) {
                Some((Input::Cache(store, segments), by, grown)) => self.shown(store, segments, by, grown),
                _ => self.copied(*arg, ty),
            }
        };
        args.map(one).collect()
    }

    /// An operand as a tensor of its own.
    fn copied(&self, arg: Arg, ty: &TensorType) -> Result<Tensor, EngineError> {
        let x = self.operand(arg, ty)?;
        let data = match x.data {
            Slice::F32(v) => Data::F32(v.to_vec()),
            Slice::I32(v) => Data::I32(v.to_vec()),
            Slice::I8(v) => Data::I8(v.to_vec()),
            Slice::U8(v) => Data::U8(v.to_vec()),
            Slice::Const(c) => return Ok(c.tensor().reshaped(&x.shape[..])),
        };
        Ok(Tensor::new(&x.shape[..], data))
    }

    pub(super) fn step(&mut self, step: &'a Step) -> Result<(), EngineError> {
        if let Kernel::Op(Op::Call(f)) = step.kernel {
            return self.call(step, f);
        }
        if self.append_in_place(step)? {
            return Ok(());
        }
        let mut results: SmallVec<[Data; 4]> = SmallVec::new();
        for (b, _) in &step.outs {
            results.push(std::mem::replace(&mut self.buffers[*b as usize], Data::U8(Vec::new())));
            self.cached[*b as usize] = None;
        }
        let done = self.compute(step, &mut results);
        for ((b, _), data) in step.outs.iter().zip(results) {
            self.buffers[*b as usize] = data;
        }
        done
    }

    fn call(&mut self, step: &Step, f: qrmc_ir::FuncId) -> Result<(), EngineError> {
        let mut tensors = Vec::new();
        for (arg, ty) in &step.ins {
            tensors.push(self.result(*arg, ty, false)?);
        }
        let mut inputs: Vec<Input<'_>> = tensors.iter().map(Input::Tensor).collect();
        let results = self.loaded.calls[&f].run_inputs(&mut inputs)?;
        for ((b, _), t) in step.outs.iter().zip(results) {
            let len = self.loaded.program.buffers[*b as usize].len(&self.dims);
            self.buffers[*b as usize] = grown(t.into_data(), len);
        }
        Ok(())
    }

    /// Runs a step into the buffers of its results.
    fn compute(&self, step: &Step, results: &mut [Data]) -> Result<(), EngineError> {
        let m = &*self.loaded.machine;
        let mut outs: SmallVec<[Out<'_>; 4]> = SmallVec::new();
        for ((_, ty), data) in step.outs.iter().zip(results) {
            let shape = self.sizes(ty);
            let len: usize = shape.iter().product();
            outs.push((shape, slice_mut(data, len)?));
        }
        match &step.kernel {
            Kernel::Op(Op::Attention(a)) => return self.attention(a, step, &mut outs[0]),
            Kernel::CacheAppend(_) => return self.append_floats(step, &mut outs[0]),
            _ => {}
        }
        let mut ins: SmallVec<[In<'_>; 8]> = SmallVec::new();
        for (arg, ty) in &step.ins {
            ins.push(self.operand(*arg, ty)?);
        }
        let types = |i: usize| step.ins[i].1.elem;
        match &step.kernel {
            Kernel::Rows { steps, outs: leaving, .. } => {
                rows::run(m, &self.dims, (steps, leaving), &step.ins, &ins, outs)
            }
            kernel => dispatch(m, kernel, &self.dims, &types, &ins, &mut outs),
        }
    }
}

pub(super) fn slice_mut(d: &mut Data, len: usize) -> Result<SliceMut<'_>, EngineError> {
    Ok(match d {
        Data::F32(v) => SliceMut::F32(&mut v[..len]),
        Data::I32(v) => SliceMut::I32(&mut v[..len]),
        Data::I8(v) => SliceMut::I8(&mut v[..len]),
        Data::U8(v) => SliceMut::U8(&mut v[..len]),
        Data::F64(_) => return Err(wrong_kind()),
    })
}

/// Runs a kernel that needs nothing but operands; `elem` gives the types of these.
pub(super) fn dispatch(
    m: &Machine,
    kernel: &Kernel,
    dims: &DimEnv,
    elem: &dyn Fn(usize) -> Elem,
    ins: &[In<'_>],
    outs: &mut [Out<'_>],
) -> Result<(), EngineError> {
    match kernel {
        Kernel::Quantize(spec, rule) => quantize::quantize(m, (*spec, *rule), ins, outs),
        Kernel::Linear(parts) => products::linear(m, parts, elem(0), ins, outs),
        Kernel::Op(Op::AttentionGrad(a)) => products::attention_grad(m, a, ins, outs),
        Kernel::Op(
            op @ (Op::QParams(..)
            | Op::QCast(_)
            | Op::DCast
            | Op::FakeQuant(..)
            | Op::FakeQuantGrad(..)
            | Op::ClipRange(_)
            | Op::ClipRangeGrad(_)),
        ) => quantize::run(m, op, elem(0), ins, outs),
        _ => prims::run(m, kernel, dims, ins, &mut outs[0]),
    }
}
