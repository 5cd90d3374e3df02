//! Weights as initializers: the stored codes, scales and zero points, never rounded again.

use std::collections::HashMap;

use onnx_protobuf::tensor_proto::DataType;
use qrmc_ir::{Diag, Elem, Grain, Module, QuantSpec, RawWeight, Tensor, WeightId, WeightSource, pack};

use super::OnnxError;
use super::graph::Graph;
use super::proto::int;

/// Codes, scales and zero points that are weights: what `dcast` reads.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Packed {
    pub(super) codes: WeightId,
    pub(super) scale: WeightId,
    pub(super) zero: Option<WeightId>,
}

/// What a weight was written as.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Made {
    /// An initializer in its stored type.
    Stored(WeightId),
    /// Floats, or bytes that stand for whole numbers, as `f32`.
    Float(WeightId),
    FloatTransposed(WeightId),
    /// Codes as bytes, the least code 0, transposed.
    Bytes(Packed),
    /// For each row of codes, the sum of what is left without the zero point.
    Sums(Packed),
    Dequantized(Packed),
    DequantizedTransposed(Packed),
}

/// The weights of a module, each written when it is first needed.
pub(super) struct Weights<'a> {
    module: &'a Module,
    source: &'a dyn WeightSource,
    made: HashMap<Made, String>,
}

impl<'a> Weights<'a> {
    pub(super) fn new(module: &'a Module, source: &'a dyn WeightSource) -> Self {
        Weights { module, source, made: HashMap::new() }
    }

    pub(super) fn name(&self, id: WeightId) -> &'a str {
        &self.module.weight(id).name
    }

    pub(super) fn elem(&self, id: WeightId) -> Elem {
        self.module.weight(id).ty.elem
    }

    /// The sizes of a weight.
    pub(super) fn sizes(&self, id: WeightId) -> Result<Vec<usize>, OnnxError> {
        let w = self.module.weight(id);
        w.ty.shape.as_fixed().ok_or_else(|| self.fault(id, "its shape is not fixed"))
    }

    fn fault(&self, id: WeightId, why: &str) -> OnnxError {
        OnnxError::Weight(qrmc_ir::WeightError::new(self.name(id), why))
    }

    /// The stored bytes, of the declared type and length.
    pub(super) fn raw(&self, id: WeightId) -> Result<RawWeight<'a>, OnnxError> {
        let w = self.module.weight(id);
        let raw = self.source.raw(&w.name)?;
        if raw.ty != w.ty || w.ty.bytes() != Some(raw.bytes.len()) {
            let why = format!("{} bytes of type {} do not hold {}", raw.bytes.len(), raw.ty, w.ty);
            return Err(self.fault(id, &why));
        }
        Ok(raw)
    }

    /// The scheme of codes, and rows and columns of their matrix.
    pub(super) fn scheme(&self, p: Packed) -> Result<(QuantSpec, usize, usize), OnnxError> {
        match (self.elem(p.codes), &self.sizes(p.codes)?[..]) {
            (Elem::Quant(spec), &[rows, cols]) => Ok((spec, rows, cols)),
            (elem, sizes) => {
                let what = format!("@{} is {elem}{sizes:?}", self.name(p.codes));
                Err(Diag::new("Q0501", what).hint("only matrices of codes are exported").into())
            }
        }
    }

    /// Scales as `f32`, which holds every stored scale exactly.
    pub(super) fn scales(&self, p: Packed) -> Result<Vec<f32>, OnnxError> {
        let (raw, sizes) = (self.raw(p.scale)?, self.sizes(p.scale)?);
        let t = Tensor::from_le_bytes(raw.ty.elem, &sizes, &raw.bytes);
        let t = t.map_err(|why| self.fault(p.scale, &why))?;
        Ok(t.as_f32().ok_or_else(|| self.fault(p.scale, "scales are not floats"))?.to_vec())
    }

    /// Zero points, a byte each.
    pub(super) fn zeros(&self, p: Packed) -> Result<Option<Vec<u8>>, OnnxError> {
        p.zero.map(|z| Ok(self.raw(z)?.bytes.into_owned())).transpose()
    }

    /// Gives back what was mapped for a quantized weight.
    pub(super) fn release(&self, p: Packed) {
        [Some(p.codes), Some(p.scale), p.zero]
            .into_iter()
            .flatten()
            .for_each(|w| self.source.release(self.name(w)));
    }

    fn once(
        &mut self,
        g: &mut Graph,
        key: Made,
        make: impl FnOnce(&mut Self, &mut Graph) -> Result<String, OnnxError>,
    ) -> Result<String, OnnxError> {
        if let Some(name) = self.made.get(&key) {
            return Ok(name.clone());
        }
        let name = make(self, g)?;
        match key {
            Made::Stored(w) | Made::Float(w) | Made::FloatTransposed(w) => self.source.release(self.name(w)),
            Made::Bytes(p) | Made::Sums(p) | Made::Dequantized(p) | Made::DequantizedTransposed(p) => {
                self.release(p);
            }
        }
        g.pin(&name);
        self.made.insert(key, name.clone());
        Ok(name)
    }

    /// A weight that is no codes, in its stored type.
    pub(super) fn stored(&mut self, g: &mut Graph, id: WeightId) -> Result<String, OnnxError> {
        self.once(g, Made::Stored(id), |w, g| {
            let raw = w.raw(id)?;
            let ty = plain_type(raw.ty.elem).ok_or_else(|| {
                let d = Diag::new("Q0501", format!("@{} is {}", w.name(id), raw.ty));
                d.hint("codes are read by `dcast` alone")
            })?;
            let dims: Vec<i64> = w.sizes(id)?.iter().map(|&n| n as i64).collect();
            Ok(g.initializer(w.name(id), ty, &dims, &raw.bytes)?)
        })
    }

    /// A weight as `f32`.
    pub(super) fn float(&mut self, g: &mut Graph, id: WeightId) -> Result<String, OnnxError> {
        let name = self.stored(g, id)?;
        if self.elem(id) == Elem::F32 {
            return Ok(name);
        }
        self.once(g, Made::Float(id), |_, g| Ok(g.cast(&name, DataType::FLOAT)))
    }

    /// The transpose of a matrix as `f32`.
    pub(super) fn float_transposed(&mut self, g: &mut Graph, id: WeightId) -> Result<String, OnnxError> {
        let name = self.float(g, id)?;
        self.once(g, Made::FloatTransposed(id), |_, g| Ok(g.transpose(&name, &[1, 0])))
    }

    /// A quantized matrix through `DequantizeLinear`.
    pub(super) fn dequantized(&mut self, g: &mut Graph, p: Packed) -> Result<String, OnnxError> {
        self.once(g, Made::Dequantized(p), |w, g| w.dequantize(g, p))
    }

    /// Its transpose.
    pub(super) fn dequantized_transposed(&mut self, g: &mut Graph, p: Packed) -> Result<String, OnnxError> {
        let name = self.dequantized(g, p)?;
        self.once(g, Made::DequantizedTransposed(p), |_, g| Ok(g.transpose(&name, &[1, 0])))
    }

    /// Codes as they are stored, a byte each, `[cols, rows]`.
    pub(super) fn bytes_transposed(&mut self, g: &mut Graph, p: Packed) -> Result<String, OnnxError> {
        self.once(g, Made::Bytes(p), |w, g| {
            let (spec, rows, cols) = w.scheme(p)?;
            let bytes: Vec<u8> = {
                let raw = w.raw(p.codes)?;
                let add = spec.qmin().unsigned_abs() as u8;
                (0..rows).flat_map(|r| row(&raw.bytes, spec, r, cols)).map(|c| c.wrapping_add(add)).collect()
            };
            let dims = [rows as i64, cols as i64];
            let codes = g.initializer(w.name(p.codes), DataType::UINT8, &dims, &bytes)?;
            Ok(g.transpose(&codes, &[1, 0]))
        })
    }

    /// `sum(code - zero)` of each row, `i32`.
    pub(super) fn row_sums(&mut self, g: &mut Graph, p: Packed) -> Result<String, OnnxError> {
        self.once(g, Made::Sums(p), |w, g| {
            let (spec, rows, cols) = w.scheme(p)?;
            let (raw, zeros) = (w.raw(p.codes)?, w.zeros(p)?);
            let value = |c: u8| if spec.signed { i32::from(c as i8) } else { i32::from(c) };
            let sum = |r: usize| {
                let zero = zeros.as_ref().map_or(0, |z| i32::from(z[if z.len() == 1 { 0 } else { r }]));
                row(&raw.bytes, spec, r, cols).into_iter().map(|c| value(c) - zero).sum::<i32>()
            };
            let bytes: Vec<u8> = (0..rows).flat_map(|r| sum(r).to_le_bytes()).collect();
            Ok(g.initializer(&format!("{}.sums", w.name(p.codes)), DataType::INT32, &[rows as i64], &bytes)?)
        })
    }

    fn dequantize(&mut self, g: &mut Graph, p: Packed) -> Result<String, OnnxError> {
        let (spec, rows, cols) = self.scheme(p)?;
        let ty = code_type(spec);
        let blocks = |n: usize| {
            let dims = vec![rows as i64, (cols / n.max(1)) as i64];
            (dims, vec![int("axis", 1), int("block_size", n as i64)])
        };
        let (dims, attributes): (Vec<i64>, _) = match spec.grain {
            Grain::Tensor => (vec![], vec![]),
            Grain::Channel => (vec![cols as i64], vec![int("axis", 1)]),
            // A row is one block. With a vector of scales, onnxruntime makes `MatMulNBits` of 8-bit codes, which by its
            // default rounds the activations to 8 bits.
            Grain::Row => blocks(cols),
            Grain::Group(n) => blocks(n as usize),
            Grain::Token => {
                let what = format!("@{} is {spec}: scales of tokens are no weights", self.name(p.codes));
                return Err(Diag::new("Q0501", what).into());
            }
        };
        let codes = {
            let raw = self.raw(p.codes)?;
            let all = (0..rows).flat_map(|r| row(&raw.bytes, spec, r, cols));
            g.initializer(self.name(p.codes), ty, &[rows as i64, cols as i64], &nibbles_or_bytes(ty, all))?
        };
        let bytes: Vec<u8> = self.scales(p)?.iter().flat_map(|s| s.to_le_bytes()).collect();
        let scale = g.initializer(self.name(p.scale), DataType::FLOAT, &dims, &bytes)?;
        let mut inputs = vec![codes.as_str(), &scale];
        let zero = match (self.zeros(p)?, p.zero) {
            (Some(zeros), Some(id)) => {
                let bytes = nibbles_or_bytes(ty, zeros.into_iter());
                Some(g.initializer(self.name(id), ty, &dims, &bytes)?)
            }
            _ => None,
        };
        inputs.extend(zero.as_deref());
        Ok(g.op_with("DequantizeLinear", &inputs, attributes))
    }
}

/// The type of an initializer that holds the stored bytes of a plain type.
fn plain_type(elem: Elem) -> Option<DataType> {
    match elem {
        Elem::F32 => Some(DataType::FLOAT),
        Elem::F16 => Some(DataType::FLOAT16),
        Elem::BF16 => Some(DataType::BFLOAT16),
        Elem::I32 => Some(DataType::INT32),
        Elem::I8 => Some(DataType::INT8),
        Elem::U8 => Some(DataType::UINT8),
        Elem::F64 | Elem::Quant(_) => None,
    }
}

/// The least type that holds the codes of a scheme.
fn code_type(spec: QuantSpec) -> DataType {
    match (spec.bits <= 4, spec.signed) {
        (true, true) => DataType::INT4,
        (true, false) => DataType::UINT4,
        (false, true) => DataType::INT8,
        (false, false) => DataType::UINT8,
    }
}

/// The codes of one row in two's complement.
fn row(bytes: &[u8], spec: QuantSpec, r: usize, cols: usize) -> Vec<u8> {
    let stride = Elem::Quant(spec).row_bytes(cols);
    let offset = spec.qmin() as u8;
    let mut out = Vec::with_capacity(cols);
    pack::unpack_row(&bytes[r * stride..(r + 1) * stride], spec.bits, cols, |c| {
        out.push(c.wrapping_add(offset));
    });
    out
}

/// The raw data of an initializer: two 4-bit integers to a byte, the first in the low half, or bytes as they are.
fn nibbles_or_bytes(ty: DataType, codes: impl Iterator<Item = u8>) -> Vec<u8> {
    if !matches!(ty, DataType::INT4 | DataType::UINT4) {
        return codes.collect();
    }
    let mut out = Vec::new();
    pack::pack_row(codes.map(|c| c & 0xF), 4, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrmc_ir::{Data, Tensor};

    #[test]
    fn codes_keep_their_values_in_wider_types() {
        for bits in 2..=8u8 {
            for spec in [QuantSpec::asym(bits, Grain::Row), QuantSpec::sym(bits, Grain::Row)] {
                let cols = 11;
                let all: Vec<i32> = (0..cols).map(|i| spec.qmin() + (i * 5) % (1 << bits)).collect();
                let data = match spec.signed {
                    true => Data::I8(all.iter().map(|&c| c as i8).collect()),
                    false => Data::U8(all.iter().map(|&c| c as u8).collect()),
                };
                let packed = pack::pack(&Tensor::new([1, cols as usize], data), spec).unwrap();
                let back = row(&packed, spec, 0, cols as usize);
                let value = |c: u8| if spec.signed { i32::from(c as i8) } else { i32::from(c) };
                assert_eq!(back.into_iter().map(value).collect::<Vec<_>>(), all, "{spec}");
            }
        }
    }

    // onnx.proto: INT4 and UINT4 pack two elements to a byte, the first in the 4 least significant bits, over the
    // whole tensor, whatever its rows.
    #[test]
    fn nibbles_go_over_the_ends_of_rows() {
        let spec = QuantSpec::sym(3, Grain::Row);
        let t = Tensor::new([2, 3], Data::I8(vec![-4, 3, -1, 0, 1, 2]));
        let packed = pack::pack(&t, spec).unwrap();
        let all = (0..2).flat_map(|r| row(&packed, spec, r, 3));
        assert_eq!(nibbles_or_bytes(DataType::INT4, all), [0x3C, 0x0F, 0x21]);
    }
}
