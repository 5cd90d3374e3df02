//! Buffers between runs.

use std::sync::Mutex;

use qrmc_ir::{Data, Elem};

use crate::cpu::tiles::Digits;

/// A buffer of fewer bytes than this is kept whether or not the next run has a use for it: a model is several functions, each
/// with its own sizes.
const SMALL: usize = 1 << 20;
/// Bytes of small buffers that are kept.
const KEPT: usize = 16 << 20;

/// Buffers between runs: a run takes those that fit and gives its own back, so that a function that runs again and
/// again does not ask the system for memory each time. What is inside is never read before it is written.
#[derive(Debug, Default)]
pub(super) struct Spare(Mutex<Vec<Data>>);

impl Spare {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Data>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Frees what no buffer of the run to come can use, but for small ones.
    pub(super) fn keep(&self, lens: &[usize]) {
        let mut small = 0;
        self.lock().retain(|d| {
            let bytes = d.len() * d.elem().bits() / 8;
            if bytes < SMALL {
                small += bytes;
            }
            lens.contains(&d.len()) || bytes < SMALL && small <= KEPT
        });
    }

    pub(super) fn take(&self, elem: Elem, len: usize) -> Data {
        let mut free = self.lock();
        match free.iter().position(|d| d.elem() == elem && d.len() == len) {
            Some(i) => free.swap_remove(i),
            None => empty(elem, len),
        }
    }

    pub(super) fn give(&self, buffers: impl IntoIterator<Item = Data>) {
        self.lock().extend(buffers.into_iter().filter(|d| !d.is_empty()));
    }
}

/// Left sides of products, for the memory that they hold.
#[derive(Debug, Default)]
pub(super) struct Cuts(Mutex<Vec<Digits>>);

impl Cuts {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Digits>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn take(&self) -> Digits {
        self.lock().pop().unwrap_or_default()
    }

    pub(super) fn give(&self, digits: Digits) {
        self.lock().push(digits);
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
