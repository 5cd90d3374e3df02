//! What can be wrong with a checkpoint, said so that it can be mended.

use std::path::{Path, PathBuf};

/// A checkpoint that cannot be imported: where, what was seen, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}", path.display())]
pub struct ImportError {
    /// File or folder.
    pub path: PathBuf,
    /// What was seen there.
    pub what: String,
    /// What to do about it, where that is known.
    pub hint: Option<String>,
}

impl ImportError {
    /// An error about one file or folder.
    pub fn new(path: impl Into<PathBuf>, what: impl Into<String>) -> Self {
        ImportError { path: path.into(), what: what.into(), hint: None }
    }

    /// The same error with advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// An operating-system error while working on `path`.
    pub fn io(path: &Path, doing: &str, error: &std::io::Error) -> Self {
        ImportError::new(path, format!("cannot {doing}: {error}"))
    }
}
