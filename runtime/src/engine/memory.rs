//! Memory that outlives a run: caches, and buffers between runs.

use std::sync::Mutex;

use qrmc_ir::{Data, Elem, EngineError};

/// Keys or values of all positions so far, with room for more: `[batch, capacity, width]`.
#[derive(Debug)]
pub struct KvCache {
    pub(super) data: Vec<f32>,
    pub(super) batch: usize,
    pub(super) capacity: usize,
    pub(super) width: usize,
    pub(super) len: usize,
}

impl KvCache {
    /// Room for `capacity` positions of `width` elements for each sequence.
    pub fn new(batch: usize, capacity: usize, width: usize) -> Self {
        KvCache { data: vec![0.0; batch * capacity * width], batch, capacity, width, len: 0 }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The sequences of several caches, one after another, with room for `capacity` positions each.
    ///
    /// # Errors
    /// If they do not hold equally many positions of one width, or more than `capacity`.
    pub fn join(parts: &[&KvCache], capacity: usize) -> Result<Self, EngineError> {
        let (len, width) = parts.first().map_or((0, 0), |p| (p.len, p.width));
        if len > capacity || parts.iter().any(|p| (p.len, p.width) != (len, width)) {
            let held: Vec<(usize, usize)> = parts.iter().map(|p| (p.len, p.width)).collect();
            let m =
                format!("caches of (positions, width) {held:?} do not join into one of {capacity} positions");
            return Err(EngineError::System(m));
        }
        let mut out = KvCache::new(parts.iter().map(|p| p.batch).sum(), capacity, width);
        let from = parts.iter().flat_map(|p| (0..p.batch).map(|b| &p.data[b * p.capacity * width..]));
        for (from, to) in from.zip(out.data.chunks_mut((capacity * width).max(1))) {
            to[..len * width].copy_from_slice(&from[..len * width]);
        }
        out.len = len;
        Ok(out)
    }

    /// Keeps the sequences for which `keep` says so, in their order.
    pub fn retain(&mut self, keep: impl Fn(usize) -> bool) {
        let (each, held) = (self.capacity * self.width, self.len * self.width);
        let mut kept = 0;
        for b in (0..self.batch).filter(|&b| keep(b)) {
            self.data.copy_within(b * each..b * each + held, kept * each);
            kept += 1;
        }
        self.batch = kept;
    }

    pub(super) fn append(&mut self, new: &[f32], seq: usize) -> Result<(), EngineError> {
        if self.len + seq > self.capacity {
            let (have, room) = (self.len + seq, self.capacity);
            return Err(EngineError::System(format!("{have} positions do not fit a cache of {room}")));
        }
        for b in 0..self.batch {
            let at = (b * self.capacity + self.len) * self.width;
            let rows = &new[b * seq * self.width..(b + 1) * seq * self.width];
            self.data[at..at + rows.len()].copy_from_slice(rows);
        }
        self.len += seq;
        Ok(())
    }
}

/// Buffers between runs: a run takes those that fit and gives its own back, so that a function that runs again and
/// again does not ask the system for memory each time. What is inside is never read before it is written.
#[derive(Debug, Default)]
pub(super) struct Spare(Mutex<Vec<Data>>);

impl Spare {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Data>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Frees what no buffer of the run to come can use.
    pub(super) fn keep(&self, lens: &[usize]) {
        self.lock().retain(|d| matches!(d, Data::F32(v) if lens.contains(&v.len())));
    }

    pub(super) fn take(&self, elem: Elem, len: usize) -> Data {
        let mut free = self.lock();
        let fits = |d: &Data| matches!((d, elem), (Data::F32(v), Elem::F32) if v.len() == len);
        match free.iter().position(fits) {
            Some(i) => free.swap_remove(i),
            None => empty(elem, len),
        }
    }

    pub(super) fn give(&self, buffers: Vec<Data>) {
        self.lock().extend(buffers.into_iter().filter(|d| matches!(d, Data::F32(v) if !v.is_empty())));
    }
}

pub(super) fn empty(elem: Elem, len: usize) -> Data {
    match elem {
        Elem::I32 => Data::I32(vec![0; len]),
        Elem::I8 => Data::I8(vec![0; len]),
        Elem::U8 => Data::U8(vec![0; len]),
        _ => Data::F32(vec![0.0; len]),
    }
}

/// A result of another function in a buffer that later values share: as long as the longest of them.
pub(super) fn grown(mut d: Data, len: usize) -> Data {
    match &mut d {
        Data::F32(v) if v.len() < len => v.resize(len, 0.0),
        Data::I32(v) if v.len() < len => v.resize(len, 0),
        Data::I8(v) if v.len() < len => v.resize(len, 0),
        Data::U8(v) if v.len() < len => v.resize(len, 0),
        _ => {}
    }
    d
}
