//! What a kernel means: a function in operations of the IR, which every kernel can be held against.

use qrmc_ir::{BinaryOp, Builder, Diag, Elem, Func, Grain, Module, Op, UnaryOp, ValueId};

use crate::kernel::{CacheForm, CacheRead, Kernel, LinearPart};
use crate::program::Step;

impl Step {
    /// The step as a function of its operands; its results are those of the step.
    ///
    /// # Errors
    /// If the operands do not fit, which lowering does not write.
    pub fn define(&self, module: &Module) -> Result<Func, Diag> {
        let (mut b, ins) = self.params(module);
        let results = kernel(&mut b, &self.kernel, ins)?;
        Ok(b.finish(&results))
    }

    /// For a step of linear layers, the same with the magnitudes of all factors: the size of what is summed, which floats that
    /// add it in another order are within a share of. Codes with a zero point may be summed less the middle of their range,
    /// and the rest be made up for afterwards: they count with half their range besides.
    ///
    /// # Errors
    /// As [`Step::define`].
    pub fn magnitudes(&self, module: &Module) -> Result<Option<Func>, Diag> {
        let Kernel::Linear(parts) = &self.kernel else { return Ok(None) };
        let (mut b, ins) = self.params(module);
        let middle = match self.ins[0].1.elem {
            Elem::Quant(spec) if spec.zero && spec.grain == Grain::Token => {
                Some((ins[1], f64::from(1u32 << (spec.bits - 1))))
            }
            _ => None,
        };
        let of_x = |b: &mut Builder<'_>, x: ValueId| {
            let x = b.op1(Op::Unary(UnaryOp::Abs), &[x])?;
            let Some((scale, codes)) = middle else { return Ok(x) };
            let codes = b.scalar(codes);
            let half = b.binary(BinaryOp::Mul, scale, codes)?;
            b.binary(BinaryOp::Add, x, half)
        };
        let results = linear(&mut b, parts, &ins, of_x, |b, v| b.op1(Op::Unary(UnaryOp::Abs), &[v]))?;
        Ok(Some(b.finish(&results)))
    }

    fn params<'m>(&self, module: &'m Module) -> (Builder<'m>, Vec<ValueId>) {
        let mut b = Builder::new(module, "step");
        let ins = self.ins.iter().map(|(_, ty)| b.param(None, ty.clone())).collect();
        (b, ins)
    }
}

/// What a kernel computes from its operands.
fn kernel(b: &mut Builder<'_>, kernel: &Kernel, ins: Vec<ValueId>) -> Result<Vec<ValueId>, Diag> {
    Ok(match kernel {
        Kernel::Linear(parts) => linear(b, parts, &ins, |_, x| Ok(x), |_, w| Ok(w))?,
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
        Kernel::Rows { steps, outs, .. } => {
            let mut values = ins;
            for step in steps {
                let mut args = Vec::new();
                for (v, ty) in &step.ins {
                    let same = b.ty(values[*v]).shape == ty.shape;
                    args.push(match same {
                        true => values[*v],
                        false => b.op1(Op::Reshape(ty.shape.clone()), &[values[*v]])?,
                    });
                }
                values.extend(self::kernel(b, &step.kernel, args)?);
            }
            outs.iter().map(|&v| values[v]).collect()
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
    })
}

/// Linear layers, of what `of_x` makes of their input, and `of` of their weights and biases.
fn linear(
    b: &mut Builder<'_>,
    parts: &[LinearPart],
    ins: &[ValueId],
    of_x: impl Fn(&mut Builder<'_>, ValueId) -> Result<ValueId, Diag>,
    of: impl Fn(&mut Builder<'_>, ValueId) -> Result<ValueId, Diag>,
) -> Result<Vec<ValueId>, Diag> {
    let count = parts.first().map_or(1, |p| p.weight);
    let x = if count == 1 { ins[0] } else { b.op1(Op::DCast, &ins[..count])? };
    let x = of_x(b, x)?;
    let mut out = Vec::new();
    for p in parts {
        let w = of(b, ins[p.weight])?;
        let mut y = product(b, x, w)?;
        for at in p.bias.into_iter().chain(p.add) {
            let added = of(b, ins[at])?;
            y = b.binary(BinaryOp::Add, y, added)?;
        }
        out.push(y);
    }
    Ok(out)
}

fn product(b: &mut Builder<'_>, x: ValueId, w: ValueId) -> Result<ValueId, Diag> {
    b.op1(Op::MatMul { trans_b: true }, &[x, w])
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
