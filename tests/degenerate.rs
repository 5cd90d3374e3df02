//! Calibration on text and models that say little, or overflow: a finite artefact or a clear error.

use std::collections::HashMap;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::hostile::Model;
use crate::run::run;
use crate::support::{TINY, data};

const METHODS: [&str; 7] =
    ["gptq", "awq", "kvquant", "quarot-kv{bias=aware}", "smoothquant", "quarot", "flatquant{epochs=2}"];

/// Sets elements of tensors of the model.
fn poke(m: &Model, change: impl Fn(&str, &[usize], &mut [f32])) {
    let path = m.path("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut stored: HashMap<String, (Vec<usize>, Vec<u8>)> = HashMap::new();
    for (name, view) in file.tensors() {
        assert_eq!(view.dtype(), safetensors::Dtype::BF16, "{name}");
        let wide = view.data().chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32());
        let mut wide: Vec<f32> = wide.collect();
        change(&name, view.shape(), &mut wide);
        let half = wide.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
        stored.insert(name, (view.shape().to_vec(), half));
    }
    let views = stored.iter().map(|(n, (shape, bytes))| {
        (n.clone(), TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    let out = safetensors::serialize(views, None).unwrap();
    std::fs::write(&path, out).unwrap();
}

/// Compiles with all methods, and has the result evaluated: its perplexity is a finite number.
fn finite(m: &Model, calib: &str, windows: [&str; 2]) {
    for method in METHODS {
        let args = ["--pass", method, "--calib", calib, "--nsamples", windows[0], "--seqlen", windows[1]];
        let _ = std::fs::remove_dir_all(m.dir.path().join("out"));
        let s = m.compile(&args);
        assert_eq!(s.code, 0, "{method}: {}{}", s.out, s.err);
        let text = data("wikitext-2-raw-v1");
        let args =
            ["--json", "eval", "out", "--data", text.to_str().unwrap(), "--ctx", "64", "--windows", "1"];
        let said = run(m.dir.path(), &args);
        let v: serde_json::Value =
            serde_json::from_str(&said.out).unwrap_or_else(|e| panic!("{e}: {}", said.err));
        let p = v["perplexity"].as_f64().unwrap();
        assert!(p.is_finite() && p < 1000.0, "{method}: {p}");
    }
}

fn sample() -> String {
    data("wikitext-2-train-sample.txt").to_str().unwrap().to_owned()
}

#[test]
fn one_token_of_calibration() {
    let m = Model::of(TINY);
    std::fs::write(m.dir.path().join("one.txt"), "a").unwrap();
    m.refused(&["--pass", "gptq", "--calib", "one.txt"], 1, &["token", "window"]);
    finite(&m, "one.txt", ["1", "1"]);
}

#[test]
fn equal_tokens_of_calibration() {
    let m = Model::of(TINY);
    std::fs::write(m.dir.path().join("equal.txt"), "the ".repeat(1000)).unwrap();
    finite(&m, "equal.txt", ["4", "64"]);
}

#[test]
fn channels_that_are_always_zero() {
    let m = Model::of(TINY);
    poke(&m, |name, shape, v| {
        if name.contains("layernorm") {
            v[5] = 0.0;
        }
        // Dead inputs of `o_proj` and `down_proj`, and a dead output.
        for (tensor, row) in [
            ("layers.1.mlp.up_proj.weight", 9),
            ("layers.1.self_attn.v_proj.weight", 3),
            ("layers.0.mlp.down_proj.weight", 7),
        ] {
            if name.ends_with(tensor) {
                v[row * shape[1]..(row + 1) * shape[1]].fill(0.0);
            }
        }
        if name.ends_with("layers.1.self_attn.v_proj.bias") {
            v[3] = 0.0;
        }
    });
    finite(&m, &sample(), ["4", "64"]);
}

#[test]
fn activations_that_overflow() {
    let m = Model::of(TINY);
    poke(&m, |name, shape, v| {
        if name.ends_with("layers.1.input_layernorm.weight") {
            v[5] = 1e38;
        }
        if name.ends_with("layers.1.self_attn.q_proj.weight")
            || name.ends_with("layers.1.self_attn.k_proj.weight")
        {
            v.iter_mut().skip(5).step_by(shape[1]).for_each(|x| *x = 1e5);
        }
    });
    for method in METHODS {
        m.refused(
            &["--pass", method, "--calib", &sample(), "--nsamples", "4", "--seqlen", "64"],
            1,
            &["NaN or infinity"],
        );
    }
}
