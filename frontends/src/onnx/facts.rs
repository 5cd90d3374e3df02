//! What a model is, as its graph and the files beside it say.

use std::path::Path;

use qrmc_ir::{ModelFacts, Module, RopeAttr, RopeScaling};
use serde_json::{Value, json};

use super::matrix::Matrix;
use super::roles::Roles;
use super::term::{Bin, T, Term, Terms};
use crate::arch::token_ids;
use crate::hf::{read_small, side_files};
use crate::{ARCHS, DecoderConfig, ImportError, SideFile, read_config};

/// Positions that a model is taken to have been made for where nothing says it.
const CONTEXT: u64 = 2048;

/// What the files beside a model say.
pub(super) struct Beside {
    config: Option<Value>,
    genai: Value,
    files: Vec<SideFile>,
    pub(super) rope: Option<RopeAttr>,
    pub(super) context: Option<u64>,
    pub(super) head_dim: Option<u64>,
    facts: Option<ModelFacts>,
}

/// What the graph says.
pub(super) struct Found {
    pub(super) facts: ModelFacts,
    /// Whether it has codes.
    pub(super) codes: bool,
    pub(super) notes: Vec<String>,
    eps: f64,
    rope: Option<RopeAttr>,
    tied: bool,
    qkv_bias: bool,
}

fn json_beside(path: &Path) -> Result<Option<Value>, ImportError> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = read_small(path)?;
    let value = serde_json::from_slice(&text).map_err(|e| {
        ImportError::new(path, format!("this is not JSON: {e}")).hint("download the file again")
    })?;
    Ok(Some(value))
}

/// The `genai_config.json` beside a model, if there is one.
///
/// # Errors
/// If it cannot be read, or is no JSON.
pub fn genai_config(model: &Path) -> Result<Option<Value>, ImportError> {
    json_beside(&model.parent().unwrap_or(Path::new("")).join("genai_config.json"))
}

/// The configuration of a decoder, or of a block of one, whose `vocab_size` may be 0.
fn configured(path: &Path, config: &Value) -> Option<DecoderConfig> {
    if config["vocab_size"] != json!(0) {
        return read_config(path, config).ok();
    }
    let mut of_one = config.clone();
    of_one["vocab_size"] = json!(1);
    let mut known = read_config(path, &of_one).ok()?;
    known.facts.vocab = 0;
    Some(known)
}

impl Beside {
    pub(super) fn read(path: &Path) -> Result<Self, ImportError> {
        let folder = path.parent().unwrap_or(Path::new(""));
        let config = json_beside(&folder.join("config.json"))?.filter(Value::is_object);
        let genai = genai_config(path)?.unwrap_or(Value::Null);
        // The graph decides what is computed; a configuration of another family says nothing about it.
        let known = config.as_ref().and_then(|c| configured(path, c));
        let genai_model = &genai["model"];
        let context =
            known.as_ref().map(|k| k.facts.context).or_else(|| genai_model["context_length"].as_u64());
        let head_dim =
            known.as_ref().map(|k| k.facts.head_dim).or_else(|| genai_model["decoder"]["head_size"].as_u64());
        Ok(Beside {
            rope: known.as_ref().map(|k| k.rope),
            context: context.filter(|c| (1..=1 << 28).contains(c)),
            head_dim,
            facts: known.map(|k| k.facts),
            files: side_files(folder)?,
            config,
            genai,
        })
    }

    /// Channels of the residual stream, as the configuration says.
    pub(super) fn hidden(&self) -> Option<u64> {
        self.facts.as_ref().map(|f| f.hidden)
    }

    /// Refuses a graph of other sizes than the configuration beside it says. A part of a model may have fewer layers, and
    /// without an embedding and a head it has no vocabulary; gives what should be known then.
    pub(super) fn agrees(&self, path: &Path, module: &Module) -> Result<Option<String>, ImportError> {
        let (Some(said), have) = (&self.facts, &module.facts) else { return Ok(None) };
        let layers = if module.lacks().is_some() { have.layers.max(said.layers) } else { have.layers };
        let vocab = if have.vocab == 0 { said.vocab } else { have.vocab };
        let pairs = [
            ("hidden_size", said.hidden, have.hidden),
            ("intermediate_size", said.intermediate, have.intermediate),
            ("num_hidden_layers", said.layers, layers),
            ("num_attention_heads", said.heads, have.heads),
            ("num_key_value_heads", said.kv_heads, have.kv_heads),
            ("vocab_size", said.vocab, vocab),
        ];
        if let Some((key, said, have)) = pairs.into_iter().find(|(_, said, have)| said != have) {
            return Err(ImportError::new(
                path,
                format!("config.json says `{key}` is {said}, the graph has {have}"),
            )
            .hint("config.json and the model belong to different models"));
        }
        let fewer = have.layers < said.layers;
        Ok(fewer.then(|| {
            format!(
                "this is a block: {} of the {} layers that config.json says, numbered from 0",
                have.layers, said.layers
            )
        }))
    }

    /// The configuration, and the files that go with the model.
    pub(super) fn files(&self, module: &Module, found: &Found) -> (Value, Vec<SideFile>) {
        if let (Some(config), Some(_)) = (&self.config, &self.facts) {
            let mut config = config.clone();
            if let Some(o) = config.as_object_mut() {
                o.remove("quantization_config");
            }
            return (config, self.files.clone());
        }
        let config = written(module, found);
        let mut files: Vec<SideFile> =
            self.files.iter().filter(|f| f.name != "config.json").cloned().collect();
        files.insert(0, SideFile { name: "config.json".into(), bytes: format!("{config:#}\n").into_bytes() });
        (config, files)
    }
}

/// A configuration for a model that has none beside it.
fn written(module: &Module, found: &Found) -> Value {
    let f = &module.facts;
    let class = ARCHS.iter().find(|a| a.model_type == f.arch).map_or("", |a| a.class);
    let mut config = json!({
        "architectures": [class],
        "model_type": f.arch,
        "hidden_size": f.hidden,
        "intermediate_size": f.intermediate,
        "num_hidden_layers": f.layers,
        "num_attention_heads": f.heads,
        "num_key_value_heads": f.kv_heads,
        "head_dim": f.head_dim,
        "vocab_size": f.vocab,
        "max_position_embeddings": f.context,
        "rms_norm_eps": found.eps,
        "tie_word_embeddings": found.tied,
        "hidden_act": "silu",
    });
    if f.arch != "qwen2" {
        config["attention_bias"] = found.qkv_bias.into();
    }
    if let Some(r) = found.rope.filter(|r| r.scaling == RopeScaling::None) {
        config["rope_theta"] = r.theta.0.into();
    }
    if let Some(b) = f.bos {
        config["bos_token_id"] = b.into();
    }
    if !f.eos.is_empty() {
        config["eos_token_id"] = json!(f.eos);
    }
    config
}

/// A single float as it is written in the fewest digits, such as 0.9: the same number where it is computed with.
pub(super) fn decimal(bits: u32) -> f64 {
    let x = f32::from_bits(bits);
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// Reads the sizes of a decoder from its terms.
///
/// # Errors
/// If its layers differ in them.
pub(super) fn found(terms: &Terms, roles: &Roles, result: T, beside: &Beside) -> Result<Found, String> {
    let mut heads = None;
    for l in &roles.layers {
        let Term::Attention(q, _, v, attr) = *terms.get(l.attention) else { continue };
        let here = (attr.heads, attr.kv_heads, terms.n(q), terms.n(v));
        if *heads.get_or_insert(here) != here {
            return Err("its layers have different heads".into());
        }
    }
    let (heads, kv_heads, width, _) = heads.ok_or("there is no attention in it")?;
    let hidden = terms.n(roles.layers[0].x);
    let (mut eps, mut rope, mut codes) = (None, None, false);
    let (mut qk_norm, mut qkv_bias, mut intermediate) = (false, false, 0);
    let (mut table, mut head) = (None, None);
    let matrix = |m: &Matrix| m.spec().is_some();
    for (t, info) in terms.all.iter().enumerate() {
        let weight = roles.weights.get(&(t as T)).map_or("", String::as_str);
        match &info.term {
            Term::Norm { eps: e, run, .. } => {
                eps.get_or_insert(decimal(*e));
                qk_norm |= *run < info.n;
            }
            Term::Rope(_, r) => {
                rope.get_or_insert(*r);
            }
            Term::Vector(_) => qkv_bias |= weight.ends_with("q_proj.bias"),
            Term::Bin(Bin::Mul, a, b, _)
                if [a, b].iter().any(|x| matches!(terms.get(**x), Term::Silu(_))) =>
            {
                intermediate = info.n;
            }
            Term::Embed(m) => {
                table = Some(m.clone());
                codes |= matrix(m);
            }
            Term::Linear(_, w) => {
                codes |= matrix(w);
                if weight == "lm_head.weight" {
                    head = Some(w.clone());
                }
            }
            _ => {}
        }
    }
    let family = if qk_norm {
        "qwen3"
    } else if qkv_bias {
        "qwen2"
    } else {
        "llama"
    };
    let said = beside.genai["model"]["type"].as_str().filter(|t| ARCHS.iter().any(|a| a.model_type == *t));
    let said = said.filter(|t| *t == family || *t == "llama" && family == "qwen2");
    let mut notes = Vec::new();
    if beside.context.is_none() {
        notes.push(format!(
            "nothing beside the model says how many positions it was made for: {CONTEXT} are taken"
        ));
    }
    let at = |k: &str| token_ids(&beside.genai["model"][k]);
    let facts = ModelFacts {
        arch: beside.facts.as_ref().map_or(said.unwrap_or(family), |f| f.arch.as_str()).to_owned(),
        hidden,
        intermediate,
        layers: roles.layers.len() as u64,
        heads: u64::from(heads),
        kv_heads: u64::from(kv_heads),
        head_dim: width / u64::from(heads).max(1),
        // A block has none.
        vocab: match (&head, &table) {
            (Some(_), _) => terms.n(result),
            (None, table) => table.as_ref().map_or(0, |m| m.rows),
        },
        context: beside.context.unwrap_or(CONTEXT),
        bos: beside.facts.as_ref().map_or_else(|| at("bos_token_id").first().copied(), |f| f.bos),
        eos: beside.facts.as_ref().map_or_else(|| at("eos_token_id"), |f| f.eos.clone()),
    };
    let tied = table.is_some() && table == head && !codes;
    Ok(Found { facts, codes, notes, eps: eps.unwrap_or(1e-6), rope, tied, qkv_bias })
}
