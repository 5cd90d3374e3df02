//! Gradients: a function of the IR becomes the function that computes its gradients, by reverse accumulation.
//!
//! An operation either has a rule in [`rules`], or is replaced by its definition first, whose parts have rules. Rounding
//! is straight through: `fake_quant` and `clip_range` have gradients of their own in [`qrmc_ir::grid`].

mod rules;

use std::collections::HashMap;

use qrmc_ir::{BinaryOp, Builder, Diag, Func, Module, Op, ValueId, expand};

use crate::scale::measure::inline;

/// How gradients are computed.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct GradOptions {
    /// The factors of a linear layer's gradients are rounded to bfloat16; their sums are not. Mixed precision, as the
    /// originals of trained methods offer it.
    pub(crate) bf16: bool,
}

/// The function `params -> results.., gradients..`: the results of `func`, then the gradient of its first result, which is
/// one number, with respect to each of the parameters at these places.
///
/// # Errors
/// If an operation between them has no gradient (`Q0608`), or the first result is not one number.
pub(crate) fn grad(module: &Module, func: &Func, wrt: &[usize], o: &GradOptions) -> Result<Func, Diag> {
    let flat = differentiable(module, func)?;
    let mut b = Builder::new(module, &format!("{}.grad", func.name));
    let params: Vec<ValueId> =
        flat.params.iter().map(|&p| b.param(flat.value(p).name.as_deref(), flat.ty(p).clone())).collect();
    let (mut values, reach) = (HashMap::new(), reached(&flat, wrt));
    values.extend(flat.params.iter().copied().zip(params.iter().copied()));
    for node in &flat.nodes {
        let ins: Vec<ValueId> = node.ins.iter().map(|v| values[v]).collect();
        let outs = match node.op {
            Op::Weight(w) => vec![b.weight(w)],
            _ => b.op(node.op.clone(), &ins)?,
        };
        values.extend(node.outs.iter().copied().zip(outs));
    }
    let loss = flat.results.first().copied().ok_or_else(|| no_loss(&flat, None))?;
    if flat.ty(loss).shape.0.iter().any(|d| *d != 1.into()) {
        return Err(no_loss(&flat, Some(loss)));
    }
    let one = b.scalar(1.0);
    let seed = b.op1(Op::Reshape(flat.ty(loss).shape.clone()), &[one])?;
    let mut sums: HashMap<ValueId, ValueId> = HashMap::from([(loss, seed)]);
    for node in flat.nodes.iter().rev() {
        if !node.outs.iter().any(|o| reach[o.0 as usize]) {
            continue;
        }
        // Nothing that the loss depends on reads the results.
        let Some(dy) = node.outs.first().and_then(|o| sums.get(o)).copied() else { continue };
        let ins: Vec<ValueId> = node.ins.iter().map(|v| values[v]).collect();
        let outs: Vec<ValueId> = node.outs.iter().map(|v| values[v]).collect();
        let wanted: Vec<bool> = node.ins.iter().map(|v| reach[v.0 as usize]).collect();
        let back = rules::back(&mut b, o, &node.op, &ins, &outs, dy, &wanted).map_err(|d| {
            d.at(qrmc_ir::Place { func: Some(func.name.clone()), ..qrmc_ir::Place::default() })
        })?;
        for ((v, d), _) in node.ins.iter().zip(back).zip(&wanted).filter(|(_, w)| **w) {
            let Some(d) = d else { continue };
            let sum = match sums.get(v) {
                Some(&have) => b.binary(BinaryOp::Add, have, d)?,
                None => d,
            };
            sums.insert(*v, sum);
        }
    }
    let mut results: Vec<ValueId> = flat.results.iter().map(|r| values[r]).collect();
    for &at in wrt {
        let p = flat.params[at];
        results.push(match sums.get(&p) {
            Some(&g) => g,
            // The loss does not depend on it.
            None => {
                let zero = b.scalar(0.0);
                b.op1(Op::BroadcastLike, &[zero, values[&p]])?
            }
        });
    }
    Ok(b.finish(&results))
}

fn no_loss(f: &Func, loss: Option<ValueId>) -> Diag {
    let what = loss.map_or("nothing".to_owned(), |v| f.ty(v).to_string());
    Diag::new("Q0608", format!("the first result of @{} is {what}, a gradient needs one number", f.name))
}

/// Which values depend on the parameters at these places.
fn reached(f: &Func, wrt: &[usize]) -> Vec<bool> {
    let mut reach = vec![false; f.value_count()];
    wrt.iter().for_each(|&at| reach[f.params[at].0 as usize] = true);
    for node in &f.nodes {
        if node.ins.iter().any(|v| reach[v.0 as usize]) {
            node.outs.iter().for_each(|o| reach[o.0 as usize] = true);
        }
    }
    reach
}

/// The function with operations that have no rule of their own replaced by their definitions.
fn differentiable(module: &Module, func: &Func) -> Result<Func, Diag> {
    let mut current = func.clone();
    loop {
        let mut changed = false;
        let next = qrmc_ir::rewrite(module, &current, |b, node, ins| {
            if let Op::Call(f) = node.op {
                changed = true;
                return inline(b, module.func(f), ins).map(Some);
            }
            if rules::has_rule(&node.op) {
                return Ok(None);
            }
            let outs = expand(b, &node.op, ins)?;
            changed |= outs.is_some();
            Ok(outs)
        })?;
        if !changed {
            return Ok(next);
        }
        current = next;
    }
}

#[cfg(test)]
mod tests;
