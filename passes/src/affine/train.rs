//! Trains the parameters of one layer.

use qrmc_ir::{Builder, Diag, Func, FuncId, Op, Prepared, Rule, Tensor, ValueId, WeightId, extract, rewrite};

use super::init::{CLIP, diagonal, draw};
use super::insert::{edges, layer as insert, parameters, trained};
use super::scope::Scope;
use super::{AffineOptions, Form, Products, find};
use crate::annotate::{AnnotateOptions, annotate};
use crate::calibrate::{LayerResult, LayerRun, observe};
use crate::edges::{Linear, linears, role, row_parallel};
use crate::grad::{GradOptions, grad};
use crate::options::Group;
use crate::pass::{PassCx, PassError};
use crate::place::{PlaceOptions, place};
use crate::scale::measure::{inline, squared_error};
use crate::skip::Skip;
use crate::smooth::magnitudes;
use crate::unit::Unit;

/// Learning rates end here.
const LAST_RATE: f64 = 5e-6;
/// AdamW as the published code has it.
const BETAS: (f64, f64) = (0.9, 0.999);
const EPSILON: f64 = 1e-8;
const DECAY: f64 = 0.01;

/// The trained parameters of a layer, with the loss before and after, and the stream behind the float layer.
pub(super) fn layer(
    o: &AffineOptions,
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
    before: usize,
) -> Result<(LayerResult, Vec<Tensor>), PassError> {
    let (mut values, next) = start(o, unit, cx, run, before)?;
    let mut student = unit.clone();
    let ids = insert(&mut student, run.func, o, &|name| find(&values, name))?;
    let coarse = cx.engine.coarse().filter(|_| o.products != Products::F32);
    let engine = coarse.unwrap_or(cx.engine);
    let steps = Steps::new(o, run.stream, &next)?;
    let mut parameters = Parameters::of(&ids, o, &values);
    // Where there is no unit for them, products of bfloat16 are the slower ones.
    let bf16 = coarse.is_some() && o.products == Products::Bf16;
    let (loss, gradient) = functions(&student, (run.func, run.index), o, &parameters, bf16)?;
    let loss = engine.prepare(&student.module, &loss, &student.weights)?;
    let gradient = engine.prepare(&student.module, &gradient, &student.weights)?;
    let size: f64 = next.iter().map(|t| t.as_f32().map_or(0.0, squares)).sum();
    let first = steps.total(&*loss, &parameters)? / size.max(f64::MIN_POSITIVE);
    let total = u64::from(o.epochs) * steps.pairs.len() as u64;
    for t in 0..total {
        if cx.report.interrupted() {
            return Err(PassError::Interrupted);
        }
        let at = (t % steps.pairs.len() as u64) as usize;
        let out = gradient.run(&steps.args(at, &parameters))?;
        let error = number(&out[0]);
        if !error.is_finite() {
            return Err(diverged(&student, run.func, t, total));
        }
        // The gradient of the logarithm of the loss.
        parameters.step(&out[1..], error.max(f64::MIN_POSITIVE), t, total);
    }
    let last = steps.total(&*loss, &parameters)? / size.max(f64::MIN_POSITIVE);
    if !last.is_finite() {
        return Err(diverged(&student, run.func, total, total));
    }
    for (name, tensor) in parameters.into_tensors() {
        if let Some(v) = values.iter_mut().find(|(n, _)| *n == name) {
            v.1 = tensor;
        }
    }
    values.push(("layer.loss".into(), Tensor::new([2], qrmc_ir::Data::F64(vec![first, last]))));
    Ok((values, next))
}

fn diverged(unit: &Unit, func: FuncId, step: u64, total: u64) -> PassError {
    PassError::Calibration {
        what: format!(
            "training @{} left the finite numbers in step {} of {total}",
            unit.module.func(func).name,
            step + 1
        ),
        hint: "lower lr and clip_lr, or look for calibration text with extreme activations".into(),
    }
}

fn squares(v: &[f32]) -> f64 {
    v.iter().map(|x| f64::from(*x) * f64::from(*x)).sum()
}

fn number(t: &Tensor) -> f64 {
    t.as_f32().and_then(|v| v.first().copied()).map_or(f64::NAN, f64::from)
}

/// First values of all parameters, and the stream behind the float layer.
fn start(
    o: &AffineOptions,
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
    before: usize,
) -> Result<(LayerResult, Vec<Tensor>), PassError> {
    let (m, f) = (&unit.module, unit.module.func(run.func).clone());
    let tp = u64::from(o.tp);
    let scope = Scope::of(m, run.func, o)?;
    let paired = |name: &str| name != "o_in" && scope.has(name);
    let edges: Vec<_> = edges(&f)?.into_iter().filter(|(name, ..)| paired(name)).collect();
    let wanted: Vec<ValueId> = edges.iter().map(|(_, x, _)| *x).collect();
    let (batches, next) = observe(unit, cx, run, &wanted)?;
    let mut values = draw(&m.facts, tp, o.seed, before, o.form == Form::Svd);
    values.retain(|(name, _)| scope.has(name));
    if o.form == Form::Svd {
        for (name, t) in values.clone().into_iter().filter(|(n, _)| !n.ends_with(".v")) {
            let mut s = t.shape().to_vec();
            values.push((format!("{name}.u_turn"), Tensor::zeros(s.clone())));
            values.push((format!("{name}.v_turn"), Tensor::zeros(s.clone())));
            // One row of singular values for each matrix.
            let rows = s.len() - 2;
            s[rows] = 1;
            let n = s.iter().product();
            values.push((format!("{name}.s"), Tensor::f32(s, vec![1.0; n])));
        }
    }
    for ((name, x, _), batches) in edges.iter().zip(batches).filter(|_| o.diag) {
        let readers: Vec<Linear> = linears(&f).into_iter().filter(|l| l.x == *x).collect();
        let (xmax, wmax) = magnitudes(unit, cx, &f, *x, &readers, &batches)?;
        let d = diagonal(&xmax, &wmax, o.alpha);
        values.push((format!("{name}.diag"), Tensor::f32([d.len()], d)));
    }
    let clip = |shape: Vec<usize>| {
        let n = shape.iter().product();
        Tensor::f32(shape, vec![CLIP; n])
    };
    let mut put = |name: &str, sides: &[&str], shape: Vec<usize>| {
        values.extend(sides.iter().map(|s| (format!("{name}.{s}"), clip(shape.clone()))));
    };
    for name in ["attn_in", "mlp_in", "keys", "values"].into_iter().filter(|n| scope.has(n)) {
        put(name, scope.clips(name), vec![1]);
    }
    for name in ["o_in", "down_in"].into_iter().filter(|n| scope.has(n)) {
        put(name, scope.clips(name), vec![tp as usize]);
    }
    for l in linears(&f).into_iter().filter(|l| scope.input(l.x)) {
        let rows = f.ty(l.w).shape.0[0].fixed().unwrap_or(0);
        let groups = if row_parallel(&f, l.x) { tp as usize } else { 1 };
        put(&role(m, &f, &l), &["hi", "lo"], vec![rows, groups]);
    }
    debug_assert!(parameters(m, &f, o, &scope).iter().all(|n| values.iter().any(|(v, _)| v == n)));
    Ok((values, next))
}

/// One trained tensor with the state of its optimizer.
struct Parameter {
    name: String,
    id: WeightId,
    tensor: Tensor,
    rate: f64,
    first: Vec<f64>,
    second: Vec<f64>,
}

struct Parameters(Vec<Parameter>);

impl Parameters {
    fn of(ids: &[(String, WeightId)], o: &AffineOptions, values: &LayerResult) -> Self {
        let mut list = Vec::new();
        for (name, tensor) in values.iter().filter(|(n, _)| trained(n, o.form)) {
            let Some((_, id)) = ids.iter().find(|(n, _)| n == name) else { continue };
            let clip = [".hi", ".lo", ".clip"].iter().any(|end| name.ends_with(end));
            let n = tensor.len();
            list.push(Parameter {
                name: name.clone(),
                id: *id,
                tensor: tensor.clone(),
                rate: if clip { o.clip_lr } else { o.lr },
                first: vec![0.0; n],
                second: vec![0.0; n],
            });
        }
        Parameters(list)
    }

    /// One step of AdamW on gradients divided by `scale`; rates fall along a cosine.
    fn step(&mut self, grads: &[Tensor], scale: f64, t: u64, total: u64) {
        let turn = (std::f64::consts::PI * t as f64 / total as f64).cos();
        let (b1, b2) = BETAS;
        let n = (t + 1) as i32;
        let (c1, c2) = (1.0 - b1.powi(n), 1.0 - b2.powi(n));
        for (p, g) in self.0.iter_mut().zip(grads) {
            let rate = LAST_RATE + (p.rate - LAST_RATE) * (1.0 + turn) / 2.0;
            let g = g.as_f32().unwrap_or(&[]);
            let mut v = p.tensor.as_f32().unwrap_or(&[]).to_vec();
            for (((x, g), m), s) in v.iter_mut().zip(g).zip(&mut p.first).zip(&mut p.second) {
                let g = f64::from(*g) / scale;
                *m = b1 * *m + (1.0 - b1) * g;
                *s = b2 * *s + (1.0 - b2) * g * g;
                let kept = f64::from(*x) * (1.0 - rate * DECAY);
                *x = (kept - rate * (*m / c1) / ((*s / c2).sqrt() + EPSILON)) as f32;
            }
            p.tensor = Tensor::f32(p.tensor.shape(), v);
        }
    }

    fn into_tensors(self) -> Vec<(String, Tensor)> {
        self.0.into_iter().map(|p| (p.name, p.tensor)).collect()
    }
}

/// `@loss(x, pos, parameters.., target) -> sum of squared errors`, and its gradient with respect to the parameters: the
/// layer as it will run, its transforms placed and its quantizers in place.
fn functions(
    unit: &Unit,
    (func, index): (FuncId, usize),
    o: &AffineOptions,
    parameters: &Parameters,
    bf16: bool,
) -> Result<(Func, Func), PassError> {
    let m = &unit.module;
    let placed = place(m, m.func(func), &PlaceOptions::default())?;
    let quantizers = AnnotateOptions {
        w: o.w,
        group: Group::Row,
        sym: true,
        rule: Rule::MinMax,
        a: o.a,
        a_sym: o.a_sym,
        kv: o.kv,
        wide: o.wide.clone(),
        tp: o.tp,
        ..AnnotateOptions::default()
    };
    let quantized = annotate(m, &placed, &quantizers, &Skip::default().resolve(m), index)?;
    // Caches hold nothing; stored weights are widened once.
    let derived = quantized.weight_derived();
    let f = rewrite(m, &quantized, |b, node, ins| match node.op {
        Op::CacheAppend => Ok(Some(vec![ins[1]])),
        Op::Weight(w) if derived[node.outs[0].0 as usize] && m.weight(w).ty.elem != qrmc_ir::Elem::F32 => {
            let w = b.weight(w);
            b.op(Op::Cast(qrmc_ir::Elem::F32), &[w]).map(Some)
        }
        _ => Ok(None),
    })?;
    let value_of = |p: &Parameter| {
        let at = f.value_ids().find(|v| f.as_weight(*v) == Some(p.id));
        at.ok_or_else(|| Diag::new("Q0609", format!("@{} does not read its parameter {}", f.name, p.name)))
    };
    let mut cut = vec![f.params[0], f.params[1]];
    for p in &parameters.0 {
        cut.push(value_of(p)?);
    }
    let student = extract(m, &f, "student", &cut, &f.results[..1])?;
    let mut b = Builder::new(m, "loss");
    let args: Vec<ValueId> = student.params.iter().map(|&p| b.param(None, student.ty(p).clone())).collect();
    let target = b.param(Some("target"), student.ty(student.results[0]).clone());
    let y = inline(&mut b, &student, &args)?[0];
    let sum = squared_error(&mut b, y, target)?;
    let loss = b.finish(&[sum]);
    let wrt: Vec<usize> = (2..2 + parameters.0.len()).collect();
    let gradient = grad(m, &loss, &wrt, &GradOptions { bf16 })?;
    Ok((loss, gradient))
}

/// The windows of batches, with their shapes.
fn windows(batches: &[Tensor]) -> Vec<([usize; 2], &[f32])> {
    let mut out = Vec::new();
    for t in batches {
        let (s, n) = (t.shape()[1], t.shape()[2]);
        out.extend(t.as_f32().unwrap_or(&[]).chunks((s * n).max(1)).map(|w| ([s, n], w)));
    }
    out
}

/// The inputs and targets of the steps of an epoch.
struct Steps {
    pairs: Vec<(Tensor, Tensor)>,
    pos: Vec<Tensor>,
}

impl Steps {
    fn new(o: &AffineOptions, stream: &[Tensor], next: &[Tensor]) -> Result<Self, PassError> {
        let mut pairs: Vec<(Tensor, Tensor)> = Vec::new();
        let (inputs, targets) = (windows(stream), windows(next));
        let mut at = 0;
        while at < inputs.len() {
            // A step takes windows of one length.
            let (shape, _) = inputs[at];
            let alike = inputs[at..].iter().take_while(|(s, _)| *s == shape).count();
            let count = alike.min(o.batch as usize);
            let join = |list: &[([usize; 2], &[f32])]| {
                let mut data = Vec::with_capacity(count * shape[0] * shape[1]);
                list.iter().for_each(|(_, w)| data.extend_from_slice(w));
                Tensor::f32([count, shape[0], shape[1]], data)
            };
            pairs.push((join(&inputs[at..at + count]), join(&targets[at..at + count])));
            at += count;
        }
        if pairs.is_empty() {
            return Err(PassError::Calibration {
                what: "there is no calibration window to train on".into(),
                hint: "give longer calibration text".into(),
            });
        }
        let pos = pairs.iter().map(|(x, _)| Tensor::i32([x.shape()[1]], (0..x.shape()[1] as i32).collect()));
        Ok(Steps { pos: pos.collect(), pairs })
    }

    fn args<'a>(&'a self, at: usize, parameters: &'a Parameters) -> Vec<&'a Tensor> {
        let (x, target) = &self.pairs[at];
        let mut args = vec![x, &self.pos[at]];
        args.extend(parameters.0.iter().map(|p| &p.tensor));
        args.push(target);
        args
    }

    fn total(&self, loss: &dyn Prepared, parameters: &Parameters) -> Result<f64, PassError> {
        let mut sum = 0.0;
        for at in 0..self.pairs.len() {
            sum += number(&loss.run(&self.args(at, parameters))?[0]);
        }
        Ok(sum)
    }
}
