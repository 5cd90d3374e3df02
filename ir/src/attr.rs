//! Attribute values of operations, as data: the printer, the parser and the hash see only these.

use std::fmt;

use crate::quant::{QuantSpec, Rule};
use crate::types::{Dim, Elem, Shape};

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

/// Takes attributes by name, each once.
pub(crate) struct AttrReader<'a> {
    word: &'a str,
    attrs: Vec<(String, Attr)>,
}

impl<'a> AttrReader<'a> {
    pub(crate) fn new(word: &'a str, attrs: Vec<(String, Attr)>) -> Self {
        AttrReader { word, attrs }
    }

    fn take(&mut self, key: &str) -> Result<Attr, String> {
        self.take_opt(key).ok_or_else(|| format!("`{}` needs the attribute `{key}`", self.word))
    }

    pub(crate) fn take_opt(&mut self, key: &str) -> Option<Attr> {
        let at = self.attrs.iter().position(|(k, _)| k == key)?;
        Some(self.attrs.remove(at).1)
    }

    fn wrong<T>(&self, key: &str, want: &str, got: &Attr) -> Result<T, String> {
        Err(format!("attribute `{key}` of `{}` is {want}, not `{got}`", self.word))
    }

    pub(crate) fn int(&mut self, key: &str) -> Result<i64, String> {
        match self.take(key)? {
            Attr::Int(n) if n >= 0 => Ok(n),
            got => self.wrong(key, "a whole number", &got),
        }
    }

    pub(crate) fn small(&mut self, key: &str) -> Result<u8, String> {
        let n = self.int(key)?;
        u8::try_from(n).or_else(|_| self.wrong(key, "a small number", &Attr::Int(n)))
    }

    pub(crate) fn real(&mut self, key: &str) -> Result<Real, String> {
        match self.take(key)? {
            Attr::Real(x) => Ok(x),
            Attr::Int(n) => Ok(Real(n as f64)),
            got => self.wrong(key, "a number", &got),
        }
    }

    pub(crate) fn word(&mut self, key: &str) -> Result<String, String> {
        match self.take(key)? {
            Attr::Word(w) => Ok(w),
            got => self.wrong(key, "a word", &got),
        }
    }

    pub(crate) fn ints(&mut self, key: &str) -> Result<Vec<i64>, String> {
        match self.take(key)? {
            Attr::Ints(v) if v.iter().all(|&x| x >= 0) => Ok(v),
            Attr::Shape(s) => match s.as_fixed() {
                Some(v) => Ok(v.into_iter().map(|n| n as i64).collect()),
                None => self.wrong(key, "a list of whole numbers", &Attr::Shape(s)),
            },
            got => self.wrong(key, "a list of whole numbers", &got),
        }
    }

    pub(crate) fn reals(&mut self, key: &str) -> Result<Vec<Real>, String> {
        match self.take(key)? {
            Attr::Reals(v) => Ok(v),
            Attr::Ints(v) => Ok(v.into_iter().map(|n| Real(n as f64)).collect()),
            got => self.wrong(key, "a list of numbers", &got),
        }
    }

    pub(crate) fn shape(&mut self, key: &str) -> Result<Shape, String> {
        match self.take(key)? {
            Attr::Shape(s) => Ok(s),
            Attr::Ints(v) if v.iter().all(|&x| x >= 0) => {
                Ok(Shape(v.into_iter().map(|n| Dim::Fixed(n as u64)).collect()))
            }
            got => self.wrong(key, "a shape", &got),
        }
    }

    pub(crate) fn elem(&mut self, key: &str) -> Result<Elem, String> {
        match self.take(key)? {
            Attr::Elem(e) => Ok(e),
            got => self.wrong(key, "an element type", &got),
        }
    }

    pub(crate) fn spec(&mut self, key: &str) -> Result<QuantSpec, String> {
        match self.take(key)? {
            Attr::Spec(q) => Ok(q),
            got => self.wrong(key, "a quantization scheme such as `u4<group:64, f32, zero>`", &got),
        }
    }

    pub(crate) fn rule(&mut self) -> Result<Rule, String> {
        let w = self.word("rule")?;
        w.parse().or_else(|()| self.wrong("rule", "one of minmax, awq, mse, dynamic", &Attr::Word(w.clone())))
    }

    pub(crate) fn finish(self) -> Result<(), String> {
        match self.attrs.first() {
            None => Ok(()),
            Some((k, _)) => Err(format!("`{}` has no attribute `{k}`", self.word)),
        }
    }
}
