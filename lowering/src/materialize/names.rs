//! What the tensors of a materialized module are called.

use std::collections::{HashMap, HashSet};

use qrmc_ir::{Func, Module, Op, ValueId};

use super::{Job, Origin};

/// Names of new tensors.
pub(super) struct Names {
    /// How many functions read each weight as it is, or derive something from it.
    readers: HashMap<String, usize>,
}

impl Names {
    pub(super) fn of(module: &Module) -> Self {
        let mut readers: HashMap<String, usize> = HashMap::new();
        for f in &module.funcs {
            let mut seen = HashSet::new();
            for n in &f.nodes {
                if let Op::Weight(w) = n.op
                    && seen.insert(w)
                {
                    *readers.entry(module.weight(w).name.clone()).or_default() += 1;
                }
            }
        }
        Names { readers }
    }

    /// The name of what is computed from a weight: the weight's own, unless another function reads that too.
    pub(super) fn derived(&self, base: &str, func: &str) -> String {
        if self.readers.get(base).copied().unwrap_or(0) > 1 {
            format!("{base}.{func}")
        } else {
            base.to_owned()
        }
    }
}

/// The name of the weight that a value is mainly made of.
pub(super) fn base_weight(module: &Module, f: &Func, v: ValueId) -> Option<String> {
    f.weight_behind(v).map(|w| module.weight(w).name.clone())
}

/// Mnemonic of the first operation on the weight that a value is mainly made of.
pub(super) fn first_op(f: &Func, v: ValueId) -> &'static str {
    let made = f.first_operands(v).take_while(|n| !matches!(n.op, Op::Weight(_)));
    made.last().map_or("derived", |n| n.op.text().0)
}

impl Job {
    /// Takes other names if one of them stands for another tensor already: a weight and what is computed from it, say.
    pub(super) fn rename(&mut self, made: &HashMap<String, Option<String>>, word: &str) {
        let copied = if let Origin::Copy(w) = &self.origin { Some(w.clone()) } else { None };
        let taken = |name: &String| made.get(name).is_some_and(|of| of.is_none() || *of != copied);
        let plain: Vec<String> = self.tensors.iter().map(|t| t.name.clone()).collect();
        let mut number = 1;
        while self.tensors.iter().any(|t| taken(&t.name)) {
            let part = if number == 1 { format!(".{word}") } else { format!(".{word}.{number}") };
            for (t, plain) in self.tensors.iter_mut().zip(&plain) {
                // Scales and zero points keep their ends.
                let at = match plain.rfind('.') {
                    Some(at) if is_part(&plain[at..]) && matches!(self.parts.len(), 2..) => at,
                    _ => plain.len(),
                };
                t.name = format!("{}{part}{}", &plain[..at], &plain[at..]);
            }
            number += 1;
        }
    }
}

/// Whether a name ends as those of a quantized weight's parts do.
fn is_part(end: &str) -> bool {
    [".codes", ".scale", ".zero"].contains(&end)
}
