//! Rules of quantization schemes on types.

use super::Types;
use crate::diag::Diag;
use crate::quant::{Grain, QuantSpec, Rule};
use crate::types::{Dim, Elem, Shape, TensorType};

/// Factors on the ends of a range, none or two vectors of one length: gives that length.
pub(super) fn range_factors(given: Types<'_>) -> Result<Option<u64>, Diag> {
    let (hi, lo) = match given {
        [] => return Ok(None),
        [hi, lo] => (hi, lo),
        _ => return Err(Diag::new("Q0208", "a range has two factors, or none")),
    };
    match (hi.shape.as_fixed().as_deref(), lo.shape.as_fixed().as_deref()) {
        (Some(&[k]), Some(&[l])) if k == l && k > 0 => Ok(Some(k as u64)),
        _ => Err(Diag::new("Q0208", format!("factors {hi} and {lo} are no vectors of one length"))),
    }
}

/// As [`range_factors`], for a quantizer: their length divides the runs along a row.
pub(super) fn factors(spec: &QuantSpec, rule: Rule, x: &TensorType, given: Types<'_>) -> Result<(), Diag> {
    let Some(k) = range_factors(given)? else { return Ok(()) };
    let bad = |m: String| Err(Diag::new("Q0208", m));
    if rule != Rule::Dynamic {
        return bad(format!("rule `{rule}` takes no factors on the ends of the range; `dynamic` does"));
    }
    let runs = match (spec.grain, x.shape.last()) {
        (Grain::Group(g), Some(Dim::Fixed(n))) => n / u64::from(g).max(1),
        _ => 1,
    };
    match runs.is_multiple_of(k) {
        true => Ok(()),
        false => bad(format!("{k} factors do not divide {runs} runs evenly")),
    }
}

pub(super) fn grouping(spec: &QuantSpec, ty: &TensorType) -> Result<(), Diag> {
    if !(2..=8).contains(&spec.bits) {
        return Err(Diag::new("Q0201", format!("{} bits: codes have 2 to 8", spec.bits)));
    }
    if !ty.elem.is_float() {
        return Err(Diag::new("Q0103", format!("{ty} is not of a float type, so it cannot be quantized")));
    }
    if spec.signed == spec.zero {
        let what = if spec.zero { "signed codes with a zero point" } else { "unsigned codes without one" };
        return Err(Diag::new("Q0204", format!("{spec}: {what}"))
            .hint("signed codes are symmetric, unsigned ones have a zero point"));
    }
    if spec.grain == Grain::Row && ty.shape.rank() != 2 {
        return Err(Diag::new("Q0103", format!("grain `row` needs a matrix, not {ty}")));
    }
    scale_shape(spec, &ty.shape).map(|_| ())
}

pub(super) fn rule_fits(spec: &QuantSpec, rule: Rule) -> Result<(), Diag> {
    if spec.grain == Grain::Channel {
        let d = Diag::new("Q0206", format!("{spec}: scales of channels are operands, no rule finds them"));
        return Err(d.hint("use `qcast` and `dcast` with stored scales"));
    }
    if rule != Rule::Dynamic && spec.grain == Grain::Token {
        let d = Diag::new("Q0206", format!("rule `{rule}` is for weights; {spec} is per token"));
        return Err(d.hint("use rule `dynamic`"));
    }
    Ok(())
}

pub(super) fn scale_shape(spec: &QuantSpec, shape: &Shape) -> Result<Shape, Diag> {
    spec.scale_shape(shape).map_err(|(g, dim)| {
        let d = Diag::new("Q0202", format!("groups of {g} do not divide the last axis, which is {dim} long"));
        match dim {
            Dim::Fixed(n) => d.hint(format!("groups that do: {}", list_divisors(n, u64::from(g)))),
            Dim::Sym(_) => d.hint("use grain `token`"),
        }
    })
}

/// Up to four divisors of `n` near `want`, the likeliest group sizes, largest first; none above 65536.
pub fn list_divisors(n: u64, want: u64) -> String {
    let most = n.min(want.saturating_mul(4).clamp(64, 1 << 16));
    let mut all: Vec<u64> = (8..=most).filter(|g| n.is_multiple_of(*g)).collect();
    all.sort_by_key(|&g| (!(g.is_power_of_two() && g >= 16), g.abs_diff(want)));
    all.truncate(4);
    all.sort_unstable_by(|a, b| b.cmp(a));
    if all.is_empty() {
        return "none of 8 or more; use one scale a row".into();
    }
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

pub(super) fn side_types(spec: &QuantSpec, shape: &Shape) -> Result<Vec<TensorType>, Diag> {
    let shape = scale_shape(spec, shape)?;
    let mut v = vec![TensorType { elem: Elem::F32, shape: shape.clone() }];
    if spec.zero {
        v.push(TensorType { elem: Elem::U8, shape });
    }
    Ok(v)
}

pub(super) fn side_operands(spec: &QuantSpec, shape: &Shape, sides: Types<'_>) -> Result<(), Diag> {
    let want = side_types(spec, shape)?;
    if sides.len() != want.len() {
        let message = if spec.zero { "needs a zero point" } else { "has no zero point" };
        return Err(Diag::new("Q0204", format!("{spec} {message}")));
    }
    for (have, want) in sides.iter().zip(&want) {
        let same_kind = have.elem == want.elem || (have.elem.is_float() && want.elem.is_float());
        if have.shape != want.shape || !same_kind {
            return Err(Diag::new(
                "Q0203",
                format!("{have} are not the scales or zero points of {spec}: {want} are"),
            ));
        }
    }
    Ok(())
}
