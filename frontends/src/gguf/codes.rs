//! Blocks of ggml as codes, scales and zero points, where they are of the form `scale * (code - zero)`.

use qrmc_ir::{Grain, QuantSpec, ScaleType, pack};

use super::dequant::GgmlType;

/// Elements of a block, which share a scale.
const BLOCK: u32 = 32;

/// The scheme that says what blocks of this type hold, exactly, if there is one. `Q4_1` and `Q5_1` have a minimum in the
/// place of a zero point; `bytes` are looked at until a block's minimum is no whole number of steps.
pub(super) fn scheme(ty: GgmlType, bytes: &[u8]) -> Option<QuantSpec> {
    let sym = |bits| QuantSpec { scale: ScaleType::F16, ..QuantSpec::sym(bits, Grain::Group(BLOCK)) };
    match ty {
        GgmlType::Q4_0 => Some(sym(4)),
        GgmlType::Q5_0 => Some(sym(5)),
        GgmlType::Q8_0 => Some(sym(8)),
        GgmlType::Q4_1 | GgmlType::Q5_1 if blocks(ty, bytes).all(|b| zero_point(ty, b).is_some()) => {
            Some(QuantSpec { scale: ScaleType::F16, ..QuantSpec::asym(bits(ty), Grain::Group(BLOCK)) })
        }
        _ => None,
    }
}

fn blocks(ty: GgmlType, bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.chunks_exact(ty.block_bytes())
}

/// Bits of a code in blocks that are no bytes.
fn bits(ty: GgmlType) -> u8 {
    if matches!(ty, GgmlType::Q5_0 | GgmlType::Q5_1) { 5 } else { 4 }
}

/// The zero point of a `Q4_1` or `Q5_1` block: `d * code + m` is `d * (code - zero)` in every bit if `m` is `-zero * d`. Products
/// and sums of these few digits are exact in `f32`.
fn zero_point(ty: GgmlType, block: &[u8]) -> Option<u8> {
    let float = |at: usize| half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let (d, m) = (float(0), float(2));
    (0..1u8 << bits(ty)).find(|&z| -f32::from(z) * d == m && d.is_finite())
}

/// Appends a row of blocks as dense bits; signed codes plus `2^(bits-1)`.
pub(super) fn push_codes(ty: GgmlType, row: &[u8], out: &mut Vec<u8>) {
    let mut codes = [0u8; BLOCK as usize];
    for b in blocks(ty, row) {
        if ty == GgmlType::Q8_0 {
            out.extend(b[2..].iter().map(|q| q ^ 0x80));
            continue;
        }
        // The first half of a block is in the low halves of its bytes.
        for (i, &byte) in b[ty.block_bytes() - 16..].iter().enumerate() {
            codes[i] = byte & 15;
            codes[i + 16] = byte >> 4;
        }
        if bits(ty) == 5 {
            // The fifth bits stand before them.
            let high = &b[ty.block_bytes() - 20..];
            codes.iter_mut().enumerate().for_each(|(i, c)| *c |= (high[i / 8] >> (i % 8) & 1) << 4);
        }
        pack::pack_row(codes.iter().copied(), bits(ty), out);
    }
}

/// Appends the scales of a row of blocks, as they are stored: `f16`.
pub(super) fn push_scales(ty: GgmlType, row: &[u8], out: &mut Vec<u8>) {
    blocks(ty, row).for_each(|b| out.extend_from_slice(&b[..2]));
}

/// Appends the zero points of a row of blocks that have minima.
///
/// # Errors
/// The number of a block that has none: the file has changed since [`scheme`] looked at it.
pub(super) fn push_zeros(ty: GgmlType, row: &[u8], out: &mut Vec<u8>) -> Result<(), usize> {
    for (i, b) in blocks(ty, row).enumerate() {
        out.push(zero_point(ty, b).ok_or(i)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(d: f32, m: f32) -> Vec<u8> {
        let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
        let mut b = [half(d), half(m)].concat();
        b.extend((0..16).map(|i| i | (15 - i) << 4));
        b
    }

    #[test]
    fn minima_of_whole_steps_are_zero_points() {
        let spec = |blocks: &[Vec<u8>]| scheme(GgmlType::Q4_1, &blocks.concat()).map(|s| s.to_string());
        // Zero points 3, 0 and 15; a block of zeros has the zero point 0.
        let good = [block(0.25, -0.75), block(0.5, 0.0), block(-2.0, 30.0), block(0.0, 0.0)];
        assert_eq!(spec(&good).as_deref(), Some("u4<group:32, f16, zero>"));
        let mut zeros = Vec::new();
        push_zeros(GgmlType::Q4_1, &good.concat(), &mut zeros).unwrap();
        assert_eq!(zeros, [3, 0, 15, 0]);
        // Between two steps, above 15, on the other side of zero, a constant, and no number.
        for bad in
            [block(0.25, -0.7), block(0.25, -4.0), block(0.25, 0.25), block(0.0, 1.0), block(f32::NAN, 0.0)]
        {
            assert_eq!(spec(&[good[0].clone(), bad]), None);
        }
    }

    #[test]
    fn codes_mean_what_the_blocks_mean() {
        let high = [0xa5, 0x0f, 0x81, 0x3c];
        for (ty, bytes) in [
            (GgmlType::Q4_1, block(0.25, -0.75)),
            (GgmlType::Q4_0, [vec![0, 0xb8], block(0.0, 0.0)[4..].to_vec()].concat()),
            (GgmlType::Q5_0, [vec![0, 0xb8], high.to_vec(), block(0.0, 0.0)[4..].to_vec()].concat()),
            (GgmlType::Q5_1, [&block(0.25, -5.25)[..4], &high, &block(0.0, 0.0)[4..]].concat()),
            (GgmlType::Q8_0, [vec![0, 0x3c], (0..32u8).map(|i| i.wrapping_mul(37)).collect()].concat()),
        ] {
            let spec = scheme(ty, &bytes).unwrap();
            let (mut codes, mut scale, mut zeros) = (Vec::new(), Vec::new(), vec![]);
            push_codes(ty, &bytes, &mut codes);
            push_scales(ty, &bytes, &mut scale);
            if spec.zero {
                push_zeros(ty, &bytes, &mut zeros).unwrap();
            }
            let scale = half::f16::from_le_bytes([scale[0], scale[1]]).to_f32();
            let zero = zeros.first().map_or(0, |&z| i32::from(z));
            let mut have = Vec::new();
            pack::unpack_row(&codes, spec.bits, 32, |u| {
                let code = i32::from(u) + spec.qmin();
                have.push(qrmc_ir::grid::dequantize(code, qrmc_ir::grid::QParam { scale, zero }));
            });
            let mut want = Vec::new();
            ty.dequantize(&bytes, |v| want.extend_from_slice(v));
            assert_eq!(have, want, "{ty}");
        }
    }
}
