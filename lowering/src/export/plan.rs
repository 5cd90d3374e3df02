//! What a folder of safetensors will hold, tensor by tensor.

use qrmc_ir::{Elem, Op, QuantSpec, ScaleType, WeightSource};
use serde_json::{Map, Value};

use super::view::rounds;
use super::{Entry, ExportError, HEAD, Linear, View};
use crate::artefact::{ArtefactError, Dtype, StoredTensor, TensorPlan};

/// Bytes that are handed on at once.
const PIECE: usize = 16 << 20;

/// Takes the next bytes of a tensor.
pub type Put<'a> = dyn FnMut(&[u8]) -> Result<(), ArtefactError> + 'a;

type Make<'a> = dyn Fn(&dyn WeightSource, &mut Put<'_>) -> Result<(), ExportError> + 'a;

/// A tensor, and how its bytes are made.
pub struct Part<'a> {
    /// What the file says of it.
    pub tensor: StoredTensor,
    /// Stored names of what it is made of.
    pub from: Vec<&'a str>,
    make: Box<Make<'a>>,
}

impl<'a> Part<'a> {
    /// A tensor whose bytes `make` hands on, in order, from the parts of a linear layer.
    pub(super) fn of(
        l: &'a Linear,
        suffix: &str,
        dtype: Dtype,
        shape: Vec<usize>,
        make: impl Fn(&dyn WeightSource, &mut Put<'_>) -> Result<(), ExportError> + 'a,
    ) -> Self {
        let tensor = StoredTensor { name: format!("{}.{suffix}", l.name), dtype, shape };
        let mut from = vec![l.codes.codes.as_str(), l.codes.scale.as_str()];
        from.extend(l.codes.zero.as_deref());
        Part { tensor, from, make: Box::new(make) }
    }

    /// A tensor whose bytes `make` hands on, in order, from one that is stored.
    pub(super) fn made(
        tensor: StoredTensor,
        stored: &'a str,
        make: impl Fn(&dyn WeightSource, &mut Put<'_>) -> Result<(), ExportError> + 'a,
    ) -> Self {
        Part { tensor, from: vec![stored], make: Box::new(make) }
    }

    /// A tensor as it is stored.
    pub(super) fn copy(stored: &'a str, plan: &TensorPlan) -> Self {
        let make = move |src: &dyn WeightSource, put: &mut Put<'_>| {
            Ok(src.raw(stored)?.bytes.chunks(PIECE).try_for_each(put)?)
        };
        Part { tensor: plan.stored(), from: vec![stored], make: Box::new(make) }
    }

    /// A tensor of floats, rounded to another type.
    pub(super) fn floats(stored: &'a str, plan: &TensorPlan, to: Elem) -> Self {
        let mut plan = plan.clone();
        let from = std::mem::replace(&mut plan.ty.elem, to);
        if from == to {
            return Part::copy(stored, &plan);
        }
        let make = move |src: &dyn WeightSource, put: &mut Put<'_>| {
            let raw = src.raw(stored)?;
            let size = raw.ty.elem.bits() / 8;
            for piece in raw.bytes.chunks(PIECE / size * size) {
                let t = qrmc_ir::Tensor::from_le_bytes(raw.ty.elem, &[piece.len() / size], piece);
                let bytes = t.and_then(|t| t.to_le_bytes(to)).map_err(ExportError::fault)?;
                put(&bytes)?;
            }
            Ok(())
        };
        Part { tensor: plan.stored(), from: vec![stored], make: Box::new(make) }
    }

    /// Hands on the bytes of the tensor, in order.
    ///
    /// # Errors
    /// If what it is made of cannot be read, or `put` fails.
    pub fn write(&self, src: &dyn WeightSource, put: &mut Put<'_>) -> Result<(), ExportError> {
        (self.make)(src, put)
    }
}

/// What files of tensors are called where a format does not say.
pub(super) const STEM: &str = "model";

/// A planned export.
pub struct Plan<'a> {
    /// What the names of its files of tensors begin with.
    pub stem: &'static str,
    /// In the order in which they are written.
    pub parts: Vec<Part<'a>>,
    /// Type in which loaders should compute, if the format says: that of the scales, so that nothing rounds them.
    pub compute: Option<ScaleType>,
    /// `quantization_config` of `config.json`.
    pub quantization: Option<Value>,
    /// Further files, by name.
    pub files: Vec<(String, Vec<u8>)>,
    /// What a user should know: what was widened, and why.
    pub notes: Vec<String>,
}

impl Plan<'_> {
    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.tensor.bytes()).sum()
    }

    /// `config.json` of the export from that of the source.
    ///
    /// # Errors
    /// If the source's is no JSON object.
    pub fn config(&self, source: &[u8], untied: bool) -> Result<Vec<u8>, ExportError> {
        let bad = |e: &dyn std::fmt::Display| ExportError::fault(format!("config.json: {e}"));
        let mut config: Map<String, Value> = serde_json::from_slice(source).map_err(|e| bad(&e))?;
        if let Some(compute) = self.compute {
            let name = match compute {
                ScaleType::F32 => "float32",
                ScaleType::F16 => "float16",
                ScaleType::BF16 => "bfloat16",
            };
            // transformers 5 writes `dtype`, earlier ones `torch_dtype`; whichever is there is set.
            let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            config.insert(key.into(), name.into());
        }
        if untied {
            config.insert("tie_word_embeddings".into(), false.into());
        }
        config.shift_remove("quantization_config");
        if let Some(q) = &self.quantization {
            config.insert("quantization_config".into(), q.clone());
        }
        json_file(&config.into())
    }
}

/// The bytes of a JSON file.
pub(super) fn json_file(value: &Value) -> Result<Vec<u8>, ExportError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| ExportError::fault(e.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

/// A way to write a quantized model as a folder of safetensors.
pub trait Format: Sync {
    /// Name on the command line.
    fn name(&self) -> &'static str;

    /// One line: what it is, and who loads it.
    fn summary(&self) -> &'static str;

    /// Whether the format has a place for an operation that is not in the source's graph. Rounding has one in most.
    fn sees(&self, op: &Op) -> bool {
        rounds(op)
    }

    /// The scheme nearest to that of a linear layer which the format holds exactly, if what it has does not fit.
    ///
    /// # Errors
    /// If scales cannot be read.
    fn nearest(&self, l: &Linear, src: &dyn WeightSource) -> Result<Option<QuantSpec>, ExportError>;

    /// Plans an export.
    ///
    /// # Errors
    /// The first thing that the format cannot hold exactly, and what would.
    fn plan<'a>(&self, view: &'a View, src: &dyn WeightSource) -> Result<Plan<'a>, ExportError>;
}

/// Refuses rounding of activations and caches in a format of weights alone.
pub(super) fn weights_only(view: &View, format: &str) -> Result<(), ExportError> {
    if let Some(l) = view.linears().find(|l| l.input.spec.is_some()) {
        let spec = l.input.spec.map(|s| s.to_string()).unwrap_or_default();
        return Err(ExportError::illegal(format!(
            "{}: its input is rounded to {spec}; {format} files say nothing of activations",
            l.name
        ))
        .hint("--format compressed-tensors and --format ascend do; or compile the weights alone"));
    }
    no_caches(view, &format!("{format} files have no such cache"))
}

/// Refuses rounding of caches.
pub(super) fn no_caches(view: &View, why: &str) -> Result<(), ExportError> {
    match view.caches.first() {
        None => Ok(()),
        Some(spec) => Err(ExportError::illegal(format!("keys or values are cached as {spec}; {why}"))
            .hint("compile without kv, or run the artefact with qrmc")),
    }
}

/// Refuses a head with codes, which the format's readers take for floats.
pub(super) fn float_head(view: &View, format: &str) -> Result<(), ExportError> {
    match view.linears().find(|l| l.name == HEAD) {
        None => Ok(()),
        Some(l) => Err(ExportError::illegal(format!(
            "the head has codes of {}; {format} readers take it for floats",
            l.spec()
        ))
        .hint("compile with head=16; --format compressed-tensors and --format gguf hold a head with codes")),
    }
}

/// The one group of all linear layers, as the formats count: -1 where a row has one scale.
pub(super) fn one_group(view: &View, format: &str) -> Result<i64, ExportError> {
    let of = |l: &Linear| if l.groups() == 1 { -1 } else { l.group() as i64 };
    let first = view.first()?;
    // A row of one group is a group to formats that count them.
    let group = view.linears().map(of).max().unwrap_or(-1);
    match view.linears().find(|l| of(l) != group && l.group() as i64 != group) {
        None => Ok(group),
        Some(l) => Err(ExportError::illegal(format!(
            "{} has groups of {}, {} has groups of {}; {format} files have one size for all",
            first.name,
            first.group(),
            l.name,
            l.group()
        ))
        .hint("compile all layers with the same group; --format compressed-tensors holds different ones")),
    }
}

/// Layers that stay floats, as GPTQModel's patterns of exclusion; `None` if there are none.
pub(super) fn excluded(view: &View) -> Option<Value> {
    let pattern = |n: &String| (format!("-:^{}$", n.replace('.', "\\.")), Value::Object(Map::new()));
    let keep: Map<String, Value> = view.float.iter().filter(|n| *n != HEAD).map(pattern).collect();
    (!keep.is_empty()).then_some(Value::Object(keep))
}

/// Every tensor that is no part of a linear layer, as it is stored, and what `linear` makes of the others.
pub(super) fn parts<'a>(
    view: &'a View,
    mut linear: impl FnMut(&'a Linear, &mut Vec<Part<'a>>) -> Result<(), ExportError>,
) -> Result<Vec<Part<'a>>, ExportError> {
    let mut out = Vec::new();
    for e in &view.entries {
        match e {
            Entry::Linear(l) => linear(l, &mut out)?,
            Entry::Plain { stored, plan } => out.push(Part::copy(stored, plan)),
        }
    }
    Ok(out)
}

/// Codes, or zero points in their units, as signed bytes.
pub(super) fn signed(bits: u8, codes: Vec<u8>) -> Vec<u8> {
    let middle = 1u8 << (bits - 1);
    codes.into_iter().map(|q| q.wrapping_sub(middle)).collect()
}

/// The tensor `weight` of a signed byte for each code.
pub(super) fn signed_codes(l: &Linear) -> Part<'_> {
    Part::of(l, "weight", Dtype::I8, vec![l.rows, l.cols], move |src, put| {
        l.blocks().try_for_each(|rows| Ok(put(&signed(l.bits(), l.codes(src, rows)?))?))
    })
}

/// Little-endian bytes of words.
pub(super) fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Scales in their type.
pub(super) fn scale_bytes(scales: &[f32], ty: ScaleType) -> Result<Vec<u8>, ExportError> {
    qrmc_ir::Tensor::f32([scales.len()], scales.to_vec()).to_le_bytes(ty.elem()).map_err(ExportError::fault)
}

/// How safetensors calls a type of scales.
pub(super) fn dtype(ty: ScaleType) -> Dtype {
    match ty {
        ScaleType::F32 => Dtype::F32,
        ScaleType::F16 => Dtype::F16,
        ScaleType::BF16 => Dtype::BF16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // methods.md §10.5 [golden]: codes -8 -7 -1 0 1 2 6 7 of W4A4_FLATQUANT_DYNAMIC.
    #[test]
    fn four_bits_in_signed_bytes_golden() {
        let bytes = signed(4, vec![0, 1, 7, 8, 9, 10, 14, 15]);
        assert_eq!(bytes, [0xF8, 0xF9, 0xFF, 0x00, 0x01, 0x02, 0x06, 0x07]);
    }
}
