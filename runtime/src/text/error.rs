//! The one error type of the text code.

/// What went wrong with a corpus, a tokenizer or a chat: where it was seen, what was seen, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {what}; {hint}")]
pub struct TextError {
    /// The file, or the part of an input, in which the fault was seen.
    pub path: String,
    /// What was seen there.
    pub what: String,
    /// What to do about it.
    pub hint: String,
}

impl TextError {
    /// Makes an error from its three parts.
    pub fn new(path: impl Into<String>, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { path: path.into(), what: what.into(), hint: hint.into() }
    }

    /// Makes an error about a file.
    pub fn at(path: &std::path::Path, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(path.display().to_string(), what, hint)
    }
}
