//! A `tokenizer.json` as the metadata of a GGUF file says it: the way back from [`super::tokenizer`].

use serde_json::Value;

use super::bpe;

/// What a file says of a tokenizer, under `tokenizer.ggml.`.
#[derive(Clone, Debug, PartialEq)]
pub struct Vocabulary {
    /// `model`.
    pub model: &'static str,
    /// `pre`: how text is cut up before merging.
    pub pre: &'static str,
    /// `add_space_prefix`.
    pub add_space_prefix: bool,
    /// `tokens`, one for each row of the embedding.
    pub tokens: Vec<String>,
    /// `token_type` of each.
    pub kinds: Vec<i32>,
    /// `merges`, in order of rank.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `unknown_token_id`.
    pub unk: Option<u32>,
    /// `padding_token_id`.
    pub pad: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: bool,
    /// `add_eos_token`.
    pub add_eos: bool,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

impl Vocabulary {
    /// Reads a `tokenizer.json`, with the `tokenizer_config.json` and the chat template that stand beside it. The embedding
    /// has `rows` rows; those without a token become padding.
    ///
    /// # Errors
    /// A sentence, if a GGUF file has no words for this tokenizer.
    pub fn read(
        tokenizer: &Value,
        config: Option<&Value>,
        template: Option<&str>,
        rows: usize,
    ) -> Result<Self, String> {
        let model = &tokenizer["model"];
        let kind = model["type"].as_str().unwrap_or("of no type");
        if kind != "BPE" || model["byte_fallback"].as_bool() == Some(true) {
            return Err(format!(
                "the tokenizer is {kind} without bytes as letters; byte-level BPE is written"
            ));
        }
        let (pre, add_space_prefix) = bpe::name_of(&tokenizer["pre_tokenizer"])
            .ok_or("its way of cutting text up has no name in llama.cpp that is known here")?;
        let mut v = Vocabulary {
            model: "gpt2",
            pre,
            add_space_prefix,
            tokens: (0..rows).map(|i| format!("[PAD{i}]")).collect(),
            kinds: vec![UNUSED; rows],
            merges: merges(model)?,
            bos: None,
            eos: None,
            unk: None,
            pad: None,
            add_bos: false,
            add_eos: false,
            chat_template: template.map(str::to_owned).or_else(|| config.and_then(chat_template)),
        };
        let vocab = model["vocab"].as_object().ok_or("`model.vocab` is no object")?;
        for (token, id) in vocab {
            v.put(id, token, NORMAL)?;
        }
        for token in tokenizer["added_tokens"].as_array().into_iter().flatten() {
            let text = token["content"].as_str().ok_or("an added token has no `content`")?;
            let special = token["special"].as_bool() == Some(true);
            v.put(&token["id"], text, if special { CONTROL } else { USER_DEFINED })?;
        }
        let named = |key: &str| {
            let token = &config?[key];
            let text = token.as_str().or_else(|| token["content"].as_str())?;
            v.tokens.iter().position(|t| t == text).map(|i| i as u32)
        };
        (v.bos, v.eos) = (named("bos_token"), named("eos_token"));
        (v.unk, v.pad) = (named("unk_token"), named("pad_token"));
        let (before, after) = around(&tokenizer["post_processor"]);
        for (wanted, have, what) in [(&before, v.bos, "start"), (&after, v.eos, "end")] {
            let ids: Vec<Option<u32>> =
                wanted.iter().map(|w| v.tokens.iter().position(|t| t == w).map(|i| i as u32)).collect();
            if !ids.is_empty() && ids != [have] {
                return Err(format!("texts get {wanted:?} at their {what}, which is not the {what} token"));
            }
        }
        (v.add_bos, v.add_eos) = (!before.is_empty(), !after.is_empty());
        Ok(v)
    }

    fn put(&mut self, id: &Value, token: &str, kind: i32) -> Result<(), String> {
        let at = id.as_u64().and_then(|i| usize::try_from(i).ok()).filter(|&i| i < self.tokens.len());
        let at = at.ok_or_else(|| {
            format!("token `{token}` has id {id}, the embedding {} rows", self.tokens.len())
        })?;
        self.tokens[at] = token.to_owned();
        self.kinds[at] = kind;
        Ok(())
    }
}

/// Merges as pairs with a space between them.
fn merges(model: &Value) -> Result<Vec<String>, String> {
    let list = model["merges"].as_array().ok_or("`model.merges` is no list")?;
    let line = |m: &Value| match m {
        Value::String(s) => Some(s.clone()),
        Value::Array(pair) => Some(format!("{} {}", pair.first()?.as_str()?, pair.get(1)?.as_str()?)),
        _ => None,
    };
    list.iter().map(|m| line(m).ok_or_else(|| format!("merge {m} is no pair"))).collect()
}

/// Texts of the tokens that stand before and behind every text.
fn around(post: &Value) -> (Vec<String>, Vec<String>) {
    let steps: Vec<&Value> = match post["type"].as_str() {
        Some("Sequence") => post["processors"].as_array().into_iter().flatten().collect(),
        _ => vec![post],
    };
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for step in steps.iter().filter(|s| s["type"] == "TemplateProcessing") {
        let mut behind = false;
        for piece in step["single"].as_array().into_iter().flatten() {
            match piece["SpecialToken"]["id"].as_str() {
                Some(token) if behind => after.push(token.to_owned()),
                Some(token) => before.push(token.to_owned()),
                None => behind = true,
            }
        }
    }
    (before, after)
}

/// The template of a `tokenizer_config.json`: a text, or the one that is called default.
fn chat_template(config: &Value) -> Option<String> {
    match &config["chat_template"] {
        Value::String(s) => Some(s.clone()),
        Value::Array(list) => {
            let default = list.iter().find(|t| t["name"] == "default")?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tokenizer(pre: Value) -> Value {
        json!({
            "pre_tokenizer": pre,
            "post_processor": {"type": "TemplateProcessing", "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]},
            "added_tokens": [{"id": 3, "content": "<s>", "special": true}, {"id": 4, "content": "<x>", "special": false}],
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        })
    }

    #[test]
    fn tokens_have_kinds_and_the_table_is_filled_up() {
        let pre = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
        let config = json!({"bos_token": {"content": "<s>"}, "chat_template": "{{ x }}"});
        let v = Vocabulary::read(&tokenizer(pre), Some(&config), None, 6).unwrap();
        assert_eq!((v.pre, v.add_space_prefix), ("gpt-2", false));
        assert_eq!(v.tokens, ["a", "b", "ab", "<s>", "<x>", "[PAD5]"]);
        assert_eq!(v.kinds, [NORMAL, NORMAL, NORMAL, CONTROL, USER_DEFINED, UNUSED]);
        assert_eq!((v.merges[0].as_str(), v.bos, v.add_bos, v.eos), ("a b", Some(3), true, None));
        assert_eq!(v.chat_template.as_deref(), Some("{{ x }}"));
    }

    #[test]
    fn what_has_no_name_is_refused() {
        let pre =
            json!({"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": false});
        let e = Vocabulary::read(&tokenizer(pre), None, None, 6).unwrap_err();
        assert!(e.contains("cutting text up"), "{e}");
        let pre = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
        let e = Vocabulary::read(&tokenizer(pre.clone()), None, None, 2).unwrap_err();
        assert!(e.contains("2 rows"), "{e}");
        // A start token that the configuration does not name.
        let e = Vocabulary::read(&tokenizer(pre), None, None, 6).unwrap_err();
        assert!(e.contains("not the start token"), "{e}");
    }
}
