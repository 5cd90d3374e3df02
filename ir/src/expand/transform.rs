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
    let k = crate::hadamard::core_order(block).ok_or_else(missing)?;
    let core = crate::hadamard::core(k).ok_or_else(missing)?;
    let mut x = x;
    if let Some(s) = signs.filter(|_| !inverse) {
        x = b.binary(BinaryOp::Mul, x, s)?;
    }
    let mut inner = 1;
    while inner < block / k {
        // A Kronecker factor of up to 16.
        let size = (block / k / inner).min(16);
        let sign = |i: u64, j: u64| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        let data: Vec<f64> = (0..size * size).map(|at| sign(at / size, at % size)).collect();
        let m = b.literal(&[size, size], &data);
        x = mode_mul(b, inner, x, m)?;
        inner *= size;
    }
    if k > 1 {
        // The forward transform multiplies columns by the core, which is a mode product with its transpose.
        let n = k as usize;
        let at = |i: usize, j: usize| f64::from(if inverse { core[i * n + j] } else { core[j * n + i] });
        let data: Vec<f64> = (0..n * n).map(|p| at(p / n, p % n)).collect();
        let m = b.literal(&[k, k], &data);
        x = mode_mul(b, block / k, x, m)?;
    }
    let norm = b.scalar(1.0 / (block as f64).sqrt());
    x = b.binary(BinaryOp::Mul, x, norm)?;
    match signs.filter(|_| inverse) {
        Some(s) => b.binary(BinaryOp::Mul, x, s),
        None => Ok(x),
    }
}
