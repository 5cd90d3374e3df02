//! Rope scaling: from the `rope.scaling.*` keys, or from the factors of `rope_freqs.weight`.

use serde_json::{Map, Value, json};

use super::config::Model;
use super::reader::GgufFile;
use crate::ImportError;

/// Tensor of frequency divisors that Llama 3.1 and later carry instead of metadata.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";
/// How close rebuilt factors must come to the stored ones, relative.
const TOLERANCE: f64 = 1e-4;

/// The `rope_scaling` of `config.json`; `None` if there is no scaling.
///
/// # Errors
/// If the scaling is of a kind, or has parameters, that a config cannot say.
pub(super) fn rope_scaling(file: &GgufFile, model: &Model) -> Result<Option<Value>, ImportError> {
    let key = |k: &str| model.key(&format!("rope.scaling.{k}"));
    let old = model.key("rope.scale_linear");
    let factor = match file.float(&key("factor"))? {
        Some(f) => Some(f),
        None => file.float(&old)?,
    }
    .filter(|&f| f != 0.0 && f != 1.0);
    let kind = file.str(&key("type"))?;
    let scaled = match (kind, factor) {
        (Some("none"), _) | (None | Some("linear"), None) => None,
        (None | Some("linear"), Some(f)) => Some(json!({"rope_type": "linear", "factor": f})),
        (Some("yarn"), Some(f)) => Some(yarn(file, model, f)?),
        (Some("yarn"), None) => {
            return Err(file.fail(format!(
                "`{}` is yarn but `{}` is missing or 1",
                key("type"),
                key("factor")
            )));
        }
        (Some(other), _) => {
            return Err(
                file.fail(format!("`{}` is `{other}`; supported are none, linear, yarn", key("type")))
            );
        }
    };
    match (stored_factors(file, model)?, scaled) {
        (None, scaled) => Ok(scaled),
        (Some(_), Some(_)) => {
            Err(file.fail(format!("both `{ROPE_FREQS}` and `{}` scale the rotary frequencies", key("type"))))
        }
        (Some(factors), None) => llama3(file, model, &factors),
    }
}

fn yarn(file: &GgufFile, model: &Model, factor: f64) -> Result<Value, ImportError> {
    let key = |k: &str| model.key(&format!("rope.scaling.{k}"));
    for (k, inert) in [
        ("yarn_ext_factor", 1.0),
        ("yarn_log_multiplier", 0.0),
        ("attn_factor", 1.0),
        ("yarn_attn_factor", 1.0),
    ] {
        if let Some(v) = file.float(&key(k))?.filter(|&v| v != inert) {
            return Err(file.fail(format!("`{}` is {v}; only {inert} is supported", key(k))));
        }
    }
    let mut scaling = Map::new();
    scaling.insert("rope_type".into(), json!("yarn"));
    scaling.insert("factor".into(), json!(factor));
    let original = file.uint(&key("original_context_length"))?.unwrap_or(model.context);
    scaling.insert("original_max_position_embeddings".into(), json!(original));
    for (from, to) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
        if let Some(v) = file.float(&key(from))? {
            scaling.insert(to.into(), json!(v));
        }
    }
    Ok(Value::Object(scaling))
}

/// The values of `rope_freqs.weight`, one for each pair of a head.
fn stored_factors(file: &GgufFile, model: &Model) -> Result<Option<Vec<f32>>, ImportError> {
    let Some(tensor) = file.tensors().iter().find(|t| t.name == ROPE_FREQS) else { return Ok(None) };
    let half = model.head_dim / 2;
    if tensor.shape != [half] || tensor.ty.is_quantized() {
        let what = format!("`{ROPE_FREQS}` is {}{:?}; {half} floats are wanted", tensor.ty, tensor.shape);
        return Err(file.fail(what));
    }
    let mut factors = Vec::with_capacity(half);
    tensor.ty.dequantize(file.bytes(tensor), |v| factors.extend_from_slice(v));
    Ok(Some(factors))
}

/// Finds the llama3 scaling that has these factors: low 1, high 4, original context 8192, and the factor
/// that the slowest pair shows.
fn llama3(file: &GgufFile, model: &Model, stored: &[f32]) -> Result<Option<Value>, ImportError> {
    if stored.iter().all(|&f| f == 1.0) {
        return Ok(None);
    }
    let factor = stored.last().map_or(1.0, |&f| f64::from(f));
    // A NaN is not close to anything.
    let close = |i: usize, have: f32| {
        let want = llama3_factor(model.rope_theta, i, model.head_dim, factor);
        (f64::from(have) - want).abs() <= TOLERANCE * want
    };
    match stored.iter().enumerate().find(|&(i, &have)| !close(i, have)) {
        None => Ok(Some(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }))),
        Some((i, have)) => {
            let want = llama3_factor(model.rope_theta, i, model.head_dim, factor);
            let what = format!(
                "`{ROPE_FREQS}` divides frequency {i} by {have}, but llama3 scaling (factor {factor}, low 1, high 4, \
                 original context 8192, theta {}) would divide it by {want}; no other such table is understood",
                model.rope_theta
            );
            Err(file
                .fail(what)
                .hint("import the original Hugging Face folder, whose config.json names the scaling"))
        }
    }
}

/// What llama3 scaling divides the frequency of pair `i` by.
fn llama3_factor(theta: f64, i: usize, head_dim: usize, factor: f64) -> f64 {
    const ORIGINAL: f64 = 8192.0;
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
    if wavelength < ORIGINAL / HIGH {
        1.0
    } else if wavelength > ORIGINAL / LOW {
        factor
    } else {
        let smooth = (ORIGINAL / wavelength - LOW) / (HIGH - LOW);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}

#[cfg(test)]
mod tests;
