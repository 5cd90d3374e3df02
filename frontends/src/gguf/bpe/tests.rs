use super::super::testing::{Gguf, V, side};
use super::*;

fn bpe(pre: Option<&str>, merges: &[&str]) -> Gguf {
    let strings = |list: &[&str]| V::Strs(list.iter().map(|s| (*s).to_owned()).collect());
    let g = Gguf::decoder("llama")
        .with("tokenizer.ggml.model", V::Str("gpt2".into()))
        .with("tokenizer.ggml.tokens", strings(&["a", "b", "ab"]))
        .with("tokenizer.ggml.bos_token_id", V::U32(0))
        .with("tokenizer.ggml.merges", strings(merges));
    match pre {
        Some(pre) => g.with("tokenizer.ggml.pre", V::Str(pre.into())),
        None => g,
    }
}

fn tokenizer(g: &Gguf) -> Value {
    let (_dir, opened) = g.open();
    side(&opened.ok().unwrap(), "tokenizer.json")
}

#[test]
fn every_way_of_cutting_text_up() {
    for pre in PRE {
        let t = tokenizer(&bpe(Some(pre), &["a b"]));
        assert_eq!(t["model"]["merges"], json!([["a", "b"]]));
        assert_eq!(t["model"]["vocab"], json!({"a": 0, "b": 1, "ab": 2}));
        let llama3 = pre.starts_with("llama");
        assert_eq!(t["model"]["ignore_merges"], llama3, "{pre}");
        assert_eq!(t["post_processor"]["type"], if llama3 { "TemplateProcessing" } else { "ByteLevel" });
        assert_eq!(t["normalizer"].is_null(), !pre.contains("qwen"), "{pre}");
        let steps = t["pre_tokenizer"]["pretokenizers"].as_array();
        let last = steps.map_or(&t["pre_tokenizer"], |s| s.last().unwrap());
        assert_eq!(last["type"], "ByteLevel", "{pre}");
    }
    let first = |pre| tokenizer(&bpe(Some(pre), &[]))["pre_tokenizer"]["pretokenizers"][0].clone();
    assert_eq!(first("smollm"), json!({"type": "Digits", "individual_digits": true}));
    assert_eq!(first("llama-bpe")["pattern"]["Regex"], LLAMA3);
    assert_eq!(first("deepseek-r1-qwen")["pattern"]["Regex"], QWEN2);
    assert_eq!(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), QWEN2);
}

#[test]
fn ways_that_are_not_known_are_refused() {
    let said = bpe(Some("tekken"), &[]).refusal();
    assert!(said.contains("`tekken`; supported are smollm, qwen2, llama-bpe"), "{said}");
    assert!(bpe(None, &[]).refusal().contains("`tokenizer.ggml.pre` is missing"));
    let prefix = bpe(Some("qwen2"), &[]).with("tokenizer.ggml.add_space_prefix", V::Bool(true)).refusal();
    assert!(prefix.contains("`qwen2` tokenizers do not have"), "{prefix}");
    let gpt2 = tokenizer(&bpe(Some("gpt-2"), &[]).with("tokenizer.ggml.add_space_prefix", V::Bool(true)));
    assert_eq!(gpt2["pre_tokenizer"]["add_prefix_space"], true);
}

#[test]
fn merges_that_do_not_fit_the_tokens_are_refused() {
    for (merge, part) in [
        ("a", "merge 0 is `a`; two pieces"),
        ("a ", "two pieces"),
        ("", "two pieces"),
        ("a c", "`c` is not among the tokens"),
        ("b a", "`ba` is not among the tokens"),
    ] {
        let said = bpe(Some("gpt-2"), &[merge]).refusal();
        assert!(said.contains(part), "`{part}` is not in `{said}`");
    }
    assert!(
        bpe(Some("gpt-2"), &[]).without("tokenizer.ggml.merges").refusal().contains("merges` is missing")
    );
    let long = "x".repeat(100);
    assert!(bpe(Some("gpt-2"), &[&long]).refusal().contains(&format!("`{}…`", &long[..40])));
}

#[test]
fn deepseek_letters_are_sorted_ranges() {
    let letters: Vec<char> = DEEPSEEK_LETTERS.chars().filter(|&c| c != '-').collect();
    assert!(letters.windows(2).all(|w| w[0] < w[1]));
}
