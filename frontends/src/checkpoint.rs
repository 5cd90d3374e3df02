//! A checkpoint as found on disk, before it becomes a module.

use std::path::PathBuf;

use qrmc_ir::{TensorType, WeightSource};
use serde_json::Value;

/// A [`WeightSource`] that can say what it holds, under Hugging Face tensor names.
pub trait Checkpoint: WeightSource {
    /// Name, type and shape of every tensor, in file order. Shapes are outermost first.
    fn tensors(&self) -> Vec<(String, TensorType)>;

    /// The files that hold the weights, in order: what identifies the source is their content.
    fn weight_files(&self) -> Vec<PathBuf>;
}

/// A file that travels with the model byte for byte, such as `tokenizer.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideFile {
    /// Name inside the folder.
    pub name: String,
    /// Content.
    pub bytes: Vec<u8>,
}

/// What a reader of one file format hands to the decoder builder.
pub struct Opened {
    /// File or folder that was named by the user.
    pub path: PathBuf,
    /// Format, for people: `"Hugging Face folder"`, `"GGUF v3"`.
    pub format: String,
    /// The Hugging Face `config.json`, read or rebuilt.
    pub config: Value,
    /// The weights.
    pub weights: Box<dyn Checkpoint>,
    /// `config.json`, `generation_config.json`, tokenizer and template files.
    pub files: Vec<SideFile>,
}
