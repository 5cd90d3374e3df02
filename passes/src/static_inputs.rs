//! `static-inputs`: the inputs of linear layers as codes with one calibrated scale for the whole tensor.

use qrmc_ir::{Diag, Func, FuncId, Grain, Module, Op, Place, QuantSpec, ScaleType, ValueId, rewrite};

use crate::edges::{Linear, inputs, key, role};
use crate::options::{Bits, OptionValue, options};
use crate::pass::PassError;
use crate::skip::{Skip, Skipped};
use crate::static_scales::{Sides, StaticOptions, StaticScales, Target, round_trip};
use crate::unit::Unit;

options! {
    /// Options of `static-inputs`.
    struct StaticInputsOptions {
        /// bits of an input
        bits: Bits = Bits(8),
        /// signed codes without a zero point; else unsigned ones with one
        sym: bool = true,
        /// type in which scales are stored; loaders of static scales compute in it
        scale: ScaleType = ScaleType::BF16,
        /// layers and linear layers whose inputs stay as they are
        skip: Skip = Skip::default(),
    }
}

impl StaticOptions for StaticInputsOptions {
    const NAME: &'static str = "static-inputs";
    const SUMMARY: &'static str =
        "quantize each input of linear layers by one calibrated scale, from its ends on the calibration text";
    type Scales = Inputs;

    fn values(&self) -> Vec<(String, OptionValue)> {
        self.write()
    }

    fn on(&self, module: &Module) -> Result<Inputs, Diag> {
        let spec = match self.sym {
            true => QuantSpec::sym(self.bits.0, Grain::Tensor),
            false => QuantSpec::asym(self.bits.0, Grain::Tensor),
        };
        let spec = QuantSpec { scale: self.scale, ..spec };
        Ok(Inputs { spec, skip: self.skip.on(module)? })
    }
}

/// The pass on a module.
pub(crate) struct Inputs {
    spec: QuantSpec,
    skip: Skipped,
}

impl StaticScales for Inputs {
    fn spec(&self) -> QuantSpec {
        self.spec
    }

    fn targets(&self, unit: &Unit, layer: FuncId, index: usize) -> Result<Vec<Target>, PassError> {
        let f = unit.module.func(layer);
        let read = self.read(&unit.module, f, index);
        plain(&unit.module, f, &read)?;
        let target = |(x, _): &(ValueId, _)| Target { name: key(f, *x), value: *x };
        Ok(read.iter().map(target).collect())
    }

    fn insert(&self, unit: &Unit, layer: FuncId, index: usize, sides: &[Sides]) -> Result<Func, PassError> {
        let f = unit.module.func(layer);
        let read = self.read(&unit.module, f, index);
        let mut done: Vec<Option<ValueId>> = vec![None; read.len()];
        let new = rewrite(&unit.module, f, |b, node, ins| {
            let reads = |(_, readers): &(ValueId, Vec<Linear>)| {
                readers.iter().any(|l| node.outs.first() == Some(&l.y))
            };
            let Some(at) = read.iter().position(reads) else { return Ok(None) };
            let x = match done[at] {
                Some(x) => x,
                None => *done[at].insert(round_trip(b, self.spec, ins[0], &sides[at])?),
            };
            Ok(Some(vec![b.linear(x, ins[1])?]))
        })?;
        Ok(new)
    }
}

impl Inputs {
    /// The values that get codes, in order, each with the linear layers that read them.
    fn read(&self, module: &Module, f: &Func, index: usize) -> Vec<(ValueId, Vec<Linear>)> {
        let mut out = inputs(f);
        for (_, readers) in &mut out {
            readers.retain(|l| !self.skip.linear(index, &role(module, f, l)));
        }
        out.retain(|(_, readers)| !readers.is_empty());
        out
    }
}

/// Refuses inputs that are rounded already, or whose range has learned ends: a calibrated scale would lose both.
fn plain(module: &Module, f: &Func, read: &[(ValueId, Vec<Linear>)]) -> Result<(), Diag> {
    for (x, readers) in read {
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
