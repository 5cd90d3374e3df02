//! Generation from many prompts, side by side.

use qrmc_ir::EngineError;

use crate::caches::{Caches, pages};
use crate::cpu::gemm::DOT_ROWS;
use crate::engine::Sequence;
use crate::generate::{Ending, GenerateError, GenerateParams};
use crate::sample::Sampler;
use crate::session::{CHUNK, Session};

/// Prompts that are continued side by side. Up to this many rows, linear layers compute a row exactly as they compute one
/// alone, so a text does not depend on what else is in its batch.
pub const BATCH: usize = DOT_ROWS;

/// What one prompt was continued with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Continuation {
    /// New tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// Why it ended; [`Ending::Context`] without tokens if the prompt alone fills the context.
    pub ending: Ending,
}

/// Continues each prompt as [`crate::generate::generate`] does, with a sampler of its own and the same tokens, whatever runs
/// beside it. When a text ends, the next prompt takes its place; what prompts begin with alike is computed once, as long as it
/// is in the caches. `on_done` is told the index of each prompt that is finished, with its continuation.
///
/// Caches and the buffers of a run take at most `memory` bytes.
///
/// # Errors
/// If a prompt is empty or does not fit the memory by itself, or what the engine and the sampler say.
pub fn generate_many(
    model: &Session,
    prompts: &[Vec<u32>],
    params: &GenerateParams,
    memory: u64,
    on_done: &mut dyn FnMut(usize, &Continuation),
) -> Result<Vec<Continuation>, GenerateError> {
    if let Some(i) = prompts.iter().position(Vec::is_empty) {
        return Err(GenerateError::Prompt(format!("prompt {} has no tokens", i + 1)));
    }
    let context = model.facts().context as usize;
    let need: Vec<usize> = prompts
        .iter()
        .map(|p| match p.len() {
            n if n >= context => 0,
            n => pages(context.min(n.saturating_add(params.max_new))),
        })
        .collect();
    let room = room(model, prompts, &need, memory)?;
    let mut run = Run { model, params, context, caches: model.caches(room), live: Vec::new() };
    let mut out: Vec<Option<Continuation>> = vec![None; prompts.len()];
    let (mut next, mut free) = (0, room);
    loop {
        while next < prompts.len() && run.live.len() < BATCH && need[next] <= free {
            free -= need[next];
            run.start(next, &prompts[next])?;
            next += 1;
        }
        let ended = run.sample()?;
        for (index, done) in &ended {
            free += need[*index];
            on_done(*index, done);
        }
        ended.into_iter().for_each(|(index, done)| out[index] = Some(done));
        if run.live.is_empty() && next == prompts.len() {
            return Ok(out.into_iter().flatten().collect());
        }
        run.step()?;
    }
}

/// Pages that the caches get: what fits the memory, but no more than prompts can need at the same time.
fn room(model: &Session, prompts: &[Vec<u32>], need: &[usize], memory: u64) -> Result<usize, GenerateError> {
    let buffers = model.buffer_bytes(CHUNK.max(BATCH));
    let page = model.page_bytes().max(1);
    let fit = usize::try_from(memory.saturating_sub(buffers) / page).unwrap_or(usize::MAX);
    if let Some((i, &most)) = need.iter().enumerate().max_by_key(|(_, n)| **n).filter(|(_, n)| **n > fit) {
        return Err(GenerateError::Prompt(format!(
            "prompt {} of {} tokens needs {} bytes for its caches and for what is computed, and {memory} are there; allow \
             fewer new tokens, shorten the prompt, or free memory",
            i + 1,
            prompts[i].len(),
            (most as u64).saturating_mul(page).saturating_add(buffers)
        )));
    }
    let mut largest = need.to_vec();
    largest.sort_unstable_by(|a, b| b.cmp(a));
    // As much again may stay of texts that ended, for those that begin alike.
    let useful = largest.iter().take(BATCH).sum::<usize>().saturating_mul(2);
    Ok(fit.min(useful))
}

/// A prompt that is being continued.
struct Live {
    index: usize,
    sequence: Option<Sequence>,
    sampler: Sampler,
    logits: Vec<f32>,
    tokens: Vec<u32>,
}

/// Prompts that are being continued side by side.
struct Run<'a> {
    model: &'a Session,
    params: &'a GenerateParams,
    context: usize,
    caches: Caches,
    live: Vec<Live>,
}

impl Run<'_> {
    /// Runs a prompt; one that fills the context has no sequence.
    fn start(&mut self, index: usize, prompt: &[u32]) -> Result<(), GenerateError> {
        let sampler = Sampler::new(self.params.sample)?;
        let (sequence, logits) = if prompt.len() < self.context {
            let (sequence, logits) = self.model.start(&mut self.caches, prompt)?;
            (Some(sequence), logits)
        } else {
            (None, Vec::new())
        };
        self.live.push(Live { index, sequence, sampler, logits, tokens: Vec::new() });
        Ok(())
    }

    /// Takes the next token of each text. Texts that end here leave.
    fn sample(&mut self) -> Result<Vec<(usize, Continuation)>, GenerateError> {
        let (mut ended, mut staying) = (Vec::new(), Vec::new());
        for mut text in std::mem::take(&mut self.live) {
            match self.next(&mut text)? {
                None => staying.push(text),
                Some(ending) => {
                    text.sequence.into_iter().for_each(|s| self.caches.remove(s));
                    ended.push((text.index, Continuation { tokens: text.tokens, ending }));
                }
            }
        }
        self.live = staying;
        Ok(ended)
    }

    /// Takes the next token of a text, or says why there is none.
    fn next(&self, text: &mut Live) -> Result<Option<Ending>, GenerateError> {
        let Some(sequence) = text.sequence else { return Ok(Some(Ending::Context)) };
        if text.tokens.len() == self.params.max_new {
            return Ok(Some(Ending::Length));
        }
        let token = text.sampler.sample(&text.logits)?;
        if self.params.stop.contains(&token) {
            return Ok(Some(Ending::Stop));
        }
        text.tokens.push(token);
        if self.caches.len(sequence) + 1 > self.context {
            return Ok(Some(Ending::Context));
        }
        Ok((text.tokens.len() == self.params.max_new).then_some(Ending::Length))
    }

    /// Runs the last token of every text, and keeps the logits behind it.
    fn step(&mut self) -> Result<(), EngineError> {
        let part = |text: &'_ Live| Some((text.sequence?, text.tokens.last().copied()?));
        let last: Vec<(Sequence, u32)> = self.live.iter().filter_map(part).collect();
        if last.is_empty() {
            return Ok(());
        }
        let parts: Vec<(Sequence, &[u32])> =
            last.iter().map(|(s, token)| (*s, std::slice::from_ref(token))).collect();
        let logits = self.model.logits(&self.model.stream(&mut self.caches, &parts)?)?;
        let rows = logits.as_f32().unwrap_or(&[]).chunks_exact(logits.shape()[2].max(1));
        for (text, row) in self.live.iter_mut().zip(rows) {
            text.logits.clear();
            text.logits.extend_from_slice(row);
        }
        Ok(())
    }
}
