//! How commands fail: a message, advice, and an exit code.

use qrmc_frontends::ImportError;
use qrmc_ir::{Diag, EngineError};
use qrmc_lowering::artefact::ArtefactError;
use qrmc_lowering::export::ExportError;
use qrmc_lowering::export::onnx::OnnxError;
use qrmc_lowering::materialize::MaterializeError;
use qrmc_passes::{PassError, PipelineError};
use qrmc_runtime::generate::GenerateError;
use qrmc_runtime::text::TextError;

/// A diagnosed failure.
pub(crate) const FAILURE: u8 = 1;
/// The command line makes no sense.
pub(crate) const USAGE: u8 = 2;
/// A check, a parity or an accuracy gate failed.
pub(crate) const GATE: u8 = 3;
/// The target cannot run or load it.
pub(crate) const ILLEGAL: u8 = 4;
/// It does not fit the memory or disk that was granted.
pub(crate) const OVER_BUDGET: u8 = 5;
/// Interrupted; the same command goes on where it stopped.
pub(crate) const INTERRUPTED: u8 = 130;

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Exit code.
    pub(crate) code: u8,
    /// Stable code of the diagnostic, if it has one.
    pub(crate) id: Option<&'static str>,
    /// What was seen, and where.
    pub(crate) message: String,
    /// What to do.
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        Failure { code, id: None, message: message.into(), hint: None }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Failure::new(USAGE, message)
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn maybe_hint(mut self, hint: Option<String>) -> Self {
        self.hint = hint;
        self
    }
}

/// Codes that mean that a target, or the method on this model's sizes, refuses.
const ILLEGAL_CODES: [&str; 5] = ["Q0201", "Q0202", "Q0207", "Q0501", "Q0606"];

impl From<Diag> for Failure {
    fn from(d: Diag) -> Self {
        let code = if ILLEGAL_CODES.contains(&d.code) { ILLEGAL } else { FAILURE };
        let place = d.place.to_string();
        let message = if place.is_empty() { d.message } else { format!("{}\n  --> {place}", d.message) };
        Failure { code, id: Some(d.code), message, hint: d.hint }
    }
}

impl From<EngineError> for Failure {
    fn from(e: EngineError) -> Self {
        match e {
            EngineError::Ir(d) => d.into(),
            other => Failure::new(FAILURE, other.to_string()),
        }
    }
}

impl From<ImportError> for Failure {
    fn from(e: ImportError) -> Self {
        Failure::new(FAILURE, e.to_string()).maybe_hint(e.hint)
    }
}

impl From<ArtefactError> for Failure {
    fn from(e: ArtefactError) -> Self {
        Failure::new(FAILURE, e.to_string()).maybe_hint(e.hint)
    }
}

impl From<ExportError> for Failure {
    fn from(e: ExportError) -> Self {
        Failure::new(if e.illegal { ILLEGAL } else { FAILURE }, e.what).maybe_hint(e.hint)
    }
}

impl From<OnnxError> for Failure {
    fn from(e: OnnxError) -> Self {
        match e {
            OnnxError::Ir(d) => d.into(),
            OnnxError::Write(e) => e.into(),
            other @ OnnxError::Weight(_) => Failure::new(FAILURE, other.to_string()),
        }
    }
}

impl From<TextError> for Failure {
    fn from(e: TextError) -> Self {
        Failure::new(FAILURE, format!("{}: {}", e.path, e.what)).hint(e.hint)
    }
}

impl From<GenerateError> for Failure {
    fn from(e: GenerateError) -> Self {
        match e {
            GenerateError::Engine(e) => e.into(),
            other => Failure::new(FAILURE, other.to_string()),
        }
    }
}

impl From<MaterializeError> for Failure {
    fn from(e: MaterializeError) -> Self {
        match e {
            MaterializeError::Ir(d) => d.into(),
            MaterializeError::Engine(e) => e.into(),
            MaterializeError::Write(e) => e.into(),
            other @ MaterializeError::Value { .. } => Failure::new(FAILURE, other.to_string()),
        }
    }
}

impl From<PassError> for Failure {
    fn from(e: PassError) -> Self {
        match e {
            PassError::Ir(d) => d.into(),
            PassError::Engine(e) => e.into(),
            PassError::Calibration { what, hint } => Failure::new(FAILURE, what).hint(hint),
            PassError::Interrupted => Failure::new(INTERRUPTED, PassError::Interrupted.to_string()),
            other @ PassError::Store(_) => Failure::new(FAILURE, other.to_string()),
        }
    }
}

impl From<PipelineError> for Failure {
    fn from(e: PipelineError) -> Self {
        match e {
            PipelineError::Call(c) => Failure::usage(c.to_string()).maybe_hint(c.hint),
            PipelineError::Pass { index, total, pass, error, .. } => {
                let mut f = Failure::from(error);
                if f.code != INTERRUPTED {
                    f.message = format!("{}\n  in pass {index} of {total}: {pass}", f.message);
                }
                f
            }
            PipelineError::Verify { ref first, .. } => {
                let hint = "this is a fault of qrmc; please report it with the reproducer";
                Failure {
                    code: FAILURE,
                    id: Some(first.code),
                    message: e.to_string(),
                    hint: Some(hint.into()),
                }
            }
            PipelineError::Check { .. } => Failure::new(GATE, e.to_string())
                .hint("the transformed model is another function; nothing was written. Please report it"),
        }
    }
}
