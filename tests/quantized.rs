//! Quantized checkpoints as their own tools write them: integers, scales, logits (`tests/data/quantized`).

use qrmc_frontends::{Imported, Integers};
use qrmc_ir::{Data, Elem, Engine, Op, Tensor, WeightSource, interp, verify};
use qrmc_lowering::artefact::Artefact;
use qrmc_runtime::engine::CpuEngine;

use crate::run::{ok, run};
use crate::support::{Reference, data, gap, main_args};

/// Each fixture, the scheme of its matrices, and how far logits may be off. Rounding of inputs is found from floats that
/// differ in their last bits, so a value near the middle of two codes may fall to the other.
const FORMATS: [(&str, &str, f32); 13] = [
    ("awq-g32", "u4<group:32, f16, zero>", 1e-4),
    ("awq-row-old", "u4<row, f16, zero>", 1e-4),
    ("gptq-w4-sym-old", "i4<group:32, f16>", 1e-4),
    ("gptq-w4-asym", "u4<group:32, f16, zero>", 1e-4),
    ("gptq-w3-asym", "u3<group:32, bf16, zero>", 1e-4),
    ("gptq-v2-w8-actorder", "f32", 1e-4),
    ("gptq-v2-w2-head", "u2<group:32, f16, zero>", 1e-4),
    ("ct-pack-w4", "i4<group:32, bf16>", 1e-4),
    ("ct-pack-w3-asym", "u3<row, f16, zero>", 1e-4),
    ("ct-int-w8a8", "i8<row, bf16>", 2e-2),
    ("ct-int-w8a8-static", "i8<row, f16>", 2e-2),
    ("ct-int-w8a8-static-asym", "i8<row, bf16>", 2e-2),
    ("ct-naive-w5-asym", "u5<group:64, f16, zero>", 1e-4),
];
/// The matrix of which a fixture holds the integers.
const NAMED: &str = "model.layers.1.mlp.down_proj.weight";

fn import(name: &str, integers: Integers) -> Imported {
    qrmc_frontends::import(&data("quantized").join(name), integers).unwrap()
}

fn reference(name: &str) -> Reference {
    Reference::open(&format!("../quantized/{name}"))
}

fn logits(model: &Imported, reference: &Reference, engine: &CpuEngine) -> Tensor {
    let main = model.module.func(model.module.find_func("main").unwrap());
    let args = main_args(&model.module, &reference.get("input_ids"));
    let refs: Vec<_> = args.iter().collect();
    engine.run(&model.module, main, &*model.source.weights, &refs).unwrap().swap_remove(0)
}

/// `code - zero` of a weight, and its scales.
fn steps(weights: &dyn WeightSource, name: &str) -> (Vec<f32>, Vec<f32>) {
    let floats = |t: Tensor| -> Vec<f32> {
        match t.data() {
            Data::U8(v) => v.iter().map(|&x| f32::from(x)).collect(),
            Data::I8(v) => v.iter().map(|&x| f32::from(x)).collect(),
            _ => t.as_f32().unwrap().to_vec(),
        }
    };
    let codes = floats(weights.read(&format!("{name}.codes")).unwrap());
    let scale = floats(weights.read(&format!("{name}.scale")).unwrap());
    let run = codes.len() / scale.len();
    let zero = weights.read(&format!("{name}.zero")).map_or(vec![0.0; scale.len()], floats);
    (codes.iter().enumerate().map(|(i, c)| c - zero[i / run]).collect(), scale)
}

#[test]
fn logits_are_those_of_torch() {
    let engine = CpuEngine::new(2).unwrap();
    for (name, _, bound) in FORMATS {
        let reference = reference(name);
        let want = reference.get("logits");
        for integers in [Integers::Keep, Integers::Dequantize] {
            if integers == Integers::Dequantize && name.starts_with("ct-int-w8a8") {
                continue;
            }
            let model = import(name, integers);
            verify(&model.module).unwrap();
            let (diff, size) = gap(&logits(&model, &reference, &engine), &want);
            assert!(diff <= bound * size, "{name} {integers:?}: off by {diff} of {size}");
        }
        let model = import(name, Integers::Keep);
        let main = model.module.func(model.module.find_func("main").unwrap());
        let args = main_args(&model.module, &reference.get("input_ids"));
        let have = interp::run(&model.module, main, &*model.source.weights, &args, &main.results).unwrap();
        let (diff, size) = gap(&have[0], &want);
        assert!(diff <= bound * size, "{name}: the interpreter is off by {diff} of {size}");
    }
}

#[test]
fn integers_and_scales_are_those_that_were_packed() {
    for (name, scheme, _) in FORMATS {
        let reference = reference(name);
        let (want, scale) = (reference.get("steps"), reference.get("scale"));
        let (want, scale) = (want.as_f32().unwrap(), scale.as_f32().unwrap());
        let model = import(name, Integers::Keep);
        let ty = |n: &str| model.module.find_weight(n).map(|id| model.module.weight(id).ty.elem.to_string());
        if scheme == "f32" {
            assert_eq!(ty(NAMED).as_deref(), Some(scheme), "{name}");
            continue;
        }
        assert_eq!(ty(&format!("{NAMED}.codes")).as_deref(), Some(scheme), "{name}");
        let (have, scales) = steps(&*model.source.weights, NAMED);
        assert!(have == want, "{name}: other integers than were packed");
        assert_eq!(scales, scale, "{name}");
        // As floats, the same weight is one product of these, rounded once.
        let floats = import(name, Integers::Dequantize).source.weights.read(NAMED).unwrap();
        let run = want.len() / scale.len();
        let values: Vec<f32> = want.iter().enumerate().map(|(i, s)| s * scale[i / run]).collect();
        assert_eq!(floats.as_f32().unwrap(), values, "{name}");
    }
}

#[test]
fn what_is_lent_is_what_is_read() {
    for (name, ..) in FORMATS {
        let weights = import(name, Integers::Keep).source.weights;
        for (tensor, ty) in weights.tensors() {
            let raw = weights.raw(&tensor).unwrap();
            assert_eq!((raw.ty.clone(), Some(raw.bytes.len())), (ty.clone(), ty.bytes()), "{name} {tensor}");
            if let Some(lent) = weights.shared(&tensor).unwrap() {
                assert_eq!(*lent, *raw.bytes, "{name} {tensor}");
            }
        }
    }
}

#[test]
fn layers_that_are_left_out_stay_floats_and_heads_may_be_codes() {
    let elem = |fixture: &str, name: &str| {
        let m = import(fixture, Integers::Keep).module;
        m.find_weight(name).map(|id| m.weight(id).ty.elem)
    };
    for skipped in ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj", "lm_head"] {
        assert_eq!(elem("ct-pack-w4", &format!("{skipped}.weight")), Some(Elem::BF16), "{skipped}");
    }
    assert!(matches!(elem("gptq-v2-w2-head", "lm_head.weight.codes"), Some(Elem::Quant(_))));
    assert_eq!(elem("gptq-v2-w2-head", "model.embed_tokens.weight"), Some(Elem::F16));
    assert_eq!(elem("awq-row-old", "model.layers.0.self_attn.q_proj.bias"), Some(Elem::F16));
}

#[test]
fn a_stored_scale_of_an_input_is_shared_by_its_readers() {
    for (name, spec) in
        [("ct-int-w8a8-static", "i8<tensor, f16>"), ("ct-int-w8a8-static-asym", "u8<tensor, bf16, zero>")]
    {
        let Imported { module, source } = import(name, Integers::Keep);
        for f in module.layers().into_iter().map(|l| module.func(l)) {
            let casts: Vec<_> = f.nodes.iter().filter(|n| matches!(n.op, Op::QCast(_))).collect();
            assert_eq!(casts.len(), 4, "{name}: q, k and v share one, and gate and up");
            for n in casts {
                let Op::QCast(have) = n.op else { continue };
                assert_eq!(have.to_string(), spec);
            }
        }
        let of = |part: &str| module.weights().iter().filter(|w| w.name.ends_with(part)).count();
        let layers = module.layers().len();
        let zeros = if name.ends_with("asym") { 4 * layers } else { 0 };
        assert_eq!((of(".input_scale"), of(".input_zero_point")), (4 * layers, zeros), "{name}");
        let scale = "model.layers.0.self_attn.q_proj.input_scale";
        assert!(source.weights.read(scale).unwrap().as_f32().unwrap()[0] > 0.0);
    }
}

#[test]
fn notes_say_what_was_not_kept() {
    let notes = |name, integers| import(name, integers).source.notes.join("\n");
    assert_eq!(notes("gptq-w4-asym", Integers::Keep), "");
    let order = notes("gptq-v2-w8-actorder", Integers::Keep);
    assert!(order.contains("14 matrices") && order.contains("act-order"), "{order}");
    assert!(notes("awq-g32", Integers::Dequantize).contains("passes start from floats"));
    assert!(notes("ct-int-w8a8", Integers::Dequantize).contains("rounding of inputs"));
}

#[test]
fn inputs_are_rounded_once_for_the_layers_that_share_them() {
    let m = import("ct-int-w8a8", Integers::Keep).module;
    let text = qrmc_ir::print_func(&m, m.func(m.find_func("layer0").unwrap()));
    let rounds = "fake_quant %attn_in {q = u8<token, f32, zero>, rule = dynamic}";
    assert_eq!(text.matches(rounds).count(), 1, "{text}");
    assert_eq!(text.matches("fake_quant").count(), 4, "{text}");
    let head = qrmc_ir::print_func(&m, m.func(m.find_func("head").unwrap()));
    assert!(!head.contains("fake_quant"), "{head}");
}

#[test]
fn a_conversion_keeps_every_integer() {
    for (name, scheme, _) in FORMATS {
        let dir = tempfile::tempdir().unwrap();
        let model = data("quantized").join(name);
        if scheme == "f32" {
            // Nothing of it can be kept, and floats of 32 bits are no conversion.
            let s = run(dir.path(), &["compile", model.to_str().unwrap(), "-o", "out"]);
            assert!(s.code == 2 && s.err.contains("act-order") && s.err.contains("--pass"), "{}", s.err);
            continue;
        }
        ok(dir.path(), &["compile", model.to_str().unwrap(), "-o", "out"]);
        let (artefact, source) =
            (Artefact::map(&dir.path().join("out")).unwrap(), import(name, Integers::Keep));
        assert_eq!(artefact.module.weights().len(), source.module.weights().len(), "{name}");
        for w in source.module.weights() {
            let have = artefact.raw(&w.name).unwrap();
            let want = source.source.weights.raw(&w.name).unwrap();
            assert!(have.ty == want.ty && have.bytes == want.bytes, "{name}: {} changed", w.name);
        }
        assert!(artefact.module.history.is_empty());
        let parity = ok(dir.path(), &["check", "out", "--parity"]);
        assert!(parity.contains("linear"), "{parity}");
        // Passes start from the floats, and say so.
        let s = run(
            dir.path(),
            &["compile", model.to_str().unwrap(), "--pass", "rtn:bits=4,group=32", "-o", "o2"],
        );
        assert_eq!(s.code, 0, "{name}: {}", s.err);
        assert!(s.err.contains("de-quantized"), "{}", s.err);
    }
}

#[test]
fn a_quantized_checkpoint_becomes_an_ordinary_one() {
    let dir = tempfile::tempdir().unwrap();
    let model = data("quantized").join("awq-g32");
    ok(dir.path(), &["compile", model.to_str().unwrap(), "--emit", "fake", "-o", "fake"]);
    let config = std::fs::read_to_string(dir.path().join("fake/config.json")).unwrap();
    assert!(!config.contains("quantization_config"), "{config}");
    let plain = qrmc_frontends::import(&dir.path().join("fake"), Integers::Keep).unwrap();
    let want = import("awq-g32", Integers::Dequantize).source.weights.read(NAMED).unwrap();
    let want: Vec<f32> = want.as_f32().unwrap().iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
    assert_eq!(plain.source.weights.read(NAMED).unwrap().as_f32().unwrap(), want);
    // Rounded inputs have no place in it.
    let model = data("quantized").join("ct-int-w8a8");
    let s = run(dir.path(), &["compile", model.to_str().unwrap(), "--emit", "fake", "-o", "no"]);
    assert_eq!(s.code, 4, "{}", s.err);
}

#[test]
fn floats_without_passes_are_still_nothing_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let s = run(dir.path(), &["compile", "-o", "out"]);
    assert_eq!(s.code, 2, "{}", s.err);
    assert!(s.err.contains("nothing to do"), "{}", s.err);
}
