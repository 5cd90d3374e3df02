//! What a kernel means: a function in operations of the IR, which every kernel can be held against.

use qrmc_ir::{BinaryOp, Builder, Diag, Elem, Func, Module, Op, ValueId};

use crate::program::{CacheForm, CacheRead, Kernel, Step};

impl Step {
    /// The step as a function of its operands; its results are those of the step.
    ///
    /// # Errors
    /// If the operands do not fit, which lowering does not write.
    pub fn define(&self, module: &Module) -> Result<Func, Diag> {
        let mut b = Builder::new(module, "step");
        let ins: Vec<ValueId> = self.ins.iter().map(|(_, ty)| b.param(None, ty.clone())).collect();
        let b = &mut b;
        let results = match &self.kernel {
            Kernel::Linear(parts) => {
                let of_x = parts.first().map_or(1, |p| p.weight);
                let x = if of_x == 1 { ins[0] } else { b.op1(Op::DCast, &ins[..of_x])? };
                let mut out = Vec::new();
                for p in parts {
                    let y = product(b, x, ins[p.weight])?;
                    out.push(biased(b, y, p.bias.map(|at| &ins[at]))?);
                }
                out
            }
            Kernel::Quantize(spec, rule) => {
                let mut sides = b.op(Op::QParams(*spec, *rule), &ins)?;
                let args: Vec<ValueId> = ins[..1].iter().chain(&sides).copied().collect();
                sides.push(b.op1(Op::QCast(*spec), &args)?);
                sides
            }
            Kernel::CacheAppend(form) => vec![append(b, form, &ins)?],
            Kernel::Map { steps, .. } => {
                let mut values = ins;
                for (op, args) in steps {
                    let args: Vec<ValueId> = args.iter().map(|&a| values[a]).collect();
                    values.push(b.op1(op.clone(), &args)?);
                }
                values.pop().into_iter().collect()
            }
            Kernel::OuterMiddle => {
                let (x, y) = (b.swap_last(ins[0])?, b.swap_last(ins[1])?);
                b.op(Op::Outer, &[x, y])?
            }
            Kernel::OnGrid { .. } => vec![product(b, ins[0], ins[1])?],
            Kernel::Bf16(op) => {
                let mut rounded = Vec::new();
                for v in ins {
                    let half = b.op1(Op::Cast(Elem::BF16), &[v])?;
                    rounded.push(b.op1(Op::Cast(Elem::F32), &[half])?);
                }
                b.op(op.clone(), &rounded)?
            }
            Kernel::Op(op) => b.op(op.clone(), &ins)?,
        };
        Ok(std::mem::replace(b, Builder::new(module, "")).finish(&results))
    }
}

fn product(b: &mut Builder<'_>, x: ValueId, w: ValueId) -> Result<ValueId, Diag> {
    b.op1(Op::MatMul { trans_b: true }, &[x, w])
}

fn biased(b: &mut Builder<'_>, y: ValueId, bias: Option<&ValueId>) -> Result<ValueId, Diag> {
    bias.map_or(Ok(y), |&bias| b.binary(BinaryOp::Add, y, bias))
}

/// New rows of a cache as those who read it see them, behind the rows that it holds.
fn append(b: &mut Builder<'_>, form: &CacheForm, ins: &[ValueId]) -> Result<ValueId, Diag> {
    let sides = if form.spec.zero { 2 } else { 1 };
    let mut row = b.op1(Op::DCast, &ins[1..2 + sides])?;
    for read in &form.reads {
        row = match *read {
            CacheRead::Add { operand } => b.binary(BinaryOp::Add, row, ins[operand])?,
            CacheRead::Rope { attr, operand } => b.op1(Op::Rope(attr), &[row, ins[operand]])?,
            CacheRead::AddTurned { operand, attr, positions, block } => {
                let mut added = b.op1(Op::Rope(attr), &[ins[operand], ins[positions]])?;
                if let Some(block) = block {
                    added = b.op1(Op::Hadamard { block, inverse: false }, &[added])?;
                }
                b.binary(BinaryOp::Add, row, added)?
            }
        };
    }
    b.op1(Op::CacheAppend, &[ins[0], row])
}
