//! The tensors of a GGUF file under Hugging Face names, in Hugging Face row order.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;

use bytes::Bytes;
use qrmc_ir::{Elem, QuantSpec, RawWeight, Shape, TensorType, WeightError, WeightSource};

use super::codes;
use super::config::{Arch, Model};
use super::dequant::GgmlType;
use super::reader::{GgufFile, GgufTensor};
use super::rope::ROPE_FREQS;
use crate::{Checkpoint, ImportError, Integers};

impl GgmlType {
    /// The type under which tensors stored so are handed out: their own for floats, `f32` for codes.
    pub fn elem(self) -> Elem {
        match self {
            GgmlType::F16 => Elem::F16,
            GgmlType::BF16 => Elem::BF16,
            _ => Elem::F32,
        }
    }
}

/// One tensor under its Hugging Face name.
#[derive(Debug)]
struct Named {
    name: String,
    /// Which tensor of the file.
    tensor: usize,
    /// Heads whose rows are stored for interleaved rotation and have to be put back in order.
    heads: Option<usize>,
    part: Part,
}

/// What of a tensor is handed out.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Part {
    /// Its values.
    Values,
    /// Its codes, its scales or its zero points under this scheme.
    Codes(QuantSpec),
    Scale(QuantSpec),
    Zero(QuantSpec),
}

/// The weights of a GGUF file. Float tensors keep their type and are borrowed from the file, unless rows must be
/// put in order; quantized ones are dequantised to `f32` each time they are asked for, or handed out as codes.
#[derive(Debug)]
pub struct GgufCheckpoint {
    file: GgufFile,
    order: Vec<Named>,
    by_name: HashMap<String, usize>,
    /// Whether some tensor can be had as codes.
    has_codes: bool,
}

impl GgufCheckpoint {
    /// Names every tensor of the file. `rope_freqs.weight` is no weight: it is part of the config.
    ///
    /// # Errors
    /// If a tensor has no Hugging Face counterpart in this architecture, or its rows are no whole heads.
    pub(super) fn new(file: GgufFile, model: &Model, integers: Integers) -> Result<Self, ImportError> {
        let mut order = Vec::new();
        let mut has_codes = false;
        for (i, tensor) in file.tensors().iter().enumerate().filter(|(_, t)| t.name != ROPE_FREQS) {
            let name = hf_name(&tensor.name, model).map_err(|why| {
                file.fail(format!("tensor `{}` {why}", tensor.name))
                    .hint("import the original Hugging Face folder if it is supported")
            })?;
            let heads = permuted_heads(&tensor.name, model);
            let rows = tensor.shape[0];
            if let Some(heads) = heads.filter(|&h| rows % 2 != 0 || !(rows / 2).is_multiple_of(h)) {
                return Err(file
                    .fail(format!("tensor `{}` has {rows} rows, no pairs for {heads} heads", tensor.name)));
            }
            if heads.is_some() && tensor.shape.len() == 1 && tensor.ty.is_quantized() {
                let what = format!(
                    "tensor `{}` is a vector stored as {}; floats are wanted",
                    tensor.name, tensor.ty
                );
                return Err(file.fail(what));
            }
            let linear = tensor.shape.len() == 2 && name != EMBEDDING && name.ends_with(".weight");
            let spec = linear.then(|| codes::scheme(tensor.ty, file.bytes(tensor))).flatten();
            has_codes |= spec.is_some();
            let mut push = |end: &str, part| {
                order.push(Named { name: format!("{name}{end}"), tensor: i, heads, part });
            };
            match spec.filter(|_| integers != Integers::Dequantize) {
                None => push("", Part::Values),
                Some(spec) => {
                    push(".codes", Part::Codes(spec));
                    push(".scale", Part::Scale(spec));
                    if spec.zero {
                        push(".zero", Part::Zero(spec));
                    }
                }
            }
        }
        let by_name = order.iter().enumerate().map(|(i, n)| (n.name.clone(), i)).collect();
        Ok(GgufCheckpoint { file, order, by_name, has_codes })
    }

    /// What the user should know about the way these weights are taken.
    pub(super) fn notes(&self, integers: Integers) -> Vec<String> {
        let dropped = integers == Integers::Dequantize && self.has_codes;
        dropped.then(|| crate::DEQUANTIZED.to_owned()).into_iter().collect()
    }

    /// The file.
    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    fn tensor(&self, named: &Named) -> &GgufTensor {
        &self.file.tensors()[named.tensor]
    }
}

/// The table of the embedding, of which rows are read; it stays in floats.
const EMBEDDING: &str = "model.embed_tokens.weight";

fn tensor_type(tensor: &GgufTensor, part: Part) -> TensorType {
    let scales = || {
        let last = tensor.shape.len() - 1;
        let mut shape = tensor.shape.clone();
        shape[last] /= tensor.ty.block_len();
        Shape::fixed(&shape)
    };
    match part {
        Part::Values => TensorType::new(tensor.ty.elem(), tensor.shape.as_slice()),
        Part::Codes(spec) => TensorType::new(Elem::Quant(spec), tensor.shape.as_slice()),
        Part::Scale(spec) => TensorType::new(spec.scale.elem(), scales()),
        Part::Zero(_) => TensorType::new(Elem::U8, scales()),
    }
}

/// The Hugging Face name of a tensor, or the end of a sentence that starts with the tensor.
fn hf_name(name: &str, model: &Model) -> Result<String, String> {
    let none = || format!("has no counterpart in a Hugging Face {} model", model.arch.name());
    match name {
        "token_embd.weight" => return Ok("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Ok("model.norm.weight".into()),
        "output.weight" => return Ok("lm_head.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.").and_then(|r| r.split_once('.')).ok_or_else(none)?;
    let (part, kind) =
        rest.rsplit_once('.').filter(|(_, k)| matches!(*k, "weight" | "bias")).ok_or_else(none)?;
    let index: usize = layer.parse().ok().filter(|i: &usize| i.to_string() == layer).ok_or_else(none)?;
    if index >= model.layers {
        return Err(format!("is in layer {index} of a model with {} layers", model.layers));
    }
    let hf = match (part, kind) {
        ("attn_norm", "weight") => "input_layernorm",
        ("ffn_norm", "weight") => "post_attention_layernorm",
        ("attn_q", _) => "self_attn.q_proj",
        ("attn_k", _) => "self_attn.k_proj",
        ("attn_v", _) => "self_attn.v_proj",
        ("attn_output", _) => "self_attn.o_proj",
        ("attn_q_norm", "weight") if model.arch == Arch::Qwen3 => "self_attn.q_norm",
        ("attn_k_norm", "weight") if model.arch == Arch::Qwen3 => "self_attn.k_norm",
        ("ffn_gate", _) => "mlp.gate_proj",
        ("ffn_up", _) => "mlp.up_proj",
        ("ffn_down", _) => "mlp.down_proj",
        _ => return Err(none()),
    };
    Ok(format!("model.layers.{index}.{hf}.{kind}"))
}

/// Heads of a tensor whose rows GGUF stores in another order: queries and keys of `llama`, and their biases.
fn permuted_heads(name: &str, model: &Model) -> Option<usize> {
    if model.arch != Arch::Llama {
        return None;
    }
    let (stem, _) = name.rsplit_once('.')?;
    match stem.rsplit_once('.')?.1 {
        "attn_q" => Some(model.heads),
        "attn_k" => Some(model.kv_heads),
        _ => None,
    }
}

/// The stored row that is row `row` of the Hugging Face tensor: GGUF has the halves of a head interleaved.
fn stored_row(row: usize, rows: usize, heads: usize) -> usize {
    let width = rows / heads;
    let (head, i) = (row / width, row % width);
    let half = width / 2;
    head * width + 2 * (i % half) + i / half
}

impl GgufCheckpoint {
    fn find(&self, name: &str) -> Result<&Named, WeightError> {
        let missing = || WeightError::new(name, format!("no such tensor in {}", self.file.path().display()));
        Ok(&self.order[*self.by_name.get(name).ok_or_else(missing)?])
    }

    /// Whether the file holds the bytes of the Hugging Face tensor.
    fn is_plain(&self, named: &Named) -> bool {
        named.heads.is_none() && !self.tensor(named).ty.is_quantized()
    }
}

impl WeightSource for GgufCheckpoint {
    fn shared(&self, name: &str) -> Result<Option<Bytes>, WeightError> {
        let named = self.find(name)?;
        Ok(self.is_plain(named).then(|| self.file.shared(self.tensor(named))))
    }

    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        let named = self.find(name)?;
        let tensor = self.tensor(named);
        let stored = self.file.bytes(tensor);
        let ty = tensor_type(tensor, named.part);
        if self.is_plain(named) {
            return Ok(RawWeight { ty, bytes: Cow::Borrowed(stored) });
        }
        let rows = if named.heads.is_some() { tensor.shape[0] } else { 1 };
        let stride = stored.len() / rows;
        let mut bytes = Vec::with_capacity(ty.bytes().unwrap_or(0));
        for row in 0..rows {
            let from = named.heads.map_or(row, |heads| stored_row(row, rows, heads));
            let stored = &stored[from * stride..(from + 1) * stride];
            match named.part {
                Part::Codes(_) => codes::push_codes(tensor.ty, stored, &mut bytes),
                Part::Scale(_) => codes::push_scales(tensor.ty, stored, &mut bytes),
                Part::Zero(_) => codes::push_zeros(tensor.ty, stored, &mut bytes).map_err(|block| {
                    WeightError::new(
                        name,
                        format!("block {block} has no zero point any more: the file has changed"),
                    )
                })?,
                Part::Values if tensor.ty.is_quantized() => tensor
                    .ty
                    .dequantize(stored, |v| v.iter().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes()))),
                Part::Values => bytes.extend_from_slice(stored),
            }
        }
        if let (Part::Scale(_), Some(at)) = (named.part, ty.elem.find_non_finite(&bytes)) {
            let why = format!("scale {at} is NaN or infinite; the file is damaged: download it again");
            return Err(WeightError::new(name, why));
        }
        Ok(RawWeight { ty, bytes: Cow::Owned(bytes) })
    }
}

impl Checkpoint for GgufCheckpoint {
    fn tensors(&self) -> Vec<(String, TensorType)> {
        self.order.iter().map(|n| (n.name.clone(), tensor_type(self.tensor(n), n.part))).collect()
    }

    fn weight_files(&self) -> Vec<PathBuf> {
        vec![self.file.path().to_owned()]
    }

    fn converts(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
