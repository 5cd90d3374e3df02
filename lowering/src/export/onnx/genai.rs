//! The configuration that onnxruntime-genai reads beside a model.

use qrmc_ir::ModelFacts;
use serde_json::json;

use super::{ATTENTION_MASK, INPUT_IDS, LOGITS, MODEL, POSITION_IDS};

/// `genai_config.json` of a decoder. `%d` in the names of caches is the number of a layer.
pub(super) fn config(facts: &ModelFacts, positions: bool) -> String {
    let mut inputs = json!({
        "input_ids": INPUT_IDS,
        "attention_mask": ATTENTION_MASK,
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    });
    if positions {
        inputs["position_ids"] = json!(POSITION_IDS);
    }
    let mut model = json!({
        "type": facts.arch,
        "vocab_size": facts.vocab,
        "context_length": facts.context,
        "decoder": {
            "session_options": { "log_id": "onnxruntime-genai", "provider_options": [] },
            "filename": MODEL,
            "head_size": facts.head_dim,
            "hidden_size": facts.hidden,
            "num_attention_heads": facts.heads,
            "num_hidden_layers": facts.layers,
            "num_key_value_heads": facts.kv_heads,
            "inputs": inputs,
            "outputs": {
                "logits": LOGITS,
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    });
    if let Some(bos) = facts.bos {
        model["bos_token_id"] = json!(bos);
    }
    if let Some(first) = facts.eos.first() {
        model["eos_token_id"] = if facts.eos.len() == 1 { json!(first) } else { json!(facts.eos) };
        model["pad_token_id"] = json!(first);
    }
    // Caches grow: attention in standard operators does not write into a buffer of the full length.
    let search =
        json!({ "do_sample": false, "max_length": facts.context, "past_present_share_buffer": false });
    format!("{:#}\n", json!({ "model": model, "search": search }))
}
