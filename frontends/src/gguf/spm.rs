//! SentencePiece BPE (`tokenizer.ggml.model` = `llama`): pieces have scores, and merges follow from them.

use std::cmp::Ordering;

use serde_json::{Value, json};

use super::reader::GgufFile;
use super::tokenizer::{Kind, Parts, Special, Vocab};
use crate::ImportError;

/// Longest piece, in bytes, whose merges are worked out; the work grows with the square of it.
const MAX_PIECE: usize = 4096;

/// The parts of a SentencePiece BPE tokenizer with byte fallback.
///
/// # Errors
/// If there are no scores or not one for each token.
pub(super) fn parts(file: &GgufFile, vocab: &Vocab<'_>, special: &Special) -> Result<Parts, ImportError> {
    let scores = file
        .floats("tokenizer.ggml.scores")?
        .ok_or_else(|| file.fail("`tokenizer.ggml.scores` is missing from a SentencePiece tokenizer"))?;
    if scores.len() != vocab.tokens.len() {
        let what = format!("{} tokens but {} of `tokenizer.ggml.scores`", vocab.tokens.len(), scores.len());
        return Err(file.fail(what));
    }
    let prefix = file.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": vocab.text(special.unk),
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": true,
        "byte_fallback": true,
        "ignore_merges": false,
        "vocab": vocab.json(),
        "merges": merges(file, vocab, &scores)?,
    });
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model,
        add_bos: true,
        post_processor: Value::Null,
    })
}

/// One way to make a piece out of two.
struct Merge<'a> {
    left: &'a str,
    right: &'a str,
    score: f32,
    /// Characters of the two halves.
    len: (usize, usize),
}

/// All pairs of pieces that make a piece: best score of the result first, then the longer left half, then the
/// longer right half. This is the order of transformers' conversion.
fn merges(file: &GgufFile, vocab: &Vocab<'_>, scores: &[f32]) -> Result<Vec<Value>, ImportError> {
    // Text never turns into the others: they are added, or reached through single bytes.
    let mergeable = |i: usize| matches!(vocab.kinds[i], Kind::Normal | Kind::UserDefined | Kind::Unused);
    let piece = |text: &str| vocab.id(text).filter(|&id| mergeable(id as usize));
    let mut all: Vec<Merge<'_>> = Vec::new();
    for (i, &token) in vocab.tokens.iter().enumerate().filter(|&(i, _)| mergeable(i)) {
        if token.len() > MAX_PIECE {
            return Err(
                file.fail(format!("token {i} is {} bytes long; up to {MAX_PIECE} are allowed", token.len()))
            );
        }
        if scores[i].is_nan() {
            return Err(file.fail(format!("the score of token {i} is not a number")));
        }
        let chars = token.chars().count();
        let mut ways: Vec<((u32, u32), Merge<'_>)> = token
            .char_indices()
            .enumerate()
            .skip(1)
            .filter_map(|(n, (at, _))| {
                let (left, right) = token.split_at(at);
                let ids = (piece(left)?, piece(right)?);
                Some((ids, Merge { left, right, score: scores[i], len: (n, chars - n) }))
            })
            .collect();
        ways.sort_by_key(|(ids, _)| *ids);
        all.extend(ways.into_iter().map(|(_, merge)| merge));
    }
    // Stable, so that equals stay in the order of their results' ids.
    all.sort_by(|a, b| {
        b.score.partial_cmp(&a.score).unwrap_or(Ordering::Equal).then_with(|| b.len.cmp(&a.len))
    });
    Ok(all.iter().map(|m| json!([m.left, m.right])).collect())
}

#[cfg(test)]
mod tests;
