//! Checkpoints become modules: Hugging Face folders and GGUF files, in floats or quantized.
//!
//! Weights stay where they are; files are mapped, and headers are checked before anything is believed.

mod arch;
mod checkpoint;
mod decoder;
mod error;
pub mod gguf;
pub mod hf;
mod quantized;

use std::path::Path;

pub use arch::{ARCHS, ArchSpec, DecoderConfig, When, read_config};
pub use checkpoint::{Checkpoint, Opened, SideFile};
pub use error::ImportError;
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

/// Opens a checkpoint, recognised by its content: a Hugging Face folder or a GGUF file.
///
/// # Errors
/// If it is neither, or its headers do not hold together.
pub fn open(path: &Path, integers: Integers) -> Result<Opened, ImportError> {
    let meta = std::fs::metadata(path).map_err(|e| {
        ImportError::io(path, "open", &e)
            .hint("MODEL is a Hugging Face folder (with config.json) or a GGUF file")
    })?;
    if meta.is_dir() { hf::open_folder(path, integers) } else { gguf::open_file(path, integers) }
}

/// Opens a checkpoint and builds its module.
///
/// # Errors
/// As [`open`]; also if the architecture is unknown or tensors and configuration contradict each other.
pub fn import(path: &Path, integers: Integers) -> Result<Imported, ImportError> {
    let source = open(path, integers)?;
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
