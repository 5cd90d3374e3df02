//! `annotate`: says in which type weights are stored.

use qrmc_ir::{Diag, Op, Place, QuantSpec, Rule, ScaleType, list_divisors, rewrite};

use crate::edges::{in_features, linears, role};
use crate::options::{Bits, Group, OptionValue, options};
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::unit::Unit;

options! {
    /// Options of `annotate`.
    struct AnnotateOptions {
        /// bits of a weight
        w: Bits = Bits(4),
        /// weights that share a scale
        group: Group = Group::Size(128),
        /// signed codes without a zero point
        sym: bool = false,
        /// how scales are chosen from the data
        rule: Rule = Rule::MinMax,
        /// type in which scales are stored
        scale: ScaleType = ScaleType::F32,
    }
}

/// The pass.
pub(crate) struct Annotate(pub(crate) AnnotateOptions);

/// The scheme that options describe.
pub(crate) fn weight_spec(bits: Bits, group: Group, sym: bool, scale: ScaleType) -> QuantSpec {
    let grain = group.grain();
    let spec = if sym { QuantSpec::sym(bits.0, grain) } else { QuantSpec::asym(bits.0, grain) };
    QuantSpec { scale, ..spec }
}

/// Refuses, before anything is computed, a group that does not divide the rows of every linear layer.
pub(crate) fn check_group(unit: &Unit, group: Group) -> Result<(), Diag> {
    let Group::Size(g) = group else { return Ok(()) };
    let module = &unit.module;
    let mut lengths = Vec::new();
    for &layer in &module.layers() {
        let f = module.func(layer);
        for l in linears(f) {
            lengths.push((in_features(f, &l), f.name.clone(), role(module, f, &l)));
        }
    }
    let Some((n, func, role)) = lengths.iter().find(|(n, ..)| n % g as usize != 0) else { return Ok(()) };
    let common = lengths.iter().fold(0, |a, (n, ..)| gcd(a, *n as u64));
    let place = Place { func: Some(func.clone()), value: Some(format!("%{role}")), line: None };
    Err(Diag::new("Q0202", format!("groups of {g} do not divide the rows of {role}, which are {n} long"))
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
        PassInfo {
            name: "annotate",
            summary: "store the weights of the linear layers of every block in a quantized type",
            preserves: Preserves::Exact,
            accepts: (Stage::Float, Stage::Float),
            calibrates: false,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn run(&self, unit: &mut Unit, _cx: &mut PassCx<'_>) -> Result<(), PassError> {
        let o = &self.0;
        check_group(unit, o.group)?;
        let spec = weight_spec(o.w, o.group, o.sym, o.scale);
        for layer in unit.module.layers() {
            let old = unit.module.func(layer);
            let targets: Vec<_> = linears(old).iter().map(|l| l.y).collect();
            let new = rewrite(&unit.module, old, |b, node, ins| {
                if !node.outs.first().is_some_and(|y| targets.contains(y)) {
                    return Ok(None);
                }
                let w = b.op1(Op::FakeQuant(spec, o.rule), &[ins[1]])?;
                Ok(Some(vec![b.linear(ins[0], w)?]))
            })?;
            unit.module.funcs[layer.0 as usize] = new;
        }
        Ok(())
    }
}
