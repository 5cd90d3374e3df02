//! One quantized linear layer: its tensors, checked against each other, and what they hold.

use std::borrow::Cow;

use qrmc_ir::grid::{self, QParam};
use qrmc_ir::words::{self, word_count};
use qrmc_ir::{Elem, Grain, QuantSpec, TensorType, WeightError, WeightSource, pack};

use super::config::{Ascend, Scheme, Storage};
use crate::RoundedInput;
use crate::hf::SafetensorsFolder;

/// A linear layer whose weight is stored as codes.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    /// Such as `model.layers.0.mlp.up_proj`.
    pub(super) name: String,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// What the codes mean, as they are handed out.
    pub(super) spec: QuantSpec,
    pub(super) scheme: Scheme,
    /// Scales of a row.
    pub(super) groups: usize,
    /// The group of each column, where it is not `column / (cols / groups)`.
    pub(super) order: Option<Vec<usize>>,
    /// How the input is rounded when the model runs.
    pub(super) input: Option<RoundedInput>,
}

/// The numbers of a tensor of 32-bit integers.
pub(super) fn ints(files: &SafetensorsFolder, name: &str) -> Result<Vec<i32>, WeightError> {
    Ok(files.raw(name)?.bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect())
}

impl Linear {
    fn tensor(&self, part: &str) -> String {
        format!("{}.{part}", self.name)
    }

    /// How many scales and zero points the weight has in all.
    fn scale_count(&self) -> usize {
        if self.scheme.grain == Grain::Tensor { 1 } else { self.rows * self.groups }
    }

    /// Codes, scales and zero points with their types, by the ends of their names.
    pub(super) fn parts(&self) -> Vec<(&'static str, TensorType)> {
        let scales: Vec<usize> = match self.scheme.grain {
            Grain::Tensor => vec![1],
            _ => vec![self.rows, self.groups],
        };
        let codes = TensorType::new(Elem::Quant(self.spec), [self.rows, self.cols].as_slice());
        let mut parts = vec![
            ("weight.codes", codes),
            ("weight.scale", TensorType::new(self.spec.scale.elem(), scales.as_slice())),
        ];
        if self.spec.zero {
            parts.push(("weight.zero", TensorType::new(Elem::U8, scales.as_slice())));
        }
        parts
    }

    /// The tensor whose bytes are those of the codes, if there is one.
    pub(super) fn codes_as_stored(&self) -> Option<String> {
        // Rows of whole words: the words, which are little-endian, are the dense stream of bits.
        let whole = (usize::from(self.spec.bits) * self.cols).is_multiple_of(32);
        (self.scheme.storage == Storage::Packed && whole).then(|| self.tensor("weight_packed"))
    }

    /// The tensor whose bytes are those of the scales, if there is one.
    pub(super) fn scales_as_stored(&self) -> Option<String> {
        let products = self.scheme.storage == Storage::Ascend(Ascend::Static);
        (!self.has_qweight() && !products).then(|| self.tensor("weight_scale"))
    }

    /// Whether the layout is one of those that have `qweight`.
    pub(super) fn has_qweight(&self) -> bool {
        matches!(self.scheme.storage, Storage::Awq | Storage::Gptq { .. })
    }

    /// Whether a tensor of this name goes with codes that are called so, in the layout that the layer has.
    pub(super) fn has_beside(&self, name: &str, codes: &str) -> bool {
        match (self.scheme.storage, codes) {
            (Storage::Awq | Storage::Gptq { .. }, codes) => codes == "qweight",
            // What of them belongs to the type is seen when the layer is opened.
            (Storage::Ascend(_), codes) => {
                codes == "weight" || [".weight_scale", ".input_scale"].iter().any(|end| name.ends_with(end))
            }
            (Storage::Packed | Storage::Bytes, codes) => codes == "weight_packed",
        }
    }

    fn read_words(&self, files: &SafetensorsFolder, part: &str) -> Result<Vec<u32>, WeightError> {
        Ok(ints(files, &self.tensor(part))?.into_iter().map(|w| w as u32).collect())
    }

    /// The codes as dense rows of bits, as [`qrmc_ir::RawWeight`] says.
    pub(super) fn dense<'a>(&self, files: &'a SafetensorsFolder) -> Result<Cow<'a, [u8]>, WeightError> {
        if let Some(name) = self.codes_as_stored() {
            return Ok(files.raw(&name)?.bytes);
        }
        let bits = self.spec.bits;
        if matches!(self.scheme.storage, Storage::Gptq { .. })
            && (usize::from(bits) * self.cols).is_multiple_of(32)
        {
            let words = self.read_words(files, "qweight")?;
            let rows = words::transposed(&words, word_count(self.cols, bits), self.rows);
            return Ok(Cow::Owned(rows.into_iter().flat_map(u32::to_le_bytes).collect()));
        }
        let codes = self.codes(files)?;
        let mut out = Vec::with_capacity(self.rows * Elem::Quant(self.spec).row_bytes(self.cols));
        for row in codes.chunks(self.cols) {
            pack::pack_row(row.iter().copied(), bits, &mut out);
        }
        Ok(Cow::Owned(out))
    }

    /// The codes `[rows, cols]`, one in a byte; signed ones plus `2^(bits-1)`.
    pub(super) fn codes(&self, files: &SafetensorsFolder) -> Result<Vec<u8>, WeightError> {
        let (rows, cols, bits) = (self.rows, self.cols, self.spec.bits);
        Ok(match self.scheme.storage {
            Storage::Awq => {
                let mut codes = words::unpack_rows(&self.read_words(files, "qweight")?, rows, bits);
                words::from_awq_order(&mut codes);
                words::transposed(&codes, cols, rows)
            }
            Storage::Gptq { .. } => {
                let words = self.read_words(files, "qweight")?;
                words::unpack_rows(&words::transposed(&words, word_count(cols, bits), rows), cols, bits)
            }
            Storage::Packed => words::unpack_rows(&self.read_words(files, "weight_packed")?, cols, bits),
            Storage::Bytes | Storage::Ascend(_) => self.raised(files, "weight")?,
        })
    }

    /// The zero points, in the order of the scales and in the range of the codes.
    pub(super) fn zeros(&self, files: &SafetensorsFolder) -> Result<Vec<u8>, WeightError> {
        let (rows, groups, bits) = (self.rows, self.groups, self.spec.bits);
        Ok(match self.scheme.storage {
            Storage::Awq => {
                let mut zeros = words::unpack_rows(&self.read_words(files, "qzeros")?, rows, bits);
                words::from_awq_order(&mut zeros);
                words::transposed(&zeros, groups, rows)
            }
            Storage::Gptq { less_one } => {
                let mut words = self.read_words(files, "qzeros")?;
                if less_one {
                    words::plus_one(&mut words, rows, bits);
                }
                words::transposed(&words::unpack_rows(&words, rows, bits), groups, rows)
            }
            Storage::Packed => {
                let (rows, groups) = if self.scheme.grain == Grain::Tensor { (1, 1) } else { (rows, groups) };
                let words = self.read_words(files, "weight_zero_point")?;
                let words = words::transposed(&words, word_count(rows, bits), groups);
                words::transposed(&words::unpack_rows(&words, rows, bits), groups, rows)
            }
            Storage::Bytes | Storage::Ascend(_) => self.raised(files, "weight_zero_point")?,
        })
    }

    /// Signed bytes plus `2^(bits-1)`.
    fn raised(&self, files: &SafetensorsFolder, part: &str) -> Result<Vec<u8>, WeightError> {
        let name = self.tensor(part);
        let raw = files.raw(&name)?;
        let bits = self.spec.bits;
        let half = 1i16 << (bits - 1);
        let raise = |&b: &u8| i16::from(b as i8) + half;
        if let Some(at) = raw.bytes.iter().position(|b| !(0..2 * half).contains(&raise(b))) {
            let why = format!("element {at} is {}, which is no code of {bits} bits", raw.bytes[at] as i8);
            return Err(WeightError::new(
                name,
                format!("{why}; the checkpoint is damaged: download it again"),
            ));
        }
        Ok(raw.bytes.iter().map(|b| raise(b) as u8).collect())
    }

    /// The scales `[rows, groups]` in their stored type.
    pub(super) fn scales<'a>(&self, files: &'a SafetensorsFolder) -> Result<Cow<'a, [u8]>, WeightError> {
        if self.scheme.storage == Storage::Ascend(Ascend::Static) {
            return self.divided(files).map(Cow::Owned);
        }
        let stored = self.scales_as_stored();
        let name = stored.clone().unwrap_or_else(|| self.tensor("scales"));
        let bytes = files.raw(&name)?.bytes;
        let elem = self.spec.scale.elem();
        if let Some(at) = elem.find_non_finite(&bytes) {
            let why =
                format!("element {at} is NaN or infinite; the checkpoint is damaged: download it again");
            return Err(WeightError::new(name, why));
        }
        if stored.is_some() {
            return Ok(bytes);
        }
        let (rows, groups) = (self.rows, self.groups);
        Ok(Cow::Owned(match elem.bits() {
            16 => words::transposed(bytes.as_chunks::<2>().0, groups, rows).concat(),
            _ => words::transposed(bytes.as_chunks::<4>().0, groups, rows).concat(),
        }))
    }

    /// The weight `[rows, cols]` that the codes stand for, as little-endian `f32`: `scale * (code - zero)`, rounded once.
    pub(super) fn floats(&self, files: &SafetensorsFolder) -> Result<Vec<u8>, WeightError> {
        let codes = self.codes(files)?;
        let scales = qrmc_ir::Tensor::from_le_bytes(
            self.spec.scale.elem(),
            &[self.scale_count()],
            &self.scales(files)?,
        )
        .map_err(|why| WeightError::new(&self.name, why))?;
        let scales = scales.as_f32().unwrap_or_default();
        let zeros = match self.spec.zero {
            true => self.zeros(files)?,
            false => vec![1 << (self.spec.bits - 1); self.scale_count()],
        };
        let each = (self.cols / self.groups).max(1);
        let mut out = Vec::with_capacity(codes.len() * 4);
        for (row, codes) in codes.chunks(self.cols.max(1)).enumerate() {
            for (col, &code) in codes.iter().enumerate() {
                let group = self.order.as_ref().map_or(col / each, |o| o[col]);
                let at = if self.scheme.grain == Grain::Tensor { 0 } else { row * self.groups + group };
                let q = QParam { scale: scales[at], zero: i32::from(zeros[at]) };
                out.extend_from_slice(&grid::dequantize(i32::from(code), q).to_le_bytes());
            }
        }
        Ok(out)
    }
}
