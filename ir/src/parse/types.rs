//! Types, schemes and attribute values.

use super::{Parsed, Parser};
use crate::attr::{Attr, Real};
use crate::lex::Token;
use crate::quant::{Grain, QuantSpec, ScaleType};
use crate::types::{Dim, Elem, Shape, Sym, TensorType};

impl Parser<'_> {
    pub(super) fn dim(&mut self) -> Parsed<Dim> {
        match self.token {
            Token::Int(n) if n >= 0 => {
                self.advance()?;
                Ok(Dim::Fixed(n as u64))
            }
            Token::Word(w) => match Sym::ALL.iter().find(|s| s.letter() == w) {
                Some(&s) => {
                    self.advance()?;
                    Ok(Dim::Sym(s))
                }
                None => self.unexpected("a size or one of B, S, P, T"),
            },
            _ => self.unexpected("a size or one of B, S, P, T"),
        }
    }

    pub(super) fn ty(&mut self) -> Parsed<TensorType> {
        let word = self.word("an element type")?;
        let elem = self.elem_or_spec(word)?;
        self.expect("[")?;
        let dims = self.list("]", Self::dim)?;
        Ok(TensorType { elem, shape: Shape(dims) })
    }

    /// The element type that starts with `word`, which has been read.
    fn elem_or_spec(&mut self, word: &str) -> Parsed<Elem> {
        if self.token == Token::Punct("<") {
            return Ok(Elem::Quant(self.spec(word)?));
        }
        match plain_elem(word) {
            Some(e) => Ok(e),
            None => self.fail("Q0001", format!("`{word}` is no element type")),
        }
    }

    fn spec(&mut self, word: &str) -> Parsed<QuantSpec> {
        let bits = word.get(1..).and_then(|b| b.parse::<u8>().ok());
        let (Some(bits), true) = (bits, word.starts_with(['i', 'u'])) else {
            return self.fail("Q0001", format!("`{word}` is no code type such as `i8` or `u4`"));
        };
        self.expect("<")?;
        let grain = match self.word("a grain: tensor, row, group or token")? {
            "tensor" => Grain::Tensor,
            "row" => Grain::Row,
            "token" => Grain::Token,
            "channel" => Grain::Channel,
            "group" => {
                self.expect(":")?;
                let n = self.count("a group size")?;
                match u32::try_from(n) {
                    Ok(n) => Grain::Group(n),
                    Err(_) => return self.fail("Q0001", format!("a group of {n} is too large")),
                }
            }
            other => {
                return self.fail("Q0001", format!("`{other}` is no grain: tensor, row, group:N or token"));
            }
        };
        self.expect(",")?;
        let scale = match self.word("a scale type")? {
            "f32" => ScaleType::F32,
            "f16" => ScaleType::F16,
            "bf16" => ScaleType::BF16,
            other => return self.fail("Q0001", format!("`{other}` is no scale type: f32, f16 or bf16")),
        };
        let zero = self.eat(",")?;
        if zero && !self.keyword("zero")? {
            return self.unexpected("`zero`");
        }
        self.expect(">")?;
        Ok(QuantSpec { bits, signed: word.starts_with('i'), grain, scale, zero })
    }

    pub(super) fn attr(&mut self) -> Parsed<Attr> {
        Ok(match self.advance()? {
            Token::Int(n) => Attr::Int(n),
            Token::Real(x) => Attr::Real(Real(x)),
            Token::Word(w) if self.token == Token::Punct("<") => Attr::Spec(self.spec(w)?),
            Token::Word(w) => plain_elem(w).map_or_else(|| Attr::Word(w.to_owned()), Attr::Elem),
            Token::Punct("[") => {
                let items = self.list("]", |p| match p.token {
                    Token::Real(x) => p.advance().map(|_| Err(x)),
                    Token::Int(n) if n < 0 => p.advance().map(|_| Err(n as f64)),
                    _ => p.dim().map(Ok),
                })?;
                let ints: Option<Vec<i64>> = items
                    .iter()
                    .map(|d| match d {
                        Ok(Dim::Fixed(n)) => Some(*n as i64),
                        _ => None,
                    })
                    .collect();
                let dims: Option<Vec<Dim>> = items.iter().map(|d| d.ok()).collect();
                match (ints, dims) {
                    (Some(v), _) => Attr::Ints(v),
                    (None, Some(dims)) => Attr::Shape(Shape(dims)),
                    (None, None) => {
                        let real = |d: &Result<Dim, f64>| match d {
                            Ok(Dim::Fixed(n)) => Some(Real(*n as f64)),
                            Err(x) => Some(Real(*x)),
                            Ok(Dim::Sym(_)) => None,
                        };
                        match items.iter().map(real).collect() {
                            Some(v) => Attr::Reals(v),
                            None => return self.fail("Q0001", "a list mixes fractions and symbols"),
                        }
                    }
                }
            }
            other => return self.fail("Q0001", format!("expected a value, found {other}")),
        })
    }
}

fn plain_elem(word: &str) -> Option<Elem> {
    const PLAIN: [Elem; 7] = [Elem::I8, Elem::U8, Elem::I32, Elem::F16, Elem::BF16, Elem::F32, Elem::F64];
    PLAIN.into_iter().find(|e| e.to_string() == word)
}
