//! Messages of the ONNX schema in few words. Only the generated types of `onnx-protobuf` are used, not its helpers.

use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::tensor_proto::{DataLocation, DataType};
use onnx_protobuf::tensor_shape_proto::{Dimension, dimension};
use onnx_protobuf::{
    AttributeProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto,
    TypeProto, ValueInfoProto, type_proto,
};
use protobuf::MessageField;

/// A size of an input or output of the graph.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Size {
    /// Known.
    Fixed(i64),
    /// Named; equal names are equal sizes.
    Named(&'static str),
}

fn attribute(name: &str, ty: AttributeType) -> AttributeProto {
    AttributeProto { name: name.to_owned(), type_: ty.into(), ..AttributeProto::default() }
}

pub(super) fn int(name: &str, i: i64) -> AttributeProto {
    AttributeProto { i, ..attribute(name, AttributeType::INT) }
}

pub(super) fn ints(name: &str, ints: &[i64]) -> AttributeProto {
    AttributeProto { ints: ints.to_vec(), ..attribute(name, AttributeType::INTS) }
}

pub(super) fn float(name: &str, f: f32) -> AttributeProto {
    AttributeProto { f, ..attribute(name, AttributeType::FLOAT) }
}

/// A node without a name and outputs.
pub(super) fn node(domain: &str, op: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        op_type: op.to_owned(),
        domain: domain.to_owned(),
        input: inputs.iter().map(|&i| i.to_owned()).collect(),
        attribute: attributes,
        ..NodeProto::default()
    }
}

pub(super) fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto { domain: domain.to_owned(), version, ..OperatorSetIdProto::default() }
}

pub(super) fn entry(key: &str, value: impl ToString) -> StringStringEntryProto {
    StringStringEntryProto {
        key: key.to_owned(),
        value: value.to_string(),
        ..StringStringEntryProto::default()
    }
}

/// An input or output of the graph.
pub(super) fn value(name: &str, ty: DataType, sizes: &[Size]) -> ValueInfoProto {
    let dim = sizes
        .iter()
        .map(|s| Dimension {
            value: Some(match s {
                Size::Fixed(n) => dimension::Value::DimValue(*n),
                Size::Named(n) => dimension::Value::DimParam((*n).to_owned()),
            }),
            ..Dimension::default()
        })
        .collect();
    let tensor = type_proto::Tensor {
        elem_type: ty as i32,
        shape: MessageField::some(TensorShapeProto { dim, ..TensorShapeProto::default() }),
        ..type_proto::Tensor::default()
    };
    let ty = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() };
    ValueInfoProto { name: name.to_owned(), type_: MessageField::some(ty), ..ValueInfoProto::default() }
}

/// A tensor whose bytes are in the message.
pub(super) fn inline(name: &str, ty: DataType, dims: &[i64], bytes: &[u8]) -> TensorProto {
    TensorProto { raw_data: bytes.to_vec(), ..tensor(name, ty, dims) }
}

/// A tensor whose bytes are in the file `location`.
pub(super) fn external(
    name: &str,
    ty: DataType,
    dims: &[i64],
    location: &str,
    offset: u64,
    len: u64,
) -> TensorProto {
    TensorProto {
        data_location: DataLocation::EXTERNAL.into(),
        external_data: vec![entry("location", location), entry("offset", offset), entry("length", len)],
        ..tensor(name, ty, dims)
    }
}

fn tensor(name: &str, ty: DataType, dims: &[i64]) -> TensorProto {
    TensorProto { name: name.to_owned(), data_type: ty as i32, dims: dims.to_vec(), ..TensorProto::default() }
}
