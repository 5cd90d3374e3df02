//! Operations that are one or two standard operators.

use onnx_protobuf::tensor_proto::DataType;
use qrmc_ir::{BinaryOp, Dim, Elem, Op, ReduceOp, Shape, TensorType, UnaryOp};

use super::proto::{float, int};
use super::walk::Walk;
use super::{FLOAT, Form, OnnxError};

impl Walk<'_> {
    /// The result of an operation on tensors of these types; `None` if it has no form of its own.
    pub(super) fn primitive(
        &mut self,
        op: &Op,
        ins: &[&str],
        tys: &[&TensorType],
    ) -> Result<Option<String>, OnnxError> {
        let g = &mut self.g;
        Ok(Some(match op {
            Op::Const { shape, data } => {
                let dims: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
                let data: Vec<f32> = data.iter().map(|x| x.0 as f32).collect();
                g.floats(&dims, &data)
            }
            Op::Unary(UnaryOp::Rsqrt) => {
                let root = g.op("Sqrt", ins);
                g.op("Reciprocal", &[&root])
            }
            Op::Unary(op) => g.op(unary(*op), ins),
            Op::Binary(BinaryOp::Ge) => {
                let y = g.op("GreaterOrEqual", ins);
                g.cast(&y, FLOAT)
            }
            Op::Binary(op) => g.op(binary(*op), ins),
            Op::Reduce(op, axis) => {
                let axes = g.ints(&[i64::from(*axis)]);
                g.op_with(reduce(*op), &[ins[0], &axes], vec![int("keepdims", 1)])
            }
            Op::MatMul { trans_b: false } => g.op("MatMul", ins),
            Op::Cast(to) => match to {
                Elem::F32 if tys[0].elem.is_float() => ins[0].to_owned(),
                Elem::F32 => g.cast(ins[0], FLOAT),
                Elem::F16 | Elem::BF16 => rounded(g, ins[0], *to),
                Elem::I32 => g.cast(ins[0], DataType::INT32),
                _ => return Ok(None),
            },
            Op::Reshape(to) => match reshape(&tys[0].shape, to) {
                Some(sizes) => g.reshape(ins[0], &sizes),
                None => return Ok(None),
            },
            Op::Transpose(perm) => {
                let perm: Vec<i64> = perm.iter().map(|&p| i64::from(p)).collect();
                g.transpose(ins[0], &perm)
            }
            Op::Slice { axis, start, len } => {
                let [start, end] = [*start, *start + *len].map(|n| g.ints(&[n as i64]));
                let axes = g.ints(&[i64::from(*axis)]);
                g.op("Slice", &[ins[0], &start, &end, &axes])
            }
            Op::Concat(axis) => g.op_with("Concat", ins, vec![int("axis", i64::from(*axis))]),
            Op::BroadcastLike => {
                let shape = g.op("Shape", &[ins[1]]);
                g.op("Expand", &[ins[0], &shape])
            }
            Op::Softmax => g.op_with("Softmax", ins, vec![int("axis", -1)]),
            Op::RmsNorm(eps) if self.form == Form::Ort => {
                let gain = self.gain(ins[1], tys[0], tys[1]);
                let attributes = vec![int("axis", -1), float("epsilon", eps.0 as f32)];
                self.g.op_with("SimplifiedLayerNormalization", &[ins[0], &gain], attributes)
            }
            Op::ModeMul { inner: 1 } if tys[1].shape.rank() == 2 => self.mode_mul(ins, tys),
            _ => return Ok(None),
        }))
    }

    /// The gain of a norm, one for each channel.
    fn gain(&mut self, gain: &str, x: &TensorType, ty: &TensorType) -> String {
        if x.shape.last() == ty.shape.last() {
            return gain.to_owned();
        }
        let n = self.g.ints(&[x.shape.last().and_then(Dim::fixed).unwrap_or(1) as i64]);
        self.g.op("Expand", &[gain, &n])
    }

    /// The matrix at the right of each run of channels.
    fn mode_mul(&mut self, ins: &[&str], tys: &[&TensorType]) -> String {
        let size = tys[1].shape.last().and_then(Dim::fixed).unwrap_or(1);
        let width = tys[0].shape.last().and_then(Dim::fixed).unwrap_or(0);
        if size == width {
            return self.g.op("MatMul", ins);
        }
        let lead = vec![0; tys[0].shape.rank().saturating_sub(1)];
        let runs = [(width / size) as i64, size as i64];
        let x = self.g.reshape(ins[0], &[&lead[..], &runs].concat());
        let y = self.g.op("MatMul", &[&x, ins[1]]);
        self.g.reshape(&y, &[&lead[..], &[width as i64]].concat())
    }
}

/// `x` rounded to a 16-bit type, as `f32`.
pub(super) fn rounded(g: &mut super::graph::Graph, x: &str, to: Elem) -> String {
    let ty = if to == Elem::F16 { DataType::FLOAT16 } else { DataType::BFLOAT16 };
    let y = g.cast(x, ty);
    g.cast(&y, FLOAT)
}

/// The operand of `Reshape`: 0 for sizes that stay in their place, and one -1 for a symbol elsewhere.
fn reshape(from: &Shape, to: &Shape) -> Option<Vec<i64>> {
    let same = from.0.iter().zip(&to.0).take_while(|(a, b)| a == b).count();
    let (kept, rest) = to.0.split_at(same);
    let mut open = 0;
    let rest = rest.iter().map(|d| match d {
        Dim::Fixed(n) => *n as i64,
        Dim::Sym(_) => {
            open += 1;
            -1
        }
    });
    let sizes = kept.iter().map(|_| 0).chain(rest).collect();
    if open <= 1 { Some(sizes) } else { None }
}

fn unary(op: UnaryOp) -> &'static str {
    match op {
        UnaryOp::Neg => "Neg",
        UnaryOp::Abs => "Abs",
        UnaryOp::Exp => "Exp",
        UnaryOp::Log => "Log",
        UnaryOp::Sqrt => "Sqrt",
        UnaryOp::Rsqrt | UnaryOp::Recip => "Reciprocal",
        UnaryOp::Sigmoid => "Sigmoid",
        UnaryOp::Cos => "Cos",
        UnaryOp::Sin => "Sin",
    }
}

fn binary(op: BinaryOp) -> &'static str {
    match op {
        BinaryOp::Add => "Add",
        BinaryOp::Sub => "Sub",
        BinaryOp::Mul => "Mul",
        BinaryOp::Div => "Div",
        BinaryOp::Max => "Max",
        BinaryOp::Min => "Min",
        BinaryOp::Ge => "GreaterOrEqual",
    }
}

fn reduce(op: ReduceOp) -> &'static str {
    match op {
        ReduceOp::Sum => "ReduceSum",
        ReduceOp::Mean => "ReduceMean",
        ReduceOp::Max => "ReduceMax",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrmc_ir::Sym;

    #[test]
    fn sizes_that_stay_are_kept_and_one_is_found() {
        let (b, s, t) = (Dim::Sym(Sym::B), Dim::Sym(Sym::S), Dim::Sym(Sym::T));
        let n = Dim::Fixed;
        let of = |from: &[Dim], to: &[Dim]| reshape(&Shape(from.to_vec()), &Shape(to.to_vec()));
        assert_eq!(of(&[b, s, n(8)], &[b, s, n(2), n(4)]), Some(vec![0, 0, 2, 4]));
        assert_eq!(of(&[n(1), s, n(8)], &[n(1), s, n(2), n(4)]), Some(vec![0, 0, 2, 4]));
        assert_eq!(of(&[s], &[s, n(1)]), Some(vec![0, 1]));
        assert_eq!(of(&[n(2), b, n(4)], &[n(8), b]), Some(vec![8, -1]));
        assert_eq!(of(&[n(2), b, t], &[b, t, n(2)]), None);
    }
}
