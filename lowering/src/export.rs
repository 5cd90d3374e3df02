//! Artefacts become what other runtimes load, with the integers that they hold: one file a format.
//!
//! A format plans the tensors that it will write, each with how its bytes come from stored codes, scales and zero points.
//! Planning refuses what the format cannot hold exactly; writing then streams one tensor at a time.

pub mod ascend;
mod awq;
mod compressed;
mod fake;
pub mod gguf;
mod gptq;
mod linear;
pub mod onnx;
mod plan;
pub mod rules;
mod view;

use std::path::Path;

use qrmc_ir::WeightError;

pub use fake::Fake;
pub use linear::{Bound, Codes, Linear, Parts, Rounding};
pub use plan::{Format, Part, Plan, Put};
pub use view::{Entry, HEAD, Kept, View, rounds};

use crate::artefact::ArtefactError;

/// Every format that is a folder of safetensors.
pub const FORMATS: [&dyn Format; 6] = [
    &awq::Awq,
    &gptq::Gptq { v2: false },
    &gptq::Gptq { v2: true },
    &compressed::CompressedTensors,
    &ascend::Ascend,
    &Fake,
];

/// Why something cannot be exported.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct ExportError {
    /// What was seen, and where.
    pub what: String,
    /// What to do.
    pub hint: Option<String>,
    /// Whether the format cannot hold it, as opposed to a file that could not be read or written.
    pub illegal: bool,
}

impl ExportError {
    pub(crate) fn illegal(what: impl Into<String>) -> Self {
        ExportError { what: what.into(), hint: None, illegal: true }
    }

    pub(crate) fn fault(what: impl Into<String>) -> Self {
        ExportError { what: what.into(), hint: None, illegal: false }
    }

    /// The same error of a place on disk.
    pub fn at(self, path: &Path) -> ArtefactError {
        ArtefactError { path: path.to_owned(), what: self.what, hint: self.hint }
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl From<WeightError> for ExportError {
    fn from(e: WeightError) -> Self {
        ExportError::fault(e.to_string())
    }
}

impl From<ArtefactError> for ExportError {
    fn from(e: ArtefactError) -> Self {
        ExportError { what: e.to_string(), hint: e.hint, illegal: false }
    }
}
