//! Keys and values in a run: what is appended, and attention over it.

use qrmc_ir::{AttnAttr, EngineError, Grain, Op, Tensor, TensorType};
use qrmc_lowering::{Arg, CacheForm, CacheRead, Kernel, Step};

use super::cache::{FloatRows, KvStore, NewRows, Order, PAGE, Read, Reader, Segment, Segments};
use super::exec::{In, Input, Slice, State, wrong_kind};
use super::prims;
use crate::cpu::{self, Heads, KvRows, Pool, Queries, Rows};

/// Channels of a row that are read together.
pub(super) fn head_of(form: &CacheForm, width: usize) -> usize {
    let head = form.reads.iter().find_map(|r| match r {
        CacheRead::Add { .. } => None,
        CacheRead::Rope { attr, .. } | CacheRead::AddTurned { attr, .. } => Some(attr.head_dim as usize),
    });
    head.unwrap_or(width)
}

/// Keys or values: a tensor, or of caches.
enum Held<'a> {
    Tensor(Rows<'a>),
    Floats(FloatRows<'a>),
    Codes(Reader<'a>),
}

impl Held<'_> {
    fn view(&self) -> &dyn KvRows {
        match self {
            Held::Tensor(rows) => rows,
            Held::Floats(rows) => rows,
            Held::Codes(reader) => reader,
        }
    }

    /// The sequences, if they are in a cache.
    fn segments(&self) -> Option<&[Segment<'_>]> {
        match self {
            Held::Tensor(_) => None,
            Held::Floats(FloatRows { segments, .. }) | Held::Codes(Reader { segments, .. }) => {
                Some(segments.list())
            }
        }
    }
}

impl<'a> State<'a, '_> {
    /// The cache argument that a step appends to, if that is what it does.
    pub(super) fn grown_argument(&self, step: &Step) -> Option<usize> {
        match (&step.kernel, step.ins.first()) {
            (Kernel::Op(Op::CacheAppend) | Kernel::CacheAppend(_), Some((Arg::Param(p), _))) => {
                let p = *p as usize;
                matches!(self.args[p], Input::Cache(..)).then_some(p)
            }
            _ => None,
        }
    }

    /// Appends to a cache argument, if that is what the step does.
    pub(super) fn append_in_place(&mut self, step: &'a Step) -> Result<bool, EngineError> {
        let Some(p) = self.grown_argument(step) else { return Ok(false) };
        // The cache is taken out while the operands are looked at.
        let Input::Cache(store, segments) = &mut self.args[p] else { return Ok(false) };
        let segments: &Segments<'_> = segments;
        let mut held = std::mem::replace(&mut **store, KvStore::new((0, 0), Order::Positions, None));
        let done = self.append(step, &mut held, segments, true);
        if let Input::Cache(store, _) = &mut self.args[p] {
            **store = held;
        }
        done?;
        self.cached[step.outs[0].0 as usize] = Some((p, step));
        Ok(true)
    }

    /// Appends the new rows of a step to a cache, whose sequences say which `positions` the rows have, if they are to be those
    /// of the step.
    fn append(
        &self,
        step: &Step,
        store: &mut KvStore,
        segments: &Segments<'_>,
        positions: bool,
    ) -> Result<(), EngineError> {
        let (arg, ty) = &step.ins[1];
        let new = self.operand(*arg, ty)?;
        let Kernel::CacheAppend(form) = &step.kernel else {
            return store.append(&NewRows::Floats(new.f32()?), segments);
        };
        if let Some(at) = form.positions().filter(|_| positions) {
            let pos = self.operand(step.ins[at].0, &step.ins[at].1)?;
            if !segments.new_positions().eq(pos.i32()?.iter().copied()) {
                let m = "new rows have other positions than their sequences say".into();
                return Err(EngineError::System(m));
            }
        }
        let side = |i: usize| self.operand(step.ins[i].0, &step.ins[i].1);
        let scales = side(2)?;
        let scales = scales.widened()?;
        let zeros = if form.spec.zero { Some(side(3)?) } else { None };
        let rows = match (new.data()?, &zeros) {
            (Slice::U8(codes), Some(zeros)) => NewRows::Unsigned(codes, &scales, zeros.u8()?),
            (Slice::I8(codes), None) => NewRows::Signed(codes, &scales),
            _ => return Err(wrong_kind()),
        };
        store.append(&rows, segments)
    }

    /// The rows of a cache of codes for those who read them, as the step that appends to it says.
    pub(super) fn reader<'r>(
        &'r self,
        step: &Step,
        (store, segments): (&'r KvStore, &'r Segments<'r>),
        head_dim: usize,
    ) -> Result<Reader<'r>, EngineError> {
        let Kernel::CacheAppend(form) = &step.kernel else { return Err(wrong_kind()) };
        let m = &*self.loaded.machine;
        let operand = |i: usize| self.operand(step.ins[i].0, &step.ins[i].1);
        let channels = match form.spec.grain {
            Grain::Channel => {
                let zeros = if form.spec.zero { Some(operand(3)?.u8()?) } else { None };
                Some((operand(2)?.widened()?, zeros))
            }
            _ => None,
        };
        let turns = |attr| m.turns.of(attr, &[segments.furthest()]);
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
        Ok(Reader {
            store,
            segments,
            isa: m.isa,
            channels,
            reads,
            head_dim,
            alone: Pool::alone(),
            scratch: &m.scratch,
        })
    }

    /// What the readers of a cache see of it before or after its new rows, which must be of one sequence.
    pub(super) fn shown(
        &self,
        store: &KvStore,
        segments: &Segments<'_>,
        by: &Step,
        grown: bool,
    ) -> Result<Tensor, EngineError> {
        let [s] = segments.list() else {
            let m = format!("steps are looked at in runs of one sequence, and {} run", segments.list().len());
            return Err(EngineError::System(m));
        };
        let (len, width) = (s.past + if grown { s.rows } else { 0 }, store.width());
        let data = match store.dense(s, 0, len) {
            Some(rows) => rows,
            None => {
                let Kernel::CacheAppend(form) = &by.kernel else { return Err(wrong_kind()) };
                self.reader(by, (store, segments), head_of(form, width))?.dense(0, 0, len)
            }
        };
        Ok(Tensor::f32([1, len, width], data))
    }

    /// Appends rows of codes to a tensor: as floats.
    pub(super) fn append_floats(&self, step: &Step, out: &mut prims::Out<'_>) -> Result<(), EngineError> {
        let past = self.operand(step.ins[0].0, &step.ins[0].1)?;
        let Kernel::CacheAppend(form) = &step.kernel else { return Err(wrong_kind()) };
        let (batch, width, seq) = (out.0[0], out.0[2], self.dims.seq);
        let positions =
            form.positions().map(|at| self.operand(step.ins[at].0, &step.ins[at].1)).transpose()?;
        let none = vec![0; seq];
        let positions = positions.as_ref().map(In::i32).transpose()?.unwrap_or(&none);
        let each = seq.div_ceil(PAGE);
        let pages: Vec<u32> = (0..(batch * each) as u32).collect();
        let segment = |b: usize| Segment {
            first: b * seq,
            rows: seq,
            past: 0,
            pages: &pages[b * each..(b + 1) * each],
            positions,
        };
        let segments = Segments::new((0..batch).map(segment).collect());
        let mut new = KvStore::new((width, head_of(form, width)), Order::Positions, Some(form));
        new.grow(pages.len());
        self.append(step, &mut new, &segments, false)?;
        let reader = self.reader(step, (&new, &segments), head_of(form, width))?;
        let (old, y) = (past.f32()?, prims::floats(out)?);
        let (old_len, new_len) = (self.dims.past * width, seq * width);
        for (b, y) in y.chunks_exact_mut((old_len + new_len).max(1)).enumerate() {
            let (first, last) = y.split_at_mut(old_len);
            first.copy_from_slice(&old[b * old_len..][..old_len]);
            last.copy_from_slice(&reader.dense(b, 0, seq));
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
        let heads = a.heads as usize;
        let heads = Heads { heads, kv_heads: a.kv_heads as usize, head_dim: out.0[2] / heads };
        let q = self.operand(step.ins[0].0, &step.ins[0].1)?;
        let (k, v) = (self.rows(&step.ins[1], heads)?, self.rows(&step.ins[2], heads)?);
        let (seq, past) = (self.dims.seq, self.dims.past);
        let sequences: Vec<Queries> = match (k.segments(), v.segments()) {
            (Some(k), Some(_)) => {
                k.iter().map(|s| Queries { first: s.first, rows: s.rows, past: s.past }).collect()
            }
            (None, None) => {
                (0..self.dims.batch).map(|b| Queries { first: b * seq, rows: seq, past }).collect()
            }
            _ => return Err(wrong_kind()),
        };
        let (k, v, out, scale) = (k.view(), v.view(), prims::floats(out)?, a.scale.0 as f32);
        cpu::attention(&m.pool, m.isa, &heads, &sequences, scale, q.f32()?, k, v, out, &m.scratch);
        Ok(())
    }

    /// Keys or values of an attention.
    fn rows(&self, (arg, ty): &(Arg, TensorType), heads: Heads) -> Result<Held<'_>, EngineError> {
        let head_dim = heads.head_dim;
        if let Arg::Buffer(b) = arg
            && let Some((p, step)) = &self.cached[*b as usize]
            && let Input::Cache(store, segments) = &self.args[*p]
        {
            return Ok(match store.form() {
                None if store.head_dim() == head_dim => Held::Floats(FloatRows { store, segments }),
                None => return Err(wrong_kind()),
                Some(_) => Held::Codes(self.reader(step, (store, segments), head_dim)?),
            });
        }
        let x = self.operand(*arg, ty)?;
        Ok(Held::Tensor(Rows::dense(x.f32()?, x.shape[1], heads.kv_heads, head_dim)))
    }
}
