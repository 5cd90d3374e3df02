use super::super::testing::{Gguf, V, side};
use super::*;

fn strings(list: &[&str]) -> V {
    V::Strs(list.iter().map(|s| (*s).to_owned()).collect())
}

/// Three tokens, as many as the embedding has rows.
fn three() -> Gguf {
    Gguf::decoder("qwen2")
        .with("tokenizer.ggml.model", V::Str("gpt2".into()))
        .with("tokenizer.ggml.pre", V::Str("qwen2".into()))
        .with("tokenizer.ggml.tokens", strings(&["a", "<end>", "<tool>"]))
        .with("tokenizer.ggml.token_type", V::I32s(vec![1, 3, 4]))
        .with("tokenizer.ggml.merges", strings(&[]))
        .with("tokenizer.ggml.eos_token_id", V::U32(1))
}

fn files(g: &Gguf) -> (Value, Value, Value) {
    let (_dir, opened) = g.open();
    let opened = opened.ok().unwrap();
    let file = |name| side(&opened, name);
    (file("tokenizer.json"), file("tokenizer_config.json"), file("generation_config.json"))
}

#[test]
fn control_tokens_are_special_and_user_defined_ones_are_not() {
    let (tokenizer, settings, generation) =
        files(&three().with("tokenizer.chat_template", V::Str("{{ x }}".into())));
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let shown: Vec<_> =
        added.iter().map(|t| (t["id"].as_u64().unwrap(), t["special"].as_bool().unwrap())).collect();
    assert_eq!(shown, [(1, true), (2, false)]);
    assert_eq!(settings["added_tokens_decoder"]["2"]["content"], "<tool>");
    assert_eq!(settings["eos_token"], "<end>");
    assert_eq!(settings["bos_token"], Value::Null);
    assert_eq!(settings["add_bos_token"], false);
    assert_eq!(settings["chat_template"], "{{ x }}");
    assert_eq!(generation, json!({"_from_model_config": true, "eos_token_id": 1}));
    assert_eq!(tokenizer["post_processor"]["type"], "ByteLevel");
}

#[test]
fn all_ids_that_end_a_turn_end_a_generation() {
    let g =
        three().with("tokenizer.ggml.eot_token_id", V::U32(2)).with("tokenizer.ggml.eom_token_id", V::U32(1));
    assert_eq!(files(&g).2["eos_token_id"], json!([1, 2]));
}

#[test]
fn start_and_end_are_added_where_asked() {
    let g = three()
        .with("tokenizer.ggml.bos_token_id", V::U32(2))
        .with("tokenizer.ggml.add_bos_token", V::Bool(true))
        .with("tokenizer.ggml.add_eos_token", V::Bool(true));
    let (tokenizer, settings, _) = files(&g);
    let post = &tokenizer["post_processor"];
    let token = |id: &str, t: u32| json!({"SpecialToken": {"id": id, "type_id": t}});
    let text = |id: &str, t: u32| json!({"Sequence": {"id": id, "type_id": t}});
    assert_eq!(post["single"], json!([token("<tool>", 0), text("A", 0), token("<end>", 0)]));
    assert_eq!(post["pair"].as_array().unwrap()[3..], [token("<tool>", 1), text("B", 1), token("<end>", 1)]);
    assert_eq!(post["special_tokens"]["<tool>"], json!({"id": "<tool>", "ids": [2], "tokens": ["<tool>"]}));
    assert_eq!((&settings["add_bos_token"], &settings["add_eos_token"]), (&json!(true), &json!(true)));
    let said = three().with("tokenizer.ggml.add_bos_token", V::Bool(true)).refusal();
    assert!(said.contains("`tokenizer.ggml.bos_token_id` is missing"), "{said}");
}

#[test]
fn padding_of_the_table_is_no_token() {
    let g = three()
        .with("tokenizer.ggml.tokens", strings(&["a", "<end>", "[PAD2]"]))
        .with("tokenizer.ggml.token_type", V::I32s(vec![1, 3, 5]));
    assert_eq!(files(&g).0["model"]["vocab"], json!({"a": 0, "<end>": 1}));
}

#[test]
fn without_types_the_named_ids_are_special() {
    let (tokenizer, ..) = files(&three().without("tokenizer.ggml.token_type"));
    assert_eq!(tokenizer["added_tokens"].as_array().unwrap().len(), 1);
    assert_eq!(tokenizer["added_tokens"][0]["id"], 1);
}

#[test]
fn a_file_without_tokenizer_is_fine() {
    for g in [
        Gguf::decoder("llama"),
        Gguf::decoder("llama").with("tokenizer.ggml.model", V::Str("no_vocab".into())),
    ] {
        let (_dir, opened) = g.open();
        let names: Vec<_> = opened.ok().unwrap().files.into_iter().map(|f| f.name).collect();
        assert_eq!(names, ["config.json", "generation_config.json"]);
    }
}

#[test]
fn lists_that_contradict_each_other_are_refused() {
    let tokens = |list: &[&str]| three().with("tokenizer.ggml.tokens", strings(list)).refusal();
    let cases = [
        (three().with("tokenizer.ggml.model", V::Str("bert".into())).refusal(), "`bert`; supported are gpt2"),
        (three().without("tokenizer.ggml.tokens").refusal(), "`tokenizer.ggml.tokens` is missing"),
        (tokens(&["a", "b", "c", "d"]), "4 tokens, but `token_embd.weight` has only 3 rows"),
        (tokens(&["a", "b"]), "2 tokens but 3 of"),
        (tokens(&["a", "b", "a"]), "tokens 0 and 2 are both `a`"),
        (three().with("tokenizer.ggml.token_type", V::I32s(vec![1, 9, 1])).refusal(), "token 1 has type 9"),
        (three().with("tokenizer.ggml.eos_token_id", V::U32(3)).refusal(), "is 3, but there are 3 tokens"),
        (three().with("tokenizer.chat_template", V::U32(3)).refusal(), "a string is wanted"),
    ];
    for (said, part) in cases {
        assert!(said.contains(part), "`{part}` is not in `{said}`");
    }
    let none = three().with("tokenizer.ggml.bos_token_id", V::U32(u32::MAX));
    assert_eq!(files(&none).1["bos_token"], Value::Null);
}
