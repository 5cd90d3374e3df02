//! `manifest.json`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Version of the artefact's layout.
pub const FORMAT: u32 = 1;

/// Where a model came from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SourceInfo {
    /// File or folder name, without its path.
    pub name: String,
    /// `Hugging Face folder`, `GGUF v3`.
    pub format: String,
    /// BLAKE3 over the BLAKE3 hashes of the weight files, in order, and the bytes of `config.json`.
    pub hash: String,
}

/// One tensor.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TensorInfo {
    /// Logical type, as in `model.qir`.
    #[serde(rename = "type")]
    pub ty: String,
    /// File that holds it.
    pub file: String,
    /// Bytes in the file.
    pub bytes: u64,
    /// BLAKE3 of these bytes.
    pub hash: String,
}

/// What an artefact consists of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// See [`FORMAT`].
    pub format: u32,
    /// Version of qrmc that wrote it.
    pub qrmc: String,
    /// The model that was compiled.
    pub source: SourceInfo,
    /// Passes, each in normal form.
    pub pipeline: Vec<String>,
    /// BLAKE3 of the other files, by name.
    pub files: BTreeMap<String, String>,
    /// Every tensor, by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Manifest {
    /// What a tensor is: its type and its hash. `None` if there is none of this name.
    pub fn identity(&self, tensor: &str) -> Option<String> {
        self.tensors.get(tensor).map(|t| format!("{} {}", t.ty, t.hash))
    }
}
