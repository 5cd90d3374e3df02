//! Hashes: of text, of structure.

use std::collections::HashMap;

use crate::module::{Func, Module, WeightId};
use crate::op::Op;

/// A 256-bit content hash (BLAKE3).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// Hash of a sequence of byte strings; where one ends and the next starts counts.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Hash {
        let mut h = blake3::Hasher::new();
        for p in parts {
            h.update(&(p.len() as u64).to_le_bytes());
            h.update(p);
        }
        Hash(*h.finalize().as_bytes())
    }

    /// Lower-case hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// A hash of what a function computes, without the names of the function, its values and its weights: layers of one
/// shape hash alike and share a lowered plan. Weights count by type and by order of first use.
pub fn structural_hash(module: &Module, func: &Func) -> Hash {
    let mut text = String::new();
    let mut slots: HashMap<WeightId, usize> = HashMap::new();
    for &p in &func.params {
        text += &format!("param {}\n", func.ty(p));
    }
    for node in &func.nodes {
        let (word, attrs) = node.op.text();
        text += word;
        match node.op {
            Op::Weight(w) => {
                let next = slots.len();
                let slot = *slots.entry(w).or_insert(next);
                text += &format!(" #{slot}:{}", module.weight(w).ty);
            }
            Op::Call(f) => text += &structural_hash(module, module.func(f)).hex(),
            _ => {}
        }
        for (k, v) in attrs {
            text += &format!(" {k}={v}");
        }
        for v in &node.ins {
            text += &format!(" {}", v.0);
        }
        text.push('\n');
    }
    for r in &func.results {
        text += &format!("result {}\n", r.0);
    }
    Hash::of([text.as_bytes()])
}
