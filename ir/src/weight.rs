//! Weights are names; where their bytes live is the business of a [`WeightSource`].

use std::borrow::Cow;

use bytes::Bytes;

use crate::tensor::Tensor;
use crate::types::{Elem, TensorType};

/// Why the bytes of a weight could not be had.
#[derive(Debug, thiserror::Error)]
#[error("weight `{name}`: {why}")]
pub struct WeightError {
    /// Name of the weight.
    pub name: String,
    /// What was seen, and what to do.
    pub why: String,
}

impl WeightError {
    /// An error about one weight.
    pub fn new(name: impl Into<String>, why: impl Into<String>) -> Self {
        WeightError { name: name.into(), why: why.into() }
    }
}

/// The stored bytes of a weight in its declared type.
///
/// Floats are little-endian. Codes of [`Elem::Quant`] are a dense bit stream, least significant bit
/// first, unsigned (signed codes are stored plus `2^(bits-1)`), each row along the last axis starting on a byte.
#[derive(Debug)]
pub struct RawWeight<'a> {
    /// Declared type.
    pub ty: TensorType,
    /// Dense storage, `ty.bytes()` long.
    pub bytes: Cow<'a, [u8]>,
}

/// Gives out the weights of a module by name. Implementations map files; nothing is read before it is asked for.
pub trait WeightSource: Send + Sync {
    /// The stored bytes, without conversion where the storage allows.
    ///
    /// # Errors
    /// If the name is unknown or the bytes cannot be read.
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError>;

    /// The same bytes in memory that outlives the borrow, such as a mapped file; `None` where the source has no such memory,
    /// and [`WeightSource::raw`] is to be copied.
    ///
    /// # Errors
    /// As [`WeightSource::raw`].
    fn shared(&self, name: &str) -> Result<Option<Bytes>, WeightError> {
        let _ = name;
        Ok(None)
    }

    /// The caller has done with a weight for now: a source that maps files may give its pages back.
    fn release(&self, name: &str) {
        let _ = name;
    }

    /// The weight as a host tensor: floats widened to `f32`, one code an element.
    ///
    /// # Errors
    /// As [`WeightSource::raw`].
    fn read(&self, name: &str) -> Result<Tensor, WeightError> {
        let raw = self.raw(name)?;
        let shape =
            raw.ty.shape.as_fixed().ok_or_else(|| WeightError::new(name, "its shape is not fixed"))?;
        match raw.ty.elem {
            Elem::Quant(spec) => crate::pack::unpack(&raw.bytes, spec, &shape),
            elem => Tensor::from_le_bytes(elem, &shape, &raw.bytes),
        }
        .map_err(|why| WeightError::new(name, why))
    }
}

/// The source of what has no weights: a step on its own, whose constants are operands.
#[derive(Clone, Copy, Debug)]
pub struct NoWeights;

impl WeightSource for NoWeights {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        Err(WeightError::new(name, "there are no weights here"))
    }
}
