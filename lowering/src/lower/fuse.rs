//! Operations that are computed where their results are read.

use std::collections::HashMap;

use qrmc_ir::{BinaryOp, Elem, Func, Grain, Node, Op, QuantSpec, Rule, Shape, TensorType, UnaryOp, ValueId};

use super::cache::Cached;
use crate::kernel::{CacheForm, Kernel, LinearPart, Spread};
use crate::program::is_bias_add;
use crate::target::Target;

/// Nodes between an elementwise operation and the end of its chain over which it does not matter what stays in memory.
const NEAR: usize = 16;

/// A kernel, what it reads and what it writes.
pub(super) struct Fused {
    pub(super) kernel: Kernel,
    pub(super) ins: Vec<ValueId>,
    pub(super) outs: Vec<ValueId>,
}

/// The kernels that compute a function, in order. Reshapes have none; `constant` says which values need none, because they
/// are there before the function runs.
pub(super) fn kernels(func: &Func, constant: impl Fn(ValueId) -> bool, target: &dyn Target) -> Vec<Fused> {
    let places = Places::of(func, &constant, target);
    let mut out = Vec::new();
    let mut linear = vec![false; func.nodes.len()];
    for (n, node) in func.nodes.iter().enumerate() {
        let nothing = matches!(node.op, Op::Weight(_) | Op::Reshape(_)) || constant(node.outs[0]);
        if nothing || places.elsewhere[n] {
            continue;
        }
        if let Some(params) = places.params[n] {
            let Op::QParams(spec, rule) = func.nodes[params].op else { unreachable!("the scales of a cast") };
            let outs = [&func.nodes[params].outs[..], &node.outs].concat();
            out.push(Fused {
                kernel: Kernel::Quantize(spec, rule),
                ins: func.nodes[params].ins.clone(),
                outs,
            });
            continue;
        }
        if let Some((cached, form)) = cached(func, node, &constant) {
            let codes = &func.nodes[cached.cast].ins;
            let ins = [&node.ins[..1], codes, &cached.operands].concat();
            out.push(Fused { kernel: Kernel::CacheAppend(form), ins, outs: node.outs.clone() });
            continue;
        }
        if let Some(x) = linear_left(func, node, &constant, target) {
            // What multiplies the same left side comes along: weights are there from the start.
            let (mut ins, mut parts, mut outs) = (x.clone(), Vec::new(), Vec::new());
            for (m, other) in func.nodes.iter().enumerate().skip(n) {
                let same = || linear_left(func, other, &constant, target).as_ref() == Some(&x);
                if linear[m] || constant(other.outs[0]) || places.elsewhere[m] || !same() {
                    continue;
                }
                linear[m] = true;
                let weight = ins.len();
                ins.push(other.ins[1]);
                let [bias, add] = [places.after[m].bias, places.after[m].add].map(|added| {
                    ins.extend(added.map(|(_, v)| v));
                    added.map(|_| ins.len() - 1)
                });
                parts.push(LinearPart { weight, bias, add });
                outs.extend(&func.nodes[places.after[m].last(m)].outs);
            }
            if !parts.is_empty() {
                out.push(Fused { kernel: Kernel::Linear(parts), ins, outs });
            }
            continue;
        }
        let (kernel, ins) = if let Some(map) = places.map(func, n) {
            map
        } else if let Some(factors) = swapped_factors(func, node) {
            (Kernel::OuterMiddle, factors.to_vec())
        } else if let Some(factors) = bf16_factors(func, node) {
            (Kernel::Bf16(node.op.clone()), factors.to_vec())
        } else if let Some([x, w]) = on_grid(func, node) {
            let casts = Box::new([x.op.clone(), w.op.clone()]);
            (Kernel::OnGrid { casts, split: x.ins.len() }, [&node.ins[..], &x.ins, &w.ins].concat())
        } else {
            (Kernel::Op(node.op.clone()), node.ins.clone())
        };
        out.push(Fused { kernel, ins, outs: node.outs.clone() });
    }
    out
}

/// Additions that go with a product: the nodes, and what they add.
#[derive(Clone, Copy, Default)]
struct After {
    /// A vector.
    bias: Option<(usize, ValueId)>,
    /// As large as the product.
    add: Option<(usize, ValueId)>,
}

impl After {
    /// The node that gives the result of the product `n`.
    fn last(self, n: usize) -> usize {
        self.add.or(self.bias).map_or(n, |(at, _)| at)
    }
}

/// Which nodes are computed by the kernel of another.
struct Places {
    elsewhere: Vec<bool>,
    /// For each node that is one of elementwise operations in a row, the last of them, which is computed in its place.
    chain: Vec<Option<usize>>,
    /// What is added to each product on the way.
    after: Vec<After>,
    /// For each `qcast`, the `qparams` that nothing before it reads, and whose work goes with it.
    params: Vec<Option<usize>>,
}

impl Places {
    fn of(func: &Func, constant: &impl Fn(ValueId) -> bool, target: &dyn Target) -> Self {
        let users = func.users();
        let only_reader = |v: ValueId| match users[v.0 as usize][..] {
            [n] if !func.results.contains(&v) => Some(n),
            _ => None,
        };
        // The addition that alone reads `y`, and what it adds.
        let added = |y: ValueId| {
            let n = only_reader(y).filter(|&n| func.nodes[n].op == Op::Binary(BinaryOp::Add))?;
            Some((n, *func.nodes[n].ins.iter().find(|v| **v != y)?))
        };
        // Products of one left side are computed where the first of them is.
        let mut firsts: HashMap<Vec<ValueId>, usize> = HashMap::new();
        let after = |(n, node): (usize, &Node)| {
            let Some(left) = linear_left(func, node, constant, target) else { return After::default() };
            let first = *firsts.entry(left).or_insert(n);
            let y = node.outs[0];
            let is_bias = |&(at, v): &(usize, ValueId)| {
                is_bias_add(&func.nodes[at].op, func.ty(v), func.ty(y)) && constant(v)
            };
            let bias = added(y).filter(is_bias);
            let y = bias.map_or(y, |(at, _)| func.nodes[at].outs[0]);
            let there = |v: ValueId| func.nodes[first..].iter().all(|n| !n.outs.contains(&v));
            let add = added(y).filter(|&(_, v)| func.ty(v) == func.ty(y) && !constant(v) && there(v));
            After { bias, add }
        };
        let after: Vec<After> = func.nodes.iter().enumerate().map(after).collect();
        let count = func.nodes.len();
        let params = |n: usize| {
            let node = &func.nodes[n];
            let (Op::QCast(_), [x, sides @ ..]) = (&node.op, &node.ins[..]) else { return None };
            let at =
                func.nodes[..n].iter().position(|p| p.outs == sides && matches!(p.op, Op::QParams(..)))?;
            let early = sides.iter().any(|s| users[s.0 as usize].iter().any(|&u| u < n));
            (func.nodes[at].ins[0] == *x && !early && !constant(node.outs[0])).then_some(at)
        };
        let params: Vec<Option<usize>> = (0..count).map(params).collect();
        // What readers of a cache do, unless it is needed before.
        let mut read_later = vec![false; count];
        for node in &func.nodes {
            for n in cached(func, node, constant).map(|(c, _)| c.inside).unwrap_or_default() {
                read_later[n] = true;
            }
        }
        let mut out = Places { elsewhere: vec![false; count], chain: vec![None; count], after, params };
        let added = out.after.iter().flat_map(|a| a.bias.into_iter().chain(a.add)).map(|(n, _)| n);
        for n in added.chain(out.params.iter().flatten().copied()) {
            out.elsewhere[n] = true;
        }
        for (n, node) in func.nodes.iter().enumerate().rev() {
            let [v] = node.outs[..] else { continue };
            if out.elsewhere[n] || constant(v) {
                continue;
            }
            let readers = &users[v.0 as usize];
            let later = |&u: &usize| {
                let into_cache = func.nodes[u].op == Op::CacheAppend && func.nodes[u].ins[0] != v;
                read_later[u] && out.elsewhere[u] || into_cache
            };
            if read_later[n] && !func.results.contains(&v) && readers.iter().all(later) {
                out.elsewhere[n] = true;
                continue;
            }
            let mapped = is_map(func, node);
            out.chain[n] = mapped.then_some(n);
            if readers.is_empty() || func.results.contains(&v) {
                continue;
            }
            if mapped {
                let last = |v: ValueId| users[v.0 as usize].last().copied().unwrap_or(0);
                let end = out.chain[readers[0]].filter(|&end| {
                    // What is read here stays until the end: over a long way, not more than the result would.
                    let ends =
                        node.ins.iter().filter(|&&v| last(v) <= n && func.ty(v) == func.ty(node.outs[0]));
                    (end - n <= NEAR || ends.count() <= 1)
                        && shape(func, end) == shape(func, n)
                        && readers.iter().all(|&u| out.chain[u] == Some(end))
                });
                if end.is_some() {
                    (out.chain[n], out.elsewhere[n]) = (end, true);
                }
                continue;
            }
            let inside = |&u: &usize| match node.op {
                Op::Cast(Elem::F32) => {
                    bf16_factors(func, &func.nodes[u]).is_some() && rounded(func, v).is_some()
                }
                Op::Transpose(_) => swapped_factors(func, &func.nodes[u]).is_some(),
                Op::DCast => {
                    func.nodes[u].ins[1] != v && int_factor(func, &func.nodes[u], constant, target).is_some()
                }
                // The other half of a rounding, which goes with it.
                Op::Cast(Elem::BF16) => func.nodes[u].op == Op::Cast(Elem::F32) && out.elsewhere[u],
                _ => false,
            };
            out.elsewhere[n] = readers.iter().all(inside);
        }
        out
    }

    /// The elementwise operations that end with this node, if they are several, and what they read.
    fn map(&self, func: &Func, end: usize) -> Option<(Kernel, Vec<ValueId>)> {
        if self.chain[end] != Some(end) {
            return None;
        }
        let members: Vec<&Node> =
            (0..=end).filter(|&n| self.chain[n] == Some(end)).map(|n| &func.nodes[n]).collect();
        if members.len() < 2 {
            return None;
        }
        let inner: Vec<ValueId> = members.iter().map(|n| n.outs[0]).collect();
        let mut ins: Vec<ValueId> = Vec::new();
        for v in members.iter().flat_map(|n| &n.ins) {
            if !inner.contains(v) && !ins.contains(v) {
                ins.push(*v);
            }
        }
        let number = |v: &ValueId| ins.iter().chain(&inner).position(|w| w == v);
        let step = |n: &&Node| Some((n.op.clone(), n.ins.iter().map(number).collect::<Option<_>>()?));
        let steps = members.iter().map(step).collect::<Option<_>>()?;
        let whole = shape(func, end);
        let spread = ins.iter().map(|&v| Spread::of(&func.ty(v).shape, whole)).collect::<Option<_>>()?;
        Some((Kernel::Map { ins: spread, steps }, ins))
    }
}

fn shape(func: &Func, node: usize) -> &Shape {
    &func.ty(func.nodes[node].outs[0]).shape
}

/// Whether a node is `x wᵀ` with a constant matrix.
fn is_linear(func: &Func, node: &Node, constant: &impl Fn(ValueId) -> bool) -> bool {
    node.op == Op::MatMul { trans_b: true }
        && constant(node.ins[1])
        && func.ty(node.ins[1]).shape.rank() == 2
        && bf16_factors(func, node).is_none()
}

/// What the kernel of `x wᵀ` with a constant matrix reads of `x`.
fn linear_left(
    func: &Func,
    node: &Node,
    constant: &impl Fn(ValueId) -> bool,
    target: &dyn Target,
) -> Option<Vec<ValueId>> {
    match int_factor(func, node, constant, target) {
        Some(codes) => Some(codes.ins.clone()),
        None => is_linear(func, node, constant).then(|| node.ins[..1].to_vec()),
    }
}

/// What a cache that keeps codes is made of, and how it keeps them.
fn cached(func: &Func, node: &Node, constant: &impl Fn(ValueId) -> bool) -> Option<(Cached, CacheForm)> {
    let cached = Cached::of(func, node, constant)?;
    let cast = &func.nodes[cached.cast];
    let form = cached.form(func, 1 + cast.ins.len())?;
    (cast.op == Op::DCast).then_some((cached, form))
}

/// The `dcast` whose codes `x wᵀ` multiplies with those of a packed weight.
fn int_factor<'a>(
    func: &'a Func,
    node: &Node,
    constant: &impl Fn(ValueId) -> bool,
    target: &dyn Target,
) -> Option<&'a Node> {
    let ([x, w], Op::MatMul { trans_b: true }) = (&node.ins[..], &node.op) else { return None };
    let cast = func.def_node(*x).filter(|n| n.op == Op::DCast && !constant(*x))?;
    let Elem::Quant(spec) = func.ty(cast.ins[0]).elem else { return None };
    packed(func, *w).is_some_and(|w| target.multiplies(spec, w)).then_some(cast)
}

/// The scheme of a matrix that is codes, scales and zero points among the weights.
pub(super) fn packed(func: &Func, v: ValueId) -> Option<QuantSpec> {
    let node = func.def_node(v).filter(|n| n.op == Op::DCast)?;
    match func.ty(node.ins[0]) {
        TensorType { elem: Elem::Quant(spec), shape } if shape.rank() == 2 => {
            node.ins.iter().all(|&i| func.as_weight(i).is_some()).then_some(*spec)
        }
        _ => None,
    }
}

/// Whether a node is an elementwise operation in `f32` that may be one of several in a pass.
fn is_map(func: &Func, node: &Node) -> bool {
    let whole = &func.ty(node.outs[0]).shape;
    node.ins.iter().chain(&node.outs).all(|&v| func.ty(v).elem == Elem::F32)
        && match node.op {
            Op::Unary(UnaryOp::Cos | UnaryOp::Sin) => false,
            Op::Unary(_) | Op::Silu => true,
            Op::Binary(_) => node.ins.iter().all(|&v| Spread::of(&func.ty(v).shape, whole).is_some()),
            _ => false,
        }
}

/// The factors, before rounding, of a product of two that are rounded to bfloat16.
fn bf16_factors(func: &Func, node: &Node) -> Option<[ValueId; 2]> {
    let ([a, b], Op::MatMul { .. } | Op::Outer) = (&node.ins[..], &node.op) else { return None };
    Some([rounded(func, *a)?, rounded(func, *b)?])
}

/// The two `fake_quant` whose results `x wᵀ` multiplies, if each row of these has one scale, which takes one look at
/// the row to find again.
fn on_grid<'a>(func: &'a Func, node: &Node) -> Option<[&'a Node; 2]> {
    let ([x, w], Op::MatMul { trans_b: true }) = (&node.ins[..], &node.op) else { return None };
    let cast = |v: ValueId| {
        func.def_node(v).filter(|n| match n.op {
            Op::FakeQuant(spec, rule) => {
                let row = matches!(spec.grain, Grain::Row | Grain::Token);
                row && rule != Rule::Mse && func.ty(v).elem == Elem::F32
            }
            _ => false,
        })
    };
    (func.ty(*w).shape.rank() == 2).then_some([cast(*x)?, cast(*w)?])
}

/// What `v` is the nearest bfloat16 of, in `f32` both.
fn rounded(func: &Func, v: ValueId) -> Option<ValueId> {
    let wide = func.def_node(v).filter(|n| n.op == Op::Cast(Elem::F32))?;
    let half = func.def_node(wide.ins[0]).filter(|n| n.op == Op::Cast(Elem::BF16))?;
    Some(half.ins[0]).filter(|&x| func.ty(x).elem == Elem::F32)
}

/// The factors, before the last two axes of both are swapped, of an `outer`.
fn swapped_factors(func: &Func, node: &Node) -> Option<[ValueId; 2]> {
    let ([a, b], Op::Outer) = (&node.ins[..], &node.op) else { return None };
    let swapped = |v: ValueId| {
        let node = func.def_node(v)?;
        let Op::Transpose(perm) = &node.op else { return None };
        let last = perm.len().checked_sub(2)?;
        let lead = perm[..last].iter().enumerate().all(|(i, &p)| i == usize::from(p));
        (lead && usize::from(perm[last]) == last + 1).then(|| node.ins[0])
    };
    Some([swapped(*a)?, swapped(*b)?])
}
