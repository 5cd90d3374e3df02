//! Building functions: every value's type is inferred as it is added.

use std::collections::HashMap;

use crate::attr::Real;
use crate::diag::{Diag, Place};
use crate::infer::infer;
use crate::module::{Def, Func, Module, Node, Value, ValueId, WeightId};
use crate::op::{BinaryOp, Op};
use crate::types::TensorType;

/// Builds one function of a module, node by node.
pub struct Builder<'m> {
    module: &'m Module,
    func: Func,
    weights: HashMap<WeightId, ValueId>,
}

impl<'m> Builder<'m> {
    /// Starts a function. `module` gives the types of weights and of called functions.
    pub fn new(module: &'m Module, name: &str) -> Self {
        Builder { module, func: Func { name: name.to_owned(), ..Func::default() }, weights: HashMap::new() }
    }

    /// Adds a parameter.
    pub fn param(&mut self, name: Option<&str>, ty: TensorType) -> ValueId {
        let def = Def::Param(self.func.params.len() as u32);
        let id = self.push(ty, def);
        self.func.params.push(id);
        if let Some(name) = name {
            self.name(id, name);
        }
        id
    }

    fn push(&mut self, ty: TensorType, def: Def) -> ValueId {
        let id = ValueId(self.func.values.len() as u32);
        self.func.values.push(Value { ty, def, name: None });
        id
    }

    /// Adds an operation and gives its results.
    ///
    /// # Errors
    /// If the operands do not fit the operation.
    pub fn op(&mut self, op: Op, ins: &[ValueId]) -> Result<Vec<ValueId>, Diag> {
        let tys: Vec<&TensorType> = ins.iter().map(|&v| self.func.ty(v)).collect();
        let out_tys = infer(self.module, &op, &tys).map_err(|d| {
            let value = ins.first().map(|&v| self.func.show(v).to_string());
            d.at(Place { func: Some(self.func.name.clone()), value, line: None })
        })?;
        let n = self.func.nodes.len() as u32;
        let outs: Vec<ValueId> =
            out_tys.into_iter().enumerate().map(|(k, ty)| self.push(ty, Def::Node(n, k as u32))).collect();
        self.func.nodes.push(Node { op, ins: ins.to_vec(), outs: outs.clone() });
        Ok(outs)
    }

    /// Adds an operation with one result.
    ///
    /// # Errors
    /// As [`Builder::op`].
    pub fn op1(&mut self, op: Op, ins: &[ValueId]) -> Result<ValueId, Diag> {
        let outs = self.op(op, ins)?;
        match outs[..] {
            [v] => Ok(v),
            _ => Err(Diag::new(
                "Q0102",
                format!("an operation with {} results stands where one is needed", outs.len()),
            )),
        }
    }

    /// Adds a transpose of the last two axes.
    ///
    /// # Errors
    /// If there are no two axes.
    pub fn swap_last(&mut self, x: ValueId) -> Result<ValueId, Diag> {
        let mut perm: Vec<u8> = (0..self.ty(x).shape.rank() as u8).collect();
        if let [.., a, b] = &mut perm[..] {
            std::mem::swap(a, b);
        }
        self.op1(Op::Transpose(perm), &[x])
    }

    /// Adds an elementwise operation of two operands.
    ///
    /// # Errors
    /// As [`Builder::op`].
    pub fn binary(&mut self, op: BinaryOp, a: ValueId, b: ValueId) -> Result<ValueId, Diag> {
        self.op1(Op::Binary(op), &[a, b])
    }

    /// `x wᵀ`
    ///
    /// # Errors
    /// As [`Builder::op`].
    pub fn linear(&mut self, x: ValueId, w: ValueId) -> Result<ValueId, Diag> {
        self.op1(Op::MatMul { trans_b: true }, &[x, w])
    }

    /// A scalar literal.
    pub fn scalar(&mut self, x: f64) -> ValueId {
        self.literal(&[1], &[x])
    }

    /// A literal.
    ///
    /// # Panics
    /// If `data` does not fill `shape`: a bug of the caller.
    pub fn literal(&mut self, shape: &[u64], data: &[f64]) -> ValueId {
        assert_eq!(shape.iter().product::<u64>(), data.len() as u64, "literal does not fill its shape");
        let op = Op::Const { shape: shape.to_vec(), data: data.iter().map(|&x| Real(x)).collect() };
        self.op1(op, &[]).unwrap_or_else(|d| unreachable!("a literal has a type: {d}"))
    }

    /// A weight, once for each function.
    pub fn weight(&mut self, id: WeightId) -> ValueId {
        if let Some(&v) = self.weights.get(&id) {
            return v;
        }
        let v = self.op1(Op::Weight(id), &[]).unwrap_or_else(|d| unreachable!("a weight has a type: {d}"));
        self.weights.insert(id, v);
        v
    }

    /// Names a value; a name that another value had moves to this one.
    pub fn name(&mut self, id: ValueId, name: &str) {
        if let Some(old) = self.func.find(name) {
            self.func.values[old.0 as usize].name = None;
        }
        self.func.values[id.0 as usize].name = Some(name.to_owned());
    }

    /// Type of a value.
    pub fn ty(&self, id: ValueId) -> &TensorType {
        self.func.ty(id)
    }

    /// The function so far.
    pub fn func(&self) -> &Func {
        &self.func
    }

    /// The module that is built against.
    pub fn module(&self) -> &'m Module {
        self.module
    }

    /// Ends the function with its results. Nodes that no result needs are dropped.
    pub fn finish(mut self, results: &[ValueId]) -> Func {
        self.func.results = results.to_vec();
        prune(&self.func)
    }
}

/// The function in normal form: nodes that no result needs are gone, each unnamed weight stands once and right before
/// its first use, values are numbered in order of definition. This is the form that the parser builds.
pub fn prune(func: &Func) -> Func {
    let mut live = vec![false; func.value_count()];
    func.results.iter().for_each(|r| live[r.0 as usize] = true);
    let mut keep = vec![false; func.nodes.len()];
    for (n, node) in func.nodes.iter().enumerate().rev() {
        if node.outs.iter().any(|o| live[o.0 as usize]) {
            keep[n] = true;
            node.ins.iter().for_each(|i| live[i.0 as usize] = true);
        }
    }
    let mut out = Pruned {
        old: func,
        new: Func { name: func.name.clone(), ..Func::default() },
        map: HashMap::new(),
        weights: HashMap::new(),
    };
    for (i, &p) in func.params.iter().enumerate() {
        let id = out.define(p, Def::Param(i as u32));
        out.new.params.push(id);
    }
    for (_, node) in func.nodes.iter().enumerate().filter(|(n, _)| keep[*n]) {
        if matches!(node.op, Op::Weight(_)) && func.value(node.outs[0]).name.is_none() {
            continue;
        }
        out.node(node);
    }
    out.new.results = func.results.iter().map(|&r| out.get(r)).collect();
    out.new
}

struct Pruned<'a> {
    old: &'a Func,
    new: Func,
    map: HashMap<ValueId, ValueId>,
    weights: HashMap<WeightId, ValueId>,
}

impl Pruned<'_> {
    fn define(&mut self, old: ValueId, def: Def) -> ValueId {
        let id = ValueId(self.new.values.len() as u32);
        let v = self.old.value(old);
        self.new.values.push(Value { ty: v.ty.clone(), def, name: v.name.clone() });
        self.map.insert(old, id);
        id
    }

    fn get(&mut self, old: ValueId) -> ValueId {
        if let Some(&v) = self.map.get(&old) {
            return v;
        }
        let (def, weight) = (self.old.def_node(old), self.old.as_weight(old));
        let (Some(def), Some(weight)) = (def, weight) else {
            unreachable!("a definition comes before its uses")
        };
        if let Some(&v) = self.weights.get(&weight) {
            self.map.insert(old, v);
            return v;
        }
        let v = self.node(def)[0];
        self.weights.insert(weight, v);
        v
    }

    fn node(&mut self, node: &Node) -> Vec<ValueId> {
        let ins = node.ins.iter().map(|&v| self.get(v)).collect();
        let at = self.new.nodes.len() as u32;
        let outs: Vec<ValueId> =
            node.outs.iter().enumerate().map(|(k, &o)| self.define(o, Def::Node(at, k as u32))).collect();
        self.new.nodes.push(Node { op: node.op.clone(), ins, outs: outs.clone() });
        outs
    }
}
