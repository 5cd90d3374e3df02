//! The verifier: collects every fault of a module. Lowering demands its [`Verified`].

use std::collections::HashSet;

use crate::diag::{Diag, Place};
use crate::infer::infer;
use crate::module::{Def, Func, Module};
use crate::op::Op;
use crate::print::node_lines;
use crate::types::TensorType;

/// A module without faults. Only [`verify`] makes one.
#[derive(Clone, Copy, Debug)]
pub struct Verified<'m> {
    module: &'m Module,
}

impl<'m> Verified<'m> {
    /// The module.
    pub fn module(self) -> &'m Module {
        self.module
    }
}

/// Checks a module against every rule of the IR.
///
/// # Errors
/// All faults found, each with a stable code and the line of the text form.
pub fn verify(module: &Module) -> Result<Verified<'_>, Vec<Diag>> {
    let mut faults = Vec::new();
    let mut names = HashSet::new();
    for w in module.weights() {
        if let Some(d) = bad_type(&w.ty) {
            faults.push((None, d.at(Place { value: Some(format!("@{}", w.name)), ..Place::default() })));
        }
    }
    for (at, f) in module.funcs.iter().enumerate() {
        if !names.insert(&f.name) {
            let place = Place { func: Some(f.name.clone()), ..Place::default() };
            faults
                .push((None, Diag::new("Q0301", format!("function @{} is defined twice", f.name)).at(place)));
        }
        verify_func(module, at, f, &mut faults);
    }
    if faults.is_empty() {
        return Ok(Verified { module });
    }
    let lines = node_lines(module);
    Err(faults
        .into_iter()
        .map(|(at, mut d): (Option<(usize, usize)>, Diag)| {
            d.place.line = at.map(|(f, n)| lines[f][n]);
            d
        })
        .collect())
}

/// A declared type that no operation could have made.
fn bad_type(ty: &TensorType) -> Option<Diag> {
    let crate::Elem::Quant(q) = ty.elem else { return None };
    if !(2..=8).contains(&q.bits) {
        return Some(Diag::new("Q0201", format!("{} bits: codes have 2 to 8", q.bits)));
    }
    if q.signed == q.zero {
        return Some(Diag::new(
            "Q0204",
            format!("{q}: signed codes have no zero point, unsigned ones have one"),
        ));
    }
    let (g, dim) = q.scale_shape(&ty.shape).err()?;
    Some(Diag::new("Q0202", format!("groups of {g} do not divide the last axis, which is {dim} long")))
}

type Faults = Vec<(Option<(usize, usize)>, Diag)>;

fn verify_func(module: &Module, at: usize, f: &Func, faults: &mut Faults) {
    let mut names = HashSet::new();
    for &p in &f.params {
        if let Some(d) = bad_type(f.ty(p)) {
            let value = Some(f.show(p).to_string());
            faults.push((None, d.at(Place { func: Some(f.name.clone()), value, line: None })));
        }
    }
    for v in f.value_ids() {
        let value = f.value(v);
        if let Some(name) = &value.name {
            let node = match value.def {
                Def::Node(n, _) => Some((at, n as usize)),
                Def::Param(_) => None,
            };
            let place = Place { func: Some(f.name.clone()), value: Some(format!("%{name}")), line: None };
            if !names.insert(name) {
                faults
                    .push((node, Diag::new("Q0105", format!("%{name} is defined twice")).at(place.clone())));
            }
            if name.parse::<u64>().is_ok() || name.is_empty() {
                faults
                    .push((node, Diag::new("Q0108", format!("`{name}` is a number, not a name")).at(place)));
            }
        }
    }
    let mut defined = vec![false; f.value_count()];
    f.params.iter().for_each(|p| defined[p.0 as usize] = true);
    for (n, node) in f.nodes.iter().enumerate() {
        let place = Place {
            func: Some(f.name.clone()),
            value: node.outs.first().map(|&o| f.show(o).to_string()),
            line: None,
        };
        let mut fault = |d: Diag| faults.push((Some((at, n)), d.at(place.clone())));
        if let Some(v) = node.ins.iter().find(|v| !defined.get(v.0 as usize).copied().unwrap_or(false)) {
            fault(Diag::new("Q0101", format!("operand number {} is used but not defined before this", v.0)));
            node.outs.iter().for_each(|o| defined[o.0 as usize] = true);
            continue;
        }
        if let Op::Call(id) = node.op
            && id.0 as usize >= at
        {
            fault(Diag::new("Q0302", "a call to a function that is not defined before it"));
        }
        let ins: Vec<&TensorType> = node.ins.iter().map(|&v| f.ty(v)).collect();
        match infer(module, &node.op, &ins) {
            Err(d) => fault(d),
            Ok(want) => {
                let have: Vec<&TensorType> = node.outs.iter().map(|&o| f.ty(o)).collect();
                if have != want.iter().collect::<Vec<_>>() {
                    let show = |ts: Vec<&TensorType>| {
                        ts.iter().map(|t| t.to_string()).collect::<Vec<_>>().join(", ")
                    };
                    let (have, want) = (show(have), show(want.iter().collect()));
                    fault(Diag::new(
                        "Q0104",
                        format!("the result is recorded as {have}, the operation gives {want}"),
                    ));
                }
            }
        }
        node.outs.iter().for_each(|o| defined[o.0 as usize] = true);
    }
    for r in &f.results {
        if !defined.get(r.0 as usize).copied().unwrap_or(false) {
            let place = Place { func: Some(f.name.clone()), ..Place::default() };
            faults
                .push((None, Diag::new("Q0101", format!("result number {} is not defined", r.0)).at(place)));
        }
    }
}
