//! ONNX models as inputs: what torch and the builder of onnxruntime-genai write (`tests/data/onnx`), what qrmc itself
//! exports, and what is refused.

use std::path::Path;

use qrmc_frontends::{Imported, Integers};
use qrmc_ir::{Engine, Module, Tensor, WeightSource, print, verify};
use qrmc_lowering::export::onnx::{self, Form, Options};
use qrmc_runtime::engine::CpuEngine;

use crate::passes::{compile, windows};
use crate::run::{ok, run};
use crate::support::{FIXTURES, Reference, Source, Stored, data, gap, import, main_args};

const FOREIGN: [&str; 9] = [
    "genai-llama-fp16",
    "genai-qwen2-fp16",
    "genai-llama-int4-zero",
    "genai-qwen2-int4",
    "genai-qwen3-fp32",
    "torch-dynamo-llama-sdpa",
    "torch-dynamo-qwen2-eager",
    "torch-script-llama-cache",
    "torch-script-qwen3-sdpa",
];

fn read(path: &Path, integers: Integers) -> Imported {
    qrmc_frontends::import(path, integers).unwrap_or_else(|e| panic!("{e}"))
}

fn logits(module: &Module, weights: &dyn WeightSource, ids: &Tensor, engine: &CpuEngine) -> Tensor {
    let main = module.func(module.find_func("main").unwrap());
    let args = main_args(module, ids);
    let refs: Vec<_> = args.iter().collect();
    engine.run(module, main, weights, &refs).unwrap().swap_remove(0)
}

#[test]
fn logits_are_those_of_onnxruntime() {
    let engine = CpuEngine::new(2).unwrap();
    for name in FOREIGN {
        let reference = Reference::open(&format!("../onnx/{name}"));
        let (ids, want) = (reference.get("input_ids"), reference.get("logits"));
        for integers in [Integers::Keep, Integers::Dequantize] {
            let model = read(&data("onnx").join(name).join("model.onnx"), integers);
            let (diff, size) = gap(&logits(&model.module, &*model.source.weights, &ids, &engine), &want);
            assert!(diff <= 1e-5 * size, "{name} {integers:?}: off by {diff} of {size}");
        }
    }
}

#[test]
fn packed_products_keep_their_codes() {
    let codes = |name: &str| {
        let model = read(&data("onnx").join(name).join("model.onnx"), Integers::Keep);
        let of = |end: &str| {
            let all = model.module.weights().iter().filter(move |w| w.name.ends_with(end));
            all.map(|w| w.ty.elem.to_string()).collect::<std::collections::BTreeSet<_>>()
        };
        (of(".codes"), model.module.weights().iter().filter(|w| w.name.ends_with(".codes")).count())
    };
    // Seven matrices of each layer, whose queries, keys and values were one, and the head.
    for (name, scheme) in
        [("genai-qwen2-int4", "i4<group:32, f32>"), ("genai-llama-int4-zero", "u4<group:16, f32, zero>")]
    {
        let (schemes, count) = codes(name);
        assert_eq!((schemes.into_iter().collect::<Vec<_>>(), count), (vec![scheme.to_owned()], 15), "{name}");
    }
}

/// The functions and weights of a module, without the passes that made it.
fn text(module: &Module) -> String {
    let mut module = module.clone();
    module.history.clear();
    print(&module)
}

#[test]
fn float_exports_come_back_as_they_were() {
    for name in FIXTURES {
        let model = import(&format!("fixtures/{name}"));
        let source = Source(model.source.weights);
        for form in [Form::Qdq, Form::Ort] {
            let dir = tempfile::tempdir().unwrap();
            onnx::write(verify(&model.module).unwrap(), &source, dir.path(), &Options { form }).unwrap();
            std::fs::copy(data("fixtures").join(name).join("config.json"), dir.path().join("config.json"))
                .unwrap();
            let back = read(dir.path(), Integers::Keep);
            assert_eq!(text(&back.module), text(&model.module), "{name} {form:?}");
            for w in model.module.weights() {
                let (have, want) = (back.source.weights.raw(&w.name).unwrap(), source.raw(&w.name).unwrap());
                assert!(have.bytes == want.bytes, "{name}: {}", w.name);
            }
        }
    }
}

/// What all codes stand for, with their scales, whatever they are called.
fn integers(module: &Module, weights: &dyn WeightSource) -> Vec<(Vec<i32>, Vec<u32>)> {
    let ints = |t: Tensor| -> Vec<i32> {
        match t.data() {
            qrmc_ir::Data::U8(v) => v.iter().map(|&x| i32::from(x)).collect(),
            qrmc_ir::Data::I8(v) => v.iter().map(|&x| i32::from(x)).collect(),
            _ => panic!("codes are bytes"),
        }
    };
    let of = |name: &str| {
        let stem = name.strip_suffix(".codes")?;
        let codes = ints(weights.read(name).unwrap());
        let scale = weights.read(&format!("{stem}.scale")).unwrap();
        let scale: Vec<u32> = scale.as_f32().unwrap().iter().map(|x| x.to_bits()).collect();
        let zero = weights.read(&format!("{stem}.zero")).map_or(vec![0; scale.len()], ints);
        let run = codes.len() / scale.len();
        let steps = codes.iter().enumerate().map(|(i, c)| c - zero[i / run]).collect();
        Some((steps, scale))
    };
    let mut all: Vec<_> = module.weights().iter().filter_map(|w| of(&w.name)).collect();
    all.sort();
    all
}

#[test]
fn quantized_exports_come_back_with_their_integers() {
    let engine = CpuEngine::new(2).unwrap();
    for text in [
        "awq{bits=3,group=16}",
        "gptq{bits=4,group=8,head=8}",
        "rtn{bits=8,group=row,sym=true,a=8,kv=8}",
        "annotate{w=8,group=row,sym=true,a=8,a_sym=true},rtn",
        "static-inputs,static-caches,annotate{w=8,group=row,sym=true},rtn",
        "smoothquant",
        "kvquant{bits=4}",
        "quarot",
        "quarot-kv{bits=4}",
        "quarot-kv{bits=4,bias=aware}",
        "flatquant{epochs=1,batch=2,tp=2}",
    ] {
        let (unit, ..) = compile("fixtures/qwen2-bias-tied", text, &windows(256, 2, 32));
        let plan = qrmc_lowering::materialize::plan(verify(&unit.module).unwrap()).unwrap();
        let mut stored = Stored::default();
        plan.run(&engine, &unit.weights, &mut |t, bytes| {
            stored.put(&t.name, t.ty.clone(), bytes);
            Ok(())
        })
        .unwrap();
        let ids = Tensor::i32([2, 7], (0..14).map(|i| i * 17 % 256).collect());
        let want = logits(&plan.module, &stored, &ids, &engine);
        for form in [Form::Qdq, Form::Ort] {
            let dir = tempfile::tempdir().unwrap();
            onnx::write(verify(&plan.module).unwrap(), &stored, dir.path(), &Options { form }).unwrap();
            let back = qrmc_frontends::import(&dir.path().join("model.onnx"), Integers::Keep);
            let back = back.unwrap_or_else(|e| panic!("{text} {form:?}: {e}"));
            let weights = &*back.source.weights;
            assert!(logits(&back.module, weights, &ids, &engine) == want, "{text} {form:?}");
            assert!(integers(&back.module, weights) == integers(&plan.module, &stored), "{text} {form:?}");
            // Where passes start from, nothing is rounded.
            let floats = read(&dir.path().join("model.onnx"), Integers::Dequantize);
            assert!(
                !print(&floats.module).contains("fake_quant") && !print(&floats.module).contains(".codes")
            );
        }
    }
}

#[test]
fn a_model_is_compiled_from_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let model = data("onnx/torch-script-llama-cache/model.onnx");
    let model = model.to_str().unwrap();
    ok(dir.path(), &["compile", model, "--pass", "rtn{bits=4,group=16}", "-o", "out"]);
    let said = ok(dir.path(), &["inspect", "out"]);
    assert!(said.contains("u4<group:16, f32, zero>"), "{said}");
    let said = ok(dir.path(), &["inspect", model]);
    assert!(said.contains("ONNX, opset 17, written by pytorch, llama decoder"), "{said}");
    // Without passes, the integers that are there are taken.
    let model = data("onnx/genai-qwen2-int4/model.onnx");
    ok(dir.path(), &["compile", model.to_str().unwrap(), "-o", "kept"]);
    ok(dir.path(), &["export", "kept", "--format", "onnx", "--form", "ort", "-o", "again"]);
    let (a, b) = (read(&model, Integers::Keep), read(&dir.path().join("again"), Integers::Keep));
    let both = [&a, &b].map(|m| integers(&m.module, &*m.source.weights));
    assert!(!both[0].is_empty() && both[0] == both[1]);
}

/// A model of `tests/data/onnx` with some bytes replaced by as many others.
fn changed(dir: &Path, name: &str, from: &[u8], to: &[u8]) -> String {
    let mut bytes = std::fs::read(data("onnx").join(name).join("model.onnx")).unwrap();
    let places: Vec<usize> =
        (0..bytes.len() - from.len()).filter(|&i| bytes[i..].starts_with(from)).collect();
    assert!(!places.is_empty() && from.len() == to.len());
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    refused(dir, &bytes)
}

fn refused(dir: &Path, bytes: &[u8]) -> String {
    let path = dir.join("model.onnx");
    std::fs::write(&path, bytes).unwrap();
    let said = run(dir, &["inspect", path.to_str().unwrap()]);
    assert_eq!(said.code, 1, "{}", said.err);
    said.err
}

#[test]
fn what_is_no_decoder_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let script = "torch-script-qwen3-sdpa";
    for (from, to, why) in [
        ("Sigmoid", "Softign", "(Softign): this operator on activations [B, S, 48] is part of no decoder"),
        ("ReduceMean", "ReduceMaxi", "(ReduceMaxi): this operator on activations [B, S, 32]"),
        // A mask that sees what comes after.
        ("LessOrEqual", "GreaterOrEq", "GreaterOrEq"),
        ("Cos", "Sin", "is part of no decoder"),
        ("input_ids", "input_idx", "its input `input_idx` of type I64 and 2 axes is none that a decoder has"),
    ] {
        let said = changed(dir.path(), script, from.as_bytes(), to.as_bytes());
        assert!(said.contains(why) && said.contains("hint: "), "{from}: {said}");
    }
}

#[test]
fn what_attention_of_half_floats_lacks_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for (from, to, why) in [
        ("num_heads", "num_headz", "(MultiHeadAttention): no number of heads"),
        // The name of the stored tensor alone.
        ("B\u{9}sin_cache", "B\u{9}xin_cache", "its input `sin_cache` is made by no node before it"),
    ] {
        let said = changed(dir.path(), "genai-llama-fp16", from.as_bytes(), to.as_bytes());
        assert!(said.contains(why) && said.contains("hint: "), "{from}: {said}");
    }
}

#[test]
fn damaged_models_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(data("onnx/torch-script-qwen3-sdpa/model.onnx")).unwrap();
    for len in [1, 3, 4, 40, 1000, whole.len() / 2, whole.len() - 1] {
        refused(dir.path(), &whole[..len]);
    }
    assert!(refused(dir.path(), b"\x08\x08nothing of the kind").contains("this is no ONNX model"));
    // External data: of an export of qrmc, whose weights lie in a second file.
    ok(
        dir.path(),
        &["export", data("fixtures/llama-mha-tied").to_str().unwrap(), "--format", "onnx", "-o", "out"],
    );
    let (model, side) = (dir.path().join("out/model.onnx"), dir.path().join("out/model.onnx.data"));
    let tensors = std::fs::read(&side).unwrap();
    let said = |what: &str| {
        let said = run(dir.path(), &["inspect", "out"]);
        assert!(said.code == 1 && said.err.contains(what), "{what}: {}", said.err);
    };
    std::fs::write(&side, &tensors[..tensors.len() - 5000]).unwrap();
    said("of `model.onnx.data`, which has");
    std::fs::remove_file(&side).unwrap();
    said("lies in another file");
    let graph = std::fs::read(&model).unwrap();
    let name = b"model.onnx.data";
    let at: Vec<usize> = (0..graph.len() - name.len()).filter(|&i| graph[i..].starts_with(name)).collect();
    for (path, what) in
        [(b"../../../../etc", "outside of the model's folder"), (b"/etc/passwd\0\0\0\0", "lies")]
    {
        let mut other = graph.clone();
        at.iter().for_each(|&i| other[i..i + path.len()].copy_from_slice(path));
        std::fs::write(&model, &other).unwrap();
        said(what);
    }
}
