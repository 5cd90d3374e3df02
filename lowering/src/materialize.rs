//! Everything that is computed from weights alone is computed once and written: read, evaluate, pack, write, free.

use std::collections::{HashMap, HashSet};

use qrmc_ir::{
    BinaryOp, Builder, Diag, Elem, Engine, EngineError, Func, FuncId, Module, Op, ReduceOp, Tensor,
    TensorType, ValueId, Verified, WeightSource, extract,
};

use crate::artefact::{ArtefactError, TensorPlan, stored_bytes};

mod names;

use names::{Names, base_weight, first_op};

/// Why a module could not be materialised.
#[derive(Debug, thiserror::Error)]
pub enum MaterializeError {
    /// The graph is not as it should be.
    #[error(transparent)]
    Ir(#[from] Diag),
    /// A value could not be computed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A tensor could not be written.
    #[error(transparent)]
    Write(#[from] ArtefactError),
    /// A value cannot be stored.
    #[error("tensor `{name}`: {why}")]
    Value {
        /// Name of the tensor.
        name: String,
        /// What is wrong with it.
        why: String,
    },
}

/// What a tensor of the new module is computed from.
#[derive(Clone, Debug)]
enum Origin {
    /// A weight as it is stored.
    Copy(String),
    /// Codes, scales and zero points that are weights already.
    Parts(Vec<String>),
    /// A value of a function.
    Value(FuncId, ValueId),
}

/// A plan: the new module, and where each of its tensors comes from.
#[derive(Debug)]
pub struct Materialized {
    /// The module over the new weights.
    pub module: Module,
    old: Module,
    jobs: Vec<Job>,
}

/// Tensors that are computed together.
#[derive(Debug)]
struct Job {
    tensors: Vec<TensorPlan>,
    origin: Origin,
    /// The root and its operands, if it is a quantized weight.
    parts: Vec<ValueId>,
}

/// Takes a tensor and its bytes.
pub type Put<'a> = dyn FnMut(&TensorPlan, &[u8]) -> Result<(), ArtefactError> + 'a;

/// Rounding loss of one tensor.
#[derive(Clone, PartialEq, Debug)]
pub struct TensorLoss {
    /// Name of the codes.
    pub name: String,
    /// Root of the mean squared error over the root mean square of the weight.
    pub relative: f64,
}

/// Plans the new module of a verified one: each weight-derived value that the rest of the graph reads becomes a weight.
/// Quantized ones become three: codes, scales, zero points.
///
/// # Errors
/// Only for a module that breaks the IR's rules.
pub fn plan(module: Verified<'_>) -> Result<Materialized, Diag> {
    let old = module.module().clone();
    let names = Names::of(&old);
    let mut new = Module::new(old.facts.clone());
    new.history.clone_from(&old.history);
    let mut jobs = Vec::new();
    // What each name stands for: the weight that it is a copy of, if it is one.
    let mut made: HashMap<String, Option<String>> = HashMap::new();
    for (at, f) in old.funcs.iter().enumerate() {
        let roots = roots(f);
        let mut ids: HashMap<ValueId, Vec<qrmc_ir::WeightId>> = HashMap::new();
        for &root in &roots {
            let mut job = job(&old, FuncId(at as u32), f, root, &names);
            job.rename(&made, first_op(f, root));
            let copied = if let Origin::Copy(w) = &job.origin { Some(w.clone()) } else { None };
            made.extend(job.tensors.iter().map(|t| (t.name.clone(), copied.clone())));
            let mut declared = Vec::new();
            for t in &job.tensors {
                let fresh = new.find_weight(&t.name).is_none();
                let id = new.declare(&t.name, t.ty.clone()).map_err(|have| {
                    Diag::new("Q0502", format!("@{} would be both {have} and {}", t.name, t.ty))
                })?;
                declared.push((id, fresh));
            }
            ids.insert(root, declared.iter().map(|(id, _)| *id).collect());
            if declared.iter().any(|(_, fresh)| *fresh) {
                jobs.push(job);
            }
        }
        let f = with_weights(&new, f, &ids)?;
        new.funcs.push(f);
    }
    Ok(Materialized { module: new, old, jobs })
}

/// The weight-derived values that something online reads, in order of first use.
fn roots(f: &Func) -> Vec<ValueId> {
    let derived = f.weight_derived();
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    let online = f.nodes.iter().filter(|n| n.outs.iter().any(|o| !derived[o.0 as usize]));
    for v in online.flat_map(|n| &n.ins).chain(&f.results) {
        let literal = matches!(f.def_node(*v).map(|n| &n.op), Some(Op::Const { .. }));
        if derived[v.0 as usize] && !literal && seen.insert(*v) {
            out.push(*v);
        }
    }
    out
}

fn job(module: &Module, id: FuncId, f: &Func, root: ValueId, names: &Names) -> Job {
    let ty = |v: ValueId, elem: Elem| TensorType { elem, shape: f.ty(v).shape.clone() };
    if let Some(w) = f.as_weight(root) {
        let w = module.weight(w);
        let tensors = vec![TensorPlan { name: w.name.clone(), ty: w.ty.clone() }];
        return Job { tensors, origin: Origin::Copy(w.name.clone()), parts: vec![root] };
    }
    let base = base_weight(module, f, root).unwrap_or_else(|| format!("{}.const{}", f.name, root.0));
    let base = names.derived(&base, &f.name);
    match f.def_node(root) {
        Some(n) if n.op == Op::DCast => {
            let Elem::Quant(spec) = f.ty(n.ins[0]).elem else { unreachable!("verified codes") };
            let stored: Option<Vec<String>> =
                n.ins.iter().map(|v| f.as_weight(*v).map(|w| module.weight(w).name.clone())).collect();
            // Codes that a weight holds are named for what they are codes of.
            let base = base.strip_suffix(".codes").filter(|_| stored.is_some()).unwrap_or(&base);
            let mut tensors = vec![
                TensorPlan { name: format!("{base}.codes"), ty: ty(n.ins[0], Elem::Quant(spec)) },
                TensorPlan { name: format!("{base}.scale"), ty: ty(n.ins[1], spec.scale.elem()) },
            ];
            if let Some(&z) = n.ins.get(2) {
                tensors.push(TensorPlan { name: format!("{base}.zero"), ty: ty(z, Elem::U8) });
            }
            let origin = stored.map_or(Origin::Value(id, root), Origin::Parts);
            Job { tensors, origin, parts: n.ins.clone() }
        }
        _ => {
            let tensors = vec![TensorPlan { name: base, ty: f.ty(root).clone() }];
            Job { tensors, origin: Origin::Value(id, root), parts: vec![root] }
        }
    }
}

/// The function with its roots replaced by weights of the new module.
fn with_weights(
    new: &Module,
    f: &Func,
    ids: &HashMap<ValueId, Vec<qrmc_ir::WeightId>>,
) -> Result<Func, Diag> {
    let mut map: HashMap<ValueId, ValueId> = HashMap::new();
    let mut b = Builder::new(new, &f.name);
    for &p in &f.params {
        map.insert(p, b.param(f.value(p).name.as_deref(), f.ty(p).clone()));
    }
    let derived = f.weight_derived();
    for node in &f.nodes {
        let is_derived = node.outs.iter().all(|o| derived[o.0 as usize]);
        if is_derived {
            for &o in &node.outs {
                let v = match (ids.get(&o), &node.op) {
                    (Some(ws), _) => match ws[..] {
                        [w] => b.weight(w),
                        _ => {
                            let parts: Vec<ValueId> = ws.iter().map(|w| b.weight(*w)).collect();
                            b.op1(Op::DCast, &parts)?
                        }
                    },
                    (None, Op::Const { .. }) => b.op1(node.op.clone(), &[])?,
                    (None, _) => continue,
                };
                map.insert(o, v);
            }
            continue;
        }
        let ins: Vec<ValueId> = node.ins.iter().map(|v| map[v]).collect();
        let outs = b.op(node.op.clone(), &ins)?;
        for (&o, v) in node.outs.iter().zip(outs) {
            map.insert(o, v);
            if let Some(name) = &f.value(o).name {
                b.name(v, name);
            }
        }
    }
    let results: Vec<ValueId> = f.results.iter().map(|r| map[r]).collect();
    Ok(b.finish(&results))
}

impl Materialized {
    /// The tensors in the order in which [`Materialized::run`] gives them.
    pub fn tensors(&self) -> Vec<TensorPlan> {
        self.jobs.iter().flat_map(|j| j.tensors.clone()).collect()
    }

    /// Bytes of the largest set of tensors that exists at one time while running, as 32-bit floats and codes. `owned`
    /// says whether the source gives out copies, as it must where it stores another type than it declares.
    pub fn peak_bytes(&self, owned: bool) -> u64 {
        let elements =
            |j: &Job| j.tensors[0].ty.shape.as_fixed().map_or(0, |s| s.iter().product::<usize>()) as u64;
        let of = |j: &Job| match j.origin {
            Origin::Copy(_) if owned => j.tensors[0].bytes(),
            Origin::Copy(_) => 0,
            Origin::Parts(_) => elements(j) + j.tensors.iter().map(TensorPlan::bytes).sum::<u64>(),
            // The stored weight, its float form, one temporary of each of rounding's steps, codes and their packing.
            _ if j.tensors.len() > 1 => elements(j) * (if owned { 4 } else { 2 } + 4 * 4 + 1 + 1),
            _ => elements(j) * (2 + 2 * 4 + 4),
        };
        self.jobs.iter().map(of).max().unwrap_or(0)
    }

    /// Computes every tensor and hands its bytes to `put`, one weight at a time.
    ///
    /// # Errors
    /// If a value cannot be computed, is not finite, or `put` fails.
    pub fn run(
        &self,
        engine: &dyn Engine,
        weights: &dyn WeightSource,
        put: &mut Put<'_>,
    ) -> Result<Vec<TensorLoss>, MaterializeError> {
        let mut losses = Vec::new();
        for job in &self.jobs {
            match &job.origin {
                Origin::Copy(name) => {
                    let raw = weights.raw(name).map_err(EngineError::from)?;
                    if let Some(at) = raw.ty.elem.find_non_finite(&raw.bytes) {
                        let why = format!("element {at} is NaN or infinite; the checkpoint is damaged");
                        return Err(MaterializeError::Value { name: name.clone(), why });
                    }
                    put(&job.tensors[0], &raw.bytes)?;
                }
                Origin::Parts(names) => {
                    for (name, plan) in names.iter().zip(&job.tensors) {
                        if matches!(plan.ty.elem, Elem::Quant(_)) {
                            put(plan, &weights.raw(name).map_err(EngineError::from)?.bytes)?;
                            continue;
                        }
                        let t = weights.read(name).map_err(EngineError::from)?;
                        let bytes = stored_bytes(&t, &plan.ty)
                            .map_err(|why| MaterializeError::Value { name: plan.name.clone(), why })?;
                        put(plan, &bytes)?;
                    }
                }
                Origin::Value(f, root) => {
                    let quantized = job.tensors.len() > 1;
                    let func = evaluation(&self.old, self.old.func(*f), *root, &job.parts, quantized)?;
                    let mut results = engine.run(&self.old, &func, weights, &[])?;
                    if quantized {
                        let value = |t: Option<Tensor>| {
                            t.and_then(|t| t.as_f32().and_then(|v| v.first().copied())).map_or(0.0, f64::from)
                        };
                        let (size, error) = (value(results.pop()), value(results.pop()));
                        let relative = if size > 0.0 { (error / size).sqrt() } else { 0.0 };
                        losses.push(TensorLoss { name: job.tensors[0].name.clone(), relative });
                    }
                    for (t, plan) in results.iter().zip(&job.tensors) {
                        let bytes = stored_bytes(t, &plan.ty)
                            .map_err(|why| MaterializeError::Value { name: plan.name.clone(), why })?;
                        put(plan, &bytes)?;
                    }
                }
            }
        }
        Ok(losses)
    }
}

/// A function without parameters that gives the parts of a root and, for a quantized one, the sums of the squares of
/// the rounding error and of the weight.
fn evaluation(
    module: &Module,
    f: &Func,
    root: ValueId,
    parts: &[ValueId],
    quantized: bool,
) -> Result<Func, Diag> {
    if !quantized {
        return extract(module, f, "materialize", &[], parts);
    }
    let codes = f.def_node(parts[0]);
    let source = codes.filter(|n| matches!(n.op, Op::QCast(_))).map(|n| n.ins[0]);
    let Some(source) = source else {
        return Err(Diag::new("Q0502", "codes that are not made by `qcast` cannot be computed"));
    };
    let mut wanted = parts.to_vec();
    wanted.extend([root, float_weight(f, source)]);
    let base = extract(module, f, "materialize", &[], &wanted)?;
    let n = parts.len();
    // Rebuilt with the sums in the place of the two float matrices.
    let mut results = base.results.clone();
    let (value, weight) = (results[n], results[n + 1]);
    results.truncate(n);
    let mut b = Builder::new(module, "materialize");
    let mut map: HashMap<ValueId, ValueId> = HashMap::new();
    for node in &base.nodes {
        let ins: Vec<ValueId> = node.ins.iter().map(|v| map[v]).collect();
        let outs = match node.op {
            Op::Weight(w) => vec![b.weight(w)],
            _ => b.op(node.op.clone(), &ins)?,
        };
        map.extend(node.outs.iter().copied().zip(outs));
    }
    let mut out: Vec<ValueId> = results.iter().map(|r| map[r]).collect();
    let (value, weight) = (map[&value], map[&weight]);
    let d = b.binary(BinaryOp::Sub, value, weight)?;
    for x in [d, weight] {
        let mut y = b.binary(BinaryOp::Mul, x, x)?;
        for axis in (0..b.ty(y).shape.rank()).rev() {
            y = b.op1(Op::Reduce(ReduceOp::Sum, axis as u8), &[y])?;
        }
        out.push(y);
    }
    Ok(b.finish(&out))
}

/// The weight before clips: what rounding should come near to.
fn float_weight(f: &Func, v: ValueId) -> ValueId {
    match f.def_node(v) {
        Some(n) if matches!(n.op, Op::Clip(_) | Op::ClipRange(_)) => n.ins[0],
        _ => v,
    }
}
