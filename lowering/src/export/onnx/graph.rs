//! The graph in the making: nodes, initializers, and unique names.

use std::collections::{HashMap, HashSet};

use onnx_protobuf::tensor_proto::DataType;
use onnx_protobuf::{AttributeProto, NodeProto, TensorProto};

use super::data::DataFile;
use super::proto::{external, inline, node};
use crate::artefact::ArtefactError;

/// The domain of onnxruntime's own operators.
pub(super) const CONTRIB: &str = "com.microsoft";
/// Initializers of weights with more bytes are external.
const INLINE: usize = 1024;

/// Nodes in order of computation, and what they read.
pub(super) struct Graph {
    pub(super) nodes: Vec<NodeProto>,
    pub(super) initializers: Vec<TensorProto>,
    data: DataFile,
    /// Name of the file of external data.
    location: String,
    /// Literals by type, sizes and bytes.
    literals: HashMap<(DataType, Vec<i64>, Vec<u8>), String>,
    used: HashSet<String>,
    /// Outputs that are remembered elsewhere, so must keep their names.
    pinned: HashSet<String>,
    /// How often a name was asked for.
    counts: HashMap<String, usize>,
    /// What stands before the names of new values.
    scope: String,
}

impl Graph {
    /// An empty graph. `location` is how the model calls the file of external data.
    pub(super) fn new(data: DataFile, location: &str) -> Self {
        Graph {
            nodes: Vec::new(),
            initializers: Vec::new(),
            data,
            location: location.to_owned(),
            literals: HashMap::new(),
            used: HashSet::new(),
            pinned: HashSet::new(),
            counts: HashMap::new(),
            scope: String::new(),
        }
    }

    /// Takes a name for an input or output.
    pub(super) fn reserve(&mut self, name: &str) {
        self.used.insert(name.to_owned());
    }

    /// Puts `scope` before the names of new values; gives the former one.
    pub(super) fn enter(&mut self, scope: &str) -> String {
        std::mem::replace(&mut self.scope, scope.to_owned())
    }

    /// The name itself, or the name and a number where it is taken.
    fn fresh(&mut self, name: &str) -> String {
        let mut out = name.to_owned();
        while !self.used.insert(out.clone()) {
            let n = self.counts.entry(name.to_owned()).or_insert(0);
            *n += 1;
            out = format!("{name}_{n}");
        }
        out
    }

    fn scoped(&self, name: &str) -> String {
        if self.scope.is_empty() { name.to_owned() } else { format!("{}/{name}", self.scope) }
    }

    /// A node of the standard operators with one output, which it gives.
    pub(super) fn op(&mut self, op: &str, inputs: &[&str]) -> String {
        self.op_with(op, inputs, Vec::new())
    }

    /// As [`Graph::op`], with attributes.
    pub(super) fn op_with(&mut self, op: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let [y] = self.domain_op("", op, inputs, attributes);
        y
    }

    /// A node of any domain with `N` outputs.
    pub(super) fn domain_op<const N: usize>(
        &mut self,
        domain: &str,
        op: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) -> [String; N] {
        let name = self.fresh(&self.scoped(op));
        let outputs: [String; N] = std::array::from_fn(|i| match i {
            0 => name.clone(),
            _ => self.fresh(&format!("{name}.{i}")),
        });
        let mut n = node(domain, op, inputs, attributes);
        n.output = outputs.to_vec();
        n.name = name;
        self.nodes.push(n);
        outputs
    }

    /// `x` converted to a type.
    pub(super) fn cast(&mut self, x: &str, to: DataType) -> String {
        self.op_with("Cast", &[x], vec![super::proto::int("to", to as i64)])
    }

    /// `x` with its axes permuted.
    pub(super) fn transpose(&mut self, x: &str, perm: &[i64]) -> String {
        self.op_with("Transpose", &[x], vec![super::proto::ints("perm", perm)])
    }

    /// `x` in other sizes: 0 keeps the size in this place, one -1 takes the rest.
    pub(super) fn reshape(&mut self, x: &str, to: &[i64]) -> String {
        let to = self.ints(to);
        self.op("Reshape", &[x, &to])
    }

    fn literal(&mut self, ty: DataType, dims: &[i64], bytes: Vec<u8>) -> String {
        let key = (ty, dims.to_vec(), bytes);
        if let Some(name) = self.literals.get(&key) {
            return name.clone();
        }
        let name = self.fresh("literal");
        self.initializers.push(inline(&name, ty, dims, &key.2));
        self.literals.insert(key, name.clone());
        name
    }

    /// A literal of floats.
    pub(super) fn floats(&mut self, dims: &[i64], data: &[f32]) -> String {
        self.literal(DataType::FLOAT, dims, data.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// A float that broadcasts to every shape.
    pub(super) fn scalar(&mut self, x: f32) -> String {
        self.floats(&[], &[x])
    }

    /// A vector of integers: sizes, axes.
    pub(super) fn ints(&mut self, data: &[i64]) -> String {
        let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.literal(DataType::INT64, &[data.len() as i64], bytes)
    }

    /// One integer, without axes.
    pub(super) fn int(&mut self, x: i64) -> String {
        self.literal(DataType::INT64, &[], x.to_le_bytes().to_vec())
    }

    /// A tensor with a name of its own.
    pub(super) fn initializer(
        &mut self,
        name: &str,
        ty: DataType,
        dims: &[i64],
        bytes: &[u8],
    ) -> Result<String, ArtefactError> {
        let name = self.fresh(name);
        let tensor = if bytes.len() <= INLINE {
            inline(&name, ty, dims, bytes)
        } else {
            let at = self.data.put(bytes)?;
            external(&name, ty, dims, &self.location, at.offset, at.len)
        };
        self.initializers.push(tensor);
        Ok(name)
    }

    /// Keeps the name of a value from now on.
    pub(super) fn pin(&mut self, name: &str) {
        self.pinned.insert(name.to_owned());
    }

    /// Names the output `old` of a node that was added after the first `mark` nodes, unless it is pinned or made before.
    pub(super) fn name(&mut self, mark: usize, old: &str, name: &str) -> String {
        let made = self.nodes[mark..].iter().any(|n| n.output.iter().any(|o| o == old));
        if !made || self.pinned.contains(old) {
            return old.to_owned();
        }
        let new = self.fresh(&self.scoped(name));
        self.rename(mark, old, &new);
        new
    }

    /// Makes `value` the output `name` of the graph.
    pub(super) fn output(&mut self, value: &str, name: &str) {
        let made = self.nodes.iter().any(|n| n.output.iter().any(|o| o == value));
        if made && !self.pinned.contains(value) {
            self.rename(0, value, name);
            self.pin(name);
        } else {
            let mut n = node("", "Identity", &[value], Vec::new());
            n.output = vec![name.to_owned()];
            n.name = self.fresh("Identity");
            self.nodes.push(n);
        }
    }

    fn rename(&mut self, mark: usize, old: &str, new: &str) {
        for n in &mut self.nodes[mark..] {
            n.input.iter_mut().chain(&mut n.output).filter(|s| *s == old).for_each(|s| *s = new.to_owned());
        }
    }

    /// Ends the file of external data.
    pub(super) fn finish(self) -> Result<(Vec<NodeProto>, Vec<TensorProto>), ArtefactError> {
        self.data.finish()?;
        Ok((self.nodes, self.initializers))
    }
}
