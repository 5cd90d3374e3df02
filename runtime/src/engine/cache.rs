//! Keys and values of all positions so far.

use std::sync::Arc;

use qrmc_ir::pack::pack_row;
use qrmc_ir::{EngineError, Grain};
use qrmc_lowering::CacheForm;

use super::turns::Turns;
use crate::cpu::attention::HeadRows;
use crate::cpu::{self, Isa, Pool, Scratch, WeightView};

#[cfg(test)]
mod tests;

/// Keys or values of all positions so far, with room for more: `[batch, capacity, width]`.
#[derive(Debug)]
pub struct KvCache {
    rows: Rows,
    batch: usize,
    capacity: usize,
    width: usize,
    len: usize,
    /// Of the rows of all sequences, where reading depends on them.
    positions: Vec<i32>,
}

#[derive(Debug)]
enum Rows {
    Floats(Vec<f32>),
    Codes(Codes),
}

/// Rows as bit streams, see [`qrmc_ir::RawWeight`], and what belongs to each.
#[derive(Debug)]
struct Codes {
    form: CacheForm,
    /// Elements that share a scale of their row; 0 where scales belong to channels.
    group: usize,
    row_bytes: usize,
    /// `[batch, capacity, row_bytes]`
    codes: Vec<u8>,
    /// `[batch, capacity, width / group]`
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

/// New rows of a cache, `[batch, seq, width]`.
pub(super) enum NewRows<'a> {
    Floats(&'a [f32]),
    /// Codes, and scales and zero points of their groups, if they are their own.
    Unsigned(&'a [u8], &'a [f32], &'a [u8]),
    Signed(&'a [i8], &'a [f32]),
}

impl KvCache {
    /// Room for `capacity` positions of `width` elements for each sequence, as floats or as codes.
    pub fn new(batch: usize, capacity: usize, width: usize, form: Option<&CacheForm>) -> Self {
        let count = batch * capacity;
        let rows = match form {
            None => Rows::Floats(vec![0.0; count * width]),
            Some(form) => {
                let group = match form.spec.grain {
                    Grain::Group(g) => g as usize,
                    Grain::Channel => 0,
                    _ => width,
                };
                let groups = width.checked_div(group).unwrap_or(0);
                let row_bytes = (usize::from(form.spec.bits) * width).div_ceil(8);
                Rows::Codes(Codes {
                    form: form.clone(),
                    group,
                    row_bytes,
                    codes: vec![0; count * row_bytes],
                    scales: vec![0.0; count * groups],
                    zeros: vec![0; if form.spec.zero { count * groups } else { 0 }],
                })
            }
        };
        KvCache { rows, batch, capacity, width, len: 0, positions: Vec::new() }
    }

    /// Bytes of the memory that [`KvCache::new`] takes.
    pub fn bytes_for(batch: usize, capacity: usize, width: usize, form: Option<&CacheForm>) -> u64 {
        let row = match form {
            None => 4 * width,
            Some(form) => {
                let groups = match form.spec.grain {
                    Grain::Group(g) => width / (g as usize).max(1),
                    Grain::Channel => 0,
                    _ => 1,
                };
                (usize::from(form.spec.bits) * width).div_ceil(8)
                    + groups * if form.spec.zero { 5 } else { 4 }
            }
        };
        (batch as u64).saturating_mul(capacity as u64).saturating_mul(row as u64)
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the memory that this takes.
    pub fn bytes(&self) -> usize {
        match &self.rows {
            Rows::Floats(x) => 4 * x.len(),
            Rows::Codes(c) => c.codes.len() + 4 * c.scales.len() + c.zeros.len(),
        }
    }

    pub(super) fn shape(&self) -> [usize; 3] {
        [self.batch, self.len, self.width]
    }

    pub(super) fn positions(&self) -> &[i32] {
        &self.positions
    }

    pub(super) fn form(&self) -> Option<&CacheForm> {
        match &self.rows {
            Rows::Floats(_) => None,
            Rows::Codes(c) => Some(&c.form),
        }
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.positions.truncate(self.len);
    }

    /// The sequences of several caches, one after another, with room for `capacity` positions each.
    ///
    /// # Errors
    /// If they do not hold the same positions, of one width and form, or more than `capacity`.
    pub fn join(parts: &[&KvCache], capacity: usize) -> Result<Self, EngineError> {
        let Some(first) = parts.first() else { return Ok(KvCache::new(0, capacity, 0, None)) };
        let alike = |p: &&KvCache| {
            (p.len, p.width, p.form(), &p.positions)
                == (first.len, first.width, first.form(), &first.positions)
        };
        if first.len > capacity || !parts.iter().all(alike) {
            let held: Vec<(usize, usize)> = parts.iter().map(|p| (p.len, p.width)).collect();
            let m =
                format!("caches of (positions, width) {held:?} do not join into one of {capacity} positions");
            return Err(EngineError::System(m));
        }
        let batch = parts.iter().map(|p| p.batch).sum();
        let mut out = KvCache::new(batch, capacity, first.width, first.form());
        let mut done = 0;
        for p in parts {
            let spans = (p.capacity, capacity, p.len);
            match (&p.rows, &mut out.rows) {
                (Rows::Floats(x), Rows::Floats(y)) => copy_rows(x, y, spans, p.batch, done),
                (Rows::Codes(x), Rows::Codes(y)) => {
                    copy_rows(&x.codes, &mut y.codes, spans, p.batch, done);
                    copy_rows(&x.scales, &mut y.scales, spans, p.batch, done);
                    copy_rows(&x.zeros, &mut y.zeros, spans, p.batch, done);
                }
                _ => {}
            }
            done += p.batch;
        }
        (out.len, out.positions) = (first.len, first.positions.clone());
        Ok(out)
    }

    /// Keeps the sequences for which `keep` says so, in their order.
    pub fn retain(&mut self, keep: impl Fn(usize) -> bool) {
        let kept: Vec<usize> = (0..self.batch).filter(|&b| keep(b)).collect();
        let (batch, capacity, len) = (self.batch, self.capacity, self.len);
        match &mut self.rows {
            Rows::Floats(x) => move_rows(x, batch, capacity, len, &kept),
            Rows::Codes(c) => {
                move_rows(&mut c.codes, batch, capacity, len, &kept);
                move_rows(&mut c.scales, batch, capacity, len, &kept);
                move_rows(&mut c.zeros, batch, capacity, len, &kept);
            }
        }
        self.batch = kept.len();
    }

    /// Appends `seq` rows to each sequence. `positions` are those of the rows, where reading depends on them.
    pub(super) fn append(
        &mut self,
        new: &NewRows<'_>,
        positions: &[i32],
        seq: usize,
    ) -> Result<(), EngineError> {
        if self.len + seq > self.capacity {
            let (have, room) = (self.len + seq, self.capacity);
            return Err(EngineError::System(format!("{have} positions do not fit a cache of {room}")));
        }
        let (batch, at) = (self.batch, (self.len, self.capacity));
        match (&mut self.rows, new) {
            (Rows::Floats(x), NewRows::Floats(new)) => put_rows(x, new, batch, at, seq),
            (Rows::Codes(c), NewRows::Unsigned(codes, scales, zeros)) => {
                c.pack(self.width, batch, at, seq, |i| codes[i]);
                if c.group > 0 {
                    put_rows(&mut c.scales, scales, batch, at, seq);
                    put_rows(&mut c.zeros, zeros, batch, at, seq);
                }
            }
            (Rows::Codes(c), NewRows::Signed(codes, scales)) => {
                let least = c.form.spec.qmin();
                c.pack(self.width, batch, at, seq, |i| (i32::from(codes[i]) - least) as u8);
                if c.group > 0 {
                    put_rows(&mut c.scales, scales, batch, at, seq);
                }
            }
            _ => return Err(EngineError::System("new rows are not what their cache keeps".into())),
        }
        self.len += seq;
        self.positions.extend_from_slice(positions);
        Ok(())
    }

    /// A copy of all rows, `[batch, len, width]`, if they are floats.
    pub(super) fn dense(&self) -> Option<Vec<f32>> {
        let Rows::Floats(x) = &self.rows else { return None };
        let each = self.capacity * self.width;
        let held = |b| &x[b * each..][..self.len * self.width];
        Some((0..self.batch).flat_map(held).copied().collect())
    }

    /// The rows as floats in memory, if that is what they are.
    pub(super) fn floats(&self, head_dim: usize) -> Option<cpu::Rows<'_>> {
        let Rows::Floats(data) = &self.rows else { return None };
        Some(cpu::Rows {
            data,
            batch_stride: self.capacity * self.width,
            row_stride: self.width,
            head_stride: head_dim,
        })
    }
}

impl Codes {
    fn pack(
        &mut self,
        width: usize,
        batch: usize,
        (len, capacity): (usize, usize),
        seq: usize,
        code: impl Fn(usize) -> u8,
    ) {
        let mut row = Vec::with_capacity(self.row_bytes);
        for (b, s) in (0..batch).flat_map(|b| (0..seq).map(move |s| (b, s))) {
            row.clear();
            let from = (b * seq + s) * width;
            pack_row((from..from + width).map(&code), self.form.spec.bits, &mut row);
            self.codes[(b * capacity + len + s) * self.row_bytes..][..self.row_bytes].copy_from_slice(&row);
        }
    }
}

/// Copies the `len` first of `from` rows of each sequence, to be of `to`, behind `done` sequences.
fn copy_rows<T: Copy>(
    x: &[T],
    y: &mut [T],
    (from, to, len): (usize, usize, usize),
    batch: usize,
    done: usize,
) {
    let each = x.len().checked_div(batch * from).unwrap_or(0);
    for b in 0..batch {
        let held = &x[b * from * each..][..len * each];
        y[(done + b) * to * each..][..len * each].copy_from_slice(held);
    }
}

/// Moves the sequences that are kept to the front; the others are gone.
fn move_rows<T: Copy>(x: &mut Vec<T>, batch: usize, capacity: usize, len: usize, kept: &[usize]) {
    let each = x.len().checked_div(batch).unwrap_or(0);
    let held = each.checked_div(capacity).unwrap_or(0) * len;
    for (to, &b) in kept.iter().enumerate() {
        x.copy_within(b * each..b * each + held, to * each);
    }
    x.truncate(kept.len() * each);
}

/// Puts `seq` new rows behind the `len` of each sequence.
fn put_rows<T: Copy>(x: &mut [T], new: &[T], batch: usize, (len, capacity): (usize, usize), seq: usize) {
    let each = x.len().checked_div(batch * capacity).unwrap_or(0);
    for b in 0..batch {
        x[(b * capacity + len) * each..][..seq * each].copy_from_slice(&new[b * seq * each..][..seq * each]);
    }
}

/// Something that is done to a row that is read, with what it needs.
pub(super) enum Read<'a> {
    Add(std::borrow::Cow<'a, [f32]>),
    Rope(Arc<Turns>),
    AddTurned(std::borrow::Cow<'a, [f32]>, Arc<Turns>, Option<usize>),
}

/// The rows of a cache of codes, for those who read them.
pub(super) struct Reader<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) isa: Isa,
    /// Where scales belong to channels: these, and the zero points.
    pub(super) channels: Option<(std::borrow::Cow<'a, [f32]>, &'a [u8])>,
    pub(super) reads: Vec<Read<'a>>,
    pub(super) head_dim: usize,
    /// One thread: rows are read inside of a task.
    pub(super) alone: Pool,
    pub(super) scratch: &'a Scratch,
}

impl Reader<'_> {
    /// All rows of all sequences as floats, `[batch, len, width]`.
    pub(super) fn all(&self) -> Vec<f32> {
        let [batch, len, width] = self.cache.shape();
        let mut out = vec![0.0; batch * len * width];
        let mut head = vec![0.0; len * self.head_dim];
        for (b, h) in (0..batch).flat_map(|b| (0..width / self.head_dim).map(move |h| (b, h))) {
            self.read(b, h, 0, len, &mut head);
            for (t, row) in head.chunks_exact(self.head_dim).enumerate() {
                out[(b * len + t) * width + h * self.head_dim..][..self.head_dim].copy_from_slice(row);
            }
        }
        out
    }
}

impl HeadRows for Reader<'_> {
    fn read(&self, b: usize, head: usize, from: usize, count: usize, out: &mut [f32]) {
        let (cache, d) = (self.cache, self.head_dim);
        let Rows::Codes(c) = &cache.rows else { return };
        let first = b * cache.capacity + from;
        let groups = cache.width.checked_div(c.group).unwrap_or(0);
        let span = first * groups..(first + count) * groups;
        let ones = vec![1.0; if c.group == 0 { count } else { 0 }];
        // Scales of channels come after: until then, codes are values.
        let view = WeightView::Packed {
            bits: c.form.spec.bits,
            signed: c.form.spec.signed,
            codes: &c.codes[first * c.row_bytes..][..count * c.row_bytes],
            group: if c.group == 0 { cache.width } else { c.group },
            scales: if c.group == 0 { &ones } else { &c.scales[span.clone()] },
            zeros: if c.group == 0 || !c.form.spec.zero { None } else { Some(&c.zeros[span]) },
        };
        cpu::weight::read_part(self.isa, &view, cache.width, head * d, d, &mut out[..count * d]);
        if let Some((scales, zeros)) = &self.channels {
            let channels = head * d..(head + 1) * d;
            for row in out[..count * d].chunks_exact_mut(d) {
                for ((y, &s), &z) in
                    row.iter_mut().zip(&scales[channels.clone()]).zip(&zeros[channels.clone()])
                {
                    *y = s * (*y - f32::from(z));
                }
            }
        }
        let out = &mut out[..count * d];
        let positions = || &cache.positions[from..from + count];
        for r in &self.reads {
            match r {
                Read::Add(v) => {
                    for row in out.chunks_exact_mut(d) {
                        row.iter_mut().zip(&v[head * d..]).for_each(|(y, v)| *y += v);
                    }
                }
                Read::Rope(turns) => turns.turn(&self.alone, self.isa, positions(), d, out),
                Read::AddTurned(v, turns, block) => {
                    let mut added = v[head * d..(head + 1) * d].repeat(count);
                    turns.turn(&self.alone, self.isa, positions(), d, &mut added);
                    if let Some(n) = *block {
                        let x = added.clone();
                        let how = (n, false);
                        cpu::hadamard(&self.alone, self.isa, &x, d, how, None, &mut added, self.scratch);
                    }
                    out.iter_mut().zip(&added).for_each(|(y, v)| *y += v);
                }
            }
        }
    }
}
