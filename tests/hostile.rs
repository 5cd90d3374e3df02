//! Bad input: a clear error with advice, and what was there is not lost.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::run::{Said, run, snapshot};
use crate::support::{TINY, data};

/// A copy of a fixture (with the tiny model's tokenizer) that a test may damage.
pub(crate) struct Model {
    pub(crate) dir: tempfile::TempDir,
}

impl Model {
    pub(crate) fn of(fixture: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("model");
        std::fs::create_dir(&to).unwrap();
        for e in std::fs::read_dir(data(fixture)).unwrap() {
            let p = e.unwrap().path();
            std::fs::copy(&p, to.join(p.file_name().unwrap())).unwrap();
        }
        Model { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("model").join(name)
    }

    fn config(&self, change: impl FnOnce(&mut Value)) -> &Self {
        let path = self.path("config.json");
        let mut v: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut v);
        std::fs::write(&path, v.to_string()).unwrap();
        self
    }

    /// Changes the header of a safetensors file and writes it back with the same data.
    fn header(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let bytes = std::fs::read(self.path(file)).unwrap();
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut head: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
        change(&mut head);
        let text = head.to_string();
        let mut out = (text.len() as u64).to_le_bytes().to_vec();
        out.extend(text.bytes());
        out.extend(&bytes[8 + n..]);
        std::fs::write(self.path(file), out).unwrap();
    }

    pub(crate) fn compile(&self, args: &[&str]) -> Said {
        let all: Vec<&str> =
            ["compile", "model", "-o", "out"].into_iter().chain(args.iter().copied()).collect();
        run(self.dir.path(), &all)
    }

    /// Compiles and expects a failure that says all of `words` and leaves nothing in the place of the output.
    pub(crate) fn refused(&self, args: &[&str], code: i32, words: &[&str]) {
        let s = self.compile(args);
        assert_eq!(s.code, code, "{args:?}\n{}{}", s.out, s.err);
        for w in words {
            assert!(s.err.contains(w), "`{w}` is not said:\n{}", s.err);
        }
        assert!(s.err.contains("hint: "), "no advice:\n{}", s.err);
        assert!(!s.err.contains("panicked"), "{}", s.err);
        assert!(!self.dir.path().join("out").exists());
    }
}

const RTN: [&str; 2] = ["--pass", "rtn:bits=4,group=8"];
const LLAMA: &str = "fixtures/llama-gqa-rope3";

#[test]
fn damaged_safetensors() {
    let m = Model::of(LLAMA);
    let file = m.path("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 1000]).unwrap();
    m.refused(&RTN, 1, &["model.safetensors", "download"]);
    std::fs::write(&file, &bytes[..4]).unwrap();
    m.refused(&RTN, 1, &["model.safetensors", "4 bytes"]);
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&file, &huge).unwrap();
    m.refused(&RTN, 1, &["model.safetensors", "header"]);
    let name = "model.layers.0.self_attn.q_proj.weight";
    std::fs::write(&file, &bytes).unwrap();
    m.header("model.safetensors", |h| h[name]["data_offsets"] = json!([0, 1u64 << 60]));
    m.refused(&RTN, 1, &[name]);
    std::fs::write(&file, &bytes).unwrap();
    m.header("model.safetensors", |h| {
        let other = h["model.layers.1.self_attn.q_proj.weight"]["data_offsets"].clone();
        h[name]["data_offsets"] = other;
    });
    m.refused(&RTN, 1, &["model.safetensors", "belong to no tensor"]);
}

#[test]
fn missing_shard_and_wrong_index() {
    let m = Model::of("fixtures/qwen2-bias-untied");
    std::fs::remove_file(m.path("model-00003-of-00004.safetensors")).unwrap();
    m.refused(&RTN, 1, &["model-00003-of-00004.safetensors"]);
}

#[test]
fn tensors_that_contradict_the_configuration() {
    Model::of(LLAMA).config(|c| c["intermediate_size"] = json!(200)).refused(
        &RTN,
        1,
        &["gate_proj", "[192, 64]", "[200, 64]"],
    );
    Model::of(LLAMA).config(|c| c["num_hidden_layers"] = json!(3)).refused(
        &RTN,
        1,
        &["model.layers.2", "missing"],
    );
    Model::of(LLAMA).config(|c| c["num_hidden_layers"] = json!(1)).refused(
        &RTN,
        1,
        &["model.layers.1", "not part of"],
    );
    Model::of(LLAMA).config(|c| c["tie_word_embeddings"] = json!(true)).refused(&RTN, 1, &["lm_head.weight"]);
    Model::of(LLAMA).config(|c| c["attention_bias"] = json!(true)).refused(&RTN, 1, &["bias", "missing"]);
}

#[test]
fn configurations_that_would_have_to_be_ignored() {
    Model::of(LLAMA).config(|c| c["model_type"] = json!("mamba")).refused(
        &RTN,
        1,
        &["mamba", "llama, qwen2, qwen3"],
    );
    let qwen = "fixtures/qwen2-bias-tied";
    Model::of(qwen).config(|c| c["use_sliding_window"] = json!(true)).refused(&RTN, 1, &["sliding"]);
    Model::of(LLAMA).config(|c| c["hidden_act"] = json!("gelu")).refused(&RTN, 1, &["gelu", "silu"]);
    Model::of(LLAMA).config(|c| c["rope_scaling"]["rope_type"] = json!("dynamic")).refused(
        &RTN,
        1,
        &["dynamic", "yarn"],
    );
    Model::of(LLAMA).config(|c| c["quantization_config"] = json!({"quant_method": "hqq"})).refused(
        &RTN,
        1,
        &["config.json", "quant_method", "hqq"],
    );
    let m = Model::of(LLAMA);
    std::fs::write(m.path("config.json"), "{").unwrap();
    m.refused(&RTN, 1, &["config.json"]);
    for (key, value) in
        [("hidden_size", json!(0)), ("vocab_size", json!(-1)), ("num_attention_heads", json!(1e300))]
    {
        let m = Model::of(LLAMA);
        m.config(|c| c[key] = value.clone());
        let s = m.compile(&RTN);
        assert_eq!(s.code, 1, "{}", s.err);
        assert!(s.err.contains(key), "{}", s.err);
    }
}

#[test]
fn weights_that_are_not_finite() {
    let m = Model::of(LLAMA);
    let file = m.path("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let at = bytes.len() - 4 * 100;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
    m.refused(&RTN, 1, &["weight `", "NaN or infinite"]);
}

#[test]
fn damaged_gguf() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |bytes: &[u8], words: &[&str]| {
        std::fs::write(dir.path().join("m.gguf"), bytes).unwrap();
        let s = run(dir.path(), &["inspect", "m.gguf"]);
        assert_eq!(s.code, 1, "{}", s.err);
        for w in words {
            assert!(s.err.contains(w), "`{w}` is not said:\n{}", s.err);
        }
    };
    refused(b"not a model at all", &["m.gguf"]);
    let mut v3 = b"GGUF".to_vec();
    v3.extend(3u32.to_le_bytes());
    refused(&v3, &["m.gguf"]);
    v3.extend(u64::MAX.to_le_bytes());
    v3.extend(u64::MAX.to_le_bytes());
    refused(&v3, &["18446744073709551615"]);
    let mut v1 = b"GGUF".to_vec();
    v1.extend(1u32.to_le_bytes());
    v1.extend([0; 64]);
    refused(&v1, &["version 1"]);
}

#[test]
fn tokenizer_and_text() {
    let m = Model::of(TINY);
    let awq = ["--pass", "awq:group=32", "--calib", "text.txt"];
    std::fs::write(m.dir.path().join("text.txt"), "too short").unwrap();
    m.refused(&awq, 1, &["token"]);
    m.refused(&["--pass", "awq:group=32", "--calib", "nowhere.txt"], 1, &["nowhere.txt"]);
    m.refused(&["--pass", "awq:group=32"], 2, &["--calib"]);
    std::fs::remove_file(m.path("tokenizer.json")).unwrap();
    m.refused(&awq, 1, &["tokenizer.json"]);
}

#[test]
fn groups_that_do_not_divide() {
    let m = Model::of(TINY);
    m.refused(&["--pass", "rtn:group=100"], 4, &["100", "256", "128", "64"]);
    let m = Model::of("fixtures/qwen2-bias-tied");
    m.refused(&["--pass", "rtn:group=128"], 4, &["128", "64", "32"]);
}

#[test]
fn pipelines_that_make_no_sense() {
    let m = Model::of(TINY);
    for (pass, code, words) in [
        ("awqq", 2, &["awqq", "`awq`"][..]),
        ("rtn{bitz=4}", 2, &["bitz", "`bits`"]),
        ("rtn{bits=9}", 2, &["bits", "2 to 8", "9"]),
        ("rtn{bits=4", 2, &["character"]),
        ("quarot{kv=5}", 2, &["kv", "2, 3, 4 or 8", "5"]),
        ("kvquant{bits=5}", 2, &["bits", "2, 3, 4 or 8", "5"]),
        ("flatquant{skip=lost}", 1, &["lost", "layer0", "q_proj"]),
        ("rtnbits=4", 2, &["shell"]),
        ("annotate,scale", 1, &["scale", "float"]),
    ] {
        m.refused(
            &["--pass", pass, "--calib", data("wikitext-2-train-sample.txt").to_str().unwrap()],
            code,
            words,
        );
    }
    m.refused(&[], 2, &["--pass"]);
    m.refused(&["--pass", "rtn", "--mem", "1M"], 5, &["--mem"]);
    m.refused(&["--pass", "rtn", "--target", "abacus"], 2, &["abacus", "cpu"]);
}

#[test]
fn what_is_there_is_not_lost() {
    let m = Model::of("fixtures/qwen2-bias-tied");
    let out = m.dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("thesis.tex"), "years of work").unwrap();
    let s = m.compile(&RTN);
    assert_eq!(s.code, 1);
    assert!(s.err.contains("holds something else") && s.err.contains("-o"), "{}", s.err);
    assert_eq!(std::fs::read_to_string(out.join("thesis.tex")).unwrap(), "years of work");
    // A file in the place of the folder is kept too.
    std::fs::remove_dir_all(&out).unwrap();
    std::fs::write(&out, "a file").unwrap();
    assert_eq!(m.compile(&RTN).code, 1);
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "a file");
    std::fs::remove_file(&out).unwrap();
    // An artefact is replaced by a good one, and kept when the new one fails.
    assert_eq!(m.compile(&RTN).code, 0);
    let before = snapshot(&out);
    assert_ne!(m.compile(&["--pass", "rtn:group=100"]).code, 0);
    assert!(snapshot(&out) == before);
    assert_eq!(m.compile(&["--pass", "rtn:bits=3,group=8"]).code, 0);
    assert!(snapshot(&out) != before);
}

#[test]
fn outputs_that_cannot_be_written() {
    let m = Model::of("fixtures/qwen2-bias-tied");
    // Nobody makes folders in /proc, not even root.
    let s = run(m.dir.path(), &["compile", "model", "--pass", "rtn:group=8", "-o", "/proc/qrmc-out"]);
    assert_eq!(s.code, 1, "{}", s.err);
    assert!(s.err.contains("/proc/qrmc-out"), "{}", s.err);
}

#[test]
fn altered_artefacts() {
    let m = Model::of("fixtures/qwen2-bias-tied");
    assert_eq!(m.compile(&RTN).code, 0);
    let out = m.dir.path().join("out");
    let inspect = |words: &[&str]| {
        let s = run(m.dir.path(), &["inspect", "out"]);
        assert_eq!(s.code, 1, "{}", s.out);
        for w in words {
            assert!(s.err.contains(w), "`{w}` is not said:\n{}", s.err);
        }
        assert!(s.err.contains("hint: "), "{}", s.err);
    };
    let keep = |name: &str| (out.join(name), std::fs::read(out.join(name)).unwrap());
    let flip = |path: &Path, bytes: &[u8], at: usize| {
        let mut b = bytes.to_vec();
        b[at] ^= 1;
        std::fs::write(path, b).unwrap();
    };
    let (path, bytes) = keep("model.safetensors");
    flip(&path, &bytes, bytes.len() - 3);
    inspect(&["tensor `", "altered"]);
    std::fs::write(&path, &bytes[..bytes.len() - 7]).unwrap();
    inspect(&["model.safetensors"]);
    std::fs::remove_file(&path).unwrap();
    inspect(&["model.safetensors"]);
    std::fs::write(&path, &bytes).unwrap();
    let (path, bytes) = keep("model.qir");
    flip(&path, &bytes, bytes.len() / 2);
    inspect(&["model.qir", "altered"]);
    std::fs::write(&path, &bytes).unwrap();
    let (path, bytes) = keep("manifest.json");
    let mut v: Value = serde_json::from_slice(&bytes).unwrap();
    v["tensors"].as_object_mut().unwrap().remove("model.norm.weight");
    std::fs::write(&path, v.to_string()).unwrap();
    inspect(&["model.norm.weight"]);
    std::fs::write(&path, b"{}").unwrap();
    inspect(&["manifest.json"]);
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(run(m.dir.path(), &["inspect", "out"]).code, 0);
}
