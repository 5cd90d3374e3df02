//! A model in the formats of other runtimes.

pub mod onnx;
