//! Perplexity, and how far two models are apart on a text.

use qrmc_ir::{EngineError, Tensor};

use crate::caches::pages;
use crate::cpu::reduce::{argmax, log_softmax_stats};
use crate::engine::CpuEngine;
use crate::session::{Session, row_parts};
use crate::text::windows::EvalWindow;

/// Measures on a text.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct TextScore {
    /// Windows.
    pub windows: usize,
    /// Predicted tokens.
    pub tokens: usize,
    /// Sum of their negative log-probabilities, in nats.
    pub nll: f64,
    /// Sum of the divergences `KL(reference || model)` in nats, if there is a reference.
    pub kl: Option<f64>,
    /// Predictions whose likeliest token is the reference's, if there is one.
    pub agree: Option<usize>,
}

impl TextScore {
    /// `exp(nll / tokens)`
    pub fn perplexity(&self) -> f64 {
        (self.nll / self.tokens.max(1) as f64).exp()
    }

    /// Mean divergence in nats a token.
    pub fn mean_kl(&self) -> Option<f64> {
        self.kl.map(|k| k / self.tokens.max(1) as f64)
    }

    /// Share of equal likeliest tokens.
    pub fn agreement(&self) -> Option<f64> {
        self.agree.map(|a| a as f64 / self.tokens.max(1) as f64)
    }

    fn add(&mut self, row: &Row) {
        self.tokens += 1;
        self.nll += row.nll;
        if let Some((kl, same)) = row.reference {
            *self.kl.get_or_insert(0.0) += kl;
            *self.agree.get_or_insert(0) += usize::from(same);
        }
    }
}

struct Row {
    nll: f64,
    reference: Option<(f64, bool)>,
}

/// Scores a model on windows of a text; `reference` is another model on the same tokens. `progress` is told the score
/// so far after each window and says whether to go on.
///
/// # Errors
/// What the engine says; also if a logit is not finite.
pub fn score_text(
    engine: &CpuEngine,
    model: &Session,
    reference: Option<&Session>,
    tokens: &[u32],
    windows: &[EvalWindow],
    progress: &mut dyn FnMut(&TextScore) -> bool,
) -> Result<TextScore, EngineError> {
    let mut score = TextScore::default();
    for w in windows {
        let window = &tokens[w.range.clone()];
        let stream = whole(model, window)?;
        let other = reference.map(|r| whole(r, window)).transpose()?;
        let mut others = other.iter().flat_map(row_parts);
        let mut at = 0;
        for part in row_parts(&stream) {
            let logits = model.logits(&part)?;
            let refs = match (reference, others.next()) {
                (Some(r), Some(p)) => Some(r.logits(&p)?),
                _ => None,
            };
            let rows = part.shape()[1];
            for row in score_rows(engine, &logits, refs.as_ref(), |i| {
                // Row `p` predicts token `p + 1` of the window, if that is there and counts.
                let next = at + i + 1;
                (next < window.len() && next >= w.first_scored).then(|| window[next])
            })
            .iter()
            .flatten()
            {
                if !row.nll.is_finite() {
                    return Err(EngineError::System(format!(
                        "a log-probability is {} in the window from token {}: the model overflows on this text",
                        row.nll, w.range.start
                    )));
                }
                score.add(row);
            }
            at += rows;
        }
        score.windows += 1;
        if !progress(&score) {
            break;
        }
    }
    Ok(score)
}

/// The residual stream of a window on its own.
fn whole(model: &Session, window: &[u32]) -> Result<Tensor, EngineError> {
    let mut caches = model.caches(pages(window.len()));
    let sequence = caches.add();
    model.stream(&mut caches, &[(sequence, window)])
}

fn score_rows(
    engine: &CpuEngine,
    logits: &Tensor,
    reference: Option<&Tensor>,
    target: impl Fn(usize) -> Option<u32> + Sync,
) -> Vec<Option<Row>> {
    let (rows, n) = (logits.shape()[1], logits.shape()[2]);
    let data = logits.as_f32().unwrap_or(&[]);
    let refs = reference.and_then(|r| r.as_f32());
    engine.with_machine(|pool, isa| {
        pool.map(rows, |i| {
            let target = target(i)? as usize;
            let row = &data[i * n..(i + 1) * n];
            let (_, lse) = log_softmax_stats(isa, row);
            let nll = lse - f64::from(*row.get(target)?);
            let reference = refs.map(|r| {
                let r = &r[i * n..(i + 1) * n];
                let (_, ref_lse) = log_softmax_stats(isa, r);
                let kl = r.iter().zip(row).map(|(&a, &b)| {
                    let log_p = f64::from(a) - ref_lse;
                    log_p.exp() * (log_p - (f64::from(b) - lse))
                });
                (kl.sum::<f64>().max(0.0), argmax(isa, r) == argmax(isa, row))
            });
            Some(Row { nll, reference })
        })
    })
}
