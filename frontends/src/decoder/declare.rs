//! The tensors of a decoder: what the configuration calls for against what a checkpoint has.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use qrmc_ir::{Dim, Elem, Module, NoWeights, RawWeight, Shape, TensorType, WeightError, WeightSource};

use crate::arch::DecoderConfig;
use crate::{Checkpoint, ImportError};

/// Name and shape of every tensor that the configuration calls for.
fn expected(c: &DecoderConfig) -> Vec<(String, Vec<u64>)> {
    let f = &c.facts;
    let (h, q, kv, inner) = (f.hidden, f.heads * f.head_dim, f.kv_heads * f.head_dim, f.intermediate);
    let mut v = vec![("model.embed_tokens.weight".to_owned(), vec![f.vocab, h])];
    for i in 0..f.layers {
        let p = format!("model.layers.{i}");
        let mut linear = |name: &str, rows: u64, cols: u64, bias: bool| {
            v.push((format!("{p}.{name}.weight"), vec![rows, cols]));
            if bias {
                v.push((format!("{p}.{name}.bias"), vec![rows]));
            }
        };
        linear("self_attn.q_proj", q, h, c.qkv_bias);
        linear("self_attn.k_proj", kv, h, c.qkv_bias);
        linear("self_attn.v_proj", kv, h, c.qkv_bias);
        linear("self_attn.o_proj", h, q, c.o_bias);
        linear("mlp.gate_proj", inner, h, c.mlp_bias);
        linear("mlp.up_proj", inner, h, c.mlp_bias);
        linear("mlp.down_proj", h, inner, c.mlp_bias);
        v.push((format!("{p}.input_layernorm.weight"), vec![h]));
        v.push((format!("{p}.post_attention_layernorm.weight"), vec![h]));
        if c.qk_norm {
            v.push((format!("{p}.self_attn.q_norm.weight"), vec![f.head_dim]));
            v.push((format!("{p}.self_attn.k_norm.weight"), vec![f.head_dim]));
        }
    }
    v.push(("model.norm.weight".to_owned(), vec![h]));
    if !c.tied {
        v.push(("lm_head.weight".to_owned(), vec![f.vocab, h]));
    }
    v
}

/// The tensors of a configuration, without bytes.
pub(crate) struct Expected<'a>(pub(crate) &'a DecoderConfig);

impl WeightSource for Expected<'_> {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        NoWeights.raw(name)
    }
}

impl Checkpoint for Expected<'_> {
    fn tensors(&self) -> Vec<(String, TensorType)> {
        let ty = |shape: Vec<u64>| {
            TensorType::new(Elem::F32, shape.into_iter().map(Dim::Fixed).collect::<Vec<_>>())
        };
        expected(self.0).into_iter().map(|(name, shape)| (name, ty(shape))).collect()
    }

    fn weight_files(&self) -> Vec<PathBuf> {
        Vec::new()
    }
}

pub(super) fn declare(
    module: &mut Module,
    path: &Path,
    config: &DecoderConfig,
    weights: &dyn Checkpoint,
) -> Result<(), ImportError> {
    let have: HashMap<String, TensorType> = weights.tensors().into_iter().collect();
    let want = expected(config);
    let mut used: HashSet<String> = HashSet::new();
    for (name, shape) in &want {
        used.insert(name.clone());
        let cache = name.strip_suffix(".weight").and_then(|module| weights.rounded_cache(module));
        for t in cache.iter().flat_map(|r| r.tensors()) {
            declare_as(module, path, &t.name, &t.ty)?;
            used.insert(t.name.clone());
        }
        if have.contains_key(&format!("{name}.codes")) {
            declare_codes(module, path, name, shape, &have, &mut used)?;
            for t in weights.rounded_input(name).iter().flat_map(|r| r.tensors()) {
                declare_as(module, path, &t.name, &t.ty)?;
                used.insert(t.name.clone());
            }
            continue;
        }
        let Some(ty) = have.get(name) else {
            return Err(ImportError::new(path, format!("tensor `{name}` is missing")).hint(
                "the configuration calls for it; is a shard missing, or is this another model's config.json?",
            ));
        };
        let shape = Shape(shape.iter().map(|&n| Dim::Fixed(n)).collect());
        if ty.shape != shape {
            let what = format!("tensor `{name}` is {}, the configuration says {shape}", ty.shape);
            return Err(
                ImportError::new(path, what).hint("config.json and the weights belong to different models")
            );
        }
        if !matches!(ty.elem, Elem::F32 | Elem::F16 | Elem::BF16) {
            return Err(ImportError::new(path, format!("tensor `{name}` is of type {}", ty.elem))
                .hint("weights are f32, f16 or bf16"));
        }
        declare_as(module, path, name, ty)?;
    }
    let mut extra: Vec<&str> = have.keys().map(String::as_str).filter(|n| !used.contains(*n)).collect();
    extra.retain(|n| !n.ends_with(".rotary_emb.inv_freq"));
    if config.tied && extra.contains(&"lm_head.weight.codes") {
        return Err(ImportError::new(
            path,
            "`tie_word_embeddings` is true but the head has codes of its own",
        )
        .hint("set it to false: the quantized head is another matrix than the embedding"));
    }
    if config.tied && extra.contains(&"lm_head.weight") {
        extra.retain(|n| *n != "lm_head.weight");
        tied_head_is_the_embedding(path, weights)?;
    }
    extra.sort_unstable();
    match extra.first() {
        None => Ok(()),
        Some(name) => {
            let what = format!(
                "tensor `{name}` is not part of a {} model ({} such)",
                config.facts.arch,
                extra.len()
            );
            Err(ImportError::new(path, what)
                .hint("ignoring a tensor would change the model; config.json may be wrong"))
        }
    }
}

fn declare_as(module: &mut Module, path: &Path, name: &str, ty: &TensorType) -> Result<(), ImportError> {
    let twice = |other| ImportError::new(path, format!("tensor `{name}` is listed as {ty} and as {other}"));
    module.declare(name, ty.clone()).map(|_| ()).map_err(twice)
}

/// Declares codes, scales and zero points of the weight `name`, which a checkpoint hands out in its place.
fn declare_codes(
    module: &mut Module,
    path: &Path,
    name: &str,
    shape: &[u64],
    have: &HashMap<String, TensorType>,
    used: &mut HashSet<String>,
) -> Result<(), ImportError> {
    for end in [".codes", ".scale", ".zero"] {
        let part = format!("{name}{end}");
        let Some(ty) = have.get(&part) else { continue };
        let shape = Shape(shape.iter().map(|&n| Dim::Fixed(n)).collect());
        if end == ".codes" && ty.shape != shape {
            let what = format!("the codes of `{name}` are {}, the configuration says {shape}", ty.shape);
            return Err(
                ImportError::new(path, what).hint("config.json and the weights belong to different models")
            );
        }
        declare_as(module, path, &part, ty)?;
        used.insert(part);
    }
    Ok(())
}

fn tied_head_is_the_embedding(path: &Path, weights: &dyn Checkpoint) -> Result<(), ImportError> {
    let read = |name| weights.raw(name).map_err(|e| ImportError::new(path, e.to_string()));
    if read("lm_head.weight")?.bytes == read("model.embed_tokens.weight")?.bytes {
        return Ok(());
    }
    Err(ImportError::new(
        path,
        "`tie_word_embeddings` is true but `lm_head.weight` differs from the embedding",
    )
    .hint("set it to false if the model was trained with a head of its own"))
}
