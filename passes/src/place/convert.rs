//! Functions to e-graphs and back.

use std::collections::HashMap;

use egg::{EGraph, Id};
use qrmc_ir::{BinaryOp, Builder, Diag, Dim, Func, Module, Op, Shape, ValueId};

use super::extract::Chosen;
use super::lang::{Facts, Key, Known, Lin, number};
use crate::edges::{caches, linears, weight_behind};

/// A function as an e-graph.
pub(crate) struct Skeleton {
    pub(crate) egraph: EGraph<Lin, Facts>,
    /// Class of each value.
    pub(crate) classes: HashMap<ValueId, Id>,
    /// Classes of the results, without caches that attention reads: they are in the basis in which it reads them.
    pub(crate) roots: Vec<Id>,
}

/// Puts every value of a function into an e-graph with its type.
pub(crate) fn to_egraph(f: &Func) -> Skeleton {
    let mut g = EGraph::new(facts(f));
    let derived = f.weight_derived();
    let mut classes: HashMap<ValueId, Id> = HashMap::new();
    let add = |g: &mut EGraph<Lin, Facts>, v: ValueId, node: Lin| {
        let id = g.add(node);
        let known = Known { ty: Some(f.ty(v).clone()), weight: derived[v.0 as usize] };
        if g[id].data != known {
            g.set_analysis_data(id, known);
        }
        id
    };
    for &p in &f.params {
        let id = add(&mut g, p, Lin::Leaf(Key { index: p.0, result: 0 }));
        classes.insert(p, id);
    }
    for (at, node) in f.nodes.iter().enumerate() {
        let ins: Vec<Id> = node.ins.iter().map(|v| classes[v]).collect();
        let key = |result: usize| Key { index: at as u32, result: result as u32 };
        for (k, &out) in node.outs.iter().enumerate() {
            let lin = match (&node.op, &ins[..]) {
                (Op::Weight(_), _) => Lin::Leaf(Key { index: out.0, result: 0 }),
                (Op::Binary(BinaryOp::Add), &[a, b]) => Lin::Add([a, b]),
                (Op::Binary(BinaryOp::Sub), &[a, b]) => Lin::Sub([a, b]),
                (Op::Binary(BinaryOp::Mul), &[a, b]) => Lin::Mul([a, b]),
                (Op::Binary(BinaryOp::Div), &[a, b]) => Lin::Div([a, b]),
                (Op::MatMul { trans_b: true }, &[x, w]) if f.ty(node.ins[1]).shape.rank() == 2 => {
                    Lin::Linear([x, w])
                }
                // Attributes are leaves of their own, so that a rule can carry them over.
                (Op::RmsNorm(_), &[x, gain]) => Lin::Norm([attribute(&mut g, f, at), x, gain]),
                (Op::Attention(_), &[q, k, v]) => Lin::Attn([attribute(&mut g, f, at), q, k, v]),
                (Op::CacheAppend, &[p, n]) => Lin::Append([p, n]),
                (Op::Gather, &[table, ids]) => Lin::Gather([table, ids]),
                (&Op::Hadamard { block, inverse }, &[x, ..]) => {
                    let block = g.add(Lin::Num(block));
                    let signs = ins.get(1).copied().unwrap_or_else(|| g.add(Lin::Num(0)));
                    if inverse { Lin::HadT([block, x, signs]) } else { Lin::Had([block, x, signs]) }
                }
                (&Op::ModeMul { inner }, &[x, m]) => Lin::Mode([g.add(Lin::Num(inner)), x, m]),
                (Op::Inverse, &[m]) if derived[out.0 as usize] => Lin::Inv([m]),
                (Op::Transpose(perm), &[m]) if derived[out.0 as usize] && swaps_last(perm) => Lin::Tr([m]),
                _ => Lin::Other(key(k), ins.clone()),
            };
            let id = add(&mut g, out, lin);
            classes.insert(out, id);
        }
    }
    g.rebuild();
    let roots = f.results.iter().filter(|r| cache_of(f, **r).is_none()).map(|r| classes[r]).collect();
    Skeleton { egraph: g, classes, roots }
}

/// The parameter behind a result that is a cache which attention reads.
fn cache_of(f: &Func, result: ValueId) -> Option<ValueId> {
    let node = f.def_node(result).filter(|n| n.op == Op::CacheAppend)?;
    let read = caches(f).iter().any(|c| c.new == node.ins[1]);
    (read && f.params.contains(&node.ins[0])).then_some(node.ins[0])
}

/// What the laws need to know of the function as a whole.
fn facts(f: &Func) -> Facts {
    let head = f.nodes.iter().find_map(|n| match n.op {
        Op::Attention(a) => {
            f.ty(n.ins[0]).shape.last().and_then(Dim::fixed).map(|n| n as u64 / u64::from(a.heads))
        }
        _ => None,
    });
    Facts { head_dim: head.unwrap_or(0) }
}

/// Whether a permutation swaps the last two axes and keeps the others.
fn swaps_last(perm: &[u8]) -> bool {
    let n = perm.len();
    n >= 2 && (0..n - 2).all(|i| usize::from(perm[i]) == i) && usize::from(perm[n - 1]) == n - 2
}

/// The leaf that stands for the attributes of the node at `at`: nodes with equal attributes share it.
fn attribute(g: &mut EGraph<Lin, Facts>, f: &Func, at: usize) -> Id {
    let op = &f.nodes[at].op;
    let first = f.nodes.iter().position(|n| n.op == *op).unwrap_or(at);
    g.add(Lin::Leaf(Key { index: (f.value_count() + first) as u32, result: 0 }))
}

/// Rebuilds the function from the chosen nodes, in the order of the old one.
pub(crate) fn from_egraph(
    module: &Module,
    f: &Func,
    g: &EGraph<Lin, Facts>,
    classes: &HashMap<ValueId, Id>,
    chosen: &Chosen,
) -> Result<Func, Diag> {
    let mut b = Rebuild { f, g, chosen, b: Builder::new(module, &f.name), done: HashMap::new() };
    for &p in &f.params {
        let v = b.b.param(f.value(p).name.as_deref(), f.ty(p).clone());
        b.done.insert(g.find(classes[&p]), v);
    }
    for v in
        f.nodes.iter().flat_map(|n| &n.outs).filter(|v| !f.results.contains(v) || cache_of(f, **v).is_none())
    {
        let class = g.find(classes[v]);
        if chosen.contains_key(&class) {
            let new = b.class(class)?;
            if let Some(name) = &f.value(*v).name {
                b.b.name(new, name);
            }
        }
    }
    let mut results = Vec::new();
    for r in &f.results {
        results.push(match cache_of(f, *r) {
            None => b.class(g.find(classes[r]))?,
            Some(past) => {
                let v = b.cache(past)?;
                if let Some(name) = &f.value(*r).name {
                    b.b.name(v, name);
                }
                v
            }
        });
    }
    name_inputs(module, f, &mut b.b);
    Ok(b.b.finish(&results))
}

/// What feeds a linear layer keeps its name, whatever form it has now: passes ask for it by name.
fn name_inputs(module: &Module, f: &Func, b: &mut Builder<'_>) {
    for old in linears(f) {
        let Some(name) = f.value(old.x).name.clone().filter(|n| b.func().find(n).is_none()) else { continue };
        let weight = weight_behind(module, f, old.w);
        let new = linears(b.func()).into_iter().find(|l| weight_behind(module, b.func(), l.w) == weight);
        if let Some(new) = new.filter(|l| b.func().value(l.x).name.is_none()) {
            b.name(new.x, &name);
        }
    }
}

struct Rebuild<'a> {
    f: &'a Func,
    g: &'a EGraph<Lin, Facts>,
    chosen: &'a Chosen,
    b: Builder<'a>,
    done: HashMap<Id, ValueId>,
}

impl Rebuild<'_> {
    fn class(&mut self, id: Id) -> Result<ValueId, Diag> {
        let id = self.g.find(id);
        if let Some(&v) = self.done.get(&id) {
            return Ok(v);
        }
        let Some(node) = self.chosen.get(&id) else {
            return Err(Diag::new("Q0604", "extraction left out a value that is needed"));
        };
        let v = self.node(id, node)?;
        self.done.insert(id, v);
        Ok(v)
    }

    /// The cache behind a parameter that the rebuilt function reads.
    fn cache(&self, past: ValueId) -> Result<ValueId, Diag> {
        let at = self.f.params.iter().position(|p| *p == past);
        let param = at.map(|i| self.b.func().params[i]);
        let mut found =
            self.b.func().nodes.iter().filter(|n| n.op == Op::CacheAppend && Some(n.ins[0]) == param);
        match (found.next(), found.next()) {
            (Some(n), None) => Ok(n.outs[0]),
            _ => {
                Err(Diag::new("Q0604", format!("the cache %{} is not read in one basis", self.f.show(past))))
            }
        }
    }

    fn binary(&mut self, op: BinaryOp, [a, b]: [Id; 2]) -> Result<ValueId, Diag> {
        let (a, b) = (self.class(a)?, self.class(b)?);
        self.b.binary(op, a, b)
    }

    fn attributes(&self, id: Id) -> Result<Op, Diag> {
        for node in &self.g[id].nodes {
            if let Lin::Leaf(key) = node {
                return Ok(self.f.nodes[key.index as usize - self.f.value_count()].op.clone());
            }
        }
        Err(Diag::new("Q0604", "an operation lost its attributes"))
    }

    fn node(&mut self, id: Id, node: &Lin) -> Result<ValueId, Diag> {
        match node {
            Lin::Add(ab) => self.binary(BinaryOp::Add, *ab),
            Lin::Sub(ab) => self.binary(BinaryOp::Sub, *ab),
            Lin::Mul(ab) => self.binary(BinaryOp::Mul, *ab),
            Lin::Div(ab) => self.binary(BinaryOp::Div, *ab),
            Lin::Linear([x, w]) => {
                let (x, w) = (self.class(*x)?, self.class(*w)?);
                self.b.linear(x, w)
            }
            Lin::Norm([a, x, gain]) => {
                let (x, gain) = (self.class(*x)?, self.class(*gain)?);
                self.b.op1(self.attributes(*a)?, &[x, gain])
            }
            Lin::Attn([a, q, k, v]) => {
                let ins = [self.class(*q)?, self.class(*k)?, self.class(*v)?];
                self.b.op1(self.attributes(*a)?, &ins)
            }
            Lin::Append([p, n]) => {
                let ins = [self.class(*p)?, self.class(*n)?];
                self.b.op1(Op::CacheAppend, &ins)
            }
            Lin::Col([v]) => {
                let v = self.class(*v)?;
                let n = self.b.ty(v).shape.last().unwrap_or(Dim::Fixed(1));
                self.b.op1(Op::Reshape(Shape(vec![n, Dim::Fixed(1)])), &[v])
            }
            Lin::Gather([table, ids]) => {
                let ins = [self.class(*table)?, self.class(*ids)?];
                self.b.op1(Op::Gather, &ins)
            }
            Lin::Had(parts) => self.hadamard(parts, false, false),
            Lin::HadT(parts) => self.hadamard(parts, true, false),
            Lin::RowHad(parts) => self.hadamard(parts, false, true),
            Lin::RowHadT(parts) => self.hadamard(parts, true, true),
            Lin::Mode([inner, x, m]) => {
                let ins = [self.class(*x)?, self.class(*m)?];
                self.b.op1(Op::ModeMul { inner: self.number(*inner)? }, &ins)
            }
            Lin::RowMode([inner, w, m]) => {
                let (w, m) = (self.class(*w)?, self.class(*m)?);
                let w = self.b.op1(Op::Transpose(vec![1, 0]), &[w])?;
                let w = self.b.op1(Op::ModeMul { inner: self.number(*inner)? }, &[w, m])?;
                self.b.op1(Op::Transpose(vec![1, 0]), &[w])
            }
            Lin::Inv([m]) => {
                let m = self.class(*m)?;
                self.b.op1(Op::Inverse, &[m])
            }
            Lin::Tr([m]) => {
                let m = self.class(*m)?;
                self.b.swap_last(m)
            }
            Lin::Num(_) => Err(Diag::new("Q0604", "a number is no value")),
            Lin::Leaf(key) => match self.f.as_weight(ValueId(key.index)) {
                Some(w) => Ok(self.b.weight(w)),
                None => Err(Diag::new("Q0604", "a leaf is no weight")),
            },
            Lin::Other(key, ins) => {
                let old = &self.f.nodes[key.index as usize];
                let ins = ins.iter().map(|i| self.class(*i)).collect::<Result<Vec<_>, _>>()?;
                let outs = self.b.op(old.op.clone(), &ins)?;
                // The other results of the same operation are the same node.
                let results: Vec<(Lin, ValueId)> = outs
                    .iter()
                    .enumerate()
                    .map(|(k, &v)| {
                        (Lin::Other(Key { result: k as u32, ..key.clone() }, self.children(id)), v)
                    })
                    .collect();
                for (lin, v) in results {
                    if let Some(class) = self.g.lookup(lin) {
                        self.done.entry(self.g.find(class)).or_insert(v);
                    }
                }
                Ok(outs[key.result as usize])
            }
        }
    }

    fn number(&self, id: Id) -> Result<u64, Diag> {
        number(self.g, id).ok_or_else(|| Diag::new("Q0604", "a transform lost its size"))
    }

    /// A Hadamard transform along the last axis, or along the rows of a weight.
    fn hadamard(&mut self, [block, x, signs]: &[Id; 3], inverse: bool, rows: bool) -> Result<ValueId, Diag> {
        let mut ins = vec![self.class(*x)?];
        if number(self.g, *signs).is_none() {
            ins.push(self.class(*signs)?);
        }
        let op = Op::Hadamard { block: self.number(*block)?, inverse };
        if !rows {
            return self.b.op1(op, &ins);
        }
        ins[0] = self.b.op1(Op::Transpose(vec![1, 0]), &ins[..1])?;
        let w = self.b.op1(op, &ins)?;
        self.b.op1(Op::Transpose(vec![1, 0]), &[w])
    }

    fn children(&self, id: Id) -> Vec<Id> {
        use egg::Language;
        self.chosen.get(&id).map(|n| n.children().to_vec()).unwrap_or_default()
    }
}
