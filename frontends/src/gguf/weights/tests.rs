use super::super::testing::{Gguf, f32s};
use super::*;
use crate::Opened;

fn open(g: &Gguf) -> (tempfile::TempDir, Opened) {
    let (dir, opened) = g.open();
    (dir, opened.ok().unwrap())
}

fn floats(opened: &Opened, name: &str) -> Vec<f32> {
    opened.weights.read(name).unwrap().as_f32().unwrap().to_vec()
}

#[test]
fn rows_of_llama_queries_and_keys_are_put_in_order() {
    // One key head of 4 rows: rows 0, 2 of the file are its first half, 1, 3 its second.
    let g = Gguf::decoder("llama")
        .tensor("blk.0.attn_k.weight", &[2, 4], 0, f32s(8))
        .tensor("blk.0.attn_v.weight", &[2, 4], 0, f32s(8))
        .tensor("blk.0.attn_k.bias", &[4], 0, f32s(4))
        .tensor("blk.0.attn_q.bias", &[8], 0, f32s(8));
    let (_dir, llama) = open(&g);
    assert_eq!(floats(&llama, "model.layers.0.self_attn.k_proj.weight"), [0., 1., 4., 5., 2., 3., 6., 7.]);
    assert_eq!(floats(&llama, "model.layers.0.self_attn.k_proj.bias"), [0., 2., 1., 3.]);
    assert_eq!(floats(&llama, "model.layers.0.self_attn.q_proj.bias"), [0., 2., 1., 3., 4., 6., 5., 7.]);
    assert_eq!(floats(&llama, "model.layers.0.self_attn.v_proj.weight"), [0., 1., 2., 3., 4., 5., 6., 7.]);
}

#[test]
fn rows_of_qwen_stay_and_are_borrowed() {
    for arch in ["qwen2", "qwen3"] {
        let (_dir, opened) = open(&Gguf::decoder(arch).tensor("blk.0.attn_k.weight", &[2, 4], 0, f32s(8)));
        let raw = opened.weights.raw("model.layers.0.self_attn.k_proj.weight").unwrap();
        assert!(matches!(raw.bytes, Cow::Borrowed(b) if b == f32s(8)));
        assert_eq!(raw.ty.to_string(), "f32[4, 2]");
    }
}

#[test]
fn floats_keep_their_type_and_codes_become_f32() {
    let mut block = vec![0u8; 34];
    (block[1], block[2], block[33]) = (0x38, 0x80, 0x7f);
    let g = Gguf::decoder("llama")
        .tensor("blk.0.attn_k.weight", &[1, 4], 1, vec![0, 1, 2, 3, 4, 5, 6, 7])
        .tensor("blk.0.ffn_up.weight", &[2, 1], 30, vec![0, 0x3f, 0x80, 0x3f])
        .tensor("blk.0.ffn_down.weight", &[32, 1], 8, block);
    let (_dir, opened) = open(&g);
    let raw = opened.weights.raw("model.layers.0.self_attn.k_proj.weight").unwrap();
    assert_eq!((raw.ty.to_string().as_str(), &*raw.bytes), ("f16[4, 1]", &[0, 1, 4, 5, 2, 3, 6, 7][..]));
    assert_eq!(floats(&opened, "model.layers.0.mlp.up_proj.weight"), [0.5, 1.0]);
    let down = floats(&opened, "model.layers.0.mlp.down_proj.weight");
    assert_eq!((down.len(), down[0], down[31]), (32, -64.0, 63.5));
    for (name, ty) in opened.weights.tensors() {
        let raw = opened.weights.raw(&name).unwrap();
        assert_eq!((Some(raw.bytes.len()), &raw.ty), (ty.bytes(), &ty), "{name}");
    }
    assert_eq!(opened.weights.weight_files(), std::slice::from_ref(&opened.path));
    assert!(opened.weights.raw("lm_head.weight").unwrap_err().to_string().contains("no such tensor"));
}

#[test]
fn every_name_has_its_counterpart() {
    let mut g = Gguf::decoder("qwen3").tensor("output_norm.weight", &[8], 0, f32s(8));
    let parts = [
        "attn_norm",
        "ffn_norm",
        "attn_output",
        "attn_q_norm",
        "attn_k_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ];
    for part in parts {
        g = g.tensor(&format!("blk.0.{part}.weight"), &[8], 0, f32s(8));
    }
    let names: Vec<String> = open(&g).1.weights.tensors().into_iter().map(|(n, _)| n).collect();
    assert_eq!(
        names[..3],
        ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    );
    let tails: Vec<&str> = names[3..].iter().map(|n| n.strip_prefix("model.layers.0.").unwrap()).collect();
    let want = [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    ];
    assert_eq!(tails, want);
}

#[test]
fn tensors_without_counterpart_are_refused() {
    let with = |name: &str| Gguf::decoder("llama").tensor(name, &[8], 0, f32s(8)).refusal();
    for name in [
        "blk.0.ffn_gate_exps.weight",
        "blk.0.attn_q_norm.weight",
        "blk.00.attn_norm.weight",
        "x",
        "blk.0.attn_q.scale",
    ] {
        let said = with(name);
        assert!(
            said.contains(&format!("`{name}` has no counterpart in a Hugging Face llama model")),
            "{said}"
        );
    }
    assert!(with("blk.1.attn_norm.weight").contains("is in layer 1 of a model with 1 layers"));
    let odd = Gguf::decoder("llama").tensor("blk.0.attn_k.weight", &[1, 3], 0, f32s(3));
    assert!(odd.refusal().contains("has 3 rows, no pairs for 1 heads"));
    let coded = Gguf::decoder("llama").tensor("blk.0.attn_k.bias", &[32], 8, vec![0; 34]);
    assert!(coded.refusal().contains("a vector stored as Q8_0"));
}
