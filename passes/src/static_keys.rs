//! `static-keys`: KVQuant*'s keys, quantized before their positions are in them, with one static scale a channel
//! (methods.md §6.1).

use qrmc_ir::grid::qparam;
use qrmc_ir::{
    BinaryOp, Builder, Diag, Func, FuncId, Grain, Module, Op, QuantSpec, ReduceOp, Rule, Tensor, TensorType,
    UnaryOp, ValueId, rewrite,
};

use crate::calibrate::{LayerResult, LayerRun, Stream, observe, walk_layers};
use crate::edges::caches;
use crate::options::{CacheBits, OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::skip::Skip;
use crate::smooth::widen;
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

/// The pass.
pub(crate) struct StaticKeys(pub(crate) StaticKeysOptions);

impl Pass for StaticKeys {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "static-keys",
            summary: "quantize keys before their positions are in them, one static scale a channel (KVQuant*)",
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
        let o = &self.0;
        let skip = o.skip.on(&unit.module)?;
        let name = self.call().to_string();
        let spec = QuantSpec::asym(o.bits.0, Grain::Channel);
        let mut work = |unit: &Unit, cx: &mut PassCx<'_>, run: &LayerRun<'_>| {
            let left_alone = skip.layer(run.index);
            measure(o.pre_bias, left_alone, spec, unit, cx, run)
        };
        let apply =
            |unit: &mut Unit, func: FuncId, result: LayerResult| insert(o.pre_bias, spec, unit, func, result);
        walk_layers(unit, cx, (&name, Stream::Before), &mut work, &mut |u, f, r, _| apply(u, f, r))
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

/// `@ends(x [B, S, n]) -> max [1, 1, n], max of -x [1, 1, n]`
fn ends(module: &Module, ty: &TensorType) -> Result<Func, Diag> {
    let mut b = Builder::new(module, "ends");
    let x = b.param(Some("x"), ty.clone());
    let low = b.op1(Op::Unary(UnaryOp::Neg), &[x])?;
    let mut outs = [x, low];
    for v in &mut outs {
        for axis in (0..b.ty(*v).shape.rank().saturating_sub(1)).rev() {
            *v = b.op1(Op::Reduce(ReduceOp::Max, axis as u8), &[*v])?;
        }
    }
    Ok(b.finish(&outs))
}

fn measure(
    pre_bias: bool,
    left_alone: bool,
    spec: QuantSpec,
    unit: &Unit,
    cx: &mut PassCx<'_>,
    run: &LayerRun<'_>,
) -> Result<(LayerResult, Vec<Tensor>), PassError> {
    let f = unit.module.func(run.func).clone();
    let k = keys(&f, pre_bias)?;
    let (values, next) = observe(unit, cx, run, &[k])?;
    if left_alone {
        return Ok((LayerResult::new(), next));
    }
    let func = cx.engine.prepare(&unit.module, &ends(&unit.module, f.ty(k))?, &unit.weights)?;
    let mut most = [Vec::new(), Vec::new()];
    for t in &values[0] {
        for (most, t) in most.iter_mut().zip(func.run(&[t])?) {
            widen(most, &t);
        }
    }
    let n = most[0].len();
    let (mut scale, mut zero) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for (max, low) in most[0].iter().zip(&most[1]) {
        let row = QuantSpec { grain: Grain::Token, ..spec };
        let q = qparam(&[*max, -*low], row, Rule::Dynamic);
        scale.push(q.scale);
        zero.push(q.zero as u8);
    }
    let zero = Tensor::new([n], qrmc_ir::Data::U8(zero));
    Ok((vec![("scale".into(), Tensor::f32([n], scale)), ("zero".into(), zero)], next))
}

fn insert(
    pre_bias: bool,
    spec: QuantSpec,
    unit: &mut Unit,
    func: FuncId,
    result: LayerResult,
) -> Result<(), PassError> {
    let [scale, zero] = &result[..] else { return Ok(()) };
    let name = unit.module.func(func).name.clone();
    let ids = [
        unit.define(&format!("{name}.keys.scale"), scale.1.clone())?,
        unit.define_integers(&format!("{name}.keys.zero"), zero.1.clone())?,
    ];
    let f = unit.module.func(func);
    let k = keys(f, pre_bias)?;
    let new = rewrite(&unit.module, f, |b, node, ins| {
        let Some(at) = node.outs.iter().position(|o| *o == k) else { return Ok(None) };
        let mut outs = b.op(node.op.clone(), ins)?;
        let sides = ids.map(|id| b.weight(id));
        let codes = b.op1(Op::QCast(spec), &[outs[at], sides[0], sides[1]])?;
        outs[at] = b.op1(Op::DCast, &[codes, sides[0], sides[1]])?;
        Ok(Some(outs))
    })?;
    unit.module.funcs[func.0 as usize] = new;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrmc_ir::grid::{dequantize, quantize};

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
