//! A model as `model.onnx` with external data, for onnxruntime and whatever else reads ONNX.
//!
//! What becomes what, and the names of inputs and outputs, is in `docs/onnx.md`. The codes, scales and zero points are
//! the stored ones: nothing is rounded again.

mod attention;
mod data;
mod genai;
mod graph;
mod integer;
mod nbits;
mod ops;
mod proto;
mod quantize;
mod stored;
#[cfg(test)]
mod tests;
mod walk;

use std::path::Path;

use onnx_protobuf::tensor_proto::DataType;
use onnx_protobuf::{GraphProto, Message, ModelProto, ValueInfoProto};
use protobuf::MessageField;
use qrmc_ir::{Diag, Dim, Elem, Func, Lacks, Place, Sym, TensorType, Verified, WeightError, WeightSource};

use crate::artefact::ArtefactError;
use data::DataFile;
use graph::{CONTRIB, Graph};
use proto::{Size, entry, opset, value};
use stored::Weights;
use walk::{Shared, Value, Walk};

/// The graph.
pub const MODEL: &str = "model.onnx";
/// The file of external data beside it.
pub const DATA: &str = "model.onnx.data";
/// What onnxruntime-genai reads.
pub const GENAI: &str = "genai_config.json";

/// Version 10 of the format has 4-bit integers.
const IR_VERSION: i64 = 10;
/// The standard operators, of which `DequantizeLinear` takes blocks and 4-bit integers from 21 on.
const OPSET: i64 = 21;
const FLOAT: DataType = DataType::FLOAT;

const INPUT_IDS: &str = "input_ids";
/// What a part of a decoder without an embedding takes: with a head behind it, or without.
const INPUTS_EMBEDS: &str = "inputs_embeds";
const HIDDEN_STATES: &str = "hidden_states";
const ATTENTION_MASK: &str = "attention_mask";
const POSITION_IDS: &str = "position_ids";
const LOGITS: &str = "logits";
/// What a part of a decoder without a head gives.
const LAST_HIDDEN_STATE: &str = "last_hidden_state";

const BATCH: Size = Size::Named("batch_size");
const NEW: Size = Size::Named("sequence_length");
const PAST: Size = Size::Named("past_sequence_length");
const TOTAL: Size = Size::Named("total_sequence_length");

/// Which operators a model is written in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Form {
    /// Standard operators alone: quantized weights go through `DequantizeLinear`.
    #[default]
    Qdq,
    /// With those of onnxruntime where they compute the same: `MatMulNBits`, `GroupQueryAttention`,
    /// `SimplifiedLayerNormalization`; and `MatMulInteger` where both sides are codes of a row.
    Ort,
}

/// How to export.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// The operators.
    pub form: Form,
}

/// Why a model was not exported.
#[derive(Debug, thiserror::Error)]
pub enum OnnxError {
    /// The format cannot hold it.
    #[error(transparent)]
    Ir(#[from] Diag),
    /// A weight could not be read.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// A file could not be written.
    #[error(transparent)]
    Write(#[from] ArtefactError),
}

/// Writes [`MODEL`], [`DATA`] and, of a whole decoder, [`GENAI`] into a folder. One weight at a time is in memory.
///
/// # Errors
/// If `@main` is no decoder, an operation or a scheme has no form in ONNX, a weight cannot be read, or a file cannot be
/// written.
pub fn write(
    module: Verified<'_>,
    weights: &dyn WeightSource,
    folder: &Path,
    options: &Options,
) -> Result<(), OnnxError> {
    let module = module.module();
    let Some(main) = module.find_func("main") else {
        let d = Diag::new("Q0501", "there is no @main");
        return Err(d.hint("import a model, or compile one: a graph of parts has no inputs").into());
    };
    let main = module.func(main);
    let layers = decoder(main)?;
    let (first, lacks) = (main.ty(main.params[0]), module.lacks());
    let output = if matches!(lacks, Some(Lacks::Head | Lacks::Both)) { LAST_HIDDEN_STATE } else { LOGITS };
    let (input, kind) = match (first.elem, output) {
        (Elem::I32, _) => (INPUT_IDS, DataType::INT64),
        (_, LOGITS) => (INPUTS_EMBEDS, FLOAT),
        _ => (HIDDEN_STATES, FLOAT),
    };
    let facts = &module.facts;
    let caches: Vec<&TensorType> = main.params[2..].iter().map(|&p| main.ty(p)).collect();
    let per_head = facts.kv_heads * facts.head_dim;
    if let Some(t) = caches.iter().find(|t| t.shape.last() != Some(Dim::Fixed(per_head))) {
        let what = format!("a cache is {t}, the facts say {} heads of {}", facts.kv_heads, facts.head_dim);
        return Err(Diag::new("Q0501", what).at(place(main)).into());
    }

    let mut g = Graph::new(DataFile::create(&folder.join(DATA))?, DATA);
    let cache = |part: &str| -> Vec<String> {
        let both = |l: usize| ["key", "value"].map(|kind| format!("{part}.{l}.{kind}"));
        (0..layers).flat_map(both).collect()
    };
    let (past, present) = (cache("past_key_values"), cache("present"));
    let fixed = [input, ATTENTION_MASK, POSITION_IDS, output];
    for name in fixed.iter().copied().chain(past.iter().chain(&present).map(String::as_str)) {
        g.reserve(name);
    }

    let mut args = vec![Value::Plain(input.to_owned()), Value::Positions(POSITION_IDS.to_owned())];
    args.extend(past.iter().map(|name| Value::Heads(name.clone())));
    let weights = Weights::new(module, weights);
    let mut walk =
        Walk { module, form: options.form, input, weights, g, depth: 0, shared: Shared::default() };
    let results = walk.func(main, args)?;
    let mut outputs = Vec::new();
    for (i, (v, &id)) in results.iter().zip(&main.results).enumerate() {
        let (name, sizes) = match i.checked_sub(1) {
            None => {
                let width = main.ty(id).shape.last().and_then(Dim::fixed).unwrap_or(0) as i64;
                (output, vec![BATCH, NEW, Size::Fixed(width)])
            }
            Some(at) => (present[at].as_str(), heads(facts, TOTAL)),
        };
        let tensor = match (v, i) {
            (Value::Heads(tensor), 1..) => tensor.clone(),
            (Value::Heads(_), 0) | (_, 1..) => {
                let what = format!("result {i} of @main is no {}", if i == 0 { "tensor" } else { "cache" });
                let d = Diag::new("Q0501", what).at(place(main));
                return Err(d.hint("behind the first result stand the appended caches").into());
            }
            (v, 0) => walk.plain(v, main.ty(id))?,
        };
        walk.g.output(&tensor, name);
        outputs.push(value(name, FLOAT, &sizes));
    }
    let rows = first.shape.0.get(2).and_then(|d| d.fixed()).map(|n| Size::Fixed(n as i64));
    let sizes: Vec<Size> = [BATCH, NEW].into_iter().chain(rows).collect();
    let mut inputs =
        vec![value(input, kind, &sizes), value(ATTENTION_MASK, DataType::INT64, &[BATCH, TOTAL])];
    if walk.shared.positions {
        inputs.push(value(POSITION_IDS, DataType::INT64, &[BATCH, NEW]));
    }
    inputs.extend(past.iter().map(|name| value(name, FLOAT, &heads(facts, PAST))));
    if lacks.is_none() {
        write_file(&folder.join(GENAI), genai::config(facts, walk.shared.positions).as_bytes())?;
    }
    let model = message(walk.g, inputs, outputs, options.form, &facts.arch)?;
    let path = folder.join(MODEL);
    let bytes = model.write_to_bytes().map_err(|e| ArtefactError::new(&path, e.to_string()))?;
    write_file(&path, &bytes)
}

/// The sizes of keys or values.
fn heads(facts: &qrmc_ir::ModelFacts, positions: Size) -> Vec<Size> {
    vec![BATCH, Size::Fixed(facts.kv_heads as i64), positions, Size::Fixed(facts.head_dim as i64)]
}

fn place(func: &Func) -> Place {
    Place { func: Some(func.name.clone()), ..Place::default() }
}

/// The number of layers of a decoder: `@main` takes ids or hidden states, positions and a pair of caches for each layer, and
/// gives logits or hidden states and these caches with the new positions.
fn decoder(main: &Func) -> Result<usize, Diag> {
    let [b, s, p, t] = Sym::ALL.map(Dim::Sym);
    let is = |v: &qrmc_ir::ValueId, elem: Elem, dims: &[Dim]| {
        let ty = main.ty(*v);
        ty.elem == elem && ty.shape.rank() >= dims.len() && ty.shape.0[..dims.len()] == *dims
    };
    let good = match (&main.params[..], &main.results[..]) {
        ([ids, pos, past @ ..], [logits, all @ ..]) => {
            (is(ids, Elem::I32, &[b, s]) && main.ty(*ids).shape.rank() == 2
                || is(ids, Elem::F32, &[b, s]) && main.ty(*ids).shape.rank() == 3)
                && is(pos, Elem::I32, &[s])
                && is(logits, Elem::F32, &[b, s])
                && past.len() == all.len()
                && past.len().is_multiple_of(2)
                && past.iter().all(|v| is(v, Elem::F32, &[b, p]) && main.ty(*v).shape.rank() == 3)
                && all.iter().all(|v| is(v, Elem::F32, &[b, t]) && main.ty(*v).shape.rank() == 3)
        }
        _ => false,
    };
    if good {
        return Ok((main.params.len() - 2) / 2);
    }
    let d = Diag::new(
        "Q0501",
        "this is no decoder with tokens or hidden states, positions and a pair of caches for each layer",
    );
    Err(d.at(place(main)).hint("docs/ir.md says what the functions of a decoder are"))
}

fn message(
    g: Graph,
    inputs: Vec<ValueInfoProto>,
    outputs: Vec<ValueInfoProto>,
    form: Form,
    name: &str,
) -> Result<ModelProto, OnnxError> {
    let (node, initializer) = g.finish()?;
    let mut opset_import = vec![opset("", OPSET)];
    if node.iter().any(|n| n.domain == CONTRIB) {
        opset_import.push(opset(CONTRIB, 1));
    }
    let graph = GraphProto {
        name: name.to_owned(),
        node,
        initializer,
        input: inputs,
        output: outputs,
        ..GraphProto::default()
    };
    let form = match form {
        Form::Qdq => "qdq",
        Form::Ort => "ort",
    };
    Ok(ModelProto {
        ir_version: IR_VERSION,
        opset_import,
        producer_name: "qrmc".to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        graph: MessageField::some(graph),
        metadata_props: vec![entry("qrmc.form", form)],
        ..ModelProto::default()
    })
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), OnnxError> {
    use std::io::Write;
    let write = || -> std::io::Result<()> {
        let mut f = std::fs::File::create(path)?;
        f.write_all(bytes)?;
        f.sync_all()
    };
    Ok(write().map_err(|e| ArtefactError::io(path, "write", &e))?)
}
