//! The artefact: a folder that holds a compiled model and says how it was made.
//!
//! | file | content |
//! |---|---|
//! | `model.qir` | the graph, every weight declared with its type |
//! | `model-NNNNN-of-NNNNN.safetensors` | the tensors; packed codes as `U8 [rows, bytes]` |
//! | `manifest.json` | format, version, source, and shape, type, file and hash of every tensor |
//! | `recipe.yaml` | every option that made it |
//! | the rest | tokenizer, template and configuration files of the source, byte for byte |

mod manifest;
mod read;
mod shards;
mod write;

pub use manifest::{FORMAT, Manifest, SourceInfo, TensorInfo};
pub use read::{Artefact, Check, Spread, is_artefact};
pub(crate) use shards::stored_bytes;
pub use shards::{Dtype, ShardWriter, StoredTensor, TensorPlan, read_tensors, write_tensors};
pub use write::{ArtefactWriter, Output};

use std::path::{Path, PathBuf};

/// An artefact, or a place for one, that is not as it should be.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}", path.display())]
pub struct ArtefactError {
    /// File or folder.
    pub path: PathBuf,
    /// What was seen.
    pub what: String,
    /// What to do.
    pub hint: Option<String>,
}

impl ArtefactError {
    pub(crate) fn new(path: &Path, what: impl Into<String>) -> Self {
        ArtefactError { path: path.to_owned(), what: what.into(), hint: None }
    }

    pub(crate) fn io(path: &Path, doing: &str, e: &std::io::Error) -> Self {
        let error = ArtefactError::new(path, format!("cannot {doing}: {e}"));
        match e.kind() {
            std::io::ErrorKind::StorageFull => {
                error.hint("the disk is full; `qrmc plan` says how much is needed")
            }
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                error.hint("choose a folder that can be written to with -o")
            }
            _ => error,
        }
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
