//! Rules of transforms.

use super::{Types, arith};
use crate::diag::Diag;
use crate::types::{Dim, TensorType};

pub(super) fn mode_mul(ins: Types<'_>, inner: u64) -> Result<TensorType, String> {
    let (x, m) = (ins[0], ins[1]);
    let elem = arith(ins, &|m| Diag::new("Q0103", m)).map_err(|d| d.message)?;
    let (count, size) = match m.shape.as_fixed().as_deref() {
        Some(&[a, b]) if a == b => (1, a),
        Some(&[t, a, b]) if a == b => (t, a),
        _ => return Err(format!("{m} is no square matrix and no list of them")),
    };
    let n = x.shape.last().and_then(Dim::fixed).unwrap_or(0);
    let block = size.checked_mul(inner as usize).filter(|b| *b > 0).unwrap_or(usize::MAX);
    if n == 0 || !n.is_multiple_of(block) || count == 0 || !(n / block).is_multiple_of(count) {
        return Err(format!("the last axis of {x} is not made of {count} times [{size}, {inner}]"));
    }
    Ok(TensorType { elem, shape: x.shape.clone() })
}

pub(super) fn hadamard(ins: Types<'_>, block: u64) -> Result<TensorType, Diag> {
    let fault = |why: String| Diag::new("Q0103", format!("`hadamard`: {why}"));
    let elem = arith(ins, &fault)?;
    let n = ins[0].shape.last().and_then(Dim::fixed).unwrap_or(0) as u64;
    if block == 0 || n == 0 || !n.is_multiple_of(block) {
        return Err(fault(format!("blocks of {block} do not divide the last axis of {}", ins[0])));
    }
    if crate::hadamard::core_order(block).is_none() {
        let near: Vec<String> = crate::hadamard::near(block).iter().map(ToString::to_string).collect();
        return Err(Diag::new("Q0207", format!("no Hadamard matrix of size {block} can be built"))
            .hint(format!("sizes near it that can: {}", near.join(", "))));
    }
    if let Some(signs) = ins.get(1).filter(|s| s.shape.as_fixed() != Some(vec![n as usize])) {
        return Err(fault(format!("signs {signs} are no vector of length {n}")));
    }
    Ok(TensorType { elem, shape: ins[0].shape.clone() })
}
