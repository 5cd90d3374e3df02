//! All integration tests, in one binary.
#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod ascend;
mod ascend_import;
mod awq;
mod batching;
mod cli;
mod corpus;
mod degenerate;
mod export;
mod formats;
mod gptq;
mod head;
mod hostile;
mod layout;
mod methods;
mod numerics;
mod onnx;
mod onnx_blocks;
mod onnx_import;
mod parity;
mod passes;
mod quantized;
mod quantized_hostile;
mod resume;
mod roundtrip;
mod run;
mod static_caches;
mod static_inputs;
mod support;
mod targets;
mod tasks;
mod tidy;
mod verifier;
