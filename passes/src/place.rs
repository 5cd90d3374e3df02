//! `place-transforms`: where each half of an inserted transform lives.
//!
//! The linear-algebra skeleton of a layer goes into an e-graph; the rules are laws that hold whatever the numbers are;
//! of all equal forms the one with the fewest online operations is taken. What is computed from weights alone is free,
//! since it is computed once. Saturation is bounded in nodes and iterations, so the result is the same on every run.

mod convert;
mod extract;
mod lang;
mod rules;

use egg::{Runner, StopReason};
use qrmc_ir::{Diag, Func, Module, Place as At};

use crate::options::{OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::unit::Unit;

/// No time limit decides a result; this one only keeps a fault from hanging.
const TIME_LIMIT: std::time::Duration = std::time::Duration::from_secs(600);

options! {
    /// Options of `place-transforms`.
    struct PlaceOptions {
        /// most nodes of the e-graph of one layer
        nodes: u32 = 20_000,
        /// most rounds of rewriting
        rounds: u32 = 40,
    }
}

/// The pass.
pub(crate) struct Place(pub(crate) PlaceOptions);

impl Pass for Place {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "place-transforms",
            summary: "move inserted transforms to where they cost nothing, by equality saturation",
            preserves: Preserves::Within(1e-4),
            accepts: (Stage::Float, Stage::Float),
            calibrates: false,
            transforms: false,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn run(&self, unit: &mut Unit, _cx: &mut PassCx<'_>) -> Result<(), PassError> {
        Ok(place_all(unit, &self.0)?)
    }
}

/// Places the inserted transforms of every function, as `place-transforms` does by default.
///
/// # Errors
/// If saturation does not end within its bounds.
pub fn place_transforms(unit: &mut Unit) -> Result<(), Diag> {
    place_all(unit, &PlaceOptions::default())
}

fn place_all(unit: &mut Unit, o: &PlaceOptions) -> Result<(), Diag> {
    for at in 0..unit.module.funcs.len() {
        let calls = unit.module.funcs[at].nodes.iter().any(|n| matches!(n.op, qrmc_ir::Op::Call(_)));
        if !calls {
            unit.module.funcs[at] = place(&unit.module, &unit.module.funcs[at], o)?;
        }
    }
    Ok(())
}

/// The cheapest equal form of a function.
pub(crate) fn place(module: &Module, func: &Func, o: &PlaceOptions) -> Result<Func, Diag> {
    let skeleton = convert::to_egraph(func);
    let runner = Runner::<lang::Lin, lang::Facts, ()>::new(skeleton.egraph.analysis.clone())
        .with_egraph(skeleton.egraph)
        .with_node_limit(o.nodes as usize)
        .with_iter_limit(o.rounds as usize)
        .with_time_limit(TIME_LIMIT)
        .run(&rules::rules());
    if let Some(
        reason @ (StopReason::NodeLimit(_) | StopReason::IterationLimit(_) | StopReason::TimeLimit(_)),
    ) = &runner.stop_reason
    {
        let m = format!("placing the transforms of @{} did not come to an end: {reason:?}", func.name);
        return Err(Diag::new("Q0604", m)
            .at(At { func: Some(func.name.clone()), ..At::default() })
            .hint("raise place-transforms{nodes=..,rounds=..}"));
    }
    let chosen = extract::cheapest(&runner.egraph, &skeleton.roots)?;
    convert::from_egraph(module, func, &runner.egraph, &skeleton.classes, &chosen)
}
