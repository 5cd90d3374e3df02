//! Keys and values in a run: what is appended, and attention over it.

use qrmc_ir::{AttnAttr, EngineError, Grain, Op, TensorType};
use qrmc_lowering::{Arg, CacheForm, CacheRead, Kernel, Step};

use super::cache::{KvCache, NewRows, Read, Reader};
use super::exec::{In, Input, Slice, State, wrong_kind};
use super::prims;
use crate::cpu::{self, AttnShape, KvRows, Pool, Rows};

/// Channels of a row that are read together.
pub(super) fn head_of(form: &CacheForm, width: usize) -> usize {
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

impl<'a> State<'a, '_> {
    /// The cache argument that a step appends to, if that is what it does.
    pub(super) fn grown_argument(&self, step: &Step) -> Option<usize> {
        match (&step.kernel, step.ins.first()) {
            (Kernel::Op(Op::CacheAppend) | Kernel::CacheAppend(_), Some((Arg::Param(p), _))) => {
                let p = *p as usize;
                matches!(self.args[p], Input::Cache(_)).then_some(p)
            }
            _ => None,
        }
    }

    /// Appends to a cache argument, if that is what the step does.
    pub(super) fn append_in_place(&mut self, step: &'a Step) -> Result<bool, EngineError> {
        let Some(p) = self.grown_argument(step) else { return Ok(false) };
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
    pub(super) fn reader<'r>(
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
    pub(super) fn append_floats(&self, step: &Step, out: &mut prims::Out<'_>) -> Result<(), EngineError> {
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
    pub(super) fn attention(
        &self,
        a: &AttnAttr,
        step: &Step,
        out: &mut prims::Out<'_>,
    ) -> Result<(), EngineError> {
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
}
