//! `--emit fake`: an ordinary Hugging Face folder in bf16 whose weights are the de-quantized ones.

use std::collections::HashMap;
use std::path::Path;

use qrmc_frontends::SideFile;
use qrmc_ir::grid::{self, QParam};
use qrmc_ir::{Data, Elem, Func, Module, Op, Tensor, TensorType, ValueId, pack};
use qrmc_lowering::artefact::{ArtefactError, TensorPlan};
use serde_json::Value;

use crate::fail::{Failure, ILLEGAL};

/// Whether a folder is what `--emit fake` wrote.
pub(crate) fn is_fake(path: &Path) -> bool {
    path.join("manifest.json").is_file()
        && path.join("config.json").is_file()
        && !path.join("model.qir").exists()
}

/// The head's matrix in an ordinary checkpoint.
const HEAD: &str = "lm_head.weight";

/// Turns the tensors of an artefact, in their order, into those of a checkpoint.
pub(crate) struct Fake {
    /// What will be written, in order.
    pub(crate) tensors: Vec<TensorPlan>,
    /// Whether the head has a matrix of its own where the source's shares the embedding.
    untied: bool,
    next: usize,
    /// Parts of the tensor that comes next.
    parts: Vec<(TensorPlan, Vec<u8>)>,
}

impl Fake {
    /// Plans a checkpoint with the names and shapes of `source` for the materialised module `packed`.
    ///
    /// With each quantized weight in the place of the float one, the graph must be the source's: then what loads the
    /// source loads the result, and computes the same function.
    pub(crate) fn plan(packed: &Module, source: &Module) -> Result<Self, Failure> {
        for (have, want) in packed.funcs.iter().zip(&source.funcs) {
            if skeleton(have) != skeleton(want) {
                let m = format!(
                    "@{} is not the source's graph any more: an ordinary checkpoint cannot hold it",
                    have.name
                );
                return Err(Failure::new(ILLEGAL, m)
                    .hint("compile without --emit fake: the artefact keeps the whole graph"));
            }
        }
        // A quantized source may round inputs, which an ordinary checkpoint cannot say.
        let rounds = |f: &&Func| f.nodes.iter().any(|n| matches!(n.op, Op::FakeQuant(..)));
        if let Some(f) = packed.funcs.iter().find(rounds) {
            let m =
                format!("@{} rounds inputs of linear layers: an ordinary checkpoint cannot hold it", f.name);
            return Err(Failure::new(ILLEGAL, m)
                .hint("compile without --emit fake: the artefact keeps the whole graph"));
        }
        let parted = parted_head(packed, source);
        let mut tensors = Vec::new();
        for w in packed.weights() {
            if [".scale", ".zero"].iter().any(|s| w.name.ends_with(s)) {
                continue;
            }
            if let Some((_, table)) = parted.filter(|(name, _)| *name == w.name) {
                let ty = TensorType { elem: Elem::BF16, shape: table.shape.clone() };
                tensors.push(TensorPlan { name: HEAD.to_owned(), ty });
                continue;
            }
            let name = w.name.strip_suffix(".codes").unwrap_or(&w.name);
            let Some(original) = source.find_weight(name).or_else(|| source.find_weight(&w.name)) else {
                return Err(Failure::new(
                    ILLEGAL,
                    format!("tensor `{name}` has no place in an ordinary checkpoint"),
                )
                .hint("compile without --emit fake"));
            };
            let shape = source.weight(original).ty.shape.clone();
            tensors.push(TensorPlan { name: name.to_owned(), ty: TensorType { elem: Elem::BF16, shape } });
        }
        Ok(Fake { tensors, untied: parted.is_some(), next: 0, parts: Vec::new() })
    }

    /// `config.json` as the tensors are: of type bf16 and, where the head was parted from the embedding, not tied.
    /// `None` for a file that stays as it is.
    pub(crate) fn config(&self, f: &SideFile) -> Option<Vec<u8>> {
        if f.name != "config.json" {
            return None;
        }
        let mut v: Value = serde_json::from_slice(&f.bytes).ok()?;
        let o = v.as_object_mut()?;
        // transformers 5 writes `dtype`, earlier ones `torch_dtype`; whichever is there is set.
        let key = if o.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        o.insert(key.into(), Value::String("bfloat16".into()));
        o.shift_remove("quantization_config");
        if self.untied {
            o.insert("tie_word_embeddings".into(), Value::Bool(false));
        }
        let mut text = serde_json::to_vec_pretty(&v).ok()?;
        text.push(b'\n');
        Some(text)
    }

    /// Takes the next tensor of the artefact; gives the next of the checkpoint when all its parts are there.
    pub(crate) fn take(
        &mut self,
        t: &TensorPlan,
        bytes: &[u8],
    ) -> Result<Option<(&TensorPlan, Vec<u8>)>, ArtefactError> {
        self.parts.push((t.clone(), bytes.to_vec()));
        let wanted = match self.parts[0].0.ty.elem {
            Elem::Quant(spec) => 2 + usize::from(spec.zero),
            _ => 1,
        };
        if self.parts.len() < wanted {
            return Ok(None);
        }
        let plan = &self.tensors[self.next];
        let fault = |what: String| ArtefactError { path: plan.name.clone().into(), what, hint: None };
        let bytes = values(&self.parts).and_then(|t| t.to_le_bytes(Elem::BF16)).map_err(fault)?;
        self.parts.clear();
        self.next += 1;
        Ok(Some((plan, bytes)))
    }
}

/// The weight of `packed`, by its stored name, that its head multiplies by in the place of the table that the embedding
/// of `source` gathers from, and that table's type. `None` where both ends still share it, or never did.
fn parted_head<'m>(packed: &'m Module, source: &'m Module) -> Option<(&'m str, &'m TensorType)> {
    let table = matrix(source, "head")?;
    let tied = table.0 == matrix(source, "embed")?.0;
    let head = matrix(packed, "head")?.0;
    (tied && head != table.0).then_some((head, table.1))
}

/// Name and type of the weight that a function gathers rows from or multiplies by.
fn matrix<'m>(module: &'m Module, func: &str) -> Option<(&'m str, &'m TensorType)> {
    let f = module.func(module.find_func(func)?);
    let behind = |n: &qrmc_ir::Node| match n.op {
        Op::Gather => f.weight_behind(n.ins[0]),
        Op::MatMul { .. } => f.weight_behind(n.ins[1]),
        _ => None,
    };
    let weight = module.weight(f.nodes.iter().find_map(behind)?);
    Some((&weight.name, &weight.ty))
}

/// The operations that stay online, in the order in which the results need them, with weight-derived operands as holes
/// of their shape.
fn skeleton(f: &Func) -> Vec<String> {
    let derived = f.weight_derived();
    let mut numbers: HashMap<ValueId, usize> = f.params.iter().copied().zip(0..).collect();
    let mut out = Vec::new();
    for &r in &f.results {
        visit(f, &derived, r, &mut numbers, &mut out);
    }
    out.push(f.results.iter().map(|r| format!("{} ", numbers[r])).collect());
    out
}

fn visit(
    f: &Func,
    derived: &[bool],
    v: ValueId,
    numbers: &mut HashMap<ValueId, usize>,
    out: &mut Vec<String>,
) {
    let Some(node) = f.def_node(v).filter(|_| !numbers.contains_key(&v) && !derived[v.0 as usize]) else {
        return;
    };
    for &x in &node.ins {
        visit(f, derived, x, numbers, out);
    }
    let (word, attrs) = node.op.text();
    let attrs = attrs.iter().map(|(k, v)| format!(" {k}={v}")).collect::<String>();
    let operand = |v: &ValueId| match derived[v.0 as usize] {
        true => format!(" weight{}", f.ty(*v).shape),
        false => format!(" {}", numbers[v]),
    };
    out.push(format!("{word}{attrs}{}", node.ins.iter().map(operand).collect::<String>()));
    for &o in &node.outs {
        let n = numbers.len();
        numbers.entry(o).or_insert(n);
    }
}

/// The float values of a tensor from its stored parts.
fn values(parts: &[(TensorPlan, Vec<u8>)]) -> Result<Tensor, String> {
    let read = |(t, bytes): &(TensorPlan, Vec<u8>)| {
        let shape = t.ty.shape.as_fixed().unwrap_or_default();
        match t.ty.elem {
            Elem::Quant(spec) => pack::unpack(bytes, spec, &shape),
            elem => Tensor::from_le_bytes(elem, &shape, bytes),
        }
    };
    let first = read(&parts[0])?;
    let Elem::Quant(spec) = parts[0].0.ty.elem else { return Ok(first) };
    let (scales, zeros) = (read(&parts[1])?, parts.get(2).map(read).transpose()?);
    let byte = |t: &Tensor, i: usize| match t.data() {
        Data::U8(v) => i32::from(v[i]),
        Data::I8(v) => i32::from(v[i]),
        _ => 0,
    };
    let cols = first.shape().last().copied().unwrap_or(1);
    let run = grid::run_length(spec, first.len() / cols.max(1), cols);
    let scale = scales.as_f32().ok_or("scales are floats")?;
    let value = |i: usize| {
        let zero = zeros.as_ref().map_or(0, |z| byte(z, i / run));
        grid::dequantize(byte(&first, i), QParam { scale: scale[i / run], zero })
    };
    Ok(Tensor::f32(first.shape(), (0..first.len()).map(value).collect()))
}
