//! GPTQ's forms (methods.md §10.3): 2, 3, 4 or 8 bits, words along the inputs, zero points along the outputs. The first form
//! stores zero points less one.

use qrmc_ir::{QuantSpec, ScaleType, WeightSource, words};
use serde_json::{Value, json};

use super::plan::{
    Plan, STEM, bytes, dtype, excluded, json_file, one_group, parts, scale_bytes, weights_only,
};
use super::{ExportError, Format, HEAD, Linear, Part, View};
use crate::artefact::Dtype;

/// See the module.
pub(super) struct Gptq {
    /// The second form: zero points as they are.
    pub(super) v2: bool,
}

/// Lines of words that are written at once.
const LINES: usize = 64;

/// Bits of the words that hold codes of some bits.
fn stored_bits(bits: u8) -> u8 {
    match bits {
        0..=4 => bits,
        _ => 8,
    }
}

/// The type in which scales are written: their own, or `f16` for `f32`, which readers round to the model's type.
fn scale_type(l: &Linear) -> ScaleType {
    match l.spec().scale {
        ScaleType::BF16 => ScaleType::BF16,
        ScaleType::F16 | ScaleType::F32 => ScaleType::F16,
    }
}

impl Format for Gptq {
    fn name(&self) -> &'static str {
        if self.v2 { "gptq-v2" } else { "gptq" }
    }

    fn summary(&self) -> &'static str {
        match self.v2 {
            true => {
                "GPTQ with zero points as they are, W2 to W8: GPTQModel, transformers; vLLM where they are the middle"
            }
            false => {
                "GPTQ with zero points less one, W2 to W8: transformers; GPTQModel and vLLM where they are the middle"
            }
        }
    }

    fn nearest(&self, l: &Linear, src: &dyn WeightSource) -> Result<Option<QuantSpec>, ExportError> {
        let fits = l.scales_fit(src, scale_type(l), self.name()).is_ok();
        Ok((!fits).then(|| QuantSpec { scale: scale_type(l), ..l.spec() }))
    }

    fn plan<'a>(&self, view: &'a View, src: &dyn WeightSource) -> Result<Plan<'a>, ExportError> {
        weights_only(view, self.name())?;
        let group = one_group(view, self.name())?;
        let bits = view.linears().map(|l| stored_bits(l.bits())).max().unwrap_or(4);
        let scale = view.linears().next().map_or(ScaleType::F16, scale_type);
        let mut notes = Vec::new();
        for l in view.linears() {
            // Words of fewer bits hold no more: but codes of fewer bits are codes of more bits with the same zero point.
            self.fits(l, src, bits, scale)?;
            if l.bits() != bits && notes.is_empty() {
                notes.push(format!("codes of {} bits stand in fields of {bits} bits", l.bits()));
            }
        }
        let v2 = self.v2;
        let made = parts(view, |l, out| {
            let (groups, in_words) = (l.groups(), words::word_count(l.cols, bits));
            let out_words = words::word_count(l.rows, bits);
            out.push(Part::of(l, "qweight", Dtype::I32, vec![in_words, l.rows], move |src, put| {
                let mut packed = Vec::with_capacity(l.rows * in_words);
                l.blocks().try_for_each(|rows| {
                    packed.extend(l.words(src, rows, bits)?);
                    Ok::<_, ExportError>(())
                })?;
                // Some lines of all outputs at a time: the matrix is not there twice.
                for from in (0..in_words).step_by(LINES) {
                    let lines = from..in_words.min(from + LINES);
                    let line = |w: usize| (0..l.rows).map(move |row| row * in_words + w);
                    put(&bytes(&lines.flat_map(line).map(|at| packed[at]).collect::<Vec<_>>()))?;
                }
                Ok(())
            }));
            out.push(Part::of(l, "qzeros", Dtype::I32, vec![groups, out_words], move |src, put| {
                let zeros = words::transposed(&l.zeros(src)?, l.rows, groups);
                let mut packed = words::pack_rows(&zeros, l.rows, bits);
                if !v2 {
                    words::less_one(&mut packed, l.rows, bits);
                }
                Ok(put(&bytes(&packed))?)
            }));
            out.push(Part::of(l, "scales", dtype(scale), vec![groups, l.rows], move |src, put| {
                Ok(put(&scale_bytes(&words::transposed(&l.scales(src)?, l.rows, groups), scale)?)?)
            }));
            out.push(Part::of(l, "g_idx", Dtype::I32, vec![l.cols], move |_, put| {
                let group = l.group();
                Ok(put(&bytes(&(0..l.cols).map(|i| (i / group) as u32).collect::<Vec<_>>()))?)
            }));
            Ok(())
        })?;
        let config = self.config(view, bits, group);
        let files = vec![("quantize_config.json".to_owned(), json_file(&config)?)];
        Ok(Plan { stem: STEM, parts: made, compute: Some(scale), quantization: Some(config), files, notes })
    }
}

impl Gptq {
    fn fits(
        &self,
        l: &Linear,
        src: &dyn WeightSource,
        bits: u8,
        scale: ScaleType,
    ) -> Result<(), ExportError> {
        let per_word = 32 / usize::from(bits.max(1));
        let whole = |n: usize| if bits == 3 { n.is_multiple_of(32) } else { n.is_multiple_of(per_word) };
        for (n, what) in [(l.cols, "inputs"), (l.rows, "outputs")] {
            if !whole(n) {
                return Err(ExportError::illegal(format!(
                    "{}: {n} {what} do not fill whole words of {bits}-bit codes",
                    l.name
                ))
                .hint("--format compressed-tensors fills up the last word"));
            }
        }
        l.scales_fit(src, scale, self.name())?;
        if !self.v2
            && let Some(at) = l.zeros(src)?.iter().position(|&z| z == 0)
        {
            return Err(ExportError::illegal(format!(
                "{}: the zero point of group {} of row {} is 0, which less one borrows from its neighbour; \
                 readers that take fields apart before they add one get both wrong",
                l.name,
                at % l.groups(),
                at / l.groups()
            ))
            .hint("--format gptq-v2 stores zero points as they are"));
        }
        Ok(())
    }

    fn config(&self, view: &View, bits: u8, group: i64) -> Value {
        let symmetric = view.linears().all(|l| l.symmetric() && l.bits() == bits);
        json!({
            "quant_method": "gptq",
            "checkpoint_format": if self.v2 { "gptq_v2" } else { "gptq" },
            "bits": bits,
            "group_size": group,
            "sym": symmetric,
            // Columns stand in the order of the model, whatever order rounding took.
            "desc_act": false,
            "lm_head": view.linears().any(|l| l.name == HEAD),
            "pack_dtype": "int32",
            "dynamic": excluded(view),
            "meta": { "quantizer": [format!("qrmc:{}", env!("CARGO_PKG_VERSION"))] },
        })
    }
}
