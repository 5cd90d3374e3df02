//! The linear layers of a function, the values that feed them, and the caches.

use qrmc_ir::{BinaryOp, Builder, Diag, Dim, Func, Module, Node, Op, ValueId, rewrite};

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

/// The values that feed linear layers, in order, each with the linear layers that read it.
pub(crate) fn inputs(func: &Func) -> Vec<(ValueId, Vec<Linear>)> {
    let mut out: Vec<(ValueId, Vec<Linear>)> = Vec::new();
    for l in linears(func) {
        match out.iter_mut().find(|(x, _)| *x == l.x) {
            Some((_, list)) => list.push(l),
            None => out.push((l.x, vec![l])),
        }
    }
    out
}

fn linear(func: &Func, derived: &[bool], node: usize, n: &Node) -> Option<Linear> {
    let Op::MatMul { trans_b: true } = n.op else { return None };
    let (x, w) = (n.ins[0], n.ins[1]);
    let is = derived[w.0 as usize] && !derived[x.0 as usize] && func.ty(w).shape.rank() == 2;
    is.then(|| Linear { node, x, w, y: n.outs[0] })
}

/// Length of the rows of the weight.
pub(crate) fn in_features(func: &Func, l: &Linear) -> usize {
    func.ty(l.w).shape.last().and_then(Dim::fixed).unwrap_or(0)
}

/// Length of the last axis.
pub(crate) fn width(func: &Func, v: ValueId) -> u64 {
    func.ty(v).shape.last().and_then(Dim::fixed).unwrap_or(0) as u64
}

/// The name of the weight behind a weight-derived value.
pub(crate) fn weight_behind<'m>(module: &'m Module, func: &Func, v: ValueId) -> Option<&'m str> {
    func.weight_behind(v).map(|w| module.weight(w).name.as_str())
}

/// A name for what a linear layer is, from its weight or its value: `q_proj`, `down_proj`.
///
/// The product is named so in imported modules where a bias follows; without one it may carry the name of the
/// block's output, so the weight behind it decides.
pub(crate) fn role(module: &Module, func: &Func, l: &Linear) -> String {
    if let Some(name) = weight_behind(module, func, l.w) {
        let name = [".codes", ".weight"].iter().fold(name, |n, end| n.strip_suffix(end).unwrap_or(n));
        return name.rsplit('.').next().unwrap_or(name).to_owned();
    }
    key(func, l.y)
}

/// The name of a value, without `%`.
pub(crate) fn key(func: &Func, v: ValueId) -> String {
    func.show(v).to_string().trim_start_matches('%').to_owned()
}

/// What computes the input of linear layers, seen through transforms and quantizers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Producer {
    /// A norm: the linear layers are column-parallel.
    Norm,
    /// Attention: the linear layer is row-parallel.
    Attention,
    /// An elementwise product: the linear layer is row-parallel.
    Product,
    /// Anything else.
    Other,
}

/// What computes a value.
pub(crate) fn producer(func: &Func, mut v: ValueId) -> Producer {
    while let Some(n) = func.def_node(v) {
        match n.op {
            Op::RmsNorm(_) => return Producer::Norm,
            Op::Attention(_) => return Producer::Attention,
            // A diagonal is a transform; a product of two values of one type is none.
            Op::Binary(BinaryOp::Mul) if func.ty(n.ins[0]).shape == func.ty(n.ins[1]).shape => {
                return Producer::Product;
            }
            Op::Binary(BinaryOp::Mul | BinaryOp::Div)
            | Op::Edge
            | Op::FakeQuant(..)
            | Op::QCast(_)
            | Op::DCast
            | Op::Hadamard { .. }
            | Op::ModeMul { .. } => v = n.ins[0],
            _ => break,
        }
    }
    Producer::Other
}

/// Whether tensor-parallel ranks cut the input of the linear layers that read `x`.
pub(crate) fn row_parallel(func: &Func, x: ValueId) -> bool {
    matches!(producer(func, x), Producer::Attention | Producer::Product)
}

/// A cache of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Cache {
    /// Whether it holds keys.
    pub(crate) keys: bool,
    /// The new rows: what is appended.
    pub(crate) new: ValueId,
    /// What is quantized of them: the new rows, or their part behind an edge, to which a constant part is added after.
    pub(crate) target: ValueId,
}

/// The caches of a function, found as the operands of its attention.
pub(crate) fn caches(func: &Func) -> Vec<Cache> {
    let mut out = Vec::new();
    for n in func.nodes.iter().filter(|n| matches!(n.op, Op::Attention(_))) {
        for (operand, keys) in [(n.ins[1], true), (n.ins[2], false)] {
            let mut v = operand;
            while let Some(n) = func.def_node(v) {
                match n.op {
                    Op::Hadamard { .. } | Op::ModeMul { .. } | Op::Edge => v = n.ins[0],
                    Op::CacheAppend => {
                        out.push(Cache { keys, new: n.ins[1], target: target(func, n.ins[1]) });
                        break;
                    }
                    _ => break,
                }
            }
        }
    }
    out
}

fn target(func: &Func, new: ValueId) -> ValueId {
    let is_edge = |v: &&ValueId| func.def_node(**v).is_some_and(|n| n.op == Op::Edge);
    match func.def_node(new) {
        Some(n) if n.op == Op::Binary(BinaryOp::Add) => n.ins.iter().find(is_edge).copied().unwrap_or(new),
        _ => new,
    }
}

/// Changes what feeds linear layers and their weights: every linear layer that reads `x` reads `act(x)` instead, and its
/// weight becomes `weight(w)`. A marker of an edge stays behind the change. The name of `x` moves to what is read.
///
/// # Errors
/// What the closures say.
pub(crate) fn transform_edge(
    module: &Module,
    func: &Func,
    x: ValueId,
    mut act: impl FnMut(&mut Builder<'_>, ValueId) -> Result<ValueId, Diag>,
    mut weight: impl FnMut(&mut Builder<'_>, ValueId, &Linear) -> Result<ValueId, Diag>,
) -> Result<Func, Diag> {
    let readers: Vec<Linear> = linears(func).into_iter().filter(|l| l.x == x).collect();
    let name = func.value(x).name.clone();
    let marked = func.def_node(x).is_some_and(|n| n.op == Op::Edge);
    let mut changed: Option<ValueId> = None;
    rewrite(module, func, |b, node, ins| {
        if marked && node.outs.first() == Some(&x) {
            let mut again = ins.to_vec();
            again[0] = act(b, ins[0])?;
            let y = b.op1(Op::Edge, &again)?;
            changed = Some(y);
            return Ok(Some(vec![y]));
        }
        let Some(l) = node.outs.first().and_then(|y| readers.iter().find(|l| l.y == *y)) else {
            return Ok(None);
        };
        let v = match changed {
            Some(v) => v,
            None => {
                let v = act(b, ins[0])?;
                if let Some(name) = &name {
                    b.name(v, name);
                }
                *changed.insert(v)
            }
        };
        let w = weight(b, ins[1], l)?;
        Ok(Some(vec![b.linear(v, w)?]))
    })
}
