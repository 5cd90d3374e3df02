//! Rotary position embedding: frequencies and their scaling for long contexts.

use crate::attr::{Attr, AttrReader, Real};

/// How frequencies are changed for contexts longer than the model was first trained on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor.
        factor: Real,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, smooth between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: Real,
        /// Wavelengths above `original / low` are divided.
        low: Real,
        /// Wavelengths below `original / high` are kept.
        high: Real,
        /// Context of the first training.
        original: u32,
    },
    /// YaRN (arXiv 2309.00071): a ramp between kept and divided frequencies, and a factor on the embedding.
    Yarn {
        /// Divisor.
        factor: Real,
        /// Rotations above which a frequency is kept (32 in the paper).
        fast: Real,
        /// Rotations below which a frequency is divided (1 in the paper).
        slow: Real,
        /// Context of the first training.
        original: u32,
        /// Factor on cosine and sine.
        attention: Real,
    },
}

/// Attributes of the `rope` operation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RopeAttr {
    /// Size of one head; even.
    pub head_dim: u32,
    /// Base of the frequencies.
    pub theta: Real,
    /// Change for long contexts.
    pub scaling: RopeScaling,
}

impl RopeAttr {
    /// The `head_dim / 2` angular frequencies, in radians per position.
    pub fn inv_freq(&self) -> Vec<f64> {
        let d = f64::from(self.head_dim);
        let half = self.head_dim as usize / 2;
        let base: Vec<f64> = (0..half).map(|i| self.theta.0.powf(-2.0 * i as f64 / d)).collect();
        match self.scaling {
            RopeScaling::None => base,
            RopeScaling::Linear { factor } => base.iter().map(|f| f / factor.0).collect(),
            RopeScaling::Llama3 { factor, low, high, original } => {
                base.iter().map(|&f| llama3(f, factor.0, low.0, high.0, f64::from(original))).collect()
            }
            RopeScaling::Yarn { factor, fast, slow, original, .. } => {
                let dim_of = |rotations: f64| {
                    d * (f64::from(original) / (rotations * std::f64::consts::TAU)).ln()
                        / (2.0 * self.theta.0.ln())
                };
                let low = dim_of(fast.0).floor().max(0.0);
                let high = dim_of(slow.0).ceil().min(d - 1.0);
                let width = if high > low { high - low } else { 0.001 };
                base.iter()
                    .enumerate()
                    .map(|(i, f)| {
                        let divided = ((i as f64 - low) / width).clamp(0.0, 1.0);
                        f / factor.0 * divided + f * (1.0 - divided)
                    })
                    .collect()
            }
        }
    }

    /// Factor on cosine and sine: 1 except under YaRN.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention, .. } => attention.0,
            _ => 1.0,
        }
    }

    pub(crate) fn attrs(&self) -> Vec<(&'static str, Attr)> {
        let mut v =
            vec![("head_dim", Attr::Int(i64::from(self.head_dim))), ("theta", Attr::Real(self.theta))];
        let word = |w: &str| ("scaling", Attr::Word(w.into()));
        match self.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => v.extend([word("linear"), ("factor", Attr::Real(factor))]),
            RopeScaling::Llama3 { factor, low, high, original } => v.extend([
                word("llama3"),
                ("factor", Attr::Real(factor)),
                ("low", Attr::Real(low)),
                ("high", Attr::Real(high)),
                ("original", Attr::Int(i64::from(original))),
            ]),
            RopeScaling::Yarn { factor, fast, slow, original, attention } => v.extend([
                word("yarn"),
                ("factor", Attr::Real(factor)),
                ("fast", Attr::Real(fast)),
                ("slow", Attr::Real(slow)),
                ("original", Attr::Int(i64::from(original))),
                ("attention", Attr::Real(attention)),
            ]),
        }
        v
    }

    pub(crate) fn from_attrs(a: &mut AttrReader<'_>) -> Result<Self, String> {
        let head_dim = a.int("head_dim")? as u32;
        let theta = a.real("theta")?;
        let scaling = match a.take_opt("scaling") {
            None => RopeScaling::None,
            Some(Attr::Word(w)) if w == "linear" => RopeScaling::Linear { factor: a.real("factor")? },
            Some(Attr::Word(w)) if w == "llama3" => RopeScaling::Llama3 {
                factor: a.real("factor")?,
                low: a.real("low")?,
                high: a.real("high")?,
                original: a.int("original")? as u32,
            },
            Some(Attr::Word(w)) if w == "yarn" => RopeScaling::Yarn {
                factor: a.real("factor")?,
                fast: a.real("fast")?,
                slow: a.real("slow")?,
                original: a.int("original")? as u32,
                attention: a.real("attention")?,
            },
            Some(other) => return Err(format!("rope scaling `{other}` is none of linear, llama3, yarn")),
        };
        Ok(RopeAttr { head_dim, theta, scaling })
    }
}

fn llama3(f: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = std::f64::consts::TAU / f;
    if wavelength < original / high {
        f
    } else if wavelength > original / low {
        f / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * f / factor + smooth * f
    }
}
