//! One layer: the inputs of its linear layers, one after another with everything before them rounded, and what is made
//! of them.

use std::sync::Arc;

use qrmc_ir::{
    Builder, Diag, Dim, Elem, Func, FuncId, Hash, Module, Op, Prepared, QuantSpec, Rule, Tensor, TensorType,
    ValueId, extract, rewrite, without_quantizers,
};

use super::GptqOptions;
use super::gram::{Gram, Panel};
use super::round::{Job, Shared};
use crate::calibrate::{LayerResult, LayerRun, NoStore, finite, rest_args};
use crate::edges::{Linear, linears, role, weight_behind};
use crate::pass::{PassCx, PassError};
use crate::unit::{Kept, Unit};

/// Inputs of a linear layer that are wider than the residual stream are kept for all windows only up to this size;
/// beyond it they are computed once more where they are needed. The values are the same.
const KEPT_BYTES: usize = 1 << 30;
/// By how much the share of damping grows after a factorization that failed (methods.md §4.1 step 4), how often, and
/// what it is multiplied by after that.
const RAISE: (f64, u32, f64) = (0.0015, 8, 2.0);

/// An annotated weight of a linear layer.
pub(super) struct Target {
    /// Which of the function's linear layers, by number.
    linear: usize,
    /// Unique in the function.
    pub(super) role: String,
    /// Name of the weight behind it.
    base: String,
    /// What is quantized.
    w: ValueId,
    /// The annotated value.
    pub(super) y: ValueId,
    spec: QuantSpec,
    rule: Rule,
}

/// The annotated weights of a layer in order.
pub(super) fn targets(module: &Module, f: &Func) -> Vec<Target> {
    let mut out: Vec<Target> = Vec::new();
    for (linear, l) in linears(f).iter().enumerate() {
        let Some((Op::FakeQuant(spec, rule), n)) = f.def_node(l.w).map(|n| (n.op.clone(), n)) else {
            continue;
        };
        if out.iter().any(|t| t.y == l.w) {
            continue;
        }
        let mut role = role(module, f, l);
        if out.iter().any(|t| t.role == role) {
            role = format!("{role}.{linear}");
        }
        let base =
            weight_behind(module, f, l.w).map(str::to_owned).unwrap_or_else(|| format!("{}.{role}", f.name));
        out.push(Target { linear, role, base, w: n.ins[0], y: l.w, spec, rule });
    }
    out
}

/// The targets with one input, in the order of the inputs.
fn groups(targets: &[Target], plain: &[Linear]) -> Result<Vec<Vec<usize>>, Diag> {
    let mut groups: Vec<(ValueId, Vec<usize>)> = Vec::new();
    for (i, t) in targets.iter().enumerate() {
        let lost = || Diag::new("Q0610", format!("{} is read by nothing", t.role));
        let x = plain.get(t.linear).ok_or_else(lost)?.x;
        match groups.iter_mut().find(|(y, _)| *y == x) {
            Some((_, list)) => list.push(i),
            None => groups.push((x, vec![i])),
        }
    }
    groups.sort_by_key(|(x, _)| *x);
    Ok(groups.into_iter().map(|(_, list)| list).collect())
}

/// A part of a layer, from values that are kept to one that is wanted.
struct Part {
    func: Box<dyn Prepared>,
    /// Operations in the products of its linear layers for one token.
    flops: f64,
    /// Which kept inputs it begins with.
    from: Vec<usize>,
}

/// The function of a part, and whether it reads each of the values that it was cut at.
fn cut(m: &Module, f: &Func, at: &[ValueId], wanted: ValueId) -> Result<(Func, Vec<bool>), Diag> {
    let all: Vec<ValueId> = f.params.iter().chain(at).copied().collect();
    let part = extract(m, f, "part", &all, &[wanted])?;
    let users = part.users();
    let params = &part.params[f.params.len()..];
    let read = params.iter().map(|p| !users[p.0 as usize].is_empty() || part.results.contains(p)).collect();
    Ok((part, read))
}

impl Part {
    /// `at`: the inputs that are kept, by number, as values of `f`.
    fn new(
        unit: &Unit,
        cx: &PassCx<'_>,
        f: &Func,
        at: &[(usize, ValueId)],
        wanted: ValueId,
    ) -> Result<Self, PassError> {
        let values: Vec<ValueId> = at.iter().map(|(_, v)| *v).collect();
        let (part, _) = cut(&unit.module, f, &values, wanted)?;
        let size = |l: &Linear| part.ty(l.w).shape.as_fixed().map_or(0, |s| s.iter().product::<usize>());
        let flops = linears(&part).iter().map(|l| 2.0 * size(l) as f64).sum();
        let func = cx.engine.prepare(&unit.module, &part, &unit.weights)?;
        Ok(Part { func, flops, from: at.iter().map(|(i, _)| *i).collect() })
    }

    /// The wanted value on batch `b`.
    fn run(
        &self,
        cx: &mut PassCx<'_>,
        unit: &Unit,
        stream: &Tensor,
        b: usize,
        kept: &[Vec<Tensor>],
    ) -> Result<Tensor, PassError> {
        if cx.report.interrupted() {
            return Err(PassError::Interrupted);
        }
        let rest = rest_args(unit, stream);
        let mut args = vec![stream, &rest[0], &rest[1], &rest[2]];
        args.extend(self.from.iter().map(|&i| &kept[i][b]));
        let tokens = (stream.shape()[0] * stream.shape()[1]) as f64;
        cx.report.flops("gptq", tokens * self.flops);
        Ok(self.func.run(&args)?.remove(0))
    }
}

/// Which inputs are kept, and the last part that reads each; part `groups.len()` is the one to the layer's result.
fn plan(
    m: &Module,
    f: &Func,
    xs: &[ValueId],
    run: &LayerRun<'_>,
) -> Result<(Vec<bool>, Vec<Option<usize>>), Diag> {
    let tokens: usize = run.stream.iter().map(|t| t.shape()[0] * t.shape()[1]).sum();
    let width = |v: ValueId| f.ty(v).shape.last().and_then(Dim::fixed).unwrap_or(0);
    let stream = width(f.params[0]);
    let keep: Vec<bool> =
        xs.iter().map(|&x| width(x) <= stream || tokens * width(x) * 4 <= KEPT_BYTES).collect();
    let mut last = vec![None; xs.len()];
    for part in 0..=xs.len() {
        let kept: Vec<usize> = (0..part).filter(|&i| keep[i]).collect();
        let at: Vec<ValueId> = kept.iter().map(|&i| xs[i]).collect();
        let wanted = xs.get(part).copied().unwrap_or(f.results[0]);
        let (_, read) = cut(m, f, &at, wanted)?;
        kept.iter().zip(read).filter(|(_, r)| *r).for_each(|(&i, _)| last[i] = Some(part));
    }
    Ok((keep, last))
}

/// Rounds the weights of a layer; gives the results by name, and the stream behind the rounded layer.
pub(super) fn work(
    o: &GptqOptions,
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
) -> Result<(LayerResult, Vec<Tensor>), PassError> {
    let mut local = unit.clone();
    let nothing = Kept { store: Arc::new(NoStore), key: Hash::of([]) };
    let first = unit.module.func(run.func);
    let targets = targets(&unit.module, first);
    let plain = without_quantizers(&unit.module, first, qrmc_ir::Identity::All)?;
    let groups = groups(&targets, &linears(&plain))?;
    let inputs = |f: &Func| -> Vec<ValueId> {
        let all = linears(f);
        groups.iter().map(|g| all[targets[g[0]].linear].x).collect()
    };
    let (keep, last) = plan(&unit.module, &plain, &inputs(&plain), run)?;
    let mut kept: Vec<Vec<Tensor>> = vec![Vec::new(); groups.len()];
    let mut result = LayerResult::new();
    let mut next = Vec::new();
    for part in 0..=groups.len() {
        // Weights of earlier groups are rounded here, those of later ones are floats.
        let now = without_quantizers(&local.module, local.module.func(run.func), qrmc_ir::Identity::All)?;
        let xs = inputs(&now);
        let at: Vec<(usize, ValueId)> =
            (0..part).filter(|&i| last[i].is_some_and(|l| l >= part)).map(|i| (i, xs[i])).collect();
        let wanted = xs.get(part).copied().unwrap_or(now.results[0]);
        let runner = Part::new(&local, cx, &now, &at, wanted)?;
        let Some(group) = groups.get(part) else {
            for (b, stream) in run.stream.iter().enumerate() {
                next.push(runner.run(cx, &local, stream, b, &kept)?);
            }
            break;
        };
        let mut sum = GramSum::new(&local, cx, now.ty(wanted), run)?;
        for (b, stream) in run.stream.iter().enumerate() {
            let x = runner.run(cx, &local, stream, b, &kept)?;
            sum.add(cx, &x)?;
            if keep[part] && last[part].is_some() {
                kept[part].push(x);
            }
        }
        drop(runner);
        kept.iter_mut().zip(&last).filter(|(_, l)| l.is_none_or(|l| l <= part)).for_each(|(k, _)| k.clear());
        let gram = sum.gram;
        let found =
            round_group(o, &local, cx, run, gram, &group.iter().map(|&i| &targets[i]).collect::<Vec<_>>())?;
        result.extend(found.iter().cloned());
        insert(&mut local, run.func, found, &nothing)?;
    }
    finite(unit, run.func, &next)?;
    Ok((result, next))
}

/// A Gram matrix that is being summed.
struct GramSum {
    gram: Gram,
    panels: Vec<(usize, Box<dyn Prepared>)>,
    factor: f64,
}

impl GramSum {
    fn new(unit: &Unit, cx: &PassCx<'_>, ty: &TensorType, run: &LayerRun<'_>) -> Result<Self, PassError> {
        let n = ty.shape.last().and_then(Dim::fixed).unwrap_or(0);
        // Only what stands above the diagonal is needed; wide panels leave more out, high ones are quicker.
        let step = (n / 4).next_multiple_of(64).clamp(256, 2048);
        let panels = (0..n).step_by(step).map(|from| {
            let func = panel(&unit.module, ty, n, from, step.min(n - from))?;
            Ok((from, cx.engine.prepare(&unit.module, &func, &unit.weights)?))
        });
        let sequences: usize = run.stream.iter().map(|t| t.shape()[0]).sum();
        let panels = panels.collect::<Result<_, PassError>>()?;
        Ok(GramSum { gram: Gram::new(n), panels, factor: 2.0 / sequences.max(1) as f64 })
    }

    fn add(&mut self, cx: &mut PassCx<'_>, x: &Tensor) -> Result<(), PassError> {
        for (from, func) in &self.panels {
            let t = func.run(&[x])?.remove(0);
            let (rows, width) = (t.shape()[0], t.shape()[1]);
            let data = t.as_f32().unwrap_or(&[]);
            self.gram.add(cx.engine, &Panel { from: *from, data }, self.factor);
            let tokens = x.len() / (from + width).max(1);
            cx.report.flops("gptq", 2.0 * (tokens * rows) as f64 * width as f64);
        }
        Ok(())
    }
}

/// `@panel(x [.., n]) -> [rows, n - from]`: rows `from..` of `xᵀ x`, from the diagonal on.
fn panel(m: &Module, ty: &TensorType, n: usize, from: usize, rows: usize) -> Result<Func, Diag> {
    let mut b = Builder::new(m, "panel");
    let x = b.param(Some("x"), ty.clone());
    let axis = (ty.shape.rank() - 1) as u8;
    let mut columns = |len: usize| match (from, len) {
        (0, len) if len == n => Ok(x),
        _ => b.op1(Op::Slice { axis, start: from as u64, len: len as u64 }, &[x]),
    };
    let (left, right) = (columns(rows)?, columns(n - from)?);
    let y = b.op1(Op::Outer, &[left, right])?;
    Ok(b.finish(&[y]))
}

/// Rounds weights that read the same input.
fn round_group(
    o: &GptqOptions,
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
    mut gram: Gram,
    targets: &[&Target],
) -> Result<LayerResult, PassError> {
    let n = gram.diag().len();
    let mut events = Vec::new();
    let overflow = !gram.is_finite();
    if overflow {
        // Nothing can be learnt from it; the loss is then that of the weights themselves.
        gram = Gram::new(n);
        events.push("squares of its inputs overflow on the calibration text".to_owned());
    }
    let dead = gram.take_dead();
    if !dead.is_empty() && !overflow {
        events.push(format!("{} of {n} inputs are 0 on every token", dead.len()));
    }
    let mut order: Vec<usize> = (0..n).collect();
    if o.order {
        order.sort_by(|&a, &b| gram.diag()[b].total_cmp(&gram.diag()[a]));
    }
    let damping = match overflow {
        true => None,
        false => factor(o, cx, &mut gram, &order, &mut events),
    };
    let mut result = LayerResult::new();
    for t in targets {
        let f = unit.module.func(run.func);
        let w = cx.run(unit, &extract(&unit.module, f, "weight", &[], &[operand(f, t)?])?, &[])?.remove(0);
        let scale_shape =
            t.spec.scale_shape(&qrmc_ir::Shape::fixed(w.shape())).ok().and_then(|s| s.as_fixed());
        let job = Job { w, spec: t.spec, rule: t.rule };
        let dead = if overflow { &[] } else { &dead[..] };
        let rounded = job.round(unit, cx, o, &Shared { gram: &gram, order: &order, dead, damping })?;
        let mut said = events.clone();
        if !rounded.moved {
            if damping.is_some() {
                said.push("moved errors overflow".into());
            }
            said.push("rounded to nearest".into());
        }
        if !said.is_empty() {
            let text = said.join("; ").into_bytes();
            result.push((format!("{}.event", t.role), Tensor::new([text.len()], qrmc_ir::Data::U8(text))));
        }
        result.extend(rounded.store(&t.role, t.spec, &scale_shape.unwrap_or_default()));
        cx.report.progress("gptq", run.index, run.total, &t.role);
    }
    Ok(result)
}

/// The value that is quantized, in a function where other weights may be rounded already.
fn operand(f: &Func, t: &Target) -> Result<ValueId, Diag> {
    let node = linears(f).get(t.linear).and_then(|l| f.def_node(l.w).cloned());
    match node {
        Some(n) if matches!(n.op, Op::FakeQuant(..)) => Ok(n.ins[0]),
        _ => Err(Diag::new("Q0610", format!("@{} has no annotated {}", f.name, t.role))),
    }
}

/// Factors the Gram matrix; gives what had to be added to its squares for that, `None` if nothing sensible was enough.
pub(super) fn factor(
    o: &GptqOptions,
    cx: &mut PassCx<'_>,
    gram: &mut Gram,
    order: &[usize],
    events: &mut Vec<String>,
) -> Option<f64> {
    let n = order.len();
    let mean = gram.diag().iter().sum::<f64>() / n.max(1) as f64;
    // What was added by earlier tries stays, and counts in the mean.
    let (mut total, mut share) = (0.0, o.damp);
    for tries in 0.. {
        total += share * (1.0 + total);
        if total >= 1.0 && tries > 0 {
            break;
        }
        cx.report.flops("gptq", 2.0 / 3.0 * (n * n) as f64 * n as f64);
        if gram.factor(cx.engine, order, total * mean) {
            if tries > 0 {
                events.push(format!("inputs depend on each other: damping raised to {total:.4}"));
            }
            return Some(total * mean);
        }
        share = if tries < RAISE.1 { share + RAISE.0 } else { share * RAISE.2 };
    }
    events.push("inputs depend on each other: no factors with a damping below 1".into());
    None
}

/// Puts codes, scales and zero points in the place of annotated weights.
pub(super) fn insert(
    unit: &mut Unit,
    func: FuncId,
    result: LayerResult,
    kept: &Kept,
) -> Result<(), PassError> {
    let targets = targets(&unit.module, unit.module.func(func));
    let mut new = Vec::new();
    let mut result: std::collections::HashMap<String, Tensor> = result.into_iter().collect();
    for t in &targets {
        let shape = unit.module.func(func).ty(t.w).shape.clone();
        let side = t.spec.scale_shape(&shape).unwrap_or_default();
        let types = [
            ("codes", TensorType { elem: Elem::Quant(t.spec), shape }),
            ("scale", TensorType { elem: Elem::F32, shape: side.clone() }),
            ("zero", TensorType { elem: Elem::U8, shape: side }),
        ];
        let mut parts = Vec::new();
        for (part, ty) in types {
            let item = format!("{}.{part}", t.role);
            if let Some(tensor) = result.remove(&item) {
                parts.push(unit.define_kept(&format!("{}.{part}", t.base), ty, (&item, tensor), kept)?);
            }
        }
        if !parts.is_empty() {
            new.push((t.y, parts));
        }
    }
    let m = &unit.module;
    let f = rewrite(m, m.func(func), |b, node, _| {
        let Some((_, parts)) = new.iter().find(|(y, _)| node.outs.contains(y)) else { return Ok(None) };
        let parts: Vec<ValueId> = parts.iter().map(|&w| b.weight(w)).collect();
        b.op(Op::DCast, &parts).map(Some)
    })?;
    unit.module.funcs[func.0 as usize] = f;
    Ok(())
}
