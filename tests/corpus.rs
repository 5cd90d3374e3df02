//! The inputs of the fuzz targets (`fuzz/corpus`), as they are and damaged in seeded ways: each is read or refused, and
//! nothing panics. What `cargo fuzz` has found stays found here.

use std::path::{Path, PathBuf};

use qrmc_frontends::hf::SafetensorsFolder;
use qrmc_frontends::{Checkpoint, Integers};

/// Damaged forms of each input.
const DAMAGED: u64 = 300;

fn inputs(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|p| (p.clone(), std::fs::read(p).unwrap())).collect()
}

/// The input with some bytes replaced, cut out, or taken from elsewhere in it; the first `head` bytes most often.
fn damaged(bytes: &[u8], head: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut below = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n.max(1)
    };
    let mut out = bytes.to_vec();
    for _ in 0..1 + below(4) {
        let span = if below(8) == 0 { out.len() } else { head.min(out.len()) };
        let at = below(span);
        match below(5) {
            0 => out[at] = below(256) as u8,
            1 => out[at] = b"0123456789-\"{}[],:."[below(19)],
            2 => out[at] ^= 1 << below(8),
            3 => drop(out.drain(at..(at + 1 + below(8)).min(out.len()))),
            _ => {
                let (from, n) = (below(out.len()), 1 + below(16));
                let part = out[from..(from + n).min(out.len())].to_vec();
                out.splice(at..at, part);
            }
        }
        if out.is_empty() {
            out.push(0);
        }
    }
    out
}

/// Reads every tensor: its bytes are what its type says, and what is lent is what is read. How many could be read.
fn read(weights: &dyn Checkpoint) -> usize {
    let mut count = 0;
    for (name, ty) in weights.tensors() {
        let lent = weights.shared(&name);
        let Ok(raw) = weights.raw(&name) else { continue };
        assert_eq!((&raw.ty, Some(raw.bytes.len())), (&ty, ty.bytes()), "{name}");
        assert!(lent.unwrap().is_none_or(|lent| *lent == *raw.bytes), "{name}");
        assert!(weights.read(&name).is_ok(), "{name}");
        count += 1;
    }
    count
}

/// Imports both ways; what is accepted verifies. How many imports were accepted.
fn import(path: &Path) -> usize {
    let mut accepted = 0;
    for integers in [Integers::Keep, Integers::Dequantize] {
        match qrmc_frontends::import(path, integers) {
            Ok(m) => {
                qrmc_ir::verify(&m.module).unwrap();
                assert!(read(&*m.source.weights) > 0);
                accepted += 1;
            }
            Err(e) => assert!(!e.what.is_empty()),
        }
    }
    accepted
}

/// The parts of an input of the target `quantized`: a length of two bytes before each of the first two.
fn parts(input: &[u8]) -> Option<[&[u8]; 3]> {
    let part = |data: &'_ [u8]| -> Option<(usize, usize)> {
        let n = usize::from(u16::from_le_bytes(*data.first_chunk()?));
        (data.len() >= 2 + n).then_some((2, 2 + n))
    };
    let (a, b) = part(input)?;
    let rest = &input[b..];
    let (c, d) = part(rest)?;
    Some([&input[a..b], &rest[c..d], &rest[d..]])
}

/// Writes the folder of an input: behind a record separator in the first part stands vllm-ascend's description.
fn write_folder(dir: &Path, config: &[u8], header: &[u8], data: &[u8]) {
    let mut texts = config.splitn(2, |&b| b == 0x1E);
    std::fs::write(dir.join("config.json"), texts.next().unwrap()).unwrap();
    let description = dir.join("quant_model_description.json");
    let _ = std::fs::remove_file(&description);
    let described = texts.next();
    if let Some(text) = described {
        std::fs::write(description, text).unwrap();
    }
    let stem = if described.is_some() { "quant_model_weights" } else { "model" };
    let length = (header.len() as u64).to_le_bytes();
    let model = dir.join(format!("{stem}.safetensors"));
    let _ = std::fs::remove_file(&model);
    std::fs::write(model, [&length, header, data].concat()).unwrap();
}

#[test]
fn quantized_folders() {
    let dir = tempfile::tempdir().unwrap();
    let mut accepted = 0;
    for (_, input) in inputs("quantized") {
        let Some([config, header, data]) = parts(&input) else { continue };
        write_folder(dir.path(), config, header, data);
        accepted += import(dir.path());
        for seed in 0..DAMAGED {
            let (mut c, mut h, mut d) = (config.to_vec(), header.to_vec(), data.to_vec());
            match seed % 4 {
                0 => c = damaged(config, config.len(), seed),
                1 => h = damaged(header, header.len(), seed),
                2 => d = damaged(data, data.len(), seed),
                _ => (c, d) = (damaged(config, config.len(), seed), damaged(data, data.len(), !seed)),
            }
            d.resize(data.len(), 0);
            write_folder(dir.path(), &c, &h, &d);
            import(dir.path());
        }
    }
    assert!(accepted >= 21, "the seeds are accepted: {accepted}");
}

/// Imports the inputs of a target that are one file, whole and damaged, most often in the first `head` bytes; at least
/// `least` imports of whole ones succeed.
fn single_files(target: &str, head: usize, least: usize) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(format!("m.{target}"));
    let mut accepted = 0;
    let once = |bytes: &[u8]| {
        let _ = std::fs::remove_file(&file);
        std::fs::write(&file, bytes).unwrap();
        import(&file)
    };
    for (_, input) in inputs(target) {
        accepted += once(&input);
        for seed in 0..DAMAGED {
            once(&damaged(&input, head, seed));
        }
    }
    assert!(accepted >= least, "the seeds are accepted: {accepted}");
}

#[test]
fn gguf_files() {
    single_files("gguf", 2500, 8);
}

#[test]
fn onnx_files() {
    single_files("onnx", 20_000, 10);
}

#[test]
fn safetensors_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    let once = |bytes: &[u8]| {
        let _ = std::fs::remove_file(&file);
        std::fs::write(&file, bytes).unwrap();
        SafetensorsFolder::open(dir.path()).map_or(0, |f| read(&f.unwrap()))
    };
    let mut tensors = 0;
    for (_, input) in inputs("safetensors") {
        tensors += once(&input);
        for seed in 0..DAMAGED {
            once(&damaged(&input, 3000, seed));
        }
    }
    assert!(tensors > 20, "the seeds hold tensors: {tensors}");
}

#[test]
fn texts() {
    let mut read = 0;
    for (_, input) in inputs("qir") {
        for seed in 0..10 * DAMAGED {
            let bytes = if seed == 0 { input.clone() } else { damaged(&input, input.len(), seed) };
            let Ok(text) = std::str::from_utf8(&bytes) else { continue };
            let Ok(module) = qrmc_ir::parse(text) else { continue };
            assert!(qrmc_ir::parse(&qrmc_ir::print(&module)).unwrap() == module);
            let _ = qrmc_ir::verify(&module);
            read += 1;
        }
    }
    assert!(read > 2, "the seeds are read: {read}");
}
