//! Blocks of 32 codes: which type holds a matrix exactly, and its bytes.

use half::f16;
use qrmc_ir::{ScaleType, WeightSource};

use super::{BLOCK, NAME};
use crate::export::{ExportError, Linear};

/// A block type, smallest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Block {
    Q4_0,
    Q4_1,
    Q5_0,
    Q8_0,
}

impl std::fmt::Display for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

impl Block {
    /// Number of the type in a file.
    pub(super) fn number(self) -> u32 {
        match self {
            Block::Q4_0 => 2,
            Block::Q4_1 => 3,
            Block::Q5_0 => 6,
            Block::Q8_0 => 8,
        }
    }

    /// `general.file_type` of a file whose matrices are mostly of this type.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Block::Q4_0 => 2,
            Block::Q4_1 => 3,
            Block::Q5_0 => 8,
            Block::Q8_0 => 7,
        }
    }

    /// Bits of a code.
    pub(super) fn bits(self) -> u8 {
        match self {
            Block::Q4_0 | Block::Q4_1 => 4,
            Block::Q5_0 => 5,
            Block::Q8_0 => 8,
        }
    }

    /// Bytes of a block.
    pub(super) fn bytes(self) -> usize {
        match self {
            Block::Q4_0 => 18,
            Block::Q4_1 => 20,
            Block::Q5_0 => 22,
            Block::Q8_0 => 34,
        }
    }

    /// The least and the largest `code - zero` that it holds; of `Q4_1`, of the code.
    fn range(self) -> (i16, i16) {
        match self {
            Block::Q4_0 => (-8, 7),
            Block::Q4_1 => (0, 15),
            Block::Q5_0 => (-16, 15),
            Block::Q8_0 => (-128, 127),
        }
    }

    /// Appends one block: `codes` less `zero`, times `scale`.
    pub(super) fn write(self, codes: &[u8], zero: u8, scale: f32, out: &mut Vec<u8>) {
        let d = f16::from_f32(scale);
        out.extend(d.to_le_bytes());
        let q = |at: usize| i16::from(codes[at]) - i16::from(zero);
        let half = BLOCK / 2;
        let nibbles = |out: &mut Vec<u8>, q: &dyn Fn(usize) -> u8| {
            out.extend((0..half).map(|j| (q(j) & 15) | (q(j + half) & 15) << 4));
        };
        match self {
            Block::Q4_0 => nibbles(out, &|j| (q(j) + 8) as u8),
            Block::Q4_1 => {
                out.extend(f16::from_f32(-scale * f32::from(zero)).to_le_bytes());
                nibbles(out, &|j| codes[j]);
            }
            Block::Q5_0 => {
                let five = |j: usize| (q(j) + 16) as u8;
                let high = (0..BLOCK).fold(0u32, |bits, j| bits | u32::from(five(j) >> 4) << j);
                out.extend(high.to_le_bytes());
                nibbles(out, &five);
            }
            Block::Q8_0 => out.extend((0..BLOCK).map(|j| q(j) as u8)),
        }
    }
}

/// The smallest block type that holds a matrix exactly.
///
/// # Errors
/// If none does, and what to do.
pub(super) fn choose(l: &Linear, src: &dyn WeightSource) -> Result<Block, ExportError> {
    if !l.group().is_multiple_of(BLOCK) {
        return Err(ExportError::illegal(format!(
            "{}: groups of {}; a block of a GGUF file has one scale for {BLOCK} neighbours",
            l.name,
            l.group()
        ))
        .hint("compile with a group that 32 divides"));
    }
    l.scales_fit(src, ScaleType::F16, NAME)?;
    let (scales, zeros) = (l.scales(src)?, l.zeros(src)?);
    let (group, groups) = (l.group(), l.groups());
    let (mut low, mut high) = (0i16, 0i16);
    for rows in l.blocks() {
        let from = rows.start * groups;
        let codes = l.codes(src, rows)?;
        for (run, &zero) in codes.chunks(group).zip(&zeros[from..]) {
            for &code in run {
                let q = i16::from(code) - i16::from(zero);
                (low, high) = (low.min(q), high.max(q));
            }
        }
    }
    let least = |b: &Block| {
        let (min, max) = b.range();
        match b {
            // Its codes have no zero point: their value at 0 is a float of its own.
            Block::Q4_1 => l.bits() <= 4 && scales.iter().zip(&zeros).all(|(&s, &z)| holds_minimum(s, z)),
            _ => min <= low && high <= max,
        }
    };
    [Block::Q4_0, Block::Q4_1, Block::Q5_0, Block::Q8_0].into_iter().find(least).ok_or_else(|| {
        ExportError::illegal(format!(
            "{}: codes less their zero points reach from {low} to {high}; blocks hold -128 to 127",
            l.name
        ))
        .hint("compile with sym=true, whose codes have no zero points")
    })
}

fn holds_minimum(scale: f32, zero: u8) -> bool {
    let m = -scale * f32::from(zero);
    f16::from_f32(m).to_f32() == m
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of a block, from the format's description.
    fn read(block: Block, b: &[u8]) -> Vec<f32> {
        let float = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
        let nibble = |at: usize, j: usize| if j < 16 { b[at + j] & 15 } else { b[at + j - 16] >> 4 };
        let value = |j: usize| match block {
            Block::Q4_0 => float(0) * (f32::from(nibble(2, j)) - 8.0),
            Block::Q4_1 => float(0) * f32::from(nibble(4, j)) + float(2),
            Block::Q5_0 => {
                let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]) >> j & 1;
                float(0) * (f32::from(nibble(6, j)) + 16.0 * high as f32 - 16.0)
            }
            Block::Q8_0 => float(0) * f32::from(b[2 + j] as i8),
        };
        (0..BLOCK).map(value).collect()
    }

    #[test]
    fn blocks_hold_codes_less_their_zero_point() {
        for (block, zero, top) in
            [(Block::Q4_0, 8, 15), (Block::Q4_1, 4, 15), (Block::Q5_0, 15, 15), (Block::Q8_0, 128, 255)]
        {
            let codes: Vec<u8> = (0..BLOCK).map(|j| (j * top / (BLOCK - 1)) as u8).collect();
            let mut bytes = Vec::new();
            block.write(&codes, zero, 0.25, &mut bytes);
            assert_eq!(bytes.len(), block.bytes());
            let want: Vec<f32> = codes.iter().map(|&c| 0.25 * (f32::from(c) - f32::from(zero))).collect();
            assert_eq!(read(block, &bytes), want, "{block}");
        }
    }
}
