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

/// Blocks of `Q4_0`, `Q5_0` or `Q8_0` whose scales and codes differ from block to block.
fn blocks(n: u8, bytes: usize) -> Vec<u8> {
    let block = |b: u8| {
        let scale = half::f16::from_f32(0.5 - f32::from(b)).to_le_bytes();
        scale.into_iter().chain((2..bytes as u8).map(move |i| i.wrapping_mul(29).wrapping_add(91 * b)))
    };
    (0..n).flat_map(block).collect()
}

#[test]
fn codes_are_kept_where_they_are_asked_for() {
    let norm = f32s(64);
    let g = Gguf::decoder("llama")
        .tensor("blk.0.attn_k.weight", &[64, 4], 2, blocks(8, 18))
        .tensor("blk.0.ffn_up.weight", &[32, 2], 8, blocks(2, 34))
        .tensor("blk.0.ffn_down.weight", &[32, 1], 6, blocks(1, 22))
        .tensor("blk.0.ffn_gate.weight", &[32, 1], 3, blocks(1, 20))
        .tensor("output.weight", &[32, 3], 2, blocks(3, 18))
        .tensor("output_norm.weight", &[64], 0, norm[..256].to_vec());
    let (_dir, opened) = g.open_as(Integers::Keep);
    let kept = opened.ok().unwrap();
    let (_dir, floats_only) = open(&g);
    assert!(kept.notes.is_empty() && floats_only.notes[0].contains("passes start from floats"));
    let types: HashMap<String, String> =
        kept.weights.tensors().into_iter().map(|(n, t)| (n, t.to_string())).collect();
    for (name, ty) in [
        ("model.layers.0.self_attn.k_proj.weight.codes", "i4<group:32, f16>[4, 64]"),
        ("model.layers.0.self_attn.k_proj.weight.scale", "f16[4, 2]"),
        ("model.layers.0.mlp.up_proj.weight.codes", "i8<group:32, f16>[2, 32]"),
        ("model.layers.0.mlp.down_proj.weight.codes", "i5<group:32, f16>[1, 32]"),
        ("model.layers.0.mlp.gate_proj.weight", "f32[1, 32]"),
        ("lm_head.weight.codes", "i4<group:32, f16>[3, 32]"),
        ("model.embed_tokens.weight", "f32[3, 8]"),
    ] {
        assert_eq!(types.get(name).map(String::as_str), Some(ty), "{name}");
    }
    for (name, ty) in kept.weights.tensors() {
        let raw = kept.weights.raw(&name).unwrap();
        assert_eq!((Some(raw.bytes.len()), &raw.ty), (ty.bytes(), &ty), "{name}");
    }
    // Codes and scales are the values of the de-quantized tensor, its rows put in order as well.
    for name in ["layers.0.self_attn.k_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"] {
        let name = &format!("model.{name}");
        let codes = kept.weights.read(&format!("{name}.weight.codes")).unwrap();
        let scale = floats(&kept, &format!("{name}.weight.scale"));
        let qrmc_ir::Data::I8(codes) = codes.data() else { panic!("{name}: signed codes") };
        let values: Vec<f32> = codes.iter().enumerate().map(|(i, &q)| scale[i / 32] * f32::from(q)).collect();
        assert_eq!(values, floats(&floats_only, &format!("{name}.weight")), "{name}");
    }
}

#[test]
fn scales_that_are_no_numbers_are_refused() {
    let mut bytes = blocks(1, 34);
    bytes[..2].copy_from_slice(&[0, 0x7c]);
    let g = Gguf::decoder("llama").tensor("blk.0.ffn_down.weight", &[32, 1], 8, bytes);
    let (_dir, opened) = g.open_as(Integers::Keep);
    let said = opened.ok().unwrap().weights.raw("model.layers.0.mlp.down_proj.weight.scale").unwrap_err();
    assert!(said.to_string().contains("scale 0 is NaN or infinite"), "{said}");
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
