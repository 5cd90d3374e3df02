//! Modules, functions and values.

use std::collections::HashMap;
use std::fmt;

use crate::op::Op;
use crate::types::TensorType;

/// A weight of a module.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct WeightId(pub u32);

/// A function of a module.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FuncId(pub u32);

/// A value of a function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ValueId(pub u32);

/// A declared weight.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WeightDecl {
    /// Unique in the module; for imported models the Hugging Face tensor name.
    pub name: String,
    /// Stored type.
    pub ty: TensorType,
}

/// Facts about the model that no operation carries.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ModelFacts {
    /// `model_type` of the Hugging Face configuration: `llama`, `qwen2`, `qwen3`.
    pub arch: String,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Width of the feed-forward block.
    pub intermediate: u64,
    /// Decoder blocks.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Size of one head.
    pub head_dim: u64,
    /// Tokens in the vocabulary.
    pub vocab: u64,
    /// Positions that the model was made for.
    pub context: u64,
    /// First token, if the configuration names one.
    pub bos: Option<u32>,
    /// Tokens that end generation.
    pub eos: Vec<u32>,
}

/// What defines a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Def {
    /// The n-th parameter.
    Param(u32),
    /// The n-th result of a node.
    Node(u32, u32),
}

/// A value: defined once, before its uses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Value {
    /// Element type and shape.
    pub ty: TensorType,
    /// Where it comes from.
    pub def: Def,
    /// A stable name, unique in its function: probe points are asked for by name.
    pub name: Option<String>,
}

/// One operation in a function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// The operation.
    pub op: Op,
    /// Operands.
    pub ins: Vec<ValueId>,
    /// Results.
    pub outs: Vec<ValueId>,
}

/// A function: a list of nodes in an order where definitions come before uses.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Func {
    /// Unique in the module, without `@`.
    pub name: String,
    /// Parameters.
    pub params: Vec<ValueId>,
    /// Nodes, definitions first.
    pub nodes: Vec<Node>,
    /// Results.
    pub results: Vec<ValueId>,
    pub(crate) values: Vec<Value>,
}

impl Func {
    /// The value behind an id of this function.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }

    /// Type of a value.
    pub fn ty(&self, id: ValueId) -> &TensorType {
        &self.value(id).ty
    }

    /// Number of values.
    pub fn value_count(&self) -> usize {
        self.values.len()
    }

    /// All values in order of definition.
    pub fn value_ids(&self) -> impl Iterator<Item = ValueId> + use<> {
        (0..self.values.len() as u32).map(ValueId)
    }

    /// The value of this name (written without `%`).
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.values.iter().position(|v| v.name.as_deref() == Some(name)).map(|i| ValueId(i as u32))
    }

    /// The node that defines a value, or `None` for a parameter.
    pub fn def_node(&self, id: ValueId) -> Option<&Node> {
        match self.value(id).def {
            Def::Param(_) => None,
            Def::Node(n, _) => Some(&self.nodes[n as usize]),
        }
    }

    /// The weight that a value is, if it is one.
    pub fn as_weight(&self, id: ValueId) -> Option<WeightId> {
        match self.def_node(id)?.op {
            Op::Weight(w) => Some(w),
            _ => None,
        }
    }

    /// The node that makes a value, the one that makes its first operand, and so on.
    pub fn first_operands(&self, id: ValueId) -> impl Iterator<Item = &Node> {
        std::iter::successors(self.def_node(id), |n| self.def_node(*n.ins.first()?))
    }

    /// The weight that a value is mainly made of: the one at the end of the first operands. Of every operation on weights,
    /// the first operand is the weight itself.
    pub fn weight_behind(&self, id: ValueId) -> Option<WeightId> {
        self.first_operands(id).find_map(|n| match n.op {
            Op::Weight(w) => Some(w),
            _ => None,
        })
    }

    /// For each value, the nodes that use it, in order. A use as result of the function does not count.
    pub fn users(&self) -> Vec<Vec<usize>> {
        let mut users = vec![Vec::new(); self.values.len()];
        for (n, node) in self.nodes.iter().enumerate() {
            for v in &node.ins {
                let list: &mut Vec<usize> = &mut users[v.0 as usize];
                if list.last() != Some(&n) {
                    list.push(n);
                }
            }
        }
        users
    }

    /// For each value, whether all its leaves are weights or constants.
    pub fn weight_derived(&self) -> Vec<bool> {
        let mut derived = vec![false; self.values.len()];
        for node in &self.nodes {
            let d = match node.op {
                Op::Weight(_) | Op::Const { .. } => true,
                Op::Call(_) | Op::CausalMask { .. } => false,
                _ => node.ins.iter().all(|v| derived[v.0 as usize]),
            };
            for out in &node.outs {
                derived[out.0 as usize] = d;
            }
        }
        derived
    }

    /// The text form of a value: its name, or its number among the unnamed values.
    pub fn show(&self, id: ValueId) -> ShownValue<'_> {
        ShownValue { func: self, id }
    }
}

/// Displays a value as the text form writes it.
pub struct ShownValue<'a> {
    func: &'a Func,
    id: ValueId,
}

impl fmt::Display for ShownValue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.func.value(self.id).name {
            Some(name) => write!(f, "%{name}"),
            None => {
                let inline = |v: &Value| match v.def {
                    Def::Node(n, _) => matches!(self.func.nodes[n as usize].op, Op::Weight(_)),
                    Def::Param(_) => false,
                };
                let before = &self.func.values[..self.id.0 as usize];
                let n = before.iter().filter(|v| v.name.is_none() && !inline(v)).count();
                write!(f, "%{n}")
            }
        }
    }
}

/// What a block of a decoder has not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lacks {
    /// Tokens become hidden states elsewhere.
    Embedding,
    /// Hidden states become logits elsewhere.
    Head,
    /// It goes from hidden states to hidden states.
    Both,
}

impl fmt::Display for Lacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Lacks::Embedding => "no embedding",
            Lacks::Head => "no head",
            Lacks::Both => "no embedding and no head",
        })
    }
}

/// A model: facts, declared weights, functions, and what was done to it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Module {
    /// Facts that no operation carries.
    pub facts: ModelFacts,
    weights: Vec<WeightDecl>,
    by_name: HashMap<String, WeightId>,
    /// Functions; a call refers to an earlier one.
    pub funcs: Vec<Func>,
    /// Passes applied so far, each in normal form.
    pub history: Vec<String>,
}

impl Module {
    /// A module without weights and functions.
    pub fn new(facts: ModelFacts) -> Self {
        Module { facts, ..Module::default() }
    }

    /// Declares a weight, or finds the one of this name and type.
    ///
    /// # Errors
    /// The type that the name already has, if it is another one.
    pub fn declare(&mut self, name: &str, ty: TensorType) -> Result<WeightId, TensorType> {
        if let Some(&id) = self.by_name.get(name) {
            let have = &self.weights[id.0 as usize].ty;
            return if *have == ty { Ok(id) } else { Err(have.clone()) };
        }
        let id = WeightId(self.weights.len() as u32);
        self.weights.push(WeightDecl { name: name.to_owned(), ty });
        self.by_name.insert(name.to_owned(), id);
        Ok(id)
    }

    /// A declared weight.
    pub fn weight(&self, id: WeightId) -> &WeightDecl {
        &self.weights[id.0 as usize]
    }

    /// The weight of this name.
    pub fn find_weight(&self, name: &str) -> Option<WeightId> {
        self.by_name.get(name).copied()
    }

    /// All declared weights in order.
    pub fn weights(&self) -> &[WeightDecl] {
        &self.weights
    }

    /// The function of this name (written without `@`).
    pub fn find_func(&self, name: &str) -> Option<FuncId> {
        self.funcs.iter().position(|f| f.name == name).map(|i| FuncId(i as u32))
    }

    /// A function.
    pub fn func(&self, id: FuncId) -> &Func {
        &self.funcs[id.0 as usize]
    }

    /// The decoder layers: functions named `layer0`, `layer1`, …, in order.
    pub fn layers(&self) -> Vec<FuncId> {
        (0..).map_while(|i| self.find_func(&format!("layer{i}"))).collect()
    }

    /// What a decoder with `@main` lacks to give logits for tokens: then it is a block of one.
    pub fn lacks(&self) -> Option<Lacks> {
        self.find_func("main").filter(|_| !self.layers().is_empty())?;
        let product = |f: FuncId| self.func(f).nodes.iter().any(|n| matches!(n.op, Op::MatMul { .. }));
        match (self.find_func("embed").is_some(), self.find_func("head").is_some_and(product)) {
            (true, true) => None,
            (true, false) => Some(Lacks::Head),
            (false, true) => Some(Lacks::Embedding),
            (false, false) => Some(Lacks::Both),
        }
    }

    /// Drops declarations that no function mentions, renumbering the rest.
    pub fn drop_unused_weights(&mut self) {
        let mut used = vec![false; self.weights.len()];
        for op in self.funcs.iter().flat_map(|f| &f.nodes).map(|n| &n.op) {
            if let Op::Weight(w) = op {
                used[w.0 as usize] = true;
            }
        }
        let mut new_id = vec![WeightId(0); self.weights.len()];
        let mut kept = Vec::new();
        for (i, decl) in std::mem::take(&mut self.weights).into_iter().enumerate() {
            if used[i] {
                new_id[i] = WeightId(kept.len() as u32);
                kept.push(decl);
            }
        }
        self.by_name = kept.iter().enumerate().map(|(i, d)| (d.name.clone(), WeightId(i as u32))).collect();
        self.weights = kept;
        for node in self.funcs.iter_mut().flat_map(|f| &mut f.nodes) {
            if let Op::Weight(w) = &mut node.op {
                *w = new_id[w.0 as usize];
            }
        }
    }
}
