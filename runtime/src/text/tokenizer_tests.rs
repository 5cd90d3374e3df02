use super::*;
use serde_json::json;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/tiny-qwen2-wiki/");

fn file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{TINY}{name}")).unwrap()
}

pub(in crate::text) fn tiny() -> Tokenizer {
    Tokenizer::from_bytes(&file(TOKENIZER), Some(&file(CONFIG)), None).unwrap()
}

/// A SentencePiece-like tokenizer with byte fallback: three special tokens, 256 bytes, then a few letters.
pub(in crate::text) fn byte_fallback() -> Value {
    let mut vocab = Map::new();
    let specials = ["<unk>", "<s>", "</s>"];
    let bytes = (0..256).map(|b| format!("<0x{b:02X}>"));
    let letters = ["▁", "a", "b", "▁a", "ab", "."];
    for token in specials.map(str::to_owned).into_iter().chain(bytes).chain(letters.map(str::to_owned)) {
        vocab.insert(token, vocab.len().into());
    }
    let added = specials.iter().enumerate().map(|(id, t)| {
        json!({"id": id, "content": t, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": 3, "dropout": 0.5, "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocab, "merges": ["▁ a", "a b"]},
    })
}

pub(in crate::text) fn load(json: &Value, config: Option<Value>) -> Result<Tokenizer, TextError> {
    let config = config.map(|c| c.to_string());
    Tokenizer::from_bytes(json.to_string().as_bytes(), config.as_ref().map(String::as_bytes), None)
}

/// Like SmolLM2's: single digits, then GPT-2's pattern over bytes, with the merges that `texts` of the tests use.
pub(in crate::text) fn gpt2_like() -> Value {
    let mut vocab = Map::new();
    for byte in ('!'..='~').chain('¡'..='¬').chain('®'..='ÿ').chain('\u{100}'..='\u{143}') {
        vocab.insert(byte.to_string(), vocab.len().into());
    }
    let merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "the"),
        ("Ġ", "s"),
        ("Ġ", "a"),
        ("Ċ", "Ċ"),
        ("Ġ", "Ġ"),
        ("a", "Ġ"),
        ("1", "2"),
    ];
    for (a, b) in merges {
        vocab.insert(format!("{a}{b}"), vocab.len().into());
    }
    json!({
        "version": "1.0", "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges.map(|(a, b)| format!("{a} {b}"))},
    })
}

#[test]
fn long_texts_are_worked_on_in_pieces() {
    let tokenizer = tiny();
    let text =
        "The quick brown fox, 12 of them.\n\n = Title = \n It didn't jump over the lazy dog. ".repeat(2000);
    assert!(tokenizer.may_cut && text.len() > 2 * PIECE);
    let whole = encode(&tokenizer.inner, &text, true).unwrap();
    assert_eq!(tokenizer.encode(&text, true).unwrap(), whole);
    assert!(load(&gpt2_like(), None).unwrap().may_cut && !load(&byte_fallback(), None).unwrap().may_cut);
}

#[test]
fn the_reference_prompts() {
    let tokenizer = tiny();
    let cases: Value = serde_json::from_slice(&file("reference_logits.json")).unwrap();
    for case in cases.as_array().unwrap() {
        let ids: Vec<u32> = serde_json::from_value(case["input_ids"].clone()).unwrap();
        let prompt = case["prompt"].as_str().unwrap();
        assert_eq!(tokenizer.encode(prompt, false).unwrap(), ids);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), prompt);
        let answer: Vec<u32> = serde_json::from_value(case["greedy_ids"].clone()).unwrap();
        assert_eq!(tokenizer.decode(&answer, false).unwrap(), case["greedy_text"].as_str().unwrap());
        let Some(question) =
            prompt.split("<｜User｜>").nth(1).and_then(|t| t.strip_suffix("<｜Assistant｜><think>\n"))
        else {
            continue;
        };
        assert_eq!(tokenizer.encode_chat(&[Message::new("user", question)], true).unwrap(), ids);
    }
}

#[test]
fn what_a_tokenizer_knows_of_itself() {
    let tokenizer = tiny();
    assert_eq!((tokenizer.vocab_size(), tokenizer.max_id()), (4096, 4095));
    assert_eq!(tokenizer.bos().unwrap().1, 4091);
    assert_eq!(tokenizer.eos().unwrap(), ("<｜end▁of▁sentence｜>", 4088));
    assert!(tokenizer.adds_bos() && tokenizer.is_byte_level() && tokenizer.notes().is_empty());
    assert_eq!(tokenizer.added_ids(), (&[4091][..], &[][..]));
    assert_eq!(tokenizer.encode("", true).unwrap(), [4091]);
    assert_eq!(tokenizer.encode("", false).unwrap(), [0u32; 0]);
    assert_eq!(tokenizer.token_to_id("<think>"), Some(4093));
    assert!(tokenizer.is_special(4091) && !tokenizer.is_special(4093));
    assert_eq!(tokenizer.decode(&[4091, 16, 9_999_999], true).unwrap(), "1");
}

#[test]
fn numbered_model_types_dropout_and_truncation_are_undone() {
    let tokenizer = load(&byte_fallback(), None).unwrap();
    let ids = tokenizer.encode("ab a.é", true).unwrap();
    let text: Vec<_> = ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap()).collect();
    assert_eq!(text, ["<s>", "▁a", "b", "▁a", ".", "<0xC3>", "<0xA9>"]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ab a.é");
    assert_eq!(tokenizer.bos(), Some(("<s>", 1)));
    assert!(tokenizer.adds_bos() && !tokenizer.is_byte_level());
    let mut other = byte_fallback();
    other["model"]["type"] = 7.into();
    assert!(load(&other, None).unwrap_err().what.contains("number 7"));
}

#[test]
fn the_config_adds_tokens_and_is_contradicted() {
    let config = |id: &str| {
        json!({"bos_token": "<s>", "eos_token": "<end>", "add_bos_token": false,
               "added_tokens_decoder": {"1": {"content": "<s>", "special": true}, id: {"content": "<new>", "special": true}}})
    };
    let tokenizer = load(&byte_fallback(), Some(config("265"))).unwrap();
    assert_eq!(tokenizer.token_to_id("<new>"), Some(265));
    assert!(tokenizer.is_special(265) && tokenizer.eos().is_none() && tokenizer.adds_bos());
    let notes = tokenizer.notes().join("\n");
    for part in ["lacks `<new>` (265)", "`<end>` as eos_token", "add_bos_token = false"] {
        assert!(notes.contains(part), "{notes}");
    }
    assert!(load(&byte_fallback(), Some(config("300"))).unwrap_err().what.contains("300"));
    assert!(load(&byte_fallback(), Some(config("x"))).is_err());
}

#[test]
fn bad_files_are_errors() {
    for bytes in [&b""[..], b"{", b"[]", b"{}", b"\xff\xfe", b"{\"model\": {\"type\": \"BPE\"}}"] {
        let err = Tokenizer::from_bytes(bytes, None, None).unwrap_err();
        assert_eq!(err.path, TOKENIZER);
    }
    let err = load(&byte_fallback(), Some(json!([1]))).unwrap_err();
    assert_eq!(err.path, CONFIG);
    let json = byte_fallback().to_string();
    assert!(Tokenizer::from_bytes(json.as_bytes(), None, Some(b"\xff")).is_err());
    let tokenizer = load(&byte_fallback(), None).unwrap();
    assert!(tokenizer.encode_chat(&[], true).unwrap_err().what.contains("no chat template"));
}
