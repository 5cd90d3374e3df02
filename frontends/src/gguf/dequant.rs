//! Block formats of ggml and what their bytes mean. Products and sums are taken in `f32`, in ggml's order,
//! so results are equal to ggml's scalar code bit for bit.

use std::fmt;

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(non_camel_case_types, reason = "these are ggml's own names")]
pub enum GgmlType {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 32 elements: scale, 4-bit codes minus 8.
    Q4_0,
    /// 32 elements: scale, minimum, 4-bit codes.
    Q4_1,
    /// 32 elements: scale, 5-bit codes minus 16.
    Q5_0,
    /// 32 elements: scale, minimum, 5-bit codes.
    Q5_1,
    /// 32 elements: scale, signed bytes.
    Q8_0,
    /// 256 elements in 8 groups with 6-bit scales and minima, 4-bit codes.
    Q4_K,
    /// As `Q4_K` with 5-bit codes.
    Q5_K,
    /// 256 elements in 16 groups with 8-bit scales, 6-bit codes minus 32.
    Q6_K,
}

use GgmlType::*;

/// Every type that is read, with its number in the file.
const READ: [(u32, GgmlType); 11] = [
    (0, F32),
    (1, F16),
    (30, BF16),
    (2, Q4_0),
    (3, Q4_1),
    (6, Q5_0),
    (7, Q5_1),
    (8, Q8_0),
    (12, Q4_K),
    (13, Q5_K),
    (14, Q6_K),
];

/// Types of ggml that are not read, with their numbers.
const NOT_READ: [(u32, &str); 31] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

impl GgmlType {
    /// The type of this number in a file.
    ///
    /// # Errors
    /// The end of a sentence that starts with the tensor: what the number stands for and what is read.
    pub fn from_id(id: u32) -> Result<Self, String> {
        if let Some((_, ty)) = READ.iter().find(|(n, _)| *n == id) {
            return Ok(*ty);
        }
        let read = READ.map(|(_, ty)| ty.to_string()).join(", ");
        Err(match NOT_READ.iter().find(|(n, _)| *n == id) {
            Some((_, name)) => {
                format!("is stored as {name} (ggml type {id}), which is not read; read are {read}")
            }
            None => format!("is of ggml type {id}, which is not known; read are {read}"),
        })
    }

    /// Elements in a block; rows are whole numbers of blocks.
    pub fn block_len(self) -> usize {
        match self {
            F32 | F16 | BF16 => 1,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 => 32,
            Q4_K | Q5_K | Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            F32 => 4,
            F16 | BF16 => 2,
            Q4_0 => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
        }
    }

    /// Whether elements are codes rather than floats.
    pub fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Widens whole blocks to `f32` and hands out the values of one block after the other.
    ///
    /// # Panics
    /// If `bytes` is no whole number of blocks: a bug of the caller.
    pub fn dequantize(self, bytes: &[u8], mut put: impl FnMut(&[f32])) {
        assert!(
            bytes.len().is_multiple_of(self.block_bytes()),
            "{} bytes are no blocks of {self}",
            bytes.len()
        );
        let mut out = [0f32; 256];
        let out = &mut out[..self.block_len()];
        for b in bytes.chunks_exact(self.block_bytes()) {
            match self {
                F32 => out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
                F16 => out[0] = f16(b, 0),
                BF16 => out[0] = half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                Q4_0 => {
                    let d = f16(b, 0);
                    nibbles(&b[2..], |i, q| out[i] = d * (f32::from(q) - 8.0));
                }
                Q4_1 => {
                    let (d, m) = (f16(b, 0), f16(b, 2));
                    nibbles(&b[4..], |i, q| out[i] = d * f32::from(q) + m);
                }
                Q5_0 => {
                    let d = f16(b, 0);
                    nibbles(&b[6..], |i, q| out[i] = d * (f32::from(q | (bit(&b[2..6], i) << 4)) - 16.0));
                }
                Q5_1 => {
                    let (d, m) = (f16(b, 0), f16(b, 2));
                    nibbles(&b[8..], |i, q| out[i] = d * f32::from(q | (bit(&b[4..8], i) << 4)) + m);
                }
                Q8_0 => {
                    let d = f16(b, 0);
                    out.iter_mut().zip(&b[2..]).for_each(|(y, &q)| *y = d * f32::from(q as i8));
                }
                Q4_K => k_groups(b, |j, d, m, i| {
                    let q = (b[16 + 32 * (j / 2) + i] >> (4 * (j % 2))) & 15;
                    out[32 * j + i] = d * f32::from(q) - m;
                }),
                Q5_K => k_groups(b, |j, d, m, i| {
                    let low = (b[48 + 32 * (j / 2) + i] >> (4 * (j % 2))) & 15;
                    let q = low | (((b[16 + i] >> j) & 1) << 4);
                    out[32 * j + i] = d * f32::from(q) - m;
                }),
                Q6_K => q6_k(b, out),
            }
            put(out);
        }
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

fn f16(b: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn bit(bytes: &[u8], i: usize) -> u8 {
    (bytes[i / 8] >> (i % 8)) & 1
}

/// The 32 codes of a 4-bit block: low halves of 16 bytes, then their high halves.
fn nibbles(qs: &[u8], mut put: impl FnMut(usize, u8)) {
    for (i, &b) in qs.iter().enumerate() {
        put(i, b & 15);
        put(i + 16, b >> 4);
    }
}

/// The 8 groups of 32 of a K block: calls `put(group, scale, minimum, element of the group)`.
fn k_groups(b: &[u8], mut put: impl FnMut(usize, f32, f32, usize)) {
    let (d, dmin, s) = (f16(b, 0), f16(b, 2), &b[4..16]);
    for j in 0..8 {
        // The first four pairs are plain 6-bit numbers; their two spare bits are the tops of the last four.
        let (scale, min) = match j {
            0..4 => (s[j] & 63, s[j + 4] & 63),
            _ => ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4)),
        };
        let (d, m) = (d * f32::from(scale), dmin * f32::from(min));
        (0..32).for_each(|i| put(j, d, m, i));
    }
}

fn q6_k(b: &[u8], out: &mut [f32]) {
    let d = f16(b, 208);
    for (i, y) in out.iter_mut().enumerate() {
        // Halves of 128: four runs of 32 share 64 low bytes and 32 bytes with two top bits a run.
        let (half, run, l) = (i / 128, i / 32 % 4, i % 32);
        let low = (b[64 * half + 32 * (run % 2) + l] >> (4 * (run / 2))) & 15;
        let top = (b[128 + 32 * half + l] >> (2 * run)) & 3;
        let scale = b[192 + i / 16] as i8;
        *y = d * f32::from(scale) * (f32::from(low | (top << 4)) - 32.0);
    }
}

#[cfg(test)]
mod tests;
