//! What a model's file says, whether or not its graph is understood.

use std::path::Path;

use super::file::Attr;
use super::reader;
use crate::ImportError;

/// A node of a graph.
#[derive(Clone, Debug)]
pub struct OnnxNode {
    /// Its name, or that of its first output.
    pub name: String,
    /// The operator, behind its domain where that is not the standard one: `com.microsoft.MatMulNBits`.
    pub op: String,
    /// Attributes that are integers.
    pub ints: Vec<(String, i64)>,
}

/// The file of a model without its tensors.
#[derive(Clone, Debug)]
pub struct OnnxHeader {
    /// Version of the format.
    pub version: i64,
    /// Version of the standard operators.
    pub opset: i64,
    /// Names of the graph's inputs.
    pub inputs: Vec<String>,
    /// Names of the graph's outputs.
    pub outputs: Vec<String>,
    /// All nodes in order.
    pub nodes: Vec<OnnxNode>,
}

impl OnnxHeader {
    /// Reads the file of a model, and finds the bytes of its tensors.
    ///
    /// # Errors
    /// If it is no ONNX model, is damaged, or a tensor lies outside of its file or the model's folder.
    pub fn read(path: &Path) -> Result<Self, ImportError> {
        let model = reader::read(path)?;
        let nodes = model.nodes.into_iter().map(|n| {
            let op = if n.domain.is_empty() { n.op } else { format!("{}.{}", n.domain, n.op) };
            let ints = n.attrs.into_iter().filter_map(|(name, a)| match a {
                Attr::Int(i) => Some((name, i)),
                _ => None,
            });
            OnnxNode { name: n.name, op, ints: ints.collect() }
        });
        Ok(OnnxHeader {
            version: model.version,
            opset: model.opset,
            inputs: model.inputs.into_iter().map(|i| i.name).collect(),
            outputs: model.outputs,
            nodes: nodes.collect(),
        })
    }
}

impl OnnxNode {
    /// An attribute that is an integer.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.ints.iter().find(|(n, _)| n == name).map(|(_, i)| *i)
    }
}
