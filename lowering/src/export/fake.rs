//! An ordinary checkpoint in bf16 whose weights are the de-quantized ones.

use qrmc_ir::{Elem, QuantSpec, ScaleType, Tensor, WeightSource};

use super::plan::{Plan, STEM, weights_only};
use super::{Entry, ExportError, Format, Linear, Part, View};
use crate::artefact::Dtype;

/// De-quantized weights: see the module.
pub struct Fake;

impl Format for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn summary(&self) -> &'static str {
        "an ordinary bf16 checkpoint with the de-quantized weights, rounded to bf16: everything"
    }

    fn nearest(&self, _: &Linear, _: &dyn WeightSource) -> Result<Option<QuantSpec>, ExportError> {
        Ok(None)
    }

    fn plan<'a>(&self, view: &'a View, _: &dyn WeightSource) -> Result<Plan<'a>, ExportError> {
        weights_only(view, self.name())?;
        let part = |e: &'a Entry| match e {
            Entry::Plain { stored, plan } => Part::floats(stored, plan, Elem::BF16),
            Entry::Linear(l) => Part::of(l, "weight", Dtype::BF16, vec![l.rows, l.cols], move |src, put| {
                for rows in l.blocks() {
                    let values = l.values(src, rows)?;
                    let bytes = Tensor::f32([values.len()], values).to_le_bytes(Elem::BF16);
                    put(&bytes.map_err(ExportError::fault)?)?;
                }
                Ok(())
            }),
        };
        let parts = view.entries.iter().map(part).collect();
        let (compute, files) = (Some(ScaleType::BF16), Vec::new());
        Ok(Plan { stem: STEM, parts, compute, quantization: None, files, notes: Vec::new() })
    }
}
