//! `static-keys`: KVQuant*'s keys, quantized before their positions are in them, with one static scale a channel
//! (methods.md §6.1).

use qrmc_ir::{BinaryOp, Diag, Func, FuncId, Grain, Module, Op, QuantSpec, ValueId, rewrite};

use crate::edges::caches;
use crate::options::{CacheBits, OptionValue, options};
use crate::pass::PassError;
use crate::skip::{Skip, Skipped};
use crate::static_scales::{Sides, StaticOptions, StaticScales, Target, round_trip};
use crate::unit::Unit;

options! {
    /// Options of `static-keys`.
    struct StaticKeysOptions {
        /// bits of a key
        bits: CacheBits = CacheBits(4),
        /// keep the bias of the key projection out: it is added after, exactly
        pre_bias: bool = true,
        /// layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

impl StaticOptions for StaticKeysOptions {
    const NAME: &'static str = "static-keys";
    const SUMMARY: &'static str =
        "quantize keys before their positions are in them, one static scale a channel (KVQuant*)";
    type Scales = Keys;

    fn values(&self) -> Vec<(String, OptionValue)> {
        self.write()
    }

    fn on(&self, module: &Module) -> Result<Keys, Diag> {
        let spec = QuantSpec::asym(self.bits.0, Grain::Channel);
        Ok(Keys { spec, pre_bias: self.pre_bias, skip: self.skip.on(module)? })
    }
}

/// The pass on a module.
pub(crate) struct Keys {
    spec: QuantSpec,
    pre_bias: bool,
    skip: Skipped,
}

impl StaticScales for Keys {
    fn spec(&self) -> QuantSpec {
        self.spec
    }

    fn targets(&self, unit: &Unit, layer: FuncId, index: usize) -> Result<Vec<Target>, PassError> {
        if self.skip.layer(index) {
            return Ok(Vec::new());
        }
        let value = keys(unit.module.func(layer), self.pre_bias)?;
        Ok(vec![Target { name: "keys".into(), value }])
    }

    fn insert(&self, unit: &Unit, layer: FuncId, index: usize, sides: &[Sides]) -> Result<Func, PassError> {
        let f = unit.module.func(layer);
        let targets = self.targets(unit, layer, index)?;
        let new = rewrite(&unit.module, f, |b, node, ins| {
            let made = |v: ValueId| node.outs.iter().position(|o| *o == v);
            let found = targets.iter().zip(sides).find_map(|(t, sides)| Some((made(t.value)?, sides)));
            let Some((at, sides)) = found else { return Ok(None) };
            let mut outs = b.op(node.op.clone(), ins)?;
            outs[at] = round_trip(b, self.spec, outs[at], sides)?;
            Ok(Some(outs))
        })?;
        Ok(new)
    }
}

/// The keys of a layer before their positions: what `rope` reads, without its bias if that stays out.
fn keys(f: &Func, pre_bias: bool) -> Result<ValueId, Diag> {
    let missing = |what: &str| {
        Diag::new("Q0603", format!("@{} has no {what}, where `static-keys` could quantize", f.name))
    };
    let cache = caches(f).into_iter().find(|c| c.keys).ok_or_else(|| missing("cache of keys"))?;
    let mut v = cache.target;
    let rope = loop {
        match f.def_node(v) {
            Some(n) if matches!(n.op, Op::Rope(_)) => break n.ins[0],
            Some(n) if matches!(n.op, Op::Hadamard { .. } | Op::ModeMul { .. } | Op::Edge) => v = n.ins[0],
            _ => return Err(missing("`rope` before its cache of keys")),
        }
    };
    let derived = f.weight_derived();
    Ok(match f.def_node(rope) {
        Some(n) if pre_bias && n.op == Op::Binary(BinaryOp::Add) && derived[n.ins[1].0 as usize] => n.ins[0],
        _ => rope,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrmc_ir::Rule;
    use qrmc_ir::grid::{dequantize, qparam, quantize};

    // methods.md §6.1 [golden].
    #[test]
    fn channels_golden() {
        let spec = QuantSpec::asym(4, Grain::Token);
        let columns = [[0.2f32, 0.8, -0.4], [-1.0, 3.0, 2.5]];
        let want = [(0.080_000_006f32, 5, [7, 15, 0]), (0.266_666_68, 4, [0, 15, 13])];
        for (column, (scale, zero, codes)) in columns.iter().zip(want) {
            let q = qparam(column, spec, Rule::Dynamic);
            assert_eq!((q.scale, q.zero), (scale, zero));
            assert_eq!(column.map(|x| quantize(x, q, spec)), codes);
        }
        let out: Vec<f32> = [(1.0f32, 0), (-1.2, 1)]
            .iter()
            .map(|&(x, c)| {
                let q = qparam(&columns[c], spec, Rule::Dynamic);
                dequantize(quantize(x, q, spec), q)
            })
            .collect();
        assert_eq!(out, [0.800_000_1, -1.066_666_7]);
    }
}
