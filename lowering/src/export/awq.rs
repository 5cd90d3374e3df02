//! AutoAWQ's GEMM form (methods.md §10.2): 4 bits, input-major words in which eight neighbouring outputs are interleaved.

use qrmc_ir::{QuantSpec, ScaleType, WeightSource, words};
use serde_json::json;

use super::plan::{Plan, STEM, bytes, excluded, float_head, one_group, parts, scale_bytes, weights_only};
use super::{ExportError, Format, Linear, Part, View};
use crate::artefact::Dtype;

/// Bits of a code in the file.
const BITS: u8 = 4;

/// See the module.
pub(super) struct Awq;

impl Format for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn summary(&self) -> &'static str {
        "AutoAWQ GEMM, W4 with zero points: vLLM, transformers, SGLang"
    }

    fn nearest(&self, l: &Linear, src: &dyn WeightSource) -> Result<Option<QuantSpec>, ExportError> {
        let spec = l.spec();
        Ok(if spec.bits > BITS {
            Some(QuantSpec { bits: BITS, scale: ScaleType::F16, ..spec })
        } else if l.scales_fit(src, ScaleType::F16, self.name()).is_err() {
            Some(QuantSpec { scale: ScaleType::F16, ..spec })
        } else {
            None
        })
    }

    fn plan<'a>(&self, view: &'a View, src: &dyn WeightSource) -> Result<Plan<'a>, ExportError> {
        weights_only(view, self.name())?;
        float_head(view, self.name())?;
        let group = one_group(view, self.name())?;
        for l in view.linears() {
            if l.bits() > BITS {
                return Err(ExportError::illegal(format!(
                    "{}: codes of {} bits; awq words hold {BITS}",
                    l.name,
                    l.bits()
                ))
                .hint("compile with bits=4, or --format gptq-v2 or compressed-tensors"));
            }
            if !l.rows.is_multiple_of(8) {
                return Err(ExportError::illegal(format!(
                    "{}: {} outputs; an awq word holds 8 of them",
                    l.name, l.rows
                ))
                .hint("--format compressed-tensors packs along the inputs"));
            }
            l.scales_fit(src, ScaleType::F16, self.name())?;
        }
        let made = parts(view, |l, out| {
            let (groups, words) = (l.groups(), l.rows / 8);
            let pack = |mut codes: Vec<u8>| {
                words::to_awq_order(&mut codes);
                bytes(&words::pack_rows(&codes, l.rows, BITS))
            };
            out.push(Part::of(l, "qweight", Dtype::I32, vec![l.cols, words], move |src, put| {
                let codes = l.codes(src, 0..l.rows)?;
                Ok(put(&pack(words::transposed(&codes, l.rows, l.cols)))?)
            }));
            out.push(Part::of(l, "qzeros", Dtype::I32, vec![groups, words], move |src, put| {
                Ok(put(&pack(words::transposed(&l.zeros(src)?, l.rows, groups)))?)
            }));
            out.push(Part::of(l, "scales", Dtype::F16, vec![groups, l.rows], move |src, put| {
                let scales = words::transposed(&l.scales(src)?, l.rows, groups);
                Ok(put(&scale_bytes(&scales, ScaleType::F16)?)?)
            }));
            Ok(())
        })?;
        let mut notes = Vec::new();
        if let Some(l) = view.linears().find(|l| l.bits() < BITS) {
            notes.push(format!("codes of {} bits stand in words of {BITS} bits", l.bits()));
        }
        let mut keep: Vec<&str> =
            view.float.iter().map(String::as_str).filter(|n| *n != super::HEAD).collect();
        keep.sort_unstable();
        let mut quantization = json!({
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": group,
            "zero_point": true,
            "modules_to_not_convert": if keep.is_empty() { None } else { Some(keep) },
        });
        if let Some(patterns) = excluded(view) {
            // GPTQModel reads these, and takes layers of the other list for codes.
            quantization["dynamic"] = patterns;
        }
        let (compute, files) = (Some(ScaleType::F16), Vec::new());
        Ok(Plan { stem: STEM, parts: made, compute, quantization: Some(quantization), files, notes })
    }
}
