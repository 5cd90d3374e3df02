//! Hugging Face folders whose linear layers are stored as integer codes: AutoAWQ, GPTQ and compressed-tensors.
//!
//! A linear layer `NAME` is handed out as an artefact holds it: `NAME.weight.codes`, `NAME.weight.scale` and, where the
//! scheme has zero points, `NAME.weight.zero`, converted from the file's words each time they are asked for.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use qrmc_ir::{Elem, RawWeight, TensorType, WeightError, WeightSource};
use serde_json::Value;

use crate::hf::SafetensorsFolder;
use crate::{Checkpoint, ImportError, Integers, Quantization, RoundedInput};

mod ascend;
mod config;
mod linear;
mod open;

use config::{Rules, Storage};
use linear::Linear;

/// The ends of the names of tensors that hold packed codes.
const PACKED: [&str; 2] = [".qweight", ".weight_packed"];
/// The ends of the names of tensors that go with codes, and how the codes are called.
const BESIDE: [(&str, &str); 15] = [
    (".qzeros", "qweight"),
    (".scales", "qweight"),
    (".g_idx", "qweight"),
    (".weight_scale", "weight_packed"),
    (".weight_zero_point", "weight_packed"),
    (".weight_g_idx", "weight_packed"),
    (".input_scale", "weight_packed"),
    (".input_zero_point", "weight_packed"),
    (".weight_offset", "weight"),
    (".left_trans", "weight"),
    (".right_trans", "weight"),
    (".clip_ratio", "weight"),
    (".input_offset", "weight"),
    (".deq_scale", "weight"),
    (".quant_bias", "weight"),
];
/// The table of the embedding, which is read as floats.
const EMBEDDING: &str = "model.embed_tokens";

/// What a tensor that is handed out is made of.
#[derive(Clone, Copy, Debug)]
enum Origin {
    /// A tensor of the files, under its own name.
    File,
    /// A part of a quantized layer.
    Codes(usize),
    Scale(usize),
    Zero(usize),
    /// One of the numbers by which a layer's input is rounded.
    Input(usize, usize),
    /// The scales of a cache.
    Cache(usize),
    /// The values of a quantized layer.
    Floats(usize),
}

/// The weights of a folder of which some linear layers are stored as codes.
#[derive(Debug)]
pub struct QuantizedFolder {
    files: SafetensorsFolder,
    linears: Vec<Linear>,
    tensors: Vec<(String, TensorType, Origin)>,
    by_name: HashMap<String, usize>,
    /// The layers whose inputs are rounded, by the names of their weights.
    inputs: HashMap<String, usize>,
    /// How keys and values are rounded behind the linear layers that make them.
    caches: Vec<(String, RoundedInput)>,
}

/// What [`open`] makes of the weights of a folder.
pub(crate) struct Weights {
    pub(crate) weights: Box<dyn Checkpoint>,
    /// What the layers are stored as, for people; `None` if all are floats.
    pub(crate) format: Option<String>,
    pub(crate) quantization: Option<Quantization>,
    pub(crate) notes: Vec<String>,
}

/// The schemes of a folder's `config.json`, before its weights are looked at.
pub(crate) struct Configured(Option<Rules>);

/// Reads what `config.json` says about quantization.
///
/// # Errors
/// If it names a method or a setting that is not understood.
pub(crate) fn configured(
    folder: &Path,
    config: &Value,
    read: impl Fn(&Path) -> Result<Vec<u8>, ImportError>,
) -> Result<Configured, ImportError> {
    match (Rules::read(folder, config)?, config::ascend::read(folder, read)?) {
        (Some(_), Some(described)) => {
            Err(ImportError::new(described.path, "config.json has a `quantization_config`, too")
                .hint("remove the one that does not belong to the tensors"))
        }
        (said, described) => Ok(Configured(said.or(described))),
    }
}

impl Configured {
    /// What the names of the files of tensors begin with.
    pub(crate) fn stem(&self) -> &'static str {
        let described = self.0.as_ref().is_some_and(|r| r.name == "ascend");
        if described { "quant_model_weights" } else { "model" }
    }
}

/// The weights of a folder, as floats or as codes.
///
/// # Errors
/// If codes and configuration contradict each other, or tensors of a layer do.
pub(crate) fn open(
    folder: &Path,
    configured: Configured,
    files: SafetensorsFolder,
    integers: Integers,
    read: impl Fn(&Path) -> Result<Vec<u8>, ImportError>,
) -> Result<Weights, ImportError> {
    let packed = || files.tensors().into_iter().find(|(n, _)| PACKED.iter().any(|p| n.ends_with(p)));
    let rules = match configured.0 {
        Some(rules) => Some(rules),
        None if packed().is_some() => Rules::read_beside(folder, read)?,
        None => None,
    };
    let Some(rules) = rules else {
        let shape = files.shapes().map(|(name, _)| format!("{name}.weight_shape")).next();
        return match packed().map(|(name, _)| name).or(shape) {
            None => Ok(Weights {
                weights: Box::new(files),
                format: None,
                quantization: None,
                notes: Vec::new(),
            }),
            Some(name) => Err(ImportError::new(
                folder,
                format!("tensor `{name}` is of a quantized model, but config.json has no `quantization_config`"),
            )
            .hint("fetch the config.json of the same checkpoint; older ones have quantize_config.json beside it")),
        };
    };
    let folder = QuantizedFolder::new(folder, &rules, files, integers)?;
    let notes = folder.notes(integers);
    let file = rules.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let quantization = Some(Quantization { format: rules.name, file });
    Ok(Weights { weights: Box::new(folder), format: Some(rules.format), quantization, notes })
}

impl QuantizedFolder {
    fn new(
        folder: &Path,
        rules: &Rules,
        files: SafetensorsFolder,
        integers: Integers,
    ) -> Result<Self, ImportError> {
        let all = files.tensors();
        let linears = all.iter().filter_map(|(name, ty)| coded(name, ty)).map(|name| {
            let fail = |what: String| ImportError::new(&rules.path, what);
            if name == EMBEDDING {
                let what = "the embedding is stored as codes, which is not read".to_owned();
                return Err(fail(what).hint("start from the float checkpoint"));
            }
            let scheme = rules.of(name).ok_or_else(|| {
                fail(format!("layer `{name}` is stored as codes, but the configuration leaves it in floats"))
                    .hint("configuration and tensors are of different checkpoints: download both again")
            })?;
            Linear::open(&files, folder, name, scheme)
        });
        let linears = linears.collect::<Result<Vec<_>, _>>()?;
        let transformed = |l: &&Linear| l.input.as_ref().is_some_and(|r| !r.transforms.is_empty());
        if let Some(l) = linears.iter().find(transformed).filter(|_| integers == Integers::Dequantize) {
            let what = format!("the values of `{}` are those behind a transform of its input", l.name);
            return Err(ImportError::new(folder, what).hint(
                "passes start from the float checkpoint; without passes its codes are taken as they are",
            ));
        }
        let index: HashMap<String, usize> =
            linears.iter().enumerate().map(|(i, l)| (l.name.clone(), i)).collect();
        let mut tensors = Vec::new();
        let caches = if rules.caches { ascend::caches(folder, &files, &all)? } else { Vec::new() };
        if integers != Integers::Dequantize {
            let scales = caches.iter().enumerate().flat_map(|(i, (_, r))| r.tensors().map(move |t| (i, t)));
            tensors.extend(scales.map(|(i, t)| (t.name.clone(), t.ty.clone(), Origin::Cache(i))));
        }
        for (name, ty) in all {
            if rules.caches && ascend::CACHED.iter().any(|end| name.ends_with(end)) {
                continue;
            }
            if let Some(&i) = coded(&name, &ty).and_then(|n| index.get(n)) {
                tensors.extend(handed_out(&linears[i], i, integers));
                continue;
            }
            if beside(folder, &name, |m| index.get(m).map(|&i| &linears[i]))? {
                continue;
            }
            let module = name.strip_suffix(".weight").filter(|m| *m != EMBEDDING && ty.shape.rank() == 2);
            if let Some(module) = module.filter(|m| rules.of(m).is_some()) {
                let what = format!("`{name}` is {ty}, but the configuration calls for codes of `{module}`");
                let hint = "configuration and tensors are of different checkpoints: download both again";
                return Err(ImportError::new(&rules.path, what).hint(hint));
            }
            tensors.push((name, ty, Origin::File));
        }
        let packed =
            |name: &str| index.get(name).is_some_and(|&i| linears[i].scheme.storage == Storage::Packed);
        if let Some((name, _)) = files.shapes().find(|(name, _)| !packed(name)) {
            return Err(lonely(folder, &format!("{name}.weight_shape"), &format!("{name}.weight_packed")));
        }
        let by_name = tensors.iter().enumerate().map(|(i, (name, ..))| (name.clone(), i)).collect();
        let rounds = |(_, l): &(usize, &Linear)| integers != Integers::Dequantize && l.input.is_some();
        let inputs = linears.iter().enumerate().filter(rounds);
        let inputs = inputs.map(|(i, l)| (format!("{}.weight", l.name), i)).collect();
        Ok(QuantizedFolder { files, linears, tensors, by_name, inputs, caches })
    }

    /// What the user should know about the way these weights were taken.
    fn notes(&self, integers: Integers) -> Vec<String> {
        let reordered: Vec<&Linear> = self.linears.iter().filter(|l| l.order.is_some()).collect();
        match (integers, &reordered[..]) {
            (Integers::Dequantize, _) if !self.linears.is_empty() => {
                let mut note = crate::DEQUANTIZED.to_owned();
                let inputs = self.linears.iter().any(|l| l.scheme.input.is_some());
                match (inputs, self.caches.is_empty()) {
                    (false, true) => {}
                    (true, true) => note += "; the rounding of inputs that it asks for is left out",
                    (false, false) => note += "; the rounding of caches that it asks for is left out",
                    (true, false) => {
                        note += "; the rounding of inputs and caches that it asks for is left out"
                    }
                }
                vec![note]
            }
            (Integers::Keep, [first, ..]) => vec![format!(
                "the columns of {} matrices are in groups out of order (act-order with `g_idx`), `{}` first: these are \
                 de-quantized to f32, exactly as their codes say",
                reordered.len(),
                first.name
            )],
            _ => Vec::new(),
        }
    }

    fn find(&self, name: &str) -> Result<&(String, TensorType, Origin), WeightError> {
        match self.by_name.get(name) {
            Some(&at) => Ok(&self.tensors[at]),
            None => Err(WeightError::new(name, "no such tensor in the checkpoint")),
        }
    }
}

/// The layer whose codes a tensor holds.
fn coded<'a>(name: &'a str, ty: &TensorType) -> Option<&'a str> {
    let byte = name.strip_suffix(".weight").filter(|_| ty.elem == Elem::I8);
    PACKED.iter().find_map(|p| name.strip_suffix(p)).or(byte)
}

/// Whether a tensor goes with the codes of a layer, in the layout that the layer has.
fn beside<'a>(
    folder: &Path,
    name: &str,
    layer: impl Fn(&str) -> Option<&'a Linear>,
) -> Result<bool, ImportError> {
    let found = BESIDE.iter().find_map(|(end, codes)| Some((name.strip_suffix(end)?, codes)));
    match found {
        None => Ok(false),
        Some((module, codes)) if layer(module).is_some_and(|l| l.has_beside(name, codes)) => Ok(true),
        Some((module, codes)) => Err(lonely(folder, name, &format!("{module}.{codes}"))),
    }
}

fn lonely(folder: &Path, name: &str, codes: &str) -> ImportError {
    ImportError::new(folder, format!("tensor `{name}` is there, but not `{codes}`"))
        .hint("is a shard missing? Scales without codes make no weight")
}

/// The tensors that a layer is handed out as.
fn handed_out(l: &Linear, i: usize, integers: Integers) -> Vec<(String, TensorType, Origin)> {
    let calibrated = l.input.iter().filter(|_| integers != Integers::Dequantize).flat_map(|r| r.tensors());
    let inputs = calibrated.enumerate().map(|(at, t)| (t.name.clone(), t.ty.clone(), Origin::Input(i, at)));
    if integers == Integers::Dequantize || integers == Integers::Keep && l.order.is_some() {
        let ty = TensorType::new(Elem::F32, [l.rows, l.cols].as_slice());
        let floats = (format!("{}.weight", l.name), ty, Origin::Floats(i));
        return std::iter::once(floats).chain(inputs).collect();
    }
    let of = [Origin::Codes(i), Origin::Scale(i), Origin::Zero(i)];
    let parts = l.parts().into_iter().zip(of).map(|((end, ty), o)| (format!("{}.{end}", l.name), ty, o));
    parts.chain(inputs).collect()
}

impl WeightSource for QuantizedFolder {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        let (_, ty, origin) = self.find(name)?;
        let files = &self.files;
        let bytes = match *origin {
            Origin::File => return files.raw(name),
            Origin::Codes(i) => self.linears[i].dense(files)?,
            Origin::Scale(i) => self.linears[i].scales(files)?,
            Origin::Zero(i) => Cow::Owned(self.linears[i].zeros(files)?),
            Origin::Input(i, at) => {
                let rounded = self.linears[i].input.as_ref();
                Cow::Borrowed(rounded.and_then(|r| r.tensors().nth(at)).map_or(&[][..], |t| &t.bytes))
            }
            Origin::Cache(i) => {
                Cow::Borrowed(self.caches[i].1.tensors().next().map_or(&[][..], |t| &t.bytes))
            }
            Origin::Floats(i) => Cow::Owned(self.linears[i].floats(files)?),
        };
        Ok(RawWeight { ty: ty.clone(), bytes })
    }

    fn shared(&self, name: &str) -> Result<Option<Bytes>, WeightError> {
        let stored = match self.find(name)?.2 {
            Origin::File => Some(name.to_owned()),
            Origin::Codes(i) => self.linears[i].codes_as_stored(),
            Origin::Scale(i) => {
                // For its check: what is lent is not looked at again.
                self.linears[i].scales(&self.files)?;
                self.linears[i].scales_as_stored()
            }
            Origin::Zero(_) | Origin::Floats(_) | Origin::Input(..) | Origin::Cache(_) => None,
        };
        match stored {
            Some(stored) => self.files.shared(&stored),
            None => Ok(None),
        }
    }
}

impl Checkpoint for QuantizedFolder {
    fn tensors(&self) -> Vec<(String, TensorType)> {
        self.tensors.iter().map(|(name, ty, _)| (name.clone(), ty.clone())).collect()
    }

    fn weight_files(&self) -> Vec<PathBuf> {
        self.files.weight_files()
    }

    fn rounded_input(&self, weight: &str) -> Option<&RoundedInput> {
        self.linears[*self.inputs.get(weight)?].input.as_ref()
    }

    fn rounded_cache(&self, module: &str) -> Option<&RoundedInput> {
        let (_, rounded) = self.caches.iter().find(|(name, _)| name == module)?;
        // Where passes start from, none is handed out.
        rounded.tensors().all(|t| self.by_name.contains_key(&t.name)).then_some(rounded)
    }

    fn converts(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
