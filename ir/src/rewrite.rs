//! Changing functions: a function is rebuilt node by node; what a rule does not touch is copied.

use std::collections::HashMap;

use crate::build::Builder;
use crate::diag::Diag;
use crate::module::{Func, Module, Node, ValueId};
use crate::op::Op;

/// Rebuilds a function. For each node, `rule` gets the builder, the old node and its operands in the new function; it
/// returns the new results, or `None` to copy the node. Names of results move to the new results.
///
/// # Errors
/// What the rule or a type rule says.
pub fn rewrite(
    module: &Module,
    func: &Func,
    mut rule: impl FnMut(&mut Builder<'_>, &Node, &[ValueId]) -> Result<Option<Vec<ValueId>>, Diag>,
) -> Result<Func, Diag> {
    let mut b = Builder::new(module, &func.name);
    let mut map: HashMap<ValueId, ValueId> = HashMap::new();
    for &p in &func.params {
        map.insert(p, b.param(func.value(p).name.as_deref(), func.ty(p).clone()));
    }
    for node in &func.nodes {
        let ins: Vec<ValueId> = node.ins.iter().map(|v| map[v]).collect();
        let outs = match rule(&mut b, node, &ins)? {
            Some(outs) => outs,
            None => copy(&mut b, node, &ins)?,
        };
        for (&old, &new) in node.outs.iter().zip(&outs) {
            map.insert(old, new);
            if let Some(name) = &func.value(old).name {
                b.name(new, name);
            }
        }
    }
    let results: Vec<ValueId> = func.results.iter().map(|r| map[r]).collect();
    Ok(b.finish(&results))
}

fn copy(b: &mut Builder<'_>, node: &Node, ins: &[ValueId]) -> Result<Vec<ValueId>, Diag> {
    match node.op {
        Op::Weight(w) => Ok(vec![b.weight(w)]),
        _ => b.op(node.op.clone(), ins),
    }
}

/// The part of a function that computes `wanted` from `cut`: the cut values become parameters (in this order, with
/// their names), everything above them is left out.
///
/// # Errors
/// If a wanted value depends on a parameter of `func` that is not cut.
pub fn extract(
    module: &Module,
    func: &Func,
    name: &str,
    cut: &[ValueId],
    wanted: &[ValueId],
) -> Result<Func, Diag> {
    let mut b = Builder::new(module, name);
    let mut map: HashMap<ValueId, ValueId> = HashMap::new();
    for &c in cut {
        map.insert(c, b.param(func.value(c).name.as_deref(), func.ty(c).clone()));
    }
    let mut need = vec![false; func.value_count()];
    wanted.iter().for_each(|w| need[w.0 as usize] = true);
    cut.iter().for_each(|c| need[c.0 as usize] = false);
    for node in func.nodes.iter().rev() {
        if node.outs.iter().any(|o| need[o.0 as usize]) {
            node.ins.iter().filter(|i| !cut.contains(i)).for_each(|i| need[i.0 as usize] = true);
        }
    }
    if let Some(p) = func.params.iter().find(|p| need[p.0 as usize]) {
        return Err(Diag::new("Q0109", format!("the slice of @{} still needs {}", func.name, func.show(*p))));
    }
    for node in &func.nodes {
        if !node.outs.iter().any(|o| need[o.0 as usize]) {
            continue;
        }
        let ins: Vec<ValueId> = node.ins.iter().map(|v| map[v]).collect();
        let outs = copy(&mut b, node, &ins)?;
        for (&old, &new) in node.outs.iter().zip(&outs) {
            if cut.contains(&old) {
                continue;
            }
            map.insert(old, new);
            if let Some(n) = &func.value(old).name {
                b.name(new, n);
            }
        }
    }
    let results: Vec<ValueId> = wanted.iter().map(|w| map[w]).collect();
    Ok(b.finish(&results))
}

/// Which quantizers are taken to be the identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Identity {
    /// Fake quantization and clips of weights and of values that are computed online, and roundings of the latter.
    All,
    /// Those of values that are computed online alone: what is left is what is stored.
    Online,
}

/// The function with quantizers taken out: what it computes when they are the identity.
///
/// # Errors
/// Only if the function breaks a type rule already.
pub fn without_quantizers(module: &Module, func: &Func, which: Identity) -> Result<Func, Diag> {
    let derived = func.weight_derived();
    let mut casts: HashMap<ValueId, ValueId> = HashMap::new();
    rewrite(module, func, |_, node, ins| {
        let stored = node.outs.first().is_some_and(|o| derived[o.0 as usize]);
        Ok(match node.op {
            Op::Edge => Some(vec![ins[0]]),
            Op::FakeQuant(..) | Op::Clip(_) | Op::ClipRange(_) if which == Identity::All || !stored => {
                Some(vec![ins[0]])
            }
            Op::QCast(_) if !stored => {
                casts.insert(node.outs[0], ins[0]);
                None
            }
            Op::DCast => casts.get(&node.ins[0]).map(|&x| vec![x]),
            _ => None,
        })
    })
}

/// The module with [`without_quantizers`] applied to every function.
///
/// # Errors
/// As [`without_quantizers`].
pub fn module_without_quantizers(module: &Module, which: Identity) -> Result<Module, Diag> {
    let mut out = module.clone();
    for at in 0..out.funcs.len() {
        out.funcs[at] = without_quantizers(module, &module.funcs[at], which)?;
    }
    Ok(out)
}
