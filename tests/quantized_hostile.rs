//! Quantized checkpoints that are damaged, contradict themselves, or are of a kind that is not read: each is refused by
//! name, with advice.

use std::collections::BTreeMap;

use qrmc_frontends::{ImportError, Integers};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::support::data;

/// A copy of a fixture in memory that a test may damage.
struct Folder {
    dir: tempfile::TempDir,
    config: Value,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

const AWQ: &str = "awq-g32";
const GPTQ: &str = "gptq-w4-asym";
const ACT: &str = "gptq-v2-w8-actorder";
const PACK: &str = "ct-pack-w4";
const ASYM: &str = "ct-pack-w3-asym";
const INT: &str = "ct-int-w8a8";
const STATIC: &str = "ct-int-w8a8-static";
const ZEROED: &str = "ct-int-w8a8-static-asym";
const NAIVE: &str = "ct-naive-w5-asym";
const UP: &str = "model.layers.0.mlp.up_proj";

impl Folder {
    fn of(fixture: &str) -> Self {
        let from = data("quantized").join(fixture);
        let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file
            .tensors()
            .into_iter()
            .map(|(n, t)| (n, (t.dtype(), t.shape().to_vec(), t.data().to_vec())))
            .collect();
        let config = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
        Folder { dir: tempfile::tempdir().unwrap(), config, tensors }
    }

    fn quantization(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.config["quantization_config"]);
        self
    }

    fn without(mut self, name: &str) -> Self {
        assert!(self.tensors.remove(name).is_some(), "{name}");
        self
    }

    fn with(mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
        self.tensors.insert(name.to_owned(), (dtype, shape.to_vec(), bytes));
        self
    }

    /// Changes the bytes of a tensor.
    fn bytes(mut self, name: &str, change: impl FnOnce(&mut [u8])) -> Self {
        change(&mut self.tensors.get_mut(name).unwrap().2);
        self
    }

    /// Gives a tensor one row less.
    fn shorter(mut self, name: &str) -> Self {
        let (_, shape, bytes) = self.tensors.get_mut(name).unwrap();
        let row = bytes.len() / shape[0];
        shape[0] -= 1;
        bytes.truncate(bytes.len() - row);
        self
    }

    fn write(&self) {
        let views = self.tensors.iter().map(|(n, (d, s, b))| (n, TensorView::new(*d, s.clone(), b).unwrap()));
        let bytes = safetensors::serialize(views, None).unwrap();
        std::fs::write(self.dir.path().join("model.safetensors"), bytes).unwrap();
        std::fs::write(self.dir.path().join("config.json"), self.config.to_string()).unwrap();
    }

    fn import(&self, integers: Integers) -> Result<qrmc_frontends::Imported, ImportError> {
        self.write();
        qrmc_frontends::import(self.dir.path(), integers)
    }

    /// Refused when it is opened, however its integers are to be taken.
    fn refused(self, words: &[&str]) {
        for integers in [Integers::Keep, Integers::Dequantize] {
            let error = self.import(integers).err().unwrap_or_else(|| panic!("not refused: {words:?}"));
            let hint = error.hint.clone().unwrap_or_else(|| panic!("no advice: {error}"));
            let said = format!("{error}\n{hint}");
            words.iter().for_each(|w| assert!(said.contains(w), "`{w}` is not said: {said}"));
        }
    }

    /// Refused when a tensor is read, as codes or as values.
    fn unreadable(self, part: &str, words: &[&str]) {
        for (integers, name) in
            [(Integers::Keep, format!("{UP}.weight.{part}")), (Integers::Dequantize, format!("{UP}.weight"))]
        {
            let weights = self.import(integers).unwrap().source.weights;
            for said in [weights.raw(&name).err(), weights.read(&name).err()] {
                let said = said.unwrap_or_else(|| panic!("not refused: {words:?}")).to_string();
                words.iter().for_each(|w| assert!(said.contains(w), "`{w}` is not said: {said}"));
            }
        }
    }
}

fn up(part: &str) -> String {
    format!("{UP}.{part}")
}

#[test]
fn methods_that_are_not_read() {
    for method in ["bitsandbytes", "fp8", "hqq", "auto-round", "quark", "eetq", "torchao", "gptq_marlin"] {
        let f = Folder::of(AWQ).quantization(|q| *q = json!({"quant_method": method, "bits": 4}));
        f.refused(&["quantization_config.quant_method", method, "awq, gptq and compressed-tensors"]);
    }
    Folder::of(AWQ).quantization(|q| *q = json!({"bits": 4})).refused(&["quant_method` is missing"]);
    Folder::of(AWQ).quantization(|q| *q = json!(7)).refused(&["`quantization_config` is no JSON object"]);
    Folder::of(AWQ).quantization(|q| q["quant_method"] = json!([])).refused(&["is [], not a string"]);
}

#[test]
fn settings_that_are_not_read() {
    let set = |fixture: &str, key: &str, value: Value, words: &[&str]| {
        Folder::of(fixture).quantization(|q| q[key] = value).refused(&[&[key], words].concat());
    };
    set(AWQ, "bits", json!(3), &["is 3", "read here are 4"]);
    set(AWQ, "bits", json!("4"), &["not an integer"]);
    set(AWQ, "bits", json!(1u64 << 63), &["not an integer"]);
    set(AWQ, "version", json!("gemv_fast"), &["gemv_fast", "gemm"]);
    set(AWQ, "zero_point", json!(false), &["is false"]);
    set(AWQ, "group_size", json!(0), &["is 0"]);
    set(AWQ, "group_size", json!(i64::MIN), &["at least one column"]);
    set(AWQ, "modules_to_not_convert", json!([4]), &["holds 4"]);
    set(GPTQ, "bits", json!(5), &["is 5", "2, 3, 4, 8"]);
    set(GPTQ, "checkpoint_format", json!("gptq_p"), &["gptq_p", "gptq_v2"]);
    set(GPTQ, "checkpoint_format", json!("marlin"), &["marlin"]);
    set(GPTQ, "format", json!("gptq_v2"), &["checkpoint_format"]);
    set(GPTQ, "pack_dtype", json!("int16"), &["int16", "32 bits"]);
    set(GPTQ, "rotation", json!("hadamard"), &["hadamard"]);
    set(GPTQ, "dynamic", json!({"re": 4}), &["is 4, not an object"]);
    set(GPTQ, "dynamic", json!({".*": {"mse": 1}}), &["mse", "bits, group_size, sym and desc_act"]);
    set(GPTQ, "dynamic", json!({"-:(?=x)": {}}), &["(?=x)", "look-around"]);
    set(PACK, "format", json!("float-quantized"), &["float-quantized", "pack-quantized"]);
    set(PACK, "format", json!("marlin-24"), &["marlin-24"]);
    set(PACK, "quantization_status", json!("frozen"), &["frozen"]);
    set(PACK, "kv_cache_scheme", json!({"num_bits": 8}), &["not understood"]);
    set(PACK, "transform_config", json!({"config_groups": {"R1": {}}}), &["not understood"]);
    set(PACK, "sparsity_config", json!({"format": "sparse-24-bitmask"}), &["sparse-24-bitmask"]);
    set(PACK, "ignore", json!(["re:("]), &["`(`"]);
    set(PACK, "config_groups", json!({"W8A8": ["Linear"]}), &["W8A8", "not an object"]);
    set(PACK, "config_groups", json!(null), &["is missing"]);
    let group = |fixture: &str, part: &str, key: &str, value: Value, words: &[&str]| {
        let f = Folder::of(fixture).quantization(|q| q["config_groups"]["group_0"][part][key] = value);
        f.refused(&[&["group_0", key], words].concat());
    };
    group(PACK, "weights", "num_bits", json!(9), &["is 9"]);
    group(PACK, "weights", "type", json!("float"), &["only `int`"]);
    group(PACK, "weights", "strategy", json!("block"), &["block"]);
    group(PACK, "weights", "group_size", json!(null), &["is missing"]);
    group(PACK, "weights", "dynamic", json!(true), &["stored scales"]);
    group(INT, "input_activations", "dynamic", json!("local"), &["local", "a stored one"]);
    group(INT, "input_activations", "strategy", json!("tensor"), &["each token"]);
    group(STATIC, "input_activations", "strategy", json!("token"), &["one stored scale"]);
    group(STATIC, "input_activations", "num_bits", json!(4), &["is 4"]);
    group(INT, "input_activations", "num_bits", json!(4), &["is 4"]);
    group(INT, "input_activations", "type", json!("float"), &["float"]);
}

#[test]
fn tensors_that_are_missing() {
    for part in ["qzeros", "scales"] {
        Folder::of(AWQ).without(&up(part)).refused(&[&up(part), "missing"]);
        Folder::of(GPTQ).without(&up(part)).refused(&[&up(part), "missing"]);
    }
    Folder::of(GPTQ).without(&up("qweight")).refused(&[&up("qweight"), "Scales without codes"]);
    Folder::of(ACT).without(&up("g_idx")).refused(&[&up("g_idx"), "missing"]);
    for part in ["weight_packed", "weight_scale"] {
        Folder::of(PACK).without(&up(part)).refused(&[&up(part)]);
    }
    let zero = up("weight_zero_point");
    Folder::of(ASYM).without(&zero).refused(&[&zero, "missing"]);
    Folder::of(NAIVE).without(&zero).refused(&[&zero, "missing"]);
    let shape = up("weight_shape");
    let folder = Folder::of(PACK);
    assert!(folder.tensors.contains_key(&shape));
    folder.without(&shape).refused(&[&shape, "missing"]);
    // A shape of codes that are not there.
    let bytes: Vec<u8> = [192i64, 64].iter().flat_map(|n| n.to_le_bytes()).collect();
    Folder::of(AWQ).with(&shape, Dtype::I64, &[2], bytes).refused(&[&shape, &up("weight_packed")]);
    Folder::of(STATIC).without(&up("input_scale")).refused(&[&up("input_scale"), "missing"]);
    Folder::of(ZEROED).without(&up("input_zero_point")).refused(&[&up("input_zero_point"), "missing"]);
    // A layer that is gone altogether.
    let mut gone = Folder::of(AWQ);
    gone.tensors.retain(|n, _| !n.starts_with(UP));
    gone.refused(&[&up("weight"), "missing"]);
}

#[test]
fn shapes_that_contradict() {
    for part in ["qweight", "qzeros", "scales"] {
        Folder::of(AWQ).shorter(&up(part)).refused(&[UP]);
        Folder::of(GPTQ).shorter(&up(part)).refused(&[UP]);
    }
    Folder::of(ACT).shorter(&up("g_idx")).refused(&[UP]);
    for part in ["weight_packed", "weight_scale"] {
        Folder::of(PACK).shorter(&up(part)).refused(&[&up(part)]);
    }
    Folder::of(INT).shorter(&up("weight")).refused(&[UP]);
    // Bits or groups of the configuration that are not those of the tensors.
    for bits in [2, 3, 8] {
        let f = Folder::of(GPTQ).quantization(|q| q["bits"] = json!(bits));
        f.refused(&["qweight", &format!("with {bits} bits"), "bits or group size"]);
    }
    Folder::of(AWQ).quantization(|q| q["group_size"] = json!(64)).refused(&["scales", "group:64"]);
    Folder::of(AWQ).quantization(|q| q["group_size"] = json!(80)).refused(&["80", "do not divide"]);
    Folder::of(GPTQ).quantization(|q| q["group_size"] = json!(1 << 20)).refused(&["do not divide"]);
    let w = |f: Folder, key: &str, v: Value| {
        f.quantization(|q| q["config_groups"]["group_0"]["weights"][key] = v)
    };
    w(Folder::of(PACK), "num_bits", json!(8)).refused(&["weight_packed", "with 8 bits"]);
    w(Folder::of(PACK), "group_size", json!(64)).refused(&["weight_scale", "group:64"]);
    w(Folder::of(ASYM), "symmetric", json!(true)).refused(&["symmetric", "weight_zero_point"]);
    for said in [[0i64, 64], [-1, 64], [192, i64::MAX], [64, 192]] {
        let bytes = said.iter().flat_map(|n| n.to_le_bytes()).collect();
        Folder::of(PACK).with(&up("weight_shape"), Dtype::I64, &[2], bytes).refused(&[UP]);
    }
    // One scale for an input, which is a number.
    let scale = up("input_scale");
    Folder::of(STATIC)
        .with(&scale, Dtype::F16, &[64], vec![0x3c; 128])
        .refused(&[&scale, "one scale for all"]);
    Folder::of(STATIC).with(&scale, Dtype::I32, &[1], vec![0; 4]).refused(&[&scale, "i32[1]"]);
    for (bits, said) in [(0u16, "is 0"), (0xbc00, "is -1"), (0x7c00, "is inf"), (0x7e00, "is NaN")] {
        let f = Folder::of(STATIC).with(&scale, Dtype::F16, &[], bits.to_le_bytes().to_vec());
        f.refused(&[&scale, said, "no scale"]);
    }
    let zero = up("input_zero_point");
    Folder::of(ZEROED).with(&zero, Dtype::I32, &[1], vec![0; 4]).refused(&[&zero, "i32[1]"]);
    // Another model's configuration.
    let mut f = Folder::of(AWQ);
    f.config["intermediate_size"] = json!(256);
    f.refused(&["weight", "[192, 64]", "[256, 64]"]);
    // Codes as floats, and floats as codes.
    let name = up("scales");
    Folder::of(AWQ).with(&name, Dtype::I32, &[2, 192], vec![0; 2 * 192 * 4]).refused(&[&name, "i32[2, 192]"]);
    let name = up("qweight");
    Folder::of(AWQ).with(&name, Dtype::F32, &[64, 24], vec![0; 64 * 24 * 4]).refused(&[&name, "f32[64, 24]"]);
    Folder::of(AWQ).with(&name, Dtype::I32, &[0, 24], vec![]).refused(&[&name]);
    // Words of whole codes, as releases of compressed-tensors before dense words wrote 3 bits.
    let name = up("weight_packed");
    let old = Folder::of(ASYM);
    let rows = old.tensors[&name].1[0];
    let cols = i64::from_le_bytes(old.tensors[&up("weight_shape")].2[8..].try_into().unwrap()) as usize;
    let words = cols.div_ceil(10);
    old.with(&name, Dtype::I32, &[rows, words], vec![0; rows * words * 4])
        .refused(&[&name, "older releases"]);
}

#[test]
fn groups_out_of_range() {
    for group in [2i32, -1, i32::MAX] {
        let f = Folder::of(ACT).bytes(&up("g_idx"), |b| b[20..24].copy_from_slice(&group.to_le_bytes()));
        f.refused(&[&up("g_idx"), "column 5", &format!("group {group}"), "2 groups"]);
    }
}

#[test]
fn configuration_and_tensors_of_different_checkpoints() {
    Folder::of(AWQ)
        .quantization(|q| q["modules_to_not_convert"] = json!(["up_proj"]))
        .refused(&[UP, "leaves it in floats"]);
    let dynamic = json!({"-:.*up_proj": {}});
    Folder::of(GPTQ).quantization(|q| q["dynamic"] = dynamic).refused(&[UP, "leaves it in floats"]);
    Folder::of(PACK)
        .quantization(|q| q["ignore"] = json!([]))
        .refused(&["lm_head.weight", "calls for codes"]);
    Folder::of(GPTQ)
        .quantization(|q| q["lm_head"] = json!(true))
        .refused(&["lm_head.weight", "calls for codes"]);
    Folder::of("gptq-v2-w2-head")
        .quantization(|q| q["lm_head"] = json!(false))
        .refused(&["lm_head", "floats"]);
    let mut tied = Folder::of("gptq-v2-w2-head");
    tied.config["tie_word_embeddings"] = json!(true);
    tied.refused(&["tie_word_embeddings", "set it to false"]);
    // Zero points that are no middle, and the first format's taken for the second's.
    Folder::of(GPTQ).quantization(|q| q["sym"] = json!(true)).refused(&[
        "sym",
        "qzeros",
        "checkpoint_format",
    ]);
    // No configuration at all.
    for fixture in [AWQ, PACK] {
        let mut f = Folder::of(fixture);
        f.config.as_object_mut().unwrap().remove("quantization_config");
        f.refused(&["no `quantization_config`", "quantize_config.json"]);
    }
    let mut f = Folder::of(AWQ);
    f.config.as_object_mut().unwrap().remove("quantization_config");
    for (text, words) in [("{", "not JSON"), ("[]", "not an object"), ("{}", "`bits` is missing")] {
        std::fs::write(f.dir.path().join("quantize_config.json"), text).unwrap();
        let error = f.import(Integers::Keep).err().unwrap();
        assert!(error.path.ends_with("quantize_config.json") && error.what.contains(words), "{error}");
        assert!(error.hint.is_some());
    }
    // Stored scales of inputs where the configuration has none.
    for part in ["input_scale", "input_zero_point"] {
        let f = Folder::of(INT).with(&up(part), Dtype::I8, &[1], vec![1]);
        f.refused(&[&up(part), "no stored scale"]);
    }
    let inputs = |f: Folder, key: &str, v: Value| {
        f.quantization(|q| q["config_groups"]["group_0"]["input_activations"][key] = v)
    };
    let token = inputs(Folder::of(STATIC), "strategy", json!("token"));
    inputs(token, "dynamic", json!(true)).refused(&["input_scale", "no stored scale"]);
    inputs(Folder::of(ZEROED), "symmetric", json!(true)).refused(&["symmetric", "input_zero_point"]);
    // Scales of caches belong to no layer that was imported.
    let name = "model.layers.0.self_attn.k_scale";
    Folder::of(INT).with(name, Dtype::F32, &[1], vec![0; 4]).refused(&[name, "not part of"]);
    Folder::of(AWQ)
        .with("model.embed_tokens.qweight", Dtype::I32, &[1, 1], vec![0; 4])
        .refused(&["embedding"]);
}

#[test]
fn values_that_cannot_be() {
    let nan = |b: &mut [u8]| b[..2].copy_from_slice(&[0xff, 0xff]);
    Folder::of(AWQ).bytes(&up("scales"), nan).unreadable("scale", &[&up("scales"), "NaN or infinite"]);
    Folder::of(GPTQ).bytes(&up("scales"), nan).unreadable("scale", &[&up("scales"), "NaN or infinite"]);
    let scale = up("weight_scale");
    Folder::of(PACK).bytes(&scale, nan).unreadable("scale", &[&scale, "NaN or infinite"]);
    let infinite = |b: &mut [u8]| b[..2].copy_from_slice(&[0x80, 0x7f]);
    let f = Folder::of(PACK).bytes(&scale, infinite);
    assert!(f.import(Integers::Keep).unwrap().source.weights.shared(&format!("{UP}.weight.scale")).is_err());
    // Bytes that are no codes and no zero points of 5 bits.
    let zero = up("weight_zero_point");
    Folder::of(NAIVE).bytes(&zero, |b| b[7] = 16).unreadable("zero", &[&zero, "element 7 is 16", "5 bits"]);
    let weight = up("weight");
    Folder::of(NAIVE).bytes(&weight, |b| b[9] = 0xef).unreadable("codes", &[&weight, "element 9 is -17"]);
}

#[test]
fn files_that_are_cut_short() {
    for fixture in [AWQ, ACT, PACK, INT] {
        let f = Folder::of(fixture);
        f.write();
        let path = f.dir.path().join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        for keep in [bytes.len() - 1, bytes.len() / 2, 200, 8, 3, 0] {
            std::fs::write(&path, &bytes[..keep]).unwrap();
            let error = qrmc_frontends::import(f.dir.path(), Integers::Keep).err().unwrap();
            assert!(
                error.path.ends_with("model.safetensors") && error.hint.is_some(),
                "{fixture} {keep}: {error}"
            );
        }
    }
}

#[test]
fn overrides_that_are_understood() {
    // A pattern for every layer says what the rest of the settings says wrongly.
    let dynamic = json!({"+:model.*": {"bits": 4, "group_size": 32, "sym": false}, "-:nothing": {}});
    let f = Folder::of(GPTQ).quantization(|q| {
        q["dynamic"] = dynamic;
        q["bits"] = json!(8);
        q["group_size"] = json!(-1);
    });
    let have = f.import(Integers::Keep).unwrap().source.weights.tensors();
    assert_eq!(have, Folder::of(GPTQ).import(Integers::Keep).unwrap().source.weights.tensors());
    let blocks = json!([["self_attn.q_proj"], ["mlp.up_proj"]]);
    let f = Folder::of(GPTQ).quantization(|q| q["modules_in_block_to_quantize"] = blocks);
    f.refused(&["leaves it in floats"]);
    // Groups of columns that nobody has set.
    let unset = vec![0xff; 64 * 4];
    let f = Folder::of(PACK).with(&up("weight_g_idx"), Dtype::I32, &[64], unset);
    let weights = f.import(Integers::Keep).unwrap().source.weights;
    let plain = Folder::of(PACK).import(Integers::Keep).unwrap().source.weights;
    let codes = format!("{UP}.weight.codes");
    assert!(weights.raw(&codes).unwrap().bytes == plain.raw(&codes).unwrap().bytes);
}
