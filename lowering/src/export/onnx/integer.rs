//! Products of codes with codes: sums of whole numbers, which no order of additions changes.

use onnx_protobuf::tensor_proto::DataType;
use qrmc_ir::{Grain, QuantSpec};

use super::stored::Packed;
use super::walk::{Coded, Walk};
use super::{FLOAT, OnnxError};

/// Columns whose products with bytes on both sides a 32-bit integer holds: `2^31 / 255^2`.
const MOST: usize = 33_025;

/// Whether the codes of a matrix are multiplied as they are.
///
/// Codes of up to 4 bits stay packed, for `MatMulNBits`.
fn fits(x: QuantSpec, w: QuantSpec, cols: usize) -> bool {
    let rows = matches!(w.grain, Grain::Row | Grain::Tensor);
    rows && w.bits > 4 && !x.signed && x.zero && x.grain == Grain::Token && cols <= MOST
}

impl Walk<'_> {
    /// `x wᵀ = scale_x scale_w ((codes_x - zero_x) (codes_w - zero_w)ᵀ)`, or `None` if the schemes do not fit.
    ///
    /// Both sides are unsigned bytes: onnxruntime's products of unsigned with signed bytes saturate on machines without
    /// VNNI.
    pub(super) fn integer_product(&mut self, x: &Coded, p: Packed) -> Result<Option<String>, OnnxError> {
        let (spec, rows, cols) = self.weights.scheme(p)?;
        let Some(zero) = x.zero.as_deref().filter(|_| fits(x.spec, spec, cols)) else { return Ok(None) };
        let (codes, zero) = self.integers(x, zero);
        let w = self.weights.bytes_transposed(&mut self.g, p)?;
        let zeros = match self.weights.zeros(p)? {
            Some(z) => z,
            None => vec![spec.qmin().unsigned_abs() as u8],
        };
        let one = zeros.len() == 1;
        let name = format!("{}.zeros", self.weights.name(p.codes));
        let dims: &[i64] = if one { &[] } else { &[rows as i64] };
        let zeros = self.g.initializer(&name, DataType::UINT8, dims, &zeros)?;
        let sums = self.weights.row_sums(&mut self.g, p)?;
        let bytes: Vec<u8> = self.weights.scales(p)?.iter().flat_map(|s| s.to_le_bytes()).collect();
        let name = self.weights.name(p.scale);
        let scale = self.g.initializer(name, FLOAT, &[bytes.len() as i64 / 4], &bytes)?;
        let g = &mut self.g;
        let product = g.op("MatMulInteger", &[&codes, &w, "", &zeros]);
        let shift = g.op("Mul", &[&zero, &sums]);
        let whole = g.op("Sub", &[&product, &shift]);
        let y = g.cast(&whole, FLOAT);
        let y = g.op("Mul", &[&y, &x.scale]);
        Ok(Some(g.op("Mul", &[&y, &scale])))
    }

    /// Codes as bytes, and zero points as 32-bit integers, once for all products.
    fn integers(&mut self, x: &Coded, zero: &str) -> (String, String) {
        if let Some(both) = self.shared.integers.get(x) {
            return both.clone();
        }
        let codes = self.g.cast(&x.codes, DataType::UINT8);
        let zero = self.g.cast(zero, DataType::INT32);
        self.g.pin(&codes);
        self.g.pin(&zero);
        self.shared.integers.insert(x.clone(), (codes.clone(), zero.clone()));
        (codes, zero)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_rows_are_multiplied() {
        let x = QuantSpec::asym(8, Grain::Token);
        assert!(fits(x, QuantSpec::sym(8, Grain::Row), 4096));
        assert!(fits(QuantSpec::asym(4, Grain::Token), QuantSpec::asym(6, Grain::Tensor), MOST));
        assert!(!fits(x, QuantSpec::sym(4, Grain::Row), 4096));
        assert!(!fits(x, QuantSpec::sym(8, Grain::Group(64)), 4096));
        assert!(!fits(x, QuantSpec::sym(8, Grain::Row), MOST + 1));
        assert!(!fits(QuantSpec::asym(8, Grain::Group(64)), QuantSpec::sym(8, Grain::Row), 4096));
        assert!((MOST as i64) * 255 * 255 < 1 << 31 && (MOST as i64 + 1) * 255 * 255 >= 1 << 31);
    }
}
