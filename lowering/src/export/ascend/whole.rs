//! `W8A8`: inputs rounded by one calibrated scale (ascend.md §5.2, §5.4).
//!
//! The operator computes `(Σ w · round(x / input_scale + input_offset) + quant_bias) * deq_scale` with sums of 32 bits.

use std::collections::HashMap;

use qrmc_ir::{ScaleType, WeightSource};

use super::super::plan::{bytes, signed_codes};
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

/// Refuses a scale that the loader of a model of this type would round.
pub(super) fn fits(l: &Linear, ty: ScaleType, src: &dyn WeightSource) -> Result<(), ExportError> {
    let scale = input_scale(l, src)?;
    if ty.round(scale) == scale {
        return Ok(());
    }
    Err(ExportError::illegal(format!(
        "{}: the scale {scale:e} of its input is no {ty}, the type of the model, to which the loader rounds it",
        l.name
    ))
    .hint("compile with static-inputs{scale=bf16}, or f16 for a model in f16"))
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

/// The zero point of the input, in the range of signed codes.
fn input_offset(l: &Linear, src: &dyn WeightSource) -> Result<i32, ExportError> {
    match (l.input.zeros(src)?[..].first(), l.input.zero.is_some()) {
        (None, false) => Ok(0),
        (Some(zero), true) => Ok(i32::from(*zero) - 128),
        _ => Err(ExportError::fault(format!("{}: the zero point of its input is not there", l.name))),
    }
}

/// A bias, and what zero points of the input add to a row whose codes have this sum, in units of `deq_scale`.
fn in_steps(bias: f32, deq_scale: f32, sum: i64, offset: i32) -> f64 {
    (f64::from(bias) / f64::from(deq_scale) - (sum * i64::from(offset)) as f64).round_ties_even()
}

/// `[rows]`: the sums of the signed codes of each row; 0 where the offset is.
fn sums(l: &Linear, offset: i32, src: &dyn WeightSource) -> Result<Vec<i64>, ExportError> {
    let mut out = Vec::with_capacity(l.rows);
    if offset == 0 {
        out.resize(l.rows, 0);
        return Ok(out);
    }
    for rows in l.blocks() {
        let codes = l.codes(src, rows)?;
        out.extend(codes.chunks(l.cols).map(|row| row.iter().map(|&q| i64::from(q) - 128).sum::<i64>()));
    }
    Ok(out)
}

/// `[rows]`: what is added to the sums of products, in units of `deq_scale`.
fn quant_bias(l: &Linear, bias: Option<&str>, src: &dyn WeightSource) -> Result<Vec<u32>, ExportError> {
    let offset = input_offset(l, src)?;
    let values = match bias {
        None => vec![0.0; l.rows],
        Some(name) => {
            let t = src.read(name)?;
            let values = t.as_f32().filter(|v| v.len() == l.rows).map(<[f32]>::to_vec);
            values.ok_or_else(|| ExportError::fault(format!("`{name}` is no bias of {} rows", l.rows)))?
        }
    };
    let most = f64::from(i32::MAX) - l.cols as f64 * PRODUCT;
    let sums = sums(l, offset, src)?;
    let mut out = Vec::with_capacity(l.rows);
    for (row, (b, scale)) in values.iter().zip(deq_scales(l, src)?).enumerate() {
        let q = in_steps(*b, scale, sums[row], offset);
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

/// The element type of `deq_scale` in a model of this type.
pub(super) fn deq_type(ty: ScaleType) -> Dtype {
    if ty == ScaleType::F16 { Dtype::I64 } else { Dtype::F32 }
}

/// Scales as the operator takes them: in a model in f16, the bits of f32 in the low half of 64.
fn deq_bytes(scales: &[f32], ty: ScaleType) -> Vec<u8> {
    let wide = |s: &f32| u64::from(s.to_bits()).to_le_bytes().to_vec();
    let plain = |s: &f32| s.to_le_bytes().to_vec();
    scales.iter().flat_map(|s| if deq_type(ty) == Dtype::I64 { wide(s) } else { plain(s) }).collect()
}

/// The tensors of a linear layer whose bias has this stored name, in a model of type `ty`.
///
/// # Errors
/// If its scales and its bias do not fit the operator.
pub(super) fn linear<'a>(
    l: &'a Linear,
    bias: Option<&'a str>,
    ty: ScaleType,
    src: &dyn WeightSource,
    out: &mut Vec<Part<'a>>,
) -> Result<(), ExportError> {
    deq_scales(l, src)?;
    quant_bias(l, bias, src)?;
    out.push(signed_codes(l));
    out.push(Part::of(l, "input_scale", Dtype::F32, vec![1], move |src, put| {
        Ok(put(&input_scale(l, src)?.to_le_bytes())?)
    }));
    out.push(Part::of(l, "input_offset", Dtype::F32, vec![1], move |src, put| {
        Ok(put(&(input_offset(l, src)? as f32).to_le_bytes())?)
    }));
    out.push(Part::of(l, "deq_scale", deq_type(ty), vec![l.rows], move |src, put| {
        Ok(put(&deq_bytes(&deq_scales(l, src)?, ty))?)
    }));
    out.push(Part::of(l, "quant_bias", Dtype::I32, vec![l.rows], move |src, put| {
        Ok(put(&bytes(&quant_bias(l, bias, src)?))?)
    }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // methods.md §10.5 [golden].
    #[test]
    fn an_input_with_a_zero_point_golden() {
        let (input, weight, offset, bias) = (0.1f32, 0.2f32, 3, 0.5f32);
        let (codes, x) = ([1i64, -2, 4], [0.5f32, -0.2, 1.0]);
        let deq = input * weight;
        assert!((deq - 0.02).abs() < 1e-8);
        let quant_bias = in_steps(bias, deq, codes.iter().sum(), offset);
        assert_eq!(quant_bias, 16.0);
        let rounded = x.map(|x| (x / input + offset as f32).round_ties_even() as i64);
        assert_eq!(rounded, [8, 1, 13]);
        let sum: i64 = codes.iter().zip(rounded).map(|(w, q)| w * q).sum();
        assert!(((sum as f64 + quant_bias) * f64::from(deq) - 1.48).abs() < 1e-6);
    }

    // methods.md §10.5: 0.02 in a model in f16.
    #[test]
    fn scales_of_64_bits_golden() {
        assert_eq!(deq_bytes(&[0.02], ScaleType::F16), 1_017_370_378i64.to_le_bytes());
        assert_eq!(deq_bytes(&[0.02], ScaleType::BF16), 0.02f32.to_le_bytes());
    }
}
