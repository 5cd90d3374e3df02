//! Quantization schemes. A scheme says how integer codes are laid over a tensor; the scales and
//! zero points themselves are values of the graph.

use std::fmt;

/// Which elements share one scale (and zero point).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Grain {
    /// One for the whole tensor.
    Tensor,
    /// One for each index of the first axis: per output row of a weight `[out, in]`.
    Row,
    /// One for each run of `n` neighbours along the last axis. `n` divides that axis.
    Group(u32),
    /// One for each row along the last axis of an activation, known only when the function runs.
    Token,
    /// One for each index of the last axis, for all rows: static scales of an activation.
    Channel,
}

impl fmt::Display for Grain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Grain::Tensor => f.write_str("tensor"),
            Grain::Row => f.write_str("row"),
            Grain::Group(n) => write!(f, "group:{n}"),
            Grain::Token => f.write_str("token"),
            Grain::Channel => f.write_str("channel"),
        }
    }
}

/// The type in which scales are stored. Codes are chosen with the *stored* scale.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ScaleType {
    /// Nothing is lost.
    F32,
    /// What AutoAWQ and GPTQ files hold.
    F16,
    /// Model type of most checkpoints.
    BF16,
}

impl ScaleType {
    /// The nearest value of this type.
    pub fn round(self, x: f32) -> f32 {
        match self {
            ScaleType::F32 => x,
            ScaleType::F16 => half::f16::from_f32(x).to_f32(),
            ScaleType::BF16 => half::bf16::from_f32(x).to_f32(),
        }
    }

    /// The element type that holds it.
    pub fn elem(self) -> crate::Elem {
        match self {
            ScaleType::F32 => crate::Elem::F32,
            ScaleType::F16 => crate::Elem::F16,
            ScaleType::BF16 => crate::Elem::BF16,
        }
    }
}

impl fmt::Display for ScaleType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.elem().fmt(f)
    }
}

/// An affine integer scheme: `value = scale * (code - zero)`.
///
/// Text form: `u4<group:64, f32, zero>` (asymmetric) or `i8<row, f32>` (symmetric).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct QuantSpec {
    /// 2 to 8.
    pub bits: u8,
    /// Two's complement codes `-2^(b-1) ..= 2^(b-1)-1`; otherwise `0 ..= 2^b-1`.
    pub signed: bool,
    /// What shares a scale.
    pub grain: Grain,
    /// How scales are stored.
    pub scale: ScaleType,
    /// Whether there is an integer zero point (same range as the codes).
    pub zero: bool,
}

impl QuantSpec {
    /// Asymmetric: unsigned codes with a zero point.
    pub fn asym(bits: u8, grain: Grain) -> Self {
        QuantSpec { bits, signed: false, grain, scale: ScaleType::F32, zero: true }
    }

    /// Symmetric: signed codes without a zero point.
    pub fn sym(bits: u8, grain: Grain) -> Self {
        QuantSpec { bits, signed: true, grain, scale: ScaleType::F32, zero: false }
    }

    /// Smallest code.
    pub fn qmin(self) -> i32 {
        if self.signed { -(1 << (self.bits - 1)) } else { 0 }
    }

    /// Largest code.
    pub fn qmax(self) -> i32 {
        if self.signed { (1 << (self.bits - 1)) - 1 } else { (1 << self.bits) - 1 }
    }

    /// How many scales a tensor of this shape has, as the shape of the scale operand.
    ///
    /// `[.., n] -> [.., n / g]` for groups, `[rows, 1]` per row, `[.., 1]` per token, `[1]` per tensor, `[n]` per channel.
    ///
    /// # Errors
    /// The group size and the length that it does not divide.
    pub fn scale_shape(self, shape: &crate::Shape) -> Result<crate::Shape, (u32, crate::Dim)> {
        let mut dims = shape.0.clone();
        match self.grain {
            Grain::Tensor => return Ok(crate::Shape::fixed(&[1])),
            Grain::Channel => return Ok(crate::Shape(dims.last().copied().into_iter().collect())),
            Grain::Row | Grain::Token => {
                if let Some(last) = dims.last_mut() {
                    *last = crate::Dim::Fixed(1);
                }
            }
            Grain::Group(g) => match dims.last_mut() {
                Some(crate::Dim::Fixed(n)) if g > 0 && *n % u64::from(g) == 0 => *n /= u64::from(g),
                last => return Err((g, last.copied().unwrap_or(crate::Dim::Fixed(0)))),
            },
        }
        Ok(crate::Shape(dims))
    }

    /// Bits per weight including scales and zero points, for rows of `cols` elements.
    pub fn bits_per_element(self, cols: usize) -> f64 {
        let per_scale = match self.grain {
            Grain::Group(g) => g as usize,
            _ => cols.max(1),
        };
        let side = self.scale.elem().bits() + if self.zero { 8 } else { 0 };
        f64::from(self.bits) + side as f64 / per_scale as f64
    }
}

impl fmt::Display for QuantSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.signed { 'i' } else { 'u' };
        write!(f, "{sign}{}<{}, {}", self.bits, self.grain, self.scale)?;
        if self.zero {
            f.write_str(", zero")?;
        }
        f.write_str(">")
    }
}

/// How scale and zero point are chosen from the data.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rule {
    /// Range of the data with zero included; weights clamp a vanishing scale at 1e-5 (GPTQ family).
    MinMax,
    /// Plain range of the data, zero point clamped (AWQ).
    Awq,
    /// `MinMax` with both ends shrunk together to the least `sum |error|^2.4` over 80 steps (GPTQ's `mse`).
    Mse,
    /// Range of the data with zero included, without a least scale; its ends may carry factors. For values that are
    /// quantized when the function runs (methods.md §1.1).
    Dynamic,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rule::MinMax => "minmax",
            Rule::Awq => "awq",
            Rule::Mse => "mse",
            Rule::Dynamic => "dynamic",
        })
    }
}

impl std::str::FromStr for Rule {
    type Err = ();
    fn from_str(s: &str) -> Result<Self, ()> {
        match s {
            "minmax" => Ok(Rule::MinMax),
            "awq" => Ok(Rule::Awq),
            "mse" => Ok(Rule::Mse),
            "dynamic" => Ok(Rule::Dynamic),
            _ => Err(()),
        }
    }
}
