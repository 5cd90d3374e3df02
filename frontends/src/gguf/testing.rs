//! Writes small GGUF files for tests.

use std::fs;

use tempfile::TempDir;

use super::reader::GgufFile;
use crate::{ImportError, Integers, Opened};

/// A metadata value with its type in the file.
#[derive(Clone)]
pub(super) enum V {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// Any type number and bytes.
    Raw(u32, Vec<u8>),
}

/// A file in the making.
#[derive(Clone)]
pub(super) struct Gguf {
    pub(super) version: u32,
    pub(super) meta: Vec<(String, V)>,
    /// Name, sizes innermost first, type number, bytes.
    pub(super) tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

pub(super) fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

pub(super) fn f32s(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect()
}

impl V {
    fn bytes(&self) -> (u32, Vec<u8>) {
        let list = |kind: u32, len: usize, body: Vec<u8>| {
            [&kind.to_le_bytes()[..], &(len as u64).to_le_bytes(), &body].concat()
        };
        match self {
            V::U32(v) => (4, v.to_le_bytes().to_vec()),
            V::F32(v) => (6, v.to_le_bytes().to_vec()),
            V::Bool(v) => (7, vec![u8::from(*v)]),
            V::Str(v) => (8, string(v)),
            V::Strs(v) => (9, list(8, v.len(), v.iter().flat_map(|s| string(s)).collect())),
            V::I32s(v) => (9, list(5, v.len(), v.iter().flat_map(|n| n.to_le_bytes()).collect())),
            V::F32s(v) => (9, list(6, v.len(), v.iter().flat_map(|n| n.to_le_bytes()).collect())),
            V::Raw(kind, bytes) => (*kind, bytes.clone()),
        }
    }
}

impl Gguf {
    /// A file with nothing in it.
    pub(super) fn empty() -> Self {
        Gguf { version: 3, meta: Vec::new(), tensors: Vec::new() }
    }

    /// A decoder of one layer: hidden 8, 2 heads of 4, 1 for keys and values, 3 tokens of embedding.
    pub(super) fn decoder(arch: &str) -> Self {
        let mut g = Gguf::empty().with("general.architecture", V::Str(arch.into()));
        for (key, n) in [
            ("block_count", 1),
            ("embedding_length", 8),
            ("feed_forward_length", 4),
            ("context_length", 64),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            g = g.with(&format!("{arch}.{key}"), V::U32(n));
        }
        g = g.with(&format!("{arch}.attention.layer_norm_rms_epsilon"), V::F32(1e-5));
        g.tensor("token_embd.weight", &[8, 3], 0, f32s(24)).tensor(
            "blk.0.attn_q.weight",
            &[8, 8],
            0,
            f32s(64),
        )
    }

    pub(super) fn with(mut self, key: &str, value: V) -> Self {
        self.meta.retain(|(k, _)| k != key);
        self.meta.push((key.into(), value));
        self
    }

    pub(super) fn without(mut self, key: &str) -> Self {
        self.meta.retain(|(k, _)| k != key);
        self
    }

    pub(super) fn tensor(mut self, name: &str, sizes: &[u64], kind: u32, bytes: Vec<u8>) -> Self {
        self.tensors.push((name.into(), sizes.to_vec(), kind, bytes));
        self
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.meta.len() as u64).to_le_bytes());
        for (key, value) in &self.meta {
            let (kind, bytes) = value.bytes();
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        let mut data = Vec::new();
        for (name, sizes, kind, bytes) in &self.tensors {
            out.extend(string(name));
            out.extend((sizes.len() as u32).to_le_bytes());
            sizes.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }

    /// The container alone. The folder must outlive the file.
    pub(super) fn file(&self) -> (TempDir, Result<GgufFile, ImportError>) {
        let (dir, path) = write(&self.bytes());
        let file = GgufFile::open(&path);
        (dir, file)
    }

    /// The whole import, with integers as floats.
    pub(super) fn open(&self) -> (TempDir, Result<Opened, ImportError>) {
        self.open_as(Integers::Dequantize)
    }

    pub(super) fn open_as(&self, integers: Integers) -> (TempDir, Result<Opened, ImportError>) {
        let (dir, path) = write(&self.bytes());
        let opened = super::open_file(&path, integers);
        (dir, opened)
    }

    /// What is said about the file.
    pub(super) fn refusal(&self) -> String {
        let error = self.open().1.err().expect("this file must be refused");
        format!("{} / {}", error.what, error.hint.unwrap_or_default())
    }
}

pub(super) fn write(bytes: &[u8]) -> (TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

/// A JSON side file.
pub(super) fn side(opened: &Opened, name: &str) -> serde_json::Value {
    let file = opened.files.iter().find(|f| f.name == name).expect("this file must be handed on");
    serde_json::from_slice(&file.bytes).unwrap()
}
