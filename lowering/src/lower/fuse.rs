//! Operations that are computed where their results are read.

use qrmc_ir::{BinaryOp, Elem, Func, Node, Op, ValueId};

/// For each node that is computed where it is read, the last node that does so.
pub(super) fn absorbed(func: &Func) -> Vec<Option<usize>> {
    let users = func.users();
    let mut out: Vec<Option<usize>> = vec![None; func.nodes.len()];
    for (n, node) in func.nodes.iter().enumerate().rev() {
        let [v] = node.outs[..] else { continue };
        let readers = &users[v.0 as usize];
        let inside = |&u: &usize| {
            let user = &func.nodes[u];
            match node.op {
                Op::Silu => {
                    is_mul(user) && silu_product(func, user, &users).is_some_and(|(gate, _)| gate == v)
                }
                Op::Cast(Elem::F32) => bf16_factors(func, user).is_some() && rounded(func, v).is_some(),
                Op::Transpose(_) => swapped_factors(func, user).is_some(),
                // The other half of a rounding, which goes with it.
                Op::Cast(Elem::BF16) => user.op == Op::Cast(Elem::F32) && out[u].is_some(),
                _ => false,
            }
        };
        if !readers.is_empty() && !func.results.contains(&v) && readers.iter().all(inside) {
            out[n] = readers.iter().map(|&u| out[u].unwrap_or(u)).max();
        }
    }
    out
}

fn is_mul(node: &Node) -> bool {
    node.op == Op::Binary(BinaryOp::Mul)
}

/// The `silu` and the other factor of a product that is one kernel: of one type, and the `silu` is read by it alone.
pub(super) fn silu_product(func: &Func, node: &Node, users: &[Vec<usize>]) -> Option<(ValueId, ValueId)> {
    let [a, b] = node.ins[..] else { return None };
    let fits = |gate: ValueId, up: ValueId| {
        let silu = func.def_node(gate).is_some_and(|n| n.op == Op::Silu);
        let alone = users[gate.0 as usize].len() == 1 && !func.results.contains(&gate);
        silu && alone && gate != up && func.ty(gate) == func.ty(up)
    };
    if fits(a, b) {
        Some((a, b))
    } else if fits(b, a) {
        Some((b, a))
    } else {
        None
    }
}

/// The factors, before rounding, of a product of two that are rounded to bfloat16.
pub(super) fn bf16_factors(func: &Func, node: &Node) -> Option<[ValueId; 2]> {
    let ([a, b], Op::MatMul { .. } | Op::Outer) = (&node.ins[..], &node.op) else { return None };
    Some([rounded(func, *a)?, rounded(func, *b)?])
}

/// What `v` is the nearest bfloat16 of, in `f32` both.
fn rounded(func: &Func, v: ValueId) -> Option<ValueId> {
    let wide = func.def_node(v).filter(|n| n.op == Op::Cast(Elem::F32))?;
    let half = func.def_node(wide.ins[0]).filter(|n| n.op == Op::Cast(Elem::BF16))?;
    Some(half.ins[0]).filter(|&x| func.ty(x).elem == Elem::F32)
}

/// The factors, before the last two axes of both are swapped, of an `outer`.
pub(super) fn swapped_factors(func: &Func, node: &Node) -> Option<[ValueId; 2]> {
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
