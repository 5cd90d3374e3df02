//! The operation of each term.

use std::collections::HashMap;
use std::rc::Rc;

use qrmc_ir::{BinaryOp, Builder, Diag, Dim, Op, Real, Rule, Shape, ValueId};

use super::build::Build;
use super::facts::decimal;
use super::matrix::Matrix;
use super::term::{Bin, Fit, T, Term, Un, Vector};
use crate::{Integers, decoder};

/// A function in the making.
pub(super) struct Making {
    pub(super) values: HashMap<T, ValueId>,
    pub(super) pos: Option<ValueId>,
    /// Caches that are parameters, keys first, and what was appended to them.
    pub(super) past: [Option<ValueId>; 2],
    pub(super) all: [Option<ValueId>; 2],
}

/// Why a term did not become an operation.
pub(super) enum Fault {
    Ir(Diag),
    Unknown(String),
}

impl From<Diag> for Fault {
    fn from(d: Diag) -> Self {
        Fault::Ir(d)
    }
}

impl Build<'_> {
    fn unknown(&self, t: T, what: &str) -> Fault {
        let node = &self.terms.model.nodes[self.terms.all[t as usize].node];
        Fault::Unknown(format!(
            "node `{}` ({}): {what} is part of no decoder that qrmc knows",
            node.name, node.op
        ))
    }

    /// The value of a matrix, of its codes if it is that of a linear layer.
    fn matrix_value(&self, b: &mut Builder<'_>, m: &Rc<Matrix>, codes: bool, t: T) -> Result<ValueId, Fault> {
        let key = (m.clone(), codes && self.keeps(m));
        let name = self.by_matrix.get(&key).ok_or_else(|| self.unknown(t, "a matrix without a name"))?;
        Ok(decoder::weight(b, name)?)
    }

    /// Whether a linear layer keeps the codes of its matrix. A table of tokens is read as floats.
    pub(super) fn keeps(&self, m: &Matrix) -> bool {
        self.integers != Integers::Dequantize && m.spec().is_some()
    }

    fn vector_value(&self, b: &mut Builder<'_>, v: &Vector, t: T) -> Result<ValueId, Fault> {
        let name = self.by_vector.get(v).ok_or_else(|| self.unknown(t, "a vector without a name"))?;
        Ok(decoder::weight(b, name)?)
    }

    /// Writes the operation of a term, whose operands are there.
    pub(super) fn emit(&self, b: &mut Builder<'_>, m: &mut Making, t: T) -> Result<(), Fault> {
        let info = &self.terms.all[t as usize];
        let get = |m: &Making, x: T| m.values.get(&x).copied();
        let need = |m: &Making, x: T| get(m, x).ok_or_else(|| self.unknown(x, "a value of another layer"));
        let y = match &info.term {
            Term::Past(_) => return Ok(()),
            Term::Given => {
                let what = "what is computed of the hidden states that are its input, before the first layer or beside \
                            it, is part of no decoder that qrmc knows";
                return Err(Fault::Unknown(what.into()));
            }
            Term::Embed(table) => {
                let table = self.matrix_value(b, table, false, t)?;
                let ids = m.pos.ok_or_else(|| self.unknown(t, "a second table of tokens"))?;
                b.op1(Op::Gather, &[table, ids])?
            }
            Term::Scalar(bits, None) => b.scalar(decimal(*bits)),
            Term::Scalar(bits, Some(t)) if !self.is_named(*t) => b.literal(&[1], &[decimal(*bits)]),
            Term::Scalar(_, Some(_)) | Term::Vector(_) => match self.terms.vector(t) {
                Some(v) => self.vector_value(b, &v, t)?,
                None => return Err(self.unknown(t, "a number")),
            },
            Term::Linear(x, w) => {
                let x = need(m, *x)?;
                let w = self.matrix_value(b, w, true, t)?;
                b.linear(x, w)?
            }
            Term::Norm { x, gain, eps, run } => {
                let gain = match &gain.literal {
                    Some(one) if gain.n == 1 => b.literal(&[1], &[decimal(one[0])]),
                    _ => self.vector_value(b, gain, t)?,
                };
                let eps = Real(decimal(*eps));
                let x = need(m, *x)?;
                if *run == info.n {
                    b.op1(Op::RmsNorm(eps), &[x, gain])?
                } else {
                    let shape = b.ty(x).shape.clone();
                    let heads = [info.n / run, *run].map(Dim::Fixed);
                    let split = Shape(vec![shape.0[0], shape.0[1], heads[0], heads[1]]);
                    let x = b.op1(Op::Reshape(split), &[x])?;
                    let y = b.op1(Op::RmsNorm(eps), &[x, gain])?;
                    b.op1(Op::Reshape(shape), &[y])?
                }
            }
            Term::Silu(x) => b.op1(Op::Silu, &[need(m, *x)?])?,
            Term::Rope(x, attr) => {
                let pos = m.pos.ok_or_else(|| self.unknown(t, "positions outside of a layer"))?;
                let mut v = need(m, *x)?;
                if matches!(self.terms.get(*x), Term::Vector(_)) {
                    v = b.op1(Op::Reshape(Shape([1, 1, info.n].map(Dim::Fixed).to_vec())), &[v])?;
                }
                b.op1(Op::Rope(*attr), &[v, pos])?
            }
            Term::Append(past, new) => {
                let (past, new) = (need(m, *past)?, need(m, *new)?);
                let y = b.op1(Op::CacheAppend, &[past, new])?;
                let keys = usize::from(m.past[0] != Some(past));
                m.all[keys] = Some(y);
                y
            }
            Term::Attention(q, k, v, attr) => {
                let (q, mut k, mut v) = (need(m, *q)?, need(m, *k)?, need(m, *v)?);
                // A graph without caches attends to the new keys alone.
                for (at, x) in [&mut k, &mut v].into_iter().enumerate() {
                    if let (None, Some(past)) = (m.all[at], m.past[at]) {
                        *x = b.op1(Op::CacheAppend, &[past, *x])?;
                        b.name(*x, ["k_all", "v_all"][at]);
                        m.all[at] = Some(*x);
                    }
                }
                b.op1(Op::Attention(*attr), &[q, k, v])?
            }
            Term::Quant { x, .. } | Term::Static { x, .. } if self.integers == Integers::Dequantize => {
                need(m, *x)?
            }
            Term::Quant { x, spec, factors } => {
                let mut ins = vec![need(m, *x)?];
                if let Some((hi, lo)) = factors {
                    ins.extend([need(m, *hi)?, need(m, *lo)?]);
                }
                b.op1(Op::FakeQuant(*spec, Rule::Dynamic), &ins)?
            }
            Term::Static { x, spec, scale, zero } => {
                let mut sides = vec![self.vector_value(b, scale, t)?];
                if let Some(z) = zero {
                    sides.push(self.vector_value(b, z, t)?);
                }
                let ins: Vec<ValueId> = std::iter::once(need(m, *x)?).chain(sides.iter().copied()).collect();
                let codes = b.op1(Op::QCast(*spec), &ins)?;
                let ins: Vec<ValueId> = std::iter::once(codes).chain(sides).collect();
                b.op1(Op::DCast, &ins)?
            }
            Term::Mode { x, m: matrix, inner, .. } => {
                let x = need(m, *x)?;
                let w = self.matrix_value(b, matrix, false, t)?;
                b.op1(Op::ModeMul { inner: *inner }, &[x, w])?
            }
            Term::Hadamard { x, block, inverse } => {
                b.op1(Op::Hadamard { block: *block, inverse: *inverse }, &[need(m, *x)?])?
            }
            Term::Bin(op, x, y, Fit::Same) => {
                // As other importers have it: a bias behind what it is added to.
                let biases = |t: &T| matches!(self.terms.get(*t), Term::Vector(_));
                let (x, y) = if *op == Bin::Add && biases(x) && !biases(y) { (y, x) } else { (x, y) };
                let op = binary(*op).ok_or_else(|| self.unknown(t, "what it computes"))?;
                b.binary(op, need(m, *x)?, need(m, *y)?)?
            }
            Term::Un(Un::Neg, x) => b.op1(Op::Unary(qrmc_ir::UnaryOp::Neg), &[need(m, *x)?])?,
            _ => return Err(self.unknown(t, "what it computes")),
        };
        if let Some(name) = self.roles.values.get(&t)
            && b.func().value(y).name.is_none()
        {
            b.name(y, name);
        }
        m.values.insert(t, y);
        Ok(())
    }
}

fn binary(op: Bin) -> Option<BinaryOp> {
    Some(match op {
        Bin::Add => BinaryOp::Add,
        Bin::Sub => BinaryOp::Sub,
        Bin::Mul => BinaryOp::Mul,
        Bin::Div => BinaryOp::Div,
        Bin::Max => BinaryOp::Max,
        Bin::Min => BinaryOp::Min,
        Bin::Equal | Bin::Greater | Bin::And => return None,
    })
}
