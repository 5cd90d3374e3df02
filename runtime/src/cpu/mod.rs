//! CPU kernels in `f32`, and products in `f64`.
//!
//! Two rules hold everywhere. *Same bytes at any thread count*: work is cut by shape only, and every
//! reduction has a fixed order. *Unsafe code is local*: it exists for SIMD, for the `gemm` crate and for
//! handing disjoint parts of an output to threads, nowhere else.
//!
//! Kernels take the [`Pool`] that spreads their work and the [`Isa`] that their inner loops use. Tensors are
//! dense and row-major unless a stride is asked for. A slice of the wrong length is a bug of the caller and panics.

pub mod attention;
pub mod attention_grad;
mod dot;
#[cfg(target_arch = "x86_64")]
mod dot_avx512;
pub mod elementwise;
pub mod gemm;
pub mod linear;
pub mod map;
pub mod norm;
pub mod pool;
pub mod reduce;
mod reduce_middle;
pub mod rope;
pub mod rows;
pub mod simd;
mod small;
#[cfg(target_arch = "x86_64")]
mod small_avx512;
#[cfg(target_arch = "x86_64")]
pub mod split;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(target_arch = "x86_64")]
mod tile_avx512;
pub mod tiles;
pub mod transform;
pub mod transpose;
pub mod weight;

pub use attention::{AttnShape, Heads, KvRows, Queries, Rows, attention};
pub use attention_grad::attention_grad;
pub use elementwise::{BinaryOp, UnaryOp, binary, unary};
pub use gemm::{MatRef, add_product, gram, matmul, matmul_batched};
pub use linear::linear;
pub use map::{MapIn, MapOp, MapStep, map};
pub use norm::rms_norm;
pub use pool::{Pool, PoolError, Scratch, ScratchBuf};
pub use reduce_middle::reduce_middle;
pub use rope::{rope, rope_inplace};
pub use simd::Isa;
pub use small::{outer_middle, outer_small};
pub use transform::{hadamard, mode_mul};
pub use transpose::transpose;
pub use weight::{WeightView, dequantize_row, gather_rows};
