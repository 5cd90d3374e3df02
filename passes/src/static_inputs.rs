//! `static-inputs`: the inputs of linear layers as signed codes with one calibrated scale for the whole tensor.

use qrmc_ir::grid::qparam;
use qrmc_ir::{
    Diag, Func, FuncId, Grain, Module, Op, Place, QuantSpec, Rule, ScaleType, Tensor, ValueId, rewrite,
};

use crate::calibrate::{LayerResult, LayerRun, Stream, observe, walk_layers};
use crate::edges::{Linear, inputs, key, role};
use crate::options::{Bits, OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::skip::{Skip, Skipped};
use crate::smooth::{absmax, widen};
use crate::unit::Unit;

options! {
    /// Options of `static-inputs`.
    struct StaticInputsOptions {
        /// bits of an input
        bits: Bits = Bits(8),
        /// type in which scales are stored; loaders of static scales compute in it
        scale: ScaleType = ScaleType::BF16,
        /// layers and linear layers whose inputs stay as they are
        skip: Skip = Skip::default(),
    }
}

/// The pass.
pub(crate) struct StaticInputs(pub(crate) StaticInputsOptions);

impl StaticInputsOptions {
    fn spec(&self) -> QuantSpec {
        QuantSpec { scale: self.scale, ..QuantSpec::sym(self.bits.0, Grain::Tensor) }
    }
}

impl Pass for StaticInputs {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "static-inputs",
            summary: "quantize each input of linear layers by one calibrated scale, from its largest magnitude",
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
            plain(&unit.module, layer, &targets(&unit.module, layer, &skip, index))?;
        }
        let mut work = |unit: &Unit, cx: &mut PassCx<'_>, run: &LayerRun<'_>| {
            measure(spec, &targets(&unit.module, run.func, &skip, run.index), unit, cx, run)
        };
        let apply = |unit: &mut Unit, func: FuncId, result: LayerResult| {
            let index = layers.iter().position(|l| *l == func).unwrap_or(0);
            insert(spec, &targets(&unit.module, func, &skip, index), unit, func, &result)
        };
        walk_layers(unit, cx, (&name, Stream::Before), &mut work, &mut |u, f, r, _| apply(u, f, r))
    }

    fn outline(&self, unit: &mut Unit) -> Result<(), PassError> {
        let skip = self.0.skip.on(&unit.module)?;
        for (index, func) in unit.module.layers().into_iter().enumerate() {
            let (f, targets) = (unit.module.func(func), targets(&unit.module, func, &skip, index));
            plain(&unit.module, func, &targets)?;
            let result = targets.iter().map(|(x, _)| item(f, *x, 1.0)).collect();
            insert(self.0.spec(), &targets, unit, func, &result)?;
        }
        Ok(())
    }
}

/// What is calibrated of an input.
fn item(f: &Func, x: ValueId, scale: f32) -> (String, Tensor) {
    (format!("{}.scale", key(f, x)), Tensor::f32([1], vec![scale]))
}

/// The values that get codes, in order, each with the linear layers that read them.
type Targets = Vec<(ValueId, Vec<Linear>)>;

fn targets(module: &Module, func: FuncId, skip: &Skipped, index: usize) -> Targets {
    let f = module.func(func);
    let mut out = inputs(f);
    for (_, readers) in &mut out {
        readers.retain(|l| !skip.linear(index, &role(module, f, l)));
    }
    out.retain(|(_, readers)| !readers.is_empty());
    out
}

/// Refuses inputs that are rounded already, or whose range has learned ends: a calibrated scale would lose both.
fn plain(module: &Module, func: FuncId, targets: &Targets) -> Result<(), Diag> {
    let f = module.func(func);
    for (x, readers) in targets {
        let (seen, hint) = match f.def_node(*x).map(|n| (&n.op, n.ins.len())) {
            Some((Op::FakeQuant(..) | Op::DCast, _)) => {
                ("is rounded already", "put `static-inputs` before `annotate`, or leave one of them out")
            }
            Some((Op::Edge, 2..)) => (
                "has learned ends of its range, which a calibrated scale has no place for",
                "give `affine` a=16, or leave `static-inputs` out",
            ),
            _ => continue,
        };
        let place = Place { func: Some(f.name.clone()), value: None, line: None };
        let roles: Vec<String> = readers.iter().map(|l| role(module, f, l)).collect();
        let m = format!("`static-inputs`: the input of {} {seen}", roles.join(", "));
        return Err(Diag::new("Q0603", m).at(place).hint(hint));
    }
    Ok(())
}

fn measure(
    spec: QuantSpec,
    targets: &Targets,
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
) -> Result<(LayerResult, Vec<Tensor>), PassError> {
    let f = unit.module.func(run.func).clone();
    let wanted: Vec<ValueId> = targets.iter().map(|(x, _)| *x).collect();
    let (values, next) = observe(unit, cx, run, &wanted)?;
    let mut result = LayerResult::new();
    for (x, batches) in wanted.iter().zip(values) {
        let func = cx.engine.prepare(&unit.module, &absmax(&unit.module, f.ty(*x))?, &unit.weights)?;
        let mut most = Vec::new();
        for t in &batches {
            widen(&mut most, &func.run(&[t])?[0]);
        }
        result.push(item(&f, *x, qparam(&most, spec, Rule::Dynamic).scale));
    }
    Ok((result, next))
}

fn insert(
    spec: QuantSpec,
    targets: &Targets,
    unit: &mut Unit,
    func: FuncId,
    result: &LayerResult,
) -> Result<(), PassError> {
    let name = unit.module.func(func).name.clone();
    let mut scales = Vec::new();
    for (item, scale) in result {
        scales.push(unit.define(&format!("{name}.{item}"), scale.clone())?);
    }
    let f = unit.module.func(func);
    let mut done: Vec<Option<ValueId>> = vec![None; targets.len()];
    let new = rewrite(&unit.module, f, |b, node, ins| {
        let reads =
            |(_, readers): &(ValueId, Vec<Linear>)| readers.iter().any(|l| node.outs.first() == Some(&l.y));
        let Some(at) = targets.iter().position(reads) else { return Ok(None) };
        let x = match done[at] {
            Some(x) => x,
            None => {
                let scale = b.weight(scales[at]);
                let codes = b.op1(Op::QCast(spec), &[ins[0], scale])?;
                *done[at].insert(b.op1(Op::DCast, &[codes, scale])?)
            }
        };
        Ok(Some(vec![b.linear(x, ins[1])?]))
    })?;
    unit.module.funcs[func.0 as usize] = new;
    Ok(())
}
