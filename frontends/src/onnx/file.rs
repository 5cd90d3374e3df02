//! An ONNX file as it stands: nodes, tensors, inputs and outputs, and where the bytes of tensors are.

use std::collections::HashMap;

use bytes::Bytes;
use qrmc_ir::{Elem, Tensor};

/// The types of elements that are read, by the numbers of the format.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Type {
    F32,
    U8,
    I8,
    I32,
    I64,
    Bool,
    F16,
    F64,
    BF16,
    U4,
    I4,
}

impl Type {
    pub(super) fn of(number: i64) -> Option<Self> {
        Some(match number {
            1 => Type::F32,
            2 => Type::U8,
            3 => Type::I8,
            6 => Type::I32,
            7 => Type::I64,
            9 => Type::Bool,
            10 => Type::F16,
            11 => Type::F64,
            16 => Type::BF16,
            21 => Type::U4,
            22 => Type::I4,
            _ => return None,
        })
    }

    pub(super) fn bits(self) -> u64 {
        match self {
            Type::U4 | Type::I4 => 4,
            Type::U8 | Type::I8 | Type::Bool => 8,
            Type::F16 | Type::BF16 => 16,
            Type::F32 | Type::I32 => 32,
            Type::I64 | Type::F64 => 64,
        }
    }

    /// The type under which weights stored so are declared.
    pub(super) fn float(self) -> Option<Elem> {
        match self {
            Type::F32 => Some(Elem::F32),
            Type::F16 => Some(Elem::F16),
            Type::BF16 => Some(Elem::BF16),
            _ => None,
        }
    }
}

/// A tensor of the file.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) name: String,
    pub(super) ty: Type,
    pub(super) dims: Vec<u64>,
    /// Little-endian elements, two 4-bit ones to a byte.
    pub(super) bytes: Bytes,
}

impl Stored {
    pub(super) fn count(&self) -> u64 {
        self.dims.iter().product()
    }

    /// An element of 4 or 8 bits as an unsigned number: signed ones plus 8 or 128.
    pub(super) fn field(&self, i: usize) -> u8 {
        match self.ty {
            Type::U4 => self.bytes[i / 2] >> (4 * (i % 2)) & 15,
            Type::I4 => (self.bytes[i / 2] >> (4 * (i % 2)) & 15) ^ 8,
            Type::I8 => self.bytes[i] ^ 0x80,
            _ => self.bytes[i],
        }
    }

    /// The elements, if they are floats of up to 32 bits.
    pub(super) fn floats(&self) -> Option<Vec<f32>> {
        let t = Tensor::from_le_bytes(self.ty.float()?, &[self.count() as usize], &self.bytes).ok()?;
        t.as_f32().map(<[f32]>::to_vec)
    }
}

/// The value of an attribute.
#[derive(Clone, Debug)]
pub(super) enum Attr {
    Int(i64),
    Float(f32),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Tensor(Stored),
    /// A graph inside a node: control flow.
    Graph,
    Other,
}

/// A node.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) op: String,
    /// Empty for the standard operators.
    pub(super) domain: String,
    pub(super) inputs: Vec<String>,
    pub(super) outputs: Vec<String>,
    pub(super) attrs: Vec<(String, Attr)>,
}

impl Node {
    pub(super) fn attr(&self, name: &str) -> Option<&Attr> {
        self.attrs.iter().find(|(n, _)| n == name).map(|(_, a)| a)
    }

    pub(super) fn int(&self, name: &str) -> Option<i64> {
        match self.attr(name) {
            Some(Attr::Int(n)) => Some(*n),
            _ => None,
        }
    }

    pub(super) fn float(&self, name: &str) -> Option<f32> {
        match self.attr(name) {
            Some(Attr::Float(x)) => Some(*x),
            _ => None,
        }
    }

    pub(super) fn ints(&self, name: &str) -> Option<&[i64]> {
        match self.attr(name) {
            Some(Attr::Ints(n)) => Some(n),
            _ => None,
        }
    }
}

/// An input of the graph; sizes that are not fixed are `None`.
#[derive(Clone, Debug)]
pub(super) struct Input {
    pub(super) name: String,
    pub(super) ty: Option<Type>,
    pub(super) dims: Vec<Option<u64>>,
}

/// What is read of a file.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) nodes: Vec<Node>,
    pub(super) tensors: Vec<Stored>,
    pub(super) inputs: Vec<Input>,
    pub(super) outputs: Vec<String>,
    /// Version of the format.
    pub(super) version: i64,
    /// Version of the standard operators.
    pub(super) opset: i64,
    pub(super) producer: String,
    /// The files with the bytes of tensors, the model's own first.
    pub(super) files: Vec<std::path::PathBuf>,
}

impl Model {
    /// The tensors of the file by their names.
    pub(super) fn by_name(&self) -> HashMap<&str, usize> {
        self.tensors.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect()
    }
}
