//! A quantized graph as what other runtimes know: a checkpoint with linear layers, some of which have codes.

use std::collections::{HashMap, HashSet};

use qrmc_ir::{Elem, Func, ModelFacts, Module, Node, Op, QuantSpec, Real, RopeAttr, ValueId};

use super::ExportError;
use super::linear::{Bound, Codes, Linear, Rounding};
use crate::artefact::TensorPlan;

/// Name of the head's matrix in an ordinary checkpoint.
pub const HEAD: &str = "lm_head";

/// Whether an operation is part of rounding a value.
pub fn rounds(op: &Op) -> bool {
    matches!(op, Op::FakeQuant(..) | Op::QCast(_) | Op::DCast)
}

/// What a tensor of the graph is in a checkpoint.
#[derive(Clone, Debug)]
pub enum Entry {
    /// A matrix with codes, and the scales and zero points that stand beside it.
    Linear(Linear),
    /// A tensor as it is.
    Plain {
        /// Name in the graph.
        stored: String,
        /// Name in a checkpoint, and type.
        plan: TensorPlan,
    },
}

/// A cache whose scales were calibrated.
#[derive(Clone, PartialEq, Debug)]
pub struct Kept {
    /// Name of the module that makes what is kept, such as `model.layers.0.self_attn.k_proj`.
    pub module: String,
    /// The scheme.
    pub spec: QuantSpec,
    /// Stored name of the scales.
    pub scale: String,
}

/// A graph that is the source's but for what is rounded, seen as a checkpoint.
#[derive(Clone, Debug)]
pub struct View {
    /// Sizes and special tokens.
    pub facts: ModelFacts,
    /// In the order of first use.
    pub entries: Vec<Entry>,
    /// Whether the head has a matrix of its own where the source's shares the embedding.
    pub untied: bool,
    /// How what enters the caches is rounded, each different one once.
    pub caches: Vec<QuantSpec>,
    /// The caches whose scales were calibrated.
    pub kept: Vec<Kept>,
    /// Rotary embedding.
    pub rope: RopeAttr,
    /// Epsilon of the norms.
    pub eps: Real,
    /// Linear layers without codes, by module name: `model.layers.0.self_attn.q_proj`.
    pub float: Vec<String>,
}

impl View {
    /// Sees the materialised module `packed` as a checkpoint with the names and shapes of `source`.
    ///
    /// With rounding left out and each quantized weight in the place of the float one, the graph must be the source's:
    /// then what loads the source loads the export, and computes the same function.
    ///
    /// # Errors
    /// If the graph became another one, a tensor has no place in a checkpoint, or a value is rounded that is neither the
    /// operand of a product nor what enters a cache.
    pub fn of(packed: &Module, source: &Module) -> Result<Self, ExportError> {
        View::through(packed, source, &rounds)
    }

    /// As [`View::of`], where the operations are left out for which `through` says yes. The first operand of each takes
    /// its place.
    ///
    /// # Errors
    /// As [`View::of`].
    pub fn through(
        packed: &Module,
        source: &Module,
        through: &dyn Fn(&Op) -> bool,
    ) -> Result<Self, ExportError> {
        for (have, want) in packed.funcs.iter().zip(&source.funcs) {
            if skeleton(have, through) != skeleton(want, &|_| false) {
                let m = format!(
                    "@{} is not the source's graph any more: an ordinary checkpoint cannot hold it",
                    have.name
                );
                return Err(ExportError::illegal(m)
                    .hint("what stays online (`qrmc inspect --ir`) has no place in this format"));
            }
        }
        let parted = parted_head(packed, source);
        let mut inputs = Inputs::default();
        packed.funcs.iter().try_for_each(|f| inputs.read(packed, f, through))?;
        let find = |op: fn(&Op) -> bool| {
            source.funcs.iter().flat_map(|f| &f.nodes).find(|n| op(&n.op)).map(|n| &n.op)
        };
        let (Some(&Op::Rope(rope)), Some(&Op::RmsNorm(eps))) =
            (find(|op| matches!(op, Op::Rope(_))), find(|op| matches!(op, Op::RmsNorm(_))))
        else {
            return Err(ExportError::illegal("the model has no rotary embedding or no norm"));
        };
        let mut v = View {
            facts: packed.facts.clone(),
            rope,
            eps,
            entries: Vec::new(),
            untied: parted.is_some(),
            caches: inputs.caches,
            kept: inputs.kept,
            float: Vec::new(),
        };
        for w in packed.weights() {
            if inputs.operands.contains(&w.name)
                || [".scale", ".zero"].iter().any(|s| w.name.ends_with(s) && is_part(packed, &w.name, s))
            {
                continue;
            }
            let name = w.name.strip_suffix(".codes").unwrap_or(&w.name);
            let name = match parted {
                Some(head) if head == w.name => format!("{HEAD}.weight"),
                _ => name.to_owned(),
            };
            if parted != Some(&w.name) && source.find_weight(&name).is_none() {
                return Err(ExportError::illegal(format!("tensor `{name}` has no place in a checkpoint")));
            }
            let module = name.strip_suffix(".weight").unwrap_or(&name).to_owned();
            let Elem::Quant(spec) = w.ty.elem else {
                if let Some(x) = inputs.products.get(&w.name).and_then(|r| r.spec) {
                    return Err(ExportError::illegal(format!(
                        "{module}: its input is rounded to {x}, and its weight has no codes"
                    ))
                    .hint("round both, or leave the layer out of both with skip"));
                }
                let plan = TensorPlan { name, ty: w.ty.clone() };
                v.entries.push(Entry::Plain { stored: w.name.clone(), plan });
                continue;
            };
            let shape = w.ty.shape.as_fixed().unwrap_or_default();
            let [rows, cols] = shape[..] else {
                return Err(ExportError::illegal(format!("tensor `{name}` of codes is no matrix")));
            };
            let base = w.name.strip_suffix(".codes").unwrap_or(&w.name);
            let codes = Codes {
                spec,
                codes: w.name.clone(),
                scale: format!("{base}.scale"),
                zero: spec.zero.then(|| format!("{base}.zero")),
            };
            let input = inputs.products.get(&w.name).cloned().unwrap_or_default();
            let target = None;
            v.entries.push(Entry::Linear(Linear { name: module, rows, cols, codes, target, input }));
        }
        let coded: HashSet<&str> = v.linears().map(|l| l.name.as_str()).collect();
        let float = products(source).filter(|name| !coded.contains(name.as_str())).collect();
        v.float = float;
        Ok(v)
    }

    /// The first matrix with codes.
    ///
    /// # Errors
    /// If there is none, and what to do.
    pub(super) fn first(&self) -> Result<&Linear, ExportError> {
        self.linears().next().ok_or_else(|| {
            ExportError::illegal("no matrix of this model has codes").hint(
                "compile with a pass that rounds weights, such as rtn; floats alone are for --format fake, gguf or onnx",
            )
        })
    }

    /// The matrices with codes.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.entries.iter().filter_map(|e| match e {
            Entry::Linear(l) => Some(l),
            Entry::Plain { .. } => None,
        })
    }
}

fn is_part(module: &Module, name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix).is_some_and(|base| module.find_weight(&format!("{base}.codes")).is_some())
}

/// Module names of the linear layers of a float model, the head among them.
pub(super) fn products(source: &Module) -> impl Iterator<Item = String> {
    source.funcs.iter().flat_map(|f| {
        let weights = f.nodes.iter().filter(|n| matches!(n.op, Op::MatMul { .. }));
        weights.filter_map(|n| f.weight_behind(n.ins[1])).map(|w| match f.name.as_str() {
            "head" => HEAD.to_owned(),
            _ => source.weight(w).name.trim_end_matches(".weight").to_owned(),
        })
    })
}

/// What is done to the operands of products and to what enters caches.
#[derive(Default)]
struct Inputs {
    /// By the stored name of a product's weight.
    products: HashMap<String, Rounding>,
    caches: Vec<QuantSpec>,
    kept: Vec<Kept>,
    /// Weights that only rounding and what was left out read.
    operands: HashSet<String>,
}

impl Inputs {
    fn read(&mut self, module: &Module, f: &Func, through: &dyn Fn(&Op) -> bool) -> Result<(), ExportError> {
        let weight = |v: ValueId| f.weight_behind(v).map(|w| module.weight(w).name.clone());
        let derived = f.weight_derived();
        let mut seen = HashSet::new();
        for n in &f.nodes {
            if through(&n.op) && !derived[n.outs[0].0 as usize] {
                self.operands.extend(n.ins[1..].iter().filter_map(|&v| weight(v)));
            }
            match n.op {
                Op::MatMul { .. } => {
                    if let Some(w) = weight(n.ins[1]) {
                        self.products.insert(w, rounding(module, f, n.ins[0], through, &mut seen));
                    }
                }
                Op::CacheAppend => {
                    let r = rounding(module, f, n.ins[1], through, &mut seen);
                    self.caches.extend(r.spec.filter(|s| !self.caches.contains(s)));
                    let layer = module.layers().iter().position(|l| module.func(*l).name == f.name);
                    // A layer takes the stream, positions, cached keys and cached values.
                    let what = [(2, "k_proj"), (3, "v_proj")]
                        .into_iter()
                        .find(|(p, _)| f.params.get(*p) == Some(&n.ins[0]));
                    if let (Some(spec), Some(scale), Some(i), Some((_, what))) =
                        (r.spec, r.scale, layer, what)
                    {
                        let name = format!("model.layers.{i}.self_attn.{what}");
                        self.kept.push(Kept { module: name, spec, scale });
                    }
                }
                _ => {}
            }
        }
        let unseen = f.nodes.iter().find_map(|n| match n.op {
            Op::FakeQuant(spec, _) | Op::QCast(spec) if through(&n.op) => {
                let v = n.outs[0];
                (!derived[v.0 as usize] && !seen.contains(&v)).then_some((n.ins[0], spec))
            }
            _ => None,
        });
        let Some((x, spec)) = unseen else { return Ok(()) };
        Err(ExportError::illegal(format!(
            "@{}: {} is rounded to {spec} where no checkpoint has a place for it: not as the input of a linear layer, \
             and not as what enters a cache",
            f.name,
            f.show(x)
        ))
        .hint("compile without it (keys before their positions, say), or run the artefact with qrmc"))
    }
}

/// What is done to a value before it is used: rounding, and before that products with small matrices. The rounding that
/// it tells of goes to `seen`.
fn rounding(
    module: &Module,
    f: &Func,
    mut v: ValueId,
    through: &dyn Fn(&Op) -> bool,
    seen: &mut HashSet<ValueId>,
) -> Rounding {
    let mut out = Rounding::default();
    while let Some(n) = f.def_node(v).filter(|n| through(&n.op)) {
        let weight = |v: &ValueId| f.weight_behind(*v).map(|w| module.weight(w).name.clone());
        let bound = |v: &ValueId| match (weight(v), f.def_node(*v).map(|n| &n.op)) {
            (Some(name), _) => Bound::Stored(name),
            (None, Some(Op::Const { data, .. })) => Bound::Given(data.iter().map(|x| x.0).collect()),
            (None, _) => Bound::Given(Vec::new()),
        };
        match n.op {
            Op::FakeQuant(spec, _) if out.spec.is_none() => {
                seen.insert(v);
                out.spec = Some(spec);
                out.bounds = n.ins[1..].iter().map(bound).collect();
            }
            // Scales that are computed have a place with `fake_quant` alone.
            Op::QCast(spec) if out.spec.is_none() && n.ins[1..].iter().all(|v| weight(v).is_some()) => {
                seen.insert(v);
                out.spec = Some(spec);
                out.scale = weight(&n.ins[1]);
                out.zero = n.ins.get(2).and_then(weight);
            }
            Op::ModeMul { inner } => {
                out.matrices.extend(n.ins[1..].iter().filter_map(weight).map(|name| (name, inner)));
            }
            _ => {}
        }
        v = n.ins[0];
    }
    out
}

/// The weight, by its stored name, that the head of `packed` multiplies by in the place of the table that the embedding
/// of `source` gathers from. `None` where both ends still share it, or never did.
fn parted_head<'m>(packed: &'m Module, source: &'m Module) -> Option<&'m str> {
    let table = matrix(source, "head")?;
    let head = matrix(packed, "head")?;
    (table == matrix(source, "embed")? && head != table).then_some(head)
}

/// Name of the weight that a function gathers rows from or multiplies by.
fn matrix<'m>(module: &'m Module, func: &str) -> Option<&'m str> {
    let f = module.func(module.find_func(func)?);
    let behind = |n: &Node| match n.op {
        Op::Gather => f.weight_behind(n.ins[0]),
        Op::MatMul { .. } => f.weight_behind(n.ins[1]),
        _ => None,
    };
    Some(&module.weight(f.nodes.iter().find_map(behind)?).name)
}

/// The operations that stay online, in the order in which the results need them, with weight-derived operands as holes
/// of their shape, and without those that `through` leaves out.
fn skeleton(f: &Func, through: &dyn Fn(&Op) -> bool) -> Vec<String> {
    let derived = f.weight_derived();
    let mut s = Skeleton {
        f,
        derived: &derived,
        through,
        numbers: f.params.iter().copied().zip(0..).collect(),
        next: f.params.len(),
        out: Vec::new(),
    };
    let mut last = String::new();
    for &r in &f.results {
        let n = s.visit(r);
        last.push_str(&format!("{n} "));
    }
    s.out.push(last);
    s.out
}

struct Skeleton<'a> {
    f: &'a Func,
    derived: &'a [bool],
    through: &'a dyn Fn(&Op) -> bool,
    numbers: HashMap<ValueId, usize>,
    next: usize,
    out: Vec<String>,
}

impl Skeleton<'_> {
    /// The number of a value, which is given when it is first met.
    fn visit(&mut self, v: ValueId) -> usize {
        if let Some(&n) = self.numbers.get(&v) {
            return n;
        }
        let Some(node) = self.f.def_node(v) else { return usize::MAX };
        if (self.through)(&node.op) {
            let n = self.visit(node.ins[0]);
            self.numbers.insert(v, n);
            return n;
        }
        let (word, attrs) = node.op.text();
        let mut line = word.to_owned();
        line.extend(attrs.iter().map(|(k, v)| format!(" {k}={v}")));
        for &x in &node.ins {
            line.push_str(&match self.derived[x.0 as usize] {
                true => format!(" weight{}", self.f.ty(x).shape),
                false => format!(" {}", self.visit(x)),
            });
        }
        self.out.push(line);
        for &o in &node.outs {
            self.numbers.insert(o, self.next);
            self.next += 1;
        }
        self.numbers[&v]
    }
}
