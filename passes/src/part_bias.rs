//! `part-bias`: the constant part of the keys is added behind their quantizer (methods.md §6.2, bias-aware).
//!
//! Positions, rotations and mode products are linear, so `T(k + b) = T(k) + T(b)`, and `T(b)` depends on the position
//! alone: it need not be stored a token.

use qrmc_ir::{BinaryOp, Builder, Diag, Dim, Func, Module, Node, Op, Shape, ValueId, rewrite};

use crate::edges::caches;
use crate::options::{OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::skip::Skip;
use crate::unit::Unit;

options! {
    /// Options of `part-bias`.
    struct PartBiasOptions {
        /// layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

/// The pass.
pub(crate) struct PartBias(pub(crate) PartBiasOptions);

impl Pass for PartBias {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "part-bias",
            summary: "add the bias of the keys behind their quantizer, where it costs them no range",
            preserves: Preserves::Within(1e-4),
            accepts: (Stage::Float, Stage::Rounded),
            calibrates: false,
            transforms: false,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn legal(&self, module: &Module) -> Result<(), Diag> {
        self.0.skip.on(module).map(|_| ())
    }

    fn run(&self, unit: &mut Unit, _cx: &mut PassCx<'_>) -> Result<(), PassError> {
        let skip = self.0.skip.on(&unit.module)?;
        for (index, layer) in unit.module.layers().into_iter().enumerate() {
            if !skip.layer(index) {
                let new = part(&unit.module, unit.module.func(layer))?;
                unit.module.funcs[layer.0 as usize] = new;
            }
        }
        Ok(())
    }
}

/// The nodes from the addition of a bias to the new keys, if there is such a chain of linear operations.
fn chain(f: &Func) -> Option<Vec<Node>> {
    let derived = f.weight_derived();
    let mut v = caches(f).into_iter().find(|c| c.keys)?.new;
    let mut nodes = Vec::new();
    loop {
        let n = f.def_node(v)?;
        nodes.push(n.clone());
        match n.op {
            Op::Rope(_) | Op::Hadamard { .. } | Op::ModeMul { .. } | Op::Edge => v = n.ins[0],
            Op::Binary(BinaryOp::Add) if derived[n.ins[1].0 as usize] => break,
            _ => return None,
        }
    }
    nodes.reverse();
    Some(nodes)
}

fn part(module: &Module, f: &Func) -> Result<Func, Diag> {
    let Some(chain) = chain(f) else { return Ok(f.clone()) };
    let (add, last) = (chain[0].outs[0], chain[chain.len() - 1].outs[0]);
    let mut bias: Option<ValueId> = None;
    let on_chain = |n: &Node| chain[1..].iter().any(|c| c.outs == n.outs);
    rewrite(module, f, |b, node, ins| {
        if node.outs.first() == Some(&add) {
            bias = Some(row(b, ins[1])?);
            return Ok(Some(vec![ins[0]]));
        }
        let Some(constant) = bias.filter(|_| on_chain(node)) else { return Ok(None) };
        let mut outs = b.op(node.op.clone(), ins)?;
        let mut again = ins.to_vec();
        again[0] = constant;
        let mut constant = constant;
        if node.op != Op::Edge {
            constant = b.op1(node.op.clone(), &again)?;
        }
        bias = Some(constant);
        if node.outs.first() == Some(&last) {
            // Nothing but the marked part is to be quantized.
            if node.op != Op::Edge {
                outs[0] = b.op1(Op::Edge, &outs[..1])?;
            }
            outs[0] = b.binary(BinaryOp::Add, outs[0], constant)?;
        }
        Ok(Some(outs))
    })
}

/// A bias `[n]` as one position `[1, 1, n]`.
fn row(b: &mut Builder<'_>, bias: ValueId) -> Result<ValueId, Diag> {
    let n = b.ty(bias).shape.last().unwrap_or(Dim::Fixed(1));
    b.op1(Op::Reshape(Shape(vec![Dim::Fixed(1), Dim::Fixed(1), n])), &[bias])
}
