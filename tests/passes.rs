//! Passes keep what they promise, and the check finds out when they do not.

use std::sync::Arc;

use insta::assert_snapshot;
use qrmc_ir::{Op, Tensor, WeightSource, print_func, rewrite, verify};
use qrmc_passes::{
    Calibration, LayerLoss, Manager, NoStore, PassCx, PassReport, Pipeline, Report, Unit, compare_logits,
    expand_presets, parse_pipeline, seeded_tokens,
};
use qrmc_runtime::engine::CpuEngine;

use crate::support::{FIXTURES, Source, TINY, import};

#[derive(Default)]
pub(crate) struct Losses(pub(crate) Vec<(String, LayerLoss)>);

impl Report for Losses {
    fn progress(&mut self, _: &str, _: usize, _: usize, _: &str) {}
    fn loss(&mut self, pass: &str, loss: LayerLoss) {
        self.0.push((pass.to_owned(), loss));
    }
    fn flops(&mut self, _: &str, _: f64) {}
}

/// Windows of seeded tokens, for models without a text of their own.
pub(crate) fn windows(vocab: u64, n: usize, len: usize) -> Calibration {
    let windows =
        (0..n).map(|i| seeded_tokens(i as u64 + 1, len, vocab).as_i32().unwrap().to_vec()).collect();
    Calibration { windows, description: "seeded".into() }
}

pub(crate) fn pipeline(text: &str) -> Pipeline {
    expand_presets(&parse_pipeline(text).unwrap(), 1).unwrap()
}

/// Compiles a model in memory, with every check on.
pub(crate) fn compile(name: &str, text: &str, calibration: &Calibration) -> (Unit, Vec<PassReport>, Losses) {
    run(name, &pipeline(text), calibration)
}

/// As [`compile`], without presets, and without placing what is inserted.
pub(crate) fn compile_raw(
    name: &str,
    text: &str,
    calibration: &Calibration,
) -> (Unit, Vec<PassReport>, Losses) {
    run(name, &parse_pipeline(text).unwrap(), calibration)
}

fn run(name: &str, pipeline: &Pipeline, calibration: &Calibration) -> (Unit, Vec<PassReport>, Losses) {
    let model = import(name);
    let engine = CpuEngine::new(2).unwrap();
    let mut unit = Unit::new(model.module, Arc::new(Source(model.source.weights)));
    let mut losses = Losses::default();
    let mut cx = PassCx {
        engine: &engine,
        calibration: Some(calibration),
        store: Arc::new(NoStore),
        source_key: name.into(),
        report: &mut losses,
    };
    let reports = Manager { check: true, seed: 7, after: &mut |_, _| {} }
        .run(&mut unit, pipeline, &mut cx)
        .unwrap_or_else(|e| panic!("{name} {pipeline}: {e}"));
    (unit, reports, losses)
}

#[test]
fn every_transform_keeps_the_function() {
    for name in FIXTURES {
        let model = format!("fixtures/{name}");
        let calibration = windows(256, 4, 64);
        let (unit, reports, _) =
            compile(&model, "fuse-norm,scale{w=4,group=8},place-transforms,annotate{group=8}", &calibration);
        for r in &reports {
            let gap = r.gap.unwrap();
            assert!(gap.relative < 1e-5, "{name} {}: {gap:?}", r.pass);
        }
        verify(&unit.module).unwrap();
    }
}

#[test]
fn placed_scales_cost_nothing_online() {
    // MHA: the scale before o_proj passes attention into the values, through the cache.
    for (name, edges) in [("llama-mha-tied", 4), ("qwen2-bias-tied", 3), ("qwen3-qknorm", 3)] {
        let calibration = windows(256, 4, 64);
        let model = format!("fixtures/{name}");
        let (plain, ..) = compile_raw(&model, "scale{w=4,group=8}", &calibration);
        let (placed, ..) = compile(&model, "scale{w=4,group=8},place-transforms", &calibration);
        let online = |u: &Unit| {
            let f = u.module.func(u.module.layers()[0]);
            let derived = f.weight_derived();
            let is = |n: &&qrmc_ir::Node| {
                n.op == Op::Binary(qrmc_ir::BinaryOp::Div) && !derived[n.outs[0].0 as usize]
            };
            f.nodes.iter().filter(is).count()
        };
        assert_eq!(online(&plain), edges, "{name}");
        assert_eq!(
            online(&placed),
            0,
            "{name}\n{}",
            print_func(&placed.module, placed.module.func(placed.module.layers()[0]))
        );
    }
}

#[test]
fn a_broken_half_is_found() {
    let calibration = windows(256, 4, 64);
    let engine = CpuEngine::new(2).unwrap();
    for text in ["scale{w=4,group=8}", "scale{w=4,group=8},place-transforms"] {
        let (unit, ..) = compile_raw("fixtures/qwen2-bias-tied", text, &calibration);
        let source = import("fixtures/qwen2-bias-tied").module;
        let ids = seeded_tokens(3, 32, 256);
        let layer = unit.module.layers()[1];
        let f = unit.module.func(layer);
        let scaled: Vec<usize> = f
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, n)| matches!(n.op, Op::Binary(qrmc_ir::BinaryOp::Mul | qrmc_ir::BinaryOp::Div)))
            .filter(|(_, n)| {
                f.as_weight(n.ins[1]).is_some_and(|w| unit.module.weight(w).name.ends_with(".scale"))
            })
            .map(|(at, _)| at)
            .collect();
        assert!(scaled.len() >= 6, "{text}: {scaled:?}");
        for at in scaled {
            // Leave out this one half.
            let outs = f.nodes[at].outs.clone();
            let mut broken = unit.module.clone();
            broken.funcs[layer.0 as usize] =
                rewrite(&unit.module, f, |_, node, ins| Ok((node.outs == outs).then(|| vec![ins[0]])))
                    .unwrap();
            let gap = compare_logits(&engine, &source, &broken, &unit.weights, &ids).unwrap();
            assert!(gap.relative > 1e-3, "{text}: half {at} is not missed: {gap:?}");
        }
        let gap = compare_logits(&engine, &source, &unit.module, &unit.weights, &ids).unwrap();
        assert!(gap.relative < 1e-5, "{text}: {gap:?}");
    }
}

#[test]
fn golden_one_layer_of_awq() {
    let calibration = windows(256, 2, 32);
    let model = "fixtures/qwen2-bias-tied";
    for (name, text) in [
        ("scale", "scale{w=4,group=8}"),
        ("place", "scale{w=4,group=8},place-transforms"),
        ("annotate", "scale{w=4,group=8},place-transforms,annotate{group=8,rule=awq}"),
        ("clip", "scale{w=4,group=8},place-transforms,annotate{group=8,rule=awq},clip-search"),
        ("rtn", "awq{bits=4,group=8}"),
    ] {
        let (unit, ..) = run(
            model,
            &if name == "rtn" { pipeline(text) } else { parse_pipeline(text).unwrap() },
            &calibration,
        );
        let f = unit.module.func(unit.module.layers()[0]);
        assert_snapshot!(format!("awq_{name}"), print_func(&unit.module, f));
    }
}

#[test]
fn golden_one_layer_of_gptq() {
    let (unit, ..) = compile("fixtures/qwen2-bias-tied", "gptq{bits=4,group=8}", &windows(256, 2, 32));
    assert_snapshot!("gptq", print_func(&unit.module, unit.module.func(unit.module.layers()[0])));
}

#[test]
fn golden_import_and_fused_norms() {
    let calibration = windows(256, 1, 8);
    for name in ["llama-mha-tied", "qwen2-bias-untied", "qwen3-qknorm"] {
        let model = import(&format!("fixtures/{name}"));
        assert_snapshot!(format!("import_{name}"), print_func(&model.module, &model.module.funcs[1]));
    }
    let (unit, ..) = compile("fixtures/llama-mha-tied", "fuse-norm", &calibration);
    let text: String = [1, 3].iter().map(|&i| print_func(&unit.module, &unit.module.funcs[i])).collect();
    assert_snapshot!("fuse_norm_llama-mha-tied", text);
}

#[test]
fn golden_program() {
    let model = import("fixtures/qwen2-bias-tied");
    let p = qrmc_lowering::lower_func(&model.module, &model.module.funcs[1], &qrmc_lowering::Cpu).unwrap();
    assert_snapshot!("program_qwen2-bias-tied", p.to_string());
    let recipe = "rtn{bits=4,group=8,a=8,kv=4}";
    let (unit, ..) = compile("fixtures/qwen2-bias-tied", recipe, &windows(256, 1, 8));
    let layer = unit.module.func(unit.module.layers()[0]);
    let p = qrmc_lowering::lower_func(&unit.module, layer, &qrmc_lowering::Cpu).unwrap();
    assert_snapshot!("program_of_codes", p.to_string());
}

#[test]
fn searches_lower_the_loss() {
    let (_, _, losses) = compile(TINY, "awq{bits=3}", &crate::support::tiny_calibration(4, 128));
    assert_eq!(losses.0.len(), 4 * (3 + 5));
    for (pass, l) in &losses.0 {
        assert!(l.after <= l.before, "{pass} {l:?}");
    }
    let mean = |p: &str| {
        let shares: Vec<f64> =
            losses.0.iter().filter(|(n, _)| n == p).map(|(_, l)| l.after / l.before).collect();
        shares.iter().sum::<f64>() / shares.len() as f64
    };
    assert!(mean("scale") < 0.95 && mean("clip-search") < 0.9, "{} {}", mean("scale"), mean("clip-search"));
}

#[test]
fn materialised_weights_are_the_interpreters() {
    use qrmc_ir::interp;
    let calibration = windows(256, 2, 32);
    let (unit, ..) = compile("fixtures/qwen2-bias-tied", "awq{bits=3,group=16}", &calibration);
    let engine = CpuEngine::new(2).unwrap();
    let plan = qrmc_lowering::materialize::plan(verify(&unit.module).unwrap()).unwrap();
    let mut tensors = std::collections::HashMap::new();
    let mut put = |t: &qrmc_lowering::artefact::TensorPlan, bytes: &[u8]| {
        tensors.insert(t.name.clone(), bytes.to_vec());
        Ok(())
    };
    plan.run(&engine, &unit.weights, &mut put).unwrap();
    // The same codes, bit for bit, from the interpreter on the graph before.
    let f = unit.module.func(unit.module.layers()[1]);
    let mut seen = 0;
    for node in f.nodes.iter().filter(|n| matches!(n.op, Op::QCast(_))) {
        let Op::QCast(spec) = node.op else { unreachable!() };
        let sub = qrmc_ir::extract(&unit.module, f, "codes", &[], &node.outs).unwrap();
        let codes = interp::run(&unit.module, &sub, &unit.weights, &[], &sub.results).unwrap().remove(0);
        let bytes = qrmc_ir::pack::pack(&codes, spec).unwrap();
        assert!(tensors.iter().any(|(n, b)| n.contains("layers.1.") && n.ends_with(".codes") && *b == bytes));
        seen += 1;
    }
    assert_eq!(seen, 7);
    let _: Tensor = unit.weights.read("model.norm.weight").unwrap();
}
