//! The qrmc graph IR: one graph as the only truth.
#![doc = include_str!("../../docs/ir.md")]

mod attr;
mod build;
mod diag;
mod engine;
mod expand;
mod factors;
pub mod grid;
pub mod hadamard;
mod hash;
mod infer;
pub mod interp;
mod lex;
pub mod linalg;
mod module;
mod op;
pub mod pack;
mod parse;
mod print;
mod quant;
pub mod random;
mod rewrite;
mod rope;
mod tensor;
mod types;
mod verify;
mod weight;
pub mod words;

pub use attr::{Attr, Real};
pub use build::{Builder, prune};
pub use diag::{Diag, Place};
pub use engine::{Engine, EngineError, Prepared};
pub use expand::{expand, expand_func};
pub use factors::fermat;
pub use hash::{Hash, structural_hash};
pub use infer::{infer, list_divisors};
pub use module::{
    Def, Func, FuncId, Lacks, ModelFacts, Module, Node, ShownValue, Value, ValueId, WeightDecl, WeightId,
};
pub use op::{AttnAttr, BinaryOp, Op, OpText, ReduceOp, UnaryOp};
pub use parse::{parse, parse_type};
pub use print::{VERSION, node_lines, print, print_func};
pub use quant::{Grain, QuantSpec, Rule, ScaleType};
pub use rewrite::{Identity, extract, module_without_quantizers, rewrite, without_quantizers};
pub use rope::{RopeAttr, RopeScaling};
pub use tensor::{Data, Tensor};
pub use types::{Dim, DimEnv, Elem, Shape, Sym, TensorType};
pub use verify::{Verified, verify};
pub use weight::{NoWeights, RawWeight, WeightError, WeightSource};
