//! Functions become programs: large operations stay or expand as the target says, weight-derived values move into
//! an initialiser, epilogues fuse, and values share buffers.

mod cache;
mod fuse;
mod rows;

use std::collections::{HashMap, HashSet};

use qrmc_ir::{
    Diag, Elem, Func, Grain, Module, Node, Op, Place, QuantSpec, TensorType, ValueId, Verified, expand,
    extract, infer, rewrite,
};

use crate::kernel::Kernel;
use crate::program::{Arg, Buffer, Const, Layout, Program, Size, Step};
use crate::target::{Legality, Target};
use cache::Cached;
use fuse::Fused;

/// Lowers every function of a verified module.
///
/// # Errors
/// What the target refuses, with the place.
pub fn lower(module: Verified<'_>, target: &dyn Target) -> Result<Vec<Program>, Diag> {
    let module = module.module();
    module.funcs.iter().map(|f| lower_func(module, f, target)).collect()
}

/// Lowers one function, which need not be part of the module whose weights and functions it uses.
///
/// # Errors
/// If the function breaks a type rule (`Q01..`), or an operation is one that the target refuses (`Q0501`).
pub fn lower_func(module: &Module, func: &Func, target: &dyn Target) -> Result<Program, Diag> {
    check_types(module, func)?;
    let legal = open_casts(module, &legalize(module, func, target)?, target)?;
    // Expansion may read weights in another order; what callers bind is the order of the function that they gave.
    let order = weight_order(&qrmc_ir::prune(func));
    let derived = legal.weight_derived();
    // Without parameters there is nothing to prepare for: all of it runs once.
    let hoist = !legal.params.is_empty();
    let derived = if hoist { derived } else { vec![false; legal.value_count()] };
    let kernels = fuse::kernels(&legal, |v| derived[v.0 as usize] || legal.as_weight(v).is_some(), target);
    let alias = reshaped(&legal);
    let kernels = rows::joined(&legal, kernels, &alias, target);
    let mut l = Lowering {
        func: &legal,
        derived,
        args: HashMap::new(),
        weights: order.clone(),
        derived_roots: Vec::new(),
        tiled: tiled(&kernels),
        program: Program {
            name: func.name.clone(),
            params: legal.params.iter().map(|&p| legal.ty(p).clone()).collect(),
            weights: Vec::new(),
            init: None,
            consts: Vec::new(),
            buffers: Vec::new(),
            steps: Vec::new(),
            results: Vec::new(),
        },
        plan: Plan::of(&legal, &kernels, alias),
    };
    l.program.weights = l.weights.iter().map(|(_, ty)| ty.clone()).collect();
    l.run(kernels);
    let roots = std::mem::take(&mut l.derived_roots);
    let mut program = l.program;
    if !roots.is_empty() {
        // The initialiser sees the same weights in the same order, used or not.
        let f = extract(module, &legal, &format!("{}.init", func.name), &[], &roots)?;
        let mut init = lower_func(module, &f, target)?;
        renumber_weights(&mut init, &weight_order(&qrmc_ir::prune(&f)), &order);
        init.weights.clone_from(&program.weights);
        program.init = Some(Box::new(init));
    }
    Ok(program)
}

/// The weights of a function in the order of first use. On a pruned function, this is what the weight indices of its
/// program mean.
pub fn weight_order(func: &Func) -> Vec<(qrmc_ir::WeightId, TensorType)> {
    let mut order: Vec<(qrmc_ir::WeightId, TensorType)> = Vec::new();
    for node in &func.nodes {
        if let Op::Weight(w) = node.op
            && !order.iter().any(|(o, _)| *o == w)
        {
            order.push((w, func.ty(node.outs[0]).clone()));
        }
    }
    order
}

fn renumber_weights(
    program: &mut Program,
    from: &[(qrmc_ir::WeightId, TensorType)],
    to: &[(qrmc_ir::WeightId, TensorType)],
) {
    let map = |i: &mut u32| {
        let id = from[*i as usize].0;
        *i = to.iter().position(|(w, _)| *w == id).unwrap_or(0) as u32;
    };
    for (c, _) in &mut program.consts {
        match c {
            Const::Weight(w) => map(w),
            Const::Packed { codes, scale, zero, .. } => {
                map(codes);
                map(scale);
                zero.iter_mut().for_each(map);
            }
            Const::Derived(_) => {}
        }
    }
}

fn check_types(module: &Module, func: &Func) -> Result<(), Diag> {
    for node in &func.nodes {
        let ins: Vec<&TensorType> = node.ins.iter().map(|&v| func.ty(v)).collect();
        let outs: Vec<&TensorType> = node.outs.iter().map(|&v| func.ty(v)).collect();
        let at = |d: Diag| d.at(place(func, node));
        if infer(module, &node.op, &ins).map_err(at)?.iter().collect::<Vec<_>>() != outs {
            return Err(at(Diag::new("Q0104", "recorded types differ from the operation's")));
        }
    }
    Ok(())
}

fn place(func: &Func, node: &Node) -> Place {
    let value = node.outs.first().map(|&o| func.show(o).to_string());
    Place { func: Some(func.name.clone()), value, line: None }
}

/// Expands what the target has no kernel for, until nothing changes.
fn legalize(module: &Module, func: &Func, target: &dyn Target) -> Result<Func, Diag> {
    let mut current = qrmc_ir::prune(func);
    loop {
        let mut changed = false;
        let next = rewrite(module, &current, |b, node, ins| {
            let in_tys: Vec<&TensorType> = node.ins.iter().map(|&v| current.ty(v)).collect();
            let out_tys: Vec<&TensorType> = node.outs.iter().map(|&v| current.ty(v)).collect();
            match target.legality(&node.op, &in_tys, &out_tys) {
                Legality::Native => Ok(None),
                Legality::Refuse(why) => {
                    let m = format!("target {} cannot run `{}`: {why}", target.name(), node.op.text().0);
                    Err(Diag::new("Q0501", m).at(place(&current, node)))
                }
                Legality::Expand => {
                    let outs = expand(b, &node.op, ins)?;
                    changed = true;
                    outs.map(Some).ok_or_else(|| {
                        let m = format!("target {} has no kernel for `{}`", target.name(), node.op.text().0);
                        Diag::new("Q0501", m).at(place(&current, node))
                    })
                }
            }
        })?;
        if !changed {
            return Ok(next);
        }
        current = next;
    }
}

/// Writes quantizers whose codes the target multiplies as what they mean: scales, codes, and values from both.
fn open_casts(module: &Module, func: &Func, target: &dyn Target) -> Result<Func, Diag> {
    let (users, derived) = (func.users(), func.weight_derived());
    let multiplied = |v: ValueId, spec: QuantSpec| {
        users[v.0 as usize].iter().map(|&u| &func.nodes[u]).any(|n| {
            n.op == Op::MatMul { trans_b: true }
                && n.ins[0] == v
                && fuse::packed(func, n.ins[1]).is_some_and(|w| target.multiplies(spec, w))
        })
    };
    let constant = |v: ValueId| derived[v.0 as usize] || func.as_weight(v).is_some();
    let kept: HashSet<ValueId> = func
        .nodes
        .iter()
        .filter_map(|n| Cached::of(func, n, &constant))
        .map(|c| func.nodes[c.cast].outs[0])
        .collect();
    rewrite(module, func, |b, node, ins| match node.op {
        Op::FakeQuant(spec, _) if !derived[node.outs[0].0 as usize] => {
            let (v, grouped) = (node.outs[0], matches!(spec.grain, Grain::Group(_) | Grain::Token));
            if multiplied(v, spec) || grouped && kept.contains(&v) {
                expand(b, &node.op, ins)
            } else {
                Ok(None)
            }
        }
        _ => Ok(None),
    })
}

/// Constants that only products with packed weights read.
fn tiled(kernels: &[Fused]) -> HashSet<ValueId> {
    let (mut multiplied, mut other) = (HashSet::new(), HashSet::new());
    for k in kernels {
        let weight = |i: usize| match &k.kernel {
            Kernel::Linear(parts) => parts.iter().any(|p| p.weight == i),
            _ => false,
        };
        for (i, &v) in k.ins.iter().enumerate() {
            if weight(i) { &mut multiplied } else { &mut other }.insert(v);
        }
    }
    multiplied.retain(|v| !other.contains(v));
    multiplied
}

/// For each value, the one that it is another shape of.
fn reshaped(func: &Func) -> Vec<ValueId> {
    let mut alias: Vec<ValueId> = func.value_ids().collect();
    for node in func.nodes.iter().filter(|n| matches!(n.op, Op::Reshape(_))) {
        alias[node.outs[0].0 as usize] = alias[node.ins[0].0 as usize];
    }
    alias
}

/// When buffers are free: for each value, the last kernel that reads it, and the value whose buffer it shares.
struct Plan {
    last_use: Vec<usize>,
    alias: Vec<ValueId>,
}

impl Plan {
    fn of(func: &Func, kernels: &[Fused], alias: Vec<ValueId>) -> Self {
        let mut last_use = vec![0; func.value_count()];
        for (n, kernel) in kernels.iter().enumerate() {
            for v in kernel.ins.iter().chain(&kernel.outs) {
                last_use[alias[v.0 as usize].0 as usize] = n;
            }
        }
        for r in &func.results {
            last_use[alias[r.0 as usize].0 as usize] = usize::MAX;
        }
        Plan { last_use, alias }
    }
}

struct Lowering<'a> {
    func: &'a Func,
    derived: Vec<bool>,
    args: HashMap<ValueId, Arg>,
    weights: Vec<(qrmc_ir::WeightId, TensorType)>,
    derived_roots: Vec<ValueId>,
    /// Constants that only products read.
    tiled: HashSet<ValueId>,
    program: Program,
    plan: Plan,
}

impl Lowering<'_> {
    fn run(&mut self, kernels: Vec<Fused>) {
        let func = self.func;
        for (i, &p) in func.params.iter().enumerate() {
            self.args.insert(p, Arg::Param(i as u32));
        }
        let mut busy: Vec<Option<usize>> = Vec::new();
        for (n, Fused { kernel, ins, outs }) in kernels.into_iter().enumerate() {
            let ins: Vec<(Arg, TensorType)> =
                ins.iter().map(|&v| (self.arg(v), func.ty(v).clone())).collect();
            let mut out_slots = Vec::new();
            // A longer cache needs no memory where the cache itself grows, so no other value counts on its buffer.
            let own = matches!(kernel, Kernel::CacheAppend(_) | Kernel::Op(Op::CacheAppend));
            for &o in &outs {
                let slot = self.buffer(o, own, &mut busy);
                self.args.insert(o, Arg::Buffer(slot));
                out_slots.push((slot, func.ty(o).clone()));
            }
            self.program.steps.push(Step { kernel, ins, outs: out_slots });
            // What was read for the last time here, or never, is free from the next step on.
            for b in &mut busy {
                if b.is_some_and(|last| last <= n) {
                    *b = None;
                }
            }
        }
        let results = func.results.clone();
        self.program.results = results.iter().map(|&r| (self.arg(r), func.ty(r).clone())).collect();
    }

    fn arg(&mut self, v: ValueId) -> Arg {
        if let Some(&a) = self.args.get(&v) {
            return a;
        }
        let c = match self.func.def_node(v) {
            Some(Node { op: Op::Reshape(_), ins, .. }) if !self.derived[v.0 as usize] => {
                let a = self.arg(ins[0]);
                self.args.insert(v, a);
                return a;
            }
            Some(Node { op: Op::Weight(w), .. }) => Const::Weight(self.weight_index(*w)),
            Some(Node { op: Op::DCast, ins, .. })
                if ins.iter().all(|&i| self.func.as_weight(i).is_some()) =>
            {
                let index = |i: &ValueId| self.func.as_weight(*i).map_or(0, |w| self.weight_index(w));
                let layout = if self.tiled.contains(&v) { Layout::Tiles } else { Layout::Rows };
                let (codes, scale, zero) = (index(&ins[0]), index(&ins[1]), ins.get(2).map(index));
                Const::Packed { layout, codes, scale, zero }
            }
            _ => {
                self.derived_roots.push(v);
                Const::Derived(self.derived_roots.len() as u32 - 1)
            }
        };
        let a = Arg::Const(self.program.consts.len() as u32);
        self.program.consts.push((c, self.func.ty(v).clone()));
        self.args.insert(v, a);
        a
    }

    fn weight_index(&self, w: qrmc_ir::WeightId) -> u32 {
        self.weights.iter().position(|(o, _)| *o == w).unwrap_or(0) as u32
    }

    fn buffer(&mut self, v: ValueId, own: bool, busy: &mut Vec<Option<usize>>) -> u32 {
        let size = Size::of(&self.func.ty(v).shape);
        let elem = host_elem(self.func.ty(v).elem);
        let until =
            if own { usize::MAX } else { self.plan.last_use[self.plan.alias[v.0 as usize].0 as usize] };
        let free = |want_same: bool| {
            self.program.buffers.iter().enumerate().position(|(i, b)| {
                busy[i].is_none() && b.elem == elem && (!want_same || b.sizes.contains(&size))
            })
        };
        let found = if own { None } else { free(true).or_else(|| free(false)) };
        let slot = found.unwrap_or_else(|| {
            self.program.buffers.push(Buffer { elem, sizes: Vec::new() });
            busy.push(None);
            self.program.buffers.len() - 1
        });
        busy[slot] = Some(until);
        let sizes = &mut self.program.buffers[slot].sizes;
        if !sizes.contains(&size) {
            sizes.push(size);
        }
        slot as u32
    }
}

/// The element type in which a value lives in host memory.
pub fn host_elem(elem: Elem) -> Elem {
    match elem {
        Elem::F16 | Elem::BF16 | Elem::F32 => Elem::F32,
        Elem::Quant(q) if q.signed => Elem::I8,
        Elem::Quant(_) => Elem::U8,
        other => other,
    }
}
