//! GGUF version 3, as llama.cpp loads it. A weight is stored in the smallest block type that holds its codes and scales
//! exactly; nothing is rounded.
//!
//! | block of 32 | holds `code - zero` in | bytes |
//! |---|---|---|
//! | `Q4_0` | -8 ..= 7 | 18 |
//! | `Q4_1` | 0 ..= 15 and `-scale * zero` as `f16` | 20 |
//! | `Q5_0` | -16 ..= 15 | 22 |
//! | `Q8_0` | -128 ..= 127 | 34 |

mod blocks;
mod file;

use qrmc_ir::{Elem, Grain, QuantSpec, RopeScaling, ScaleType, WeightSource};

use super::plan::{no_caches, weights_only};
use super::{Entry, ExportError, HEAD, Linear, View};
use crate::artefact::TensorPlan;
use blocks::Block;
use file::GgufTensor;
pub use file::{GgufPlan, Meta, WriteError};

/// Name on the command line.
pub const NAME: &str = "gguf";
/// One line: what it is, and who loads it.
pub const SUMMARY: &str = "one file with blocks of 32 codes: llama.cpp";
/// Elements of a block.
const BLOCK: usize = 32;

/// The scheme nearest to that of a linear layer which a block type holds exactly, if what it has does not fit.
///
/// # Errors
/// If scales or codes cannot be read.
pub fn nearest(l: &Linear, src: &dyn WeightSource) -> Result<Option<QuantSpec>, ExportError> {
    let mut spec = l.spec();
    if !l.group().is_multiple_of(BLOCK) && l.cols.is_multiple_of(BLOCK) {
        spec.grain = Grain::Group(BLOCK as u32);
    }
    if spec.bits == 8 && !spec.signed {
        (spec.signed, spec.zero) = (true, false);
    }
    if l.scales_fit(src, ScaleType::F16, NAME).is_err() {
        spec.scale = ScaleType::F16;
    }
    Ok((spec != l.spec()).then_some(spec))
}

/// Plans the file. `vocabulary` is what it says of the tokenizer.
///
/// # Errors
/// The first thing that no block type holds exactly, and what would.
pub fn plan<'a>(
    view: &'a View,
    src: &dyn WeightSource,
    name: &str,
    vocabulary: Vec<(String, Meta)>,
) -> Result<GgufPlan<'a>, ExportError> {
    weights_only(view, NAME)?;
    no_caches(view, "gguf files have no such cache")?;
    let mut tensors = Vec::new();
    let mut kinds = Vec::new();
    for e in &view.entries {
        let tensor = match e {
            Entry::Linear(l) => {
                let block = blocks::choose(l, src)?;
                kinds.push(block);
                let permuted = heads(view, &l.name).map(|_| view.facts.head_dim as usize);
                GgufTensor::coded(named(view, &format!("{}.weight", l.name))?, l, block, permuted)
            }
            Entry::Plain { stored, plan } => plain(view, stored, plan)?,
        };
        tensors.push(tensor);
    }
    if let RopeScaling::Llama3 { .. } = view.rope.scaling {
        tensors.insert(0, rope_factors(view));
    }
    let notes = notes(view, &kinds);
    let mut meta = metadata(view, name, &kinds)?;
    meta.extend(vocabulary);
    Ok(GgufPlan { meta, tensors, notes })
}

/// What was chosen where the smallest block of these bits would not do.
fn notes(view: &View, kinds: &[Block]) -> Vec<String> {
    let wider = |(l, b): &(&Linear, &Block)| b.bits() > l.bits().max(4);
    let wide: Vec<(&Linear, &Block)> = view.linears().zip(kinds).filter(wider).collect();
    let Some((l, block)) = wide.first() else { return Vec::new() };
    vec![format!(
        "{} matrices of {} are stored as {block}: their codes less their zero points do not fit a smaller block without \
         another rounding (sym=true would)",
        wide.len(),
        l.spec()
    )]
}

/// Heads whose rows are stored for interleaved rotation: queries and keys of the llama architecture.
fn heads(view: &View, module: &str) -> Option<u64> {
    if view.facts.arch != "llama" {
        return None;
    }
    let heads = [("q_proj", view.facts.heads), ("k_proj", view.facts.kv_heads)];
    heads.into_iter().find(|(name, _)| module.ends_with(name)).map(|(_, n)| n)
}

/// The name of a tensor in the file.
fn named(view: &View, name: &str) -> Result<String, ExportError> {
    let unknown = || ExportError::illegal(format!("tensor `{name}` has no name in a GGUF file"));
    match name {
        "model.embed_tokens.weight" => return Ok("token_embd.weight".into()),
        "model.norm.weight" => return Ok("output_norm.weight".into()),
        _ if name == format!("{HEAD}.weight") => return Ok("output.weight".into()),
        _ => {}
    }
    let rest = name.strip_prefix("model.layers.").ok_or_else(unknown)?;
    let (layer, rest) = rest.split_once('.').ok_or_else(unknown)?;
    let (part, kind) = rest.rsplit_once('.').ok_or_else(unknown)?;
    let part = match part {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" if view.facts.arch == "qwen3" => "attn_q_norm",
        "self_attn.k_norm" if view.facts.arch == "qwen3" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return Err(unknown()),
    };
    Ok(format!("blk.{layer}.{part}.{kind}"))
}

/// A tensor of floats: matrices as they are stored, vectors widened to `f32`, which llama.cpp adds and multiplies in.
fn plain<'a>(view: &View, stored: &'a str, plan: &TensorPlan) -> Result<GgufTensor<'a>, ExportError> {
    let shape = plan.ty.shape.as_fixed().unwrap_or_default();
    let to = match plan.ty.elem {
        _ if shape.len() == 1 => Elem::F32,
        elem @ (Elem::F32 | Elem::F16 | Elem::BF16) => elem,
        other => return Err(ExportError::illegal(format!("tensor `{}` is of type {other}", plan.name))),
    };
    let module = plan.name.rsplit_once('.').map_or("", |(m, _)| m);
    let permuted = heads(view, module).map(|_| view.facts.head_dim as usize);
    Ok(GgufTensor::floats(named(view, &plan.name)?, stored, shape, to, permuted))
}

/// Divisors of the rotary frequencies, which llama3 scaling is stored as.
fn rope_factors(view: &View) -> GgufTensor<'static> {
    let plain = qrmc_ir::RopeAttr { scaling: RopeScaling::None, ..view.rope };
    let (scaled, plain) = (view.rope.inv_freq(), plain.inv_freq());
    let factors = plain.iter().zip(&scaled).map(|(p, s)| (p / s) as f32).collect();
    GgufTensor::made("rope_freqs.weight".into(), factors)
}

fn metadata(view: &View, name: &str, kinds: &[Block]) -> Result<Vec<(String, Meta)>, ExportError> {
    let f = &view.facts;
    let arch = f.arch.as_str();
    let size = |n: u64, what: &str| {
        u32::try_from(n).map(Meta::U32).map_err(|_| ExportError::illegal(format!("{what} is {n}")))
    };
    let mut meta = vec![
        ("general.architecture".to_owned(), Meta::Str(arch.to_owned())),
        ("general.name".to_owned(), Meta::Str(name.to_owned())),
        ("general.file_type".to_owned(), Meta::U32(kinds.iter().max().map_or(0, |b| b.file_type()))),
        ("general.quantization_version".to_owned(), Meta::U32(2)),
    ];
    for (key, n) in [
        ("context_length", f.context),
        ("embedding_length", f.hidden),
        ("block_count", f.layers),
        ("feed_forward_length", f.intermediate),
        ("attention.head_count", f.heads),
        ("attention.head_count_kv", f.kv_heads),
        ("attention.key_length", f.head_dim),
        ("attention.value_length", f.head_dim),
        ("rope.dimension_count", f.head_dim),
        ("vocab_size", f.vocab),
    ] {
        meta.push((format!("{arch}.{key}"), size(n, key)?));
    }
    let mut real = |key: &str, x: f64| meta.push((format!("{arch}.{key}"), Meta::F32(x as f32)));
    real("attention.layer_norm_rms_epsilon", view.eps.0);
    real("rope.freq_base", view.rope.theta.0);
    match view.rope.scaling {
        // The factors of llama3 are a tensor.
        RopeScaling::None | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            real("rope.scaling.factor", factor.0);
            meta.push((format!("{arch}.rope.scaling.type"), Meta::Str("linear".into())));
        }
        RopeScaling::Yarn { factor, fast, slow, original, attention } => {
            let usual = 0.1 * factor.0.max(1.0).ln() + 1.0;
            if (attention.0 - usual).abs() > 1e-6 {
                return Err(ExportError::illegal(format!(
                    "yarn scaling with an attention factor of {}; llama.cpp computes {usual}",
                    attention.0
                )));
            }
            real("rope.scaling.factor", factor.0);
            real("rope.scaling.yarn_beta_fast", fast.0);
            real("rope.scaling.yarn_beta_slow", slow.0);
            meta.push((format!("{arch}.rope.scaling.type"), Meta::Str("yarn".into())));
            meta.push((format!("{arch}.rope.scaling.original_context_length"), Meta::U32(original)));
        }
    }
    Ok(meta)
}
