//! The weights of an ONNX model under the names of the module.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use qrmc_ir::{RawWeight, TensorType, WeightError, WeightSource};

use super::file::Model;
use super::matrix::{Matrix, Part};
use crate::Checkpoint;

/// What a weight is made of.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A part of a matrix of the file, put in order when it is asked for.
    Matrix(Box<Matrix>, Part),
}

/// Weights in the order of their declaration.
#[derive(Clone, Debug, Default)]
pub(super) struct Pieces {
    list: Vec<(String, TensorType, Piece)>,
    by_name: HashMap<String, usize>,
}

impl Pieces {
    /// Whether a weight has this name, or codes that stand for it.
    pub(super) fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name) || self.by_name.contains_key(&format!("{name}.codes"))
    }

    pub(super) fn put(&mut self, name: String, ty: TensorType, piece: Piece) {
        self.by_name.insert(name.clone(), self.list.len());
        self.list.push((name, ty, piece));
    }
}

/// The weights of a model, whose file and external data are mapped.
#[derive(Debug)]
pub(super) struct OnnxCheckpoint {
    pub(super) model: Arc<Model>,
    pub(super) pieces: Pieces,
}

impl WeightSource for OnnxCheckpoint {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        let missing = || WeightError::new(name, "no such tensor in the model");
        let (_, ty, piece) = &self.pieces.list[*self.pieces.by_name.get(name).ok_or_else(missing)?];
        let bytes = match piece {
            Piece::Bytes(b) => Cow::Borrowed(&b[..]),
            Piece::Matrix(m, part) => match m.lent(*part, &self.model.tensors) {
                Some(bytes) => Cow::Borrowed(bytes),
                None => {
                    Cow::Owned(m.read(*part, &self.model.tensors).map_err(|why| WeightError::new(name, why))?)
                }
            },
        };
        Ok(RawWeight { ty: ty.clone(), bytes })
    }
}

impl Checkpoint for OnnxCheckpoint {
    fn tensors(&self) -> Vec<(String, TensorType)> {
        self.pieces.list.iter().map(|(name, ty, _)| (name.clone(), ty.clone())).collect()
    }

    fn weight_files(&self) -> Vec<PathBuf> {
        self.model.files.clone()
    }

    fn converts(&self) -> bool {
        true
    }
}
