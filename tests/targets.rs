//! What other runtimes ask, replayed: on exported folders, and before a compile calibrates.

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::formats::stored;
use crate::run::{ok, run};
use crate::support::data;

fn compile(dir: &Path, fixture: &str, recipe: &str) {
    let model = data("fixtures").join(fixture);
    ok(dir, &["compile", model.to_str().unwrap(), "--pass", recipe, "-o", "a", "--no-check"]);
}

#[test]
fn folders_that_load_and_folders_that_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    // Hidden 64, intermediate 160, 4 query and 2 key heads.
    for (recipe, format, target, tp, seen) in [
        ("rtn{bits=4,group=32,scale=f16}", "awq", "vllm", "1", ""),
        (
            "rtn{bits=4,group=32,scale=f16}",
            "awq",
            "vllm",
            "1,2",
            "groups of 32 do not divide the 80 inputs of a rank",
        ),
        (
            "rtn{bits=4,group=32,scale=f16}",
            "gptq-v2",
            "vllm",
            "8",
            "4 query heads are not divided at 8 ranks",
        ),
        ("rtn{bits=4,group=row,scale=f16}", "compressed-tensors", "vllm", "2", ""),
        ("rtn{bits=3,group=32,scale=f16}", "compressed-tensors", "vllm", "1", "codes of u3"),
        ("rtn{bits=4,group=32}", "compressed-tensors", "vllm", "1", "scales of f32"),
        ("rtn{bits=8,a=8,group=row,sym=true}", "compressed-tensors", "vllm", "2", ""),
        ("rtn{bits=3,group=32,sym=true,scale=f16}", "compressed-tensors", "transformers", "1", ""),
        ("rtn{bits=4,group=32,sym=true,scale=f16}", "gguf", "llama.cpp", "1", ""),
        ("rtn{bits=4,group=32,sym=true,scale=f16}", "gguf", "vllm", "1", "does not load the format gguf"),
        ("rtn{bits=4,group=32}", "fake", "vllm", "2", ""),
        (
            "annotate{w=4,group=32,sym=true,scale=f16,skip=down_proj},rtn",
            "gptq-v2",
            "transformers",
            "1",
            "model.layers.0.mlp.down_proj stays in floats",
        ),
        ("annotate{w=4,group=32,scale=f16,skip=down_proj},rtn", "awq", "transformers", "1", ""),
        ("rtn{bits=4,group=row,scale=f16}", "awq", "transformers", "1", "groups of 160; its CPU kernel"),
        ("rtn{bits=4,group=32}", "onnx", "onnxruntime", "1", ""),
        ("rtn{bits=4,group=32}", "onnx", "vllm", "1", "does not load the format onnx"),
        ("annotate{w=4,group=32,scale=f16,skip=[k_proj]},rtn", "awq", "vllm", "1", "run as one module"),
    ] {
        compile(d, "qwen2-bias-tied", recipe);
        ok(d, &["export", "a", "--format", format, "-o", "x"]);
        let folder = if format == "gguf" { "x/model.gguf" } else { "x" };
        let s = run(d, &["check", folder, "--target", target, "--tp", tp]);
        assert_eq!(s.code, if seen.is_empty() { 0 } else { 4 }, "{recipe} {format} {target}: {}", s.err);
        assert!(s.err.contains(seen), "{recipe} {format} {target}: {}", s.err);
    }
    let s = run(d, &["export", "a", "--format", "awq", "--tp", "1,2", "-o", "y"]);
    assert!(s.code == 4 && s.err.contains("run as one module") && !d.join("y").exists(), "{}", s.err);
    let s = run(d, &["check", "a", "--target", "vllm"]);
    assert!(s.code == 2 && s.err.contains("export it first"), "{}", s.err);
    let s = run(d, &["check", "x", "--target", "tgi"]);
    assert!(s.code == 2 && s.err.contains("vllm-ascend"), "{}", s.err);
}

#[test]
fn folders_of_other_tools() {
    let dir = tempfile::tempdir().unwrap();
    let settings = "which it does not read; it takes the weights for floats";
    for (fixture, target, format, seen) in [
        // Columns in groups out of order are codes there, whatever the IR makes of them.
        (
            "gptq-v2-w8-actorder",
            "vllm",
            "gptq-v2",
            "codes of u8<group:32, f16, zero>; it loads 4 and 8 bits without",
        ),
        ("gptq-v2-w8-actorder", "transformers", "gptq-v2", ""),
        ("gptq-v2-w8-actorder", "gptqmodel", "gptq-v2", ""),
        // Settings in files of their own.
        ("awq-row-old", "vllm", "awq", settings),
        ("awq-row-old", "transformers", "awq", settings),
        ("awq-row-old", "vllm-ascend", "awq", settings),
        ("gptq-w4-sym-old", "vllm", "gptq", settings),
        ("gptq-w4-sym-old", "transformers", "gptq", settings),
        ("gptq-w4-sym-old", "gptqmodel", "gptq", ""),
        ("ct-int-w8a8-static-asym", "vllm", "compressed-tensors", ""),
        ("ct-int-w8a8-static", "transformers", "compressed-tensors", ""),
    ] {
        let folder = data("quantized").join(fixture);
        let s = run(dir.path(), &["check", folder.to_str().unwrap(), "--target", target, "--json"]);
        let said: Value = serde_json::from_str(&s.out).unwrap();
        assert_eq!(
            (&said["format"], s.code),
            (&format.into(), if seen.is_empty() { 0 } else { 4 }),
            "{fixture} {target}: {}",
            s.err
        );
        assert!(s.err.contains(seen), "{fixture} {target}: {}", s.err);
        assert_eq!(said["error"]["exit"].as_i64(), (!seen.is_empty()).then_some(4), "{said}");
    }
}

#[test]
fn a_compile_for_a_runtime_is_refused_before_it_calibrates() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let model = data("fixtures/qwen2-bias-tied");
    let args = |recipe: &'static str, target: &'static str, tp: &'static str| {
        // A calibration text that is not there would be missed later.
        [
            "compile",
            model.to_str().unwrap(),
            "--pass",
            recipe,
            "--target",
            target,
            "--tp",
            tp,
            "-o",
            "a",
            "--calib",
            "none",
        ]
    };
    for (recipe, target, tp, seen, advice) in [
        ("awq{bits=4,group=32,scale=f16}", "vllm", "2", "groups of 32 do not divide", ""),
        ("gptq{bits=4,group=32}", "vllm", "1", "scales of f32", "scale=f16"),
        ("gptq{bits=4,group=32,scale=bf16}", "vllm-ascend", "1", "codes of u4", "group=row,sym=true"),
        ("gptq{bits=4,group=row,sym=true}", "vllm-ascend", "1", "weights of 4 bits alone", "W8A16"),
        (
            "annotate{w=8,group=row,sym=true,scale=bf16,kv=4},gptq",
            "vllm-ascend",
            "1",
            "are cached as",
            "kv=16",
        ),
        (
            "annotate{w=8,group=row,sym=true,scale=bf16,a=8,a_sym=true,a_clip=0.9},gptq",
            "vllm-ascend",
            "1",
            "has a clip of its range",
            "a_clip",
        ),
    ] {
        let s = run(d, &args(recipe, target, tp));
        assert_eq!(s.code, 4, "{recipe}: {}", s.err);
        assert!(s.err.contains(seen) && s.err.contains(advice), "{recipe}: {}", s.err);
        assert!(!d.join("a").exists() && !d.join("a.partial").exists(), "{recipe}");
    }
}

/// ascend.md §5.2: one code a byte, scales and offsets of f32, and a type for every tensor.
#[test]
fn the_description_of_vllm_ascend() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (recipe, kind) in [
        ("annotate{w=8,group=row,sym=true,scale=bf16,a=8,a_sym=true},rtn", "W8A8_DYNAMIC"),
        ("rtn{bits=8,group=row,sym=true,scale=bf16}", "W8A16"),
        ("annotate{w=4,group=row,sym=true,a=4,a_sym=true},rtn", "W4A4_DYNAMIC"),
    ] {
        compile(d, "qwen2-bias-tied", recipe);
        ok(d, &["export", "a", "--format", "ascend", "-o", "x"]);
        let read = |name: &str| std::fs::read(d.join("x").join(name)).unwrap();
        let description: Value = serde_json::from_slice(&read("quant_model_description.json")).unwrap();
        assert_eq!(description["model_quant_type"], kind);
        let config: Value = serde_json::from_slice(&read("config.json")).unwrap();
        assert!(config.get("quantization_config").is_none());
        let bytes = read("quant_model_weights.safetensors");
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for name in file.names() {
            assert!(description[name].is_string(), "{name}");
        }
        assert_eq!(description["model.embed_tokens.weight"], "FLOAT");
        for (name, want) in stored(&d.join("a")) {
            let weight = file.tensor(&format!("{name}.weight")).unwrap();
            assert_eq!(
                (weight.dtype(), weight.shape()),
                (safetensors::Dtype::I8, &[want.rows, want.cols][..])
            );
            assert_eq!(description[format!("{name}.weight")], kind);
            let middle = want.zeros[0] as i32;
            let codes: Vec<u32> =
                weight.data().iter().map(|&b| (i32::from(b as i8) + middle) as u32).collect();
            assert_eq!(codes, want.codes, "{name}");
            let scale = file.tensor(&format!("{name}.weight_scale")).unwrap();
            assert_eq!((scale.dtype(), scale.shape()), (safetensors::Dtype::F32, &[want.rows, 1][..]));
            let scales: Vec<f32> =
                scale.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            assert_eq!(scales, want.scales, "{name}");
            let offset = file.tensor(&format!("{name}.weight_offset")).unwrap();
            assert!(offset.data().iter().all(|&b| b == 0));
        }
        let bias = file.tensor("model.layers.0.self_attn.q_proj.bias").unwrap();
        assert_eq!(bias.dtype(), safetensors::Dtype::F32);
        assert_eq!(description["model.layers.0.self_attn.q_proj.bias"], "FLOAT");
        ok(d, &["check", "x", "--target", "ascend", "--tp", "1,2"]);
        // A tensor without a type, and a type without its tensors.
        let path = d.join("x/quant_model_description.json");
        let text = String::from_utf8(read("quant_model_description.json")).unwrap();
        for (from, to, seen) in [
            ("\"model.norm.weight\": \"FLOAT\",", "", "`model.norm.weight` has no type"),
            (
                &*format!("\"model.layers.0.mlp.up_proj.weight\": \"{kind}\""),
                "\"model.layers.0.mlp.up_proj.weight\": \"W4A4_FLATQUANT_DYNAMIC\"",
                "model.layers.0.mlp.up_proj",
            ),
            (
                &*format!("\"model.layers.1.self_attn.k_proj.weight\": \"{kind}\""),
                "\"model.layers.1.self_attn.k_proj.weight\": \"W2A2\"",
                "type `W2A2`",
            ),
        ] {
            std::fs::write(&path, text.replace(from, to)).unwrap();
            let s = run(d, &["check", "x", "--target", "vllm-ascend"]);
            assert!(s.code == 4 && s.err.contains(seen), "{}", s.err);
        }
        std::fs::write(&path, &text).unwrap();
    }
}

#[test]
fn what_onnxruntime_asks_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let model = data("onnx/genai-llama-int4-zero/model.onnx");
    let refused = |what: &str| {
        let s = run(d, &["check", "m", "--target", "onnxruntime"]);
        assert!(s.code == 4 && s.err.contains(what) && s.err.contains("hint: "), "{what}: {}", s.err);
    };
    std::fs::create_dir(d.join("m")).unwrap();
    std::fs::copy(&model, d.join("m/model.onnx")).unwrap();
    ok(d, &["check", "m", "--target", "onnxruntime"]);
    let genai = std::fs::read_to_string(model.with_file_name("genai_config.json")).unwrap();
    std::fs::write(d.join("m/genai_config.json"), &genai).unwrap();
    ok(d, &["check", "m/model.onnx", "--target", "onnxruntime"]);
    std::fs::write(d.join("m/genai_config.json"), genai.replace("present.%d.key", "kept.%d.key")).unwrap();
    refused("names `kept.0.key` among the outputs, which the graph does not have (and 1 more)");
    std::fs::write(d.join("m/genai_config.json"), genai.replace("\"head_size\": 16", "\"head_size\": 24"))
        .unwrap();
    refused("heads of 24, which 16 does not divide");
    // Version 15 of the format, in the file's first field.
    let mut bytes = std::fs::read(&model).unwrap();
    assert_eq!(bytes[0], 0x08);
    bytes[1] = 15;
    std::fs::write(d.join("m/model.onnx"), bytes).unwrap();
    std::fs::write(d.join("m/genai_config.json"), &genai[..genai.len() / 2]).unwrap();
    let s = run(d, &["check", "m", "--target", "onnxruntime"]);
    assert!(s.code == 1 && s.err.contains("genai_config.json") && s.err.contains("not JSON"), "{}", s.err);
    std::fs::write(d.join("m/genai_config.json"), genai).unwrap();
    refused("the format is version 15; up to 14 is opened");
}
