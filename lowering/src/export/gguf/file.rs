//! The file: metadata, table of contents, tensors on multiples of 32 bytes.

use std::io::{self, Write};

use qrmc_ir::{Elem, Tensor, WeightSource};

use super::BLOCK;
use super::blocks::Block;
use crate::export::{ExportError, Linear};

/// What tensors begin on a multiple of.
const ALIGNMENT: u64 = 32;
/// Rows that are in memory at once.
const ROWS: usize = 1024;

/// A value of the metadata.
#[derive(Clone, PartialEq, Debug)]
pub enum Meta {
    /// An unsigned integer.
    U32(u32),
    /// A float.
    F32(f32),
    /// Yes or no.
    Bool(bool),
    /// A text.
    Str(String),
    /// Texts.
    Strs(Vec<String>),
    /// Signed integers.
    I32s(Vec<i32>),
    /// Floats.
    F32s(Vec<f32>),
}

impl Meta {
    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Meta::U32(n) => {
                out.extend(4u32.to_le_bytes());
                out.extend(n.to_le_bytes());
            }
            Meta::F32(x) => {
                out.extend(6u32.to_le_bytes());
                out.extend(x.to_le_bytes());
            }
            Meta::Bool(b) => {
                out.extend(7u32.to_le_bytes());
                out.push(u8::from(*b));
            }
            Meta::Str(s) => {
                out.extend(8u32.to_le_bytes());
                text(s, out);
            }
            Meta::Strs(v) => {
                array(8, v.len(), out);
                v.iter().for_each(|s| text(s, out));
            }
            Meta::I32s(v) => {
                array(5, v.len(), out);
                v.iter().for_each(|n| out.extend(n.to_le_bytes()));
            }
            Meta::F32s(v) => {
                array(6, v.len(), out);
                v.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
        }
    }
}

fn array(kind: u32, len: usize, out: &mut Vec<u8>) {
    out.extend(9u32.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend((len as u64).to_le_bytes());
}

fn text(s: &str, out: &mut Vec<u8>) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    F32,
    F16,
    BF16,
    Coded(Block),
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Kind::F32 => 0,
            Kind::F16 => 1,
            Kind::BF16 => 30,
            Kind::Coded(block) => block.number(),
        }
    }

    fn bytes(self, elements: u64) -> u64 {
        match self {
            Kind::F32 => elements * 4,
            Kind::F16 | Kind::BF16 => elements * 2,
            Kind::Coded(block) => elements / BLOCK as u64 * block.bytes() as u64,
        }
    }
}

/// What a tensor is made of.
enum Origin<'a> {
    Codes(&'a Linear),
    Floats(&'a str, Elem),
    Made(Vec<f32>),
}

/// A tensor of the file.
pub(super) struct GgufTensor<'a> {
    name: String,
    /// Outermost first.
    shape: Vec<usize>,
    kind: Kind,
    origin: Origin<'a>,
    /// Rows of a head, where they are stored for interleaved rotation.
    permuted: Option<usize>,
}

impl<'a> GgufTensor<'a> {
    pub(super) fn coded(name: String, l: &'a Linear, block: Block, permuted: Option<usize>) -> Self {
        let kind = Kind::Coded(block);
        GgufTensor { name, shape: vec![l.rows, l.cols], kind, origin: Origin::Codes(l), permuted }
    }

    pub(super) fn floats(
        name: String,
        stored: &'a str,
        shape: Vec<usize>,
        to: Elem,
        permuted: Option<usize>,
    ) -> Self {
        let kind = match to {
            Elem::F16 => Kind::F16,
            Elem::BF16 => Kind::BF16,
            _ => Kind::F32,
        };
        GgufTensor { name, shape, kind, origin: Origin::Floats(stored, to), permuted }
    }

    pub(super) fn made(name: String, values: Vec<f32>) -> Self {
        let shape = vec![values.len()];
        GgufTensor { name, shape, kind: Kind::F32, origin: Origin::Made(values), permuted: None }
    }

    fn bytes(&self) -> u64 {
        self.kind.bytes(self.shape.iter().map(|&n| n as u64).product())
    }

    /// The row of the checkpoint that stands in a row of the file: halves of a head stand side by side there, and
    /// alternate here.
    fn row(&self, at: usize) -> usize {
        match self.permuted {
            None => at,
            Some(d) => at / d * d + at % 2 * (d / 2) + at % d / 2,
        }
    }

    fn write(
        &self,
        src: &dyn WeightSource,
        put: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), WriteError> {
        let rows = if self.shape.len() > 1 || self.permuted.is_some() { self.shape[0] } else { 1 };
        // Whole heads at a time.
        let step = self.permuted.map_or(ROWS, |d| ROWS.div_ceil(d) * d);
        let spans = (0..rows).step_by(step).map(|from| from..rows.min(from + step));
        match &self.origin {
            Origin::Made(values) => put(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?,
            Origin::Floats(stored, to) => {
                let raw = src.raw(stored).map_err(ExportError::from)?;
                let each = raw.bytes.len() / rows;
                for span in spans {
                    let mut bytes = Vec::with_capacity(span.len() * each);
                    for row in span.map(|r| self.row(r)) {
                        bytes.extend(&raw.bytes[row * each..(row + 1) * each]);
                    }
                    if raw.ty.elem != *to {
                        let n = bytes.len() * 8 / raw.ty.elem.bits();
                        let t = Tensor::from_le_bytes(raw.ty.elem, &[n], &bytes);
                        bytes = t.and_then(|t| t.to_le_bytes(*to)).map_err(ExportError::fault)?;
                    }
                    put(&bytes)?;
                }
            }
            Origin::Codes(l) => {
                let Kind::Coded(block) = self.kind else { unreachable!("codes are stored in blocks") };
                let (scales, zeros) = (l.scales(src)?, l.zeros(src)?);
                let (groups, per_group) = (l.groups(), l.group() / BLOCK);
                for span in spans {
                    let codes = l.codes(src, span.clone())?;
                    let mut bytes = Vec::with_capacity(codes.len() / BLOCK * block.bytes());
                    for row in span.clone().map(|r| self.row(r)) {
                        let at = (row - span.start) * l.cols;
                        for (b, codes) in codes[at..at + l.cols].chunks_exact(BLOCK).enumerate() {
                            let group = row * groups + b / per_group;
                            block.write(codes, zeros[group], scales[group], &mut bytes);
                        }
                    }
                    put(&bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Stored names of what it is made of.
    fn from(&self) -> Vec<&str> {
        match &self.origin {
            Origin::Codes(l) => [Some(&l.codes.codes), Some(&l.codes.scale), l.codes.zero.as_ref()]
                .into_iter()
                .flatten()
                .map(String::as_str)
                .collect(),
            Origin::Floats(stored, _) => vec![stored],
            Origin::Made(_) => Vec::new(),
        }
    }
}

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// What is written could not be made.
    #[error(transparent)]
    Made(#[from] ExportError),
    /// The file could not be written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A planned file.
pub struct GgufPlan<'a> {
    pub(super) meta: Vec<(String, Meta)>,
    pub(super) tensors: Vec<GgufTensor<'a>>,
    /// What a user should know.
    pub notes: Vec<String>,
}

impl GgufPlan<'_> {
    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.head().len() as u64
            + self.tensors.iter().map(|t| t.bytes().next_multiple_of(ALIGNMENT)).sum::<u64>()
    }

    /// Number of tensors.
    pub fn tensors(&self) -> usize {
        self.tensors.len()
    }

    fn head(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.meta.len() as u64).to_le_bytes());
        for (key, value) in &self.meta {
            text(key, &mut out);
            value.write(&mut out);
        }
        let mut at = 0u64;
        for t in &self.tensors {
            text(&t.name, &mut out);
            out.extend((t.shape.len() as u32).to_le_bytes());
            t.shape.iter().rev().for_each(|&n| out.extend((n as u64).to_le_bytes()));
            out.extend(t.kind.number().to_le_bytes());
            out.extend(at.to_le_bytes());
            at = (at + t.bytes()).next_multiple_of(ALIGNMENT);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
        out
    }

    /// Writes the file, a tensor at a time. `done` is told the name of each tensor and what it was made of.
    ///
    /// # Errors
    /// If a part of a tensor cannot be read, or `out` cannot be written.
    pub fn write(
        &self,
        src: &dyn WeightSource,
        out: &mut dyn Write,
        done: &mut dyn FnMut(&str, &[&str]),
    ) -> Result<(), WriteError> {
        out.write_all(&self.head())?;
        for t in &self.tensors {
            let mut written = 0u64;
            t.write(src, &mut |bytes| {
                written += bytes.len() as u64;
                out.write_all(bytes)
            })?;
            if written != t.bytes() {
                let what =
                    format!("tensor `{}` has {written} bytes where {} were planned", t.name, t.bytes());
                return Err(ExportError::fault(what).into());
            }
            let fill = (written.next_multiple_of(ALIGNMENT) - written) as usize;
            out.write_all(&[0; ALIGNMENT as usize][..fill])?;
            done(&t.name, &t.from());
        }
        Ok(())
    }
}
