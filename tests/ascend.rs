//! FlatQuant by the rules of the NPU's operator (ascend.md §5.3): what `--target vllm-ascend` decides and refuses, and
//! whether the operator's arithmetic on an export is what the artefact computes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use qrmc_ir::{Func, Module, Op, Tensor, ValueId, extract};
use qrmc_lowering::artefact::Artefact;
use qrmc_runtime::engine::CpuEngine;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::run::{ok, run, snapshot};
use crate::support::{TINY, data};

const FLAT: &str = "W4A4_FLATQUANT_DYNAMIC";
const WIDE: &str = "W8A8_DYNAMIC";

/// Compiles for the NPU on little text.
fn compile(d: &Path, model: &Path, pass: &str, more: &[&str]) {
    let (model, text) = (model.to_str().unwrap(), data("wikitext-2-train-sample.txt"));
    let text = text.to_str().unwrap();
    let mut args = vec!["compile", model, "--pass", pass, "--target", "vllm-ascend", "--calib", text];
    args.extend(["--nsamples", "2", "--seqlen", "64", "-o", "a"]);
    args.extend(more);
    ok(d, &args);
}

/// An exported folder: its description, and its file of tensors.
struct Folder {
    description: Value,
    bytes: Vec<u8>,
}

impl Folder {
    fn open(dir: &Path) -> Self {
        let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
        let description = serde_json::from_slice(&read("quant_model_description.json")).unwrap();
        Folder { description, bytes: read("quant_model_weights.safetensors") }
    }

    /// Values and shape.
    fn get(&self, name: &str) -> (Vec<f64>, Vec<usize>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        let four = |b: &[u8]| f64::from(f32::from_le_bytes(b.try_into().unwrap()));
        let values = match view.dtype() {
            Dtype::I8 => view.data().iter().map(|&b| f64::from(b as i8)).collect(),
            Dtype::F32 => view.data().chunks(4).map(four).collect(),
            other => panic!("{name} is {other:?}"),
        };
        (values, view.shape().to_vec())
    }

    fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).is_ok()
    }

    fn kind(&self, layer: usize, linear: &str) -> &str {
        self.description[format!("model.layers.{layer}.{linear}.weight")].as_str().unwrap()
    }
}

/// What the operator computes of one token: codes and their scale. `X' = leftᵀ X right`, `scale = max|X'| clip / 7`,
/// codes are the nearest integers, even ones where two are as near, in -8 to 7. Codes whose quotient lies between two
/// integers to a thousandth are given with the other one.
fn operator(x: &[f64], left: &[f64], right: &[f64], clip: f64) -> (Vec<(f64, f64)>, f64) {
    let (l, r) = (left.len().isqrt(), right.len().isqrt());
    let mut turned = vec![0.0; l * r];
    for i in 0..l {
        for j in 0..r {
            for a in 0..l {
                for b in 0..r {
                    turned[i * r + j] += left[a * l + i] * x[a * r + b] * right[b * r + j];
                }
            }
        }
    }
    let scale = turned.iter().fold(0.0f64, |m, v| m.max(v.abs())) * clip / 7.0;
    let codes = turned.iter().map(|v| {
        let q = v / scale;
        let other = if (q - q.floor() - 0.5).abs() < 1e-3 { q.floor() + q.ceil() } else { 2.0 * q.round() };
        let near = q.round_ties_even().clamp(-8.0, 7.0);
        (near, (other - q.round_ties_even()).clamp(-8.0, 7.0))
    });
    (codes.collect(), scale)
}

/// The artefact's transformed and rounded input of a linear layer, and its product, from the value before the transform.
fn computed(a: &Artefact, f: &Func, product: ValueId, x: &Tensor) -> (Tensor, Tensor) {
    let rounded = f.def_node(product).unwrap().ins[0];
    let mut from = f.def_node(rounded).unwrap().ins[0];
    while let Some(n) = f.def_node(from).filter(|n| matches!(n.op, Op::ModeMul { .. })) {
        from = n.ins[0];
    }
    let part = extract(&a.module, f, "part", &[from], &[rounded, product]).unwrap();
    let out = qrmc_ir::Engine::run(&CpuEngine::new(2).unwrap(), &a.module, &part, a, &[x]).unwrap();
    (out[0].clone(), out[1].clone())
}

/// The product with the weight of this name.
fn product(module: &Module, f: &Func, name: &str) -> ValueId {
    let of = |n: &&qrmc_ir::Node| {
        let weight = n.ins.get(1).and_then(|w| f.weight_behind(*w));
        matches!(n.op, Op::MatMul { .. }) && weight.is_some_and(|w| module.weight(w).name.starts_with(name))
    };
    f.nodes.iter().find(of).unwrap().outs[0]
}

#[test]
fn the_operator_computes_what_the_artefact_does() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    compile(d, &data(TINY), "flatquant{epochs=1}", &[]);
    ok(d, &["export", "a", "--format", "ascend", "-o", "x"]);
    ok(d, &["check", "x", "--target", "vllm-ascend"]);
    let x = Folder::open(&d.join("x"));
    assert_eq!(x.description["model_quant_type"], FLAT);
    // 256 = 16 · 16 and 768 = 24 · 32.
    for layer in 0..4 {
        for (linear, rows, sides) in [
            ("self_attn.q_proj", 256, (16, 16)),
            ("self_attn.k_proj", 128, (16, 16)),
            ("self_attn.v_proj", 128, (16, 16)),
            ("mlp.gate_proj", 768, (16, 16)),
            ("mlp.up_proj", 768, (16, 16)),
            ("mlp.down_proj", 256, (24, 32)),
        ] {
            assert_eq!(x.kind(layer, linear), FLAT, "{linear}");
            let get = |part: &str| x.get(&format!("model.layers.{layer}.{linear}.{part}"));
            assert_eq!(get("weight").1, [rows, sides.0 * sides.1], "{linear}");
            assert_eq!(get("weight_scale").1, [rows, 1], "{linear}");
            assert_eq!(get("left_trans").1, [sides.0, sides.0], "{linear}");
            assert_eq!(get("right_trans").1, [sides.1, sides.1], "{linear}");
            let (clip, shape) = get("clip_ratio");
            assert!(shape == [1] && clip[0] > 0.5 && clip[0] < 1.0, "{linear}: {clip:?}");
            assert!(get("weight").0.iter().all(|q| (-8.0..=7.0).contains(q)), "{linear}");
        }
        assert_eq!(x.kind(layer, "self_attn.o_proj"), WIDE);
        assert!(!x.has(&format!("model.layers.{layer}.self_attn.o_proj.left_trans")));
        for part in ["left_trans", "right_trans", "clip_ratio"] {
            let get = |linear: &str| x.get(&format!("model.layers.{layer}.{linear}.{part}")).0;
            assert_eq!(get("self_attn.q_proj"), get("self_attn.k_proj"), "{part}");
            assert_eq!(get("self_attn.q_proj"), get("self_attn.v_proj"), "{part}");
            assert_eq!(get("mlp.gate_proj"), get("mlp.up_proj"), "{part}");
            assert_ne!(get("self_attn.q_proj"), get("mlp.up_proj"), "{part}");
        }
    }
    let a = Artefact::map(&d.join("a")).unwrap();
    let tokens = 8;
    for (layer, linear, norm) in [
        (0, "self_attn.q_proj", Some("input_layernorm")),
        (2, "mlp.gate_proj", Some("post_attention_layernorm")),
        (3, "mlp.down_proj", None),
    ] {
        let name = format!("model.layers.{layer}.{linear}");
        let get = |part: &str| x.get(&format!("{name}.{part}")).0;
        let (weight, shape) = x.get(&format!("{name}.weight"));
        let (rows, cols) = (shape[0], shape[1]);
        let draws = qrmc_passes::seeded_tokens(layer as u64, tokens * cols, 1 << 16);
        let data: Vec<f32> =
            draws.as_i32().unwrap().iter().map(|&r| (r as f32 / 32768.0 - 1.0).powi(3) * 4.0).collect();
        let input = Tensor::f32([1, tokens, cols], data.clone());
        let f = a.module.func(a.module.layers()[layer]);
        let (rounded, out) = computed(&a, f, product(&a.module, f, &name), &input);
        let (rounded, out) = (rounded.as_f32().unwrap(), out.as_f32().unwrap());
        let (left, right, clip, scales) =
            (get("left_trans"), get("right_trans"), get("clip_ratio")[0], get("weight_scale"));
        let (mut worst, mut largest) = (0.0f64, 0.0f64);
        let mut products = vec![0.0; tokens * rows];
        for t in 0..tokens {
            let token: Vec<f64> = data[t * cols..(t + 1) * cols].iter().map(|&v| f64::from(v)).collect();
            let (codes, scale) = operator(&token, &left, &right, clip);
            // The artefact's own codes: its rounded values over the operator's scale.
            let own: Vec<f64> =
                rounded[t * cols..(t + 1) * cols].iter().map(|&v| f64::from(v) / scale).collect();
            for (own, (near, other)) in own.iter().zip(&codes) {
                let q = own.round();
                assert!((own - q).abs() < 1e-4 && (q == *near || q == *other), "{name}: {own} for {near}");
            }
            for n in 0..rows {
                let row = &weight[n * cols..(n + 1) * cols];
                let sum: f64 = own.iter().zip(row).map(|(q, w)| q.round() * w).sum();
                let y = sum * scale * scales[n];
                worst = worst.max((y - f64::from(out[t * rows + n])).abs());
                largest = largest.max(y.abs());
                products[t * rows + n] = y;
            }
        }
        assert!(worst < 2e-6 * largest, "{name}: {worst} of {largest}");
        if let Some(norm) = norm {
            let gain = format!("model.layers.{layer}.{norm}.weight");
            let error = against_the_source(&a, &gain, &name, (&data, tokens), (&products, rows));
            assert!(error < 0.25, "{name}: {error}");
        }
    }
}

/// How far products are from those of the source's weight, relative to these. The gain of the norm before has taken the
/// scales of channels in: its input is the same one with the source's gain.
fn against_the_source(
    a: &Artefact,
    gain: &str,
    linear: &str,
    (x, tokens): (&[f32], usize),
    (products, rows): (&[f64], usize),
) -> f64 {
    let source = crate::support::import(TINY).source.weights;
    let read = |name: &str| {
        let raw = source.raw(name).unwrap();
        let shape = raw.ty.shape.as_fixed().unwrap();
        let t = Tensor::from_le_bytes(raw.ty.elem, &shape, &raw.bytes).unwrap();
        t.as_f32().unwrap().to_vec()
    };
    let new = qrmc_ir::WeightSource::read(a, gain).unwrap();
    let (old, weight) = (read(gain), read(&format!("{linear}.weight")));
    let cols = old.len();
    let (mut error, mut size) = (0.0, 0.0);
    for t in 0..tokens {
        for n in 0..rows {
            let want: f64 = (0..cols)
                .map(|k| {
                    let ratio = f64::from(old[k]) / f64::from(new.as_f32().unwrap()[k]);
                    f64::from(x[t * cols + k]) * ratio * f64::from(weight[n * cols + k])
                })
                .sum();
            error += (products[t * rows + n] - want).powi(2);
            size += want * want;
        }
    }
    (error / size).sqrt()
}

/// A transform that was trained without activations has no clip of its own, and may get a constant one.
#[test]
fn a_constant_clip_is_the_operators() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let affine = "affine{a=16,kv=16,edges=pairs,wide=[o_proj],epochs=1}";
    let rounded = "w=4,a=4,a_sym=true,group=row,sym=true,scale=bf16,wide=[o_proj],rule=mse";
    for (clip, want) in [("0.75", 0.75), ("1", 1.0)] {
        let (model, text) = (data(TINY), data("wikitext-2-train-sample.txt"));
        let pass = format!("{affine},annotate{{{rounded},a_clip={clip}}},rtn");
        let args = ["compile", model.to_str().unwrap(), "--pass", &pass, "--calib", text.to_str().unwrap()];
        ok(d, &[&args[..], &["--nsamples", "1", "--seqlen", "32", "-o", "a", "--no-check"]].concat());
        ok(d, &["export", "a", "--format", "ascend", "-o", "x"]);
        let x = Folder::open(&d.join("x"));
        assert_eq!(x.kind(1, "mlp.down_proj"), FLAT);
        assert_eq!(x.get("model.layers.1.mlp.down_proj.clip_ratio").0, [want]);
    }
}

#[test]
fn a_recipe_repeats_what_the_target_decided() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    compile(d, &data(TINY), "flatquant{epochs=1}", &[]);
    let recipe = std::fs::read_to_string(d.join("a/recipe.yaml")).unwrap();
    for said in ["a_sym=true,kv=16,wide=o_proj,edges=pairs,clips=one", "scale=bf16", "target: vllm-ascend"] {
        assert!(recipe.contains(said), "{said}: {recipe}");
    }
    let first = snapshot(&d.join("a"));
    std::fs::rename(d.join("a"), d.join("first")).unwrap();
    let model = data(TINY);
    ok(
        d,
        &["compile", model.to_str().unwrap(), "--recipe", "first/recipe.yaml", "-o", "a", "--threads", "1"],
    );
    let again = snapshot(&d.join("a"));
    for name in ["model.safetensors", "model.qir", "recipe.yaml"] {
        assert_eq!(again[name], first[name], "{name}");
    }
}

/// A checkpoint of the fixture whose feed-forward block has 20 channels.
fn narrow(d: &Path) -> PathBuf {
    let (from, to) = (data("fixtures/qwen2-bias-tied"), d.join("narrow"));
    std::fs::create_dir(&to).unwrap();
    let config = std::fs::read_to_string(from.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["intermediate_size"] = 20.into();
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let mut cut: HashMap<String, (Dtype, Vec<usize>, Vec<u8>)> = HashMap::new();
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let mut shape = view.shape().to_vec();
        let size = view.data().len() / shape.iter().product::<usize>();
        let row = |n: usize| view.data().chunks(shape[1] * size).flat_map(move |r| r[..n * size].to_vec());
        let data = match name.rsplit('.').nth(1) {
            Some("gate_proj" | "up_proj") => {
                let data = view.data()[..20 * shape[1] * size].to_vec();
                shape[0] = 20;
                data
            }
            Some("down_proj") => {
                let data = row(20).collect();
                shape[1] = 20;
                data
            }
            _ => view.data().to_vec(),
        };
        cut.insert(name, (view.dtype(), shape, data));
    }
    let views = cut.iter().map(|(n, (t, s, b))| (n.clone(), TensorView::new(*t, s.clone(), b).unwrap()));
    std::fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    to
}

#[test]
fn layers_without_a_pair_get_eight_bits() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let model = narrow(d);
    let args = ["--calib", "none", "--target", "vllm-ascend", "-o", "b"];
    let compile = |pass: &'static str| {
        let mut all = vec!["compile", "narrow", "--pass", pass];
        all.extend(args);
        run(d, &all)
    };
    let text = data("wikitext-2-train-sample.txt");
    let text = text.to_str().unwrap();
    // 20 = 2 · 10, and 10 is no multiple of 8.
    let s = compile("flatquant{wide=o_proj}");
    assert!(s.code == 4 && s.err.contains("@layer0: down_in: 20 inputs"), "{}", s.err);
    assert!(s.err.contains("pair of 2 and 10") && s.err.contains("wide=[o_proj,down_proj]"), "{}", s.err);
    // What is left open fits: what is missing then is the text.
    let s = compile("flatquant");
    assert!(s.code != 4 && s.err.contains("none"), "{}", s.err);
    let target = ["--pass", "flatquant", "--target", "vllm-ascend", "--calib", text];
    let said = ok(d, &[&["plan", model.to_str().unwrap()], &target[..]].concat());
    assert!(said.contains("wide=[o_proj,down_proj],edges=pairs"), "{said}");
    // 768 = 24 · 32 fits one rank; two have 384 inputs each.
    let tiny = data(TINY);
    let more = ["--tp", "2", "--nsamples", "1", "--seqlen", "32", "-o", "a"];
    ok(d, &[&["compile", tiny.to_str().unwrap()], &target[..], &more[..]].concat());
    ok(d, &["export", "a", "--format", "ascend", "-o", "x"]);
    ok(d, &["check", "x", "--target", "vllm-ascend", "--tp", "1,2"]);
    assert_eq!(Folder::open(&d.join("x")).kind(0, "mlp.down_proj"), WIDE);
}

#[test]
fn what_the_operator_cannot_hold_is_refused_before_calibration() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let model = data(TINY);
    for (pass, tp, seen) in [
        ("flatquant{kv=4}", "1", "cached as"),
        ("flatquant{a_sym=false}", "1", "a_sym=false; it rounds activations to signed codes"),
        ("flatquant{clips=two}", "1", "clips=two; it has one clip"),
        ("flatquant{edges=all}", "1", "edges=all; it has no place for transforms of heads"),
        ("flatquant{w=8,a=8}", "1", "w=8; behind a transform it multiplies codes of 4 bits"),
        ("flatquant{fold=false}", "1", "fold=false"),
        ("flatquant{head=4}", "1", "the head has codes"),
        ("flatquant{scale=f32}", "1", "scales of f32"),
        ("flatquant{wide=o_proj}", "2", "@layer0: down_in is shared by ranks"),
        ("flatquant{wide=[o_proj,k_proj]}", "1", "self_attn.q_proj and self_attn.k_proj run as one module"),
        ("affine,annotate{w=4,a=4,group=row,sym=true,a_sym=true},rtn", "1", "a_sym=false"),
    ] {
        let args = ["compile", model.to_str().unwrap(), "--pass", pass, "--target", "vllm-ascend"];
        let more = ["--tp", tp, "--calib", "none", "-o", "a"];
        let s = run(d, &[&args[..], &more[..]].concat());
        assert!(s.code == 4 && s.err.contains(seen), "{pass}: {}", s.err);
        assert!(s.err.contains("hint"), "{pass}: {}", s.err);
        assert!(!d.join("a").exists() && !d.join("a.partial").exists(), "{pass}");
    }
}
