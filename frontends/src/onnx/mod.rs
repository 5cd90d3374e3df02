//! ONNX models of decoders: as `qrmc export --format onnx`, the model builder of onnxruntime-genai and the exporters of
//! torch write them.
//!
//! A graph is walked at two choices of sizes. What depends on sizes, masks and positions alone is computed there and then,
//! and compared with what a decoder computes; what depends on tokens becomes terms, which become the large operations of the
//! IR. Both walks must give the same module. What is not recognised is named by its node.

mod arith;
mod assemble;
mod attention;
mod build;
mod codes;
mod emit;
mod eval;
mod facts;
mod file;
mod fold;
mod header;
mod known;
mod matrix;
mod multihead;
mod operand;
mod placed;
mod ports;
mod product;
mod quantize;
mod raise;
mod reader;
mod roles;
mod rotary;
mod runs;
mod source;
mod term;
mod view;
mod wire;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use qrmc_ir::RopeAttr;

pub use self::facts::genai_config;
pub use self::header::{OnnxHeader, OnnxNode};

use self::build::Build;
use self::eval::{Eval, Probe};
use self::facts::Beside;
use self::file::Model;
use self::ports::Ports;
use self::roles::Roles;
use self::source::{OnnxCheckpoint, Pieces};
use self::term::Terms;
use crate::{ImportError, Imported, Integers, Opened};

/// Positions of the cache in the second walk: beyond windows of 4096, where the context allows.
const FAR: u64 = 4_200;

/// Whether a file is read here: by its first field, the version of the format, or by its name.
pub(crate) fn is_model(path: &Path, start: &[u8]) -> bool {
    start.first() == Some(&0x08) || path.extension().is_some_and(|e| e == "onnx")
}

/// Opens a model and raises its graph to a module.
///
/// # Errors
/// If the file is damaged, tensors lie outside of its folder, or a node is part of no decoder that is known; the error names
/// it.
pub(crate) fn import(path: &Path, integers: Integers) -> Result<Imported, ImportError> {
    let model = Arc::new(reader::read(path)?);
    let beside = Beside::read(path)?;
    let fail = |what: String| {
        ImportError::new(path, what).hint(
            "read are decoders in the forms of `qrmc export --format onnx`, of the model builder of onnxruntime-genai, and \
             of torch.onnx.export for Llama, Qwen2 and Qwen3; docs/onnx.md lists them",
        )
    };
    let ports = Ports::find(&model, &beside).map_err(fail)?;
    let mut ropes: Vec<RopeAttr> = beside.rope.into_iter().collect();
    let far = (beside.context.unwrap_or(2048).saturating_sub(8)).clamp(1, FAR) as usize;
    // With this operator, the masks of onnxruntime-genai's builder are those of a prompt, or of one token behind a cache.
    let apart = model.nodes.iter().any(|n| n.op == "MultiHeadAttention");
    let first = ports.probe(Probe { batch: 3, new: 4, past: usize::from(!apart) });
    let second = ports.probe(Probe { batch: 2, new: if apart { 1 } else { 3 }, past: far });
    let uses = eval::uses(&model);
    let mut tables = HashMap::new();
    let mut made: Option<(qrmc_ir::Module, Pieces, facts::Found)> = None;
    for probe in [first, second] {
        let mut e = Eval {
            model: model.clone(),
            terms: Terms::new(model.clone(), ropes, probe.past),
            probe,
            values: HashMap::new(),
            tables,
            uses: uses.clone(),
            live: 0,
            work: 0,
        };
        ports.seed(&mut e).map_err(fail)?;
        e.walk().map_err(fail)?;
        let result = ports::result(&e).map_err(fail)?;
        let roles = Roles::find(&e.terms, result).map_err(fail)?;
        if ports.caches() > 0 && ports.caches() != 2 * roles.layers.len() {
            return Err(fail(format!(
                "it has {} caches, and its result comes from {} layers",
                ports.caches(),
                roles.layers.len()
            )));
        }
        let found = facts::found(&e.terms, &roles, result, &beside).map_err(fail)?;
        let mut build = Build::new(&e.terms, &roles, integers, found.facts.clone());
        build.all(result).map_err(fail)?;
        let (module, pieces) = (build.module, build.pieces);
        (ropes, tables) = (e.terms.ropes, e.tables);
        match &made {
            None => made = Some((module, pieces, found)),
            Some((before, ..)) if qrmc_ir::print(before) == qrmc_ir::print(&module) => {}
            Some(_) => {
                return Err(fail(format!(
                    "the graph computes something else for {} new tokens behind {} than for {} behind {}",
                    second.new, second.past, first.new, first.past
                )));
            }
        }
    }
    let Some((module, pieces, found)) = made else { unreachable!("both walks leave a module or an error") };
    if let Err(faults) = qrmc_ir::verify(&module) {
        let first = faults.first().map(ToString::to_string).unwrap_or_default();
        return Err(fail(format!("the graph does not make a module: {first}")));
    }
    let mut notes: Vec<String> = beside.agrees(path, &module)?.into_iter().collect();
    if ports.has_angles() {
        notes.push(
            "cosines and sines are inputs: they are taken as those of config.json's rotary embedding".into(),
        );
    }
    let codes = module.weights().iter().any(|w| w.name.ends_with(".codes"));
    if integers == Integers::Dequantize && (found.codes || codes) {
        notes.push(format!("{}; the rounding of inputs and caches is left out", crate::DEQUANTIZED));
    }
    notes.extend(found.notes.iter().cloned());
    let format = format!("ONNX, opset {}{}", model.opset, producer(&model));
    let (config, files) = beside.files(&module, &found);
    let weights = Box::new(OnnxCheckpoint { model, pieces });
    let source = Opened { path: path.to_owned(), format, quantization: None, config, weights, files, notes };
    Ok(Imported { module, source })
}

fn producer(model: &Model) -> String {
    let name: String = model.producer.chars().filter(|c| c.is_ascii_graphic()).take(40).collect();
    if name.is_empty() { name } else { format!(", written by {name}") }
}
