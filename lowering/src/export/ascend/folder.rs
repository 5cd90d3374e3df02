//! A folder in this format, as its loader reads it.

use std::collections::BTreeMap;

use qrmc_ir::{Module, ScaleType};
use serde_json::{Map, Value};

use super::whole::deq_type;
use super::{Type, pair_of};
use crate::artefact::Dtype;
use crate::export::rules::{Fault, differing};
use crate::export::view::products;

/// Keys of a description that name no tensor.
const KEYS: [&str; 7] =
    ["version", "model_quant_type", "group_size", "metadata", "optional", "kv_cache_type", "kv_quant_type"];

/// Element types, as safetensors calls them, and sizes of the tensors of a folder, by name.
pub type Headers = BTreeMap<String, (String, Vec<usize>)>;

/// What vllm-ascend would refuse of a folder: `description` is its JSON, `tensors` are those of its files, `source` is the
/// float model that its `config.json` describes, and `compute` the type in which that says to compute.
pub fn faults(
    description: &Map<String, Value>,
    tensors: &Headers,
    (source, compute): (&Module, ScaleType),
    ranks: &[u32],
) -> Vec<Fault> {
    let mut out = Vec::new();
    for name in tensors.keys().filter(|n| !description.contains_key(*n)) {
        let what = format!("tensor `{name}` has no type in quant_model_description.json");
        out.push(Fault::new(what, "every tensor has one; write the folder again"));
    }
    for name in description.keys().filter(|n| !KEYS.contains(&n.as_str()) && !tensors.contains_key(*n)) {
        let what = format!("quant_model_description.json gives `{name}` a type, and no file has it");
        out.push(Fault::new(what, "a file is missing; copy the folder again"));
    }
    let mut types = BTreeMap::new();
    for module in products(source) {
        let weight = format!("{module}.weight");
        let Some(kind) = description.get(&weight).and_then(Value::as_str) else {
            // A head that shares the embedding has no tensor of its own.
            if module != super::super::HEAD {
                out.push(Fault::new(
                    format!("the linear layer {module} has no type"),
                    "the loader wants one of each",
                ));
            }
            continue;
        };
        types.insert(module.clone(), kind);
        let shape = shape(source, &weight);
        match Type::ALL.into_iter().find(|t| t.name() == kind) {
            None => out.push(Fault::new(
                format!("{module}: type `{kind}`"),
                "qrmc writes FLOAT, W8A16, W8A8_DYNAMIC, W8A8, W4A4_DYNAMIC, W4A4_FLATQUANT_DYNAMIC",
            )),
            Some(kind) => out.extend(layer(&module, (kind, compute), &shape, tensors, ranks)),
        }
    }
    out.extend(cached(description, tensors, source));
    for parts in differing(source.facts.layers, |name| types.get(name)) {
        let what = format!("{parts} run as one module and differ in type");
        out.push(Fault::new(what, "give them the same type"));
    }
    out
}

/// The tensors that caches with codes ask for.
fn cached(description: &Map<String, Value>, tensors: &Headers, source: &Module) -> Vec<Fault> {
    let said = description.get("kv_cache_type").and_then(Value::as_str);
    let stray = tensors.keys().find(|n| n.contains(".kv_cache_"));
    match (said, stray) {
        (None, None) => return Vec::new(),
        (Some(super::caches::KIND), _) => {}
        (None, Some(name)) => {
            let what =
                format!("tensor `{name}` is there, and quant_model_description.json has no `kv_cache_type`");
            return vec![Fault::new(what, "write the folder again")];
        }
        (Some(other), _) => {
            return vec![Fault::new(format!("`kv_cache_type` is `{other}`"), "qrmc writes C8")];
        }
    }
    let facts = &source.facts;
    let width = [(facts.kv_heads * facts.head_dim) as usize];
    let mut out = Vec::new();
    for layer in 0..facts.layers {
        for part in [
            "k_proj.kv_cache_scale",
            "k_proj.kv_cache_offset",
            "v_proj.kv_cache_scale",
            "v_proj.kv_cache_offset",
        ] {
            out.extend(wanted(
                &format!("model.layers.{layer}.self_attn.{part}"),
                (Dtype::F32, &width),
                super::caches::KIND,
                tensors,
            ));
        }
    }
    out
}

/// What is wrong with a tensor that a type asks for.
fn wanted(name: &str, (dtype, shape): (Dtype, &[usize]), kind: &str, tensors: &Headers) -> Option<Fault> {
    match tensors.get(name) {
        Some((d, s)) if *d == dtype.to_string() && s == shape => None,
        Some((d, s)) => {
            let what = format!("tensor `{name}` is {d} {s:?}; {kind} wants {dtype} {shape:?}");
            Some(Fault::new(what, "write the folder again, for this type of the model and these ranks"))
        }
        None => {
            let what = format!("tensor `{name}` is missing; {kind} wants {dtype} {shape:?}");
            Some(Fault::new(what, "write the folder again"))
        }
    }
}

fn shape(source: &Module, weight: &str) -> Vec<usize> {
    let found = source.find_weight(weight).or_else(|| source.find_weight("model.embed_tokens.weight"));
    found.and_then(|w| source.weight(w).ty.shape.as_fixed()).unwrap_or_default()
}

/// The tensors that a type asks for.
fn layer(
    module: &str,
    (kind, compute): (Type, ScaleType),
    shape: &[usize],
    tensors: &Headers,
    ranks: &[u32],
) -> Vec<Fault> {
    let &[rows, cols] = shape else { return Vec::new() };
    let mut want: Vec<(&str, Dtype, Vec<usize>)> = Vec::new();
    if kind != Type::Float {
        want.push(("weight", Dtype::I8, vec![rows, cols]));
    }
    if kind == Type::W8A8 {
        want.push(("input_scale", Dtype::F32, vec![1]));
        want.push(("input_offset", Dtype::F32, vec![1]));
        want.push(("deq_scale", deq_type(compute), vec![rows]));
        want.push(("quant_bias", Dtype::I32, vec![rows]));
    } else if kind != Type::Float {
        want.push(("weight_scale", Dtype::F32, vec![rows, 1]));
        want.push(("weight_offset", Dtype::F32, vec![rows, 1]));
    }
    let mut out = Vec::new();
    if kind == Type::W4A4FlatQuantDynamic {
        // On several ranks the loader computes the pair of the inputs of one.
        let cut = module.ends_with("o_proj") || module.ends_with("down_proj");
        let least = if cut { ranks.iter().copied().max().unwrap_or(1).max(1) as usize } else { 1 };
        match pair_of(cols / least) {
            Ok((left, right)) => {
                want.push(("left_trans", Dtype::F32, vec![left, left]));
                want.push(("right_trans", Dtype::F32, vec![right, right]));
                want.push(("clip_ratio", Dtype::F32, vec![1]));
            }
            Err(why) => out.push(Fault::new(format!("{module}: {why}"), "use W8A8_DYNAMIC")),
        }
    }
    for (suffix, dtype, shape) in want {
        out.extend(wanted(&format!("{module}.{suffix}"), (dtype, &shape), kind.name(), tensors));
    }
    out
}
