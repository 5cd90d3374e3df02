//! Which layers a configuration calls quantized, and how. What the tensors hold is tested on files of other tools, in
//! `tests/quantized.rs`.

use serde_json::{Value, json};

use super::config::{Rules, Scheme, Storage};
use super::*;
use qrmc_ir::Grain;

fn rules(quantization: Value) -> Rules {
    let config = json!({ "quantization_config": quantization });
    Rules::read(Path::new("m"), &config).unwrap().unwrap()
}

const UP: &str = "model.layers.3.mlp.up_proj";
const DOWN: &str = "model.layers.3.mlp.down_proj";

fn scheme(rules: &Rules, module: &str) -> Scheme {
    *rules.of(module).unwrap()
}

#[test]
fn a_float_checkpoint_has_no_rules() {
    for config in [json!({}), json!({"quantization_config": null})] {
        assert!(Rules::read(Path::new("m"), &config).unwrap().is_none());
    }
}

#[test]
fn both_spellings_of_awq() {
    let new = rules(json!({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}));
    let old = rules(json!({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}));
    assert_eq!(scheme(&new, UP), scheme(&old, UP));
    assert_eq!(scheme(&new, UP).grain, Grain::Group(64));
    assert_eq!(new.of("lm_head"), None);
    let row = rules(json!({"quant_method": "awq", "w_bit": 4, "q_group_size": -1,
        "modules_to_not_convert": ["down_proj"]}));
    assert_eq!(scheme(&row, UP).grain, Grain::Row);
    assert_eq!(row.of(DOWN), None);
}

#[test]
fn versions_and_overrides_of_gptq() {
    for (config, less_one) in [
        (json!({"quant_method": "gptq", "bits": 4}), true),
        (json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}), true),
        (json!({"quant_method": "gptq", "bits": 4, "format": "gptq_v2"}), false),
        (
            json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "format": "gptq_v2"}),
            false,
        ),
    ] {
        assert_eq!(scheme(&rules(config), UP).storage, Storage::Gptq { less_one });
    }
    let r = rules(json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true, "lm_head": true,
        "dynamic": {"-:model\\.layers\\.1\\.": {}, ".*\\.3\\..*down": {"bits": 8, "group_size": 32}}}));
    assert_eq!(r.of("model.layers.1.mlp.up_proj"), None);
    assert!(r.of("model.layers.11.mlp.up_proj").is_some() && r.of("lm_head").is_some());
    assert_eq!((scheme(&r, UP).bits, scheme(&r, UP).grain), (4, Grain::Group(128)));
    assert_eq!((scheme(&r, DOWN).bits, scheme(&r, DOWN).grain), (8, Grain::Group(32)));
    let r = rules(json!({"quant_method": "gptq", "bits": 4,
        "modules_in_block_to_quantize": [["mlp.up_proj", "mlp.gate_proj"]]}));
    assert!(r.of(UP).is_some() && r.of(DOWN).is_none());
}

#[test]
fn names_come_before_patterns_and_patterns_before_classes() {
    let weights = |bits| json!({"num_bits": bits, "strategy": "channel", "symmetric": true});
    let r = rules(json!({"format": "pack-quantized", "config_groups": {
        "a": {"targets": ["Linear"], "weights": weights(4)},
        "b": {"targets": ["re:.*down_proj"], "weights": weights(6)},
        "c": {"targets": [DOWN], "weights": weights(8), "format": "int-quantized"},
    }, "ignore": ["lm_head", "re:.*layers\\.0\\."]}));
    assert_eq!(r.format, "compressed-tensors pack-quantized, int-quantized");
    assert_eq!((scheme(&r, DOWN).bits, scheme(&r, DOWN).storage), (8, Storage::Bytes));
    assert_eq!(scheme(&r, "model.layers.4.mlp.down_proj").bits, 6);
    assert_eq!((scheme(&r, UP).bits, scheme(&r, UP).grain), (4, Grain::Row));
    assert_eq!(r.of("lm_head"), None);
    assert_eq!(r.of("model.layers.0.mlp.down_proj"), None);
    // A pattern is to match from the start of a name.
    let r = rules(json!({"format": "pack-quantized", "config_groups": {
        "a": {"targets": ["re:up_proj", "re:model"], "weights": weights(4)}}}));
    assert!(r.of(UP).is_some() && r.of("x.up_proj").is_none());
}
