//! Cutting a long text into pieces that tokenise to the ids of the whole.
//!
//! A cut is made before a space that stands between two ASCII letters. That is exact for the pre-tokenizers listed
//! here: none of their alternatives goes on from a letter into a space, or looks back, and looking ahead matters only
//! inside a run of spaces, so a new match begins at the space in any case. Neither NFC nor a merge reaches across it.
//! Added tokens are matched before all that, hence the conditions on them. Every other tokenizer gets the text whole.

use serde_json::{Map, Value};

/// The split patterns of Qwen2, 2.5 and 3, and of Llama 3, around their one difference.
const BEFORE_NUMBERS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
const AFTER_NUMBERS: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const NUMBERS: [&str; 2] = [r"\p{N}", r"\p{N}{1,3}"];

/// Whether texts may be cut for the tokenizer that this `tokenizer.json` describes.
pub(super) fn may_cut(json: &Map<String, Value>) -> bool {
    let absent_or = |key: &str, name: &str| match json.get(key) {
        None | Some(Value::Null) => true,
        Some(value) => value["type"] == name,
    };
    let model = &json["model"];
    absent_or("normalizer", "NFC")
        && (model["type"] == "BPE" && model["continuing_subword_prefix"].as_str().unwrap_or("").is_empty())
        && model["end_of_word_suffix"].as_str().unwrap_or("").is_empty()
        && json.get("pre_tokenizer").is_some_and(splits_before_spaces)
}

/// Whether an added token cannot match across a cut, nor look past one.
pub(super) fn allows_cuts(token: &tokenizers::AddedToken) -> bool {
    !token.lstrip && !token.rstrip && !token.single_word && !token.content.contains(' ')
}

fn splits_before_spaces(pre: &Value) -> bool {
    let byte_level = |p: &Value, regex: bool| {
        p["type"] == "ByteLevel"
            && p["add_prefix_space"] == false
            && p["use_regex"].as_bool().unwrap_or(true) == regex
    };
    let digits = |p: &Value| p["type"] == "Digits";
    let known_split = |p: &Value| {
        let pattern = p["pattern"]["Regex"].as_str().unwrap_or("");
        let numbers = pattern.strip_prefix(BEFORE_NUMBERS).and_then(|rest| rest.strip_suffix(AFTER_NUMBERS));
        p["type"] == "Split"
            && p["behavior"] == "Isolated"
            && p["invert"] == false
            && numbers.is_some_and(|n| NUMBERS.contains(&n))
    };
    match pre["pretokenizers"].as_array().map(Vec::as_slice) {
        None => byte_level(pre, true),
        Some([only]) => byte_level(only, true),
        Some([first, second]) => {
            (digits(first) && byte_level(second, true)) || (known_split(first) && byte_level(second, false))
        }
        Some(_) => false,
    }
}

/// Cuts a text into pieces of at least `size` bytes, but for the last one.
pub(super) fn cut(text: &str, size: usize) -> Vec<&str> {
    let bytes = text.as_bytes();
    let mut pieces = Vec::with_capacity(bytes.len() / size.max(1) + 1);
    let mut start = 0usize;
    while let Some(from) = start.checked_add(size.max(1)).filter(|&from| from < bytes.len()) {
        let is_cut = |w: &[u8]| w[0].is_ascii_alphabetic() && w[1] == b' ' && w[2].is_ascii_alphabetic();
        let Some(at) = bytes[from - 1..].windows(3).position(is_cut) else { break };
        pieces.push(&text[start..from + at]);
        start = from + at;
    }
    pieces.push(&text[start..]);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::{gpt2_like, load, tiny};
    use proptest::prelude::*;

    #[test]
    fn cuts_fall_before_spaces_between_letters() {
        assert_eq!(cut("ab cd  ef 1 gh ij", 1), ["ab", " cd  ef 1 gh", " ij"]);
        assert_eq!(cut("ab cd ef gh", 4), ["ab cd", " ef gh"]);
        assert_eq!(cut("é b c", 1), ["é b", " c"]);
        assert_eq!(cut("", 1), [""]);
        assert_eq!(cut("a b", usize::MAX), ["a b"]);
    }

    #[test]
    fn only_known_tokenizers_are_cut() {
        let json = |pre: Value| {
            let mut map = Map::new();
            map.insert("model".into(), serde_json::json!({"type": "BPE"}));
            map.insert("pre_tokenizer".into(), pre);
            may_cut(&map)
        };
        let bytes = |regex: bool| serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": regex});
        let split = |pattern: &str| {
            serde_json::json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}, bytes(false)]})
        };
        assert!(json(bytes(true)) && !json(bytes(false)) && !json(Value::Null));
        assert!(json(split(&format!("{BEFORE_NUMBERS}{}{AFTER_NUMBERS}", NUMBERS[1]))));
        assert!(!json(split(r"\w+|\s+")) && !json(split("")));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn pieces_give_the_ids_of_the_whole(
            text in "([ab sSt']|[a-z]{1,6} |the |\n|  |12|\u{301}|\u{e9}|\u{1100}\u{1161}|<think>|[.,!-])*"
        ) {
            for tokenizer in [tiny(), load(&gpt2_like(), None).unwrap()] {
                let whole = tokenizer.encode_in_pieces(&text, false, usize::MAX).unwrap();
                prop_assert_eq!(tokenizer.encode_in_pieces(&text, false, 1).unwrap(), whole);
            }
        }
    }
}
