//! `fuse-norm`: the gain of a norm moves into the linear layers that read it.

use qrmc_ir::{BinaryOp, Diag, Module, Op, ValueId, rewrite};

use crate::edges::linears;
use crate::options::{OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::unit::Unit;

options! {
    /// Options of `fuse-norm`: none.
    struct FuseNormOptions {}
}

/// The pass.
pub(crate) struct FuseNorm(pub(crate) FuseNormOptions);

impl Pass for FuseNorm {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "fuse-norm",
            summary: "move the gains of norms into the columns of the linear layers behind them",
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
        Ok(fuse(&mut unit.module)?)
    }
}

/// Moves every gain that only linear layers read.
pub(crate) fn fuse(module: &mut Module) -> Result<(), Diag> {
    for at in 0..module.funcs.len() {
        let old = &module.funcs[at];
        let users = old.users();
        let linears = linears(old);
        // Norms that feed linear layers and nothing else, with their gains.
        let fusable: Vec<(ValueId, ValueId)> = old
            .nodes
            .iter()
            .filter(|n| matches!(n.op, Op::RmsNorm(_)) && old.ty(n.ins[1]).shape.last() != Some(1.into()))
            .filter(|n| {
                let y = n.outs[0];
                let users = &users[y.0 as usize];
                let all = users.iter().all(|u| linears.iter().any(|l| l.node == *u && l.x == y));
                !users.is_empty() && all && !old.results.contains(&y)
            })
            .map(|n| (n.outs[0], n.ins[1]))
            .collect();
        let mut gains = std::collections::HashMap::new();
        let new = rewrite(module, old, |b, node, ins| match node.op {
            Op::RmsNorm(eps) if fusable.iter().any(|(y, _)| *y == node.outs[0]) => {
                gains.insert(node.outs[0], ins[1]);
                let one = b.scalar(1.0);
                b.op(Op::RmsNorm(eps), &[ins[0], one]).map(Some)
            }
            Op::MatMul { .. } => match gains.get(&node.ins[0]) {
                None => Ok(None),
                Some(&gain) => {
                    let w = b.binary(BinaryOp::Mul, ins[1], gain)?;
                    Ok(Some(vec![b.linear(ins[0], w)?]))
                }
            },
            _ => Ok(None),
        })?;
        module.funcs[at] = new;
    }
    Ok(())
}
