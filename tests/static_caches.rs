//! Cached keys and values by one calibrated scale a channel: what is calibrated, and what vllm-ascend is given (ascend.md
//! §5.2, `C8`).

use half::bf16;
use qrmc_ir::{Func, Grain, Op, QuantSpec, Tensor, WeightSource, extract};
use qrmc_lowering::artefact::Artefact;
use qrmc_runtime::engine::CpuEngine;
use serde_json::Value;

use crate::passes::{compile, windows};
use crate::run::{ok, run};
use crate::static_inputs::{MODEL, compiled, get, walk};

/// What is appended to the caches of keys and of values.
fn appended(f: &Func) -> Vec<qrmc_ir::ValueId> {
    f.nodes.iter().filter(|n| n.op == Op::CacheAppend).map(|n| n.ins[1]).collect()
}

#[test]
fn a_channel_has_its_largest_magnitude_over_127() {
    let calibration = windows(256, 3, 16);
    let mut most = vec![vec![vec![0.0f32; 32]; 2]; 2];
    walk(&calibration, appended, |at, values| {
        for (most, t) in most[at].iter_mut().zip(values) {
            for row in t.as_f32().unwrap().chunks(32) {
                most.iter_mut().zip(row).for_each(|(m, x)| *m = m.max(x.abs()));
            }
        }
    });
    let (unit, ..) = compile(MODEL, "static-caches{scale=f32}", &calibration);
    let (rounded, ..) = compile(MODEL, "static-caches,annotate{w=16,kv=4}", &calibration);
    for (at, most) in most.iter().enumerate() {
        let f = rounded.module.func(rounded.module.layers()[at]);
        let specs: Vec<QuantSpec> =
            f.nodes.iter().filter_map(|n| if let Op::QCast(s) = n.op { Some(s) } else { None }).collect();
        let want = QuantSpec { scale: qrmc_ir::ScaleType::BF16, ..QuantSpec::sym(8, Grain::Channel) };
        assert_eq!(specs, [want; 2]);
        // `annotate` finds them rounded.
        assert!(!f.nodes.iter().any(|n| matches!(n.op, Op::FakeQuant(..))));
        for (what, most) in ["keys", "values"].iter().zip(most) {
            let read = |unit: &qrmc_passes::Unit| {
                let t = unit.weights.read(&format!("layer{at}.cached_{what}.scale")).unwrap();
                t.as_f32().unwrap().to_vec()
            };
            let have = read(&unit);
            for (s, m) in have.iter().zip(most) {
                assert!((s * 127.0 - m).abs() < 1e-5 * m, "{what}: {s} for {m}");
            }
            let nearest: Vec<f32> = have.iter().map(|&s| bf16::from_f32(s).to_f32()).collect();
            assert_eq!(read(&rounded), nearest, "{what}");
        }
    }
}

#[test]
fn exports_hold_what_the_caches_do() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    compiled(d, "static-caches,static-inputs,annotate{w=8,group=row,sym=true,scale=bf16},rtn", "a");
    ok(d, &["check", "a", "--parity"]);
    ok(d, &["export", "a", "--format", "ascend", "-o", "x"]);
    ok(d, &["check", "x", "--target", "vllm-ascend", "--tp", "1,2"]);
    let path = d.join("x/quant_model_description.json");
    let mut description: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!((&description["kv_cache_type"], &description["kv_quant_type"]), (&"C8".into(), &"C8".into()));
    let a = Artefact::map(&d.join("a")).unwrap();
    for layer in 0..4 {
        let f = a.module.func(a.module.layers()[layer]);
        for (v, linear) in appended(f).into_iter().zip(["k_proj", "v_proj"]) {
            let name = format!("model.layers.{layer}.self_attn.{linear}");
            for part in ["scale", "offset"] {
                assert_eq!(description[format!("{name}.kv_cache_{part}")], "C8");
            }
            let file = d.join("x/quant_model_weights.safetensors");
            let (scales, shape) = get(&file, &format!("{name}.kv_cache_scale"));
            assert_eq!(shape, [128]);
            assert_eq!(get(&file, &format!("{name}.kv_cache_offset")).0, vec![0.0; 128]);
            // A fifth more than the scales reach: the largest are cut off.
            let draws = qrmc_passes::seeded_tokens(layer as u64, 3 * 128, 1 << 16);
            let draws = draws.as_i32().unwrap().iter().zip(scales.iter().cycle());
            let x: Vec<f32> =
                draws.map(|(&r, s)| ((f64::from(r) / 32768.0 - 1.0) * 1.2 * 127.0 * s) as f32).collect();
            let codes = f.def_node(f.def_node(v).unwrap().ins[0]).unwrap();
            let part = extract(&a.module, f, "part", &[codes.ins[0]], &[v]).unwrap();
            let input = Tensor::f32([1, 3, 128], x.clone());
            let engine = CpuEngine::new(2).unwrap();
            let out = qrmc_ir::Engine::run(&engine, &a.module, &part, &a, &[&input]).unwrap();
            for ((y, x), s) in out[0].as_f32().unwrap().iter().zip(&x).zip(scales.iter().cycle()) {
                let q = (f64::from(*x) / s).round_ties_even().clamp(-128.0, 127.0);
                assert_eq!(*y, (q * s) as f32, "{name}");
            }
        }
    }
    description.as_object_mut().unwrap().remove("kv_cache_type");
    std::fs::write(&path, description.to_string()).unwrap();
    let s = run(d, &["check", "x", "--target", "vllm-ascend"]);
    assert!(s.code == 4 && s.err.contains("has no `kv_cache_type`"), "{}", s.err);
}

#[test]
fn caches_without_a_place_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (pass, format, want) in [
        ("static-caches{skip=1}", "ascend", "6 of 8 caches have codes"),
        ("static-caches{scale=f32}", "ascend", "is no bf16, and the loader would round it"),
        ("static-caches{bits=4}", "ascend", "cached as i4<channel, bf16>"),
        ("static-caches", "compressed-tensors", "cached as i8<channel, bf16>"),
    ] {
        compiled(d, &format!("{pass},annotate{{w=8,group=row,sym=true,scale=bf16}},rtn"), "a");
        let s = run(d, &["export", "a", "--format", format, "-o", "x"]);
        assert!(s.code == 4 && s.err.contains(want), "{pass}: {}", s.err);
    }
    let text = crate::support::data("wikitext-2-train-sample.txt");
    let model = crate::support::data(crate::support::TINY);
    for pass in ["static-keys,static-caches", "part-bias,static-caches", "annotate{w=16,kv=8},static-caches"]
    {
        let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
        let args = ["compile", model, "--pass", pass, "--calib", text, "--nsamples", "1", "--seqlen", "32"];
        let s = run(d, &[&args[..], &["-o", "b"]].concat());
        assert!(s.code == 1 && s.err.contains("rounded already, or marked"), "{pass}: {} {}", s.code, s.err);
    }
}
