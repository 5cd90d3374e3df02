use super::super::testing::{Gguf, V, f32s, side};
use super::*;

const TOKENS: [&str; 10] = ["<unk>", "<s>", "</s>", "<0x0A>", "a", "b", "ab", "aa", "aab", "é"];

fn spm() -> Gguf {
    let mut g = Gguf::decoder("llama");
    g.tensors[0] = ("token_embd.weight".into(), vec![8, 10], 0, f32s(80));
    g.with("tokenizer.ggml.model", V::Str("llama".into()))
        .with("tokenizer.ggml.tokens", V::Strs(TOKENS.map(str::to_owned).to_vec()))
        .with("tokenizer.ggml.token_type", V::I32s(vec![2, 3, 3, 6, 1, 1, 1, 1, 1, 1]))
        .with("tokenizer.ggml.scores", V::F32s(vec![0., 0., 0., 0., -9., -9., -1., -2., -1., -9.]))
}

fn tokenizer(g: &Gguf) -> Value {
    let (_dir, opened) = g.open();
    side(&opened.ok().unwrap(), "tokenizer.json")
}

#[test]
fn merges_follow_from_scores() {
    let t = tokenizer(&spm());
    // Score -1: `aa`+`b` has the longer left half than `a`+`ab` and `a`+`b`; among the latter the longer right half.
    assert_eq!(t["model"]["merges"], json!([["aa", "b"], ["a", "ab"], ["a", "b"], ["a", "a"]]));
    assert_eq!(t["model"]["byte_fallback"], true);
    assert_eq!(t["model"]["unk_token"], "<unk>");
    assert_eq!(t["added_tokens"].as_array().unwrap().len(), 3);
    // The ids of SentencePiece hold where the metadata is silent.
    assert_eq!(t["post_processor"]["single"][0]["SpecialToken"]["id"], "<s>");
    assert_eq!(t["normalizer"]["normalizers"][0], json!({"type": "Prepend", "prepend": "▁"}));
    assert_eq!(t["decoder"]["decoders"].as_array().unwrap().len(), 4);
}

#[test]
fn the_space_in_front_can_be_off() {
    let t = tokenizer(&spm().with("tokenizer.ggml.add_space_prefix", V::Bool(false)));
    assert_eq!(t["normalizer"]["normalizers"].as_array().unwrap().len(), 1);
    assert_eq!(t["decoder"]["decoders"].as_array().unwrap().len(), 3);
    let t = tokenizer(&spm().with("tokenizer.ggml.add_bos_token", V::Bool(false)));
    assert_eq!(t["post_processor"], Value::Null);
}

#[test]
fn scores_that_do_not_fit_are_refused() {
    let scores = |v: Vec<f32>| spm().with("tokenizer.ggml.scores", V::F32s(v)).refusal();
    assert!(spm().without("tokenizer.ggml.scores").refusal().contains("`tokenizer.ggml.scores` is missing"));
    assert!(scores(vec![0.0; 9]).contains("10 tokens but 9 of"));
    let mut nan = vec![0.0; 10];
    nan[6] = f32::NAN;
    assert!(scores(nan).contains("score of token 6 is not a number"));
    let mut tokens = TOKENS.map(str::to_owned).to_vec();
    tokens[9] = "x".repeat(MAX_PIECE + 1);
    let said = spm().with("tokenizer.ggml.tokens", V::Strs(tokens)).refusal();
    assert!(said.contains("token 9 is 4097 bytes long"), "{said}");
}
