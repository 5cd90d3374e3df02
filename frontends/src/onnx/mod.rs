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
mod operand;
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
use self::eval::{Eval, Probe, Val};
use self::facts::Beside;
use self::file::{Input, Model, Type};
use self::known::Known;
use self::roles::Roles;
use self::source::{OnnxCheckpoint, Pieces};
use self::term::{Pos, T, Term, Terms};
use self::view::{Digit, Real};
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
    let first = ports.probe(Probe { batch: 3, new: 4, past: usize::from(!ports.pasts.is_empty()) });
    let second = ports.probe(Probe { batch: 2, new: 3, past: if ports.pasts.is_empty() { 0 } else { far } });
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
        let logits = logits(&e).map_err(fail)?;
        let roles = Roles::find(&e.terms, logits).map_err(fail)?;
        if !ports.pasts.is_empty() && ports.pasts.len() != 2 * roles.layers.len() {
            return Err(fail(format!(
                "it has {} caches, and its logits come from {} layers",
                ports.pasts.len(),
                roles.layers.len()
            )));
        }
        let found = facts::found(&e.terms, &roles, logits, &beside).map_err(fail)?;
        let mut build = Build::new(&e.terms, &roles, integers, found.facts.clone());
        build.all(logits).map_err(fail)?;
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
    beside.agrees(path, &found.facts)?;
    let mut notes = Vec::new();
    let codes = module.weights().iter().any(|w| w.name.ends_with(".codes"));
    if integers == Integers::Dequantize && (found.codes || codes) {
        notes.push(format!("{}; the rounding of inputs and caches is left out", crate::DEQUANTIZED));
    }
    notes.extend(found.notes.iter().cloned());
    let format = format!("ONNX, opset {}{}", model.opset, producer(&model));
    let (config, files) = beside.files(&module, &found);
    let weights = Box::new(OnnxCheckpoint { model, pieces });
    let source = Opened { path: path.to_owned(), format, config, weights, files, notes };
    Ok(Imported { module, source })
}

fn producer(model: &Model) -> String {
    let name: String = model.producer.chars().filter(|c| c.is_ascii_graphic()).take(40).collect();
    if name.is_empty() { name } else { format!(", written by {name}") }
}

/// The inputs of a model by what they are.
struct Ports<'a> {
    ids: &'a Input,
    /// Integers that follow from the sizes.
    known: Vec<(&'a Input, What)>,
    /// Caches with their heads and channels.
    pasts: Vec<(&'a Input, usize, usize)>,
}

#[derive(Clone, Copy)]
enum What {
    Mask,
    Positions,
    PastLength,
    AllLength,
}

impl<'a> Ports<'a> {
    fn find(model: &'a Model, beside: &Beside) -> Result<Self, String> {
        let stored = model.by_name();
        // Old versions list tensors of the file as inputs, too.
        let inputs = model.inputs.iter().filter(|i| !stored.contains_key(i.name.as_str()));
        let (mut ids, mut known, mut pasts) = (None, Vec::new(), Vec::new());
        for i in inputs {
            let integer = matches!(i.ty, Some(Type::I64 | Type::I32));
            match (i.name.as_str(), i.dims.len()) {
                ("input_ids", 2) if integer => ids = Some(i),
                ("attention_mask", 2) => known.push((i, What::Mask)),
                ("position_ids" | "cache_position", 1 | 2) if integer => known.push((i, What::Positions)),
                ("past_seq_len" | "past_sequence_length", _) if integer => known.push((i, What::PastLength)),
                ("total_seq_len" | "total_sequence_length", _) if integer => known.push((i, What::AllLength)),
                (_, 4) if i.ty.is_some_and(|t| t.float().is_some()) => {
                    let d = i.dims[3].or(beside.head_dim).or_else(|| head_of(model, &stored));
                    let (Some(heads), Some(d)) = (i.dims[1], d) else {
                        return Err(format!(
                            "the sizes of the cache `{}` are not known: heads {:?}, channels {:?}",
                            i.name, i.dims[1], i.dims[3]
                        ));
                    };
                    if heads == 0 || d == 0 || heads.saturating_mul(d) > 1 << 24 {
                        return Err(format!("the cache `{}` has {heads} heads of {d}", i.name));
                    }
                    pasts.push((i, heads as usize, d as usize));
                }
                (_, rank) => {
                    let ty = i.ty.map_or("another type".to_owned(), |t| format!("type {t:?}"));
                    return Err(format!(
                        "its input `{}` of {ty} and {rank} axes is none that a decoder has: input_ids, attention_mask, \
                         position_ids and a cache of four axes for keys and one for values of each layer",
                        i.name
                    ));
                }
            }
        }
        let ids = ids.ok_or("it has no input `input_ids` with integers of two axes")?;
        Ok(Ports { ids, known, pasts })
    }

    /// The sizes of a walk, where the model does not fix them.
    fn probe(&self, free: Probe) -> Probe {
        let fixed = |d: Option<&Option<u64>>, otherwise: usize| match d {
            Some(Some(n)) if (1..=4096).contains(n) => *n as usize,
            _ => otherwise,
        };
        let past = self.pasts.first().map_or(free.past, |(i, ..)| fixed(i.dims.get(2), free.past));
        Probe {
            batch: fixed(self.ids.dims.first(), free.batch),
            new: fixed(self.ids.dims.get(1), free.new),
            past,
        }
    }

    /// Gives the inputs and stored tensors their values.
    fn seed(&self, e: &mut Eval) -> Result<(), String> {
        let model = e.model.clone();
        for (tensor, t) in model.tensors.iter().enumerate() {
            let dims = t.dims.iter().map(|&d| d as usize).collect();
            e.values.insert(t.name.clone(), Val::Stored { tensor, dims, swapped: false });
        }
        let Probe { batch, new, past } = e.probe;
        let all = e.probe.all();
        e.values.insert(self.ids.name.clone(), Val::Ids);
        for (input, what) in &self.known {
            let row: Vec<i64> = (past..all).map(|p| p as i64).collect();
            let k = match (what, input.dims.len()) {
                (What::Mask, _) => Known::ints(vec![batch, all], vec![1; batch * all]),
                (What::Positions, 1) => Known::ints(vec![new], row),
                (What::Positions, _) => Known::ints(vec![batch, new], row.repeat(batch)),
                (What::PastLength, r) => Known::ints(vec![1; r], vec![past as i64]),
                (What::AllLength, r) => Known::ints(vec![1; r], vec![all as i64]),
            };
            e.values.insert(input.name.clone(), Val::Known(k.into()));
        }
        for (i, &(input, heads, d)) in self.pasts.iter().enumerate() {
            let t = e.terms.put(Term::Past(i as u32), (heads * d) as u64, Pos::Past);
            let axes = vec![
                vec![Digit::batch(batch)],
                product::channels(heads as u64, d as u64),
                vec![Digit::pos(past)],
                product::channels(d as u64, 1),
            ];
            e.values.insert(input.name.clone(), Val::Real(Real { t, axes }));
        }
        Ok(())
    }
}

/// Channels of a head, where attention with stored tables of angles says them.
fn head_of(model: &Model, stored: &HashMap<&str, usize>) -> Option<u64> {
    let attention = model.nodes.iter().find(|n| n.op == "GroupQueryAttention")?;
    let table = stored.get(attention.inputs.get(7)?.as_str())?;
    match model.tensors[*table].dims[..] {
        [_, half] => half.checked_mul(2),
        _ => None,
    }
}

/// The output that is no cache.
fn logits(e: &Eval) -> Result<T, String> {
    let mut found = None;
    for name in &e.model.outputs {
        let Some(v) = e.values.get(name) else { return Err(format!("no node makes the output `{name}`")) };
        let Val::Real(r) = v else {
            return Err(format!("the output `{name}` does not depend on the tokens"));
        };
        match e.terms.get(r.t) {
            Term::Append(..) => {}
            _ if found.is_some() => return Err(format!("the output `{name}` is neither logits nor a cache")),
            _ => found = Some(eval::rows(&e.terms, r).map_err(|e| format!("the output `{name}`: {e}"))?),
        }
    }
    found.ok_or_else(|| "none of its outputs are logits".into())
}
