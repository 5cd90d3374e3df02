//! Functions become nodes: calls are inlined, and operations without a form of their own go through their definition.

use std::collections::{HashMap, HashSet};

use qrmc_ir::{
    Builder, Diag, Elem, Func, Module, Node, Op, Place, QuantSpec, RopeAttr, TensorType, ValueId, WeightId,
};

use super::attention::Fused;
use super::graph::Graph;
use super::nbits::Blocks;
use super::stored::{Packed, Weights};
use super::{Form, OnnxError};

/// Calls in one another, and nodes of the graph, beyond which a module is no decoder: calls are inlined.
const DEPTH: usize = 8;
const NODES: usize = 1 << 20;

/// What a value of the IR is in the graph.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Value {
    /// A tensor of the same sizes; floats are `f32`.
    Plain(String),
    /// A weight, which is written when it is read.
    Weight(WeightId),
    /// A `dcast` of weights, which is written when it is read.
    Packed(Packed),
    /// What a quantizer of tokens gives, which is written when it is read.
    Coded(Coded),
    /// Keys or values of a cache, `[B, kv_heads, T, head_dim]` for `[B, T, kv_heads * head_dim]`.
    Heads(String),
    /// The positions of the new tokens: `[B, S]` for `[S]`.
    Positions(String),
}

/// Codes that are known when the model runs, whole numbers in `f32`, with a scale and perhaps a zero point a token.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Coded {
    pub(super) codes: String,
    pub(super) scale: String,
    pub(super) zero: Option<String>,
    pub(super) spec: QuantSpec,
}

/// The export in the making.
pub(super) struct Walk<'a> {
    pub(super) module: &'a Module,
    pub(super) form: Form,
    /// Name of the tokens or hidden states that the graph starts from.
    pub(super) input: &'static str,
    pub(super) weights: Weights<'a>,
    pub(super) g: Graph,
    /// Calls around the function in the making.
    pub(super) depth: usize,
    /// Names of what the whole graph shares.
    pub(super) shared: Shared,
}

/// Values that are computed once for all layers.
#[derive(Default)]
pub(super) struct Shared {
    /// Cosines and sines of the new positions.
    pub(super) angles: HashMap<RopeAttr, [String; 2]>,
    /// Tables of cosines and sines of all positions.
    pub(super) tables: HashMap<RopeAttr, [String; 2]>,
    /// 0 where a key is seen, a large negative number elsewhere.
    pub(super) mask: Option<String>,
    /// The last index of each sequence, and the number of positions.
    pub(super) lengths: Option<[String; 2]>,
    /// The values that codes stand for.
    pub(super) values: HashMap<Coded, String>,
    /// Codes as bytes, and zero points as integers.
    pub(super) integers: HashMap<Coded, (String, String)>,
    /// Whether something reads the positions.
    pub(super) positions: bool,
}

/// A function in the making.
pub(super) struct Frame<'f> {
    pub(super) func: &'f Func,
    pub(super) values: Vec<Option<Value>>,
}

impl Frame<'_> {
    pub(super) fn get(&self, v: ValueId) -> &Value {
        let value = self.values[v.0 as usize].as_ref();
        value.unwrap_or_else(|| unreachable!("a verified function defines a value before its uses"))
    }

    pub(super) fn ty(&self, v: ValueId) -> &TensorType {
        self.func.ty(v)
    }
}

impl Walk<'_> {
    /// The results of a function on these arguments.
    pub(super) fn func(&mut self, func: &Func, args: Vec<Value>) -> Result<Vec<Value>, OnnxError> {
        let mut frame = Frame { func, values: vec![None; func.value_count()] };
        for (&p, a) in func.params.iter().zip(args) {
            frame.values[p.0 as usize] = Some(a);
        }
        let fused = Fused::all(self, &frame);
        let skipped: HashSet<usize> = fused.values().flat_map(|f| f.skipped()).collect();
        for (n, node) in func.nodes.iter().enumerate() {
            if skipped.contains(&n) {
                continue;
            }
            let mark = self.g.nodes.len();
            let outs = match fused.get(&n) {
                Some(f) => f.write(self, &mut frame)?,
                None => self.node(&frame, node).map_err(|e| e.at(func, node))?,
            };
            for (&o, v) in node.outs.iter().zip(outs) {
                let v = match (v, &func.value(o).name) {
                    (Value::Plain(old), Some(name)) => Value::Plain(self.g.name(mark, &old, name)),
                    (v, _) => v,
                };
                frame.values[o.0 as usize] = Some(v);
            }
        }
        Ok(func.results.iter().map(|&r| frame.get(r).clone()).collect())
    }

    fn node(&mut self, frame: &Frame<'_>, node: &Node) -> Result<Vec<Value>, OnnxError> {
        let types = || node.ins.iter().chain(&node.outs).map(|&v| frame.ty(v));
        if let Some(t) = types().find(|t| t.elem == Elem::F64) {
            let d = Diag::new("Q0501", format!("operand {t}: exports compute in f32"));
            return Err(d.hint("compile the model: an artefact holds what is computed in f64").into());
        }
        let ins: Vec<&Value> = node.ins.iter().map(|&v| frame.get(v)).collect();
        let ty = |i: usize| frame.ty(node.ins[i]);
        let one = |v: Value| Ok(vec![v]);
        match &node.op {
            Op::Weight(id) => one(Value::Weight(*id)),
            Op::Edge => one(ins[0].clone()),
            Op::Call(id) => {
                let callee = self.module.func(*id);
                self.depth += 1;
                if self.depth > DEPTH || self.g.nodes.len() > NODES {
                    let what =
                        format!("calls in one another deeper than {DEPTH}, or more than {NODES} nodes");
                    return Err(Diag::new("Q0501", what)
                        .hint("@main of a decoder calls each layer once")
                        .into());
                }
                let outer = self.g.enter(&callee.name);
                let outs = self.func(callee, ins.into_iter().cloned().collect())?;
                self.g.enter(&outer);
                self.depth -= 1;
                Ok(outs)
            }
            Op::DCast => match ins[..] {
                [&Value::Weight(codes), &Value::Weight(scale)] => {
                    one(Value::Packed(Packed { codes, scale, zero: None }))
                }
                [&Value::Weight(codes), &Value::Weight(scale), &Value::Weight(zero)] => {
                    one(Value::Packed(Packed { codes, scale, zero: Some(zero) }))
                }
                _ => one(self.dcast(&ins, ty(0))?),
            },
            Op::MatMul { trans_b: true } => one(self.mat_mul_t(&ins, [ty(0), ty(1)])?),
            Op::CacheAppend => one(self.cache_append(ins[0], ins[1], [ty(0), ty(1)])?),
            Op::Attention(attr) => one(self.attention(attr, &ins, [ty(0), ty(1), ty(2)])?),
            Op::Rope(attr) => one(self.rope(attr, ins[0], ins[1], ty(0))?),
            Op::Gather => {
                let table = match ins[0] {
                    // Rows are read in the stored type, so that a tied table is one initializer.
                    &Value::Weight(id) if self.weights.elem(id).is_float() => {
                        let table = self.weights.stored(&mut self.g, id)?;
                        let ids = self.plain(ins[1], ty(1))?;
                        let rows = self.g.op("Gather", &[&table, &ids]);
                        let float = self.weights.elem(id) == Elem::F32;
                        return one(Value::Plain(if float {
                            rows
                        } else {
                            self.g.cast(&rows, super::FLOAT)
                        }));
                    }
                    other => self.plain(other, ty(0))?,
                };
                let ids = self.plain(ins[1], ty(1))?;
                one(Value::Plain(self.g.op("Gather", &[&table, &ids])))
            }
            Op::FakeQuant(..) | Op::QParams(..) | Op::QCast(_) => self.quantizer(&node.op, &ins, ty(0)),
            _ => {
                let mut names = Vec::new();
                for (v, &id) in ins.iter().zip(&node.ins) {
                    names.push(self.plain(v, frame.ty(id))?);
                }
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                let tys: Vec<&TensorType> = node.ins.iter().map(|&v| frame.ty(v)).collect();
                match self.primitive(&node.op, &names, &tys)? {
                    Some(y) => one(Value::Plain(y)),
                    None => self.definition(&node.op, &names, &tys),
                }
            }
        }
    }

    /// The definition of a large operation in place of it.
    fn definition(&mut self, op: &Op, ins: &[&str], tys: &[&TensorType]) -> Result<Vec<Value>, OnnxError> {
        let mut b = Builder::new(self.module, "definition");
        let params: Vec<ValueId> = tys.iter().map(|t| b.param(None, (*t).clone())).collect();
        let Some(outs) = qrmc_ir::expand(&mut b, op, &params)? else {
            let d = Diag::new("Q0501", format!("`{}` has no form in ONNX", op.text().0));
            let hint = "where it is computed from weights, compile the model: an artefact holds the result";
            return Err(d.hint(hint).into());
        };
        let func = b.finish(&outs);
        let args = ins.iter().map(|&i| Value::Plain(i.to_owned())).collect();
        self.func(&func, args).map_err(OnnxError::without_place)
    }

    /// A value as a tensor of the sizes that the IR gives it.
    pub(super) fn plain(&mut self, v: &Value, ty: &TensorType) -> Result<String, OnnxError> {
        match v {
            Value::Plain(name) => Ok(name.clone()),
            Value::Weight(id) => self.weights.float(&mut self.g, *id),
            Value::Packed(p) => self.weights.dequantized(&mut self.g, *p),
            Value::Coded(c) => {
                if let Some(name) = self.shared.values.get(c) {
                    return Ok(name.clone());
                }
                let name = self.value(&c.codes, &c.scale, c.zero.as_deref());
                self.g.pin(&name);
                self.shared.values.insert(c.clone(), name.clone());
                Ok(name)
            }
            Value::Heads(name) => {
                let width = ty.shape.last().and_then(qrmc_ir::Dim::fixed).unwrap_or(0) as i64;
                let rows = self.g.transpose(name, &[0, 2, 1, 3]);
                Ok(self.g.reshape(&rows, &[0, 0, width]))
            }
            Value::Positions(_) => {
                let d = Diag::new("Q0501", "positions are read by another operation than `rope`");
                Err(d.hint("in an export, each sequence of a batch has positions of its own").into())
            }
        }
    }

    /// `a bᵀ`
    fn mat_mul_t(&mut self, ins: &[&Value], tys: [&TensorType; 2]) -> Result<Value, OnnxError> {
        if let (Value::Coded(x), Value::Packed(p)) = (ins[0], ins[1])
            && let Some(y) = self.integer_product(x, *p)?
        {
            return Ok(Value::Plain(y));
        }
        let a = self.plain(ins[0], tys[0])?;
        let b = match ins[1] {
            Value::Packed(p) => {
                let (spec, _, cols) = self.weights.scheme(*p)?;
                let blocks = Blocks::of(spec, cols).filter(|_| self.form == Form::Ort);
                if let Some(blocks) = blocks {
                    return Ok(Value::Plain(self.weights.mat_mul_nbits(&mut self.g, &a, *p, blocks)?));
                }
                self.weights.dequantized_transposed(&mut self.g, *p)?
            }
            Value::Weight(id) if tys[1].shape.rank() == 2 => {
                self.weights.float_transposed(&mut self.g, *id)?
            }
            other => {
                let b = self.plain(other, tys[1])?;
                let rank = tys[1].shape.rank() as i64;
                let mut perm: Vec<i64> = (0..rank).collect();
                if let [.., x, y] = &mut perm[..] {
                    std::mem::swap(x, y);
                }
                self.g.transpose(&b, &perm)
            }
        };
        Ok(Value::Plain(self.g.op("MatMul", &[&a, &b])))
    }
}

impl OnnxError {
    /// The same error without its place: what is in a definition is not in the module.
    fn without_place(self) -> Self {
        match self {
            OnnxError::Ir(d) => OnnxError::Ir(d.at(Place::default())),
            other => other,
        }
    }

    /// The same error at the node that it is about.
    fn at(self, func: &Func, node: &Node) -> Self {
        match self {
            OnnxError::Ir(d) if d.place == Place::default() => {
                let value = node.outs.first().map(|&o| func.show(o).to_string());
                OnnxError::Ir(d.at(Place { func: Some(func.name.clone()), value, line: None }))
            }
            other => other,
        }
    }
}
