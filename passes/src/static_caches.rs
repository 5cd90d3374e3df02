//! `static-caches`: cached keys and values as signed codes with one calibrated scale a channel.

use qrmc_ir::grid::qparam;
use qrmc_ir::{
    Diag, Dim, Func, FuncId, Grain, Module, Op, Place, QuantSpec, Rule, ScaleType, Tensor, ValueId, rewrite,
};

use crate::calibrate::{LayerResult, LayerRun, Stream, observe, walk_layers};
use crate::edges::caches;
use crate::options::{CacheBits, OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::skip::{Skip, Skipped};
use crate::smooth::{absmax, widen};
use crate::unit::Unit;

options! {
    /// Options of `static-caches`.
    struct StaticCachesOptions {
        /// bits of a cached key or value
        bits: CacheBits = CacheBits(8),
        /// type in which scales are stored; loaders of static scales compute in it
        scale: ScaleType = ScaleType::BF16,
        /// layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

/// The pass.
pub(crate) struct StaticCaches(pub(crate) StaticCachesOptions);

impl StaticCachesOptions {
    fn spec(&self) -> QuantSpec {
        QuantSpec { scale: self.scale, ..QuantSpec::sym(self.bits.0, Grain::Channel) }
    }
}

impl Pass for StaticCaches {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "static-caches",
            summary: "quantize cached keys, behind their positions, and values by one calibrated scale a channel",
            preserves: Preserves::Exact,
            accepts: (Stage::Float, Stage::Rounded),
            calibrates: true,
            transforms: false,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn legal(&self, module: &Module) -> Result<(), Diag> {
        self.0.skip.on(module).map(|_| ())
    }

    fn run(&self, unit: &mut Unit, cx: &mut PassCx<'_>) -> Result<(), PassError> {
        let skip = self.0.skip.on(&unit.module)?;
        let (name, spec) = (self.call().to_string(), self.0.spec());
        let layers = unit.module.layers();
        for (index, &layer) in layers.iter().enumerate() {
            targets(unit.module.func(layer), &skip, index)?;
        }
        let mut work = |unit: &Unit, cx: &mut PassCx<'_>, run: &LayerRun<'_>| {
            measure(spec, &targets(unit.module.func(run.func), &skip, run.index)?, unit, cx, run)
        };
        let apply = |unit: &mut Unit, func: FuncId, result: LayerResult| {
            let index = layers.iter().position(|l| *l == func).unwrap_or(0);
            insert(spec, &targets(unit.module.func(func), &skip, index)?, unit, func, &result)
        };
        walk_layers(unit, cx, (&name, Stream::Before), &mut work, &mut |u, f, r, _| apply(u, f, r))
    }

    fn outline(&self, unit: &mut Unit) -> Result<(), PassError> {
        let skip = self.0.skip.on(&unit.module)?;
        for (index, func) in unit.module.layers().into_iter().enumerate() {
            let f = unit.module.func(func);
            let targets = targets(f, &skip, index)?;
            let width = |v: ValueId| f.ty(v).shape.last().and_then(Dim::fixed).unwrap_or(0);
            let result = targets.iter().map(|&(keys, v)| item(keys, vec![1.0; width(v)])).collect();
            insert(self.0.spec(), &targets, unit, func, &result)?;
        }
        Ok(())
    }
}

/// What is calibrated of a cache.
fn item(keys: bool, scales: Vec<f32>) -> (String, Tensor) {
    let what = if keys { "keys" } else { "values" };
    (format!("cached_{what}.scale"), Tensor::f32([scales.len()], scales))
}

/// The rows that a layer appends to its caches, and whether they are keys.
///
/// # Errors
/// If something rounds them already, or a part of them has learned ends of its range: calibrated scales would lose both.
fn targets(f: &Func, skip: &Skipped, index: usize) -> Result<Vec<(bool, ValueId)>, Diag> {
    if skip.layer(index) {
        return Ok(Vec::new());
    }
    let mut out = Vec::new();
    for c in caches(f) {
        let mut v = c.target;
        let rounded = loop {
            match f.def_node(v) {
                Some(n) if matches!(n.op, Op::FakeQuant(..) | Op::DCast) => break true,
                Some(n) if n.op == Op::Edge => break n.ins.len() > 1,
                Some(n)
                    if matches!(
                        n.op,
                        Op::Rope(_) | Op::Binary(_) | Op::Hadamard { .. } | Op::ModeMul { .. }
                    ) =>
                {
                    v = n.ins[0];
                }
                _ => break false,
            }
        };
        if rounded || c.target != c.new {
            let what = if c.keys { "keys" } else { "values" };
            let place = Place { func: Some(f.name.clone()), value: None, line: None };
            let m = format!("`static-caches`: the {what} of the layer are rounded already, or marked for it");
            return Err(Diag::new("Q0603", m)
                .at(place)
                .hint("leave out `static-keys`, `part-bias` and `affine` with kv, and put `static-caches` before `annotate`"));
        }
        out.push((c.keys, c.new));
    }
    Ok(out)
}

fn measure(
    spec: QuantSpec,
    targets: &[(bool, ValueId)],
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
) -> Result<(LayerResult, Vec<Tensor>), PassError> {
    let f = unit.module.func(run.func).clone();
    let wanted: Vec<ValueId> = targets.iter().map(|(_, v)| *v).collect();
    let (values, next) = observe(unit, cx, run, &wanted)?;
    let mut result = LayerResult::new();
    for (&(keys, v), batches) in targets.iter().zip(values) {
        let func = cx.engine.prepare(&unit.module, &absmax(&unit.module, f.ty(v))?, &unit.weights)?;
        let mut most = Vec::new();
        for t in &batches {
            widen(&mut most, &func.run(&[t])?[0]);
        }
        let scales = most.iter().map(|m| qparam(&[*m], spec, Rule::Dynamic).scale).collect();
        result.push(item(keys, scales));
    }
    Ok((result, next))
}

fn insert(
    spec: QuantSpec,
    targets: &[(bool, ValueId)],
    unit: &mut Unit,
    func: FuncId,
    result: &LayerResult,
) -> Result<(), PassError> {
    let name = unit.module.func(func).name.clone();
    let mut scales = Vec::new();
    for (item, scale) in result {
        scales.push(unit.define(&format!("{name}.{item}"), scale.clone())?);
    }
    let new = rewrite(&unit.module, unit.module.func(func), |b, node, ins| {
        let Op::CacheAppend = node.op else { return Ok(None) };
        let Some(at) = targets.iter().position(|(_, v)| *v == node.ins[1]) else { return Ok(None) };
        let scale = b.weight(scales[at]);
        let codes = b.op1(Op::QCast(spec), &[ins[1], scale])?;
        let row = b.op1(Op::DCast, &[codes, scale])?;
        b.op(Op::CacheAppend, &[ins[0], row]).map(Some)
    })?;
    unit.module.funcs[func.0 as usize] = new;
    Ok(())
}
