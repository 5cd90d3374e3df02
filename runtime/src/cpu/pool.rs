//! Threads, scratch memory, and the one way in which several threads write one output.
#![allow(unsafe_code, reason = "threads write disjoint, strided parts of one output slice")]

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

mod crew;

use crew::Crew;

/// Why a pool could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The number of threads was 0.
    #[error("a pool needs at least one thread, 0 were asked for")]
    NoThreads,
    /// The system refused the threads.
    #[error("cannot start {threads} threads: {source}")]
    Start {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A fixed set of threads, of which the caller's is one. What is started from inside a task runs on its thread alone.
#[derive(Debug)]
pub struct Pool {
    crew: Option<Crew>,
    threads: usize,
}

impl Pool {
    /// A pool of this many threads.
    ///
    /// # Errors
    /// If `threads` is 0 or the system refuses them.
    pub fn new(threads: usize) -> Result<Self, PoolError> {
        let crew = match threads {
            0 => return Err(PoolError::NoThreads),
            1 => None,
            _ => Some(Crew::start(threads - 1).map_err(|source| PoolError::Start { threads, source })?),
        };
        Ok(Pool { crew, threads })
    }

    /// A pool of the caller's thread.
    pub fn alone() -> Self {
        Pool { crew: None, threads: 1 }
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `f(index, chunk)` for each run of `chunk_len` elements of `out` (the last may be shorter).
    ///
    /// # Panics
    /// If `chunk_len` is 0.
    pub fn for_chunks<T: Send>(&self, out: &mut [T], chunk_len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        assert!(chunk_len > 0, "chunks of no element");
        let len = out.len();
        let out = SharedMut::new(out);
        self.for_each(len.div_ceil(chunk_len), |i| {
            let at = i * chunk_len;
            // SAFETY: chunks do not overlap.
            f(i, unsafe { out.part(at, chunk_len.min(len - at)) });
        });
    }

    /// As [`Pool::for_chunks`], with the values of `f` in the order of the chunks.
    ///
    /// # Panics
    /// If `chunk_len` is 0.
    pub fn map_chunks<T: Send, R: Send>(
        &self,
        out: &mut [T],
        chunk_len: usize,
        f: impl Fn(usize, &mut [T]) -> R + Sync,
    ) -> Vec<R> {
        assert!(chunk_len > 0, "chunks of no element");
        let len = out.len();
        let out = SharedMut::new(out);
        self.map(len.div_ceil(chunk_len), |i| {
            let at = i * chunk_len;
            // SAFETY: chunks do not overlap.
            f(i, unsafe { out.part(at, chunk_len.min(len - at)) })
        })
    }

    /// Calls `f` once for each index below `count`.
    pub fn for_each(&self, count: usize, f: impl Fn(usize) + Sync) {
        match &self.crew {
            Some(crew) => crew.run(count, &f),
            None => (0..count).for_each(f),
        }
    }

    /// The values of `f` for the indices below `count`, in index order.
    pub fn map<R: Send>(&self, count: usize, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
        let mut out: Vec<MaybeUninit<R>> = Vec::new();
        out.resize_with(count, MaybeUninit::uninit);
        self.for_chunks(&mut out, 1, |i, out| {
            out[0].write(f(i));
        });
        // If a task panics, this is not reached, and values that exist are not dropped.
        // SAFETY: each was written by its task.
        out.into_iter().map(|r| unsafe { r.assume_init() }).collect()
    }
}

/// Memory that kernels borrow and give back, so that a forward pass allocates once. Any number of threads
/// may take from it; it holds at most as many buffers as were ever taken at the same time.
#[derive(Debug, Default)]
pub struct Scratch {
    free: Mutex<Vec<Vec<f32>>>,
}

impl Scratch {
    /// Holds nothing yet.
    pub fn new() -> Self {
        Scratch::default()
    }

    /// A buffer of `len` elements with unspecified contents; dropping it gives it back.
    pub fn take(&self, len: usize) -> ScratchBuf<'_> {
        let mut buf = {
            let mut free = self.free.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            // The smallest that is large enough, or else the largest.
            let fit = (0..free.len())
                .filter(|&i| free[i].len() >= len)
                .min_by_key(|&i| free[i].len())
                .or_else(|| (0..free.len()).max_by_key(|&i| free[i].len()));
            fit.map(|i| free.swap_remove(i)).unwrap_or_default()
        };
        if buf.len() < len {
            buf = vec![0.0; len];
        }
        ScratchBuf { owner: self, buf, len }
    }

    /// Bytes held for reuse.
    pub fn bytes(&self) -> usize {
        let free = self.free.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        free.iter().map(|b| b.capacity() * size_of::<f32>()).sum()
    }
}

/// A buffer from a [`Scratch`].
#[derive(Debug)]
pub struct ScratchBuf<'a> {
    owner: &'a Scratch,
    buf: Vec<f32>,
    len: usize,
}

impl Deref for ScratchBuf<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.buf[..self.len]
    }
}

impl DerefMut for ScratchBuf<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buf[..self.len]
    }
}

impl Drop for ScratchBuf<'_> {
    fn drop(&mut self) {
        let mut free = self.owner.free.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        free.push(std::mem::take(&mut self.buf));
    }
}

/// A slice whose disjoint parts several threads write.
pub(crate) struct SharedMut<'a, T> {
    ptr: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are handed out only by `part` and `ptr_at`, whose callers promise that they do not overlap.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        SharedMut { ptr: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// The elements `at..at + len`.
    ///
    /// # Safety
    /// No element may be in two parts that live at the same time.
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn part(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at, "part {at}+{len} of {}", self.len);
        // SAFETY: inside the slice by the check above; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(at), len) }
    }

    /// Where element `at` lies. What is written through it must stay inside the slice and disjoint.
    pub(crate) fn ptr_at(&self, at: usize) -> *mut T {
        assert!(at <= self.len, "element {at} of {}", self.len);
        self.ptr.wrapping_add(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_and_order_are_kept() {
        assert!(matches!(Pool::new(0), Err(PoolError::NoThreads)));
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            let mut v = vec![0usize; 1001];
            pool.for_chunks(&mut v, 10, |i, c| c.iter_mut().enumerate().for_each(|(j, x)| *x = 10 * i + j));
            assert!(v.iter().enumerate().all(|(i, &x)| i == x));
            assert_eq!(pool.map(77, |i| i * i), (0..77).map(|i| i * i).collect::<Vec<_>>());
            pool.for_chunks(&mut [0u8; 0], 4, |_, _| panic!("no chunk in an empty slice"));
            pool.for_each(0, |_| panic!("no index below 0"));
        }
    }

    #[test]
    fn tasks_may_start_more_and_several_callers_take_turns() {
        let pool = Pool::new(3).unwrap();
        let nested = pool.map(20, |i| pool.map(10, |j| i * j).iter().sum::<usize>());
        assert_eq!(nested, (0..20).map(|i| 45 * i).collect::<Vec<_>>());
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for n in 0..200 {
                        assert_eq!(pool.map(n, |i| i).len(), n);
                    }
                });
            }
        });
        // Long enough for the threads to fall asleep.
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(pool.map(5, |i| i + 1), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads).unwrap();
            let run = || pool.for_each(50, |i| assert!(i != 17, "task {i}"));
            let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_err();
            assert!(panic.downcast_ref::<String>().is_some_and(|m| m.contains("task 17")));
            assert_eq!(pool.map(9, |i| i).len(), 9);
        }
    }

    #[test]
    fn scratch_is_reused() {
        let s = Scratch::new();
        drop(s.take(100));
        let held = s.bytes();
        {
            let a = s.take(50);
            assert_eq!(a.len(), 50);
        }
        assert_eq!(s.bytes(), held);
        let (a, b) = (s.take(10), s.take(10));
        assert_ne!(a.as_ptr(), b.as_ptr());
    }
}
