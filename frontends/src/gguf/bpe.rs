//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`).

use serde_json::{Value, json};

use super::reader::GgufFile;
use super::tokenizer::{Parts, Special, Vocab, shown};
use crate::ImportError;

/// Contractions, words, numbers, runs of other signs, spaces: what GPT-2 cuts text into.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
/// Llama 3: numbers in groups of up to three digits.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2, 2.5 and 3: as Llama 3, but digit by digit.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// DeepSeek LLM: the letters that its first rule takes as words, a fixed list of cased letters.
const DEEPSEEK_LETTERS: &str = "A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\u{2af}\
     \u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\
     \u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\
     \u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\
     \u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\
     \u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\
     \u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\
     \u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\
     \u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}\
     \u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\
     \u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\
     \u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\
     \u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\
     \u{1e900}-\u{1e943}";
/// DeepSeek LLM: ASCII and CJK punctuation.
const DEEPSEEK_SIGNS: &str = "!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}";
/// DeepSeek LLM: scripts without spaces.
const DEEPSEEK_CJK: &str = "\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}";

/// Names of `tokenizer.ggml.pre` that are understood.
const PRE: [&str; 9] = [
    "smollm",
    "qwen2",
    "llama-bpe",
    "llama3",
    "llama-v3",
    "deepseek-r1-qwen",
    "deepseek-llm",
    "gpt-2",
    "default",
];

fn split(regex: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
}

fn byte_level(add_prefix_space: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": false,
        "use_regex": use_regex,
    })
}

fn digits() -> Value {
    json!({"type": "Digits", "individual_digits": true})
}

fn sequence(steps: impl IntoIterator<Item = Value>) -> Value {
    json!({"type": "Sequence", "pretokenizers": steps.into_iter().collect::<Vec<_>>()})
}

/// How text is cut up before merging, for a name of [`PRE`].
fn pre_tokenizer(pre: &str, prefix: bool) -> Value {
    let last = byte_level(false, false);
    match pre {
        "smollm" => sequence([digits(), byte_level(prefix, true)]),
        "gpt-2" => byte_level(prefix, true),
        "qwen2" | "deepseek-r1-qwen" => sequence([split(QWEN2), last]),
        "deepseek-llm" => sequence([
            split(r"[\r\n]"),
            split(&format!(r"\s?[{DEEPSEEK_LETTERS}]+")),
            split(&format!(r"\s?[{DEEPSEEK_SIGNS}]+")),
            split(r"\s+$"),
            split(&format!("[{DEEPSEEK_CJK}]+")),
            digits(),
            last,
        ]),
        "default" => sequence([
            split(r"[\p{P}\$\+<=>\^~\|]+"),
            split(GPT2),
            split(r"\p{N}+"),
            split("[0-9][0-9][0-9]"),
            last,
        ]),
        _ => sequence([split(LLAMA3), last]),
    }
}

/// The name under which llama.cpp cuts text up as a `pre_tokenizer` of `tokenizer.json` does, and whether it puts a space
/// in front.
pub(super) fn name_of(steps: &Value) -> Option<(&'static str, bool)> {
    let wanted = outline(steps);
    let candidates = PRE.iter().flat_map(|&name| [(name, false), (name, true)]);
    candidates.into_iter().find(|&(name, prefix)| outline(&pre_tokenizer(name, prefix)) == wanted)
}

/// The steps of a pre-tokenizer without what does not change where text is cut.
fn outline(steps: &Value) -> Vec<String> {
    match steps["type"].as_str() {
        Some("Sequence") => {
            steps["pretokenizers"].as_array().into_iter().flatten().flat_map(outline).collect()
        }
        Some("ByteLevel") => {
            let flag = |key: &str| steps[key].as_bool().unwrap_or(true);
            vec![format!("bytes {} {}", flag("add_prefix_space"), flag("use_regex"))]
        }
        Some("Digits") => vec![format!("digits {}", steps["individual_digits"])],
        _ => vec![steps.to_string()],
    }
}

/// The parts of a byte-level BPE tokenizer.
///
/// # Errors
/// If the way of cutting text up is missing or unknown, or merges do not fit the tokens.
pub(super) fn parts(file: &GgufFile, vocab: &Vocab<'_>, special: &Special) -> Result<Parts, ImportError> {
    let pre = match (file.str("tokenizer.ggml.pre")?, file.str("general.architecture")?) {
        (Some(pre), _) if PRE.contains(&pre) => pre,
        (Some(pre), _) => {
            let what = format!("`tokenizer.ggml.pre` is `{pre}`; supported are {}", PRE.join(", "));
            return Err(file.fail(what).hint("import the original Hugging Face folder"));
        }
        // All models of these architectures cut text in one way.
        (None, Some("qwen2" | "qwen3")) => "qwen2",
        (None, _) => {
            let what = "`tokenizer.ggml.pre` is missing, so how text is cut up cannot be known";
            return Err(file.fail(what).hint(
                "convert the model again with a current llama.cpp, or import its Hugging Face folder",
            ));
        }
    };
    let prefix = file.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(false);
    if prefix && !matches!(pre, "smollm" | "gpt-2") {
        return Err(file.fail(format!(
            "`tokenizer.ggml.add_space_prefix` is true, which `{pre}` tokenizers do not have"
        )));
    }
    let llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
    let qwen = matches!(pre, "qwen2" | "deepseek-r1-qwen");
    let model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": vocab.text(special.unk),
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": false,
        "byte_fallback": false,
        "ignore_merges": llama3,
        "vocab": vocab.json(),
        "merges": merges(file, vocab)?,
    });
    Ok(Parts {
        normalizer: if qwen { json!({"type": "NFC"}) } else { Value::Null },
        pre_tokenizer: pre_tokenizer(pre, prefix),
        decoder: byte_level(false, false),
        model,
        add_bos: llama3,
        post_processor: byte_level(false, false),
    })
}

/// The merges as pairs, in order of rank.
fn merges(file: &GgufFile, vocab: &Vocab<'_>) -> Result<Vec<Value>, ImportError> {
    let lines = file
        .strings("tokenizer.ggml.merges")?
        .ok_or_else(|| file.fail("`tokenizer.ggml.merges` is missing from a byte-level BPE tokenizer"))?;
    let mut joined = String::new();
    let mut pairs = Vec::with_capacity(lines.len());
    for (i, line) in lines.iter().enumerate() {
        // A piece is never empty, but may itself start with a space.
        let cut = line.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
        let (left, right) = match cut {
            Some(at) if at + 1 < line.len() => (&line[..at], &line[at + 1..]),
            _ => {
                return Err(
                    file.fail(format!("merge {i} is `{}`; two pieces and a space are wanted", shown(line)))
                );
            }
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        for piece in [left, right, &joined] {
            if vocab.id(piece).is_none() {
                let (line, piece) = (shown(line), shown(piece));
                return Err(
                    file.fail(format!("merge {i} is `{line}`, but `{piece}` is not among the tokens"))
                );
            }
        }
        pairs.push(json!([left, right]));
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests;
