//! The one builder that turns a decoder configuration into functions.
//!
//! Names of values are part of the contract with passes; `docs/ir.md` lists them.

mod main;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use qrmc_ir::{
    AttnAttr, BinaryOp, Builder, Diag, Dim, Elem, Func, Module, NoWeights, Op, QuantSpec, RawWeight, Real,
    Rule, Shape, Sym, TensorType, ValueId, WeightError, WeightSource,
};

pub(crate) use self::main::main;
use crate::arch::DecoderConfig;
use crate::{Checkpoint, ImportError};

/// Builds the module of a decoder over the tensors of a checkpoint.
///
/// # Errors
/// If a tensor is missing, has another shape than the configuration says, or is one that the architecture does not use.
pub(crate) fn build(
    path: &Path,
    config: &DecoderConfig,
    weights: &dyn Checkpoint,
) -> Result<Module, ImportError> {
    let mut module = Module::new(config.facts.clone());
    declare(&mut module, path, config, weights)?;
    let internal = |d: Diag| ImportError::new(path, format!("the configuration does not make a model: {d}"));
    let f = embed(&module).map_err(internal)?;
    module.funcs.push(f);
    for i in 0..config.facts.layers {
        let f = layer(&module, config, weights, i).map_err(internal)?;
        module.funcs.push(f);
    }
    let f = head(&module, config, weights).map_err(internal)?;
    module.funcs.push(f);
    let f = main(&module).map_err(internal)?;
    module.funcs.push(f);
    Ok(module)
}

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

fn declare(
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
        if have.contains_key(&format!("{name}.codes")) {
            declare_codes(module, path, name, shape, &have, &mut used)?;
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
        if let Err(other) = module.declare(name, ty.clone()) {
            return Err(ImportError::new(path, format!("tensor `{name}` is listed as {ty} and as {other}")));
        }
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
        if let Err(other) = module.declare(&part, ty.clone()) {
            return Err(ImportError::new(path, format!("tensor `{part}` is listed as {ty} and as {other}")));
        }
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

pub(crate) fn stream(module: &Module) -> TensorType {
    TensorType::new(Elem::F32, vec![Sym::B.into(), Sym::S.into(), Dim::Fixed(module.facts.hidden)])
}

pub(crate) fn positions() -> TensorType {
    TensorType::new(Elem::I32, vec![Sym::S.into()])
}

pub(crate) fn past(module: &Module) -> TensorType {
    let width = module.facts.kv_heads * module.facts.head_dim;
    TensorType::new(Elem::F32, vec![Sym::B.into(), Sym::P.into(), Dim::Fixed(width)])
}

pub(crate) fn tokens() -> TensorType {
    TensorType::new(Elem::I32, vec![Sym::B.into(), Sym::S.into()])
}

/// The value of a weight: itself, or what its codes stand for.
pub(crate) fn weight(b: &mut Builder<'_>, name: &str) -> Result<ValueId, Diag> {
    let module = b.module();
    if let Some(id) = module.find_weight(name) {
        return Ok(b.weight(id));
    }
    let part = |end: &str| module.find_weight(&format!("{name}{end}"));
    let parts: Vec<ValueId> =
        [".codes", ".scale", ".zero"].into_iter().filter_map(part).map(|id| b.weight(id)).collect();
    match parts.is_empty() {
        true => Err(Diag::new("Q0107", format!("weight @{name} is not declared"))),
        false => b.op1(Op::DCast, &parts),
    }
}

/// The input of a linear layer as the checkpoint has it rounded. Layers that read one value and round it alike share it.
fn rounded(
    b: &mut Builder<'_>,
    x: ValueId,
    spec: Option<QuantSpec>,
    made: &mut Vec<(ValueId, QuantSpec, ValueId)>,
) -> Result<ValueId, Diag> {
    let Some(spec) = spec else { return Ok(x) };
    if let Some((.., y)) = made.iter().find(|(of, by, _)| (*of, *by) == (x, spec)) {
        return Ok(*y);
    }
    let y = b.op1(Op::FakeQuant(spec, Rule::Dynamic), &[x])?;
    made.push((x, spec, y));
    Ok(y)
}

fn embed(module: &Module) -> Result<Func, Diag> {
    let mut b = Builder::new(module, "embed");
    let ids = b.param(Some("ids"), tokens());
    let table = weight(&mut b, "model.embed_tokens.weight")?;
    let y = b.op1(Op::Gather, &[table, ids])?;
    b.name(y, "y");
    Ok(b.finish(&[y]))
}

/// Builds one layer; `prefix` is that of its weights.
struct Layer<'b, 'm> {
    b: &'b mut Builder<'m>,
    prefix: String,
    config: &'b DecoderConfig,
    weights: &'b dyn Checkpoint,
    /// Inputs of linear layers that are rounded already: of what, how, and the result.
    rounded: Vec<(ValueId, QuantSpec, ValueId)>,
}

impl Layer<'_, '_> {
    fn weight(&mut self, name: &str) -> Result<ValueId, Diag> {
        let name = format!("{}.{name}", self.prefix);
        weight(self.b, &name)
    }

    fn named(&mut self, op: Op, ins: &[ValueId], name: &str) -> Result<ValueId, Diag> {
        let v = self.b.op1(op, ins)?;
        self.b.name(v, name);
        Ok(v)
    }

    fn norm(&mut self, x: ValueId, gain: &str, name: &str) -> Result<ValueId, Diag> {
        let gain = self.weight(&format!("{gain}.weight"))?;
        self.named(Op::RmsNorm(self.config.eps), &[x, gain], name)
    }

    /// A linear layer; its product is named `name`, the sum with the bias `biased`.
    fn linear(
        &mut self,
        x: ValueId,
        module: &str,
        bias: bool,
        name: &str,
        biased: &str,
    ) -> Result<ValueId, Diag> {
        let input = self.weights.rounded_input(&format!("{}.{module}.weight", self.prefix));
        let x = rounded(self.b, x, input, &mut self.rounded)?;
        let w = self.weight(&format!("{module}.weight"))?;
        let y = self.named(Op::MatMul { trans_b: true }, &[x, w], name)?;
        if !bias {
            return Ok(y);
        }
        let bias = self.weight(&format!("{module}.bias"))?;
        self.named(Op::Binary(BinaryOp::Add), &[y, bias], biased)
    }

    fn head_norm(&mut self, x: ValueId, gain: &str, name: &str) -> Result<ValueId, Diag> {
        let shape = self.b.ty(x).shape.clone();
        let d = self.config.facts.head_dim;
        let heads = shape.last().and_then(Dim::fixed).unwrap_or(0) as u64 / d;
        let split = Shape(vec![shape.0[0], shape.0[1], Dim::Fixed(heads), Dim::Fixed(d)]);
        let x = self.b.op1(Op::Reshape(split), &[x])?;
        let gain = self.weight(&format!("{gain}.weight"))?;
        let y = self.b.op1(Op::RmsNorm(self.config.eps), &[x, gain])?;
        self.named(Op::Reshape(shape), &[y], name)
    }
}

fn layer(module: &Module, config: &DecoderConfig, weights: &dyn Checkpoint, i: u64) -> Result<Func, Diag> {
    let f = &config.facts;
    let mut b = Builder::new(module, &format!("layer{i}"));
    let x = b.param(Some("x"), stream(module));
    let pos = b.param(Some("pos"), positions());
    let k_past = b.param(Some("k_past"), past(module));
    let v_past = b.param(Some("v_past"), past(module));
    let prefix = format!("model.layers.{i}");
    let mut l = Layer { b: &mut b, prefix, config, weights, rounded: Vec::new() };

    let attn_in = l.norm(x, "input_layernorm", "attn_in")?;
    let mut q = l.linear(attn_in, "self_attn.q_proj", config.qkv_bias, "q_proj", "q")?;
    let mut k = l.linear(attn_in, "self_attn.k_proj", config.qkv_bias, "k_proj", "k")?;
    let v = l.linear(attn_in, "self_attn.v_proj", config.qkv_bias, "v_proj", "v")?;
    if config.qk_norm {
        q = l.head_norm(q, "self_attn.q_norm", "q_normed")?;
        k = l.head_norm(k, "self_attn.k_norm", "k_normed")?;
    }
    let q = l.named(Op::Rope(config.rope), &[q, pos], "q_rope")?;
    let k = l.named(Op::Rope(config.rope), &[k, pos], "k_rope")?;
    let k_all = l.named(Op::CacheAppend, &[k_past, k], "k_all")?;
    let v_all = l.named(Op::CacheAppend, &[v_past, v], "v_all")?;
    let attr = AttnAttr {
        heads: f.heads as u32,
        kv_heads: f.kv_heads as u32,
        scale: Real(1.0 / (f.head_dim as f64).sqrt()),
    };
    let o_in = l.named(Op::Attention(attr), &[q, k_all, v_all], "o_in")?;
    let attn_out = l.linear(o_in, "self_attn.o_proj", config.o_bias, "o_proj", "attn_out")?;
    // The output of a block has its name whether or not there is a bias.
    l.b.name(attn_out, "attn_out");
    let x_mid = l.named(Op::Binary(BinaryOp::Add), &[x, attn_out], "x_mid")?;

    let mlp_in = l.norm(x_mid, "post_attention_layernorm", "mlp_in")?;
    let gate = l.linear(mlp_in, "mlp.gate_proj", config.mlp_bias, "gate_proj", "gate")?;
    let up = l.linear(mlp_in, "mlp.up_proj", config.mlp_bias, "up_proj", "up")?;
    let act = l.b.op1(Op::Silu, &[gate])?;
    let down_in = l.named(Op::Binary(BinaryOp::Mul), &[act, up], "down_in")?;
    let mlp_out = l.linear(down_in, "mlp.down_proj", config.mlp_bias, "down_proj", "mlp_out")?;
    l.b.name(mlp_out, "mlp_out");
    let y = l.named(Op::Binary(BinaryOp::Add), &[x_mid, mlp_out], "y")?;
    Ok(b.finish(&[y, k_all, v_all]))
}

fn head(module: &Module, config: &DecoderConfig, weights: &dyn Checkpoint) -> Result<Func, Diag> {
    let mut b = Builder::new(module, "head");
    let x = b.param(Some("x"), stream(module));
    let gain = weight(&mut b, "model.norm.weight")?;
    let normed = b.op1(Op::RmsNorm(config.eps), &[x, gain])?;
    b.name(normed, "head_in");
    let table = if config.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let x = rounded(&mut b, normed, weights.rounded_input(table), &mut Vec::new())?;
    let table = weight(&mut b, table)?;
    let logits = b.linear(x, table)?;
    b.name(logits, "logits");
    Ok(b.finish(&[logits]))
}
