//! Puts the transforms of one layer into its graph, around every quantized edge.

use qrmc_ir::{
    BinaryOp, Builder, Diag, Func, FuncId, Grain, Module, Op, QuantSpec, Tensor, UnaryOp, ValueId, WeightId,
    fermat, rewrite,
};

use super::init::{matrices, ranked};
use super::scope::{Scope, no_pair};
use super::{AffineOptions, Form};
use crate::edges::{Linear, Producer, caches, inputs, linears, producer, role, transform_edge, width};
use crate::unit::Unit;

/// What a layer's parameters are called, relative to it.
pub(super) struct Names<'a> {
    /// The layer's function.
    layer: String,
    ids: Vec<(String, WeightId)>,
    form: Form,
    module: &'a Module,
    scope: Scope,
}

/// Declares the parameters of a layer with these values, and inserts the transforms that they make. Gives the names of
/// the parameters, relative to the layer, and their weights.
///
/// # Errors
/// If a parameter is missing or not finite, or the layer has not the form of a decoder's.
pub(super) fn layer(
    unit: &mut Unit,
    func: FuncId,
    o: &AffineOptions,
    value: &dyn Fn(&str) -> Option<Tensor>,
) -> Result<Vec<(String, WeightId)>, Diag> {
    let f = unit.module.func(func).clone();
    let scope = Scope::of(&unit.module, func, o)?;
    let mut ids = Vec::new();
    for name in parameters(&unit.module, &f, o, &scope) {
        let missing = || Diag::new("Q0609", format!("@{} has no value for its parameter {name}", f.name));
        let id = unit.define(&format!("{}.{name}", f.name), value(&name).ok_or_else(missing)?)?;
        ids.push((name, id));
    }
    let names = Names { layer: f.name.clone(), ids, form: o.form, module: &unit.module, scope };
    let new = transforms(&names, &f, o)?;
    let ids = names.ids;
    unit.module.funcs[func.0 as usize] = new;
    Ok(ids)
}

/// The values behind norms, attention and products that linear layers read: name of the edge, value, kind.
pub(super) fn edges(f: &Func) -> Result<Vec<(&'static str, ValueId, Producer)>, Diag> {
    let mut out: Vec<(&'static str, ValueId, Producer)> = Vec::new();
    let mut norms = ["attn_in", "mlp_in"].into_iter();
    for (x, _) in inputs(f) {
        let kind = producer(f, x);
        let name = match kind {
            Producer::Norm => norms.next(),
            Producer::Attention => Some("o_in"),
            Producer::Product => Some("down_in"),
            Producer::Other => None,
        };
        let name = name.filter(|n| !out.iter().any(|(o, ..)| o == n));
        let unknown = || {
            Diag::new(
                "Q0603",
                format!("@{} feeds linear layers by {}, which is no edge of a decoder", f.name, f.show(x)),
            )
        };
        out.push((name.ok_or_else(unknown)?, x, kind));
    }
    let missing = |n: &&&str| !out.iter().any(|(o, ..)| o == *n);
    match ["attn_in", "o_in", "mlp_in", "down_in"].iter().find(missing) {
        None => Ok(out),
        Some(n) => Err(Diag::new("Q0603", format!("@{} has no edge {n}: it is no decoder layer", f.name))),
    }
}

/// Names of the parameters of a layer, in the order of their declaration.
pub(super) fn parameters(module: &Module, f: &Func, o: &AffineOptions, scope: &Scope) -> Vec<String> {
    let mut names = Vec::new();
    let matrices = matrices(&module.facts, u64::from(o.tp));
    for (name, ..) in matrices.into_iter().filter(|(name, ..)| scope.has(name)) {
        match o.form {
            Form::Direct => names.push(name),
            Form::Svd => {
                names.extend(["", ".v", ".u_turn", ".v_turn", ".s"].map(|part| format!("{name}{part}")));
            }
        }
    }
    if o.diag {
        let edges = ["attn_in", "mlp_in", "down_in"].into_iter().filter(|e| scope.has(e));
        names.extend(edges.map(|e| format!("{e}.diag")));
    }
    let edges = ["attn_in", "o_in", "mlp_in", "down_in", "keys", "values"];
    for e in edges.into_iter().filter(|e| scope.has(e)) {
        names.extend(scope.clips(e).iter().map(|side| format!("{e}.{side}")));
    }
    for l in linears(f).into_iter().filter(|l| scope.input(l.x)) {
        let role = role(module, f, &l);
        names.extend(["hi", "lo"].map(|side| format!("{role}.{side}")));
    }
    names
}

/// Whether training changes a parameter: random rotations that others turn are constant.
pub(super) fn trained(name: &str, form: Form) -> bool {
    let matrix = [".left", ".right", ".matrix"].iter().any(|end| name.ends_with(end)) || name.ends_with(".v");
    form == Form::Direct || !matrix
}

impl Names<'_> {
    fn weight(&self, b: &mut Builder<'_>, name: &str) -> Result<ValueId, Diag> {
        let id = self.ids.iter().find(|(n, _)| n == name).map(|(_, id)| *id);
        let missing = || Diag::new("Q0609", format!("@{} has no parameter {name}", self.layer));
        Ok(b.weight(id.ok_or_else(missing)?))
    }

    /// The matrix of this name, from its parameters.
    fn matrix(&self, b: &mut Builder<'_>, name: &str) -> Result<ValueId, Diag> {
        if self.form == Form::Direct {
            return self.weight(b, name);
        }
        let u = self.turned(b, name, &format!("{name}.u_turn"))?;
        let v = self.turned(b, &format!("{name}.v"), &format!("{name}.v_turn"))?;
        let s = self.weight(b, &format!("{name}.s"))?;
        let scaled = b.binary(BinaryOp::Mul, u, s)?;
        b.op1(Op::MatMul { trans_b: true }, &[scaled, v])
    }

    /// `base (I - A)(I + A)⁻¹`, `A = X - Xᵀ`: every rotation near the base (Cayley).
    fn turned(&self, b: &mut Builder<'_>, base: &str, turn: &str) -> Result<ValueId, Diag> {
        let (base, x) = (self.weight(b, base)?, self.weight(b, turn)?);
        let t = b.swap_last(x)?;
        let a = b.binary(BinaryOp::Sub, x, t)?;
        let n = width(b.func(), x);
        let data: Vec<f64> = (0..n * n).map(|at| if at / n == at % n { 1.0 } else { 0.0 }).collect();
        let eye = b.literal(&[n, n], &data);
        let plus = b.binary(BinaryOp::Add, eye, a)?;
        let minus = b.binary(BinaryOp::Sub, eye, a)?;
        let inverse = b.op1(Op::Inverse, &[plus])?;
        let q = b.op1(Op::MatMul { trans_b: false }, &[minus, inverse])?;
        b.op1(Op::MatMul { trans_b: false }, &[base, q])
    }

    /// Factors on a range, from these of its parameters: one is that of both ends.
    fn factors(&self, b: &mut Builder<'_>, of: &str, sides: &[&str]) -> Result<Vec<ValueId>, Diag> {
        let mut out = Vec::new();
        for side in sides {
            let p = self.weight(b, &format!("{of}.{side}"))?;
            out.push(b.op1(Op::Unary(UnaryOp::Sigmoid), &[p])?);
        }
        if let [both] = out[..] {
            out.push(both);
        }
        Ok(out)
    }

    /// Marks a value as an edge, with its learned ends where it has some.
    fn edge(&self, b: &mut Builder<'_>, of: &str, x: ValueId) -> Result<ValueId, Diag> {
        let mut ins = vec![x];
        ins.extend(self.factors(b, of, self.scope.clips(of))?);
        b.op1(Op::Edge, &ins)
    }
}

/// `m⁻ᵀ`
fn contragredient(b: &mut Builder<'_>, m: ValueId) -> Result<ValueId, Diag> {
    let inverse = b.op1(Op::Inverse, &[m])?;
    b.swap_last(inverse)
}

/// The factors of an edge's transform: names of matrices, and over how many channels they step.
///
/// # Errors
/// If the width makes no Kronecker pair.
fn kronecker(f: &Func, name: &str, x: ValueId, head: u64, tp: u64) -> Result<Vec<(String, u64)>, Diag> {
    if name == "o_in" {
        return Ok(vec![("o_in.matrix".into(), head), ("values.matrix".into(), 1)]);
    }
    let n = width(f, x) / if ranked(&format!("{name}.")) { tp } else { 1 };
    let (_, right) = fermat(n).ok_or_else(|| no_pair(f, name, n))?;
    Ok(vec![(format!("{name}.left"), right), (format!("{name}.right"), 1)])
}

fn transforms(names: &Names<'_>, f: &Func, o: &AffineOptions) -> Result<Func, Diag> {
    let module = names.module;
    let (head, tp) = (module.facts.head_dim, u64::from(o.tp));
    let mut f = f.clone();
    for at in 0..4 {
        // A rewrite renumbers values, so that each edge is found anew.
        let (name, x, kind) = edges(&f)?[at];
        if !names.scope.has(name) {
            continue;
        }
        let parts = kronecker(&f, name, x, head, tp)?;
        let diag = o.diag && name != "o_in";
        let row_parallel = matches!(kind, Producer::Attention | Producer::Product);
        let old = f.clone();
        f = transform_edge(
            module,
            &old,
            x,
            |b, x| {
                let mut x = x;
                if diag {
                    let d = names.weight(b, &format!("{name}.diag"))?;
                    x = b.binary(BinaryOp::Mul, x, d)?;
                }
                for (matrix, inner) in &parts {
                    let m = names.matrix(b, matrix)?;
                    x = b.op1(Op::ModeMul { inner: *inner }, &[x, m])?;
                }
                names.edge(b, name, x)
            },
            |b, w, l: &Linear| {
                let mut w = w;
                if diag {
                    let d = names.weight(b, &format!("{name}.diag"))?;
                    w = b.binary(BinaryOp::Div, w, d)?;
                }
                for (matrix, inner) in &parts {
                    let m = names.matrix(b, matrix)?;
                    let m = contragredient(b, m)?;
                    w = b.op1(Op::ModeMul { inner: *inner }, &[w, m])?;
                }
                let grain = match row_parallel && tp > 1 {
                    true => Grain::Group((width(&old, l.x) / tp) as u32),
                    false => Grain::Row,
                };
                let mut ins = vec![w];
                ins.extend(names.factors(b, &role(module, &old, l), &["hi", "lo"])?);
                b.op1(Op::ClipRange(QuantSpec::sym(8, grain)), &ins)
            },
        )?;
    }
    cached(names, &f)
}

/// Queries, keys and values: keys and values are edges, queries answer the transform of the keys, and what undoes that of
/// the values follows them.
fn cached(names: &Names<'_>, f: &Func) -> Result<Func, Diag> {
    let list = caches(f);
    rewrite(names.module, f, |b, node, ins| {
        let mut ins = ins.to_vec();
        match node.op {
            Op::Attention(_) if names.scope.has("keys") => {
                let m = names.matrix(b, "keys.matrix")?;
                let m = contragredient(b, m)?;
                ins[0] = b.op1(Op::ModeMul { inner: 1 }, &[ins[0], m])?;
            }
            Op::CacheAppend => {
                let Some(cache) = list.iter().find(|c| c.new == node.ins[1]) else { return Ok(None) };
                let name = if cache.keys { "keys" } else { "values" };
                // What is not quantized needs no transform of its own.
                if !names.scope.has(name) || names.scope.clips(name).is_empty() {
                    return Ok(None);
                }
                let m = names.matrix(b, &format!("{name}.matrix"))?;
                let new = b.op1(Op::ModeMul { inner: 1 }, &[ins[1], m])?;
                ins[1] = names.edge(b, name, new)?;
                if !cache.keys {
                    let back = b.op1(Op::Inverse, &[m])?;
                    ins[1] = b.op1(Op::ModeMul { inner: 1 }, &[ins[1], back])?;
                }
            }
            _ => return Ok(None),
        }
        b.op(node.op.clone(), &ins).map(Some)
    })
}
