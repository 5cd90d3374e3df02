//! Generation from many prompts, a few at a time.

use qrmc_ir::{EngineError, Tensor};

use crate::cpu::gemm::FUSED_ROWS;
use crate::generate::{Ending, GenerateError, GenerateParams};
use crate::sample::Sampler;
use crate::session::{Caches, Session};

/// Prompts of one length that are continued side by side. Linear layers compute up to this many rows exactly as they
/// compute one, so a text does not depend on what else is in its batch; larger batches would change last bits.
pub const BATCH: usize = FUSED_ROWS;

/// Positions that caches get room for beyond the prompt at first; the room doubles when it is full.
const ROOM: usize = 128;

/// What one prompt was continued with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Continuation {
    /// New tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// Why it ended; [`Ending::Context`] without tokens if the prompt alone fills the context.
    pub ending: Ending,
}

/// Continues each prompt as [`crate::generate::generate`] does, with a sampler of its own. Prompts of equal length run
/// together. `on_done` is told the index of each prompt that is finished, with its continuation.
///
/// # Errors
/// If a prompt is empty, or what the engine and the sampler say.
pub fn generate_many(
    model: &Session,
    prompts: &[Vec<u32>],
    params: &GenerateParams,
    on_done: &mut dyn FnMut(usize, &Continuation),
) -> Result<Vec<Continuation>, GenerateError> {
    if let Some(i) = prompts.iter().position(Vec::is_empty) {
        return Err(GenerateError::Prompt(format!("prompt {} has no tokens", i + 1)));
    }
    let context = model.facts().context as usize;
    let mut out = vec![Continuation { tokens: Vec::new(), ending: Ending::Context }; prompts.len()];
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&i| (prompts[i].len(), i));
    for group in order.chunk_by(|&a, &b| prompts[a].len() == prompts[b].len()) {
        for batch in group.chunks(BATCH) {
            if prompts[batch[0]].len() < context {
                together(model, prompts, batch, params, &mut out)?;
            }
            for &i in batch {
                on_done(i, &out[i]);
            }
        }
    }
    Ok(out)
}

/// A prompt that is being continued.
struct Live {
    index: usize,
    sampler: Sampler,
    logits: Vec<f32>,
}

/// Continues prompts of one length, which is below the context.
fn together(
    model: &Session,
    prompts: &[Vec<u32>],
    batch: &[usize],
    params: &GenerateParams,
    out: &mut [Continuation],
) -> Result<(), GenerateError> {
    let context = model.facts().context as usize;
    let len = prompts[batch[0]].len();
    let most = context.min(len.saturating_add(params.max_new));
    let (mut live, mut parts) = (Vec::new(), Vec::new());
    for &index in batch {
        let mut cache = model.caches(1, len);
        let logits = model.prefill(&prompts[index], &mut cache)?;
        live.push(Live { index, sampler: Sampler::new(params.sample)?, logits });
        parts.push(cache);
    }
    let mut room = most.min(len + ROOM);
    let mut caches = Caches::join(&parts, room)?;
    drop(parts);
    for made in 0..=params.max_new {
        let mut goes_on = Vec::new();
        for row in &mut live {
            let answer = &mut out[row.index];
            let token = if made == params.max_new { None } else { Some(row.sampler.sample(&row.logits)?) };
            let ending = match token {
                None => Some(Ending::Length),
                Some(t) if params.stop.contains(&t) => Some(Ending::Stop),
                Some(t) => {
                    answer.tokens.push(t);
                    (caches.len() + 1 > context).then_some(Ending::Context)
                }
            };
            answer.ending = ending.unwrap_or(Ending::Length);
            goes_on.push(ending.is_none());
        }
        if goes_on.contains(&false) {
            caches.retain(|row| goes_on[row]);
            let mut row = 0..;
            live.retain(|_| row.next().is_some_and(|r: usize| goes_on[r]));
        }
        if live.is_empty() || made + 1 == params.max_new {
            break;
        }
        if caches.len() == room {
            room = most.min(room.saturating_mul(2));
            caches = Caches::join(&[caches], room)?;
        }
        step(model, &mut live, out, &mut caches)?;
    }
    Ok(())
}

/// Runs the last token of every row, and keeps the logits behind it.
fn step(
    model: &Session,
    live: &mut [Live],
    out: &[Continuation],
    caches: &mut Caches,
) -> Result<(), EngineError> {
    let last = |row: &Live| out[row.index].tokens.last().map_or(0, |&t| t as i32);
    let ids = Tensor::i32([live.len(), 1], live.iter().map(last).collect());
    let logits = model.logits(&model.stream(&ids, caches)?)?;
    let vocab = logits.shape()[2];
    for (row, new) in live.iter_mut().zip(logits.as_f32().unwrap_or(&[]).chunks_exact(vocab.max(1))) {
        row.logits.clear();
        row.logits.extend_from_slice(new);
    }
    Ok(())
}
