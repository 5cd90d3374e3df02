//! The tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::config::Model;
use super::reader::GgufFile;
use super::{bpe, spm};
use crate::ImportError;

/// Token ids with a meaning of their own.
#[derive(Clone, Debug, Default)]
pub(super) struct Special {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unk: Option<u32>,
    pub(super) pad: Option<u32>,
    /// Further ids that end a turn or a message.
    stops: Vec<u32>,
}

impl Special {
    /// Reads the ids; where the metadata is silent, SentencePiece models have 0, 1, 2 for unknown, start, end.
    ///
    /// # Errors
    /// If an id is no integer or not below the number of tokens.
    pub(super) fn read(file: &GgufFile) -> Result<Self, ImportError> {
        let count = file.strings("tokenizer.ggml.tokens")?.map(|t| t.len() as u64);
        let id = |key: &str, default: Option<u32>| -> Result<Option<u32>, ImportError> {
            let key = format!("tokenizer.ggml.{key}");
            let Some(id) = file.uint(&key)? else {
                return Ok(default.filter(|&d| count.is_some_and(|n| u64::from(d) < n)));
            };
            match u32::try_from(id) {
                // llama.cpp writes -1 as u32 where there is no such token.
                Ok(u32::MAX) => Ok(None),
                Ok(small) if count.is_none_or(|n| id < n) => Ok(Some(small)),
                _ => Err(file.fail(format!("`{key}` is {id}, but there are {} tokens", count.unwrap_or(0)))),
            }
        };
        let piece = file.str("tokenizer.ggml.model")? == Some("llama");
        let default = |n: u32| piece.then_some(n);
        let mut special = Special {
            bos: id("bos_token_id", default(1))?,
            eos: id("eos_token_id", default(2))?,
            unk: id("unknown_token_id", default(0))?,
            pad: id("padding_token_id", None)?,
            stops: Vec::new(),
        };
        for key in ["eot_token_id", "eom_token_id"] {
            special.stops.extend(id(key, None)?.filter(|id| special.eos != Some(*id)));
        }
        special.stops.dedup();
        Ok(special)
    }
}

/// The `generation_config.json`: every id that ends a generation.
pub(super) fn generation_config(special: &Special) -> Value {
    let mut config = Map::new();
    config.insert("_from_model_config".into(), json!(true));
    let mut put = |key: &str, id: Option<Value>| id.and_then(|id| config.insert(key.into(), id));
    put("bos_token_id", special.bos.map(Value::from));
    let ends: Vec<u32> = special.eos.into_iter().chain(special.stops.iter().copied()).collect();
    put(
        "eos_token_id",
        match ends.as_slice() {
            [] => None,
            [one] => Some(json!(one)),
            many => Some(json!(many)),
        },
    );
    put("pad_token_id", special.pad.map(Value::from));
    Value::Object(config)
}

/// What a token is for: `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// The list of tokens.
pub(super) struct Vocab<'a> {
    pub(super) tokens: Vec<&'a str>,
    pub(super) kinds: Vec<Kind>,
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocab<'a> {
    fn read(file: &'a GgufFile, model: &Model, special: &Special) -> Result<Self, ImportError> {
        let tokens = file
            .strings("tokenizer.ggml.tokens")?
            .ok_or_else(|| file.fail("`tokenizer.ggml.tokens` is missing although there is a tokenizer"))?;
        if tokens.len() > model.vocab {
            let what =
                format!("{} tokens, but `token_embd.weight` has only {} rows", tokens.len(), model.vocab);
            return Err(file.fail(what));
        }
        let kinds = match file.ints("tokenizer.ggml.token_type")? {
            Some(types) if types.len() == tokens.len() => types
                .iter()
                .enumerate()
                .map(|(i, t)| match t {
                    0 | 1 => Ok(Kind::Normal),
                    2 => Ok(Kind::Unknown),
                    3 => Ok(Kind::Control),
                    4 => Ok(Kind::UserDefined),
                    5 => Ok(Kind::Unused),
                    6 => Ok(Kind::Byte),
                    _ => Err(file.fail(format!("token {i} has type {t}; 0 to 6 are known"))),
                })
                .collect::<Result<Vec<_>, _>>()?,
            Some(types) => {
                let what =
                    format!("{} tokens but {} of `tokenizer.ggml.token_type`", tokens.len(), types.len());
                return Err(file.fail(what));
            }
            None => {
                let mut kinds = vec![Kind::Normal; tokens.len()];
                for id in [special.bos, special.eos, special.unk, special.pad].into_iter().flatten() {
                    kinds[id as usize] = Kind::Control;
                }
                kinds
            }
        };
        let mut vocab = Vocab { ids: HashMap::with_capacity(tokens.len()), tokens, kinds };
        for i in 0..vocab.tokens.len() {
            let token = vocab.tokens[i];
            if !vocab.is_real(i) {
                continue;
            }
            if let Some(first) = vocab.ids.insert(token, i as u32) {
                return Err(file.fail(format!("tokens {first} and {i} are both `{}`", shown(token))));
            }
        }
        Ok(vocab)
    }

    /// Whether a token is text rather than padding of the table up to the rows of the embedding.
    fn is_real(&self, i: usize) -> bool {
        !self.tokens[i].is_empty() && (self.kinds[i] != Kind::Unused || self.tokens[i] != format!("[PAD{i}]"))
    }

    /// The id of a piece of text.
    pub(super) fn id(&self, piece: &str) -> Option<u32> {
        self.ids.get(piece).copied()
    }

    /// The text of an id.
    pub(super) fn text(&self, id: Option<u32>) -> Option<&'a str> {
        self.tokens.get(id? as usize).copied()
    }

    /// The `vocab` of a BPE model.
    pub(super) fn json(&self) -> Value {
        let real = (0..self.tokens.len()).filter(|&i| self.is_real(i));
        Value::Object(real.map(|i| (self.tokens[i].to_owned(), json!(i))).collect())
    }

    /// Ids that are cut out of the text before it is tokenised, and whether they are special.
    fn added(&self) -> impl Iterator<Item = (usize, bool)> {
        (0..self.tokens.len()).filter(|&i| self.is_real(i)).filter_map(|i| match self.kinds[i] {
            Kind::Control | Kind::Unknown => Some((i, true)),
            Kind::UserDefined => Some((i, false)),
            _ => None,
        })
    }
}

/// The parts of `tokenizer.json` in which kinds of tokenizers differ.
pub(super) struct Parts {
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) decoder: Value,
    pub(super) model: Value,
    /// Whether a start token goes in front where the metadata does not say.
    pub(super) add_bos: bool,
    /// What follows where neither start nor end tokens are added.
    pub(super) post_processor: Value,
}

/// `tokenizer.json` and `tokenizer_config.json`; `None` if the file has no tokenizer.
///
/// # Errors
/// If the tokenizer is of a kind that is not rebuilt, or its lists contradict each other.
pub(super) fn tokenizer_files(
    file: &GgufFile,
    model: &Model,
    special: &Special,
) -> Result<Option<(Value, Value)>, ImportError> {
    let build = match file.str("tokenizer.ggml.model")? {
        None | Some("none" | "no_vocab") => return Ok(None),
        Some("gpt2") => bpe::parts,
        Some("llama") => spm::parts,
        Some(other) => {
            let what = format!(
                "`tokenizer.ggml.model` is `{other}`; supported are gpt2 (byte-level BPE), llama (SentencePiece BPE)"
            );
            return Err(file.fail(what).hint("import the original Hugging Face folder"));
        }
    };
    let vocab = Vocab::read(file, model, special)?;
    let parts = build(file, &vocab, special)?;
    let add_bos = file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(parts.add_bos);
    let add_eos = file.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let needed = |wanted: bool, id: Option<u32>, key: &str| match (wanted, id) {
        (false, _) => Ok(None),
        (true, Some(id)) => Ok(Some(id)),
        (true, None) => {
            Err(file
                .fail(format!("a token is to be added to every text, but `tokenizer.ggml.{key}` is missing")))
        }
    };
    let before = needed(add_bos, special.bos, "bos_token_id")?;
    let after = needed(add_eos, special.eos, "eos_token_id")?;
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocab.added().map(|(i, special)| {
            let mut token = json!({"id": i});
            extend(&mut token, added_token(vocab.tokens[i], special));
            token
        }).collect::<Vec<_>>(),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": match (before, after) {
            (None, None) => parts.post_processor,
            _ => template(&vocab, before, after),
        },
        "decoder": parts.decoder,
        "model": parts.model,
    });
    let settings = settings(file, model, special, &vocab, add_bos, add_eos)?;
    Ok(Some((tokenizer, settings)))
}

fn extend(to: &mut Value, from: Value) {
    if let (Value::Object(to), Value::Object(from)) = (to, from) {
        to.extend(from);
    }
}

fn added_token(content: &str, special: bool) -> Value {
    json!({
        "content": content,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": special,
    })
}

/// A post-processor that puts a start token before and an end token behind every text.
fn template(vocab: &Vocab<'_>, before: Option<u32>, after: Option<u32>) -> Value {
    let name = |id: u32| vocab.text(Some(id)).unwrap_or_default();
    let around = |text: &str, type_id: u32| -> Vec<Value> {
        let token = |id: u32| json!({"SpecialToken": {"id": name(id), "type_id": type_id}});
        let sequence = json!({"Sequence": {"id": text, "type_id": type_id}});
        before.map(token).into_iter().chain([sequence]).chain(after.map(token)).collect()
    };
    let tokens: Map<String, Value> = before
        .into_iter()
        .chain(after)
        .map(|id| (name(id).to_owned(), json!({"id": name(id), "ids": [id], "tokens": [name(id)]})))
        .collect();
    let pair = [around("A", 0), around("B", 1)].concat();
    json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": pair,
        "special_tokens": tokens,
    })
}

/// `tokenizer_config.json`.
fn settings(
    file: &GgufFile,
    model: &Model,
    special: &Special,
    vocab: &Vocab<'_>,
    add_bos: bool,
    add_eos: bool,
) -> Result<Value, ImportError> {
    let decoder: Map<String, Value> =
        vocab.added().map(|(i, special)| (i.to_string(), added_token(vocab.tokens[i], special))).collect();
    let mut config = json!({
        "added_tokens_decoder": decoder,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "bos_token": vocab.text(special.bos),
        "eos_token": vocab.text(special.eos),
        "unk_token": vocab.text(special.unk),
        "pad_token": vocab.text(special.pad),
        "clean_up_tokenization_spaces": false,
        "model_max_length": model.context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    if let Some(chat) = file.str("tokenizer.chat_template")? {
        extend(&mut config, json!({"chat_template": chat}));
    }
    Ok(config)
}

/// A sentence for errors: the first characters of a token.
pub(super) fn shown(token: &str) -> Cow<'_, str> {
    match token.char_indices().nth(40) {
        Some((at, _)) => Cow::Owned(format!("{}…", &token[..at])),
        None => Cow::Borrowed(token),
    }
}

#[cfg(test)]
mod tests;
