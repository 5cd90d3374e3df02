//! Exports: does each format hold the integers of the artefact, read back here from the formats' descriptions; what is
//! refused; is what was there kept.

use std::path::Path;

use half::f16;
use qrmc_ir::Tensor;
use qrmc_lowering::artefact::Artefact;
use qrmc_passes::{forward, seeded_tokens};
use qrmc_runtime::engine::CpuEngine;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::formats::{Exported, awq, decoder, stored};
use crate::run::{ok, run, snapshot};
use crate::support::{Source, data, gap};

fn compile(dir: &Path, fixture: &str, recipe: &str, out: &str) {
    let model = data("fixtures").join(fixture);
    ok(dir, &["compile", model.to_str().unwrap(), "--pass", recipe, "-o", out, "--no-check"]);
}

#[test]
fn every_format_holds_the_integers_of_the_artefact() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (recipe, formats) in [
        ("rtn{bits=4,group=32,scale=f16}", &["awq", "gptq", "gptq-v2", "compressed-tensors"][..]),
        ("rtn{bits=4,group=32,sym=true,scale=f16}", &["awq", "gptq", "gptq-v2", "compressed-tensors"]),
        ("rtn{bits=4,group=row,scale=f16}", &["awq", "gptq-v2", "compressed-tensors"]),
        ("rtn{bits=3,group=32,scale=f16}", &["gptq", "gptq-v2", "compressed-tensors"]),
        ("rtn{bits=2,group=32,scale=f16}", &["gptq-v2", "compressed-tensors"]),
        ("rtn{bits=8,group=32,scale=f16}", &["gptq", "gptq-v2", "compressed-tensors"]),
        ("rtn{bits=5,group=32,scale=bf16}", &["compressed-tensors"]),
        ("rtn{bits=8,a=8,group=row,sym=true}", &["compressed-tensors"]),
        ("rtn{bits=4,a=8,group=row}", &["compressed-tensors"]),
    ] {
        compile(d, "qwen2-bias-tied", recipe, "a");
        let want = stored(&d.join("a"));
        assert_eq!(want.len(), 14, "{recipe}");
        for format in formats {
            ok(d, &["export", "a", "--format", format, "-o", "x"]);
            let x = Exported::open(&d.join("x"));
            for (name, want) in &want {
                let have = decoder(format)(&x, name, want.rows, want.cols);
                assert_eq!(have, *want, "{recipe} as {format}: {name}");
            }
            let (bias, _) = x.floats("model.layers.0.self_attn.q_proj.bias");
            assert_eq!(bias.len(), 64);
        }
    }
}

#[test]
fn integers_come_back_through_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (recipe, formats) in [
        ("rtn{bits=4,group=32,scale=f16}", &["awq", "gptq", "gptq-v2", "compressed-tensors"][..]),
        (
            "rtn{bits=4,group=32,sym=true,scale=f16}",
            &["awq", "gptq", "gptq-v2", "compressed-tensors", "gguf"],
        ),
        ("rtn{bits=3,group=32,scale=f16}", &["gptq", "gptq-v2", "compressed-tensors"]),
        ("rtn{bits=8,group=32,sym=true,scale=f16}", &["gptq", "gptq-v2", "compressed-tensors", "gguf"]),
        ("rtn{bits=8,a=8,group=row,sym=true}", &["compressed-tensors"]),
        ("annotate{w=8,group=row,sym=true,scale=bf16,a=8,a_sym=true},rtn", &["compressed-tensors", "ascend"]),
        ("rtn{bits=8,group=row,sym=true,scale=f16}", &["ascend"]),
        ("annotate{w=4,group=row,sym=true,a=4,a_sym=true},rtn", &["ascend"]),
    ] {
        compile(d, "qwen2-bias-tied", recipe, "a");
        let want = stored(&d.join("a"));
        for format in formats {
            ok(d, &["export", "a", "--format", format, "-o", "x"]);
            let model = if *format == "gguf" { "x/model.gguf" } else { "x" };
            ok(d, &["compile", model, "-o", "b"]);
            assert_eq!(stored(&d.join("b")), want, "{recipe} by way of {format}");
            let (have, want) = (logits(&d.join("b")), logits(&d.join("a")));
            let (gap, size) = gap(&have, &want);
            assert!(gap <= 2e-5 * size, "{recipe} by way of {format}: {gap} of {size}");
            // Straight from what was exported, without an artefact between.
            if *format == "awq" {
                ok(d, &["export", "x", "--format", "gptq-v2", "-o", "y"]);
                let y = Exported::open(&d.join("y"));
                for (name, want) in &stored(&d.join("a")) {
                    assert_eq!(decoder("gptq-v2")(&y, name, want.rows, want.cols), *want, "{name}");
                }
            }
        }
    }
}

#[test]
fn fewer_bits_stand_in_wider_fields() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (recipe, format) in [
        ("rtn{bits=3,group=32,scale=f16}", "awq"),
        ("rtn{bits=6,group=32,scale=f16}", "gptq-v2"),
        ("rtn{bits=6,group=32,sym=true,scale=f16}", "gptq"),
    ] {
        compile(d, "qwen2-bias-tied", recipe, "a");
        let said = ok(d, &["export", "a", "--format", format, "-o", "x"]);
        assert!(said.contains("bits stand in"), "{said}");
        let x = Exported::open(&d.join("x"));
        for (name, want) in &stored(&d.join("a")) {
            assert_eq!(
                decoder(format)(&x, name, want.rows, want.cols),
                *want,
                "{recipe} as {format}: {name}"
            );
        }
    }
}

/// What a model computes, by its path.
fn logits(path: &Path) -> Tensor {
    let engine = CpuEngine::new(2).unwrap();
    let ids = seeded_tokens(1, 12, 256);
    if path.join("model.qir").exists() {
        let a = Artefact::map(path).unwrap();
        return forward(&engine, &a.module, &a, &ids).unwrap();
    }
    let model = qrmc_frontends::import(path, qrmc_frontends::Integers::Keep).unwrap();
    forward(&engine, &model.module, &Source(model.source.weights), &ids).unwrap()
}

#[test]
fn a_gguf_file_holds_the_values_of_the_artefact() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (fixture, recipe, block) in [
        ("llama-mha-tied", "rtn{bits=4,group=32,sym=true,scale=f16}", 2),
        ("llama-mha-tied", "rtn{bits=3,group=32,scale=f16}", 2),
        ("qwen2-bias-untied", "rtn{bits=4,group=64,scale=f16,head=4}", 6),
        ("qwen2-bias-tied", "rtn{bits=8,group=row,sym=true,scale=f16,head=8}", 8),
        ("qwen3-qknorm", "rtn{bits=5,group=32,sym=true,scale=f16}", 6),
    ] {
        compile(d, fixture, recipe, "a");
        ok(d, &["export", "a", "--format", "gguf", "-o", "g"]);
        let file = d.join("g/model.gguf");
        let open = qrmc_frontends::gguf::GgufFile::open(&file).unwrap();
        let q = open.tensors().iter().find(|t| t.name == "blk.0.attn_q.weight").unwrap();
        let number = ["F32", "F16", "Q4_0", "Q4_1", "", "", "Q5_0", "", "Q8_0"];
        assert_eq!(q.ty.to_string(), number[block], "{fixture}");
        let (have, want) = (logits(&file), logits(&d.join("a")));
        let (gap, size) = gap(&have, &want);
        assert!(gap <= 2e-5 * size, "{fixture} {recipe}: {gap} of {size}");
    }
}

#[test]
fn what_a_format_cannot_hold_is_refused_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (recipe, format, seen, advice) in [
        ("rtn{bits=4,group=32}", "awq", "is f32, and awq files hold f16", "scale=f16"),
        ("rtn{bits=8,group=32,scale=f16}", "awq", "codes of 8 bits; awq words hold 4", "bits=4"),
        ("rtn{bits=4,group=32,scale=f16,head=4}", "awq", "the head has codes", "head=16"),
        ("rtn{bits=8,a=8,group=row,scale=f16}", "gptq", "its input is rounded", "compressed-tensors"),
        ("rtn{bits=4,group=32,scale=f16,kv=8}", "compressed-tensors", "cached as", "without kv"),
        ("rtn{bits=4,group=16,scale=f16}", "gguf", "groups of 16", "32"),
        ("rtn{bits=8,group=32,scale=f16}", "gguf", "blocks hold -128 to 127", "sym=true"),
        ("rotate,rtn{bits=4,group=32,scale=f16}", "awq", "not the source's graph any more", "online"),
        // A factor on the range is a constant of the graph, and no stored tensor.
        ("annotate{CLIPPED},rtn", "compressed-tensors", "a clip of its range, to 0.9;", "a_clip"),
        ("annotate{CLIPPED,scale=bf16},rtn", "ascend", "a clip of its range, to 0.9;", "a_clip"),
        ("annotate{w=16}", "awq", "no matrix of this model has codes", "rtn"),
    ] {
        let recipe = recipe.replace("CLIPPED", "w=8,group=row,sym=true,a=8,a_sym=true,a_clip=0.9");
        compile(d, "qwen2-bias-tied", &recipe, "a");
        let s = run(d, &["export", "a", "--format", format, "-o", "x"]);
        assert_eq!(s.code, 4, "{recipe} as {format}: {}", s.err);
        assert!(s.err.contains(seen) && s.err.contains(advice), "{recipe} as {format}: {}", s.err);
        assert!(!d.join("x").exists() && !d.join("x.partial").exists());
    }
    let s = run(d, &["export", "a", "--format", "gptq3", "-o", "x"]);
    assert!(s.code == 2 && s.err.contains("compressed-tensors"), "{}", s.err);
}

#[test]
fn requantizing_says_what_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    compile(d, "qwen2-bias-tied", "rtn{bits=4,group=32}", "a");
    let said = ok(d, &["export", "a", "--format", "awq", "-o", "x", "--requantize", "--json"]);
    let said: Value = serde_json::from_str(&said).unwrap();
    let losses = said["requantized"].as_array().unwrap();
    assert_eq!(losses.len(), 14);
    // Half a unit in the last of 11 places at most.
    assert!(losses.iter().all(|l| (1e-6..5e-4).contains(&l["relative"].as_f64().unwrap())), "{losses:?}");
    let x = Exported::open(&d.join("x"));
    for (name, want) in stored(&d.join("a")) {
        let have = awq(&x, &name, want.rows, want.cols);
        assert_eq!((have.codes, have.zeros), (want.codes, want.zeros), "{name}");
        assert!(have.scales.iter().zip(&want.scales).all(|(h, w)| *h == f16::from_f32(*w).to_f32()));
    }
    compile(d, "qwen2-bias-tied", "rtn{bits=8,group=row,scale=f16}", "b");
    let s = run(d, &["export", "b", "--format", "awq", "-o", "y", "--requantize", "--json"]);
    let said: Value = serde_json::from_str(&s.out).unwrap();
    let most = said["requantized"].as_array().unwrap().iter().map(|l| l["relative"].as_f64().unwrap());
    assert!(most.fold(0.0, f64::max) > 0.05, "8 bits became 4: {}", s.out);
}

#[test]
fn an_export_is_whole_or_not_there_and_the_same_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    compile(d, "llama-mha-tied", "rtn{bits=4,group=32,sym=true,scale=f16}", "a");
    for format in ["awq", "gptq-v2", "compressed-tensors", "fake", "gguf"] {
        ok(d, &["export", "a", "--format", format, "-o", "x", "--threads", "1"]);
        let first = snapshot(&d.join("x"));
        assert!(first.contains_key("README.md") && first.contains_key("manifest.json"), "{format}");
        // A former export is replaced by the same bytes.
        ok(d, &["export", "a", "--format", format, "-o", "x", "--threads", "2"]);
        assert_eq!(snapshot(&d.join("x")), first, "{format}");
        std::fs::remove_dir_all(d.join("x")).unwrap();
    }
    // Something else is not replaced.
    std::fs::create_dir(d.join("mine")).unwrap();
    std::fs::write(d.join("mine/notes.txt"), "mine").unwrap();
    let s = run(d, &["export", "a", "--format", "awq", "-o", "mine"]);
    assert!(s.code == 1 && s.err.contains("holds something else"), "{}", s.err);
    assert_eq!(std::fs::read_to_string(d.join("mine/notes.txt")).unwrap(), "mine");
    // A damaged tensor is found while it is written, and nothing is left.
    let shard = d.join("a/model.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let at = bytes.len() - 100;
    bytes[at] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let s = run(d, &["export", "a", "--format", "compressed-tensors", "-o", "x"]);
    assert!(s.code == 1 && s.err.contains("was altered"), "{}", s.err);
    assert!(!d.join("x").exists());
}

#[test]
fn shards_and_files_travel() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let model = data("tiny-qwen2-wiki");
    ok(
        d,
        &[
            "compile",
            model.to_str().unwrap(),
            "--pass",
            "rtn{bits=4,group=64,scale=f16}",
            "-o",
            "a",
            "--no-check",
        ],
    );
    ok(d, &["export", "a", "--format", "compressed-tensors", "-o", "x", "--shard-size", "1M"]);
    let index: Value =
        serde_json::from_slice(&std::fs::read(d.join("x/model.safetensors.index.json")).unwrap()).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    for (name, file) in map {
        let bytes = std::fs::read(d.join("x").join(file.as_str().unwrap())).unwrap();
        assert!(SafeTensors::deserialize(&bytes).unwrap().tensor(name).is_ok(), "{name}");
    }
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        let read = |p: std::path::PathBuf| std::fs::read(p).unwrap();
        assert_eq!(read(d.join("x").join(name)), read(model.join(name)), "{name}");
    }
    let config: Value = serde_json::from_slice(&std::fs::read(d.join("x/config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["ignore"], serde_json::json!(["lm_head"]));
    let card = std::fs::read_to_string(d.join("x/README.md")).unwrap();
    assert!(card.contains("u4<group:64, f16, zero>") && card.contains("tiny-qwen2-wiki"), "{card}");
    // The tokenizer of the GGUF file cuts text up as the model's.
    ok(d, &["export", "a", "--format", "gguf", "-o", "g"]);
    let s =
        ok(d, &["generate", "g/model.gguf", "--raw", "--greedy", "--max-new", "8", "--prompt", "The river"]);
    let t = ok(d, &["generate", "a", "--raw", "--greedy", "--max-new", "8", "--prompt", "The river"]);
    assert_eq!(s, t);
}

#[test]
fn skipped_layers_stay_floats_and_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    compile(d, "qwen2-bias-untied", "rtn{bits=4,group=32,scale=f16,skip=[layer1.down_proj]}", "a");
    let name = "model.layers.1.mlp.down_proj";
    for (format, at) in [
        ("awq", "/quantization_config/modules_to_not_convert/0"),
        ("compressed-tensors", "/quantization_config/ignore/1"),
    ] {
        ok(d, &["export", "a", "--format", format, "-o", "x"]);
        let x = Exported::open(&d.join("x"));
        assert_eq!(x.config.pointer(at).and_then(Value::as_str), Some(name), "{format}");
        assert_eq!(x.floats(&format!("{name}.weight")).1, [128, 256]);
    }
    // GPTQModel reads patterns, of awq too.
    for format in ["gptq-v2", "awq"] {
        ok(d, &["export", "a", "--format", format, "-o", "x"]);
        let x = Exported::open(&d.join("x"));
        let dynamic = x.config["quantization_config"]["dynamic"].as_object().unwrap();
        assert_eq!(dynamic.keys().collect::<Vec<_>>(), ["-:^model\\.layers\\.1\\.mlp\\.down_proj$"]);
    }
}
