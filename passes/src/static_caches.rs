//! `static-caches`: cached keys and values as signed codes with one calibrated scale a channel.

use qrmc_ir::{Diag, Func, FuncId, Grain, Module, Op, Place, QuantSpec, ScaleType, ValueId, rewrite};

use crate::edges::caches;
use crate::options::{CacheBits, OptionValue, options};
use crate::pass::PassError;
use crate::skip::{Skip, Skipped};
use crate::static_scales::{Sides, StaticOptions, StaticScales, Target, round_trip};
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

impl StaticOptions for StaticCachesOptions {
    const NAME: &'static str = "static-caches";
    const SUMMARY: &'static str =
        "quantize cached keys, behind their positions, and values by one calibrated scale a channel";
    type Scales = Caches;

    fn values(&self) -> Vec<(String, OptionValue)> {
        self.write()
    }

    fn on(&self, module: &Module) -> Result<Caches, Diag> {
        let spec = QuantSpec { scale: self.scale, ..QuantSpec::sym(self.bits.0, Grain::Channel) };
        Ok(Caches { spec, skip: self.skip.on(module)? })
    }
}

/// The pass on a module.
pub(crate) struct Caches {
    spec: QuantSpec,
    skip: Skipped,
}

impl StaticScales for Caches {
    fn spec(&self) -> QuantSpec {
        self.spec
    }

    fn targets(&self, unit: &Unit, layer: FuncId, index: usize) -> Result<Vec<Target>, PassError> {
        let rows = appended(unit.module.func(layer), &self.skip, index)?;
        let name = |keys: bool| format!("cached_{}", if keys { "keys" } else { "values" });
        Ok(rows.into_iter().map(|(keys, value)| Target { name: name(keys), value }).collect())
    }

    fn insert(&self, unit: &Unit, layer: FuncId, index: usize, sides: &[Sides]) -> Result<Func, PassError> {
        let f = unit.module.func(layer);
        let rows = appended(f, &self.skip, index)?;
        let new = rewrite(&unit.module, f, |b, node, ins| {
            let Op::CacheAppend = node.op else { return Ok(None) };
            let Some(at) = rows.iter().position(|(_, v)| *v == node.ins[1]) else { return Ok(None) };
            let row = round_trip(b, self.spec, ins[1], &sides[at])?;
            b.op(Op::CacheAppend, &[ins[0], row]).map(Some)
        })?;
        Ok(new)
    }
}

/// The rows that a layer appends to its caches, and whether they are keys.
///
/// # Errors
/// If something rounds them already, or a part of them has learned ends of its range: calibrated scales would lose both.
fn appended(f: &Func, skip: &Skipped, index: usize) -> Result<Vec<(bool, ValueId)>, Diag> {
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
