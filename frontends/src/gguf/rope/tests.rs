use super::super::testing::{Gguf, V, side};
use super::*;

fn decoder() -> Gguf {
    Gguf::decoder("llama")
}

fn scaling(g: &Gguf) -> Value {
    let (_dir, opened) = g.open();
    side(&opened.ok().unwrap(), "config.json")["rope_scaling"].clone()
}

fn factors(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A head of 64 with theta 500000, as Llama 3.2 1B has.
fn wide(values: &[f32]) -> Gguf {
    decoder()
        .with("llama.attention.key_length", V::U32(64))
        .with("llama.rope.freq_base", V::F32(500000.0))
        .tensor(ROPE_FREQS, &[values.len() as u64], 0, factors(values))
}

/// What convert_hf_to_gguf.py (torch, f32) stores for Llama 3.2 1B: factor 32, low 1, high 4, original 8192.
const LLAMA32_1B: [f32; 32] = [
    1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.6513293, 3.2922628,
    9.666731, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0,
];

#[test]
fn linear_and_none() {
    assert_eq!(scaling(&decoder()), Value::Null);
    let factor = |kind: Option<&str>, f: f32| {
        let g = decoder().with("llama.rope.scaling.factor", V::F32(f));
        scaling(&kind.map_or(g.clone(), |k| g.with("llama.rope.scaling.type", V::Str(k.into()))))
    };
    let four = json!({"rope_type": "linear", "factor": 4.0});
    assert_eq!(factor(Some("linear"), 4.0), four);
    assert_eq!(factor(None, 4.0), four);
    assert_eq!(factor(Some("none"), 4.0), Value::Null);
    assert_eq!(factor(Some("linear"), 1.0), Value::Null);
    assert_eq!(scaling(&decoder().with("llama.rope.scale_linear", V::F32(4.0))), four);
}

#[test]
fn yarn_keeps_its_parameters() {
    let g = decoder()
        .with("llama.rope.scaling.type", V::Str("yarn".into()))
        .with("llama.rope.scaling.factor", V::F32(4.0))
        .with("llama.rope.scaling.yarn_beta_fast", V::F32(30.0));
    let want = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 30.0});
    assert_eq!(scaling(&g), want);
    let original = g.clone().with("llama.rope.scaling.original_context_length", V::U32(16));
    assert_eq!(scaling(&original)["original_max_position_embeddings"], 16);
    let said = g.clone().with("llama.rope.scaling.attn_factor", V::F32(2.0)).refusal();
    assert!(said.contains("attn_factor` is 2; only 1"), "{said}");
    assert!(g.without("llama.rope.scaling.factor").refusal().contains("is missing or 1"));
}

#[test]
fn other_scalings_are_refused() {
    let said = decoder().with("llama.rope.scaling.type", V::Str("longrope".into())).refusal();
    assert!(said.contains("`longrope`; supported are none, linear, yarn"), "{said}");
}

#[test]
fn llama3_is_known_by_its_factors() {
    let want = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    assert_eq!(scaling(&wide(&LLAMA32_1B)), want);
    assert_eq!(scaling(&wide(&[1.0; 32])), Value::Null);
    // The weights have no such tensor.
    let (_dir, opened) = wide(&LLAMA32_1B).open();
    assert!(opened.ok().unwrap().weights.tensors().iter().all(|(n, _)| !n.contains("rope")));
}

#[test]
fn other_factors_are_refused() {
    let mut bent = LLAMA32_1B;
    bent[16] *= 1.001;
    let said = wide(&bent).refusal();
    assert!(said.contains("divides frequency 16 by") && said.contains("Hugging Face folder"), "{said}");
    bent[16] = f32::NAN;
    assert!(wide(&bent).refusal().contains("divides frequency 16 by NaN"));
    assert!(wide(&[f32::NAN; 32]).refusal().contains("frequency 0"));
    assert!(wide(&LLAMA32_1B[..31]).refusal().contains("F32[31]; 32 floats are wanted"));
    let both = wide(&LLAMA32_1B).with("llama.rope.scaling.factor", V::F32(4.0));
    assert!(both.refusal().contains("both `rope_freqs.weight` and"));
}
