//! How fast a model runs.

use std::time::Instant;

use qrmc_ir::EngineError;

use crate::caches::pages;
use crate::engine::{CpuEngine, Sequence};
use crate::session::{CHUNK, Session};

/// Bytes that are read to measure what memory gives: far more than caches hold.
const READ: usize = 512 << 20;

/// Speed of one batch size.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Speed {
    /// Sequences side by side.
    pub batch: usize,
    /// Tokens of prompts a second, all sequences together; `None` if there was no prompt.
    pub prefill: Option<f64>,
    /// New tokens a second, all sequences together; `None` if there were none.
    pub decode: Option<f64>,
    /// Bytes that a decode step reads: weights, and on average the caches.
    pub step_bytes: u64,
}

/// Runs `prompt` tokens of each of `batch` sequences, one sequence after another as generation does, then `new` tokens of all
/// of them side by side behind empty caches, and times both. Tokens are arbitrary; no token ends a text.
///
/// # Errors
/// What the engine says.
pub fn speed(model: &Session, batch: usize, prompt: usize, new: usize) -> Result<Speed, EngineError> {
    let vocab = model.facts().vocab.max(1) as usize;
    let tokens = |at: usize, count: usize| -> Vec<u32> {
        (at..at + count).map(|i| (i * 7919 % vocab) as u32).collect()
    };
    let rate =
        |tokens: usize, start: Instant| (batch * tokens) as f64 / start.elapsed().as_secs_f64().max(1e-9);
    let mut prefill = None;
    if prompt > 0 {
        let prompts: Vec<Vec<u32>> = (0..batch).map(|b| tokens(b * prompt, prompt)).collect();
        let mut caches = model.caches(batch * pages(prompt));
        let start = Instant::now();
        for prompt in &prompts {
            let sequence = caches.add();
            for part in prompt.chunks(CHUNK) {
                model.stream(&mut caches, &[(sequence, part)])?;
            }
        }
        prefill = Some(rate(prompt, start));
    }
    let (mut decode, mut step_bytes) = (None, 0);
    if new > 0 {
        let mut caches = model.caches(batch * pages(new));
        let sequences: Vec<Sequence> = (0..batch).map(|_| caches.add()).collect();
        let start = Instant::now();
        for at in 0..new {
            let next = tokens(at, batch);
            let parts: Vec<(Sequence, &[u32])> = sequences.iter().copied().zip(next.chunks(1)).collect();
            model.logits(&model.stream(&mut caches, &parts)?)?;
        }
        decode = Some(rate(new, start));
        step_bytes = model.step_bytes() + caches.bytes() as u64 / 2;
    }
    Ok(Speed { batch, prefill, decode, step_bytes })
}

/// Bytes a second that all threads together read from memory: the best of a few passes.
pub fn read_bandwidth(engine: &CpuEngine) -> f64 {
    let data = vec![1u64; READ / 8];
    let part = 1 << 17;
    let pass = || {
        let start = Instant::now();
        let sums = engine.with_machine(|pool, _| {
            pool.map(data.len().div_ceil(part), |i| {
                let part = &data[i * part..data.len().min((i + 1) * part)];
                let mut acc = [0u64; 32];
                for x in part.as_chunks::<32>().0 {
                    for (a, x) in acc.iter_mut().zip(x) {
                        *a = a.wrapping_add(*x);
                    }
                }
                acc.iter().fold(0u64, |s, a| s.wrapping_add(*a))
            })
        });
        std::hint::black_box(sums);
        READ as f64 / start.elapsed().as_secs_f64()
    };
    (0..4).map(|_| pass()).fold(0.0, f64::max)
}
