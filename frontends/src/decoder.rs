//! The one builder that turns a decoder configuration into functions.
//!
//! Names of values are part of the contract with passes; `docs/ir.md` lists them.

mod declare;
mod main;

use std::path::Path;

use qrmc_ir::{
    AttnAttr, BinaryOp, Builder, Diag, Dim, Elem, Func, Module, Op, Real, Rule, Shape, Sym, TensorType,
    ValueId,
};

pub(crate) use self::declare::Expected;
use self::declare::declare;
pub(crate) use self::main::main;
use crate::arch::DecoderConfig;
use crate::{Checkpoint, ImportError, RoundedInput};

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
    // Layers that share a rounded input share its scale.
    module.drop_unused_weights();
    Ok(module)
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
fn rounded<'w>(
    b: &mut Builder<'_>,
    x: ValueId,
    by: Option<&'w RoundedInput>,
    made: &mut Vec<(ValueId, &'w RoundedInput, ValueId)>,
) -> Result<ValueId, Diag> {
    let Some(by) = by else { return Ok(x) };
    if let Some((.., y)) = made.iter().find(|(of, other, _)| *of == x && other.same(by)) {
        return Ok(*y);
    }
    let mut v = x;
    for (t, inner) in &by.transforms {
        let m = weight(b, &t.name)?;
        v = b.op1(Op::ModeMul { inner: *inner }, &[v, m])?;
    }
    let y = if by.calibrated.is_empty() {
        let ends = by.clip.iter().map(|t| weight(b, &t.name)).collect::<Result<Vec<_>, _>>()?;
        b.op1(Op::FakeQuant(by.spec, Rule::Dynamic), &[&[v], &ends[..], &ends[..]].concat())?
    } else {
        let sides = by.calibrated.iter().map(|t| weight(b, &t.name)).collect::<Result<Vec<_>, _>>()?;
        let codes = b.op1(Op::QCast(by.spec), &[&[v], &sides[..]].concat())?;
        b.op1(Op::DCast, &[&[codes], &sides[..]].concat())?
    };
    made.push((x, by, y));
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
    rounded: Vec<(ValueId, &'b RoundedInput, ValueId)>,
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
    let [k, v] = [(k, "k_proj"), (v, "v_proj")].map(|(x, linear)| {
        let by = weights.rounded_cache(&format!("{}.self_attn.{linear}", l.prefix));
        rounded(l.b, x, by, &mut l.rounded)
    });
    let (k, v) = (k?, v?);
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
