//! Definitions of the transforms.

use crate::build::Builder;
use crate::diag::Diag;
use crate::module::ValueId;
use crate::op::{BinaryOp, Op};
use crate::types::{Dim, Shape};

/// `[.., outer, l, inner]`, left multiplied by `mᵀ`.
pub(super) fn mode_mul(b: &mut Builder<'_>, inner: u64, x: ValueId, m: ValueId) -> Result<ValueId, Diag> {
    let (shape, matrix) = (b.ty(x).shape.clone(), b.ty(m).shape.0.clone());
    let size = matrix.last().and_then(|d| d.fixed()).unwrap_or(1) as u64;
    let n = shape.last().and_then(Dim::fixed).unwrap_or(0) as u64;
    let outer = n / (size * inner);
    let mut split = shape.0.clone();
    split.pop();
    let mut left = b.swap_last(m)?;
    if let [Dim::Fixed(count), ..] = matrix[..]
        && matrix.len() == 3
    {
        let list = [count, 1, size, size].map(Dim::Fixed).to_vec();
        left = b.op1(Op::Reshape(Shape(list)), &[left])?;
        split.extend([count, outer / count, size, inner].map(Dim::Fixed));
    } else {
        split.extend([outer, size, inner].map(Dim::Fixed));
    }
    let x = b.op1(Op::Reshape(Shape(split)), &[x])?;
    let y = b.op1(Op::MatMul { trans_b: false }, &[left, x])?;
    b.op1(Op::Reshape(shape), &[y])
}

/// A product of small mode products: the Walsh-Hadamard matrix is a Kronecker power.
pub(super) fn hadamard(
    b: &mut Builder<'_>,
    block: u64,
    inverse: bool,
    x: ValueId,
    signs: Option<ValueId>,
) -> Result<ValueId, Diag> {
    let missing = || Diag::new("Q0207", format!("no Hadamard matrix of size {block} can be built"));
    let factors = crate::hadamard::factors(block, inverse).ok_or_else(missing)?;
    let mut x = x;
    if let Some(s) = signs.filter(|_| !inverse) {
        x = b.binary(BinaryOp::Mul, x, s)?;
    }
    for f in factors {
        let entries: Vec<f64> = f.entries.iter().map(|&e| f64::from(e)).collect();
        let m = b.literal(&[f.size, f.size], &entries);
        x = mode_mul(b, f.inner, x, m)?;
    }
    let norm = b.scalar(1.0 / (block as f64).sqrt());
    x = b.binary(BinaryOp::Mul, x, norm)?;
    match signs.filter(|_| inverse) {
        Some(s) => b.binary(BinaryOp::Mul, x, s),
        None => Ok(x),
    }
}
