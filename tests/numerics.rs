//! Engine and interpreter against values that transformers computed.

use qrmc_ir::{Engine, interp};
use qrmc_runtime::engine::CpuEngine;

use crate::support::{FIXTURES, Reference, gap, import, main_args};

#[test]
fn fixtures_match_transformers() {
    let engine = CpuEngine::new(2).unwrap();
    for name in FIXTURES {
        let model = import(&format!("fixtures/{name}"));
        let reference = Reference::open(name);
        let main = model.module.func(model.module.find_func("main").unwrap());
        for (ids, logits) in [("input_ids", "logits"), ("input_ids_long", "logits_long")] {
            let args = main_args(&model.module, &reference.get(ids));
            let refs: Vec<_> = args.iter().collect();
            let have = engine.run(&model.module, main, &*model.source.weights, &refs).unwrap();
            let want = reference.get(logits);
            // The long reference holds the last positions only.
            let (rows, vocab) = (want.shape()[1], want.shape()[2]);
            let have = last_rows(&have[0], rows, vocab);
            let (diff, size) = gap(&have, &want);
            assert!(diff <= 1e-4, "{name} {logits}: off by {diff} of {size}");
        }
    }
}

fn last_rows(t: &qrmc_ir::Tensor, rows: usize, width: usize) -> qrmc_ir::Tensor {
    let (b, s) = (t.shape()[0], t.shape()[1]);
    let data = t.as_f32().unwrap();
    let cut = (0..b).flat_map(|i| data[(i * s + s - rows) * width..(i + 1) * s * width].to_vec()).collect();
    qrmc_ir::Tensor::f32([b, rows, width], cut)
}

#[test]
fn interpreter_is_the_same_function() {
    let engine = CpuEngine::new(2).unwrap();
    for name in FIXTURES {
        let model = import(&format!("fixtures/{name}"));
        let reference = Reference::open(name);
        let main = model.module.func(model.module.find_func("main").unwrap());
        let args = main_args(&model.module, &reference.get("input_ids"));
        let want = interp::run(&model.module, main, &*model.source.weights, &args, &main.results).unwrap();
        let (diff, _) = gap(&want[0], &reference.get("logits"));
        assert!(diff <= 1e-4, "{name}: the interpreter is off by {diff}");
        let refs: Vec<_> = args.iter().collect();
        let have = engine.run(&model.module, main, &*model.source.weights, &refs).unwrap();
        for (h, w) in have.iter().zip(&want) {
            let (diff, size) = gap(h, w);
            assert!(
                diff <= 2e-5 * size.max(1.0),
                "{name}: engine and interpreter differ by {diff} of {size}"
            );
        }
    }
}

#[test]
fn named_values_match_transformers() {
    for name in FIXTURES {
        let model = import(&format!("fixtures/{name}"));
        let reference = Reference::open(name);
        let layer = model.module.func(model.module.find_func("layer0").unwrap());
        let x = reference.get("hidden.0");
        let width = (model.module.facts.kv_heads * model.module.facts.head_dim) as usize;
        let s = x.shape()[1];
        let empty = qrmc_ir::Tensor::zeros([1, 0, width]);
        let args = [x, qrmc_ir::Tensor::i32([s], (0..s as i32).collect()), empty.clone(), empty];
        let probes =
            [("attn_in", "L0.attn_in"), ("o_in", "L0.o_in"), ("mlp_in", "L0.mlp_in"), ("y", "hidden.1")];
        let wanted: Vec<_> = probes.iter().map(|(v, _)| layer.find(v).unwrap()).collect();
        let have = interp::run(&model.module, layer, &*model.source.weights, &args, &wanted).unwrap();
        for (h, (v, r)) in have.iter().zip(probes) {
            let (diff, size) = gap(h, &reference.get(r));
            assert!(diff <= 2e-5 * size.max(1.0), "{name} %{v}: off by {diff} of {size}");
        }
    }
}

#[test]
fn thread_count_does_not_show() {
    let model = import("fixtures/qwen2-bias-tied");
    let reference = Reference::open("qwen2-bias-tied");
    let main = model.module.func(model.module.find_func("main").unwrap());
    let args = main_args(&model.module, &reference.get("input_ids_long"));
    let refs: Vec<_> = args.iter().collect();
    let run = |threads| {
        CpuEngine::new(threads).unwrap().run(&model.module, main, &*model.source.weights, &refs).unwrap()
    };
    assert_eq!(run(1), run(2));
    assert_eq!(run(2), run(3));
}
