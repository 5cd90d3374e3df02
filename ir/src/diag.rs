//! Diagnostics: a stable code, what was seen, where, and what to do.

use std::fmt;

/// Where in a module something was seen.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Place {
    /// Function name, without `@`.
    pub func: Option<String>,
    /// Value as printed, such as `%attn_in`.
    pub value: Option<String>,
    /// Line of the text form, from 1.
    pub line: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sep = "";
        if let Some(line) = self.line {
            write!(f, "line {line}")?;
            sep = ", ";
        }
        if let Some(func) = &self.func {
            write!(f, "{sep}@{func}")?;
            sep = ", ";
        }
        if let Some(value) = &self.value {
            write!(f, "{sep}{value}")?;
        }
        Ok(())
    }
}

/// One fault.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Diag {
    /// Stable, such as `Q0202`; listed in `docs/ir.md`.
    pub code: &'static str,
    /// What was seen.
    pub message: String,
    /// Where.
    pub place: Place,
    /// What to do, where that is known.
    pub hint: Option<String>,
}

impl Diag {
    /// A fault without a place yet.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Diag { code, message: message.into(), place: Place::default(), hint: None }
    }

    /// The same fault with advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same fault at a place.
    #[must_use]
    pub fn at(mut self, place: Place) -> Self {
        self.place = place;
        self
    }
}

impl fmt::Display for Diag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.code, self.message)?;
        if self.place != Place::default() {
            write!(f, "\n  --> {}", self.place)?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Diag {}
