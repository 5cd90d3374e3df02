//! A quantized head: what it computes, what it leaves as it is, and how it is written.

use std::sync::Arc;

use insta::assert_snapshot;
use qrmc_ir::{Op, Tensor, WeightSource, print_func, rewrite, verify};
use qrmc_passes::{Unit, forward, seeded_tokens};
use qrmc_runtime::engine::CpuEngine;
use serde_json::Value;

use crate::hostile::Model;
use crate::passes::{compile, windows};
use crate::run::{ok, run};
use crate::support::{Source, TINY, gap, import};

const TIED: &str = "fixtures/qwen2-bias-tied";
const UNTIED: &str = "fixtures/qwen2-bias-untied";

fn func(unit: &Unit, name: &str) -> String {
    print_func(&unit.module, unit.module.func(unit.module.find_func(name).unwrap()))
}

#[test]
fn golden_ends() {
    let calibration = windows(256, 2, 32);
    for (name, model, text) in [
        ("tied", TIED, "annotate{w=4,group=8,head=8,a=8,kv=4}"),
        ("untied", UNTIED, "annotate{w=4,group=32,sym=true,scale=f16,head=3}"),
        // 48 does not divide a row; without weights of layers nothing is refused for that.
        ("rows", TIED, "annotate{w=16,group=48,head=4,tp=2}"),
        ("rounded", TIED, "gptq{bits=4,group=8,head=8}"),
        ("rotated", TIED, "quarot{head=4}"),
    ] {
        let (unit, ..) = compile(model, text, &calibration);
        assert_snapshot!(format!("ends_{name}"), func(&unit, "embed") + &func(&unit, "head"));
    }
}

/// Every value of a matrix `[.., n]` on the asymmetric grid of its group. Scales and quotients are `f32`, so that a weight
/// halfway between two codes falls to the same side; the rest is `f64`.
fn on_grid(w: &Tensor, group: usize, bits: u32) -> Tensor {
    let most = (1u32 << bits) - 1;
    let mut out = Vec::new();
    for g in w.as_f32().unwrap().chunks(group) {
        let low = g.iter().fold(0.0f32, |a, &x| a.min(x));
        let high = g.iter().fold(0.0f32, |a, &x| a.max(x));
        let scale = (high - low) / most as f32;
        let zero = f64::from((-low / scale).round_ties_even());
        let code = |x: f32| (f64::from((x / scale).round_ties_even()) + zero).clamp(0.0, f64::from(most));
        out.extend(g.iter().map(|&x| ((code(x) - zero) * f64::from(scale)) as f32));
    }
    Tensor::f32(w.shape(), out)
}

#[test]
fn only_the_head_is_moved() {
    let engine = CpuEngine::new(2).unwrap();
    for (model, table) in
        [(TIED, "model.embed_tokens.weight"), (UNTIED, "lm_head.weight"), (TINY, "model.embed_tokens.weight")]
    {
        let text = "annotate{w=16,group=32,head=4,a=16},rtn";
        let (unit, ..) = compile(model, text, &windows(256, 1, 8));
        let source = import(model);
        let mut explicit = Unit::new(source.module, Arc::new(Source(source.source.weights)));
        let rounded = on_grid(&explicit.weights.read(table).unwrap(), 32, 4);
        let id = explicit.define("rounded", rounded).unwrap();
        let plain = explicit.module.clone();
        let head = plain.find_func("head").unwrap();
        let swapped = rewrite(&plain, plain.func(head), |b, node, _| match node.op {
            Op::Weight(w) if plain.weight(w).name == table => Ok(Some(vec![b.weight(id)])),
            _ => Ok(None),
        });
        explicit.module.funcs[head.0 as usize] = swapped.unwrap();
        let ids = seeded_tokens(3, 32, 256);
        let logits = |m, u: &Unit| forward(&engine, m, &u.weights, &ids).unwrap();
        let want = logits(&explicit.module, &explicit);
        let (off, size) = gap(&logits(&unit.module, &unit), &want);
        assert!(off < 1e-5 * size, "{model}: {off} of {size}");
        // The rounding itself is far larger.
        let (off, size) = gap(&logits(&plain, &explicit), &want);
        assert!(off > 1e-3 * size, "{model}: {off} of {size}");
    }
}

#[test]
fn every_method_leaves_the_layers_as_without() {
    let calibration = windows(256, 2, 32);
    for text in [
        "rtn{bits=4,group=8",
        "rtn{bits=16",
        "rtn{bits=4,group=8,a=8,kv=4,skip=last,tp=2",
        "awq{bits=4,group=8",
        "gptq{bits=4,group=8",
        "smoothquant{w=8",
        "smoothquant{w=16",
        "quarot{w=4",
        "flatquant{epochs=1,batch=2",
    ] {
        let (without, ..) = compile(TIED, &format!("{text}}}"), &calibration);
        let (unit, _, losses) = compile(TIED, &format!("{text},head=4}}"), &calibration);
        for f in ["embed", "layer0", "layer1"] {
            assert_eq!(func(&unit, f), func(&without, f), "{text}");
        }
        let head = func(&unit, "head");
        assert!(head.contains("dcast") && !head.contains("fake_quant"), "{text}: {head}");
        assert!(losses.0.iter().all(|(_, l)| l.layer < 2), "{text}");
        let plan = qrmc_lowering::materialize::plan(verify(&unit.module).unwrap()).unwrap();
        let names: Vec<String> = plan.tensors().into_iter().map(|t| t.name).collect();
        let codes = "model.embed_tokens.weight.head.codes";
        assert!(names.iter().any(|n| n == codes), "{text}: {names:?}");
        let embedding = names.iter().filter(|n| n.starts_with("model.embed_tokens.weight"));
        assert!(
            embedding.count() >= 3 && !names.iter().any(|n| n.contains("embed.codes")),
            "{text}: {names:?}"
        );
    }
}

#[test]
fn a_fake_checkpoint_has_a_head_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let json = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
    ok(dir.path(), &["compile", "--pass", "rtn:bits=4,head=3", "-o", "packed"]);
    ok(dir.path(), &["compile", "--pass", "rtn:bits=4,head=3", "-o", "fake", "--emit", "fake"]);
    ok(dir.path(), &["compile", "--pass", "rtn:bits=4", "-o", "tied", "--emit", "fake"]);
    let ppl = |m: &str| {
        let v = json(&ok(dir.path(), &["eval", m, "--windows", "4", "--json"]));
        v["perplexity"].as_f64().unwrap()
    };
    // The packed weights are the same but for rounding to bf16.
    let (packed, fake, tied) = (ppl("packed"), ppl("fake"), ppl("tied"));
    assert!((packed / fake - 1.0).abs() < 2e-3 && (fake / tied - 1.0).abs() > 5e-3, "{packed} {fake} {tied}");
    for (folder, is_tied) in [("fake", false), ("tied", true), ("packed", true)] {
        let config = json(&std::fs::read_to_string(dir.path().join(folder).join("config.json")).unwrap());
        assert_eq!(config["tie_word_embeddings"], is_tied, "{folder}");
    }
    let bytes = |folder: &str, name: &str| {
        let file = std::fs::read(dir.path().join(folder).join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        tensors.tensor(name).ok().map(|t| t.data().to_vec())
    };
    let table = "model.embed_tokens.weight";
    assert!(bytes("fake", table) == bytes("tied", table) && bytes("fake", table).is_some());
    assert!(bytes("fake", "lm_head.weight").is_some() && bytes("tied", "lm_head.weight").is_none());
    assert!(bytes("fake", "lm_head.weight") != bytes("fake", table));
}

#[test]
fn a_head_that_was_untied_keeps_its_name() {
    let m = Model::of(UNTIED);
    let s = m.compile(&["--pass", "rtn:bits=4,group=32,head=4", "--emit", "fake"]);
    assert_eq!(s.code, 0, "{}", s.err);
    let heads = || -> Vec<String> {
        let v: Value = serde_json::from_str(&ok(m.dir.path(), &["inspect", "out", "--json"])).unwrap();
        let names = v["tensors"].as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap().to_owned());
        names.filter(|n| n.starts_with("lm_head.")).collect()
    };
    assert_eq!(heads(), ["lm_head.weight"]);
    std::fs::remove_dir_all(m.dir.path().join("out")).unwrap();
    let s = m.compile(&["--pass", "rtn:bits=4,group=32,head=4"]);
    assert_eq!(s.code, 0, "{}", s.err);
    let mut packed = heads();
    packed.sort_unstable();
    assert_eq!(packed, ["lm_head.weight.codes", "lm_head.weight.scale", "lm_head.weight.zero"]);
}

#[test]
fn heads_that_make_no_sense() {
    let m = Model::of(TINY);
    for pass in ["annotate", "rtn", "awq", "gptq", "smoothquant", "quarot", "flatquant"] {
        for head in ["1", "9", "x"] {
            m.refused(&["--pass", &format!("{pass}:head={head}")], 2, &["head", "2 to 8", head]);
        }
    }
    m.refused(&["--pass", "kvquant:head=4"], 2, &["head"]);
    // What is no layer is not skipped.
    m.refused(&["--pass", "rtn:head=4,skip=lm_head"], 1, &["lm_head", "matches no layer"]);
    let ir = ok(m.dir.path(), &["opt", "model"]);
    let end = ir.find("func @head").unwrap();
    std::fs::write(m.dir.path().join("headless.qir"), &ir[..end]).unwrap();
    let s = run(m.dir.path(), &["opt", "headless.qir", "--pass", "annotate:head=4"]);
    assert!(s.code == 1 && s.err.contains("head is 4") && s.err.contains("no @head"), "{}", s.err);
    assert_eq!(run(m.dir.path(), &["opt", "headless.qir", "--pass", "annotate"]).code, 0);
}
