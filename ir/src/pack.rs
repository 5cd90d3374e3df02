//! The canonical dense storage of codes: see [`crate::RawWeight`].

use crate::quant::QuantSpec;
use crate::tensor::{Data, Tensor};

/// Packs one row of unsigned codes, least significant bit first; appends `ceil(bits * n / 8)` bytes.
pub fn pack_row(codes: impl Iterator<Item = u8>, bits: u8, out: &mut Vec<u8>) {
    let (mut word, mut have) = (0u32, 0u32);
    for code in codes {
        word |= u32::from(code) << have;
        have += u32::from(bits);
        while have >= 8 {
            out.push(word as u8);
            word >>= 8;
            have -= 8;
        }
    }
    if have > 0 {
        out.push(word as u8);
    }
}

/// Unpacks `n` unsigned codes of one row.
pub fn unpack_row(bytes: &[u8], bits: u8, n: usize, mut put: impl FnMut(u8)) {
    let mask = (1u32 << bits) - 1;
    let (mut word, mut have, mut next) = (0u32, 0u32, 0usize);
    for _ in 0..n {
        while have < u32::from(bits) {
            word |= u32::from(bytes[next]) << have;
            next += 1;
            have += 8;
        }
        put((word & mask) as u8);
        word >>= bits;
        have -= u32::from(bits);
    }
}

/// Dense storage of a tensor of codes.
///
/// # Errors
/// A sentence, if the tensor holds no codes of this scheme.
pub fn pack(codes: &Tensor, spec: QuantSpec) -> Result<Vec<u8>, String> {
    let cols = codes.shape().last().copied().unwrap_or(1).max(1);
    let mut out = Vec::with_capacity(codes.len() / cols * crate::Elem::Quant(spec).row_bytes(cols));
    let offset = spec.qmin();
    match codes.data() {
        Data::U8(v) if !spec.signed => {
            v.chunks(cols).for_each(|r| pack_row(r.iter().copied(), spec.bits, &mut out))
        }
        Data::I8(v) if spec.signed => v
            .chunks(cols)
            .for_each(|r| pack_row(r.iter().map(|&q| (i32::from(q) - offset) as u8), spec.bits, &mut out)),
        _ => return Err(format!("a {} tensor holds no codes of {spec}", codes.elem())),
    }
    Ok(out)
}

/// One code an element from dense storage.
///
/// # Errors
/// A sentence, if the number of bytes does not fit.
pub fn unpack(bytes: &[u8], spec: QuantSpec, shape: &[usize]) -> Result<Tensor, String> {
    let cols = shape.last().copied().unwrap_or(1);
    let rows: usize = shape.iter().rev().skip(1).product();
    let stride = crate::Elem::Quant(spec).row_bytes(cols);
    if bytes.len() != rows * stride {
        return Err(format!("{} bytes do not hold {rows} rows of {cols} codes of {spec}", bytes.len()));
    }
    let rows = (0..rows).map(|r| &bytes[r * stride..(r + 1) * stride]);
    let data = if spec.signed {
        let mut v = Vec::with_capacity(shape.iter().product());
        rows.for_each(|r| unpack_row(r, spec.bits, cols, |q| v.push((i32::from(q) + spec.qmin()) as i8)));
        Data::I8(v)
    } else {
        let mut v = Vec::with_capacity(shape.iter().product());
        rows.for_each(|r| unpack_row(r, spec.bits, cols, |q| v.push(q)));
        Data::U8(v)
    };
    Ok(Tensor::new(shape, data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Grain;

    #[test]
    fn every_width_round_trips() {
        for bits in 2..=8u8 {
            for cols in [1usize, 3, 8, 13] {
                for spec in [QuantSpec::asym(bits, Grain::Row), QuantSpec::sym(bits, Grain::Row)] {
                    let span = 1usize << bits;
                    let n = 2 * cols;
                    let data = if spec.signed {
                        Data::I8((0..n).map(|i| ((i * 7 % span) as i32 + spec.qmin()) as i8).collect())
                    } else {
                        Data::U8((0..n).map(|i| (i * 7 % span) as u8).collect())
                    };
                    let t = Tensor::new([2, cols], data);
                    let bytes = pack(&t, spec).unwrap();
                    assert_eq!(bytes.len(), 2 * (cols * bits as usize).div_ceil(8));
                    assert_eq!(unpack(&bytes, spec, &[2, cols]).unwrap(), t);
                }
            }
        }
    }

    #[test]
    fn three_bit_words_are_dense() {
        // methods.md §10.4: codes -4..3 give the low 24 bits 0xFAC688.
        let t = Tensor::new([1, 8], Data::I8((-4..4).collect()));
        let bytes = pack(&t, QuantSpec::sym(3, Grain::Row)).unwrap();
        assert_eq!(bytes, [0x88, 0xC6, 0xFA]);
    }
}
