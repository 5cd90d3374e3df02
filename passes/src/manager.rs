//! Runs a pipeline: each pass on a verified module, checked after.

use std::time::{Duration, Instant};

use qrmc_ir::{Diag, Lacks, Module, print, verify};

use crate::check::{Gap, compare_logits, seeded_input};
use crate::pass::{Pass, PassCx, PassError, Preserves, stage_of};
use crate::pipeline::Pipeline;
use crate::registry::CallError;
use crate::unit::Unit;

/// Tokens of the equivalence check.
const CHECK_TOKENS: usize = 32;

/// Why a pipeline did not finish.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// A name or an option is unknown.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A pass failed.
    #[error("in pass {index} of {total}, {pass}: {error}")]
    Pass {
        /// Place in the pipeline, from 1.
        index: usize,
        /// Passes in the pipeline.
        total: usize,
        /// The pass in normal form.
        pass: String,
        /// What it says.
        error: PassError,
    },
    /// A pass left a module that the verifier refuses: a fault of qrmc.
    #[error("pass {pass} left a module that does not verify: {first}")]
    Verify {
        /// The pass in normal form.
        pass: String,
        /// The first fault.
        first: Diag,
        /// How many there are.
        count: usize,
        /// Text of the module before the pass, headed by the command that repeats the fault.
        reproducer: String,
    },
    /// A pass broke its promise.
    #[error("{pass} promises to keep the function within {promised:e} and moves the logits by {measured:e}")]
    Check {
        /// The pass in normal form.
        pass: String,
        /// Largest relative difference allowed.
        promised: f64,
        /// Largest relative difference seen.
        measured: f64,
    },
}

/// What a pass did.
#[derive(Clone, Debug)]
pub struct PassReport {
    /// Normal form.
    pub pass: String,
    /// Its promise.
    pub preserves: Preserves,
    /// The measured gap of the logits, with quantizers as the identity; `None` if it was not measured.
    pub gap: Option<Gap>,
    /// Wall-clock time, without the check.
    pub time: Duration,
}

/// Refuses a pipeline whose options do not fit the source module, before anything is computed.
///
/// # Errors
/// What the first pass says that does not fit.
pub fn legal(pipeline: &Pipeline, module: &Module) -> Result<(), PipelineError> {
    let total = pipeline.0.len();
    for (i, call) in pipeline.0.iter().enumerate() {
        let pass = crate::build(call)?;
        readable(&*pass, module).and_then(|()| pass.legal(module)).map_err(|d| PipelineError::Pass {
            index: i + 1,
            total,
            pass: pass.call().to_string(),
            error: d.into(),
        })?;
    }
    Ok(())
}

/// Refuses calibration text for a block without an embedding.
fn readable(pass: &dyn Pass, module: &Module) -> Result<(), Diag> {
    match module.lacks().filter(|l| pass.info().calibrates && *l != Lacks::Head) {
        None => Ok(()),
        Some(lacks) => {
            let name = pass.info().name;
            let m =
                format!("`{name}` reads calibration text, and this is a block of a decoder: it has {lacks}");
            Err(Diag::new("Q0612", m).hint("passes that read no text work on a block, such as `rtn`"))
        }
    }
}

/// Runs pipelines.
pub struct Manager<'a> {
    /// Whether transforms are checked by running the model before and after.
    pub check: bool,
    /// Seed of the tokens of the check.
    pub seed: u64,
    /// Called with the text of the module after each pass.
    pub after: &'a mut dyn FnMut(&str, &Module),
}

impl Manager<'_> {
    /// Runs the passes of an expanded pipeline on a unit, which keeps the state after the last pass that succeeded.
    ///
    /// # Errors
    /// See [`PipelineError`].
    pub fn run(
        &mut self,
        unit: &mut Unit,
        pipeline: &Pipeline,
        cx: &mut PassCx<'_>,
    ) -> Result<Vec<PassReport>, PipelineError> {
        legal(pipeline, &unit.module)?;
        let passes = pipeline.0.iter().map(crate::build).collect::<Result<Vec<_>, _>>()?;
        let mut reports = Vec::new();
        for (i, pass) in passes.iter().enumerate() {
            let name = pass.call().to_string();
            let failed = |error: PassError| PipelineError::Pass {
                index: i + 1,
                total: passes.len(),
                pass: name.clone(),
                error,
            };
            accepts(&**pass, &unit.module).map_err(|d| failed(d.into()))?;
            let start = Instant::now();
            let mut after = unit.clone();
            pass.run(&mut after, cx).map_err(&failed)?;
            let time = start.elapsed();
            if let Err(faults) = verify(&after.module) {
                let count = faults.len();
                let first = faults.into_iter().next().unwrap_or_else(|| Diag::new("Q0000", "no fault"));
                let reproducer = reproducer(pipeline, i, &unit.module);
                return Err(PipelineError::Verify { pass: name, first, count, reproducer });
            }
            let preserves = pass.info().preserves;
            let gap = if self.check {
                check(preserves, unit, &after, cx, self.seed).map_err(|e| failed(e.into()))?
            } else {
                None
            };
            let promised = match preserves {
                Preserves::Exact => 0.0,
                Preserves::Within(x) => x,
                Preserves::Lossy => f64::INFINITY,
            };
            if let Some(g) = gap.filter(|g| g.relative > promised) {
                return Err(PipelineError::Check { pass: name, promised, measured: g.relative });
            }
            after.module.history.push(name.clone());
            (self.after)(&name, &after.module);
            *unit = after;
            reports.push(PassReport { pass: name, preserves, gap, time });
        }
        Ok(reports)
    }
}

fn check(
    preserves: Preserves,
    before: &Unit,
    after: &Unit,
    cx: &PassCx<'_>,
    seed: u64,
) -> Result<Option<Gap>, qrmc_ir::EngineError> {
    if preserves == Preserves::Lossy || before.module.find_func("main").is_none() {
        return Ok(None);
    }
    let input = seeded_input(seed, CHECK_TOKENS, &before.module);
    compare_logits(cx.engine, &before.module, &after.module, &after.weights, &input).map(Some)
}

fn accepts(pass: &dyn Pass, module: &Module) -> Result<(), Diag> {
    let (info, stage) = (pass.info(), stage_of(module));
    if (info.accepts.0..=info.accepts.1).contains(&stage) {
        return Ok(());
    }
    let is = format!("{stage:?}").to_lowercase();
    let want = format!("{:?}", info.accepts.0).to_lowercase();
    let d = Diag::new("Q0605", format!("`{}` takes a module that is {want}; this one is {is}", info.name));
    Err(d.hint(match stage {
        crate::Stage::Rounded => "integers are chosen already; start from the float model",
        crate::Stage::Annotated => "put transforms before `annotate`",
        crate::Stage::Float => "put `annotate` before it",
    }))
}

/// The module before the pass that failed, headed by the command that repeats the failure.
fn reproducer(pipeline: &Pipeline, at: usize, module: &Module) -> String {
    let rest = Pipeline(pipeline.0[at..].to_vec());
    format!("// run: qrmc opt THIS_FILE --pass '{rest}'\n{}", print(module))
}
