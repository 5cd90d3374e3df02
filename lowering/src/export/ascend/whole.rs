//! `W8A8`: inputs rounded by one calibrated scale (ascend.md §5.2, §5.4).
//!
//! The operator computes `(Σ w · round(x / input_scale) + quant_bias) * deq_scale` with sums of 32 bits.

use std::collections::HashMap;

use qrmc_ir::{ScaleType, WeightSource};

use super::super::plan::{bytes, scale_bytes, signed_codes};
use super::super::{Entry, ExportError, Linear, Part, View};
use crate::artefact::Dtype;

/// Largest magnitude of a product of two codes.
const PRODUCT: f64 = 128.0 * 128.0;

/// Stored names of the biases of linear layers with codes, by module name.
pub(super) fn biases(view: &View) -> HashMap<&str, &str> {
    fn of(e: &Entry) -> Option<(&str, &str)> {
        match e {
            Entry::Plain { stored, plan } => Some((plan.name.strip_suffix(".bias")?, stored.as_str())),
            Entry::Linear(_) => None,
        }
    }
    let modules: Vec<&str> = view.linears().map(|l| l.name.as_str()).collect();
    view.entries.iter().filter_map(of).filter(|(m, _)| modules.contains(m)).collect()
}

/// Refuses a scale that the loader would round.
pub(super) fn checked(l: &Linear, src: &dyn WeightSource) -> Result<(), ExportError> {
    let scale = input_scale(l, src)?;
    if ScaleType::BF16.round(scale) == scale {
        return Ok(());
    }
    Err(ExportError::illegal(format!(
        "{}: the scale {scale:e} of its input is no bf16, and ascend files of W8A8 are for models in bf16",
        l.name
    ))
    .hint("compile with static-inputs{scale=bf16}"))
}

fn input_scale(l: &Linear, src: &dyn WeightSource) -> Result<f32, ExportError> {
    match l.input.scales(src)?[..] {
        [scale] if scale > 0.0 && scale.is_finite() => Ok(scale),
        _ => Err(ExportError::fault(format!("{}: the scale of its input is no positive number", l.name))),
    }
}

/// `[rows]`: what a sum of products of codes is worth.
fn deq_scales(l: &Linear, src: &dyn WeightSource) -> Result<Vec<f32>, ExportError> {
    let input = input_scale(l, src)?;
    let all: Vec<f32> = l.scales(src)?.iter().map(|w| input * w).collect();
    match all.iter().position(|s| !s.is_normal()) {
        None => Ok(all),
        Some(row) => Err(ExportError::illegal(format!(
            "{}: the scales of its input and of row {row} make {:e}, which f32 does not hold",
            l.name, all[row]
        ))
        .hint("give the layer W8A8_DYNAMIC: leave it out with static-inputs{skip=..}, and annotate with a=8,a_sym=true")),
    }
}

/// `[rows]`: biases in units of `deq_scale`, 0 where there are none. Zero points of inputs are 0, and add nothing.
fn quant_bias(l: &Linear, bias: Option<&str>, src: &dyn WeightSource) -> Result<Vec<u32>, ExportError> {
    let Some(name) = bias else { return Ok(vec![0; l.rows]) };
    let t = src.read(name)?;
    let values = t.as_f32().filter(|v| v.len() == l.rows);
    let values =
        values.ok_or_else(|| ExportError::fault(format!("`{name}` is no bias of {} rows", l.rows)))?;
    let most = f64::from(i32::MAX) - l.cols as f64 * PRODUCT;
    let mut out = Vec::with_capacity(l.rows);
    for (row, (b, scale)) in values.iter().zip(deq_scales(l, src)?).enumerate() {
        let q = (f64::from(*b) / f64::from(scale)).round_ties_even();
        if q.abs() > most || q.is_nan() {
            return Err(ExportError::illegal(format!(
                "{}: the bias {b:e} of row {row} is {q:e} times deq_scale; with the products of {} inputs that is more \
                 than 32 bits hold",
                l.name, l.cols
            ))
            .hint(
                "give the layer W8A8_DYNAMIC: leave it out with static-inputs{skip=..}, and annotate with a=8,a_sym=true",
            ));
        }
        out.push((q as i32).cast_unsigned());
    }
    Ok(out)
}

/// The tensors of a linear layer whose bias has this stored name.
///
/// # Errors
/// If its scales and its bias do not fit the operator.
pub(super) fn linear<'a>(
    l: &'a Linear,
    bias: Option<&'a str>,
    src: &dyn WeightSource,
    out: &mut Vec<Part<'a>>,
) -> Result<(), ExportError> {
    deq_scales(l, src)?;
    quant_bias(l, bias, src)?;
    out.push(signed_codes(l));
    out.push(Part::of(l, "input_scale", Dtype::F32, vec![1], move |src, put| {
        Ok(put(&input_scale(l, src)?.to_le_bytes())?)
    }));
    out.push(Part::of(l, "input_offset", Dtype::F32, vec![1], |_, put| Ok(put(&0f32.to_le_bytes())?)));
    out.push(Part::of(l, "deq_scale", Dtype::F32, vec![l.rows], move |src, put| {
        Ok(put(&scale_bytes(&deq_scales(l, src)?, ScaleType::F32)?)?)
    }));
    out.push(Part::of(l, "quant_bias", Dtype::I32, vec![l.rows], move |src, put| {
        Ok(put(&bytes(&quant_bias(l, bias, src)?))?)
    }));
    Ok(())
}
