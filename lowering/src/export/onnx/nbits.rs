//! `com.microsoft.MatMulNBits`: a product with packed codes.
//!
//! Codes have 4 or 8 bits, and blocks along the columns are 16, 32, 64, 128 or 256 long: what onnxruntime's CPU kernels
//! take. Codes of fewer bits are stored in more, and the scale of a longer run is repeated for each of its blocks: both
//! keep every value.

use onnx_protobuf::tensor_proto::DataType;
use qrmc_ir::{Elem, Grain, QuantSpec, pack};

use super::OnnxError;
use super::graph::{CONTRIB, Graph};
use super::proto::int;
use super::stored::{Packed, Weights};

/// How a matrix of codes is cut for the operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Blocks {
    /// Bits of a code as stored by the operator.
    bits: u8,
    /// Codes of a block.
    block: usize,
    /// Blocks that share a scale.
    repeat: usize,
}

impl Blocks {
    /// The largest blocks that divide the runs that share a scale; `None` if there are none.
    pub(super) fn of(spec: QuantSpec, cols: usize) -> Option<Self> {
        let run = match spec.grain {
            Grain::Group(n) => n as usize,
            Grain::Row | Grain::Tensor => cols,
            Grain::Token | Grain::Channel => return None,
        };
        let block = [256, 128, 64, 32, 16].into_iter().find(|b| run > 0 && run.is_multiple_of(*b))?;
        Some(Blocks { bits: if spec.bits <= 4 { 4 } else { 8 }, block, repeat: run / block })
    }

    /// The codes of a matrix whose rows are `cols` long, least significant bits first. Signed codes are stored plus
    /// `2^(bits - 1)`, which is the zero point that the operator assumes where none is given.
    fn codes<'a>(self, stored: &'a [u8], spec: QuantSpec, cols: usize) -> std::borrow::Cow<'a, [u8]> {
        if self.bits == spec.bits {
            return stored.into();
        }
        let add = if spec.signed { (1u8 << (self.bits - 1)) - (1 << (spec.bits - 1)) } else { 0 };
        let mut out = Vec::new();
        for row in stored.chunks(Elem::Quant(spec).row_bytes(cols).max(1)) {
            let mut wide = Vec::with_capacity(cols);
            pack::unpack_row(row, spec.bits, cols, |c| wide.push(c + add));
            pack::pack_row(wide.into_iter(), self.bits, &mut out);
        }
        out.into()
    }

    /// One entry for each block of each row, from one for each run.
    fn spread<T: Copy>(self, sides: &[T], spec: QuantSpec, rows: usize) -> Vec<T> {
        let all = sides.iter().flat_map(|s| std::iter::repeat_n(*s, self.repeat));
        match spec.grain {
            Grain::Tensor => std::iter::repeat_n(all, rows).flatten().collect(),
            _ => all.collect(),
        }
    }
}

impl Weights<'_> {
    /// `x wᵀ` for a quantized matrix `w`, which is written for this product.
    pub(super) fn mat_mul_nbits(
        &mut self,
        g: &mut Graph,
        x: &str,
        p: Packed,
        blocks: Blocks,
    ) -> Result<String, OnnxError> {
        let (spec, rows, cols) = self.scheme(p)?;
        let count = cols / blocks.block;
        let blob = blocks.block * blocks.bits as usize / 8;
        let dims = [rows as i64, count as i64, blob as i64];
        let codes = blocks.codes(&self.raw(p.codes)?.bytes, spec, cols).into_owned();
        let codes = g.initializer(self.name(p.codes), DataType::UINT8, &dims, &codes)?;
        let scales = blocks.spread(&self.scales(p)?, spec, rows);
        let bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let scale =
            g.initializer(self.name(p.scale), DataType::FLOAT, &[rows as i64, count as i64], &bytes)?;
        let zero = match (self.zeros(p)?, p.zero) {
            (Some(zeros), Some(id)) => {
                let zeros = blocks.spread(&zeros, spec, rows);
                let mut bytes = Vec::new();
                zeros.chunks(count.max(1)).for_each(|r| {
                    pack::pack_row(r.iter().copied(), blocks.bits, &mut bytes);
                });
                let width = (count * blocks.bits as usize).div_ceil(8);
                Some(g.initializer(self.name(id), DataType::UINT8, &[rows as i64, width as i64], &bytes)?)
            }
            _ => None,
        };
        self.release(p);
        let mut inputs = vec![x, &codes, &scale];
        inputs.extend(zero.as_deref());
        let attributes = vec![
            int("K", cols as i64),
            int("N", rows as i64),
            int("bits", i64::from(blocks.bits)),
            int("block_size", blocks.block as i64),
            // Activations stay floats: rounding them again would be another function.
            int("accuracy_level", 1),
        ];
        let [y] = g.domain_op(CONTRIB, "MatMulNBits", &inputs, attributes);
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bits: u8, grain: Grain, cols: usize) -> Option<(u8, usize, usize)> {
        Blocks::of(QuantSpec::asym(bits, grain), cols).map(|b| (b.bits, b.block, b.repeat))
    }

    #[test]
    fn blocks_divide_the_runs() {
        assert_eq!(of(4, Grain::Group(64), 576), Some((4, 64, 1)));
        assert_eq!(of(3, Grain::Group(384), 768), Some((4, 128, 3)));
        assert_eq!(of(5, Grain::Row, 576), Some((8, 64, 9)));
        assert_eq!(of(8, Grain::Row, 1536), Some((8, 256, 6)));
        assert_eq!(of(4, Grain::Group(1024), 2048), Some((4, 256, 4)));
        assert_eq!(of(4, Grain::Group(8), 64), None);
        assert_eq!(of(4, Grain::Row, 24), None);
        assert_eq!(of(4, Grain::Channel, 64), None);
    }

    #[test]
    fn signed_codes_move_to_the_middle_of_the_wider_type() {
        let spec = QuantSpec::sym(3, Grain::Row);
        // methods.md §10.4: the codes -4 .. 3 are the bytes 88 C6 FA.
        let stored = [0x88, 0xC6, 0xFA, 0x88, 0xC6, 0xFA];
        let b = Blocks::of(spec, 16).unwrap();
        assert_eq!(*b.codes(&stored, spec, 16), [0x54, 0x76, 0x98, 0xBA, 0x54, 0x76, 0x98, 0xBA]);
    }

    #[test]
    fn a_scale_stands_for_each_block() {
        let b = Blocks::of(QuantSpec::asym(4, Grain::Row), 48).unwrap();
        assert_eq!(b.spread(&[1, 2], QuantSpec::asym(4, Grain::Row), 2), [1, 1, 1, 2, 2, 2]);
        let tensor = QuantSpec::asym(4, Grain::Tensor);
        assert_eq!(b.spread(&[7], tensor, 2), [7; 6]);
    }
}
