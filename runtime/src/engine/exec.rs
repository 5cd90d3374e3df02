//! Running a program: operands are found, kernels called, results taken out.

use qrmc_ir::{AttnAttr, Data, Diag, Dim, DimEnv, EngineError, Grain, Op, Place, Sym, Tensor, TensorType};
use qrmc_lowering::{Arg, CacheForm, CacheRead, Kernel, Step};

use super::cache::{KvCache, NewRows, Read, Reader};
use super::consts::Constant;
use super::memory::{empty, grown};
use super::{Loaded, prims, products, quantize};
use crate::cpu::{self, AttnShape, KvRows, Pool, Rows};

/// An argument.
pub enum Input<'a> {
    /// A tensor.
    Tensor(&'a Tensor),
    /// A cache that is appended to in place.
    Cache(&'a mut KvCache),
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
    pub(super) shape: Vec<usize>,
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

pub(super) fn wrong_kind() -> EngineError {
    EngineError::System("an operand has another storage than its kernel reads".into())
}

fn slice(d: &Data) -> Result<Slice<'_>, EngineError> {
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
            Input::Cache(c) => (program.cache(i as u32) == Some(c.form()), c.shape().to_vec()),
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
pub type Watch<'w> = dyn FnMut(&Step, &[Tensor], &[Tensor]) -> Result<(), EngineError> + Send + 'w;

pub(super) fn run(
    loaded: &Loaded,
    args: &mut [Input<'_>],
    mut watch: Option<&mut Watch<'_>>,
) -> Result<Vec<Tensor>, EngineError> {
    let dims = bind(loaded, args)?;
    let program = &loaded.program;
    let mut state =
        State { loaded, dims, args, buffers: Vec::new(), cached: vec![None; program.buffers.len()] };
    state.buffers = program.buffers.iter().map(|b| empty(b.elem, 0)).collect();
    let mut lens: Vec<usize> = program.buffers.iter().map(|b| b.len(&dims)).collect();
    loaded.machine.spare.keep(&lens);
    for step in &program.steps {
        for (b, _) in &step.outs {
            let (b, len) = (*b as usize, &mut lens[*b as usize]);
            // Buffers come to life at their first use.
            if *len > 0 {
                state.buffers[b] = loaded.machine.spare.take(program.buffers[b].elem, *len);
                *len = 0;
            }
        }
        match &mut watch {
            None => state.step(step)?,
            Some(watch) => {
                let ins: Vec<Tensor> = state.seen(step, step.ins.iter())?;
                state.step(step)?;
                let outs: Vec<(Arg, TensorType)> =
                    step.outs.iter().map(|(b, ty)| (Arg::Buffer(*b), ty.clone())).collect();
                watch(step, &ins, &state.seen(step, outs.iter())?)?;
            }
        }
    }
    let results = program.results.iter().enumerate();
    let last_use = |i: usize, a: Arg| !program.results[i + 1..].iter().any(|(b, _)| *b == a);
    let results = results.map(|(i, (arg, ty))| state.result(*arg, ty, last_use(i, *arg))).collect();
    loaded.machine.spare.give(state.buffers);
    results
}

/// Channels of a row that are read together.
fn head_of(form: &CacheForm, width: usize) -> usize {
    let head = form.reads.iter().find_map(|r| match r {
        CacheRead::Add { .. } => None,
        CacheRead::Rope { attr, .. } | CacheRead::AddTurned { attr, .. } => Some(attr.head_dim as usize),
    });
    head.unwrap_or(width)
}

/// Keys or values: in memory, or read from a cache of codes.
enum Held<'a> {
    Floats(Rows<'a>),
    Codes(Reader<'a>),
}

impl Held<'_> {
    fn view(&self) -> KvRows<'_> {
        match self {
            Held::Floats(rows) => KvRows::Floats(*rows),
            Held::Codes(reader) => KvRows::Other(reader),
        }
    }
}

struct State<'a, 'i> {
    loaded: &'a Loaded,
    dims: DimEnv,
    args: &'a mut [Input<'i>],
    buffers: Vec<Data>,
    /// The cache parameter that a buffer stands for, and the step that appended to it.
    cached: Vec<Option<(usize, &'a Step)>>,
}

impl<'a> State<'a, '_> {
    fn operand(&self, arg: Arg, ty: &TensorType) -> Result<In<'_>, EngineError> {
        let shape = ty.shape.resolve(&self.dims);
        let len: usize = shape.iter().product();
        let data = match arg {
            Arg::Const(c) => Slice::Const(&self.loaded.consts[c as usize]),
            Arg::Param(p) => match &self.args[p as usize] {
                Input::Tensor(t) => slice(t.data())?,
                Input::Cache(_) => return Err(wrong_kind()),
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
    fn seen<'t>(
        &self,
        step: &Step,
        args: impl Iterator<Item = &'t (Arg, TensorType)>,
    ) -> Result<Vec<Tensor>, EngineError> {
        let one = |(arg, ty): &(Arg, TensorType)| {
            let held = match *arg {
                Arg::Buffer(b) => self.cached[b as usize],
                Arg::Param(p) => Some((p as usize, step)),
                Arg::Const(_) => None,
            };
            let cache = held.and_then(|(p, by)| match &self.args[p] {
                Input::Cache(cache) => Some((&**cache, by)),
                Input::Tensor(_) => None,
            });
            let Some((cache, by)) = cache else { return self.copied(*arg, ty) };
            let data = match cache.dense() {
                Some(rows) => rows,
                None => {
                    let Kernel::CacheAppend(form) = &by.kernel else { return Err(wrong_kind()) };
                    self.reader(by, cache, head_of(form, cache.shape()[2]))?.all()
                }
            };
            Ok(Tensor::f32(cache.shape(), data))
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
            Slice::Const(c) => return Ok(c.tensor().reshaped(x.shape)),
        };
        Ok(Tensor::new(x.shape, data))
    }

    fn step(&mut self, step: &'a Step) -> Result<(), EngineError> {
        if let Kernel::Op(Op::Call(f)) = step.kernel {
            return self.call(step, f);
        }
        if self.append_in_place(step)? {
            return Ok(());
        }
        let mut outs: Vec<(Vec<usize>, Data)> = Vec::new();
        for (b, ty) in &step.outs {
            let data = std::mem::replace(&mut self.buffers[*b as usize], Data::U8(Vec::new()));
            self.cached[*b as usize] = None;
            outs.push((ty.shape.resolve(&self.dims), data));
        }
        let done = self.kernel(step, &mut outs);
        for ((b, _), (_, data)) in step.outs.iter().zip(outs) {
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

    /// Appends to a cache argument, if that is what the step does.
    fn append_in_place(&mut self, step: &'a Step) -> Result<bool, EngineError> {
        let (Kernel::Op(Op::CacheAppend) | Kernel::CacheAppend(_), Some((Arg::Param(p), _))) =
            (&step.kernel, step.ins.first())
        else {
            return Ok(false);
        };
        let p = *p as usize;
        // The cache is taken out while the operands are looked at.
        let Input::Cache(cache) = &mut self.args[p] else { return Ok(false) };
        let mut held = std::mem::replace(&mut **cache, KvCache::new(0, 0, 0, None));
        let done = self.append(step, &mut held);
        if let Input::Cache(cache) = &mut self.args[p] {
            **cache = held;
        }
        done?;
        self.cached[step.outs[0].0 as usize] = Some((p, step));
        Ok(true)
    }

    /// Appends the new rows of a step to a cache.
    fn append(&self, step: &Step, cache: &mut KvCache) -> Result<(), EngineError> {
        let (arg, ty) = &step.ins[1];
        let new = self.operand(*arg, ty)?;
        let Kernel::CacheAppend(form) = &step.kernel else {
            return cache.append(&NewRows::Floats(new.f32()?), &[], self.dims.seq);
        };
        let pos = form.positions().map(|at| self.operand(step.ins[at].0, &step.ins[at].1)).transpose()?;
        let pos = pos.as_ref().map(In::i32).transpose()?.unwrap_or(&[]);
        let side = |i: usize| self.operand(step.ins[i].0, &step.ins[i].1);
        let scales = side(2)?;
        let scales = scales.widened()?;
        let zeros = if form.spec.zero { Some(side(3)?) } else { None };
        let rows = match (new.data()?, &zeros) {
            (Slice::U8(codes), Some(zeros)) => NewRows::Unsigned(codes, &scales, zeros.u8()?),
            (Slice::I8(codes), None) => NewRows::Signed(codes, &scales),
            _ => return Err(wrong_kind()),
        };
        cache.append(&rows, pos, self.dims.seq)
    }

    /// The rows of a cache of codes for those who read them, as the step that appends to it says.
    fn reader<'r>(
        &'r self,
        step: &Step,
        cache: &'r KvCache,
        head_dim: usize,
    ) -> Result<Reader<'r>, EngineError> {
        let Kernel::CacheAppend(form) = &step.kernel else { return Err(wrong_kind()) };
        let m = &*self.loaded.machine;
        let operand = |i: usize| self.operand(step.ins[i].0, &step.ins[i].1);
        let channels = match form.spec.grain {
            Grain::Channel => Some((operand(2)?.widened()?, operand(3)?.u8()?)),
            _ => None,
        };
        let turns = |attr| m.turns.of(attr, cache.positions());
        let mut reads = Vec::new();
        for r in &form.reads {
            reads.push(match r {
                CacheRead::Add { operand: v } => Read::Add(operand(*v)?.widened()?),
                CacheRead::Rope { attr, .. } => Read::Rope(turns(attr)?),
                CacheRead::AddTurned { operand: v, attr, block, .. } => {
                    Read::AddTurned(operand(*v)?.widened()?, turns(attr)?, block.map(|n| n as usize))
                }
            });
        }
        Ok(Reader { cache, isa: m.isa, channels, reads, head_dim, alone: Pool::alone(), scratch: &m.scratch })
    }

    /// Appends rows of codes to a tensor: as floats.
    fn append_floats(&self, step: &Step, out: &mut prims::Out) -> Result<(), EngineError> {
        let past = self.operand(step.ins[0].0, &step.ins[0].1)?;
        let Kernel::CacheAppend(form) = &step.kernel else { return Err(wrong_kind()) };
        let (batch, width) = (out.0[0], out.0[2]);
        let mut new = KvCache::new(batch, self.dims.seq, width, Some(form));
        self.append(step, &mut new)?;
        let rows = self.reader(step, &new, head_of(form, width))?.all();
        let (old, y) = (past.f32()?, prims::floats(out)?);
        let (old_len, new_len) = (self.dims.past * width, self.dims.seq * width);
        for (b, y) in y.chunks_exact_mut((old_len + new_len).max(1)).enumerate() {
            let (first, last) = y.split_at_mut(old_len);
            first.copy_from_slice(&old[b * old_len..][..old_len]);
            last.copy_from_slice(&rows[b * new_len..][..new_len]);
        }
        Ok(())
    }

    /// Runs an attention on keys and values that are tensors or caches.
    fn attention(&self, a: &AttnAttr, step: &Step, out: &mut prims::Out) -> Result<(), EngineError> {
        let m = &*self.loaded.machine;
        let shape = AttnShape {
            batch: self.dims.batch,
            seq: self.dims.seq,
            past: self.dims.past,
            heads: a.heads as usize,
            kv_heads: a.kv_heads as usize,
            head_dim: out.0[2] / a.heads as usize,
        };
        let q = self.operand(step.ins[0].0, &step.ins[0].1)?;
        let (k, v) = (self.rows(&step.ins[1], shape.head_dim)?, self.rows(&step.ins[2], shape.head_dim)?);
        let (k, v, out) = (k.view(), v.view(), prims::floats(out)?);
        cpu::attention(&m.pool, m.isa, &shape, a.scale.0 as f32, q.f32()?, k, v, out, &m.scratch);
        Ok(())
    }

    /// Keys or values of an attention.
    fn rows(&self, (arg, ty): &(Arg, TensorType), head_dim: usize) -> Result<Held<'_>, EngineError> {
        if let Arg::Buffer(b) = arg
            && let Some((p, step)) = &self.cached[*b as usize]
            && let Input::Cache(cache) = &self.args[*p]
        {
            return Ok(match cache.floats(head_dim) {
                Some(rows) => Held::Floats(rows),
                None => Held::Codes(self.reader(step, cache, head_dim)?),
            });
        }
        let x = self.operand(*arg, ty)?;
        let width = x.shape[2];
        Ok(Held::Floats(Rows {
            data: x.f32()?,
            batch_stride: x.shape[1] * width,
            row_stride: width,
            head_stride: head_dim,
        }))
    }

    fn kernel(&self, step: &Step, outs: &mut [(Vec<usize>, Data)]) -> Result<(), EngineError> {
        let m = &*self.loaded.machine;
        match &step.kernel {
            Kernel::Op(Op::Attention(a)) => return self.attention(a, step, &mut outs[0]),
            Kernel::CacheAppend(_) => return self.append_floats(step, &mut outs[0]),
            _ => {}
        }
        let mut ins = Vec::new();
        for (arg, ty) in &step.ins {
            ins.push(self.operand(*arg, ty)?);
        }
        if let Kernel::Op(Op::AttentionGrad(a)) = &step.kernel {
            return products::attention_grad(m, a, &ins, outs);
        }
        match &step.kernel {
            Kernel::Quantize(spec, rule) => quantize::quantize(m, (*spec, *rule), &ins, outs),
            Kernel::Linear(parts) => products::linear(m, parts, step.ins[0].1.elem, &ins, outs),
            Kernel::Op(
                op @ (Op::QParams(..)
                | Op::QCast(_)
                | Op::DCast
                | Op::FakeQuant(..)
                | Op::FakeQuantGrad(..)
                | Op::ClipRange(_)
                | Op::ClipRangeGrad(_)),
            ) => quantize::run(m, op, &step.ins, &ins, outs),
            _ => prims::run(m, &step.kernel, &self.dims, &ins, &mut outs[0]),
        }
    }
}
