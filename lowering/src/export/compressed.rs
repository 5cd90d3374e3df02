//! compressed-tensors (methods.md §10.4): `pack-quantized` for weights alone, `int-quantized` where inputs are rounded for
//! each token, or by one calibrated scale.

use std::collections::BTreeMap;

use qrmc_ir::{Grain, QuantSpec, WeightSource, words};
use serde_json::{Map, Value, json};

use super::plan::{Plan, STEM, bytes, dtype, no_caches, parts, scale_bytes, signed, signed_codes};
use super::{ExportError, Format, Linear, Part, View};
use crate::artefact::Dtype;

/// See the module.
pub(super) struct CompressedTensors;

impl Format for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn summary(&self) -> &'static str {
        "weights of W2 to W8, W8A8 for each token or by calibrated scales: vLLM, transformers"
    }

    fn nearest(&self, _: &Linear, _: &dyn WeightSource) -> Result<Option<QuantSpec>, ExportError> {
        Ok(None)
    }

    fn plan<'a>(&self, view: &'a View, _: &dyn WeightSource) -> Result<Plan<'a>, ExportError> {
        no_caches(view, "the kv_cache_scheme that loaders take has floats of 8 bits alone")?;
        let mut groups: BTreeMap<String, (Value, Vec<&str>)> = BTreeMap::new();
        let scale = view.first()?.spec().scale;
        let mut rounds = false;
        for l in view.linears() {
            let scheme = scheme(l)?;
            rounds |= l.input.spec.is_some();
            if l.spec().scale != scale {
                return Err(ExportError::illegal(format!(
                    "{}: scales of {} beside others; loaders have one type for all",
                    l.name,
                    l.spec().scale
                ))
                .hint("compile with one scale type"));
            }
            groups.entry(scheme.to_string()).or_insert((scheme, Vec::new())).1.push(&l.name);
        }
        let form = if rounds { "int-quantized" } else { "pack-quantized" };
        let made = parts(view, |l, out| {
            match rounds {
                true => plain(l, out),
                false => packed(l, out),
            }
            let scales = vec![l.rows, l.groups()];
            let scales = if l.codes.spec.grain == Grain::Tensor { vec![1] } else { scales };
            out.push(Part::of(l, "weight_scale", dtype(scale), scales.clone(), move |src, put| {
                let all = l.scales(src)?;
                Ok(put(&scale_bytes(&all[..scales.iter().product()], scale)?)?)
            }));
            if let Some(x) = l.input.one_scale() {
                out.push(Part::of(l, "input_scale", dtype(x.scale), vec![1], move |src, put| {
                    Ok(put(&scale_bytes(&l.input.scales(src)?, x.scale)?)?)
                }));
                if x.zero {
                    out.push(Part::of(l, "input_zero_point", Dtype::I8, vec![1], move |src, put| {
                        Ok(put(&signed(x.bits, l.input.zeros(src)?))?)
                    }));
                }
            }
            Ok(())
        })?;
        let single = groups.len() == 1;
        let mut config_groups = Map::new();
        for (i, (mut scheme, names)) in groups.into_values().enumerate() {
            // A class of modules stands for all that are not ignored; several schemes name theirs one by one.
            scheme["targets"] = if single { json!(["Linear"]) } else { json!(names) };
            config_groups.insert(format!("group_{i}"), scheme);
        }
        let mut ignore: Vec<&str> = view.float.iter().map(String::as_str).collect();
        ignore.sort_unstable();
        let quantization = json!({
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": config_groups,
            "ignore": ignore,
            "kv_cache_scheme": null,
        });
        let (files, notes) = (Vec::new(), Vec::new());
        Ok(Plan {
            stem: STEM,
            parts: made,
            compute: Some(scale),
            quantization: Some(quantization),
            files,
            notes,
        })
    }
}

/// The scheme of a linear layer as a config group has it, without targets.
fn scheme(l: &Linear) -> Result<Value, ExportError> {
    let spec = l.spec();
    let (strategy, group) = match spec.grain {
        Grain::Tensor => ("tensor", Value::Null),
        Grain::Group(g) => ("group", json!(g)),
        _ => ("channel", Value::Null),
    };
    if let Some(what) = l.clipped() {
        return Err(ExportError::illegal(format!(
            "{what}; compressed-tensors rounds each token by its whole range"
        ))
        .hint("compile without a_clip and without learned bounds, or run the artefact with qrmc"));
    }
    let input = match l.input.spec {
        None => Value::Null,
        Some(x) if l.input.one_scale().is_some() => {
            json!({
                "num_bits": x.bits, "type": "int", "symmetric": !x.zero, "strategy": "tensor", "dynamic": false,
                "group_size": null, "actorder": null, "observer": "minmax", "block_structure": null,
            })
        }
        Some(x) if x.grain == Grain::Token && l.input.matrices.is_empty() => {
            json!({
                "num_bits": x.bits, "type": "int", "symmetric": !x.zero, "strategy": "token", "dynamic": true,
                "group_size": null, "actorder": null, "observer": null, "block_structure": null,
            })
        }
        Some(x) => {
            return Err(ExportError::illegal(format!(
                "{}: its input is rounded to {x}; compressed-tensors rounds each token by its own range, \
                 or all by one calibrated scale",
                l.name
            ))
            .hint("compile with --tp 1, or run the artefact with qrmc"));
        }
    };
    Ok(json!({
        "targets": [],
        "weights": {
            "num_bits": spec.bits, "type": "int", "symmetric": !spec.zero, "strategy": strategy,
            "group_size": group, "actorder": null, "dynamic": false, "observer": "minmax", "block_structure": null,
        },
        "input_activations": input,
        "output_activations": null,
    }))
}

/// Codes in words along the inputs, and zero points in words along the outputs.
fn packed<'a>(l: &'a Linear, out: &mut Vec<Part<'a>>) {
    let (bits, groups) = (l.bits(), l.groups());
    let in_words = words::word_count(l.cols, bits);
    out.push(Part::of(l, "weight_packed", Dtype::I32, vec![l.rows, in_words], move |src, put| {
        l.blocks().try_for_each(|rows| Ok(put(&bytes(&l.words(src, rows, bits)?))?))
    }));
    if l.spec().zero {
        let out_words = words::word_count(l.rows, bits);
        out.push(Part::of(l, "weight_zero_point", Dtype::I32, vec![out_words, groups], move |src, put| {
            let zeros = words::transposed(&l.zeros(src)?, l.rows, groups);
            let lines = words::pack_rows(&zeros, l.rows, bits);
            Ok(put(&bytes(&words::transposed(&lines, groups, out_words)))?)
        }));
    }
    out.push(Part::of(l, "weight_shape", Dtype::I64, vec![2], move |_, put| {
        Ok(put(&[l.rows as u64, l.cols as u64].map(u64::to_le_bytes).concat())?)
    }));
}

/// Codes as signed bytes.
fn plain<'a>(l: &'a Linear, out: &mut Vec<Part<'a>>) {
    out.push(signed_codes(l));
    if l.spec().zero {
        out.push(Part::of(l, "weight_zero_point", Dtype::I8, vec![l.rows, l.groups()], move |src, put| {
            Ok(put(&signed(l.bits(), l.zeros(src)?))?)
        }));
    }
}
