//! The port through which passes, checks and tools see execution.

use crate::diag::Diag;
use crate::linalg::MatView;
use crate::module::{Func, Module};
use crate::tensor::Tensor;
use crate::weight::{WeightError, WeightSource};

/// Why a function did not run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The function or its arguments are ill-typed, or the target refuses an operation.
    #[error(transparent)]
    Ir(#[from] Diag),
    /// A weight could not be read.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// Something outside the program, such as a thread that could not be started.
    #[error("{0}")]
    System(String),
}

/// Runs functions of a module. Same inputs give the same bytes at any number of threads.
pub trait Engine: Sync {
    /// Reads the weights of a function, computes what is weight-derived, and makes it ready to run many times.
    ///
    /// # Errors
    /// If the function cannot run on this engine or a weight cannot be read.
    fn prepare(
        &self,
        module: &Module,
        func: &Func,
        weights: &dyn WeightSource,
    ) -> Result<Box<dyn Prepared>, EngineError>;

    /// An engine for comparing losses, if there is a faster one: products in it may be off by `2^-15` of the sum of the
    /// magnitudes of their terms. Everything else is as exact, and as repeatable, as here.
    fn coarse(&self) -> Option<&dyn Engine> {
        None
    }

    /// Calls `task` once for each index below `count`, on as many threads as there are. For work that is no function of
    /// the IR; what a task does must not depend on the others.
    fn parallel(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(task);
    }

    /// `out += factor * a b` in double precision: `a [m, k]`, `b [k, n]`, rows of `out` are `stride` elements apart and
    /// what lies between them is kept.
    ///
    /// # Panics
    /// If the shapes do not fit: a bug of the caller.
    fn add_product(&self, a: MatView<'_>, b: MatView<'_>, factor: f64, out: &mut [f64], stride: usize) {
        crate::linalg::add_product(a, b, factor, out, stride);
    }

    /// Prepares and runs once.
    ///
    /// # Errors
    /// As [`Engine::prepare`] and [`Prepared::run`].
    fn run(
        &self,
        module: &Module,
        func: &Func,
        weights: &dyn WeightSource,
        args: &[&Tensor],
    ) -> Result<Vec<Tensor>, EngineError> {
        self.prepare(module, func, weights)?.run(args)
    }
}

/// A function that is ready to run.
pub trait Prepared: Send + Sync {
    /// Results on these arguments.
    ///
    /// # Errors
    /// If the arguments do not fit the parameters.
    fn run(&self, args: &[&Tensor]) -> Result<Vec<Tensor>, EngineError>;
}
