//! Folders with the description of vllm-ascend as inputs: what was exported comes back, and what is damaged or not read is
//! refused by name.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::formats::stored;
use crate::run::{ok, run};
use crate::static_inputs::compiled;
use crate::support::{TINY, data};

const DESCRIPTION: &str = "quant_model_description.json";
const WEIGHTS: &str = "quant_model_weights.safetensors";
const UP: &str = "model.layers.1.mlp.up_proj";

/// Exports the artefact `a` as `x`, reads that as `b` and exports it again as `y`: the same integers, and the same files.
fn comes_back(d: &Path) {
    ok(d, &["export", "a", "--format", "ascend", "-o", "x"]);
    ok(d, &["compile", "x", "-o", "b"]);
    assert_eq!(stored(&d.join("b")), stored(&d.join("a")));
    ok(d, &["check", "b", "--parity"]);
    ok(d, &["export", "b", "--format", "ascend", "-o", "y"]);
    for file in [DESCRIPTION, WEIGHTS] {
        let read = |folder: &str| std::fs::read(d.join(folder).join(file)).unwrap();
        assert!(read("y") == read("x"), "{file}");
    }
}

/// The divergence of two artefacts on some text.
fn same(d: &Path, a: &str, b: &str) -> f64 {
    let text = data("wikitext-2-train-sample.txt");
    let task = ["--task", text.to_str().unwrap(), "--ctx", "128", "--windows", "2"];
    let args = [&["eval", a][..], &task, &["--against", b, "--json"]].concat();
    let said: Value = serde_json::from_str(&ok(d, &args)).unwrap();
    said["kl"].as_f64().or(said["against"]["kl"].as_f64()).unwrap()
}

#[test]
fn flatquant_comes_back_with_its_transforms() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (model, text) = (data(TINY), data("wikitext-2-train-sample.txt"));
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    let pass = ["--pass", "flatquant{epochs=1}", "--target", "vllm-ascend", "--calib", text];
    let windows = ["--nsamples", "2", "--seqlen", "64", "-o", "a"];
    ok(d, &[&["compile", model][..], &pass, &windows].concat());
    comes_back(d);
    // q, k and v share a pair, and gate and up; products of a pair in the other order differ in their last bits.
    let layer = ok(d, &["inspect", "x", "--ir", "layer0"]);
    assert_eq!(layer.matches("mode_mul").count(), 6, "{layer}");
    assert!(same(d, "b", "a") < 2e-3);
    let s = run(d, &["compile", "x", "--pass", "rtn", "-o", "c"]);
    assert!(s.code == 1 && s.err.contains("behind a transform of its input"), "{}", s.err);
}

/// A folder in memory that a test may damage.
struct Folder {
    config: Value,
    description: Value,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Folder {
    fn of(from: &Path) -> Self {
        let json = |name: &str| serde_json::from_slice(&std::fs::read(from.join(name)).unwrap()).unwrap();
        let bytes = std::fs::read(from.join(WEIGHTS)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let all = file.tensors().into_iter();
        let tensors = all.map(|(n, t)| (n, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect();
        Folder { config: json("config.json"), description: json(DESCRIPTION), tensors }
    }

    fn write(&self, d: &Path) {
        std::fs::create_dir_all(d).unwrap();
        let views = self.tensors.iter().map(|(n, (d, s, b))| (n, TensorView::new(*d, s.clone(), b).unwrap()));
        std::fs::write(d.join(WEIGHTS), safetensors::serialize(views, None).unwrap()).unwrap();
        std::fs::write(d.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(d.join(DESCRIPTION), self.description.to_string()).unwrap();
    }

    /// Refused as a model, with advice.
    fn refused(&self, words: &[&str]) {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        self.write(d);
        let s = run(d, &["inspect", "."]);
        assert!(s.code == 1 && s.err.contains("hint: "), "{words:?}: {}", s.err);
        words.iter().for_each(|w| assert!(s.err.contains(w), "`{w}` is not said: {}", s.err));
    }
}

#[test]
fn what_is_damaged_or_not_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let model = data("fixtures/qwen2-bias-tied");
    let pass = "annotate{w=8,group=row,sym=true,scale=bf16,a=8,a_sym=true},rtn";
    ok(d, &["compile", model.to_str().unwrap(), "--pass", pass, "--no-check", "-o", "a"]);
    ok(d, &["export", "a", "--format", "ascend", "-o", "x"]);
    ok(d, &["inspect", "x"]);
    let folder = || Folder::of(&d.join("x"));
    let part = |part: &str| format!("{UP}.{part}");
    let described = |key: &str, value: Value, words: &[&str]| {
        let mut f = folder();
        f.description[key] = value;
        f.refused(words);
    };
    described(&part("weight"), json!("W4A8_DYNAMIC"), &[&part("weight"), "W4A8_DYNAMIC", "read are FLOAT"]);
    described(&part("weight"), json!("W8A8"), &[&part("weight_scale"), "does not have"]);
    described(&part("weight"), json!("FLOAT"), &[UP, "leaves it in floats"]);
    described(&part("weight"), json!(8), &[&part("weight"), "no type that is a text"]);
    described(&part("weight"), json!("W4A4_FLATQUANT_DYNAMIC"), &[&part("right_trans"), "missing"]);
    described("kv_cache_type", json!("C4"), &["kv_cache_type", "C4"]);
    described("kv_cache_type", json!("C8"), &["kv_cache_scale", "missing"]);
    let mut f = folder();
    f.description.as_object_mut().unwrap().remove(&part("weight"));
    f.refused(&[UP, "leaves it in floats"]);
    f.description = json!([]);
    f.refused(&[DESCRIPTION, "no JSON object"]);
    let mut f = folder();
    f.config["quantization_config"] = json!({"quant_method": "awq", "bits": 4});
    f.refused(&[DESCRIPTION, "quantization_config"]);
    let tensor = |name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>, words: &[&str]| {
        let mut f = folder();
        f.tensors.insert(part(name), (dtype, shape.to_vec(), bytes));
        f.refused(&[&[&*part(name)], words].concat());
    };
    let ones = |n: usize| 1f32.to_le_bytes().repeat(n);
    tensor("weight_offset", Dtype::F32, &[160, 1], ones(160), &["not 0 everywhere"]);
    tensor("weight_offset", Dtype::F32, &[80, 2], ones(160), &["[80, 2]"]);
    tensor("weight_scale", Dtype::F32, &[80, 1], ones(80), &["[80, 1]"]);
    tensor("weight_scale", Dtype::BF16, &[160, 1], vec![0; 320], &["bf16[160, 1]"]);
    tensor("clip_ratio", Dtype::F32, &[1], ones(1), &["does not have"]);
    for name in ["weight_scale", "weight_offset"] {
        let mut f = folder();
        f.tensors.remove(&part(name)).unwrap();
        f.refused(&[&part(name), "missing"]);
    }
    std::fs::write(d.join("x").join(DESCRIPTION), "{").unwrap();
    let s = run(d, &["inspect", "x"]);
    assert!(s.code == 1 && s.err.contains(DESCRIPTION) && s.err.contains("hint: "), "{}", s.err);
}

#[test]
fn damaged_transforms_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    // A pair and a clip beside codes of W4A4, made up: 64 = 8 · 8 inputs.
    let model = data("fixtures/qwen2-bias-tied");
    let pass = "annotate{w=4,group=row,sym=true,a=4,a_sym=true},rtn";
    ok(d, &["compile", model.to_str().unwrap(), "--pass", pass, "--no-check", "-o", "a"]);
    ok(d, &["export", "a", "--format", "ascend", "-o", "x"]);
    let part = |part: &str| format!("{UP}.{part}");
    let with = |left: [usize; 2], clip: f32, entry: f32| {
        let mut f = Folder::of(&d.join("x"));
        f.description[part("weight")] = json!("W4A4_FLATQUANT_DYNAMIC");
        let floats = |n: usize, x: f32| x.to_le_bytes().repeat(n);
        let mut put = |name: &str, shape: &[usize], x: f32| {
            let bytes = floats(shape.iter().product(), x);
            f.tensors.insert(part(name), (Dtype::F32, shape.to_vec(), bytes));
        };
        put("left_trans", &left, entry);
        put("right_trans", &[8, 8], 1.0);
        put("clip_ratio", &[1], clip);
        f
    };
    with([8, 4], 0.9, 1.0).refused(&[&part("left_trans"), "[8, 4]", "[8, 8]"]);
    with([8, 8], 0.0, 1.0).refused(&[&part("clip_ratio"), "is 0"]);
    with([8, 8], f32::NAN, 1.0).refused(&[&part("clip_ratio"), "NaN"]);
    with([8, 8], 0.9, f32::INFINITY).refused(&[&part("left_trans"), "infinite"]);
}

#[test]
fn calibrated_inputs_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (options, ty) in [("scale=bf16", "bf16"), ("scale=f16", "f16"), ("scale=bf16,sym=false", "bf16")] {
        let pass = format!("static-inputs{{{options}}},annotate{{w=8,group=row,sym=true,scale={ty}}},rtn");
        compiled(d, &pass, "a");
        // The scales of weights are found again from products.
        comes_back(d);
        let gap = same(d, "b", "a");
        assert!(gap == 0.0, "{options}: {gap}");
        if ty == "f16" {
            let mut f = Folder::of(&d.join("x"));
            f.tensors.get_mut(&format!("{UP}.deq_scale")).unwrap().2[12] = 1;
            f.write(&d.join("z"));
            let s = run(d, &["compile", "z", "-o", "c"]);
            assert!(s.code == 1 && s.err.contains("element 1 has bits beyond"), "{}", s.err);
            continue;
        }
        let folder = || Folder::of(&d.join("x"));
        let name = "model.layers.1.self_attn.q_proj";
        let refused = |part: &str, shape: &[usize], bytes: Vec<u8>, words: &[&str]| {
            let mut f = folder();
            let dtype = f.tensors[&format!("{name}.{part}")].0;
            f.tensors.insert(format!("{name}.{part}"), (dtype, shape.to_vec(), bytes));
            f.refused(&[&[part], words].concat());
        };
        refused("input_scale", &[1], vec![0; 4], &["is 0"]);
        refused("input_offset", &[1], 0.5f32.to_le_bytes().to_vec(), &["is 0.5"]);
        refused("input_offset", &[1], 128f32.to_le_bytes().to_vec(), &["is 128"]);
        refused("deq_scale", &[255], vec![0; 1020], &["[255, 1]"]);
        // What is read with the scales.
        for (part, at, bytes, words) in [
            ("deq_scale", 3, (-1f32).to_le_bytes(), "element 3 is -1"),
            ("quant_bias", 5, i32::MAX.to_le_bytes(), "the bias and the offset of the input make"),
        ] {
            let mut f = folder();
            let tensor = f.tensors.get_mut(&format!("{name}.{part}")).unwrap();
            tensor.2[4 * at..4 * at + 4].copy_from_slice(&bytes);
            f.write(&d.join("z"));
            let s = run(d, &["compile", "z", "-o", "c"]);
            assert!(s.code == 1 && s.err.contains(words) && !d.join("c").exists(), "{part}: {}", s.err);
        }
    }
}

#[test]
fn caches_with_codes_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    compiled(
        d,
        "static-caches,annotate{w=8,group=row,sym=true,scale=bf16,skip=[q_proj,k_proj,v_proj]},rtn",
        "a",
    );
    comes_back(d);
    assert!(same(d, "b", "a") == 0.0);
    let s = run(d, &["compile", "x", "--pass", "rtn{bits=8,group=row}", "--no-check", "-o", "c"]);
    assert!(s.code == 0 && s.err.contains("rounding of caches that it asks for is left out"), "{}", s.err);
    assert!(!ok(d, &["inspect", "c", "--ir", "layer0"]).contains("qcast"));
    let folder = || Folder::of(&d.join("x"));
    let name = "model.layers.2.self_attn.v_proj";
    for (part, n, x, words) in [
        ("kv_cache_scale", 128, 0f32, "not positive"),
        ("kv_cache_offset", 128, 1f32, "offsets not 0"),
        ("kv_cache_scale", 64, 1f32, "[64, 1]"),
    ] {
        let mut f = folder();
        f.tensors.insert(format!("{name}.{part}"), (Dtype::F32, vec![n], x.to_le_bytes().repeat(n)));
        f.refused(&[name, words]);
    }
    let mut f = folder();
    f.tensors.remove(&format!("{name}.kv_cache_offset")).unwrap();
    f.refused(&["kv_cache_offset", "missing"]);
    let mut f = folder();
    f.description.as_object_mut().unwrap().retain(|k, _| !["kv_cache_type", "kv_quant_type"].contains(&&**k));
    f.refused(&["kv_cache_", "not part of"]);
}
