//! What a pass is.

use qrmc_ir::{Diag, Engine, EngineError, Func, Module, Tensor};

use crate::calibrate::{Calibration, StepStore};
use crate::options::OptionValue;
use crate::unit::Unit;

/// What a pass promises of the function that the module computes with quantizers as the identity.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Preserves {
    /// The same bits: the graph without quantizers is the same graph.
    Exact,
    /// The same up to rounding: largest difference of logits over their largest magnitude.
    Within(f64),
    /// Nothing; what is lost is measured and printed.
    Lossy,
}

/// How far a module is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Stage {
    /// Floats only.
    Float,
    /// Some values carry quantization schemes.
    Annotated,
    /// Integers and scales are chosen.
    Rounded,
}

/// Facts about a pass.
#[derive(Clone, Debug)]
pub struct PassInfo {
    /// Name in pipeline text.
    pub name: &'static str,
    /// One line of help.
    pub summary: &'static str,
    /// See [`Preserves`].
    pub preserves: Preserves,
    /// Stages of a module that it accepts, from first to last.
    pub accepts: (Stage, Stage),
    /// Whether it reads calibration text.
    pub calibrates: bool,
    /// Whether it inserts transforms, which `place-transforms` then moves to where they cost least.
    pub transforms: bool,
}

/// Losses of one layer that a pass measured: what rounding to nearest gives, and what the pass gives.
#[derive(Clone, PartialEq, Debug)]
pub struct LayerLoss {
    /// Layer number.
    pub layer: usize,
    /// What was measured, such as `mlp_in`.
    pub what: String,
    /// Before.
    pub before: f64,
    /// After.
    pub after: f64,
}

/// Something that a pass met in a layer and that the user should know of, such as an input that is always 0.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// Layer number.
    pub layer: usize,
    /// Where, such as `down_proj`.
    pub what: String,
    /// What was met and what was done about it.
    pub text: String,
}

/// Where a pass tells how far it is. Nothing is printed by passes themselves.
pub trait Report {
    /// Layer `done` of `total` is finished.
    fn progress(&mut self, pass: &str, done: usize, total: usize, note: &str);
    /// A loss that belongs into the summary.
    fn loss(&mut self, pass: &str, loss: LayerLoss);
    /// Something that belongs into the summary besides losses.
    fn event(&mut self, pass: &str, event: Event) {
        let _ = (pass, event);
    }
    /// Floating-point operations spent in products, for the rate in the summary.
    fn flops(&mut self, pass: &str, flops: f64);
    /// Whether the user asked to stop.
    fn interrupted(&self) -> bool {
        false
    }
}

/// What a pass may use.
pub struct PassCx<'a> {
    /// Execution.
    pub engine: &'a dyn Engine,
    /// Calibration text, if any was given.
    pub calibration: Option<&'a Calibration>,
    /// Finished steps of this and earlier runs.
    pub store: std::sync::Arc<dyn StepStore>,
    /// Identity of the source checkpoint and of this compiler, for the keys of steps.
    pub source_key: String,
    /// Progress and losses.
    pub report: &'a mut dyn Report,
}

impl PassCx<'_> {
    /// Runs a function of `unit` once.
    ///
    /// # Errors
    /// What the engine says.
    pub fn run(&self, unit: &Unit, func: &Func, args: &[&Tensor]) -> Result<Vec<Tensor>, EngineError> {
        self.engine.run(&unit.module, func, &unit.weights, args)
    }
}

/// Why a pass did not finish.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// A fault of the module or of the options on it.
    #[error(transparent)]
    Ir(#[from] Diag),
    /// Something did not run.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Calibration text is needed or unfit.
    #[error("{what}")]
    Calibration {
        /// What was seen.
        what: String,
        /// What to do.
        hint: String,
    },
    /// A finished step could not be kept.
    #[error("cannot keep a finished step: {0}")]
    Store(String),
    /// The user asked to stop; what is finished is kept.
    #[error("interrupted; run the same command again to go on")]
    Interrupted,
}

/// A rewrite of a module.
pub trait Pass {
    /// Facts.
    fn info(&self) -> PassInfo;

    /// Every option with its value.
    fn options(&self) -> Vec<(String, OptionValue)>;

    /// Refuses options that do not fit the source module, before anything is computed.
    ///
    /// # Errors
    /// What does not fit, and the nearest choice that does.
    fn legal(&self, _module: &Module) -> Result<(), Diag> {
        Ok(())
    }

    /// Rewrites the module.
    ///
    /// # Errors
    /// See [`PassError`]. The unit is then in no useful state; the manager keeps the one before.
    fn run(&self, unit: &mut Unit, cx: &mut PassCx<'_>) -> Result<(), PassError>;

    /// Gives the module the types that [`Pass::run`] would give it, with 1 for each number that needs calibration text.
    /// Passes whose result nothing asks the types of leave the module as it is.
    ///
    /// # Errors
    /// See [`PassError`].
    fn outline(&self, _unit: &mut Unit) -> Result<(), PassError> {
        Ok(())
    }

    /// The call in normal form: every default written out.
    fn call(&self) -> crate::Call {
        crate::Call { name: self.info().name.to_owned(), options: self.options() }
    }
}

/// How far a module is, by its operations.
pub(crate) fn stage_of(module: &Module) -> Stage {
    let mut stage = Stage::Float;
    for f in &module.funcs {
        let derived = f.weight_derived();
        for node in &f.nodes {
            match node.op {
                // Codes of a value that is known only when the function runs are an annotation.
                qrmc_ir::Op::DCast if derived[node.outs[0].0 as usize] => return Stage::Rounded,
                qrmc_ir::Op::DCast | qrmc_ir::Op::FakeQuant(..) => stage = Stage::Annotated,
                _ => {}
            }
        }
    }
    stage
}
