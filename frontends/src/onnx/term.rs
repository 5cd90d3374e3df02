//! What a graph computes of tokens, as terms without layouts: each is a function of sequence, position and channel. Equal
//! terms are one, and terms that are the definition of a large operation become it when they are made.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use qrmc_ir::{AttnAttr, Grain, QuantSpec, RopeAttr};

use super::file::Model;
use super::matrix::Matrix;

/// The number of a term.
pub(super) type T = u32;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Un {
    Neg,
    Sqrt,
    Recip,
    Sigmoid,
    Round,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Bin {
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
    Equal,
    Greater,
    And,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Red {
    Mean,
    Max,
    Min,
}

/// Positions of a term.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Pos {
    /// None: it is the same for all tokens.
    Any,
    /// The new ones.
    New,
    /// Those of a cache.
    Past,
    /// Both.
    All,
}

/// How the channels of a narrower operand belong to those of the wider one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Fit {
    /// One each, or one for all.
    Same,
    /// All of them for each run.
    Tile,
    /// One for each run.
    Spread,
}

/// A vector of numbers.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Vector {
    /// The bits of its elements, if they are not those of the tensor.
    pub(super) literal: Option<Arc<[u32]>>,
    /// The tensor of the file that it is a part of, or is made of.
    pub(super) tensor: Option<usize>,
    /// Its first element in the tensor.
    pub(super) first: u64,
    pub(super) n: u64,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Term {
    /// Rows of a table.
    Embed(Rc<Matrix>),
    /// The hidden states that are an input.
    Given,
    /// A cache, by its place among the inputs.
    Past(u32),
    /// One number, and the tensor that it comes from.
    Scalar(u32, Option<usize>),
    Vector(Vector),
    /// Numbers for each new position of the probe, `n` each.
    Table(Arc<[u32]>),
    Un(Un, T),
    Bin(Bin, T, T, Fit),
    Select(T, T, T),
    Limit(T, u32, u32),
    /// A run of neighbours becomes one channel.
    Reduce(Red, T, u64),
    /// Of each period of channels, those from `start` on.
    Part {
        x: T,
        period: u64,
        start: u64,
        len: u64,
    },
    /// Runs of both one after the other.
    Join(T, T, u64, u64),
    /// Sums of products of whole numbers with codes of a matrix, the zero points taken off the matrix.
    Dot(T, Rc<Matrix>),

    Linear(T, Rc<Matrix>),
    /// `eps` as bits; a run of `run` channels is normed.
    Norm {
        x: T,
        gain: Vector,
        eps: u32,
        run: u64,
    },
    Silu(T),
    Rope(T, RopeAttr),
    Append(T, T),
    Attention(T, T, T, AttnAttr),
    Quant {
        x: T,
        spec: QuantSpec,
        factors: Option<(T, T)>,
    },
    /// Codes with one stored scale, or with those of channels.
    Static {
        x: T,
        spec: QuantSpec,
        scale: Vector,
        zero: Option<Vector>,
    },
    Mode {
        x: T,
        m: Rc<Matrix>,
        inner: u64,
        count: u64,
    },
    Hadamard {
        x: T,
        block: u64,
        inverse: bool,
    },
}

/// A term with what is known of it.
#[derive(Clone, Debug)]
pub(super) struct Info {
    pub(super) term: Term,
    /// Channels.
    pub(super) n: u64,
    pub(super) pos: Pos,
    /// The node that made it.
    pub(super) node: usize,
}

/// All terms of a graph.
pub(super) struct Terms {
    pub(super) all: Vec<Info>,
    index: HashMap<Term, T>,
    /// The node that is looked at.
    pub(super) node: usize,
    /// Rotary embeddings that tables are compared with, and the first of the new positions.
    pub(super) ropes: Vec<RopeAttr>,
    pub(super) first: usize,
    pub(super) model: Arc<Model>,
}

fn bits(x: f32) -> u32 {
    x.to_bits()
}

impl Terms {
    pub(super) fn new(model: Arc<Model>, ropes: Vec<RopeAttr>, first: usize) -> Self {
        Terms { all: Vec::new(), index: HashMap::new(), node: 0, ropes, first, model }
    }

    pub(super) fn get(&self, t: T) -> &Term {
        &self.all[t as usize].term
    }

    pub(super) fn n(&self, t: T) -> u64 {
        self.all[t as usize].n
    }

    pub(super) fn pos(&self, t: T) -> Pos {
        self.all[t as usize].pos
    }

    /// The term itself, whatever it is the definition of.
    pub(super) fn put(&mut self, term: Term, n: u64, pos: Pos) -> T {
        if let Some(&t) = self.index.get(&term) {
            return t;
        }
        let t = self.all.len() as T;
        self.index.insert(term.clone(), t);
        self.all.push(Info { term, n, pos, node: self.node });
        t
    }

    pub(super) fn scalar(&mut self, x: f32) -> T {
        self.put(Term::Scalar(bits(x), None), 1, Pos::Any)
    }

    /// The number that a term is.
    pub(super) fn number(&self, t: T) -> Option<f32> {
        match self.get(t) {
            Term::Scalar(b, _) => Some(f32::from_bits(*b)),
            _ => None,
        }
    }

    fn is(&self, t: T, x: f32) -> bool {
        self.number(t) == Some(x)
    }

    pub(super) fn un(&mut self, op: Un, x: T) -> T {
        let (n, pos) = (self.n(x), self.pos(x));
        self.put(Term::Un(op, x), n, pos)
    }

    pub(super) fn select(&mut self, cond: T, a: T, b: T) -> T {
        if a == b {
            return a;
        }
        let (n, pos) = (self.n(cond), self.pos(cond));
        self.put(Term::Select(cond, a, b), n, pos)
    }

    pub(super) fn limit(&mut self, x: T, low: f32, high: f32) -> T {
        let (n, pos) = (self.n(x), self.pos(x));
        self.put(Term::Limit(x, bits(low), bits(high)), n, pos)
    }

    pub(super) fn reduce(&mut self, op: Red, x: T, run: u64) -> T {
        let (n, pos) = (self.n(x) / run.max(1), self.pos(x));
        self.put(Term::Reduce(op, x, run), n, pos)
    }

    pub(super) fn linear(&mut self, x: T, w: Rc<Matrix>) -> T {
        let (n, pos) = (w.rows, self.pos(x));
        self.put(Term::Linear(x, w), n, pos)
    }

    pub(super) fn rope(&mut self, x: T, attr: RopeAttr) -> T {
        let x = self.settled(x);
        let (n, pos) = (self.n(x), self.pos(x));
        self.put(Term::Rope(x, attr), n, pos)
    }

    pub(super) fn append(&mut self, past: T, new: T) -> T {
        let new = self.settled(new);
        let n = self.n(past);
        self.put(Term::Append(past, new), n, Pos::All)
    }

    pub(super) fn mode(&mut self, x: T, m: Rc<Matrix>, inner: u64, count: u64) -> T {
        let (n, pos) = (self.n(x), self.pos(x));
        self.put(Term::Mode { x, m, inner, count }, n, pos)
    }

    /// `a` and `b` with `op` between them; `fit` says how the narrower one is repeated.
    pub(super) fn bin(&mut self, op: Bin, a: T, b: T, fit: Fit) -> T {
        let turned = [a, b].iter().any(|&t| matches!(self.get(t), Term::Table(_)));
        let [a, b] = if turned { [a, b] } else { [a, b].map(|t| self.settled(t)) };
        let n = self.n(a).max(self.n(b));
        let fit = if self.n(a) == self.n(b) || self.n(a).min(self.n(b)) == 1 { Fit::Same } else { fit };
        let pos = if self.pos(a) == Pos::Any { self.pos(b) } else { self.pos(a) };
        let raised = match op {
            Bin::Mul => self.product(a, b).or_else(|| self.product(b, a)),
            Bin::Add => {
                let found = self.turned(a, b).or_else(|| self.turned(b, a));
                found.or_else(|| self.placed(a, b)).or_else(|| self.placed(b, a))
            }
            // A division by a root is a product with its inverse.
            Bin::Div if self.is(a, 1.0) => Some(self.un(Un::Recip, b)),
            Bin::Div if matches!(self.get(b), Term::Un(Un::Sqrt, _)) => {
                let r = self.un(Un::Recip, b);
                Some(self.bin(Bin::Mul, a, r, fit))
            }
            _ => None,
        };
        raised.unwrap_or_else(|| self.put(Term::Bin(op, a, b, fit), n, pos))
    }

    /// Channels `start .. start + len` of each period.
    pub(super) fn part(&mut self, x: T, period: u64, start: u64, len: u64) -> T {
        if start == 0 && len == period {
            return x;
        }
        if let Term::Vector(v) = self.get(x).clone()
            && v.literal.is_none()
            && period == v.n
        {
            return self.put(Term::Vector(Vector { first: v.first + start, n: len, ..v }), len, Pos::Any);
        }
        let (n, pos) = (self.n(x) / period.max(1) * len, self.pos(x));
        self.put(Term::Part { x, period, start, len }, n, pos)
    }

    fn is_biased(&self, a: T, b: T) -> bool {
        let whole = self.n(a) == self.n(b);
        whole && matches!((self.get(a), self.get(b)), (Term::Linear(..), Term::Vector(_)))
    }

    /// A part of all channels of a linear layer is a linear layer with these rows. A part of the only head waits for what
    /// becomes of it.
    pub(super) fn settled(&mut self, t: T) -> T {
        let Term::Part { x, period, start, len } = *self.get(t) else { return t };
        if period != self.n(x) {
            return t;
        }
        match self.get(x).clone() {
            Term::Linear(input, w) => {
                let rows = Matrix { first: w.first + start, rows: len, ..(*w).clone() };
                self.linear(input, Rc::new(rows))
            }
            // A bias.
            Term::Bin(op, a, b, Fit::Same) if self.is_biased(a, b) || self.is_biased(b, a) => {
                let [a, b] = [a, b].map(|t| self.part(t, period, start, len));
                self.bin(op, a, b, Fit::Same)
            }
            _ => t,
        }
    }

    pub(super) fn attention(&mut self, q: T, k: T, v: T, attr: AttnAttr) -> T {
        let [q, k, v] = [q, k, v].map(|t| self.settled(t));
        let n = self.n(q);
        self.put(Term::Attention(q, k, v, attr), n, Pos::New)
    }

    /// The scales of a value whose runs share one.
    pub(super) fn grain(&self, x: T, scale: T) -> Grain {
        match self.n(scale) {
            1 => Grain::Token,
            runs => Grain::Group((self.n(x) / runs.max(1)) as u32),
        }
    }
}
