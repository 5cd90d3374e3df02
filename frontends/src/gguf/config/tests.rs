use super::super::testing::{Gguf, V, f32s, side};
use super::*;

fn config(g: &Gguf) -> Value {
    let (_dir, opened) = g.open();
    let opened = opened.ok().unwrap();
    let config = side(&opened, "config.json");
    assert_eq!(config, opened.config);
    config
}

#[test]
fn a_config_says_what_the_metadata_says() {
    let g = Gguf::decoder("llama").tensor("output.weight", &[8, 3], 0, f32s(24));
    let want = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false, "mlp_bias": false,
        "hidden_act": "silu", "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 3,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null,
        "tie_word_embeddings": false, "bos_token_id": null, "eos_token_id": null, "pad_token_id": null,
        "torch_dtype": "float32", "use_cache": true,
    });
    assert_eq!(config(&g), want);
}

#[test]
fn architectures_differ() {
    let qwen3 = Gguf::decoder("qwen3")
        .with("qwen3.attention.key_length", V::U32(6))
        .with("qwen3.rope.freq_base", V::F32(1e6))
        .with("qwen3.attention.sliding_window", V::U32(32))
        .with("tokenizer.ggml.bos_token_id", V::U32(1));
    let c = config(&qwen3);
    assert_eq!(c["architectures"][0], "Qwen3ForCausalLM");
    assert_eq!((&c["head_dim"], &c["rope_theta"], &c["bos_token_id"]), (&json!(6), &json!(1e6), &json!(1)));
    assert_eq!((&c["sliding_window"], &c["use_sliding_window"]), (&json!(32), &json!(true)));
    assert_eq!(c["tie_word_embeddings"], true);
    let wide = Gguf::decoder("llama").with("llama.attention.sliding_window", V::U32(64));
    assert_eq!(config(&wide)["use_sliding_window"], false);
    let c = config(&Gguf::decoder("qwen2").tensor("blk.0.attn_q.bias", &[8], 0, f32s(8)));
    assert_eq!((&c["model_type"], c.get("attention_bias")), (&json!("qwen2"), None));
    let c = config(&Gguf::decoder("llama").tensor("blk.0.attn_q.bias", &[8], 0, f32s(8)));
    assert_eq!(c["attention_bias"], true);
}

#[test]
fn missing_key_heads_are_as_many_as_heads_and_lists_must_agree() {
    let key = "llama.attention.head_count_kv";
    assert_eq!(config(&Gguf::decoder("llama").without(key))["num_key_value_heads"], 2);
    assert_eq!(config(&Gguf::decoder("llama").with(key, V::I32s(vec![1])))["num_key_value_heads"], 1);
    let said = Gguf::decoder("llama").with(key, V::I32s(vec![1, 2])).refusal();
    assert!(said.contains("differs between layers, from Some(1) to Some(2)"), "{said}");
}

#[test]
fn the_type_is_that_of_all_matrices() {
    let with = |kind: u32, bytes: usize| {
        let mut g = Gguf::decoder("llama").tensor("output_norm.weight", &[8], 0, f32s(8));
        for t in g.tensors.iter_mut().filter(|t| t.1.len() == 2) {
            (t.2, t.3) = (kind, vec![0; bytes * (t.1[0] * t.1[1]) as usize]);
        }
        g
    };
    assert_eq!(config(&with(30, 2))["torch_dtype"], "bfloat16");
    assert_eq!(config(&with(1, 2))["torch_dtype"], "float16");
    let mixed = with(30, 2).tensor("blk.0.attn_v.weight", &[8, 4], 1, vec![0; 64]);
    assert_eq!(config(&mixed)["torch_dtype"], "float32");
    let coded = with(30, 2).tensor("blk.0.ffn_down.weight", &[32, 1], 8, vec![0; 34]);
    assert_eq!(config(&coded)["torch_dtype"], "float32");
}

#[test]
fn what_a_config_cannot_say_is_refused() {
    let g = || Gguf::decoder("llama");
    let u32 = |key: &str, n: u32| g().with(&format!("llama.{key}"), V::U32(n)).refusal();
    let cases = [
        (g().without("general.architecture").refusal(), "`general.architecture` is missing"),
        (
            g().with("general.architecture", V::Str("gemma2".into())).refusal(),
            "`gemma2`; supported are llama, qwen2, qwen3",
        ),
        (g().without("llama.block_count").refusal(), "`llama.block_count` is missing"),
        (g().without("llama.attention.layer_norm_rms_epsilon").refusal(), "rms_epsilon` is missing"),
        (g().with("llama.block_count", V::Str("1".into())).refusal(), "a non-negative integer is wanted"),
        (g().with("llama.final_logit_softcapping", V::F32(30.0)).refusal(), "softcapping` is 30"),
        (g().with("llama.attention.causal", V::Bool(false)).refusal(), "only causal"),
        (g().with("split.count", V::U32(3)).refusal(), "one of 3 parts"),
        (u32("expert_count", 8), "`llama.expert_count` is 8"),
        (u32("embedding_length", 0), "`llama.embedding_length` is 0"),
        (u32("attention.head_count", 3), "8 is no multiple of 3 heads"),
        (u32("attention.head_count_kv", 3), "no whole groups"),
        (u32("attention.key_length", 3), "no whole groups of even width"),
        (u32("attention.value_length", 2), "value_length` is 2 but heads are 4 wide"),
        (u32("rope.dimension_count", 2), "dimension_count` is 2 but heads are 4 wide"),
    ];
    for (said, part) in cases {
        assert!(said.contains(part), "`{part}` is not in `{said}`");
    }
    let mut none = g();
    none.tensors.remove(0);
    assert!(none.refusal().contains("`token_embd.weight` is missing"));
    none.tensors.insert(0, ("token_embd.weight".into(), vec![8], 0, f32s(8)));
    assert!(none.refusal().contains("shape [8]; two sizes"));
}
