//! Checkpoints become modules: Hugging Face folders, GGUF files and ONNX models, in floats or quantized.
//!
//! Weights stay where they are; files are mapped, and headers are checked before anything is believed.

mod arch;
mod checkpoint;
mod decoder;
mod error;
pub mod gguf;
pub mod hf;
mod onnx;
mod quantized;

use std::fs::Metadata;
use std::io::Read;
use std::path::{Path, PathBuf};

pub use arch::{ARCHS, ArchSpec, DecoderConfig, When, read_config};
pub use checkpoint::{Checkpoint, Opened, Quantization, RoundedInput, SideFile, SmallTensor};
pub use error::ImportError;
pub use onnx::{OnnxHeader, OnnxNode, genai_config};
use qrmc_ir::Module;
pub use quantized::QuantizedFolder;
use serde_json::Value;

/// What becomes of weights that a checkpoint stores as integer codes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Integers {
    /// Codes, scales and zero points are taken as they are, where the IR can say them.
    Keep,
    /// The values that they stand for are taken: what passes start from.
    Dequantize,
    /// As `Keep`, and codes whose columns are in groups out of order are codes, too: for what is said of schemes. The IR has
    /// no such order, so the values are not those of the model.
    Schemes,
}

/// What is noted where codes would have been kept.
const DEQUANTIZED: &str = "the checkpoint's integers are de-quantized, because passes start from floats";

/// An imported model.
pub struct Imported {
    /// The graph over the checkpoint's tensors.
    pub module: Module,
    /// The checkpoint behind it.
    pub source: Opened,
}

/// Opens a checkpoint, recognised by its content: a Hugging Face folder, a GGUF file or an ONNX model.
///
/// # Errors
/// If it is neither, or its headers do not hold together.
pub fn open(path: &Path, integers: Integers) -> Result<Opened, ImportError> {
    let meta = metadata(path)?;
    if let Some(model) = onnx_model(path, &meta) {
        return Ok(onnx::import(&model, integers)?.source);
    }
    open_tensors(path, &meta, integers)
}

/// Opens a checkpoint that holds tensors alone.
fn open_tensors(path: &Path, meta: &Metadata, integers: Integers) -> Result<Opened, ImportError> {
    if meta.is_dir() { hf::open_folder(path, integers) } else { gguf::open_file(path, integers) }
}

fn metadata(path: &Path) -> Result<Metadata, ImportError> {
    std::fs::metadata(path).map_err(|e| {
        ImportError::io(path, "open", &e)
            .hint("MODEL is a Hugging Face folder (with config.json), a GGUF file or an ONNX model")
    })
}

/// The ONNX model that a path names: a file, or a folder that holds one and no other weights.
pub fn onnx_path(path: &Path) -> Option<PathBuf> {
    onnx_model(path, &std::fs::metadata(path).ok()?)
}

fn onnx_model(path: &Path, meta: &Metadata) -> Option<PathBuf> {
    if !meta.is_dir() {
        let mut start = [0; 4];
        std::fs::File::open(path).and_then(|mut f| f.read_exact(&mut start)).ok()?;
        return (&start != b"GGUF" && onnx::is_model(path, &start)).then(|| path.to_owned());
    }
    let model = path.join("model.onnx");
    let weights = ["model.safetensors", "model.safetensors.index.json"].iter().any(|n| path.join(n).exists());
    (model.is_file() && !weights).then_some(model)
}

/// Opens a checkpoint and builds its module.
///
/// # Errors
/// As [`open`]; also if the architecture is unknown or tensors and configuration contradict each other.
pub fn import(path: &Path, integers: Integers) -> Result<Imported, ImportError> {
    let meta = metadata(path)?;
    if let Some(model) = onnx_model(path, &meta) {
        return onnx::import(&model, integers);
    }
    let source = open_tensors(path, &meta, integers)?;
    let config = read_config(path, &source.config)?;
    let module = decoder::build(path, &config, &*source.weights)?;
    Ok(Imported { module, source })
}

/// The module of the float model that a `config.json` describes, over weights that are nowhere: what a quantized one is
/// compared with. `path` stands in messages.
///
/// # Errors
/// If the configuration describes no model.
pub fn outline(path: &Path, config: &Value) -> Result<Module, ImportError> {
    let mut config = config.clone();
    if let Some(o) = config.as_object_mut() {
        o.remove("quantization_config");
    }
    let config = read_config(path, &config)?;
    decoder::build(path, &config, &decoder::Expected(&config))
}
