//! Generation: prefill, then a token at a time.

use std::time::{Duration, Instant};

use qrmc_ir::EngineError;

use crate::caches::pages;
use crate::sample::{SampleError, SampleParams, Sampler};
use crate::session::Session;

/// How to generate.
#[derive(Clone, Debug)]
pub struct GenerateParams {
    /// Sampling.
    pub sample: SampleParams,
    /// Most new tokens.
    pub max_new: usize,
    /// Tokens that end the text.
    pub stop: Vec<u32>,
}

/// Why generation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// A stop token.
    Stop,
    /// The most new tokens.
    Length,
    /// The model's context is full.
    Context,
    /// The receiver of tokens said so.
    Cancelled,
}

/// What was generated, and how fast.
#[derive(Clone, Debug)]
pub struct Generated {
    /// New tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub ending: Ending,
    /// Time for the prompt.
    pub prefill: Duration,
    /// Time for the new tokens.
    pub decode: Duration,
}

/// Why nothing was generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The prompt is empty or fills the context.
    #[error("{0}")]
    Prompt(String),
    /// The model did not run.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Sampling failed.
    #[error(transparent)]
    Sample(#[from] SampleError),
}

/// Generates from a prompt of token ids. `on_token` gets each new token and says whether to go on.
///
/// # Errors
/// See [`GenerateError`].
pub fn generate(
    model: &Session,
    prompt: &[u32],
    params: &GenerateParams,
    on_token: &mut dyn FnMut(u32) -> bool,
) -> Result<Generated, GenerateError> {
    let context = model.facts().context as usize;
    if prompt.is_empty() {
        return Err(GenerateError::Prompt("the prompt has no tokens".into()));
    }
    if prompt.len() >= context {
        let m = format!(
            "the prompt has {} tokens and the model's context {context}; shorten the prompt",
            prompt.len()
        );
        return Err(GenerateError::Prompt(m));
    }
    let room = context.min(prompt.len().saturating_add(params.max_new));
    let mut sampler = Sampler::new(params.sample)?;
    let mut caches = model.caches(pages(room));
    let start = Instant::now();
    let (sequence, mut logits) = model.start(&mut caches, prompt)?;
    let prefill = start.elapsed();
    let start = Instant::now();
    let mut tokens = Vec::new();
    let ending = loop {
        if tokens.len() == params.max_new {
            break Ending::Length;
        }
        let token = sampler.sample(&logits)?;
        if params.stop.contains(&token) {
            break Ending::Stop;
        }
        tokens.push(token);
        if !on_token(token) {
            break Ending::Cancelled;
        }
        if caches.len(sequence) + 1 > context {
            break Ending::Context;
        }
        if tokens.len() < params.max_new {
            logits = model.prefill(&mut caches, sequence, &[token])?;
        }
    };
    Ok(Generated { tokens, ending, prefill, decode: start.elapsed() })
}
