//! One matrix with codes: what it holds, in the units in which every format writes it.

use std::ops::Range;

use qrmc_ir::{Elem, Grain, QuantSpec, Rule, ScaleType, Tensor, WeightSource, grid, pack, words};

use super::ExportError;

/// Rows that are in memory at once.
const ROWS: usize = 1024;

/// Names of the parts of a quantized weight, and its scheme.
#[derive(Clone, Debug)]
pub struct Codes {
    /// The scheme of `[rows, cols]`.
    pub spec: QuantSpec,
    /// Stored name of the codes.
    pub codes: String,
    /// Of the scales.
    pub scale: String,
    /// Of the zero points, where the scheme has them.
    pub zero: Option<String>,
}

/// A factor of one end of the range of rounding.
#[derive(Clone, PartialEq, Debug)]
pub enum Bound {
    /// Stored under this name: a method has learned it.
    Stored(String),
    /// Numbers of the graph; none where they are computed while it runs.
    Given(Vec<f64>),
}

impl Bound {
    /// The factors.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn values(&self, src: &dyn WeightSource) -> Result<Vec<f32>, ExportError> {
        match self {
            Bound::Given(numbers) => Ok(numbers.iter().map(|&x| x as f32).collect()),
            Bound::Stored(name) => {
                let t = src.read(name)?;
                let v = t.as_f32().map(<[f32]>::to_vec);
                v.ok_or_else(|| ExportError::fault(format!("`{name}` holds no floats")))
            }
        }
    }
}

/// What is done to a value before it is used.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Rounding {
    /// How it is rounded, if it is.
    pub spec: Option<QuantSpec>,
    /// Stored name of the scales, where these were calibrated; they are computed from the value otherwise.
    pub scale: Option<String>,
    /// Stored name of the zero points that go with them, where the scheme has some.
    pub zero: Option<String>,
    /// Factors of the range of rounding, upper before lower, where it has some.
    pub bounds: Vec<Bound>,
    /// Small matrices that it is multiplied by before, last first: stored name, and elements inside the multiplied axis.
    pub matrices: Vec<(String, u64)>,
}

impl Rounding {
    /// The calibrated scales.
    ///
    /// # Errors
    /// If there are none, or they cannot be read.
    pub(super) fn scales(&self, src: &dyn WeightSource) -> Result<Vec<f32>, ExportError> {
        let name = self.scale.as_deref().ok_or_else(|| ExportError::fault("scales that are not stored"))?;
        let t = src.read(name)?;
        let v = t.as_f32().map(<[f32]>::to_vec);
        v.ok_or_else(|| ExportError::fault(format!("`{name}` holds no floats")))
    }

    /// The calibrated zero points, as they are stored.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(super) fn zeros(&self, src: &dyn WeightSource) -> Result<Vec<u8>, ExportError> {
        let stored = self.zero.as_ref().map(|name| src.raw(name)).transpose()?;
        Ok(stored.map(|raw| raw.bytes.into_owned()).unwrap_or_default())
    }

    /// The scheme, if it is codes with one calibrated scale for the whole tensor, of a value that is as it was: signed ones,
    /// or ones with a zero point.
    pub(super) fn one_scale(&self) -> Option<QuantSpec> {
        let plain = self.scale.is_some() && self.matrices.is_empty();
        self.spec.filter(|x| plain && x.grain == Grain::Tensor && x.signed != x.zero)
    }
}

/// A linear layer with codes.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Module name, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Parts of the weight.
    pub codes: Codes,
    /// The scheme that it is rounded to anew, where what is stored does not fit.
    pub target: Option<QuantSpec>,
    /// What is done to its input.
    pub input: Rounding,
}

/// Codes, scales and zero points of some rows: `value = scale * (code - zero)`.
#[derive(Clone, PartialEq, Debug)]
pub struct Parts {
    /// `[rows, cols]`, one a byte; signed ones plus `2^(b-1)`, so that every code is in `0 ..= 2^b - 1`.
    pub codes: Vec<u8>,
    /// `[rows, groups]`.
    pub scales: Vec<f32>,
    /// `[rows, groups]`, in the units of the codes; `2^(b-1)` everywhere for signed codes.
    pub zeros: Vec<u8>,
}

impl Linear {
    /// Its rows, as many at a time as are in memory at once.
    pub fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.rows;
        (0..rows).step_by(ROWS).map(move |from| from..rows.min(from + ROWS))
    }

    /// The scheme in which it is written.
    pub fn spec(&self) -> QuantSpec {
        self.target.unwrap_or(self.codes.spec)
    }

    /// Bits of a code.
    pub fn bits(&self) -> u8 {
        self.spec().bits
    }

    /// Inputs that share a scale.
    pub fn group(&self) -> usize {
        group(self.spec(), self.cols)
    }

    /// Scales of a row.
    pub fn groups(&self) -> usize {
        self.cols / self.group()
    }

    /// That the range of its input is clipped, if it is: for formats that have no place for it.
    pub(super) fn clipped(&self) -> Option<String> {
        let factor = |b: &Bound| match b {
            Bound::Given(v) if v.len() == 1 => format!("to {}", v[0]),
            _ => "by learned factors".to_owned(),
        };
        let first = self.input.bounds.first()?;
        Some(format!("{}: its input has a clip of its range, {}", self.name, factor(first)))
    }

    /// Whether every zero point is the middle of the codes: what other formats call symmetric.
    pub fn symmetric(&self) -> bool {
        self.spec().signed && !self.spec().zero
    }

    /// The scheme for which codes are chosen anew, if they are.
    fn anew(&self) -> Option<QuantSpec> {
        self.target.filter(|t| QuantSpec { scale: self.codes.spec.scale, ..*t } != self.codes.spec)
    }

    /// Codes of some rows, as in [`Parts`].
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn codes(&self, src: &dyn WeightSource, rows: Range<usize>) -> Result<Vec<u8>, ExportError> {
        match self.anew() {
            Some(target) => Ok(self.rounded(src, target, rows)?.codes),
            None => self.stored_codes(src, rows),
        }
    }

    /// Scales of all rows, as in [`Parts`].
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn scales(&self, src: &dyn WeightSource) -> Result<Vec<f32>, ExportError> {
        if let Some(target) = self.anew() {
            let parts = self.blocks().map(|rows| Ok(self.rounded(src, target, rows)?.scales));
            return Ok(parts.collect::<Result<Vec<_>, ExportError>>()?.concat());
        }
        let stored = self.stored_scales(src, 0..self.rows)?;
        // Codes may be kept where the type of the scales alone is another one.
        Ok(stored.into_iter().map(|s| self.spec().scale.round(s)).collect())
    }

    /// Zero points of all rows, as in [`Parts`].
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn zeros(&self, src: &dyn WeightSource) -> Result<Vec<u8>, ExportError> {
        match self.anew() {
            Some(target) => {
                let parts = self.blocks().map(|rows| Ok(self.rounded(src, target, rows)?.zeros));
                Ok(parts.collect::<Result<Vec<_>, ExportError>>()?.concat())
            }
            None => self.stored_zeros(src, 0..self.rows),
        }
    }

    /// Codes of some rows, each row packed into words of `bits` bits a code: `[rows, word_count(cols)]`.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn words(
        &self,
        src: &dyn WeightSource,
        rows: Range<usize>,
        bits: u8,
    ) -> Result<Vec<u32>, ExportError> {
        let whole = (self.cols * usize::from(bits)).is_multiple_of(32);
        if self.anew().is_some() || bits != self.codes.spec.bits || !whole {
            return Ok(words::pack_rows(&self.codes(src, rows)?, self.cols, bits));
        }
        // The dense storage of a row is these words.
        let raw = src.raw(&self.codes.codes)?;
        let each = self.cols * usize::from(bits) / 8;
        let bytes = raw.bytes[rows.start * each..rows.end * each].as_chunks::<4>().0;
        Ok(bytes.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }

    fn stored_codes(&self, src: &dyn WeightSource, rows: Range<usize>) -> Result<Vec<u8>, ExportError> {
        let raw = src.raw(&self.codes.codes)?;
        let each = Elem::Quant(self.codes.spec).row_bytes(self.cols);
        let mut out = Vec::with_capacity(rows.len() * self.cols);
        for row in raw.bytes[rows.start * each..rows.end * each].chunks_exact(each.max(1)) {
            pack::unpack_row(row, self.codes.spec.bits, self.cols, |q| out.push(q));
        }
        Ok(out)
    }

    fn stored_scales(&self, src: &dyn WeightSource, rows: Range<usize>) -> Result<Vec<f32>, ExportError> {
        let raw = src.raw(&self.codes.scale)?;
        let size = raw.ty.elem.bits() / 8;
        let (bytes, n) = self.part(&raw.bytes, size, &rows);
        let t = Tensor::from_le_bytes(raw.ty.elem, &[n], bytes).map_err(ExportError::fault)?;
        let v = t.as_f32();
        let v = v.ok_or_else(|| ExportError::fault(format!("`{}` holds no floats", self.codes.scale)))?;
        Ok(self.spread(v, rows))
    }

    fn stored_zeros(&self, src: &dyn WeightSource, rows: Range<usize>) -> Result<Vec<u8>, ExportError> {
        let spec = self.codes.spec;
        let Some(zero) = &self.codes.zero else {
            let middle = if spec.signed { 1u8 << (spec.bits - 1) } else { 0 };
            return Ok(vec![middle; rows.len() * (self.cols / group(spec, self.cols))]);
        };
        let raw = src.raw(zero)?;
        Ok(self.spread(self.part(&raw.bytes, 1, &rows).0, rows))
    }

    /// The bytes of one value of `size` bytes for each group of some rows, or the one of the tensor; and how many values.
    fn part<'b>(&self, bytes: &'b [u8], size: usize, rows: &Range<usize>) -> (&'b [u8], usize) {
        let spec = self.codes.spec;
        let groups = self.cols / group(spec, self.cols);
        let at = if spec.grain == Grain::Tensor { 0..1 } else { rows.start * groups..rows.end * groups };
        (&bytes[at.start * size..at.end * size], at.len())
    }

    /// A value of each group of each of some rows, from these or the one of the tensor.
    fn spread<T: Copy>(&self, v: &[T], rows: Range<usize>) -> Vec<T> {
        match self.codes.spec.grain {
            Grain::Tensor => vec![v[0]; rows.len()],
            _ => v.to_vec(),
        }
    }

    /// Values of some rows as the artefact has them: `scale * (code - zero)`, rounded once.
    ///
    /// # Errors
    /// If a part cannot be read.
    pub fn values(&self, src: &dyn WeightSource, rows: Range<usize>) -> Result<Vec<f32>, ExportError> {
        let (scales, zeros) = (self.stored_scales(src, rows.clone())?, self.stored_zeros(src, rows.clone())?);
        Ok(values(&self.stored_codes(src, rows)?, &scales, &zeros, group(self.codes.spec, self.cols)))
    }

    /// Some rows, rounded to another scheme.
    fn rounded(
        &self,
        src: &dyn WeightSource,
        to: QuantSpec,
        rows: Range<usize>,
    ) -> Result<Parts, ExportError> {
        let values = self.values(src, rows)?;
        let mut out =
            Parts { codes: Vec::with_capacity(values.len()), scales: Vec::new(), zeros: Vec::new() };
        let middle = -to.qmin();
        for run in values.chunks(group(to, self.cols)) {
            let p = grid::qparam(run, to, Rule::MinMax);
            out.codes.extend(run.iter().map(|&x| (grid::quantize(x, p, to) + middle) as u8));
            out.scales.push(p.scale);
            out.zeros.push((p.zero + middle) as u8);
        }
        Ok(out)
    }

    /// How far what is written is from what is stored, relative to what is stored: root mean squares. 0 where codes and
    /// scales are the stored ones.
    ///
    /// # Errors
    /// If a part cannot be read.
    pub fn loss(&self, src: &dyn WeightSource) -> Result<f64, ExportError> {
        if self.target.is_none() {
            return Ok(0.0);
        }
        let (scales, zeros) = (self.scales(src)?, self.zeros(src)?);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let (mut error, mut size) = (0.0, 0.0);
        for rows in self.blocks() {
            let from = rows.start * self.groups();
            let have = self.values(src, rows.clone())?;
            let made = values(&self.codes(src, rows)?, &scales[from..], &zeros[from..], self.group());
            error += have.iter().zip(&made).map(|(&a, &b)| square(a - b)).sum::<f64>();
            size += have.iter().map(|&a| square(a)).sum::<f64>();
        }
        Ok(if size > 0.0 { (error / size).sqrt() } else { 0.0 })
    }

    /// Refuses scales that a type of float cannot hold as they are.
    ///
    /// # Errors
    /// The first such scale, and what to do.
    pub fn scales_fit(&self, src: &dyn WeightSource, ty: ScaleType, format: &str) -> Result<(), ExportError> {
        let scales = self.scales(src)?;
        let Some(at) = scales.iter().position(|&s| ty.round(s) != s) else { return Ok(()) };
        Err(ExportError::illegal(format!(
            "{}: scale {:e} of row {} is {}, and {format} files hold {ty}, which would change it",
            self.name,
            scales[at],
            at / self.groups(),
            self.spec().scale
        ))
        .hint(format!(
            "compile with scale={ty}: codes are then chosen for scales that fit; or give --requantize, which rounds \
             the scales and says what is lost"
        )))
    }
}

fn group(spec: QuantSpec, cols: usize) -> usize {
    match spec.grain {
        Grain::Group(g) => g as usize,
        _ => cols,
    }
    .max(1)
}

/// `scale * (code - zero)` of whole groups.
fn values(codes: &[u8], scales: &[f32], zeros: &[u8], group: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(codes.len());
    for (run, (&scale, &zero)) in codes.chunks(group).zip(scales.iter().zip(zeros)) {
        let p = grid::QParam { scale, zero: i32::from(zero) };
        out.extend(run.iter().map(|&q| grid::dequantize(i32::from(q), p)));
    }
    out
}
