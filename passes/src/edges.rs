//! The linear layers of a function, and the values that feed them.

use qrmc_ir::{Func, Node, Op, ValueId};

/// A linear layer: a product with a transposed weight-derived matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    /// Place of the node.
    pub(crate) node: usize,
    /// Its input.
    pub(crate) x: ValueId,
    /// Its weight-derived operand.
    pub(crate) w: ValueId,
    /// Its result.
    pub(crate) y: ValueId,
}

/// All linear layers of a function in order.
pub(crate) fn linears(func: &Func) -> Vec<Linear> {
    let derived = func.weight_derived();
    func.nodes.iter().enumerate().filter_map(|(at, n)| linear(func, &derived, at, n)).collect()
}

fn linear(func: &Func, derived: &[bool], node: usize, n: &Node) -> Option<Linear> {
    let Op::MatMul { trans_b: true } = n.op else { return None };
    let (x, w) = (n.ins[0], n.ins[1]);
    let is = derived[w.0 as usize] && !derived[x.0 as usize] && func.ty(w).shape.rank() == 2;
    is.then(|| Linear { node, x, w, y: n.outs[0] })
}

/// Length of the rows of the weight.
pub(crate) fn in_features(func: &Func, l: &Linear) -> usize {
    func.ty(l.w).shape.last().and_then(qrmc_ir::Dim::fixed).unwrap_or(0)
}

/// A name for what a linear layer is, from its value or its weight: `q_proj`, `down_proj`.
///
/// The product is named so in imported modules where a bias follows; without one it may carry the name of the
/// block's output, so the weight behind it decides.
pub(crate) fn role(module: &qrmc_ir::Module, func: &Func, l: &Linear) -> String {
    if let Some(name) = base_weight(module, func, l.w) {
        let mut parts = name.rsplit('.');
        let last = parts.next().unwrap_or(&name);
        return if last == "weight" { parts.next().unwrap_or(last).to_owned() } else { last.to_owned() };
    }
    func.show(l.y).to_string().trim_start_matches('%').to_owned()
}

/// Name of the weight that a value is mainly made of: the first operand of every weight-side operation leads to it.
pub(crate) fn base_weight(module: &qrmc_ir::Module, func: &Func, mut v: ValueId) -> Option<String> {
    loop {
        let n = func.def_node(v)?;
        if let Op::Weight(w) = n.op {
            return Some(module.weight(w).name.clone());
        }
        v = *n.ins.first()?;
    }
}
