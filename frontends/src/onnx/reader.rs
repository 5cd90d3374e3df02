//! Messages of the ONNX schema as nodes, tensors, inputs and outputs.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use bytes::Bytes;

use super::file::{Attr, Input, Model, Node, Stored, Type};
use super::wire::{Field, walk};
use crate::ImportError;
use crate::hf::map_file;

/// Most nodes that are read: hundreds of layers have tens of thousands.
const MOST_NODES: usize = 1 << 18;
/// Most axes of a tensor.
const MOST_AXES: usize = 16;
const AGAIN: &str = "the file is cut short or damaged: export or download it again";

/// Reads the parts of one file.
struct Reader<'a> {
    path: &'a Path,
    map: Bytes,
    /// Files of external data by their names, each mapped once.
    others: BTreeMap<String, Bytes>,
}

/// Maps a model and reads its graph; elements of large tensors stay in the file.
///
/// # Errors
/// If it is no ONNX model, is damaged, or a tensor lies outside of its file or the model's folder.
pub(super) fn read(path: &Path) -> Result<Model, ImportError> {
    let map = map_file(path, 4)?;
    let mut reader = Reader { path, map: map.clone(), others: BTreeMap::new() };
    let mut model = reader.model(&map).map_err(|what| ImportError::new(path, what).hint(AGAIN))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    model.files =
        std::iter::once(path.to_owned()).chain(reader.others.keys().map(|n| folder.join(n))).collect();
    Ok(model)
}

type Parsed<T> = Result<T, String>;

fn text(f: Field<'_>) -> Option<String> {
    f.text().map(str::to_owned)
}

/// Reads a message inside another one, of which there may be several.
fn inside<'a, X>(
    f: Field<'a>,
    out: &mut Vec<X>,
    read: impl FnOnce(&'a [u8]) -> Parsed<X>,
) -> Parsed<Option<()>> {
    let Some(bytes) = f.bytes() else { return Ok(None) };
    out.push(read(bytes)?);
    SKIP
}

/// A field that is not wanted, of whatever type.
const SKIP: Parsed<Option<()>> = Ok(Some(()));

impl Reader<'_> {
    fn model(&mut self, bytes: &[u8]) -> Parsed<Model> {
        let (mut graph, mut producer, mut version) = (None, String::new(), None);
        let mut opsets = Vec::new();
        walk(bytes, |n, f| {
            Ok(match n {
                1 => f.int().map(|v| version = Some(v)),
                2 => text(f).map(|t| producer = t),
                7 => f.bytes().map(|b| graph = Some(b)),
                8 => return inside(f, &mut opsets, opset),
                25 => return Err("it has functions of its own, which are not read".into()),
                _ => Some(()),
            })
        })
        .map_err(|what| format!("this is no ONNX model: {what}"))?;
        let (Some(graph), Some(version)) = (graph, version) else {
            return Err("this is no ONNX model: it has no graph or no version".into());
        };
        let opset = opsets.iter().find(|(d, _)| d.is_empty() || d == "ai.onnx").map_or(0, |(_, v)| *v);
        let mut model = Model {
            nodes: Vec::new(),
            tensors: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            version,
            opset,
            producer,
            files: Vec::new(),
        };
        let mut parts = Vec::new();
        walk(graph, |n, f| {
            if let (1 | 5 | 11 | 12 | 15, Some(b)) = (n, f.bytes()) {
                parts.push((n, b));
            }
            SKIP
        })?;
        for (n, b) in parts {
            match n {
                1 if model.nodes.len() >= MOST_NODES => {
                    return Err(format!("the graph has more than {MOST_NODES} nodes"));
                }
                1 => model.nodes.push(self.node(b)?),
                5 => model.tensors.push(self.tensor(b)?),
                11 => model.inputs.push(input(b)?),
                12 => model.outputs.push(input(b)?.name),
                _ => return Err("a tensor is sparse, which is not read".into()),
            }
        }
        Ok(model)
    }

    fn node(&mut self, bytes: &[u8]) -> Parsed<Node> {
        let mut node = Node {
            name: String::new(),
            op: String::new(),
            domain: String::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            attrs: Vec::new(),
        };
        walk(bytes, |n, f| {
            Ok(match n {
                1 => text(f).map(|t| node.inputs.push(t)),
                2 => text(f).map(|t| node.outputs.push(t)),
                3 => text(f).map(|t| node.name = t),
                4 => text(f).map(|t| node.op = t),
                5 => return inside(f, &mut node.attrs, |b| self.attribute(b)),
                7 => text(f).map(|t| node.domain = t),
                _ => Some(()),
            })
        })?;
        if node.domain == "ai.onnx" {
            node.domain.clear();
        }
        if node.op.is_empty() || node.outputs.is_empty() {
            return Err("a node has no operator or no output".into());
        }
        if node.name.is_empty() {
            node.name.clone_from(&node.outputs[0]);
        }
        Ok(node)
    }

    fn attribute(&mut self, bytes: &[u8]) -> Parsed<(String, Attr)> {
        let (mut name, mut kind) = (String::new(), None);
        let (mut int, mut float, mut tensor) = (0, 0.0, None);
        let (mut ints, mut floats) = (Vec::new(), Vec::new());
        walk(bytes, |n, f| {
            Ok(match n {
                1 => text(f).map(|t| name = t),
                2 => match f {
                    Field::Four(x) => {
                        float = f32::from_bits(x);
                        Some(())
                    }
                    _ => None,
                },
                3 => f.int().map(|n| int = n),
                5 => f.bytes().map(|b| tensor = Some(b)),
                7 => f.fixed(&mut floats),
                8 => f.ints(&mut ints),
                20 => f.int().map(|n| kind = Some(n)),
                _ => Some(()),
            })
        })?;
        let value = match (kind, tensor) {
            (Some(1), _) => Attr::Float(float),
            (Some(2), _) => Attr::Int(int),
            (Some(4), Some(t)) => Attr::Tensor(self.tensor(t)?),
            (Some(5 | 10), _) => Attr::Graph,
            (Some(6), _) => {
                Attr::Floats(floats.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
            (Some(7), _) => Attr::Ints(ints),
            _ => Attr::Other,
        };
        Ok((name, value))
    }

    fn tensor(&mut self, bytes: &[u8]) -> Parsed<Stored> {
        let (mut name, mut ty, mut dims) = (String::new(), 0, Vec::new());
        let (mut raw, mut floats, mut ints) = (None, Vec::new(), Vec::new());
        let (mut external, mut place) = (Vec::new(), 0);
        walk(bytes, |n, f| {
            Ok(match n {
                1 => f.ints(&mut dims),
                2 => f.int().map(|t| ty = t),
                3 => return Err("a tensor is cut into segments, which is not read".into()),
                // Floats, and doubles.
                4 | 10 => f.fixed(&mut floats),
                5 | 7 => f.ints(&mut ints),
                8 => text(f).map(|t| name = t),
                9 => f.bytes().map(|b| raw = Some(b)),
                13 => return inside(f, &mut external, entry),
                14 => f.int().map(|p| place = p),
                _ => Some(()),
            })
        })?;
        let of = |what: String| format!("tensor `{name}` {what}");
        let fail = |what: String| Err(of(what));
        let Some(ty) = Type::of(ty) else {
            return fail(format!("has elements of type {ty}, which is not read"));
        };
        let sizes: Option<Vec<u64>> = dims.iter().map(|&d| u64::try_from(d).ok()).collect();
        let count = sizes.as_ref().and_then(|s| s.iter().try_fold(1u64, |a, &d| a.checked_mul(d)));
        let want = count.and_then(|c| c.checked_mul(ty.bits())).map(|b| b.div_ceil(8));
        let (Some(dims), Some(want), true) = (sizes, want, dims.len() <= MOST_AXES) else {
            return fail(format!("has the sizes {dims:?}"));
        };
        let bytes = match (place, raw) {
            (1, _) => self.external(&external, want).map_err(of)?,
            (_, Some(raw)) => self.map.slice_ref(raw),
            (_, None) if !floats.is_empty() => Bytes::from(floats),
            (_, None) => Bytes::from(ints.iter().flat_map(|n| element(*n, ty)).collect::<Vec<u8>>()),
        };
        if bytes.len() as u64 != want {
            return fail(format!("has {} bytes, its type and sizes {dims:?} need {want}", bytes.len()));
        }
        Ok(Stored { name, ty, dims, bytes })
    }

    /// The bytes of a tensor that lie in another file.
    fn external(&mut self, entries: &[(String, String)], want: u64) -> Parsed<Bytes> {
        let get = |key: &str| entries.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let Some(location) = get("location") else { return Err("lies in a file that is not named".into()) };
        let number = |key: &str, otherwise: u64| match get(key) {
            None => Ok(otherwise),
            Some(text) => text.parse::<u64>().map_err(|_| format!("has the {key} `{text}` in `{location}`")),
        };
        let (offset, len) = (number("offset", 0)?, number("length", want)?);
        let inside = Path::new(location).components().all(|c| matches!(c, Component::Normal(_)));
        if !inside {
            return Err(format!("lies in `{location}`, which is outside of the model's folder"));
        }
        if !self.others.contains_key(location) {
            let path = self.path.parent().unwrap_or(Path::new("")).join(location);
            let map = map_file(&path, 0).map_err(|e| format!("lies in another file: {e}"))?;
            self.others.insert(location.to_owned(), map);
        }
        let map = &self.others[location];
        let range = offset.checked_add(len).filter(|&end| end <= map.len() as u64);
        match range {
            Some(end) => Ok(map.slice(offset as usize..end as usize)),
            None => Err(format!(
                "lies at {offset} to {offset} + {len} of `{location}`, which has {} bytes",
                map.len()
            )),
        }
    }
}

/// An element that was written as an integer.
fn element(n: i64, ty: Type) -> Vec<u8> {
    let width = (ty.bits() as usize).div_ceil(8);
    n.to_le_bytes()[..width].to_vec()
}

fn opset(bytes: &[u8]) -> Parsed<(String, i64)> {
    let (mut domain, mut version) = (String::new(), 0);
    walk(bytes, |n, f| {
        Ok(match n {
            1 => text(f).map(|t| domain = t),
            2 => f.int().map(|v| version = v),
            _ => Some(()),
        })
    })?;
    Ok((domain, version))
}

fn entry(bytes: &[u8]) -> Parsed<(String, String)> {
    let mut pair = (String::new(), String::new());
    walk(bytes, |n, f| {
        Ok(match n {
            1 => text(f).map(|t| pair.0 = t),
            2 => text(f).map(|t| pair.1 = t),
            _ => Some(()),
        })
    })?;
    Ok(pair)
}

/// The messages of a field, in order.
fn messages(bytes: &[u8], number: u32) -> Parsed<Vec<&[u8]>> {
    let mut out = Vec::new();
    walk(bytes, |n, f| {
        out.extend(f.bytes().filter(|_| n == number));
        SKIP
    })?;
    Ok(out)
}

/// The integer of a field, if it is there.
fn integer(bytes: &[u8], number: u32) -> Parsed<Option<i64>> {
    let mut out = None;
    walk(bytes, |n, f| {
        if n == number {
            out = f.int();
        }
        SKIP
    })?;
    Ok(out)
}

/// Name, type and sizes of an input or output: `ValueInfoProto`, `TypeProto`, `Tensor`, `TensorShapeProto`, `Dimension`.
fn input(bytes: &[u8]) -> Parsed<Input> {
    let name = messages(bytes, 1)?.first().and_then(|b| std::str::from_utf8(b).ok()).unwrap_or("").to_owned();
    let mut found = Input { name, ty: None, dims: Vec::new() };
    for of in messages(bytes, 2)? {
        for tensor in messages(of, 1)? {
            found.ty = integer(tensor, 1)?.and_then(Type::of);
            for shape in messages(tensor, 2)? {
                for dim in messages(shape, 1)? {
                    found.dims.push(integer(dim, 1)?.and_then(|d| u64::try_from(d).ok()));
                }
            }
        }
    }
    Ok(found)
}
