//! `annotate`: says in which type weights, activations and caches are stored or computed.

use qrmc_ir::{
    Builder, Diag, Func, Grain, Module, Op, Place, QuantSpec, Rule, ScaleType, ValueId, list_divisors,
    rewrite,
};

use crate::edges::{caches, in_features, linears, role, row_parallel, width};
use crate::options::{Bits, CacheWidth, Group, OptionValue, Width, options};
use crate::parallel::check_tp;
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::skip::{Skip, Skipped};
use crate::unit::Unit;

options! {
    /// Options of `annotate`.
    struct AnnotateOptions {
        /// bits of a weight
        w: Width = Width(4),
        /// weights that share a scale
        group: Group = Group::Size(128),
        /// signed codes without a zero point for weights
        sym: bool = false,
        /// how scales of weights are chosen from the data
        rule: Rule = Rule::MinMax,
        /// type in which scales of weights are stored
        scale: ScaleType = ScaleType::F32,
        /// bits of the head's weight, by minimum and maximum, a row at a time where `group` does not divide it; its input
        /// stays float, and so does an embedding that it shares
        head: Width = Width(16),
        /// bits of the input of a linear layer, one scale a token; inputs that `static-inputs` has rounded stay
        a: Width = Width(16),
        /// signed codes without a zero point for activations
        a_sym: bool = false,
        /// factor on the range of activations
        a_clip: f64 = 1.0,
        /// bits of cached keys and values, one scale a token and head; those that `static-caches` has rounded stay
        kv: CacheWidth = CacheWidth(16),
        /// factor on the range of cached keys and values
        kv_clip: f64 = 1.0,
        /// quantize keys, too
        keys: bool = true,
        /// ranks of tensor parallelism: each has its own scales in row-parallel linear layers
        tp: u32 = 1,
        /// layers and linear layers with weights of 8 bits, one symmetric scale a row, and inputs of 8 bits, symmetric and
        /// unclipped for each token, whatever the others have
        wide: Skip = Skip::default(),
        /// layers and linear layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

/// Bits of the weights and inputs of wide linear layers.
const WIDE: u8 = 8;

/// The pass.
pub(crate) struct Annotate(pub(crate) AnnotateOptions);

/// The scheme of weights that options describe.
pub(crate) fn weight_spec(bits: Bits, group: Group, sym: bool, scale: ScaleType) -> QuantSpec {
    let grain = group.grain();
    let spec = if sym { QuantSpec::sym(bits.0, grain) } else { QuantSpec::asym(bits.0, grain) };
    QuantSpec { scale, ..spec }
}

/// Refuses, before anything is computed, a group that does not divide the rows of every linear layer, or the part of a
/// row that a rank holds.
pub(crate) fn check_group(module: &Module, group: Group, tp: u32) -> Result<(), Diag> {
    let Group::Size(g) = group else { return Ok(()) };
    let mut lengths = Vec::new();
    for &layer in &module.layers() {
        let f = module.func(layer);
        for l in linears(f) {
            let ranks = if row_parallel(f, l.x) { tp.max(1) as usize } else { 1 };
            lengths.push((in_features(f, &l) / ranks, f.name.clone(), role(module, f, &l)));
        }
    }
    let Some((n, func, role)) = lengths.iter().find(|(n, ..)| n % g as usize != 0) else { return Ok(()) };
    let common = lengths.iter().fold(0, |a, (n, ..)| gcd(a, *n as u64));
    let place = Place { func: Some(func.clone()), value: Some(format!("%{role}")), line: None };
    let rank = if tp > 1 { format!(" on each of {tp} ranks") } else { String::new() };
    Err(Diag::new(
        "Q0202",
        format!("groups of {g} do not divide the rows of {role}, which are {n} long{rank}"),
    )
    .at(place)
    .hint(format!(
        "groups that divide every linear layer: {}; or `group=row`",
        list_divisors(common, u64::from(g))
    )))
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Pass for Annotate {
    fn info(&self) -> PassInfo {
        let o = &self.0;
        let weights = o.w.quantized().or(o.head.quantized()).is_some() || o.wide != Skip::default();
        let last = if weights { Stage::Annotated } else { Stage::Rounded };
        PassInfo {
            name: "annotate",
            summary: "say which weights, activations and caches have a quantized type",
            preserves: Preserves::Exact,
            accepts: (Stage::Float, last),
            calibrates: false,
            transforms: false,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn legal(&self, module: &Module) -> Result<(), Diag> {
        let o = &self.0;
        check_tp(&module.facts, o.tp)?;
        for (name, clip) in [("a_clip", o.a_clip), ("kv_clip", o.kv_clip)] {
            if !(clip > 0.0 && clip <= 1.0) {
                return Err(Diag::new("Q0602", format!("`annotate`: {name} is {clip}"))
                    .hint("a factor above 0 and up to 1"));
            }
        }
        o.skip.on(module)?;
        o.wide.matching(module, "wide")?;
        let headless = module.find_func("head").is_none_or(|f| linears(module.func(f)).is_empty());
        if let Some(bits) = o.head.quantized().filter(|_| headless) {
            let m = format!(
                "`annotate`: head is {bits}, and the module has no @head that multiplies by a matrix"
            );
            return Err(Diag::new("Q0602", m).hint("leave `head` out for this module"));
        }
        if o.w.quantized().is_some() { check_group(module, o.group, o.tp) } else { Ok(()) }
    }

    fn run(&self, unit: &mut Unit, _cx: &mut PassCx<'_>) -> Result<(), PassError> {
        let o = &self.0;
        let skip = o.skip.on(&unit.module)?;
        for (index, layer) in unit.module.layers().into_iter().enumerate() {
            let new = annotate(&unit.module, unit.module.func(layer), o, &skip, index)?;
            unit.module.funcs[layer.0 as usize] = new;
        }
        if let Some((bits, head)) = o.head.quantized().zip(unit.module.find_func("head")) {
            let new = annotate_head(&unit.module, unit.module.func(head), Bits(bits), o)?;
            unit.module.funcs[head.0 as usize] = new;
        }
        Ok(())
    }
}

/// Annotates the weight of the head. Ranks of tensor parallelism share out its rows, so that scales are the same at every
/// number of them.
fn annotate_head(module: &Module, f: &Func, bits: Bits, o: &AnnotateOptions) -> Result<Func, Diag> {
    let all = linears(f);
    rewrite(module, f, |b, node, ins| {
        let Some(l) = all.iter().find(|l| node.outs.first() == Some(&l.y)) else { return Ok(None) };
        let group = match o.group {
            Group::Size(g) if !in_features(f, l).is_multiple_of(g as usize) => Group::Row,
            group => group,
        };
        let spec = weight_spec(bits, group, o.sym, o.scale);
        let w = b.op1(Op::FakeQuant(spec, Rule::MinMax), &[ins[1]])?;
        Ok(Some(vec![b.linear(ins[0], w)?]))
    })
}

/// A value to be quantized, with what its marker says of its range.
#[derive(Clone, Copy)]
struct Marked {
    value: ValueId,
    factors: Option<(ValueId, ValueId)>,
}

impl Marked {
    /// The quantized value.
    fn quantize(self, b: &mut Builder<'_>, spec: QuantSpec, clip: f64) -> Result<ValueId, Diag> {
        let mut ins = vec![self.value];
        if let Some((hi, lo)) = self.factors {
            ins.extend([hi, lo]);
        } else if clip != 1.0 {
            let c = b.scalar(clip);
            ins.extend([c, c]);
        }
        b.op1(Op::FakeQuant(spec, Rule::Dynamic), &ins)
    }
}

/// Whether a value has codes already.
fn coded(f: &Func, x: ValueId) -> bool {
    f.def_node(x).is_some_and(|n| n.op == Op::DCast)
}

/// Annotates one layer. Markers of edges go: what they mark is quantized now, or not to be.
pub(crate) fn annotate(
    module: &Module,
    f: &Func,
    o: &AnnotateOptions,
    skip: &Skipped,
    index: usize,
) -> Result<Func, Diag> {
    let all = linears(f);
    let dynamic = |bits: u8, sym: bool, grain| {
        if sym { QuantSpec::sym(bits, grain) } else { QuantSpec::asym(bits, grain) }
    };
    // Each rank finds the scale of its own part of a token.
    let parts = |x: ValueId| if row_parallel(f, x) { u64::from(o.tp.max(1)) } else { 1 };
    let act = |x: ValueId, wide: bool| {
        let (bits, sym) = if wide { (Some(WIDE), true) } else { (o.a.quantized(), o.a_sym) };
        bits.map(|bits| match parts(x) {
            1 => dynamic(bits, sym, Grain::Token),
            n => dynamic(bits, sym, Grain::Group((width(f, x) / n) as u32)),
        })
    };
    let all_wide = o.wide.resolve(module);
    let head = module.facts.head_dim;
    let cached = o.kv.quantized().filter(|_| !skip.layer(index)).map(|bits| {
        move |v: ValueId| match width(f, v) > head && head > 0 {
            true => dynamic(bits, false, Grain::Group(head as u32)),
            false => dynamic(bits, false, Grain::Token),
        }
    });
    let caches = caches(f);
    let targets: Vec<ValueId> = caches
        .iter()
        .filter(|c| (o.keys || !c.keys) && cached.is_some() && !coded(f, c.target))
        .map(|c| c.target)
        .collect();
    let mut marked: Vec<(ValueId, Marked)> = Vec::new();
    let mut done: Vec<((ValueId, bool), ValueId)> = Vec::new();
    rewrite(module, f, |b, node, ins| {
        // The value that stands for a result of this node, and what is quantized of it.
        let mut outs = None;
        if node.op == Op::Edge {
            let factors = ins.get(1).copied().zip(ins.get(2).copied());
            marked.push((node.outs[0], Marked { value: ins[0], factors }));
            outs = Some(vec![ins[0]]);
        }
        if let Some(l) = all.iter().find(|l| node.outs.first() == Some(&l.y)) {
            let role = role(module, f, l);
            if skip.linear(index, &role) {
                return Ok(outs);
            }
            let wide = all_wide.linear(index, &role);
            let mut x = ins[0];
            if let Some(spec) = act(l.x, wide).filter(|_| !coded(f, l.x)) {
                x = match done.iter().find(|(old, _)| *old == (l.x, wide)) {
                    Some((_, new)) => *new,
                    None => {
                        let plain = Marked { value: ins[0], factors: None };
                        let m = marked.iter().find(|(v, _)| *v == l.x).map_or(plain, |(_, m)| *m);
                        let new = m.quantize(b, spec, if wide { 1.0 } else { o.a_clip })?;
                        done.push(((l.x, wide), new));
                        new
                    }
                };
            }
            let mut w = ins[1];
            let bits = if wide { Some(WIDE) } else { o.w.quantized() };
            if let Some(bits) = bits {
                let group = match (if wide { Group::Row } else { o.group }, parts(l.x)) {
                    (Group::Row, n @ 2..) => Group::Size((in_features(f, l) as u64 / n) as u32),
                    (group, _) => group,
                };
                w = b.op1(
                    Op::FakeQuant(weight_spec(Bits(bits), group, wide || o.sym, o.scale), o.rule),
                    &[w],
                )?;
            }
            return Ok(Some(vec![b.linear(x, w)?]));
        }
        let Some(cached) = &cached else { return Ok(outs) };
        let Some(at) = node.outs.iter().position(|v| targets.contains(v)) else { return Ok(outs) };
        let target = node.outs[at];
        let mut results = match outs {
            Some(o) => o,
            None => b.op(node.op.clone(), ins)?,
        };
        let plain = Marked { value: results[at], factors: None };
        let m = marked.iter().find(|(v, _)| *v == target).map_or(plain, |(_, m)| *m);
        results[at] = m.quantize(b, cached(target), o.kv_clip)?;
        Ok(Some(results))
    })
}
