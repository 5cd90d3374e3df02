//! What a target can run.

use qrmc_ir::{Op, TensorType};

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
}

/// CPU: portable kernels with AVX2 and AVX-512 forms chosen at run time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Target for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn summary(&self) -> &'static str {
        "any CPU; AVX2 and AVX-512 kernels chosen at run time; weight-only W2 to W8 from packed codes"
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
            // Positions that are broadcast, which only the definition does.
            Op::Rope(_) if ins[0].shape != outs[0].shape => Legality::Expand,
            _ => Legality::Native,
        }
    }
}

/// Every target, in the order of `qrmc targets`.
pub const TARGETS: [&dyn Target; 1] = [&Cpu];
