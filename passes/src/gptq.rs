//! `gptq`: integers of annotated weights, chosen a column at a time so that later columns make up for the errors of
//! earlier ones on the calibration text (methods.md §4).

mod gram;
mod layer;
mod round;
#[cfg(test)]
mod tests;

use qrmc_ir::{Diag, Module, Op};

use crate::calibrate::{LayerRun, Stream, walk_layers};
use crate::options::{OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::rtn::round_to_nearest;
use crate::unit::Unit;

options! {
    /// Options of `gptq`.
    struct GptqOptions {
        /// columns with large inputs first (act-order); scales of groups are then chosen before
        order: bool = false,
        /// damping as a share of the mean square of the inputs
        damp: f64 = 0.01,
        /// columns whose errors are moved on together
        block: u32 = 128,
        /// choose a group's scale from columns without the errors of the block that it starts in, as published
        stale: bool = false,
    }
}

/// Most columns in a block.
const MAX_BLOCK: u32 = 4096;

/// The pass.
pub(crate) struct Gptq(pub(crate) GptqOptions);

impl Pass for Gptq {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "gptq",
            summary: "GPTQ: choose integers a column at a time, later ones make up for the errors of earlier ones; the head's to nearest",
            preserves: Preserves::Lossy,
            accepts: (Stage::Annotated, Stage::Annotated),
            calibrates: true,
            transforms: false,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn legal(&self, _: &Module) -> Result<(), Diag> {
        self.0.check()
    }

    fn run(&self, unit: &mut Unit, cx: &mut PassCx<'_>) -> Result<(), PassError> {
        let o = self.0.clone();
        check_annotations(unit)?;
        let name = self.call().to_string();
        let mut work = |unit: &Unit, cx: &mut PassCx<'_>, run: &LayerRun<'_>| layer::work(&o, unit, cx, run);
        walk_layers(unit, cx, (&name, Stream::After), &mut work, &mut layer::insert)?;
        if let Some(head) = unit.module.find_func("head") {
            unit.module.funcs[head.0 as usize] = round_to_nearest(&unit.module, unit.module.func(head))?;
        }
        Ok(())
    }
}

impl GptqOptions {
    fn check(&self) -> Result<(), Diag> {
        let bad = |what: String, hint: &str| Err(Diag::new("Q0602", format!("`gptq`: {what}")).hint(hint));
        if !(0.0..1.0).contains(&self.damp) {
            return bad(format!("damp is {}", self.damp), "damp is from 0 to below 1; 0.01 is usual");
        }
        if !(1..=MAX_BLOCK).contains(&self.block) {
            return bad(format!("block is {}", self.block), "block is from 1 to 4096; 128 is usual");
        }
        if self.order && self.stale {
            let hint =
                "with `order` the scales of all groups are chosen before the first column: leave out `stale`";
            return bad("order and stale".into(), hint);
        }
        Ok(())
    }
}

/// Refuses, before anything is computed, annotations that the pass does not round. The weight of the head is rounded to
/// nearest, so that any will do there.
fn check_annotations(unit: &Unit) -> Result<(), Diag> {
    let m = &unit.module;
    let (layers, head) = (m.layers(), m.find_func("head"));
    for (at, f) in m.funcs.iter().enumerate().filter(|(at, _)| head.is_none_or(|h| h.0 as usize != *at)) {
        let derived = f.weight_derived();
        let targets = match layers.iter().any(|l| l.0 as usize == at) {
            true => layer::targets(m, f),
            false => Vec::new(),
        };
        for n in &f.nodes {
            let Op::FakeQuant(spec, rule) = n.op else { continue };
            if !derived[n.ins[0].0 as usize] {
                continue;
            }
            let refuse =
                |what: String| Diag::new("Q0610", format!("{} in @{} {what}", f.show(n.outs[0]), f.name));
            if !targets.iter().any(|t| t.y == n.outs[0]) {
                return Err(refuse("is annotated and feeds no linear layer of a block".into())
                    .hint("GPTQ needs the inputs of a product; put `rtn` in the place of `gptq`"));
            }
            let grained = !matches!(spec.grain, qrmc_ir::Grain::Token | qrmc_ir::Grain::Channel);
            if !matches!(rule, qrmc_ir::Rule::MinMax | qrmc_ir::Rule::Mse) || !grained {
                return Err(refuse(format!("is annotated with {spec} and the rule `{rule}`"))
                    .hint("write `annotate{rule=mse}` or `annotate{rule=minmax}` before `gptq`"));
            }
        }
    }
    Ok(())
}
