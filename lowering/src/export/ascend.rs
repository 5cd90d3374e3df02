//! The description format of vllm-ascend and msModelSlim (methods.md §10.5, ascend.md §5): safetensors with one code a byte,
//! and a JSON that gives each tensor a type.

mod caches;
mod folder;
mod whole;

use std::collections::HashMap;

use qrmc_ir::{Elem, Grain, Op, QuantSpec, ScaleType, WeightSource};
use serde_json::{Map, json};

use super::plan::{Plan, float_head, json_file, scale_bytes, signed_codes};
use super::rules::differing;
use super::view::rounds;
use super::{Entry, ExportError, Format, Linear, Part, View};
use crate::artefact::Dtype;

/// Largest side of a matrix of a Kronecker pair that the operator takes, from CANN 8.5 on.
const SIDE: usize = 256;
/// The same up to CANN 8.3.
const OLD_SIDE: usize = 128;

pub(super) use caches::fits as fits_cache;
pub use folder::{Headers, faults};

/// See the module.
pub(super) struct Ascend;

/// How a linear layer runs. Later ones stand for more quantization.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Type {
    Float,
    W8A16,
    W8A8Dynamic,
    W8A8,
    W4A4Dynamic,
    W4A4FlatQuantDynamic,
}

impl Type {
    const ALL: [Type; 6] = [
        Type::Float,
        Type::W8A16,
        Type::W8A8Dynamic,
        Type::W8A8,
        Type::W4A4Dynamic,
        Type::W4A4FlatQuantDynamic,
    ];

    fn name(self) -> &'static str {
        match self {
            Type::Float => "FLOAT",
            Type::W8A16 => "W8A16",
            Type::W8A8Dynamic => "W8A8_DYNAMIC",
            Type::W8A8 => "W8A8",
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
        "msModelSlim's description: W8A16, W8A8, W4A4 for each token, FlatQuant W4A4: vllm-ascend"
    }

    fn sees(&self, op: &Op) -> bool {
        rounds(op) || matches!(op, Op::ModeMul { .. })
    }

    fn nearest(&self, l: &Linear, src: &dyn WeightSource) -> Result<Option<QuantSpec>, ExportError> {
        let fits = l.bits() == 4
            || l.input.one_scale().is_some()
            || l.scales_fit(src, ScaleType::BF16, self.name()).is_ok();
        Ok((!fits).then(|| QuantSpec { scale: ScaleType::BF16, ..l.spec() }))
    }

    fn plan<'a>(&self, view: &'a View, src: &dyn WeightSource) -> Result<Plan<'a>, ExportError> {
        let cached = caches::checked(view)?;
        float_head(view, self.name())?;
        view.first()?;
        let types: HashMap<&str, Type> = view
            .linears()
            .map(|l| Ok((l.name.as_str(), kind(l, src)?)))
            .collect::<Result<_, ExportError>>()?;
        fused(view, &types)?;
        let biases = whole::biases(view);
        let whole = types.values().any(|t| *t == Type::W8A8);
        // The loader rounds the scales of inputs and caches to this type, and takes the form of deq_scale from it.
        let compute = if whole || cached { Some(computed_in(view, &types, src)?) } else { None };
        let mut made = Vec::new();
        for e in &view.entries {
            match e {
                Entry::Linear(l) => match (types[l.name.as_str()], compute) {
                    (Type::W8A8, Some(ty)) => {
                        whole::linear(l, biases.get(l.name.as_str()).copied(), ty, src, &mut made)?;
                    }
                    (kind, _) => linear(l, kind, src, &mut made)?,
                },
                // Biases of layers with codes are `f32` there.
                Entry::Plain { stored, plan }
                    if plan.name.strip_suffix(".bias").is_some_and(|m| types.contains_key(m)) =>
                {
                    made.push(Part::floats(stored, plan, Elem::F32));
                }
                Entry::Plain { stored, plan } => made.push(Part::copy(stored, plan)),
            }
        }
        caches::parts(view, &mut made);
        let mut description = Map::new();
        for name in made.iter().map(|p| &p.tensor.name) {
            let (module, part) = name.rsplit_once('.').unwrap_or((name, ""));
            let kind = types.get(module).filter(|_| part != "bias").copied().unwrap_or(Type::Float);
            let kind = if part.starts_with("kv_cache_") { caches::KIND } else { kind.name() };
            description.insert(name.clone(), kind.into());
        }
        let highest = types.values().copied().max().unwrap_or(Type::Float);
        description.insert("version".into(), "1.0.0".into());
        description.insert("model_quant_type".into(), highest.name().into());
        description.insert("group_size".into(), json!(0));
        if cached {
            description.insert("kv_cache_type".into(), caches::KIND.into());
            description.insert("kv_quant_type".into(), caches::KIND.into());
        }
        description.insert("metadata".into(), json!({}));
        description.insert("optional".into(), json!({}));
        let text = json_file(&description.into())?;
        let mut notes = Vec::new();
        if biases.keys().any(|m| types[m] == Type::W8A8) {
            notes.push("biases of W8A8 layers are rounded to whole multiples of deq_scale".to_owned());
        }
        let flat = |l: &&Linear| types[l.name.as_str()] == Type::W4A4FlatQuantDynamic;
        if view.linears().filter(flat).any(|l| pair_of(l.cols).is_ok_and(|s| s.1 > OLD_SIDE)) {
            notes.push(format!("matrices of more than {OLD_SIDE} rows need CANN 8.5"));
        }
        Ok(Plan {
            stem: "quant_model_weights",
            parts: made,
            compute,
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
    if l.input.one_scale().is_some() {
        return match (spec.bits, x.bits) {
            (8, 8) => Ok(Type::W8A8),
            (w, a) => bad(format!("W{w}A{a} with one calibrated scale of inputs"), "W8A8 has a type"),
        };
    }
    if x.grain != Grain::Token || x.zero || !x.signed {
        return bad(
            format!(
                "its input is rounded to {x}; the NPU rounds each token, or all by one calibrated scale, to signed codes \
                 without zero points"
            ),
            "compile for activations with sym, or with static-inputs",
        );
    }
    if (spec.bits, x.bits, l.input.matrices.is_empty()) == (4, 4, false) {
        return flat(l, src);
    }
    if let Some(what) = l.clipped() {
        return Err(ExportError::illegal(format!("{what}; the NPU has one in FlatQuant's type alone"))
            .hint("compile without a_clip, or with flatquant for --target vllm-ascend"));
    }
    match (spec.bits, x.bits, l.input.matrices.is_empty()) {
        (8, 8, true) => {
            loaded_scales(l, src)?;
            Ok(Type::W8A8Dynamic)
        }
        (4, 4, true) => Ok(Type::W4A4Dynamic),
        (w, a, plain) => {
            let with = if plain { "" } else { " with a transform" };
            bad(format!("W{w}A{a}{with}"), "W8A8 and W4A4 as they are, and FlatQuant's W4A4, have a type")
        }
    }
}

/// The type of the model, for scales that the loader rounds to it: one that holds them all.
fn computed_in(
    view: &View,
    types: &HashMap<&str, Type>,
    src: &dyn WeightSource,
) -> Result<ScaleType, ExportError> {
    let fits = |ty: ScaleType| -> Result<(), ExportError> {
        for l in view.linears() {
            match types[l.name.as_str()] {
                Type::W8A8 => whole::fits(l, ty, src)?,
                Type::W8A16 | Type::W8A8Dynamic => l.scales_fit(src, ty, "ascend")?,
                _ => {}
            }
        }
        caches::fit(view, ty, src)
    };
    let calibrated = view.linears().filter_map(|l| l.input.one_scale()).chain(view.caches.iter().copied());
    let half = calibrated.into_iter().any(|x| x.scale == ScaleType::F16);
    let [first, other] =
        if half { [ScaleType::F16, ScaleType::BF16] } else { [ScaleType::BF16, ScaleType::F16] };
    match fits(first) {
        Ok(()) => Ok(first),
        Err(e) => fits(other).map(|()| other).map_err(|_| e),
    }
}

/// Scales that the loader rounds to the type of the model must be of that type.
fn loaded_scales(l: &Linear, src: &dyn WeightSource) -> Result<(), ExportError> {
    l.scales_fit(src, ScaleType::BF16, "ascend")
        .or_else(|e| l.scales_fit(src, ScaleType::F16, "ascend").map_err(|_| e))
}

/// The sides of the Kronecker pair of `n` inputs: those that the loader computes, if the operator takes them.
///
/// # Errors
/// Why there is no such pair.
pub fn pair_of(n: usize) -> Result<(usize, usize), String> {
    match qrmc_ir::fermat(n as u64).map(|(left, right)| (left as usize, right as usize)) {
        None => Err(format!("{n} inputs make no Kronecker pair")),
        Some((left, right)) if right.is_multiple_of(8) && left.max(right) <= SIDE => Ok((left, right)),
        Some((left, right)) => Err(format!(
            "{n} inputs make a Kronecker pair of {left} and {right}; the operator takes sides up to {SIDE}, the second a \
             multiple of 8"
        )),
    }
}

/// FlatQuant's form: a pair of matrices of the one shape that the loader computes, and one clip.
fn flat(l: &Linear, src: &dyn WeightSource) -> Result<Type, ExportError> {
    let bad = |what: String| {
        Err(ExportError::illegal(format!("{}: {what}", l.name))
            .hint("compile flatquant with --target vllm-ascend, or give the layer 8 bits with wide"))
    };
    let (left, right) = match pair_of(l.cols) {
        Ok(sides) => sides,
        Err(why) => return bad(why),
    };
    let pair = pair(l, src)?;
    if pair.map(|p| (p.left.1, p.right.1)) != Some((left, right)) {
        let have: Vec<String> = l.input.matrices.iter().map(|(n, _)| n.clone()).collect();
        return bad(format!(
            "its input passes {}; the loader wants a Kronecker pair of {left} and {right}",
            have.join(", ")
        ));
    }
    clip_ratio(l, src)?;
    Ok(Type::W4A4FlatQuantDynamic)
}

/// The one clip of the range of an input, 1 where it has none.
fn clip_ratio(l: &Linear, src: &dyn WeightSource) -> Result<f32, ExportError> {
    let ends = l.input.bounds.iter().map(|b| b.values(src)).collect::<Result<Vec<_>, _>>()?;
    match &ends[..] {
        [] => Ok(1.0),
        [hi, lo] if hi.len() == 1 && hi == lo => Ok(hi[0]),
        _ => Err(ExportError::illegal(format!("{}: its input has two clips; the operator has one", l.name))
            .hint("compile with clips=one, which --target vllm-ascend gives flatquant")),
    }
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
fn fused(view: &View, types: &HashMap<&str, Type>) -> Result<(), ExportError> {
    let inputs: HashMap<&str, _> = view.linears().map(|l| (l.name.as_str(), &l.input)).collect();
    let apart = differing(view.facts.layers, |name| (types.get(name), inputs.get(name))).next();
    match apart {
        None => Ok(()),
        Some(parts) => {
            Err(ExportError::illegal(format!("{parts} run as one module and differ in type or transform"))
                .hint("give q, k and v, and gate and up, the same scheme"))
        }
    }
}

fn linear<'a>(
    l: &'a Linear,
    kind: Type,
    src: &dyn WeightSource,
    out: &mut Vec<Part<'a>>,
) -> Result<(), ExportError> {
    out.push(signed_codes(l));
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
        out.push(Part::of(l, "clip_ratio", Dtype::F32, vec![1], move |src, put| {
            Ok(put(&clip_ratio(l, src)?.to_le_bytes())?)
        }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // ascend.md §5.3.
    #[test]
    fn pairs_are_those_that_the_loader_computes_and_the_operator_takes() {
        for (n, pair) in
            [(4096, (64, 64)), (3584, (56, 64)), (5120, (64, 80)), (14336, (112, 128)), (17408, (128, 136))]
        {
            assert_eq!(pair_of(n), Ok(pair), "{n}");
        }
        for (n, seen) in [
            (4864, "64 and 76"),
            (18944, "128 and 148"),
            (256 * 264, "256 and 264"),
            (4098, "4098 inputs make no Kronecker pair"),
        ] {
            assert!(pair_of(n).unwrap_err().contains(seen), "{n}");
        }
    }
}
