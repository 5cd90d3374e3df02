//! What the metadata says about the model, and the Hugging Face `config.json` that says the same.

use qrmc_ir::Elem;
use serde_json::{Map, Value, json};

use super::reader::{GgufFile, Meta};
use super::rope;
use super::tokenizer::Special;
use crate::ImportError;

/// Architectures that are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arch {
    Llama,
    Qwen2,
    Qwen3,
}

impl Arch {
    const ALL: [Arch; 3] = [Arch::Llama, Arch::Qwen2, Arch::Qwen3];

    /// Name in GGUF, and `model_type` in `config.json`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Arch::Llama => "llama",
            Arch::Qwen2 => "qwen2",
            Arch::Qwen3 => "qwen3",
        }
    }

    fn class(self) -> &'static str {
        match self {
            Arch::Llama => "LlamaForCausalLM",
            Arch::Qwen2 => "Qwen2ForCausalLM",
            Arch::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// The numbers that shape a decoder.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) arch: Arch,
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// Rows of the embedding.
    pub(super) vocab: usize,
    /// Positions the model was trained for.
    pub(super) context: u64,
    pub(super) rope_theta: f64,
}

/// Keys (after `{arch}.`) whose presence changes the function in a way that no supported config can say,
/// with the value that changes nothing.
const INERT: [(&str, f64); 9] = [
    ("expert_count", 0.0),
    ("attention.scale", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
];

impl Model {
    /// Reads and checks the metadata of the architecture.
    ///
    /// # Errors
    /// If the architecture is not supported, a number is missing or contradicts another, or the metadata
    /// asks for something that the supported architectures do not do.
    pub(super) fn read(file: &GgufFile) -> Result<Self, ImportError> {
        let name = file
            .str("general.architecture")?
            .ok_or_else(|| file.fail("`general.architecture` is missing"))?;
        let arch = Arch::ALL.into_iter().find(|a| a.name() == name).ok_or_else(|| {
            let known = Arch::ALL.map(Arch::name).join(", ");
            file.fail(format!("the architecture is `{name}`; supported are {known}"))
        })?;
        let key = |k: &str| format!("{name}.{k}");
        let uint = |k: &str| -> Result<usize, ImportError> {
            match uniform(file, &key(k))? {
                Some(0) => Err(file.fail(format!("`{}` is 0", key(k)))),
                Some(n) => usize::try_from(n).map_err(|_| file.fail(format!("`{}` is {n}", key(k)))),
                None => Err(file.fail(format!("`{}` is missing", key(k)))),
            }
        };
        if let Some(n @ 2..) = file.uint("split.count")? {
            return Err(file
                .fail(format!("this is one of {n} parts of a model; single files are read"))
                .hint("join the parts with `llama-gguf-split --merge`"));
        }
        for (k, inert) in INERT {
            let value = match file.meta(&key(k)) {
                None => continue,
                Some(Meta::Uint(_) | Meta::Int(_)) => file.uint(&key(k))?.map(|n| n as f64),
                Some(_) => file.float(&key(k))?,
            };
            if let Some(v) = value.filter(|&v| v != inert) {
                return Err(
                    file.fail(format!("`{}` is {v}, which a plain {name} decoder does not have", key(k)))
                );
            }
        }
        if file.bool(&key("attention.causal"))? == Some(false) {
            return Err(
                file.fail(format!("`{}` is false; only causal decoders are read", key("attention.causal")))
            );
        }
        let embedding = file.tensors().iter().find(|t| t.name == "token_embd.weight");
        let vocab = match embedding.map(|t| t.shape.as_slice()) {
            Some(&[rows, _]) => rows,
            Some(shape) => {
                return Err(
                    file.fail(format!("`token_embd.weight` has shape {shape:?}; two sizes are wanted"))
                );
            }
            None => return Err(file.fail("tensor `token_embd.weight` is missing")),
        };
        let (hidden, heads) = (uint("embedding_length")?, uint("attention.head_count")?);
        let kv_heads = match file.meta(&key("attention.head_count_kv")) {
            None => heads,
            Some(_) => uint("attention.head_count_kv")?,
        };
        let head_dim = match file.uint(&key("attention.key_length"))? {
            Some(n) => n as usize,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                let what = format!(
                    "hidden size {hidden} is no multiple of {heads} heads and `{}` is missing",
                    key("attention.key_length")
                );
                return Err(file.fail(what));
            }
        };
        if heads % kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
            let what = format!(
                "{heads} heads of {head_dim}, {kv_heads} for keys and values: no whole groups of even width"
            );
            return Err(file.fail(what));
        }
        for k in ["attention.value_length", "rope.dimension_count"] {
            if let Some(n) = file.uint(&key(k))?.filter(|&n| n != head_dim as u64) {
                return Err(file.fail(format!(
                    "`{}` is {n} but heads are {head_dim} wide; these must be equal",
                    key(k)
                )));
            }
        }
        let rope_theta = file.float(&key("rope.freq_base"))?.unwrap_or(10000.0);
        Ok(Model {
            arch,
            layers: uint("block_count")?,
            hidden,
            intermediate: uint("feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context: uint("context_length")? as u64,
            rope_theta,
        })
    }

    /// A metadata key of this architecture.
    pub(super) fn key(&self, k: &str) -> String {
        format!("{}.{k}", self.arch.name())
    }
}

/// An integer, or a list (one a layer) of which all are equal.
fn uniform(file: &GgufFile, key: &str) -> Result<Option<u64>, ImportError> {
    if !matches!(file.meta(key), Some(Meta::Array(_))) {
        return file.uint(key);
    }
    let list = file.ints(key)?.unwrap_or_default();
    match (list.first(), list.iter().min(), list.iter().max()) {
        (Some(&n), Some(min), Some(max)) if min == max && n >= 0 => Ok(Some(n as u64)),
        (_, min, max) => {
            let what =
                format!("`{key}` differs between layers, from {min:?} to {max:?}; one number is wanted");
            Err(file.fail(what))
        }
    }
}

/// The `config.json` of the model. Floats are the shortest decimals that round to what is stored.
///
/// # Errors
/// If a number is missing or the rope scaling cannot be said in a config.
pub(super) fn config_json(file: &GgufFile, model: &Model, special: &Special) -> Result<Value, ImportError> {
    let has = |name: &str| file.tensors().iter().any(|t| t.name == name);
    let eps_key = model.key("attention.layer_norm_rms_epsilon");
    let eps = file.float(&eps_key)?.ok_or_else(|| file.fail(format!("`{eps_key}` is missing")))?;
    let mut config = Map::new();
    let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
    put("architectures", json!([model.arch.class()]));
    put("model_type", json!(model.arch.name()));
    if model.arch != Arch::Qwen2 {
        put("attention_bias", json!(has("blk.0.attn_q.bias")));
    }
    if model.arch == Arch::Llama {
        put("mlp_bias", json!(has("blk.0.ffn_gate.bias")));
    }
    put("hidden_act", json!("silu"));
    put("hidden_size", json!(model.hidden));
    put("intermediate_size", json!(model.intermediate));
    put("num_hidden_layers", json!(model.layers));
    put("num_attention_heads", json!(model.heads));
    put("num_key_value_heads", json!(model.kv_heads));
    put("head_dim", json!(model.head_dim));
    put("vocab_size", json!(model.vocab));
    put("max_position_embeddings", json!(model.context));
    put("rms_norm_eps", json!(eps));
    put("rope_theta", json!(model.rope_theta));
    put("rope_scaling", rope::rope_scaling(file, model)?.unwrap_or(Value::Null));
    if let Some(window) = file.uint(&model.key("attention.sliding_window"))?.filter(|&w| w > 0) {
        put("sliding_window", json!(window));
        // A window that no position of the context can leave hides nothing.
        put("use_sliding_window", json!(window < model.context));
    }
    put("tie_word_embeddings", json!(!has("output.weight")));
    for (key, id) in
        [("bos_token_id", special.bos), ("eos_token_id", special.eos), ("pad_token_id", special.pad)]
    {
        put(key, json!(id));
    }
    put("torch_dtype", json!(torch_dtype(file)));
    put("use_cache", json!(true));
    Ok(Value::Object(config))
}

/// The one float type of all matrices; `float32` if they differ or if any is quantized.
fn torch_dtype(file: &GgufFile) -> &'static str {
    let mut elems = file.tensors().iter().filter(|t| t.shape.len() > 1).map(|t| t.ty.elem());
    let first = elems.next().unwrap_or(Elem::F32);
    match first {
        Elem::F16 if elems.all(|e| e == first) => "float16",
        Elem::BF16 if elems.all(|e| e == first) => "bfloat16",
        _ => "float32",
    }
}

#[cfg(test)]
mod tests;
