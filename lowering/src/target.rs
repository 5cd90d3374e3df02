//! What a target can run.

use qrmc_ir::{Dim, Grain, Op, QuantSpec, TensorType};

/// Whether a target runs an operation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Legality {
    /// It has a kernel for it.
    Native,
    /// It runs the definition of the operation.
    Expand,
    /// It cannot, and this is why.
    Refuse(String),
}

/// A machine to lower for.
pub trait Target: Sync {
    /// Name on the command line.
    fn name(&self) -> &'static str;

    /// One line for `qrmc targets`.
    fn summary(&self) -> &'static str;

    /// How the target runs `op` on operands and results of these types.
    fn legality(&self, op: &Op, ins: &[&TensorType], outs: &[&TensorType]) -> Legality;

    /// Whether the target multiplies the codes of an activation with those of a packed weight.
    fn multiplies(&self, x: QuantSpec, w: QuantSpec) -> bool;

    /// Whether the target computes a row `[b, s]` of the results of `op` from that row of its operands, with the same bits
    /// whatever rows are computed with it.
    fn by_rows(&self, op: &Op, ins: &[&TensorType]) -> bool;
}

/// CPU: portable kernels with AVX2 and AVX-512 forms chosen at run time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Target for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn summary(&self) -> &'static str {
        "any CPU; AVX2, AVX-512 and AMX kernels chosen at run time; products of packed codes, W2 to W8"
    }

    fn legality(&self, op: &Op, ins: &[&TensorType], outs: &[&TensorType]) -> Legality {
        if let Some(t) = ins.iter().chain(outs).find(|t| t.elem == qrmc_ir::Elem::F64) {
            return Legality::Refuse(format!("operand {t}: kernels compute in f32"));
        }
        let moves = matches!(op, Op::Transpose(_) | Op::Slice { .. } | Op::Concat(_) | Op::CacheAppend);
        if let Some(t) = ins.iter().find(|t| moves && !t.elem.is_float()) {
            return Legality::Refuse(format!("operand {t}: only floats are moved"));
        }
        match op {
            // A clip bound that is shared by groups is elementwise work on a reshaped tensor.
            Op::Edge | Op::Clip(_) => Legality::Expand,
            // One row at every position is native, one for each sequence is not.
            Op::Rope(_) if ins[0].shape != outs[0].shape && ins[0].shape.0[0] != Dim::Fixed(1) => {
                Legality::Expand
            }
            _ => Legality::Native,
        }
    }

    fn multiplies(&self, x: QuantSpec, w: QuantSpec) -> bool {
        match (x.grain, w.grain) {
            (Grain::Token, Grain::Tensor | Grain::Row | Grain::Group(_)) => true,
            (Grain::Tensor, Grain::Tensor | Grain::Row | Grain::Group(_)) => x.signed && !x.zero,
            // Scales of ranks of tensor parallelism: those of the weight do not reach over two of them, or over whole ones.
            (Grain::Group(run), Grain::Tensor | Grain::Row) => run.is_multiple_of(PIECE),
            (Grain::Group(run), Grain::Group(group)) => {
                run.is_multiple_of(PIECE) && run.is_multiple_of(group)
            }
            _ => false,
        }
    }

    fn by_rows(&self, op: &Op, ins: &[&TensorType]) -> bool {
        match op {
            Op::RmsNorm(_) | Op::Silu | Op::Unary(_) | Op::Binary(_) => true,
            Op::Rope(_) => ins[0].shape.0[0] != Dim::Fixed(1),
            Op::FakeQuant(spec, _) => matches!(spec.grain, Grain::Group(_) | Grain::Token),
            // Larger matrices are products whose order depends on the number of rows.
            Op::ModeMul { inner } => {
                *inner > 1 || matches!(ins[1].shape.last(), Some(Dim::Fixed(n)) if n <= MODE)
            }
            Op::Hadamard { block, .. } => {
                block.is_power_of_two() || qrmc_ir::hadamard::core_order(*block).is_some_and(|k| k < *block)
            }
            _ => false,
        }
    }
}

/// Neighbours along the inner dimension that the products of codes take at once.
const PIECE: u32 = 64;
/// Sides of the matrices of a mode product of neighbours that are multiplied in registers.
const MODE: u64 = 64;

/// Every target, in the order of `qrmc targets`.
pub const TARGETS: [&dyn Target; 1] = [&Cpu];
