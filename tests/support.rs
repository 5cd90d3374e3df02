//! What the tests share.

use std::path::{Path, PathBuf};

use qrmc_frontends::{Imported, Integers};
use qrmc_ir::{Elem, Tensor};

/// A path under `tests/data`.
pub(crate) fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

pub(crate) const TINY: &str = "tiny-qwen2-wiki";

pub(crate) const FIXTURES: [&str; 5] =
    ["llama-gqa-rope3", "llama-mha-tied", "qwen2-bias-tied", "qwen2-bias-untied", "qwen3-qknorm"];

pub(crate) fn import(name: &str) -> Imported {
    qrmc_frontends::import(&data(name), Integers::Keep).unwrap()
}

/// The tensors of a fixture's `reference.safetensors`.
pub(crate) struct Reference {
    bytes: Vec<u8>,
}

impl Reference {
    pub(crate) fn open(fixture: &str) -> Self {
        let path = data("fixtures").join(fixture).join("reference.safetensors");
        Reference { bytes: std::fs::read(path).unwrap() }
    }

    pub(crate) fn get(&self, name: &str) -> Tensor {
        let file = safetensors::SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap();
        match view.dtype() {
            safetensors::Dtype::I64 => {
                let ids =
                    view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as i32);
                Tensor::i32(view.shape(), ids.collect())
            }
            _ => Tensor::from_le_bytes(Elem::F32, view.shape(), view.data()).unwrap(),
        }
    }
}

/// Largest difference, and largest magnitude of the reference.
pub(crate) fn gap(have: &Tensor, want: &Tensor) -> (f32, f32) {
    assert_eq!(have.shape(), want.shape());
    let (h, w) = (have.as_f32().unwrap(), want.as_f32().unwrap());
    let max = |it: &mut dyn Iterator<Item = f32>| it.fold(0.0, f32::max);
    let diff = max(&mut h.iter().zip(w).map(|(a, b)| if a.is_nan() { f32::INFINITY } else { (a - b).abs() }));
    (diff, max(&mut w.iter().map(|x| x.abs())))
}

/// Arguments of `@main` without anything in the caches.
pub(crate) fn main_args(module: &qrmc_ir::Module, ids: &Tensor) -> Vec<Tensor> {
    let (b, s) = (ids.shape()[0], ids.shape()[1]);
    let width = (module.facts.kv_heads * module.facts.head_dim) as usize;
    let mut args = vec![ids.clone(), Tensor::i32([s], (0..s as i32).collect())];
    args.extend((0..2 * module.facts.layers).map(|_| Tensor::zeros([b, 0, width])));
    args
}

/// A checkpoint as a weight source.
pub(crate) struct Source(pub(crate) Box<dyn qrmc_frontends::Checkpoint>);

impl qrmc_ir::WeightSource for Source {
    fn raw(&self, name: &str) -> Result<qrmc_ir::RawWeight<'_>, qrmc_ir::WeightError> {
        self.0.raw(name)
    }
}

/// Windows of the text that ships with the tiny model.
pub(crate) fn tiny_calibration(n: usize, len: usize) -> qrmc_passes::Calibration {
    let read = |f: &str| std::fs::read(data(TINY).join(f)).unwrap();
    let tokenizer = qrmc_runtime::text::Tokenizer::from_bytes(&read("tokenizer.json"), None, None).unwrap();
    let text = std::fs::read_to_string(data("wikitext-2-train-sample.txt")).unwrap();
    let ids = tokenizer.encode(&text[..200_000], false).unwrap();
    let windows = ids.chunks_exact(len).take(n).map(|w| w.iter().map(|&t| t as i32).collect()).collect();
    qrmc_passes::Calibration { windows, description: "wikitext-2-train-sample.txt".into() }
}

/// Tensors in memory by name, as an artefact stores them.
#[derive(Default)]
pub(crate) struct Stored(std::collections::HashMap<String, (qrmc_ir::TensorType, Vec<u8>)>);

impl Stored {
    pub(crate) fn put(&mut self, name: &str, ty: qrmc_ir::TensorType, bytes: &[u8]) {
        assert!(self.0.insert(name.to_owned(), (ty, bytes.to_vec())).is_none(), "{name} is written twice");
    }
}

impl qrmc_ir::WeightSource for Stored {
    fn raw(&self, name: &str) -> Result<qrmc_ir::RawWeight<'_>, qrmc_ir::WeightError> {
        let (ty, bytes) =
            self.0.get(name).ok_or_else(|| qrmc_ir::WeightError::new(name, "was not written"))?;
        Ok(qrmc_ir::RawWeight { ty: ty.clone(), bytes: bytes.into() })
    }
}
