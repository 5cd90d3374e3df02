//! GPTQ on whole models: what it leaves in the place of annotated weights, and what that is worth.

use std::sync::{Arc, Mutex};

use qrmc_ir::{Elem, Hash, Op, Tensor, print_func, verify};
use qrmc_passes::{Calibration, Manager, PassCx, StepStore, Unit};
use qrmc_runtime::engine::CpuEngine;

use crate::passes::{Losses, compile, pipeline, windows};
use crate::run::ok;
use crate::support::{FIXTURES, Source, TINY, import, tiny_calibration};

#[test]
fn the_artefact_is_laid_out_as_after_rtn() {
    for (name, options) in FIXTURES
        .iter()
        .flat_map(|n| ["bits=4,group=8", "bits=3,group=row,sym=true", "group=16,scale=f16"].map(|o| (n, o)))
    {
        let model = format!("fixtures/{name}");
        let calibration = windows(256, 2, 32);
        let layout = |method: &str| {
            let (unit, ..) = compile(&model, &format!("{method}{{{options}}}"), &calibration);
            let plan = qrmc_lowering::materialize::plan(verify(&unit.module).unwrap()).unwrap();
            let text: String = plan.module.funcs.iter().map(|f| print_func(&plan.module, f)).collect();
            let tensors: Vec<_> = plan.tensors().into_iter().map(|t| (t.name, t.ty)).collect();
            (text, tensors)
        };
        assert!(layout("gptq") == layout("rtn"), "{name} {options}");
    }
}

#[test]
fn codes_of_the_step_are_those_of_the_artefact() {
    let (unit, ..) =
        compile("fixtures/qwen2-bias-tied", "gptq{bits=3,group=16,order=false}", &windows(256, 2, 32));
    let engine = CpuEngine::new(2).unwrap();
    let plan = qrmc_lowering::materialize::plan(verify(&unit.module).unwrap()).unwrap();
    let mut written = std::collections::HashMap::new();
    plan.run(&engine, &unit.weights, &mut |t, bytes| {
        written.insert(t.name.clone(), bytes.to_vec());
        Ok(())
    })
    .unwrap();
    let mut seen = 0;
    for w in unit.module.weights().iter().filter(|w| matches!(w.ty.elem, Elem::Quant(_))) {
        use qrmc_ir::WeightSource;
        let codes = unit.weights.read(&w.name).unwrap();
        let Elem::Quant(spec) = w.ty.elem else { unreachable!() };
        assert_eq!(written[&w.name], qrmc_ir::pack::pack(&codes, spec).unwrap());
        seen += 1;
    }
    assert_eq!(seen, 14);
    // No annotated weight is left, and no float one is read.
    let f = unit.module.func(unit.module.layers()[1]);
    assert!(!f.nodes.iter().any(|n| matches!(n.op, Op::FakeQuant(..))));
}

/// Keeps results, in order.
#[derive(Default)]
struct Memory(Mutex<Vec<Step>>);

type Step = (Hash, Vec<(String, Tensor)>);

impl StepStore for Memory {
    fn get(&self, key: &Hash) -> Option<Vec<(String, Tensor)>> {
        self.0.lock().unwrap().iter().find(|(k, _)| k == key).map(|(_, t)| t.clone())
    }
    fn put(&self, key: &Hash, tensors: &[(String, Tensor)]) -> Result<(), String> {
        self.0.lock().unwrap().push((*key, tensors.to_vec()));
        Ok(())
    }
    fn forget(&self, key: &Hash) {
        self.0.lock().unwrap().retain(|(k, _)| k != key);
    }
}

fn with_store(name: &str, text: &str, calibration: &Calibration, store: Arc<Memory>, threads: usize) -> Unit {
    let model = import(name);
    let engine = CpuEngine::new(threads).unwrap();
    let mut unit = Unit::new(model.module, Arc::new(Source(model.source.weights)));
    let mut cx = PassCx {
        engine: &engine,
        calibration: Some(calibration),
        store,
        source_key: name.into(),
        report: &mut Losses::default(),
    };
    Manager { check: true, seed: 7, after: &mut |_, _| {} }.run(&mut unit, &pipeline(text), &mut cx).unwrap();
    unit
}

#[test]
fn a_lost_stream_is_computed_again_with_the_same_bits() {
    // A layer in parts, with inputs kept between them, gives what the whole layer gives.
    for (name, vocab) in [("fixtures/qwen2-bias-tied", 256), ("fixtures/qwen3-qknorm", 256), (TINY, 1000)] {
        let calibration = windows(vocab, 5, 48);
        let store = Arc::new(Memory::default());
        with_store(name, "gptq{bits=3,group=8}", &calibration, store.clone(), 2);
        let first = store.0.lock().unwrap().clone();
        assert!(first.len() >= 2, "one step for each layer, and no stream");
        // Of the last layer nothing is left, and of the others only their results.
        store.0.lock().unwrap().pop();
        with_store(name, "gptq{bits=3,group=8}", &calibration, store.clone(), 1);
        assert!(*store.0.lock().unwrap() == first, "{name}");
    }
}

#[test]
fn errors_that_are_moved_lower_the_loss() {
    for bits in [3, 4] {
        let (_, _, losses) = compile(TINY, &format!("gptq{{bits={bits}}}"), &tiny_calibration(8, 128));
        assert_eq!(losses.0.len(), 4 * 7);
        let shares: Vec<f64> = losses.0.iter().map(|(_, l)| l.after / l.before).collect();
        assert!(shares.iter().all(|s| *s < 1.0), "W{bits}: {shares:?}");
        let mean = shares.iter().sum::<f64>() / shares.len() as f64;
        assert!(mean < 0.7, "W{bits}: {mean}");
    }
}

#[test]
fn perplexity_is_below_that_of_rounding_to_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let perplexity = |method: &str, extra: &[&str]| {
        let args = [&["compile", "--pass", method, "--no-check", "-o", "out"], extra].concat();
        ok(dir.path(), &args);
        let out = ok(dir.path(), &["eval", "out", "--windows", "8", "--json"]);
        let v: serde_json::Value = serde_json::from_str(&out).unwrap();
        v["perplexity"].as_f64().unwrap()
    };
    let gptq = perplexity("gptq:bits=3", &["--nsamples", "16", "--seqlen", "256"]);
    let rtn = perplexity("rtn:bits=3", &[]);
    assert!(gptq < 0.98 * rtn, "{gptq} against {rtn}");
}

#[test]
fn what_it_does_not_round_is_refused() {
    let refused = |text: &str| {
        let model = import("fixtures/qwen2-bias-tied");
        let engine = CpuEngine::new(1).unwrap();
        let mut unit = Unit::new(model.module, Arc::new(Source(model.source.weights)));
        let calibration = windows(256, 1, 16);
        let mut cx = PassCx {
            engine: &engine,
            calibration: Some(&calibration),
            store: Arc::new(qrmc_passes::NoStore),
            source_key: String::new(),
            report: &mut Losses::default(),
        };
        let mut manager = Manager { check: false, seed: 0, after: &mut |_, _| {} };
        manager.run(&mut unit, &pipeline(text), &mut cx).unwrap_err().to_string()
    };
    let said = refused("annotate{group=8,rule=awq},gptq");
    assert!(said.contains("rule `awq`"), "{said}");
    let said = refused("annotate{group=8},gptq{damp=1.5}");
    assert!(said.contains("damp is 1.5"), "{said}");
    let said = refused("annotate{group=8},gptq{block=0}");
    assert!(said.contains("block is 0"), "{said}");
    let said = refused("annotate{group=8},gptq{order=true,stale=true}");
    assert!(said.contains("order and stale"), "{said}");
    let said = refused("gptq{group=8},rtn");
    assert!(said.contains("takes a module that is annotated"), "{said}");
}
