//! `rtn`: integers and scales by rounding to nearest.

use qrmc_ir::{Diag, Func, Module, Op, rewrite};

use crate::options::{OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::unit::Unit;

options! {
    /// Options of `rtn`: none.
    struct RtnOptions {}
}

/// The pass.
pub(crate) struct Rtn(pub(crate) RtnOptions);

impl Pass for Rtn {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "rtn",
            summary: "choose integers and scales of annotated weights by rounding to nearest",
            preserves: Preserves::Lossy,
            accepts: (Stage::Annotated, Stage::Annotated),
            calibrates: false,
            transforms: false,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn run(&self, unit: &mut Unit, _cx: &mut PassCx<'_>) -> Result<(), PassError> {
        for at in 0..unit.module.funcs.len() {
            unit.module.funcs[at] = round_to_nearest(&unit.module, &unit.module.funcs[at])?;
        }
        Ok(())
    }
}

/// The function with integers and scales in the place of its annotated weights.
///
/// # Errors
/// Only for a function that breaks the IR's rules.
pub(crate) fn round_to_nearest(module: &Module, func: &Func) -> Result<Func, Diag> {
    let derived = func.weight_derived();
    rewrite(module, func, |b, node, ins| {
        let Op::FakeQuant(spec, rule) = node.op else { return Ok(None) };
        if !derived[node.ins[0].0 as usize] {
            return Ok(None);
        }
        let sides = b.op(Op::QParams(spec, rule), ins)?;
        let codes = b.op1(Op::QCast(spec), &[&[ins[0]], &sides[..]].concat())?;
        b.op(Op::DCast, &[&[codes], &sides[..]].concat()).map(Some)
    })
}
