//! Threads that wait for work close to it: they look for a while before they sleep, so that a kernel of a few microseconds
//! is worth sharing.
#![allow(unsafe_code, reason = "a job is lent to other threads for as long as its caller waits for them")]

use std::any::Any;
use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// How often a thread without work looks for some before it sleeps; some tens of microseconds.
const LOOKS: u32 = 2_000;

thread_local! {
    /// Whether this thread is in the middle of a task: then what it starts runs on it alone.
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
}

/// A fixed number of threads beside the caller's.
#[derive(Debug)]
pub(super) struct Crew {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// Tasks of one call, lent out while the call waits.
struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    count: usize,
    done: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Debug)]
struct Shared {
    /// The tasks of a job in as many runs as there are threads, the caller's first: a thread takes those of its own run first,
    /// so that the same part of one array after another comes to the same core.
    runs: Box<[Run]>,
    /// The job that the runs are of.
    job: AtomicPtr<()>,
    /// Held by the thread whose job it is.
    turn: Mutex<()>,
    /// Threads that sleep, and whether all are to end.
    sleep: Mutex<Sleep>,
    wake: Condvar,
    sleepers: AtomicUsize,
}

/// Number of the job in the upper half, tasks of the run that nobody has taken in the lower half. Tasks are taken by counting
/// this down, so nobody takes one of a job that is over.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Run(AtomicU64);

#[derive(Debug, Default)]
struct Sleep {
    over: bool,
}

const TASKS: u64 = u32::MAX as u64;
/// A thread takes this part of what is left of a run: many tasks while there are many, so that threads seldom meet, and one
/// at the end, so that they end together.
const SHARE: u64 = 4;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Crew {
    /// Starts `count` threads.
    pub(super) fn start(count: usize) -> std::io::Result<Self> {
        let shared = Shared {
            runs: (0..=count).map(|_| Run::default()).collect(),
            job: AtomicPtr::default(),
            turn: Mutex::default(),
            sleep: Mutex::default(),
            wake: Condvar::default(),
            sleepers: AtomicUsize::default(),
        };
        let mut crew = Crew { shared: Arc::new(shared), threads: Vec::new() };
        for i in 0..count {
            let shared = crew.shared.clone();
            let name = format!("qrmc-cpu-{}", i + 1);
            crew.threads.push(std::thread::Builder::new().name(name).spawn(move || shared.serve(i + 1))?);
        }
        Ok(crew)
    }

    /// Calls `task` once for each index below `count`, on all threads, and comes back when all calls have. From inside a
    /// task, or while another thread's job runs, all calls are made here.
    pub(super) fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        let busy = AT_WORK.get();
        let turn =
            if busy || count < 2 || count as u64 > TASKS { None } else { self.shared.turn.try_lock().ok() };
        let Some(_turn) = turn else {
            (0..count).for_each(task);
            return;
        };
        let job = Job { task, count, done: AtomicUsize::new(0), panic: Mutex::new(None) };
        self.shared.offer(&job);
        while self.shared.work(0) {}
        // The others may be in the middle of a task each.
        while job.done.load(Ordering::Acquire) < count {
            std::hint::spin_loop();
        }
        let panic = lock(&job.panic).take();
        if let Some(panic) = panic {
            drop(_turn);
            resume_unwind(panic);
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        lock(&self.shared.sleep).over = true;
        self.shared.wake.notify_all();
        for t in self.threads.drain(..) {
            let _ = t.join();
        }
    }
}

impl Shared {
    /// The tasks of run `run` of a job of `count`.
    fn tasks(&self, run: usize, count: usize) -> Range<usize> {
        let at = |run: usize| count * run / self.runs.len();
        at(run)..at(run + 1)
    }

    fn offer(&self, job: &Job<'_>) {
        self.job.store(std::ptr::from_ref(job).cast_mut().cast(), Ordering::Relaxed);
        let number = (self.runs[0].0.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        for (r, run) in self.runs.iter().enumerate() {
            // Whoever sees the new state sees the job.
            run.0.store(number << 32 | self.tasks(r, job.count).len() as u64, Ordering::SeqCst);
        }
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            // Under the lock, a thread either sees the new state before it sleeps, or sleeps already.
            drop(lock(&self.sleep));
            self.wake.notify_all();
        }
    }

    /// Takes some tasks, of the run of thread `me` if there are any, and does them; `false` if there were none.
    fn work(&self, me: usize) -> bool {
        let count = self.runs.len();
        let taken = (me..me + count).find_map(|r| self.take(r % count));
        let Some((run, left, taken)) = taken else { return false };
        // SAFETY: tasks of the job were taken and are not done, so its caller waits and the job lives; the pointer was stored
        // before the state that was read.
        let job = unsafe { &*self.job.load(Ordering::Relaxed).cast::<Job<'_>>() };
        let first = self.tasks(run, job.count).end - left;
        let before = AT_WORK.replace(true);
        for index in first..first + taken {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.task)(index))) {
                lock(&job.panic).get_or_insert(panic);
            }
        }
        AT_WORK.set(before);
        job.done.fetch_add(taken, Ordering::Release);
        true
    }

    /// Takes tasks of a run: its number, how many were left, how many of these are taken.
    fn take(&self, run: usize) -> Option<(usize, usize, usize)> {
        let state = &self.runs[run].0;
        let mut now = state.load(Ordering::Acquire);
        loop {
            let left = now & TASKS;
            if left == 0 {
                return None;
            }
            let taken = left.div_ceil(SHARE);
            match state.compare_exchange_weak(now, now - taken, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some((run, left as usize, taken as usize)),
                Err(other) => now = other,
            }
        }
    }

    /// Whether there is nothing to take.
    fn idle(&self) -> bool {
        self.runs.iter().all(|r| r.0.load(Ordering::SeqCst) & TASKS == 0)
    }

    /// What thread `me` does all its life.
    fn serve(&self, me: usize) {
        let (mut looks, mut seen) = (0, 0);
        loop {
            while self.work(me) {
                looks = 0;
            }
            // Where jobs come, the next one is near.
            let job = self.runs[me].0.load(Ordering::Relaxed) >> 32;
            if job != seen {
                (seen, looks) = (job, 0);
            }
            looks += 1;
            if looks < LOOKS {
                std::hint::spin_loop();
                continue;
            }
            let mut sleep = lock(&self.sleep);
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            while !sleep.over && self.idle() {
                sleep = self.wake.wait(sleep).unwrap_or_else(PoisonError::into_inner);
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            if sleep.over {
                return;
            }
            looks = 0;
        }
    }
}
