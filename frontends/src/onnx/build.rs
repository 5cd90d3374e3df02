//! Terms become the functions of a module.

use std::collections::HashMap;
use std::rc::Rc;

use qrmc_ir::{Builder, Diag, Dim, Elem, Func, ModelFacts, Module, Shape, TensorType};

use super::emit::{Fault, Making};
use super::matrix::{Matrix, Part};
use super::roles::{Roles, needed, operands};
use super::source::{Piece, Pieces};
use super::term::{T, Term, Terms, Vector};
use crate::Integers;
use crate::decoder;

/// What a module is built of.
pub(super) struct Build<'a> {
    pub(super) terms: &'a Terms,
    pub(super) roles: &'a Roles,
    pub(super) integers: Integers,
    pub(super) module: Module,
    pub(super) pieces: Pieces,
    /// Names of weights that are there already.
    pub(super) by_matrix: HashMap<(Rc<Matrix>, bool), String>,
    pub(super) by_vector: HashMap<Vector, String>,
}

type Done<R> = Result<R, String>;

impl<'a> Build<'a> {
    pub(super) fn new(terms: &'a Terms, roles: &'a Roles, integers: Integers, facts: ModelFacts) -> Self {
        Build {
            terms,
            roles,
            integers,
            module: Module::new(facts),
            pieces: Pieces::default(),
            by_matrix: HashMap::new(),
            by_vector: HashMap::new(),
        }
    }

    /// All functions.
    ///
    /// # Errors
    /// A term that no operation says, by the node that made it, in a sentence.
    pub(super) fn all(&mut self, result: T) -> Done<()> {
        let first = self.roles.layers[0].x;
        if self.roles.embeds {
            self.func("embed", first, None, None)?;
        }
        for i in 0..self.roles.layers.len() {
            self.func(&format!("layer{i}"), self.roles.layers[i].y, Some(self.roles.layers[i].x), Some(i))?;
        }
        let last = self.roles.layers[self.roles.layers.len() - 1].y;
        if self.roles.heads {
            self.func("head", result, Some(last), None)?;
        }
        let main = decoder::main(&self.module).map_err(|d| d.to_string())?;
        self.module.funcs.push(main);
        Ok(())
    }

    fn func(&mut self, name: &str, root: T, from: Option<T>, layer: Option<usize>) -> Done<()> {
        // Weights are declared before a builder looks at the module.
        let order = self.order(root, from);
        let mut declared = order.clone();
        declared.sort_by_key(|t| self.rank(*t));
        for t in declared {
            self.declare(t)?;
        }
        let internal = |d: Diag| format!("the graph does not make a module: {d}");
        let module = self.module.clone();
        let mut b = Builder::new(&module, name);
        let mut m = Making { values: HashMap::new(), pos: None, past: [None; 2], all: [None; 2] };
        match (from, layer) {
            (None, _) => {
                let ids = b.param(Some("ids"), decoder::tokens());
                m.pos = Some(ids);
            }
            (Some(x), layer) => {
                let v = b.param(Some("x"), decoder::stream(&module));
                m.values.insert(x, v);
                if layer.is_some() {
                    m.pos = Some(b.param(Some("pos"), decoder::positions()));
                    m.past = ["k_past", "v_past"].map(|n| Some(b.param(Some(n), decoder::past(&module))));
                }
            }
        }
        if let Some(i) = layer
            && let Term::Attention(_, k, v, _) = *self.terms.get(self.roles.layers[i].attention)
        {
            for (at, t) in [k, v].into_iter().enumerate() {
                if let Some(past) = self.past_of(t)
                    && let Some(value) = m.past[at]
                {
                    m.values.insert(past, value);
                }
            }
        }
        for t in order {
            self.emit(&mut b, &mut m, t).map_err(|e| match e {
                Fault::Ir(d) => internal(d),
                Fault::Unknown(what) => what,
            })?;
        }
        let y = m.values[&root];
        let mut results = vec![y];
        if layer.is_some() {
            let [Some(k), Some(v)] = m.all else {
                return Err(format!("@{name} does not append to a cache of keys and one of values"));
            };
            results.extend([k, v]);
        }
        if b.func().value(y).name.is_none() {
            b.name(y, if from.is_none() || layer.is_some() { "y" } else { "logits" });
        }
        let f: Func = b.finish(&results);
        self.module.funcs.push(f);
        Ok(())
    }

    /// Where the weight of a term stands among those of its layer: linear layers, norms, and what no decoder has.
    fn rank(&self, t: T) -> (usize, T) {
        const ORDER: [&str; 13] = [
            "q_proj.weight",
            "q_proj.bias",
            "k_proj.weight",
            "k_proj.bias",
            "v_proj.weight",
            "v_proj.bias",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
            "layernorm",
            "_norm",
            "norm",
        ];
        let name = self.roles.weights.get(&t).map_or("", String::as_str);
        let last = if name.is_empty() { ORDER.len() + 1 } else { ORDER.len() };
        (ORDER.iter().position(|part| name.contains(part)).unwrap_or(last), t)
    }

    /// The cache under keys or values.
    fn past_of(&self, mut t: T) -> Option<T> {
        loop {
            t = match *self.terms.get(t) {
                Term::Append(past, _) => return Some(past),
                Term::Past(_) => return Some(t),
                Term::Quant { x, .. } | Term::Mode { x, .. } | Term::Hadamard { x, .. } => x,
                _ => return None,
            };
        }
    }

    /// The terms of a function, operands first.
    fn order(&self, root: T, from: Option<T>) -> Vec<T> {
        let of = |t: T| match self.terms.get(t) {
            _ if Some(t) == from => Vec::new(),
            Term::Quant { x, .. } if self.integers == Integers::Dequantize => vec![*x],
            term => operands(term),
        };
        let all = needed(root, of).into_iter().filter(|&t| Some(t) != from).collect();
        self.as_decoders(all)
    }

    /// The same terms in the order in which [`decoder`] writes them, where that is possible: what has no name stands before
    /// its first reader.
    fn as_decoders(&self, all: Vec<T>) -> Vec<T> {
        const ORDER: [&str; 26] = [
            "attn_in",
            "q_proj",
            "q",
            "k_proj",
            "k",
            "v_proj",
            "v",
            "q_normed",
            "k_normed",
            "q_rope",
            "k_rope",
            "k_all",
            "v_all",
            "o_in",
            "o_proj",
            "attn_out",
            "x_mid",
            "mlp_in",
            "gate_proj",
            "gate",
            "up_proj",
            "up",
            "down_in",
            "down_proj",
            "mlp_out",
            "y",
        ];
        let mut place: HashMap<T, usize> = HashMap::new();
        for &t in all.iter().rev() {
            let named = self.roles.values.get(&t).and_then(|n| ORDER.iter().position(|o| o == n));
            let own = named.or_else(|| place.get(&t).copied()).unwrap_or(ORDER.len());
            place.insert(t, own);
            for o in operands(self.terms.get(t)) {
                place.entry(o).and_modify(|p| *p = own.min(*p)).or_insert(own);
            }
        }
        let mut sorted = all.clone();
        sorted.sort_by_key(|t| (place[t], *t));
        let at: HashMap<T, usize> = sorted.iter().enumerate().map(|(i, t)| (*t, i)).collect();
        let before =
            |t: &T| operands(self.terms.get(*t)).iter().all(|o| at.get(o).is_none_or(|i| *i < at[t]));
        if sorted.iter().all(before) { sorted } else { all }
    }

    /// The name of a weight that has no place in a decoder: that of its tensor.
    fn own_name(&self, tensor: Option<usize>, otherwise: String) -> String {
        let name = tensor.map(|t| self.terms.model.tensors[t].name.clone()).unwrap_or_default();
        let name = name.strip_suffix(".codes").unwrap_or(&name);
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let clean: String = name.chars().map(|c| if good(c) { c } else { '_' }).collect();
        let clean = clean.trim_matches('_');
        let starts = clean.chars().next().is_some_and(|c| c.is_ascii_alphabetic());
        let mut name = if starts { clean.to_owned() } else { otherwise };
        while self.pieces.has(&name) {
            name.push('_');
        }
        name
    }

    /// Whether one number is a weight: qrmc's own exports call constants literals.
    pub(super) fn is_named(&self, tensor: usize) -> bool {
        !self.terms.model.tensors[tensor].name.starts_with("literal")
    }

    fn declare(&mut self, t: T) -> Done<()> {
        let role = self.roles.weights.get(&t).cloned();
        match self.terms.get(t).clone() {
            Term::Embed(m) => self.matrix(&m, Some("model.embed_tokens.weight".into()), t, false).map(drop),
            Term::Linear(_, w) => self.matrix(&w, role, t, true).map(drop),
            Term::Mode { m, .. } => self.matrix(&m, None, t, false).map(drop),
            Term::Norm { gain, .. } if gain.n > 1 => self.vector(&gain, role, t).map(drop),
            Term::Vector(v) => self.vector(&v, role, t).map(drop),
            Term::Scalar(_, Some(tensor)) if self.is_named(tensor) => match self.terms.vector(t) {
                Some(v) => self.vector(&v, None, t).map(drop),
                None => Ok(()),
            },
            Term::Static { scale, zero, .. } if self.integers != Integers::Dequantize => {
                self.vector(&scale, None, t)?;
                if let Some(z) = zero {
                    let name = self.own_name(z.tensor, format!("onnx.zero{t}"));
                    let codes = z.floats(&self.terms.model.tensors)?;
                    let bytes: Vec<u8> = codes.iter().map(|&c| c as u8).collect();
                    let ty = TensorType::new(Elem::U8, [z.n as usize].as_slice());
                    self.put(name.clone(), ty, Piece::Bytes(bytes))?;
                    self.by_vector.insert(z, name);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn put(&mut self, name: String, ty: TensorType, piece: Piece) -> Done<()> {
        self.module
            .declare(&name, ty.clone())
            .map_err(|other| format!("weight `{name}` would be {ty} and {other}"))?;
        self.pieces.put(name, ty, piece);
        Ok(())
    }

    /// Declares a matrix, in codes where `codes` allows; gives its name.
    fn matrix(&mut self, m: &Rc<Matrix>, role: Option<String>, t: T, codes: bool) -> Done<String> {
        let keep = codes && self.keeps(m);
        if let Some(name) = self.by_matrix.get(&(m.clone(), keep)) {
            return Ok(name.clone());
        }
        let name = role.unwrap_or_else(|| self.own_name(m.tensor(), format!("onnx.matrix{t}")));
        let name =
            if self.pieces.has(&name) { self.own_name(m.tensor(), format!("onnx.matrix{t}")) } else { name };
        let model = self.terms.model.clone();
        let parts: &[(&str, Part)] = match (keep, m.spec()) {
            (true, Some(spec)) if spec.zero => {
                &[(".codes", Part::Codes), (".scale", Part::Scale), (".zero", Part::Zero)]
            }
            (true, _) => &[(".codes", Part::Codes), (".scale", Part::Scale)],
            _ => &[("", Part::Values)],
        };
        for &(end, part) in parts {
            let mut ty = m.ty(part, &model.tensors);
            if let (Term::Mode { count, .. }, [_, cols]) = (self.terms.get(t), &ty.shape.0[..])
                && *count > 1
            {
                ty.shape = Shape(vec![Dim::Fixed(*count), *cols, *cols]);
            }
            self.put(format!("{name}{end}"), ty, Piece::Matrix(Box::new((**m).clone()), part))?;
        }
        self.by_matrix.insert((m.clone(), keep), name.clone());
        Ok(name)
    }

    fn vector(&mut self, v: &Vector, role: Option<String>, t: T) -> Done<String> {
        if let Some(name) = self.by_vector.get(v) {
            return Ok(name.clone());
        }
        let name = role
            .filter(|n| !self.pieces.has(n))
            .unwrap_or_else(|| self.own_name(v.tensor, format!("onnx.vector{t}")));
        let tensors = &self.terms.model.tensors;
        let stored = v.literal.is_none().then_some(v.tensor).flatten();
        let elem = stored.map_or(Some(Elem::F32), |s| tensors[s].ty.float()).ok_or("a vector of integers")?;
        let ty = TensorType::new(elem, [v.n as usize].as_slice());
        let bytes = match stored {
            Some(s) => {
                let width = (elem.bits() / 8) as u64;
                let range = (v.first * width) as usize..((v.first + v.n) * width) as usize;
                tensors[s].bytes.get(range).ok_or("a vector that is cut short")?.to_vec()
            }
            None => v.floats(tensors)?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        self.put(name.clone(), ty, Piece::Bytes(bytes))?;
        self.by_vector.insert(v.clone(), name.clone());
        Ok(name)
    }
}
