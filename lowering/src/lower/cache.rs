//! Caches that keep codes.

use qrmc_ir::{BinaryOp, Dim, Elem, Func, Node, Op, ValueId};

use crate::kernel::{CacheForm, CacheRead};
use crate::program::is_bias_add;

/// What a cache that keeps codes is made of.
pub(super) struct Cached {
    /// The node that gives the values of the codes: a `fake_quant`, or a `dcast`.
    pub(super) cast: usize,
    /// The nodes from there to the cache, whose work is done by those who read it.
    pub(super) inside: Vec<usize>,
    /// What is done to a row that is read. Operands are numbered from 0 in `operands`.
    pub(super) reads: Vec<CacheRead>,
    pub(super) operands: Vec<ValueId>,
}

impl Cached {
    /// Looks at what a `cache_append` appends; `None` if it is nothing that a cache can keep as codes.
    pub(super) fn of(func: &Func, node: &Node, constant: &impl Fn(ValueId) -> bool) -> Option<Self> {
        let (Op::CacheAppend, &[_, mut v]) = (&node.op, &node.ins[..]) else { return None };
        let mut out = Cached { cast: 0, inside: Vec::new(), reads: Vec::new(), operands: Vec::new() };
        loop {
            let at = func.nodes.iter().position(|n| n.outs.contains(&v))?;
            let node = &func.nodes[at];
            match (&node.op, &node.ins[..]) {
                (Op::FakeQuant(..), _) => {
                    out.cast = at;
                    break;
                }
                (Op::DCast, [codes, ..]) if !constant(v) => {
                    // The codes are computed by a cast that says what they were.
                    func.def_node(*codes).filter(|n| matches!(n.op, Op::QCast(_)))?;
                    out.cast = at;
                    out.inside.push(at);
                    break;
                }
                (Op::Rope(attr), &[x, pos]) => {
                    let read = CacheRead::Rope { attr: *attr, operand: out.operand(pos) };
                    out.reads.push(read);
                    v = x;
                }
                (Op::Binary(BinaryOp::Add), &[a, b]) => {
                    let vector = |b: ValueId| constant(b) && is_bias_add(&node.op, func.ty(b), func.ty(v));
                    let (x, read) = match () {
                        () if vector(b) => (a, CacheRead::Add { operand: out.operand(b) }),
                        () if vector(a) => (b, CacheRead::Add { operand: out.operand(a) }),
                        () => [(a, b), (b, a)]
                            .into_iter()
                            .find_map(|(x, b)| Some((x, out.turned(func, b, constant)?)))?,
                    };
                    out.reads.push(read);
                    v = x;
                }
                _ => return None,
            }
            out.inside.push(at);
        }
        out.reads.reverse();
        Some(out)
    }

    fn operand(&mut self, v: ValueId) -> usize {
        let at = self.operands.iter().position(|&o| o == v);
        at.unwrap_or_else(|| {
            self.operands.push(v);
            self.operands.len() - 1
        })
    }

    /// A constant vector that is turned by positions, and mixed.
    fn turned(&mut self, func: &Func, v: ValueId, constant: &impl Fn(ValueId) -> bool) -> Option<CacheRead> {
        let at = |v: ValueId| func.nodes.iter().position(|n| n.outs.contains(&v));
        let (mut block, mut inside, mut turn) = (None, Vec::new(), at(v)?);
        if let (Op::Hadamard { block: n, inverse: false }, &[x]) =
            (&func.nodes[turn].op, &func.nodes[turn].ins[..])
        {
            (block, turn) = (Some(*n), at(x)?);
            inside.push(at(v)?);
        }
        let (Op::Rope(attr), &[x, pos]) = (&func.nodes[turn].op, &func.nodes[turn].ins[..]) else {
            return None;
        };
        let leading = func.ty(x).shape.0.split_last().map(|(_, l)| l.iter().all(|d| *d == Dim::Fixed(1)));
        if !constant(x) || leading != Some(true) {
            return None;
        }
        inside.push(turn);
        self.inside.extend(inside);
        let (operand, positions) = (self.operand(x), self.operand(pos));
        Some(CacheRead::AddTurned { operand, attr: *attr, positions, block })
    }

    /// What the cache keeps, for operands that are numbered from `first` on; the codes are those of a `dcast`.
    pub(super) fn form(&self, func: &Func, first: usize) -> Option<CacheForm> {
        let Elem::Quant(spec) = func.ty(*func.nodes[self.cast].ins.first()?).elem else { return None };
        let mut reads = self.reads.clone();
        for r in &mut reads {
            match r {
                CacheRead::Add { operand } | CacheRead::Rope { operand, .. } => *operand += first,
                CacheRead::AddTurned { operand, positions, .. } => {
                    *operand += first;
                    *positions += first;
                }
            }
        }
        Some(CacheForm { spec, reads })
    }
}
