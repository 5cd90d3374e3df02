//! Reading an export back, and the elements of a quantized matrix by the rules of the operators.

use std::collections::HashSet;

use onnx_protobuf::tensor_proto::{DataLocation, DataType};
use onnx_protobuf::{AttributeProto, Message, ModelProto, NodeProto, TensorProto};
use qrmc_ir::{Module, WeightSource, verify};

use crate::export::onnx::{DATA, Form, GENAI, MODEL, Options, write};

/// An export, read back.
pub(super) struct Read {
    pub(super) model: ModelProto,
    pub(super) data: Vec<u8>,
    pub(super) file: Vec<u8>,
    pub(super) genai: serde_json::Value,
}

impl Read {
    pub(super) fn of(module: &Module, weights: &dyn WeightSource, form: Form) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write(verify(module).unwrap(), weights, dir.path(), &Options { form })
            .unwrap_or_else(|e| panic!("{e}"));
        let file = std::fs::read(dir.path().join(MODEL)).unwrap();
        let data = std::fs::read(dir.path().join(DATA)).unwrap();
        let model = ModelProto::parse_from_bytes(&file).unwrap();
        let genai = serde_json::from_slice(&std::fs::read(dir.path().join(GENAI)).unwrap()).unwrap();
        let read = Read { model, data, file, genai };
        read.check();
        read
    }

    pub(super) fn nodes(&self) -> &[NodeProto] {
        &self.model.graph.node
    }

    /// Whether an operator occurs, and how often.
    pub(super) fn count(&self, op: &str) -> usize {
        self.nodes().iter().filter(|n| n.op_type == op).count()
    }

    pub(super) fn only(&self, op: &str) -> &NodeProto {
        assert_eq!(self.count(op), 1, "{op}");
        self.nodes().iter().find(|n| n.op_type == op).unwrap()
    }

    pub(super) fn tensor(&self, name: &str) -> (&TensorProto, Vec<u8>) {
        let t = self.model.graph.initializer.iter().find(|t| t.name == name).unwrap();
        if t.data_location.enum_value() != Ok(DataLocation::EXTERNAL) {
            return (t, t.raw_data.clone());
        }
        let get = |key: &str| &t.external_data.iter().find(|e| e.key == key).unwrap().value;
        assert_eq!(get("location"), DATA);
        let [from, len] = ["offset", "length"].map(|k| get(k).parse::<usize>().unwrap());
        (t, self.data[from..from + len].to_vec())
    }

    /// Every name is defined once, before its uses; external data lie side by side.
    pub(super) fn check(&self) {
        let graph = &self.model.graph;
        let mut known: HashSet<&str> = HashSet::new();
        known.insert("");
        let given = graph.input.iter().map(|i| i.name.as_str());
        for name in given.chain(graph.initializer.iter().map(|t| t.name.as_str())) {
            assert!(known.insert(name), "{name} is defined twice");
        }
        for n in &graph.node {
            assert!(n.input.iter().all(|i| known.contains(i.as_str())), "{n:?}");
            assert!(n.output.iter().all(|o| known.insert(o)), "{n:?}");
            assert!(n.domain.is_empty() || self.model.opset_import.iter().any(|o| o.domain == n.domain));
        }
        assert!(graph.output.iter().all(|o| known.contains(o.name.as_str())));
        let mut end = 0;
        for t in graph.initializer.iter().filter(|t| !t.external_data.is_empty()) {
            let number = |i: usize| t.external_data[i].value.parse::<usize>().unwrap();
            assert!(number(1) >= end && number(1).is_multiple_of(64), "{}", t.name);
            end = number(1) + number(2);
        }
        assert_eq!(end, self.data.len());
    }
}

pub(super) fn attribute<'n>(n: &'n NodeProto, name: &str) -> Option<&'n AttributeProto> {
    n.attribute.iter().find(|a| a.name == name)
}

/// Integers of a tensor by the schema: 4-bit ones two to a byte, the first in the low half.
pub(super) fn integers(t: &TensorProto, bytes: &[u8]) -> Vec<i32> {
    let count = t.dims.iter().product::<i64>() as usize;
    let nibble = |i: usize| i32::from(bytes[i / 2] >> (4 * (i % 2)) & 0xF);
    (0..count)
        .map(|i| match t.data_type {
            x if x == DataType::UINT8 as i32 => i32::from(bytes[i]),
            x if x == DataType::INT8 as i32 => i32::from(bytes[i] as i8),
            x if x == DataType::UINT4 as i32 => nibble(i),
            x if x == DataType::INT4 as i32 => (nibble(i) ^ 8) - 8,
            other => panic!("{other} is no type of codes"),
        })
        .collect()
}

pub(super) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Code, zero point and scale of each element.
pub(super) type Elements = Vec<(i32, i32, f32)>;

/// What `DequantizeLinear` reads, with blocks along axis 1 or one scale a column or for all.
pub(super) fn linear(r: &Read) -> Elements {
    let n = r.only("DequantizeLinear");
    let (t, bytes) = r.tensor(&n.input[0]);
    let codes = integers(t, &bytes);
    let cols = t.dims[1] as usize;
    let (st, bytes) = r.tensor(&n.input[1]);
    let scales = floats(&bytes);
    let zeros = n.input.get(2).map(|z| {
        let (zt, bytes) = r.tensor(z);
        assert_eq!((zt.data_type, &zt.dims), (t.data_type, &st.dims));
        integers(zt, &bytes)
    });
    let at = |i: usize| match attribute(n, "block_size") {
        Some(b) => (i / cols) * st.dims[1] as usize + (i % cols) / b.i as usize,
        None if st.dims.is_empty() => 0,
        None => i % cols,
    };
    codes
        .iter()
        .enumerate()
        .map(|(i, &c)| (c, zeros.as_ref().map_or(0, |z| z[at(i)]), scales[at(i)]))
        .collect()
}

/// What `MatMulNBits` reads; where it is given no zero points they are `2^(bits - 1)`, which signed codes were raised by.
pub(super) fn nbits(r: &Read) -> Elements {
    let n = r.only("MatMulNBits");
    let int = |name: &str| attribute(n, name).unwrap().i as usize;
    let (cols, rows, bits, block) = (int("K"), int("N"), int("bits"), int("block_size"));
    let count = cols / block;
    assert!(block.is_power_of_two() && block >= 16 && cols % block == 0);
    let (t, bytes) = r.tensor(&n.input[1]);
    assert_eq!(t.dims, [rows as i64, count as i64, (block * bits / 8) as i64]);
    let unpack =
        |bytes: &[u8], i: usize| i32::from(bytes[i * bits / 8] >> (i * bits % 8)) & ((1 << bits) - 1);
    let scales = floats(&r.tensor(&n.input[2]).1);
    assert_eq!(scales.len(), rows * count);
    let zeros = n.input.get(3).map(|z| r.tensor(z));
    let mid = 1 << (bits - 1);
    let element = |i: usize| {
        let (row, b) = (i / cols, i % cols / block);
        let code = unpack(&bytes, i);
        let scale = scales[row * count + b];
        match &zeros {
            Some((z, bytes)) => {
                let width = z.dims[1] as usize;
                (code, unpack(&bytes[row * width..], b), scale)
            }
            None => (code - mid, 0, scale),
        }
    };
    (0..rows * cols).map(element).collect()
}
