//! Attribute values of operations, as data: the printer, the parser and the hash see only these.

use std::fmt;

use crate::quant::QuantSpec;
use crate::types::{Elem, Shape};

/// A float attribute, equal when the bits are equal.
#[derive(Clone, Copy, Debug)]
pub struct Real(pub f64);

impl PartialEq for Real {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}
impl Eq for Real {}
impl std::hash::Hash for Real {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}
impl fmt::Display for Real {
    /// Shortest text that reads back to the same bits and is not mistaken for an integer.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let x = self.0;
        if x != 0.0 && x.is_finite() && (x.abs() < 1e-4 || x.abs() >= 1e16) {
            write!(f, "{x:e}")
        } else {
            write!(f, "{x:?}")
        }
    }
}

/// One attribute value.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Attr {
    /// An integer.
    Int(i64),
    /// A float.
    Real(Real),
    /// A bare word.
    Word(String),
    /// A list of integers, such as a permutation.
    Ints(Vec<i64>),
    /// A list of floats.
    Reals(Vec<Real>),
    /// A shape, which may hold symbols.
    Shape(Shape),
    /// An element type that is not quantized.
    Elem(Elem),
    /// A quantization scheme.
    Spec(QuantSpec),
}

impl fmt::Display for Attr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn list<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: &[T]) -> fmt::Result {
            f.write_str("[")?;
            for (i, x) in items.iter().enumerate() {
                write!(f, "{}{x}", if i > 0 { ", " } else { "" })?;
            }
            f.write_str("]")
        }
        match self {
            Attr::Int(n) => n.fmt(f),
            Attr::Real(x) => x.fmt(f),
            Attr::Word(w) => f.write_str(w),
            Attr::Ints(v) => list(f, v),
            Attr::Reals(v) => list(f, v),
            Attr::Shape(s) => s.fmt(f),
            Attr::Elem(e) => e.fmt(f),
            Attr::Spec(q) => q.fmt(f),
        }
    }
}
