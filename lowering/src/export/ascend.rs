//! The description format of vllm-ascend and msModelSlim (methods.md §10.5, ascend.md §5): safetensors with one code a byte,
//! and a JSON that gives each tensor a type.

mod folder;

use qrmc_ir::{Elem, Grain, Op, QuantSpec, ScaleType, WeightSource};
use serde_json::{Map, Value, json};

use super::plan::{Plan, float_head, no_caches, parts, scale_bytes};
use super::rules::FUSED;
use super::{Entry, ExportError, Format, Linear, Part, View};
use crate::artefact::{Dtype, TensorPlan};

/// Largest side of a matrix of a Kronecker pair that the operator takes, from CANN 8.5 on.
const SIDE: usize = 256;
/// The same up to CANN 8.3.
const OLD_SIDE: usize = 128;

pub use folder::faults;

/// See the module.
pub(super) struct Ascend;

/// How a linear layer runs. Later ones stand for more quantization.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Type {
    Float,
    W8A16,
    W8A8Dynamic,
    W4A4Dynamic,
    W4A4FlatQuantDynamic,
}

impl Type {
    const ALL: [Type; 5] =
        [Type::Float, Type::W8A16, Type::W8A8Dynamic, Type::W4A4Dynamic, Type::W4A4FlatQuantDynamic];

    fn name(self) -> &'static str {
        match self {
            Type::Float => "FLOAT",
            Type::W8A16 => "W8A16",
            Type::W8A8Dynamic => "W8A8_DYNAMIC",
            Type::W4A4Dynamic => "W4A4_DYNAMIC",
            Type::W4A4FlatQuantDynamic => "W4A4_FLATQUANT_DYNAMIC",
        }
    }
}

impl Format for Ascend {
    fn name(&self) -> &'static str {
        "ascend"
    }

    fn summary(&self) -> &'static str {
        "msModelSlim's description: W8A16, W8A8 and W4A4 for each token, FlatQuant W4A4: vllm-ascend"
    }

    fn sees(&self, op: &Op) -> bool {
        matches!(op, Op::FakeQuant(..) | Op::ModeMul { .. })
    }

    fn nearest(&self, l: &Linear, src: &dyn WeightSource) -> Result<Option<QuantSpec>, ExportError> {
        let fits = l.bits() == 4 || l.scales_fit(src, ScaleType::BF16, self.name()).is_ok();
        Ok((!fits).then(|| QuantSpec { scale: ScaleType::BF16, ..l.spec() }))
    }

    fn plan<'a>(&self, view: &'a View, src: &dyn WeightSource) -> Result<Plan<'a>, ExportError> {
        no_caches(view, self.name())?;
        float_head(view, self.name())?;
        if view.linears().next().is_none() {
            return Err(ExportError::illegal("no matrix of this model has codes")
                .hint("compile with a pass that rounds weights, such as rtn"));
        }
        let types: Vec<(&Linear, Type)> =
            view.linears().map(|l| Ok((l, kind(l, src)?))).collect::<Result<_, ExportError>>()?;
        fused(view, &types)?;
        let mut description = Map::new();
        let mut made = parts(view, |l, out| {
            let kind = types.iter().find(|(t, _)| t.name == l.name).map_or(Type::Float, |t| t.1);
            linear(l, kind, src, out)?;
            Ok(())
        })?;
        widen_biases(view, &mut made);
        let of = |name: &str| {
            let module = name.rsplit_once('.').map_or(name, |(m, _)| m);
            let kind = types.iter().find(|(l, _)| l.name == module).map_or(Type::Float, |t| t.1);
            if name.ends_with(".bias") { Type::Float } else { kind }
        };
        for p in &made {
            description.insert(p.tensor.name.clone(), of(&p.tensor.name).name().into());
        }
        let highest = types.iter().map(|t| t.1).max().unwrap_or(Type::Float);
        description.insert("version".into(), "1.0.0".into());
        description.insert("model_quant_type".into(), highest.name().into());
        description.insert("group_size".into(), json!(0));
        description.insert("metadata".into(), json!({}));
        description.insert("optional".into(), json!({}));
        let mut text = serde_json::to_vec_pretty(&Value::Object(description))
            .map_err(|e| ExportError::fault(e.to_string()))?;
        text.push(b'\n');
        let mut notes = Vec::new();
        if types
            .iter()
            .any(|(l, t)| *t == Type::W4A4FlatQuantDynamic && sides(l.cols).is_some_and(|s| s.1 > OLD_SIDE))
        {
            notes.push(format!("matrices of more than {OLD_SIDE} rows need CANN 8.5"));
        }
        Ok(Plan {
            stem: "quant_model_weights",
            parts: made,
            compute: None,
            quantization: None,
            files: vec![("quant_model_description.json".to_owned(), text)],
            notes,
        })
    }
}

/// How a linear layer runs on the NPU.
fn kind(l: &Linear, src: &dyn WeightSource) -> Result<Type, ExportError> {
    let bad = |what: String, hint: &str| Err(ExportError::illegal(format!("{}: {what}", l.name)).hint(hint));
    let spec = l.spec();
    if !l.symmetric() || spec.grain != Grain::Row {
        return bad(
            format!("its codes are {spec}; the NPU's kernels take signed codes with one scale a row"),
            "compile with group=row,sym=true",
        );
    }
    let Some(x) = l.input.spec else {
        return match spec.bits {
            8 => {
                loaded_scales(l, src)?;
                Ok(Type::W8A16)
            }
            bits => bad(
                format!("weights of {bits} bits with a float input; alone, 8 bits load"),
                "compile with bits=8, or with inputs of 4 bits for each token",
            ),
        };
    };
    if x.grain != Grain::Token || x.zero || !x.signed {
        return bad(
            format!(
                "its input is rounded to {x}; the NPU rounds each token to signed codes without zero points"
            ),
            "compile for activations with sym",
        );
    }
    match (spec.bits, x.bits, l.input.matrices.is_empty(), l.input.bounds.is_empty()) {
        (8, 8, true, true) => {
            loaded_scales(l, src)?;
            Ok(Type::W8A8Dynamic)
        }
        (4, 4, true, true) => Ok(Type::W4A4Dynamic),
        (4, 4, false, _) => flat(l, src),
        (w, a, ..) => bad(
            format!("W{w}A{a} with these transforms and bounds; W8A8 and W4A4 load"),
            "W8A8 and W4A4 without bounds, or FlatQuant's W4A4, have a type",
        ),
    }
}

/// Scales that the loader rounds to the type of the model must be of that type.
fn loaded_scales(l: &Linear, src: &dyn WeightSource) -> Result<(), ExportError> {
    l.scales_fit(src, ScaleType::BF16, "ascend")
        .or_else(|e| l.scales_fit(src, ScaleType::F16, "ascend").map_err(|_| e))
}

/// The Kronecker pair of a width: `(a - b, a + b)` for the smallest `a` of which `a² - n` is a square `b²`.
fn sides(n: usize) -> Option<(usize, usize)> {
    let mut a = n.isqrt();
    if a * a < n {
        a += 1;
    }
    (a..=n).find_map(|a| {
        let rest = a * a - n;
        let b = rest.isqrt();
        (b * b == rest).then_some((a - b, a + b))
    })
}

/// FlatQuant's form: a pair of matrices of the one shape that the loader computes, and one clip.
fn flat(l: &Linear, src: &dyn WeightSource) -> Result<Type, ExportError> {
    let bad = |what: String| {
        Err(ExportError::illegal(format!("{}: {what}", l.name))
            .hint("leave the layer as it is with skip, or give it W8A8; ascend.md §5.3 has the rules"))
    };
    let Some((left, right)) = sides(l.cols) else { return bad(format!("{} inputs make no pair", l.cols)) };
    let pair = pair(l, src)?;
    if pair.map(|p| (p.left.1, p.right.1)) != Some((left, right)) {
        let have: Vec<String> = l.input.matrices.iter().map(|(n, _)| n.clone()).collect();
        return bad(format!(
            "its input passes {}; the loader wants a Kronecker pair of {left} and {right}",
            have.join(", ")
        ));
    }
    if !right.is_multiple_of(8) || left > SIDE || right > SIDE {
        return bad(format!(
            "a pair of {left} and {right}; the operator takes sides up to {SIDE}, the second a multiple of 8"
        ));
    }
    if let [hi, lo] = &l.input.bounds[..]
        && src.read(hi)?.as_f32() != src.read(lo)?.as_f32()
    {
        return bad("its input has two clips; the operator has one".into());
    }
    Ok(Type::W4A4FlatQuantDynamic)
}

/// Names and sides of the matrices of a Kronecker pair.
struct Pair<'a> {
    left: (&'a str, usize),
    right: (&'a str, usize),
}

/// The pair that an input passes, if it passes one: the matrix of neighbours and that of their runs.
fn pair<'a>(l: &'a Linear, src: &dyn WeightSource) -> Result<Option<Pair<'a>>, ExportError> {
    let side = |name: &str| -> Result<usize, ExportError> {
        let shape = src.raw(name)?.ty.shape.as_fixed().unwrap_or_default();
        Ok(if shape.len() == 2 && shape[0] == shape[1] { shape[0] } else { 0 })
    };
    let find = |neighbours: bool| l.input.matrices.iter().find(|(_, inner)| (*inner == 1) == neighbours);
    let (Some((left, inner)), Some((right, _)), 2) = (find(false), find(true), l.input.matrices.len()) else {
        return Ok(None);
    };
    let pair = Pair { left: (left, side(left)?), right: (right, side(right)?) };
    Ok((*inner as usize == pair.right.1).then_some(pair))
}

/// Parts of one module share a type and, with transforms, the transforms.
fn fused(view: &View, types: &[(&Linear, Type)]) -> Result<(), ExportError> {
    for layer in 0..view.facts.layers {
        for group in FUSED {
            let of = |name: &str| {
                let name = format!("model.layers.{layer}.{name}");
                let found = types.iter().find(|(l, _)| l.name == name);
                (found.map_or(Type::Float, |t| t.1), found.map(|t| t.0.input.clone()).unwrap_or_default())
            };
            let first = of(group[0]);
            if let Some(other) = group[1..].iter().find(|n| of(n) != first) {
                return Err(ExportError::illegal(format!(
                    "model.layers.{layer}: {} and {other} run as one module and differ in type or transform",
                    group[0]
                ))
                .hint("give q, k and v, and gate and up, the same scheme"));
            }
        }
    }
    Ok(())
}

fn linear<'a>(
    l: &'a Linear,
    kind: Type,
    src: &dyn WeightSource,
    out: &mut Vec<Part<'a>>,
) -> Result<(), ExportError> {
    let middle = 1u8 << (l.bits() - 1);
    out.push(Part::of(l, "weight", Dtype::I8, vec![l.rows, l.cols], move |src, put| {
        l.blocks().try_for_each(|rows| {
            let codes = l.codes(src, rows)?;
            Ok(put(&codes.iter().map(|q| q.wrapping_sub(middle)).collect::<Vec<u8>>())?)
        })
    }));
    out.push(Part::of(l, "weight_scale", Dtype::F32, vec![l.rows, 1], move |src, put| {
        Ok(put(&scale_bytes(&l.scales(src)?, ScaleType::F32)?)?)
    }));
    out.push(Part::of(l, "weight_offset", Dtype::F32, vec![l.rows, 1], move |_, put| {
        Ok(put(&vec![0; 4 * l.rows])?)
    }));
    if kind == Type::W4A4FlatQuantDynamic
        && let Some(pair) = pair(l, src)?
    {
        for (suffix, (name, side)) in [("left_trans", pair.left), ("right_trans", pair.right)] {
            out.push(Part::of(l, suffix, Dtype::F32, vec![side, side], move |src, put| {
                let t = src.read(name)?;
                Ok(put(&t.to_le_bytes(Elem::F32).map_err(ExportError::fault)?)?)
            }));
        }
        let clip = l.input.bounds.first();
        out.push(Part::of(l, "clip_ratio", Dtype::F32, vec![1], move |src, put| {
            let ratio = match clip {
                None => 1.0,
                Some(name) => src.read(name)?.as_f32().and_then(|v| v.first().copied()).unwrap_or(1.0),
            };
            Ok(put(&ratio.to_le_bytes())?)
        }));
    }
    Ok(())
}

/// Biases of layers with codes are `f32` there.
fn widen_biases<'a>(view: &'a View, made: &mut [Part<'a>]) {
    for e in &view.entries {
        let Entry::Plain { stored, plan } = e else { continue };
        let coded = view.linears().any(|l| l.bias.as_deref() == Some(plan.name.as_str()));
        let Some(part) = made.iter_mut().find(|p| coded && p.tensor.name == plan.name) else { continue };
        *part = Part::floats(stored, &TensorPlan { name: plan.name.clone(), ty: plan.ty.clone() }, Elem::F32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_those_that_the_loader_computes() {
        // ascend.md §5.3.
        for (n, pair) in [
            (4096, (64, 64)),
            (3584, (56, 64)),
            (5120, (64, 80)),
            (11008, (86, 128)),
            (14336, (112, 128)),
            (4864, (64, 76)),
            (18944, (128, 148)),
        ] {
            assert_eq!(sides(n), Some(pair), "{n}");
        }
        assert_eq!(sides(7), Some((1, 7)));
    }
}
