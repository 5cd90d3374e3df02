//! Kernels that go over the same rows one after another become one that does all of it for a few rows, and then for the
//! next: what is between them stays in the cache of a core, and threads meet once.

use std::collections::HashMap;

use qrmc_ir::{Dim, Elem, Func, Grain, Op, Sym, TensorType, ValueId};

use super::fuse::Fused;
use crate::kernel::{Kernel, RowStep};
use crate::program::Size;
use crate::target::Target;

/// Joins neighbours that compute by rows. `alias` gives the value whose memory a value shares, which says what is the same
/// under another shape.
pub(super) fn joined(func: &Func, kernels: Vec<Fused>, alias: &[ValueId], target: &dyn Target) -> Vec<Fused> {
    let lives = Lives::of(func, &kernels, alias);
    let joins: Vec<bool> = kernels.iter().map(|k| by_rows(func, k, target)).collect();
    let mut out = Vec::new();
    let mut kernels: Vec<Option<Fused>> = kernels.into_iter().map(Some).collect();
    let mut from = 0;
    while from < kernels.len() {
        let mut to = from + 1;
        while joins[from] && to < kernels.len() && joins[to] && lives.pays(from, to + 1) {
            to += 1;
        }
        let run: Vec<Fused> = kernels[from..to].iter_mut().filter_map(Option::take).collect();
        if run.len() == 1 {
            out.extend(run);
        } else {
            out.push(join(func, run, to - 1, &lives));
        }
        from = to;
    }
    out
}

/// When values are in memory.
struct Lives<'a> {
    func: &'a Func,
    alias: &'a [ValueId],
    /// The first kernel that writes a value, or else reads it, and the last that reads it.
    span: HashMap<ValueId, (usize, usize)>,
}

impl<'a> Lives<'a> {
    fn of(func: &'a Func, kernels: &[Fused], alias: &'a [ValueId]) -> Self {
        let mut span: HashMap<ValueId, (usize, usize)> = HashMap::new();
        for (n, k) in kernels.iter().enumerate() {
            for v in k.ins.iter().chain(&k.outs) {
                span.entry(alias[v.0 as usize]).or_insert((n, n)).1 = n;
            }
        }
        for r in &func.results {
            span.entry(alias[r.0 as usize]).or_insert((0, 0)).1 = usize::MAX;
        }
        Lives { func, alias, span }
    }

    fn root(&self, v: ValueId) -> ValueId {
        self.alias[v.0 as usize]
    }

    /// Whether the kernels `from..to` need little more memory as one than they need one by one.
    fn pays(&self, from: usize, to: usize) -> bool {
        let (mut at_once, mut one_by_one) = (0, vec![0; to - from]);
        for (v, &(first, last)) in &self.span {
            if first >= to || last < from {
                continue;
            }
            let ty = self.func.ty(*v);
            // Other sizes than those of rows are constants.
            let Some(bytes) = row_bytes(ty) else { continue };
            for (n, sum) in one_by_one.iter_mut().enumerate() {
                if first <= from + n && from + n <= last {
                    *sum += bytes;
                }
            }
            if first < from || last >= to || ty.elem != Elem::F32 {
                at_once += bytes;
            }
        }
        let most = one_by_one.into_iter().max().unwrap_or(0);
        at_once <= most + most / 4
    }
}

/// Bytes of a row of `[B, S, ..]`.
fn row_bytes(ty: &TensorType) -> Option<usize> {
    if !ty.shape.0.starts_with(&ROWS) {
        return None;
    }
    let bytes = if ty.elem.is_float() { 4 } else { 1 };
    Some(bytes * Size::of(&ty.shape).at(&qrmc_ir::DimEnv { batch: 1, seq: 1, past: 0 }))
}

/// The dimensions that tell rows apart.
const ROWS: [Dim; 2] = [Dim::Sym(Sym::B), Dim::Sym(Sym::S)];

/// Whether a kernel computes each row by itself.
fn by_rows(func: &Func, k: &Fused, target: &dyn Target) -> bool {
    let ins: Vec<&TensorType> = k.ins.iter().map(|&v| func.ty(v)).collect();
    let kernel = match &k.kernel {
        Kernel::Map { .. } => true,
        Kernel::Quantize(spec, _) => matches!(spec.grain, Grain::Group(_) | Grain::Token),
        Kernel::Op(op) => target.by_rows(op, &ins),
        _ => false,
    };
    let rows = |ty: &TensorType| ty.shape.0.starts_with(&ROWS);
    let fixed = |ty: &TensorType| ty.shape.0.iter().all(|d| matches!(d, Dim::Fixed(_)));
    // Positions are a number for each row.
    let positions = |i: usize| i == 1 && matches!(k.kernel, Kernel::Op(Op::Rope(_)));
    kernel
        && k.outs.iter().all(|&v| rows(func.ty(v)))
        && ins.iter().enumerate().all(|(i, ty)| rows(ty) || fixed(ty) || positions(i))
}

/// One kernel of several, the last of which is number `last`.
fn join(func: &Func, run: Vec<Fused>, last: usize, lives: &Lives<'_>) -> Fused {
    let made: Vec<ValueId> = run.iter().flat_map(|k| &k.outs).map(|&v| lives.root(v)).collect();
    let mut ins: Vec<ValueId> = Vec::new();
    for &v in run.iter().flat_map(|k| &k.ins) {
        if !made.contains(&lives.root(v)) && !ins.contains(&v) {
            ins.push(v);
        }
    }
    let number = |v: ValueId| {
        let inside = made.iter().position(|&m| m == lives.root(v)).map(|at| ins.len() + at);
        inside.or_else(|| ins.iter().position(|&i| i == v)).unwrap_or_else(|| unreachable!("made or read"))
    };
    let mut steps = Vec::new();
    let (mut outs, mut leaving) = (Vec::new(), Vec::new());
    for k in &run {
        for &v in &k.outs {
            let until = lives.span.get(&lives.root(v)).map_or(0, |s| s.1);
            if until > last || func.ty(v).elem != Elem::F32 {
                leaving.push(number(v));
                outs.push(v);
            }
        }
    }
    for k in run {
        let arg = |&v: &ValueId| (number(v), func.ty(v).clone());
        steps.push(RowStep {
            ins: k.ins.iter().map(arg).collect(),
            outs: k.outs.iter().map(|&v| func.ty(v).clone()).collect(),
            kernel: k.kernel,
        });
    }
    Fused { kernel: Kernel::Rows { ins: ins.len(), steps, outs: leaving }, ins, outs }
}
