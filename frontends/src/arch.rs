//! Architectures as data: what tells one decoder family from another.

use qrmc_ir::{ModelFacts, Real, RopeAttr, RopeScaling};
use serde_json::Value;

use crate::ImportError;

/// Whether a part is there: always, never, or as a key of the configuration says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// In every model of the family.
    Always,
    /// In none.
    Never,
    /// A boolean key of `config.json`; absent means no.
    Key(&'static str),
}

/// The facts that set one decoder family apart. All share one block: RMSNorm, grouped-query attention with
/// rotary embedding, RMSNorm, gated feed-forward with SiLU.
#[derive(Clone, Copy, Debug)]
pub struct ArchSpec {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class in `architectures`.
    pub class: &'static str,
    /// Bias on the q, k and v projections.
    pub qkv_bias: When,
    /// Bias on the output projection.
    pub o_bias: When,
    /// Bias on gate, up and down.
    pub mlp_bias: When,
    /// RMSNorm on each head of q and k before the rotary embedding.
    pub qk_norm: bool,
}

/// Every family that is understood.
pub const ARCHS: [ArchSpec; 3] = [
    ArchSpec {
        model_type: "llama",
        class: "LlamaForCausalLM",
        qkv_bias: When::Key("attention_bias"),
        o_bias: When::Key("attention_bias"),
        mlp_bias: When::Key("mlp_bias"),
        qk_norm: false,
    },
    ArchSpec {
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        qkv_bias: When::Always,
        o_bias: When::Never,
        mlp_bias: When::Never,
        qk_norm: false,
    },
    ArchSpec {
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        qkv_bias: When::Key("attention_bias"),
        o_bias: When::Key("attention_bias"),
        mlp_bias: When::Never,
        qk_norm: true,
    },
];

/// A decoder with every choice made.
#[derive(Clone, Debug)]
pub struct DecoderConfig {
    /// Sizes and special tokens.
    pub facts: ModelFacts,
    /// Epsilon of every RMSNorm.
    pub eps: Real,
    /// Rotary embedding.
    pub rope: RopeAttr,
    /// Whether the head reads the embedding table.
    pub tied: bool,
    /// See [`ArchSpec`].
    pub qkv_bias: bool,
    /// See [`ArchSpec`].
    pub o_bias: bool,
    /// See [`ArchSpec`].
    pub mlp_bias: bool,
    /// See [`ArchSpec`].
    pub qk_norm: bool,
}

/// The token or tokens that a configuration names; none where it is something else.
pub(crate) fn token_ids(value: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match value {
        Value::Array(a) => a.iter().filter_map(id).collect(),
        v => id(v).into_iter().collect(),
    }
}

struct Reader<'a> {
    path: &'a std::path::Path,
    config: &'a Value,
}

impl Reader<'_> {
    fn fail<T>(&self, what: String, hint: &str) -> Result<T, ImportError> {
        let e = ImportError::new(self.path, format!("config.json: {what}"));
        Err(if hint.is_empty() { e } else { e.hint(hint) })
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.config.get(key).filter(|v| !v.is_null())
    }

    fn size_or(&self, key: &str, default: Option<u64>) -> Result<u64, ImportError> {
        match (self.get(key), default) {
            (None, Some(n)) => Ok(n),
            (None, None) => self.fail(format!("`{key}` is missing"), ""),
            // Larger sizes belong to no model; refusing them keeps every later product in range.
            (Some(v), _) => match v.as_u64().filter(|&n| n > 0 && n <= 1 << 28) {
                Some(n) => Ok(n),
                None => self.fail(format!("`{key}` is {v}, not a size from 1 to 2^28"), ""),
            },
        }
    }

    fn size(&self, key: &str) -> Result<u64, ImportError> {
        self.size_or(key, None)
    }

    fn real_in(&self, from: &Value, key: &str, default: Option<f64>) -> Result<Real, ImportError> {
        match (from.get(key).filter(|v| !v.is_null()), default) {
            (None, Some(x)) => Ok(Real(x)),
            (None, None) => self.fail(format!("`{key}` is missing"), ""),
            (Some(v), _) => match v.as_f64().filter(|x| x.is_finite() && *x > 0.0) {
                Some(x) => Ok(Real(x)),
                None => self.fail(format!("`{key}` is {v}, not a positive number"), ""),
            },
        }
    }

    fn flag(&self, key: &str) -> Result<bool, ImportError> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(v) => self.fail(format!("`{key}` is {v}, not true or false"), ""),
        }
    }

    fn when(&self, w: When) -> Result<bool, ImportError> {
        match w {
            When::Always => Ok(true),
            When::Never => Ok(false),
            When::Key(k) => self.flag(k),
        }
    }

    fn rope(&self, head_dim: u64, context: u64) -> Result<RopeAttr, ImportError> {
        // transformers 5 writes both theta and scaling into `rope_parameters`.
        let none = Value::Null;
        let params = self.get("rope_parameters").unwrap_or(&none);
        let scaling = self.get("rope_scaling").unwrap_or(params);
        let theta = match params.get("rope_theta") {
            Some(_) => self.real_in(params, "rope_theta", None)?,
            None => self.real_in(self.config, "rope_theta", Some(10_000.0))?,
        };
        let kind = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str);
        let original = |default: u64| -> Result<u32, ImportError> {
            let n = scaling
                .get("original_max_position_embeddings")
                .or_else(|| self.get("original_max_position_embeddings"))
                .map_or(Some(default), Value::as_u64);
            match n.and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0) {
                Some(n) => Ok(n),
                None => {
                    self.fail("`original_max_position_embeddings` of the rope scaling is no size".into(), "")
                }
            }
        };
        let scaling = match kind {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: self.real_in(scaling, "factor", None)? },
            Some("llama3") => RopeScaling::Llama3 {
                factor: self.real_in(scaling, "factor", None)?,
                low: self.real_in(scaling, "low_freq_factor", None)?,
                high: self.real_in(scaling, "high_freq_factor", None)?,
                original: original(context)?,
            },
            Some("yarn") => {
                let factor = self.real_in(scaling, "factor", None)?;
                let unread = ["mscale", "mscale_all_dim", "truncate"];
                if let Some(key) = unread.iter().find(|k| scaling.get(**k).is_some_and(|v| !v.is_null())) {
                    return self.fail(format!("yarn scaling with `{key}` is not understood"), "");
                }
                let default = if factor.0 > 1.0 { 0.1 * factor.0.ln() + 1.0 } else { 1.0 };
                RopeScaling::Yarn {
                    factor,
                    fast: self.real_in(scaling, "beta_fast", Some(32.0))?,
                    slow: self.real_in(scaling, "beta_slow", Some(1.0))?,
                    original: original(context)?,
                    attention: self.real_in(scaling, "attention_factor", Some(default))?,
                }
            }
            Some(other) => {
                return self.fail(
                    format!("rope scaling `{other}` is not understood"),
                    "understood: default, linear, llama3, yarn",
                );
            }
        };
        Ok(RopeAttr { head_dim: head_dim as u32, theta, scaling })
    }

    fn refuse_what_would_be_ignored(&self, layers: u64) -> Result<(), ImportError> {
        if self.flag("use_sliding_window")? {
            return self.fail(
                "sliding-window attention is on (`use_sliding_window`)".into(),
                "qrmc computes full attention, which is another function; set it to false only if the model was trained so",
            );
        }
        if let Some(types) = self.get("layer_types").and_then(Value::as_array) {
            if let Some(t) = types.iter().find(|t| t.as_str() != Some("full_attention")) {
                return self
                    .fail(format!("`layer_types` holds {t}"), "only full_attention layers are understood");
            }
            if types.len() as u64 != layers {
                let n = types.len();
                return self
                    .fail(format!("`layer_types` lists {n} layers, `num_hidden_layers` is {layers}"), "");
            }
        }
        let act = self.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
        if act != "silu" && act != "swish" {
            return self.fail(format!("activation `{act}`"), "only silu is understood");
        }
        if let Some(f) = self.get("partial_rotary_factor").filter(|f| f.as_f64() != Some(1.0)) {
            return self
                .fail(format!("`partial_rotary_factor` is {f}"), "only full rotary embedding is understood");
        }
        Ok(())
    }
}

/// Reads a Hugging Face configuration.
///
/// # Errors
/// If the architecture is unknown, a size is missing or absurd, or the configuration asks for something that would
/// have to be ignored.
pub fn read_config(path: &std::path::Path, config: &Value) -> Result<DecoderConfig, ImportError> {
    let r = Reader { path, config };
    let known = || ARCHS.iter().map(|a| a.model_type).collect::<Vec<_>>().join(", ");
    let Some(model_type) = r.get("model_type").and_then(Value::as_str) else {
        return r.fail("`model_type` is missing".into(), &format!("understood: {}", known()));
    };
    let Some(spec) = ARCHS.iter().find(|a| a.model_type == model_type) else {
        return r.fail(
            format!("unknown architecture `{model_type}`"),
            &format!("understood: {}; docs/adding-an-architecture.md shows how to add one", known()),
        );
    };
    let (hidden, heads) = (r.size("hidden_size")?, r.size("num_attention_heads")?);
    let kv_heads = r.size_or("num_key_value_heads", Some(heads))?;
    let head_dim = match r.get("head_dim") {
        Some(_) => r.size("head_dim")?,
        None if hidden % heads == 0 => hidden / heads,
        None => {
            return r.fail(
                format!("{heads} heads do not divide hidden size {hidden}, and `head_dim` is missing"),
                "",
            );
        }
    };
    if heads % kv_heads != 0 {
        return r.fail(format!("{heads} query heads do not share {kv_heads} key heads evenly"), "");
    }
    if head_dim % 2 != 0 {
        return r.fail(format!("head size {head_dim} is odd, which rotary embedding does not allow"), "");
    }
    let (layers, context) = (r.size("num_hidden_layers")?, r.size_or("max_position_embeddings", Some(2048))?);
    if layers > 10_000 {
        return r.fail(format!("{layers} layers"), "no model has that many");
    }
    r.refuse_what_would_be_ignored(layers)?;
    Ok(DecoderConfig {
        facts: ModelFacts {
            arch: model_type.to_owned(),
            hidden,
            intermediate: r.size("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab: r.size("vocab_size")?,
            context,
            bos: token_ids(&config["bos_token_id"]).first().copied(),
            eos: token_ids(&config["eos_token_id"]),
        },
        eps: r.real_in(config, "rms_norm_eps", Some(1e-6))?,
        rope: r.rope(head_dim, context)?,
        tied: r.flag("tie_word_embeddings")?,
        qkv_bias: r.when(spec.qkv_bias)?,
        o_bias: r.when(spec.o_bias)?,
        mlp_bias: r.when(spec.mlp_bias)?,
        qk_norm: spec.qk_norm,
    })
}
