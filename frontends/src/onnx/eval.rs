//! Walks the nodes of a graph at fixed sizes: what depends on sizes, masks and positions alone is computed, what depends on
//! tokens becomes terms.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use qrmc_ir::RopeAttr;

use super::file::{Model, Node, Stored};
use super::fold;
use super::known::Known;
use super::matrix::Matrix;
use super::runs::squeezed;
use super::term::{Bin, Fit, T, Terms, Un};
use super::view::{Real, aligned};

/// What a tensor of the graph is.
#[derive(Clone, Debug)]
pub(super) enum Val {
    Known(Rc<Known>),
    /// A tensor of the file in these sizes, its two axes perhaps swapped.
    Stored {
        tensor: usize,
        dims: Vec<usize>,
        swapped: bool,
    },
    /// A matrix of codes: `[rows, cols]`, or `[cols, rows]` if swapped.
    Codes {
        m: Rc<Matrix>,
        swapped: bool,
    },
    /// The tokens.
    Ids,
    Real(Real),
    Scores(Rc<super::attention::Scores>),
    /// Where scores are no numbers.
    Lost(Rc<super::attention::Scores>),
}

/// The sizes at which a graph is walked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    pub(super) batch: usize,
    pub(super) new: usize,
    pub(super) past: usize,
}

impl Probe {
    pub(super) fn all(self) -> usize {
        self.new + self.past
    }
}

/// A graph while it is walked.
pub(super) struct Eval {
    pub(super) model: Arc<Model>,
    pub(super) terms: Terms,
    pub(super) probe: Probe,
    pub(super) values: HashMap<String, Val>,
    /// The rotary embeddings of stored tables of cosines and sines, by their tensors.
    pub(super) tables: HashMap<(usize, usize), RopeAttr>,
    /// How often each tensor is still read.
    pub(super) uses: HashMap<String, usize>,
    /// Elements of known tensors that are held, and that were read or written.
    pub(super) live: usize,
    pub(super) work: usize,
}

/// Most elements of known tensors that are held at a time.
pub(super) const LIVE: usize = 1 << 21;
/// Elements of known tensors that a walk may read and write, and those for each node besides.
const WORK: (usize, usize) = (1 << 24, 1 << 13);

/// How often each tensor is read, outputs of the graph included.
pub(super) fn uses(model: &Model) -> HashMap<String, usize> {
    let mut out = HashMap::new();
    for name in model.nodes.iter().flat_map(|n| &n.inputs).chain(&model.outputs) {
        *out.entry(name.clone()).or_insert(0) += 1;
    }
    out
}

pub(super) type Made = Result<Vec<Val>, String>;

pub(super) fn one(r: Real) -> Made {
    Ok(vec![Val::Real(r)])
}

impl Eval {
    /// Walks all nodes.
    ///
    /// # Errors
    /// The node that is not understood and why, in a sentence.
    pub(super) fn walk(&mut self) -> Result<(), String> {
        let model = self.model.clone();
        for (i, node) in model.nodes.iter().enumerate() {
            self.terms.node = i;
            let fail = |why: String| format!("node `{}` ({}): {why}", node.name, node.op);
            let mut ins = Vec::new();
            for name in &node.inputs {
                ins.push(match (name.is_empty(), self.values.get(name)) {
                    (true, _) => None,
                    (_, Some(v)) => Some(v.clone()),
                    (_, None) => {
                        return Err(fail(format!("its input `{name}` is made by no node before it")));
                    }
                });
            }
            let outs = self.node(node, &ins).map_err(fail)?;
            self.keep(node, &ins, outs).map_err(fail)?;
        }
        Ok(())
    }

    /// Holds the outputs of a node, and lets go of what is not read any more.
    fn keep(&mut self, node: &Node, ins: &[Option<Val>], outs: Vec<Val>) -> Result<(), String> {
        let count = |v: &Val| if let Val::Known(k) = v { k.count() } else { 0 };
        self.work += ins.iter().flatten().chain(&outs).map(count).sum::<usize>();
        for (name, v) in node.outputs.iter().zip(outs).filter(|(name, _)| !name.is_empty()) {
            if self.uses.get(name).is_some_and(|n| *n > 0) {
                self.live += count(&v);
                self.values.insert(name.clone(), v);
            }
        }
        for name in &node.inputs {
            let left = self.uses.get_mut(name).map(|n| {
                *n -= 1;
                *n
            });
            if left == Some(0)
                && let Some(v) = self.values.remove(name)
            {
                self.live -= count(&v).min(self.live);
            }
        }
        let (first, each) = WORK;
        if self.live > LIVE || self.work > first + each * self.model.nodes.len() {
            return Err("what is computed of sizes and positions alone is too much for a decoder".into());
        }
        Ok(())
    }

    pub(super) fn stored(&self, tensor: usize) -> &Stored {
        &self.model.tensors[tensor]
    }

    /// The elements, if they are known or few.
    pub(super) fn known(&self, v: &Val) -> Option<Rc<Known>> {
        match v {
            Val::Known(k) => Some(k.clone()),
            Val::Stored { tensor, dims, swapped } => {
                let k = Known::stored(self.stored(*tensor), *tensor)?;
                let k = if *swapped { k.transposed(&[1, 0]).ok()? } else { k.reshaped(dims.clone()) };
                Some(Rc::new(k))
            }
            _ => None,
        }
    }

    pub(super) fn dims(&self, v: &Val) -> Vec<usize> {
        match v {
            Val::Known(k) => k.dims.clone(),
            Val::Stored { dims, .. } => dims.clone(),
            Val::Codes { m, swapped: false } => vec![m.rows as usize, m.cols as usize],
            Val::Codes { m, .. } => vec![m.cols as usize, m.rows as usize],
            Val::Ids => vec![self.probe.batch, self.probe.new],
            Val::Real(r) => r.dims(),
            Val::Scores(s) | Val::Lost(s) => s.dims(),
        }
    }

    fn node(&mut self, node: &Node, ins: &[Option<Val>]) -> Made {
        if node.attrs.iter().any(|(_, a)| matches!(a, super::file::Attr::Graph)) {
            return Err("control flow is not read: export the model without it".into());
        }
        if let Some(made) = self.weights(node, ins) {
            return made;
        }
        if node.op == "Shape" && node.domain.is_empty() {
            let dims = self.dims(ins.first().and_then(Option::as_ref).ok_or("nothing to measure")?);
            return Ok(vec![Val::Known(Rc::new(fold::shape(node, &dims)))]);
        }
        let all: Option<Vec<Option<Rc<Known>>>> =
            ins.iter().map(|v| v.as_ref().map_or(Some(None), |v| self.known(v).map(Some))).collect();
        if let Some(all) = all {
            let lent: Vec<Option<&Known>> = all.iter().map(|k| k.as_deref()).collect();
            if let Some(made) = fold::evaluate(node, &lent) {
                return Ok(made?.into_iter().map(|k| Val::Known(Rc::new(k))).collect());
            }
        }
        if let Some(made) = self.attention_node(node, ins) {
            return made;
        }
        if let Some(made) = self.real(node, ins) {
            return made;
        }
        let of: Vec<String> = ins.iter().map(|v| self.describe(v)).collect();
        Err(format!("this operator on {} is part of no decoder that qrmc knows", of.join(", ")))
    }

    pub(super) fn elementwise(&mut self, op: Bin, a: &Real, b: &Real) -> Result<Real, String> {
        let (na, nb) = (self.terms.n(a.t), self.terms.n(b.t));
        let (axes, fit) = aligned(&a.axes, na, &b.axes, nb)?;
        Ok(Real { t: self.terms.bin(op, a.t, b.t, fit), axes })
    }

    /// `x * sigmoid(x)`
    pub(super) fn silu(&mut self, x: &Real) -> Made {
        let s = self.terms.un(Un::Sigmoid, x.t);
        one(Real { t: self.terms.bin(Bin::Mul, x.t, s, Fit::Same), axes: x.axes.clone() })
    }

    /// Operators on activations.
    fn real(&mut self, node: &Node, ins: &[Option<Val>]) -> Option<Made> {
        if !node.domain.is_empty() {
            return self.contrib(node, ins);
        }
        let op = node.op.as_str();
        let binary = match op {
            "Add" => Some(Bin::Add),
            "Sub" => Some(Bin::Sub),
            "Mul" => Some(Bin::Mul),
            "Div" => Some(Bin::Div),
            "Max" => Some(Bin::Max),
            "Min" => Some(Bin::Min),
            "Equal" => Some(Bin::Equal),
            "Greater" => Some(Bin::Greater),
            "And" => Some(Bin::And),
            _ => None,
        };
        if let Some(op) = binary {
            let mut all = ins.iter().cloned().collect::<Option<Vec<Val>>>()?.into_iter();
            let mut y = all.next()?;
            for v in all {
                let made = match self.pair(&y, &v)? {
                    Ok((a, b)) => self.elementwise(op, &a, &b),
                    Err(e) => Err(e),
                };
                match made {
                    Ok(r) => y = Val::Real(r),
                    Err(e) => return Some(Err(e)),
                }
            }
            return Some(Ok(vec![y]));
        }
        if op == "Where" {
            return self.select(ins);
        }
        if matches!(op, "MatMul" | "Gemm" | "MatMulInteger") {
            return self.product(node, ins);
        }
        if op == "Concat" {
            return self.concat(node, ins);
        }
        let Val::Real(x) = ins.first()?.as_ref()?.clone() else { return None };
        let get = |i: usize| ins.get(i).and_then(Option::as_ref);
        let ints = |e: &Self, i: usize| {
            get(i).and_then(|v| e.known(v)).and_then(|k| k.as_ints().map(<[i64]>::to_vec))
        };
        let same = |e: &mut Self, op: Un| one(Real { t: e.terms.un(op, x.t), axes: x.axes.clone() });
        let dims = x.dims();
        Some(match op {
            "Identity" | "Cast" => one(x),
            "Neg" => same(self, Un::Neg),
            "Sqrt" => same(self, Un::Sqrt),
            "Reciprocal" => same(self, Un::Recip),
            "Sigmoid" => same(self, Un::Sigmoid),
            "Round" => same(self, Un::Round),
            "Swish" if node.float("alpha").is_none_or(|a| a == 1.0) => self.silu(&x),
            "Pow" => match get(1).and_then(|v| self.known(v)).and_then(|k| power(&k)) {
                Some(2.0) => one(Real { t: self.terms.bin(Bin::Mul, x.t, x.t, Fit::Same), axes: x.axes }),
                Some(-0.5) => {
                    let root = self.terms.un(Un::Sqrt, x.t);
                    one(Real { t: self.terms.un(Un::Recip, root), axes: x.axes })
                }
                p => Err(format!("a power of {p:?}")),
            },
            "Clip" => {
                let end = |e: &Self, i, name: &str| {
                    get(i).and_then(|v| e.known(v)).and_then(|k| k.scalar()).or_else(|| node.float(name))
                };
                match (end(self, 1, "min"), end(self, 2, "max")) {
                    (Some(low), Some(high)) => {
                        one(Real { t: self.terms.limit(x.t, low, high), axes: x.axes })
                    }
                    _ => Err("ends that are not known".into()),
                }
            }
            "Reshape" => {
                match ints(self, 1).map(|to| fold::reshape(&dims, &to, node.int("allowzero") == Some(1))) {
                    Some(to) => to.and_then(|to| x.reshaped(&to)).and_then(one),
                    None => Err("sizes that are not known".into()),
                }
            }
            "Flatten" => {
                let a = node.int("axis").unwrap_or(1).clamp(0, dims.len() as i64) as usize;
                x.reshaped(&[dims[..a].iter().product(), dims[a..].iter().product()]).and_then(one)
            }
            "Transpose" => x.transposed(&fold::permutation(node, dims.len())).and_then(one),
            "Unsqueeze" => match ints(self, 1).or_else(|| node.ints("axes").map(<[i64]>::to_vec)) {
                Some(axes) => fold::unsqueezed(dims.len(), &axes).and_then(|at| one(x.unsqueezed(&at))),
                None => Err("axes that are not known".into()),
            },
            "Squeeze" => {
                let axes = ints(self, 1).or_else(|| node.ints("axes").map(<[i64]>::to_vec));
                squeezed(&x, axes).and_then(one)
            }
            "Expand" => match ints(self, 1) {
                Some(to) => {
                    x.expanded(&to.iter().map(|&d| d.max(0) as usize).collect::<Vec<_>>()).and_then(one)
                }
                None => Err("sizes that are not known".into()),
            },
            "ReduceMean" | "ReduceMax" | "ReduceMin" => {
                let axes = ints(self, 1).or_else(|| node.ints("axes").map(<[i64]>::to_vec));
                self.reduce(op, node, &x, axes)
            }
            "Slice" => {
                let lent: Vec<Option<Rc<Known>>> =
                    (0..5).map(|i| get(i).and_then(|v| self.known(v))).collect();
                let lent: Vec<Option<&Known>> = lent.iter().map(|k| k.as_deref()).collect();
                fold::slices(node, &lent, &dims).and_then(|all| self.sliced(&x, all))
            }
            "Split" => self.split(node, &x, ints(self, 1)),
            "RMSNormalization" | "SimplifiedLayerNormalization" => self.norm(node, &x, get(1)),
            _ => return None,
        })
    }

    fn select(&mut self, ins: &[Option<Val>]) -> Option<Made> {
        let [Some(Val::Real(c)), Some(a), Some(b)] = ins else { return None };
        let c = c.clone();
        let mut side = |v: &Val| match v {
            Val::Real(r) => Ok(r.clone()),
            other => self.beside(other, &c.axes),
        };
        let (a, b) = match (side(a), side(b)) {
            (Ok(a), Ok(b)) => (a, b),
            (Err(e), _) | (_, Err(e)) => return Some(Err(e)),
        };
        let alike = |e: &Self, r: &Real| r.axes == c.axes || e.terms.number(r.t).is_some();
        if !alike(self, &a) || !alike(self, &b) {
            return Some(Err("a choice between values of other sizes".into()));
        }
        Some(one(Real { t: self.terms.select(c.t, a.t, b.t), axes: c.axes }))
    }
}

/// The one number of an exponent, of whatever type.
fn power(k: &Known) -> Option<f32> {
    k.scalar().or_else(|| k.as_ints().filter(|v| v.len() == 1).map(|v| v[0] as f32))
}

/// A term that is read where it is a row of channels for each token.
pub(super) fn rows(terms: &Terms, r: &Real) -> Result<T, String> {
    if r.is_rows(terms.n(r.t)) {
        return Ok(r.t);
    }
    Err(format!("activations {:?} that are no rows of {} channels", r.dims(), terms.n(r.t)))
}
