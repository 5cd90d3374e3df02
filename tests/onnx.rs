//! Exports to ONNX: what every method leaves has a form there, and how the command writes it. What onnxruntime computes
//! is asked by `tests/clients/onnx_export.py`.

use std::path::Path;

use qrmc_ir::verify;
use qrmc_lowering::export::onnx::{self, Form, Options};
use qrmc_runtime::engine::CpuEngine;

use crate::passes::{compile, windows};
use crate::run::{ok, run};
use crate::support::{FIXTURES, Source, Stored, data, import};

fn files(folder: &Path) -> (Vec<u8>, Vec<u8>) {
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    (read(onnx::MODEL), read(onnx::DATA))
}

#[test]
fn every_family_and_method_is_exported() {
    let dir = tempfile::tempdir().unwrap();
    for name in FIXTURES {
        let model = import(&format!("fixtures/{name}"));
        let source = Source(model.source.weights);
        for form in [Form::Qdq, Form::Ort] {
            onnx::write(verify(&model.module).unwrap(), &source, dir.path(), &Options { form }).unwrap();
        }
    }
    let engine = CpuEngine::new(2).unwrap();
    for text in [
        "awq{bits=3,group=16}",
        "gptq{bits=4,group=8,head=8}",
        "rtn{bits=8,group=row,sym=true,a=8,kv=8}",
        "smoothquant",
        "kvquant{bits=4}",
        "quarot",
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
        for form in [Form::Qdq, Form::Ort] {
            let module = verify(&plan.module).unwrap();
            onnx::write(module, &stored, dir.path(), &Options { form })
                .unwrap_or_else(|e| panic!("{text}: {e}"));
            let (model, tensors) = files(dir.path());
            // Codes stay codes: twice their size are 3 bits in 4, or `f16` scales in `f32`; 64 KiB, tables and gaps.
            let most = 2 * plan.tensors().iter().map(|t| t.bytes()).sum::<u64>() + (1 << 16);
            let small = model.len() < 1 << 18 && (tensors.len() as u64) < most;
            assert!(small, "{text}: {} and {} of {most}", model.len(), tensors.len());
        }
    }
}

#[test]
fn the_command_replaces_its_own_output_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let model = data("fixtures/qwen3-qknorm");
    let export = |form: &str, out: &str| {
        let args = ["export", model.to_str().unwrap(), "--format", "onnx", "--form", form, "-o", out];
        run(dir.path(), &args)
    };
    assert_eq!(export("qdq", "out").code, 0);
    let first = files(&dir.path().join("out"));
    assert_eq!(export("ort", "out").code, 0);
    assert!(files(&dir.path().join("out")) != first);
    assert_eq!(export("qdq", "out").code, 0);
    assert!(files(&dir.path().join("out")) == first);
    assert!(dir.path().join("out/config.json").is_file() && !dir.path().join("out.partial").exists());
    std::fs::create_dir(dir.path().join("mine")).unwrap();
    std::fs::write(dir.path().join("mine/notes"), "x").unwrap();
    let refused = export("qdq", "mine");
    assert!(refused.code == 1 && refused.err.contains("holds something else"), "{}", refused.err);
    assert_eq!(std::fs::read(dir.path().join("mine/notes")).unwrap(), b"x");
    let text = ok(dir.path(), &["export", "--help"]);
    assert!(text.contains("--form"), "{text}");
}
