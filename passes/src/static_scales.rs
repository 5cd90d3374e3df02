//! Codes with stored scales: the values of each layer that a pass names get scales, and zero points where the scheme has
//! them, from their ends on the calibration text.

use qrmc_ir::grid::{QParam, qparam};
use qrmc_ir::{
    Builder, Data, Diag, Dim, Func, FuncId, Grain, Module, Op, QuantSpec, Rule, Tensor, ValueId, WeightId,
};

use crate::calibrate::{LayerResult, LayerRun, Stream, observe, walk_layers};
use crate::options::OptionValue;
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::smooth::ends;
use crate::unit::Unit;

/// The options of a pass that gives values of each layer codes with stored scales.
pub(crate) trait StaticOptions {
    /// Name of the pass.
    const NAME: &'static str;
    /// What it does, in a line.
    const SUMMARY: &'static str;
    /// The pass on a module.
    type Scales: StaticScales;

    /// Every option with its value.
    fn values(&self) -> Vec<(String, OptionValue)>;

    /// # Errors
    /// If the module has no layer that is to be skipped.
    fn on(&self, module: &Module) -> Result<Self::Scales, Diag>;
}

/// A pass with these options.
pub(crate) struct StaticPass<O>(pub(crate) O);

impl<O: StaticOptions> Pass for StaticPass<O> {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: O::NAME,
            summary: O::SUMMARY,
            preserves: Preserves::Exact,
            accepts: (Stage::Float, Stage::Rounded),
            calibrates: true,
            transforms: false,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.values()
    }

    fn legal(&self, module: &Module) -> Result<(), Diag> {
        self.0.on(module).map(|_| ())
    }

    fn run(&self, unit: &mut Unit, cx: &mut PassCx<'_>) -> Result<(), PassError> {
        run(&self.0.on(&unit.module)?, &self.call().to_string(), unit, cx)
    }

    fn outline(&self, unit: &mut Unit) -> Result<(), PassError> {
        outline(&self.0.on(&unit.module)?, unit)
    }
}

/// A value that gets codes.
pub(crate) struct Target {
    /// What stands between the name of the layer and `scale` or `zero`.
    pub(crate) name: String,
    pub(crate) value: ValueId,
}

/// Which values get codes, and who reads them then.
pub(crate) trait StaticScales {
    /// One scale for the tensor, or one for each channel.
    fn spec(&self) -> QuantSpec;

    /// The values of a layer that get codes.
    ///
    /// # Errors
    /// If something rounds one of them already.
    fn targets(&self, unit: &Unit, layer: FuncId, index: usize) -> Result<Vec<Target>, PassError>;

    /// The layer with the values rounded; `sides` has the scale and zero point of each target.
    ///
    /// # Errors
    /// If the graph cannot say it.
    fn insert(&self, unit: &Unit, layer: FuncId, index: usize, sides: &[Sides]) -> Result<Func, PassError>;
}

/// A stored scale and, where the scheme has one, zero point.
pub(crate) type Sides = Vec<WeightId>;

/// `dcast(qcast(x))` by stored numbers.
pub(crate) fn round_trip(
    b: &mut Builder<'_>,
    spec: QuantSpec,
    x: ValueId,
    sides: &Sides,
) -> Result<ValueId, Diag> {
    let sides: Vec<ValueId> = sides.iter().map(|w| b.weight(*w)).collect();
    let codes = b.op1(Op::QCast(spec), &[&[x], &sides[..]].concat())?;
    b.op1(Op::DCast, &[&[codes], &sides[..]].concat())
}

/// Calibrates and inserts, a layer at a time. `name` is the pass in normal form.
///
/// # Errors
/// As [`StaticScales::targets`], before anything is calibrated; without calibration text; if running a layer fails.
fn run(what: &dyn StaticScales, name: &str, unit: &mut Unit, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    let layers = unit.module.layers();
    for (index, &layer) in layers.iter().enumerate() {
        what.targets(unit, layer, index)?;
    }
    let mut work = |unit: &Unit, cx: &mut PassCx<'_>, run: &LayerRun<'_>| measure(what, unit, cx, run);
    let apply = |unit: &mut Unit, layer: FuncId, result: LayerResult| {
        let index = layers.iter().position(|l| *l == layer).unwrap_or(0);
        insert(what, unit, layer, index, &result)
    };
    walk_layers(unit, cx, (name, Stream::Before), &mut work, &mut |u, f, r, _| apply(u, f, r))
}

/// Inserts scales of 1 and zero points of 1.
///
/// # Errors
/// As [`StaticScales::targets`].
fn outline(what: &dyn StaticScales, unit: &mut Unit) -> Result<(), PassError> {
    for (index, layer) in unit.module.layers().into_iter().enumerate() {
        let mut result = LayerResult::new();
        for t in what.targets(unit, layer, index)? {
            let shape = &unit.module.func(layer).ty(t.value).shape;
            let channels = shape.last().and_then(Dim::fixed).unwrap_or(0);
            let count = if what.spec().grain == Grain::Channel { channels } else { 1 };
            result.extend(items(&t, what.spec(), &vec![QParam { scale: 1.0, zero: 1 }; count]));
        }
        insert(what, unit, layer, index, &result)?;
    }
    Ok(())
}

/// What is calibrated of a value: scales `[1]` or `[n]`, and zero points of the same shape.
fn items(t: &Target, spec: QuantSpec, params: &[QParam]) -> Vec<(String, Tensor)> {
    let scale = Tensor::f32([params.len()], params.iter().map(|p| p.scale).collect());
    let zero = || Data::U8(params.iter().map(|p| p.zero as u8).collect());
    let mut out = vec![(format!("{}.scale", t.name), scale)];
    if spec.zero {
        out.push((format!("{}.zero", t.name), Tensor::new([params.len()], zero())));
    }
    out
}

fn measure(
    what: &dyn StaticScales,
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
) -> Result<(LayerResult, Vec<Tensor>), PassError> {
    let targets = what.targets(unit, run.func, run.index)?;
    let wanted: Vec<ValueId> = targets.iter().map(|t| t.value).collect();
    let (values, next) = observe(unit, cx, run, &wanted)?;
    let spec = what.spec();
    let mut result = LayerResult::new();
    for (t, batches) in targets.iter().zip(values) {
        let [max, min] = ends(unit, cx, unit.module.func(run.func).ty(t.value), &batches)?;
        let params: Vec<QParam> = match spec.grain {
            Grain::Channel => {
                max.iter().zip(&min).map(|(a, b)| qparam(&[*a, *b], spec, Rule::Dynamic)).collect()
            }
            _ => vec![qparam(&[max, min].concat(), spec, Rule::Dynamic)],
        };
        result.extend(items(t, spec, &params));
    }
    Ok((result, next))
}

fn insert(
    what: &dyn StaticScales,
    unit: &mut Unit,
    layer: FuncId,
    index: usize,
    result: &LayerResult,
) -> Result<(), PassError> {
    let name = unit.module.func(layer).name.clone();
    let mut sides: Vec<Sides> = Vec::new();
    for (item, tensor) in result {
        let name = format!("{name}.{item}");
        match (tensor.as_f32(), sides.last_mut()) {
            (None, Some(sides)) => sides.push(unit.define_integers(&name, tensor.clone())?),
            _ => sides.push(vec![unit.define(&name, tensor.clone())?]),
        }
    }
    let new = what.insert(unit, layer, index, &sides)?;
    unit.module.funcs[layer.0 as usize] = new;
    Ok(())
}
