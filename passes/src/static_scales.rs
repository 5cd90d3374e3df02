//! Codes with stored scales: the values of each layer that a pass names get scales from their largest magnitudes on the
//! calibration text.

use qrmc_ir::grid::qparam;
use qrmc_ir::{Builder, Diag, Func, FuncId, Grain, Op, QuantSpec, Rule, Tensor, ValueId, WeightId};

use crate::calibrate::{LayerResult, LayerRun, Stream, observe, walk_layers};
use crate::pass::{PassCx, PassError};
use crate::smooth::largest;
use crate::unit::Unit;

/// A value that gets codes.
pub(crate) struct Target {
    /// What its scales are called behind the name of the layer.
    pub(crate) name: String,
    pub(crate) value: ValueId,
}

/// Which values get codes, and who reads them then.
pub(crate) trait StaticScales {
    /// Signed codes, with a scale for the tensor or for each channel.
    fn spec(&self) -> QuantSpec;

    /// The values of a layer that get codes.
    ///
    /// # Errors
    /// If something rounds one of them already.
    fn targets(&self, unit: &Unit, layer: FuncId, index: usize) -> Result<Vec<Target>, PassError>;

    /// The layer with the values rounded by these scales, one of each target.
    ///
    /// # Errors
    /// If the graph cannot say it.
    fn insert(
        &self,
        unit: &Unit,
        layer: FuncId,
        index: usize,
        scales: &[WeightId],
    ) -> Result<Func, PassError>;
}

/// `dcast(qcast(x))` by a stored scale.
pub(crate) fn round_trip(
    b: &mut Builder<'_>,
    spec: QuantSpec,
    x: ValueId,
    scale: WeightId,
) -> Result<ValueId, Diag> {
    let scale = b.weight(scale);
    let codes = b.op1(Op::QCast(spec), &[x, scale])?;
    b.op1(Op::DCast, &[codes, scale])
}

/// Calibrates and inserts, a layer at a time. `name` is the pass in normal form.
///
/// # Errors
/// As [`StaticScales::targets`], before anything is calibrated; without calibration text; if running a layer fails.
pub(crate) fn run(
    what: &dyn StaticScales,
    name: &str,
    unit: &mut Unit,
    cx: &mut PassCx<'_>,
) -> Result<(), PassError> {
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

/// Inserts scales of 1.
///
/// # Errors
/// As [`StaticScales::targets`].
pub(crate) fn outline(what: &dyn StaticScales, unit: &mut Unit) -> Result<(), PassError> {
    for (index, layer) in unit.module.layers().into_iter().enumerate() {
        let mut result = LayerResult::new();
        for t in what.targets(unit, layer, index)? {
            let shape = &unit.module.func(layer).ty(t.value).shape;
            let channels = shape.last().and_then(qrmc_ir::Dim::fixed).unwrap_or(0);
            result.push(item(&t, vec![1.0; if what.spec().grain == Grain::Channel { channels } else { 1 }]));
        }
        insert(what, unit, layer, index, &result)?;
    }
    Ok(())
}

/// What is calibrated of a value.
fn item(t: &Target, scales: Vec<f32>) -> (String, Tensor) {
    (t.name.clone(), Tensor::f32([scales.len()], scales))
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
    let scale = |most: &[f32]| qparam(most, spec, Rule::Dynamic).scale;
    let mut result = LayerResult::new();
    for (t, batches) in targets.iter().zip(values) {
        let most = largest(unit, cx, unit.module.func(run.func).ty(t.value), &batches)?;
        let scales = match spec.grain {
            Grain::Channel => most.iter().map(|m| scale(&[*m])).collect(),
            _ => vec![scale(&most)],
        };
        result.push(item(t, scales));
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
    let mut scales = Vec::new();
    for (item, scale) in result {
        scales.push(unit.define(&format!("{name}.{item}"), scale.clone())?);
    }
    let new = what.insert(unit, layer, index, &scales)?;
    unit.module.funcs[layer.0 as usize] = new;
    Ok(())
}
