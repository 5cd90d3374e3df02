//! The reference interpreter: slow, clear, the oracle.
//!
//! Large operations run as their definition. Each primitive is evaluated in `f64` from its operands and rounded to the
//! type of its result, so its error is at most half a unit in the last place an operation; quantization uses
//! [`crate::grid`] on the `f32` values, as every engine does.

use ndarray::{Array2, ArrayD, ArrayView2, Axis, IxDyn, Slice};

use crate::diag::{Diag, Place};
use crate::expand::expand_func;
use crate::module::{Func, Module, Node, ValueId};
use crate::op::{BinaryOp, Op, ReduceOp, UnaryOp};
use crate::tensor::{Data, Tensor};
use crate::types::{DimEnv, Elem};
use crate::weight::WeightSource;

mod runs;

use runs::matrix_of;

/// Runs a function on tensors and gives the wanted values (by default pass `&func.results`).
///
/// # Errors
/// If arguments do not fit the parameters, a weight cannot be read, or the function is ill-typed.
pub fn run(
    module: &Module,
    func: &Func,
    weights: &dyn WeightSource,
    args: &[Tensor],
    wanted: &[ValueId],
) -> Result<Vec<Tensor>, Diag> {
    let dims = bind_dims(func, args)?;
    // Values that expansion would hide are kept by making them results.
    let mut watched = func.clone();
    watched.results = wanted.to_vec();
    let flat = expand_func(module, &watched)?;
    let mut values: Vec<Option<Tensor>> = vec![None; flat.value_count()];
    for (&p, arg) in flat.params.iter().zip(args) {
        values[p.0 as usize] = Some(arg.clone());
    }
    for node in &flat.nodes {
        let place = || Place {
            func: Some(func.name.clone()),
            value: node.outs.first().map(|&o| flat.show(o).to_string()),
            line: None,
        };
        let outs = match &node.op {
            Op::Weight(id) => {
                let name = &module.weight(*id).name;
                vec![weights.read(name).map_err(|e| Diag::new("Q0401", e.to_string()).at(place()))?]
            }
            Op::Call(id) => {
                let args: Vec<Tensor> =
                    node.ins.iter().filter_map(|v| values[v.0 as usize].clone()).collect();
                let callee = module.func(*id);
                run(module, callee, weights, &args, &callee.results)?
            }
            _ => {
                let ins: Vec<&Tensor> =
                    node.ins.iter().filter_map(|v| values[v.0 as usize].as_ref()).collect();
                eval(&flat, node, &ins, &dims)
            }
        };
        for (o, t) in node.outs.iter().zip(outs) {
            values[o.0 as usize] = Some(t);
        }
    }
    Ok(flat.results.iter().filter_map(|r| values[r.0 as usize].clone()).collect())
}

/// The values of `B`, `S` and `P` under which the arguments have the types of the parameters.
///
/// # Errors
/// If the number, an element type or a size does not fit.
pub fn bind_dims(func: &Func, args: &[Tensor]) -> Result<DimEnv, Diag> {
    use crate::types::{Dim, Sym};
    let fault = |m: String| {
        Err(Diag::new("Q0402", m).at(Place { func: Some(func.name.clone()), ..Place::default() }))
    };
    if args.len() != func.params.len() {
        return fault(format!("{} arguments for {} parameters", args.len(), func.params.len()));
    }
    let mut seen: [Option<usize>; 4] = [None; 4];
    for (&p, arg) in func.params.iter().zip(args) {
        let ty = func.ty(p);
        let fits = arg.represents(ty.elem)
            && arg.shape().len() == ty.shape.rank()
            && ty.shape.0.iter().zip(arg.shape()).all(|(&d, &n)| match d {
                Dim::Fixed(want) => want == n as u64,
                Dim::Sym(s) => *seen[s as usize].get_or_insert(n) == n,
            });
        if !fits {
            return fault(format!("argument {} is {}{:?}, not {ty}", func.show(p), arg.elem(), arg.shape()));
        }
    }
    let get = |s: Sym| seen[s as usize];
    let seq = get(Sym::S).unwrap_or(1);
    let past = get(Sym::P).or_else(|| get(Sym::T)?.checked_sub(seq)).unwrap_or(0);
    Ok(DimEnv { batch: get(Sym::B).unwrap_or(1), seq, past })
}

fn wide(t: &Tensor) -> ArrayD<f64> {
    let v: Vec<f64> = match t.data() {
        Data::F32(v) => v.iter().map(|&x| f64::from(x)).collect(),
        Data::F64(v) => v.clone(),
        Data::I32(v) => v.iter().map(|&x| f64::from(x)).collect(),
        Data::I8(v) => v.iter().map(|&x| f64::from(x)).collect(),
        Data::U8(v) => v.iter().map(|&x| f64::from(x)).collect(),
    };
    ArrayD::from_shape_vec(IxDyn(t.shape()), v).unwrap_or_else(|_| unreachable!("a tensor fills its shape"))
}

fn narrow(a: ArrayD<f64>, elem: Elem) -> Tensor {
    let shape = a.shape().to_vec();
    let v: Vec<f64> =
        if a.is_standard_layout() { a.into_raw_vec_and_offset().0 } else { a.iter().copied().collect() };
    let data = match elem {
        Elem::F64 => Data::F64(v),
        Elem::I32 => Data::I32(v.into_iter().map(|x| x as i32).collect()),
        Elem::I8 => Data::I8(v.into_iter().map(|x| x as i8).collect()),
        Elem::U8 => Data::U8(v.into_iter().map(|x| x as u8).collect()),
        Elem::F16 => Data::F32(v.into_iter().map(|x| half::f16::from_f64(x).to_f32()).collect()),
        Elem::BF16 => Data::F32(v.into_iter().map(|x| half::bf16::from_f64(x).to_f32()).collect()),
        Elem::F32 | Elem::Quant(_) => Data::F32(v.into_iter().map(|x| x as f32).collect()),
    };
    Tensor::new(shape, data)
}

fn eval(func: &Func, node: &Node, ins: &[&Tensor], dims: &DimEnv) -> Vec<Tensor> {
    let ty = func.ty(node.outs[0]);
    let shape = ty.shape.resolve(dims);
    let y = match &node.op {
        Op::Const { data, .. } => {
            let v = data.iter().map(|x| x.0).collect();
            ArrayD::from_shape_vec(IxDyn(&shape), v).unwrap_or_else(|_| unreachable!("verified literal"))
        }
        Op::Unary(op) => wide(ins[0]).mapv(unary(*op)),
        Op::Binary(op) => binary(*op, &wide(ins[0]), &wide(ins[1]), &shape),
        Op::Reduce(op, axis) => reduce(*op, &wide(ins[0]), Axis(usize::from(*axis))),
        Op::MatMul { trans_b } => matmul(&wide(ins[0]), &wide(ins[1]), *trans_b, &shape),
        Op::Cast(_) => wide(ins[0]),
        Op::Reshape(_) => return vec![ins[0].clone().reshaped(shape)],
        Op::Transpose(perm) => {
            let axes: Vec<usize> = perm.iter().map(|&p| usize::from(p)).collect();
            wide(ins[0]).permuted_axes(IxDyn(&axes))
        }
        Op::Slice { axis, start, len } => {
            let range = Slice::from(*start as usize..(*start + *len) as usize);
            wide(ins[0]).slice_axis(Axis(usize::from(*axis)), range).to_owned()
        }
        Op::Concat(axis) => {
            let (a, b) = (wide(ins[0]), wide(ins[1]));
            ndarray::concatenate(Axis(usize::from(*axis)), &[a.view(), b.view()])
                .unwrap_or_else(|_| unreachable!("verified shapes"))
        }
        Op::Gather => gather(&wide(ins[0]), ins[1], &shape),
        Op::CausalMask { square } => ArrayD::from_shape_fn(IxDyn(&shape), |ix| {
            let past = if *square { 0 } else { dims.past };
            if ix[1] <= past + ix[0] { 0.0 } else { f64::NEG_INFINITY }
        }),
        Op::BroadcastLike => {
            let x = wide(ins[0]);
            x.broadcast(IxDyn(&shape)).unwrap_or_else(|| unreachable!("verified shapes")).to_owned()
        }
        Op::Outer => {
            let rows = |t: &Tensor| {
                let (r, c) = matrix_of(t);
                Array2::from_shape_vec((r, c), wide(t).into_raw_vec_and_offset().0)
                    .unwrap_or_else(|_| unreachable!("a tensor fills its shape"))
            };
            rows(ins[0]).reversed_axes().dot(&rows(ins[1])).into_dyn()
        }
        Op::Inverse => {
            let mut v = wide(ins[0]).into_raw_vec_and_offset().0;
            let n = shape.last().copied().unwrap_or(1);
            v.chunks_mut((n * n).max(1)).for_each(|m| crate::linalg::invert(m, n));
            ArrayD::from_shape_vec(IxDyn(&shape), v).unwrap_or_else(|_| unreachable!("same shape"))
        }
        Op::ClipRange(spec) => return vec![runs::clip_range(ins, *spec)],
        Op::ClipRangeGrad(spec) => return runs::clip_range_grad(ins, *spec),
        Op::FakeQuantGrad(spec, rule) => return runs::fake_quant_grad(ins, *spec, *rule),
        Op::QParams(spec, rule) => return runs::qparams(ins, *spec, *rule),
        Op::QCast(spec) => return vec![runs::qcast(ins, *spec)],
        Op::DCast => return vec![runs::dcast(func, node, ins)],
        Op::Weight(_)
        | Op::Call(_)
        | Op::Silu
        | Op::RmsNorm(_)
        | Op::Softmax
        | Op::Rope(_)
        | Op::Attention(_)
        | Op::AttentionGrad(_)
        | Op::ModeMul { .. }
        | Op::Hadamard { .. }
        | Op::CacheAppend
        | Op::Edge
        | Op::Clip(_)
        | Op::FakeQuant(..) => unreachable!("expanded or handled by the caller"),
    };
    vec![narrow(y, ty.elem)]
}

fn unary(op: UnaryOp) -> fn(f64) -> f64 {
    match op {
        UnaryOp::Neg => |x| -x,
        UnaryOp::Abs => f64::abs,
        UnaryOp::Exp => f64::exp,
        UnaryOp::Log => f64::ln,
        UnaryOp::Sqrt => f64::sqrt,
        UnaryOp::Rsqrt => |x| 1.0 / x.sqrt(),
        UnaryOp::Recip => f64::recip,
        UnaryOp::Sigmoid => |x| 1.0 / (1.0 + (-x).exp()),
        UnaryOp::Cos => f64::cos,
        UnaryOp::Sin => f64::sin,
    }
}

fn binary(op: BinaryOp, a: &ArrayD<f64>, b: &ArrayD<f64>, shape: &[usize]) -> ArrayD<f64> {
    let f = match op {
        BinaryOp::Add => |x: f64, y: f64| x + y,
        BinaryOp::Sub => |x: f64, y: f64| x - y,
        BinaryOp::Mul => |x: f64, y: f64| x * y,
        BinaryOp::Div => |x: f64, y: f64| x / y,
        BinaryOp::Max => f64::max,
        BinaryOp::Min => f64::min,
        BinaryOp::Ge => |x, y| f64::from(u8::from(x >= y)),
    };
    let mut out = ArrayD::zeros(IxDyn(shape));
    ndarray::Zip::from(&mut out).and_broadcast(a).and_broadcast(b).for_each(|o, &x, &y| *o = f(x, y));
    out
}

fn reduce(op: ReduceOp, x: &ArrayD<f64>, axis: Axis) -> ArrayD<f64> {
    let y = match op {
        ReduceOp::Sum => x.sum_axis(axis),
        ReduceOp::Mean => x.sum_axis(axis) / x.len_of(axis).max(1) as f64,
        ReduceOp::Max => x.fold_axis(axis, f64::NEG_INFINITY, |&m, &v| m.max(v)),
    };
    y.insert_axis(axis)
}

fn matmul(a: &ArrayD<f64>, b: &ArrayD<f64>, trans_b: bool, shape: &[usize]) -> ArrayD<f64> {
    let (lead, mn) = shape.split_at(shape.len() - 2);
    let with_lead = |x: &ArrayD<f64>| {
        let mut full = lead.to_vec();
        full.extend(&x.shape()[x.ndim() - 2..]);
        let rows: usize = full.iter().product();
        let x = x.broadcast(IxDyn(&full)).unwrap_or_else(|| unreachable!("verified batches")).to_owned();
        let batch: usize = lead.iter().product();
        (x.into_raw_vec_and_offset().0, rows / batch.max(1))
    };
    let (k, batch) = (a.shape()[a.ndim() - 1], lead.iter().product::<usize>());
    let ((av, asize), (bv, bsize)) = (with_lead(a), with_lead(b));
    let mut out = Vec::with_capacity(shape.iter().product());
    for i in 0..batch {
        let view = |v: &[f64], size: usize, r: usize, c: usize| -> Array2<f64> {
            ArrayView2::from_shape((r, c), &v[i * size..(i + 1) * size])
                .unwrap_or_else(|_| unreachable!("verified sizes"))
                .to_owned()
        };
        let x = view(&av, asize, mn[0], k);
        let w = if trans_b { view(&bv, bsize, mn[1], k).reversed_axes() } else { view(&bv, bsize, k, mn[1]) };
        out.extend(x.dot(&w).iter());
    }
    ArrayD::from_shape_vec(IxDyn(shape), out).unwrap_or_else(|_| unreachable!("verified sizes"))
}

fn gather(table: &ArrayD<f64>, ids: &Tensor, shape: &[usize]) -> ArrayD<f64> {
    let ids = ids.as_i32().unwrap_or(&[]);
    let rows = table.shape()[0];
    // An index outside the table yields NaN, which no later check can miss.
    let row = |i: i32| usize::try_from(i).ok().filter(|&i| i < rows);
    let n = shape.last().copied().unwrap_or(1);
    let mut out = Vec::with_capacity(ids.len() * n);
    for &i in ids {
        match row(i) {
            Some(r) => out.extend(table.index_axis(Axis(0), r).iter()),
            None => out.extend(std::iter::repeat_n(f64::NAN, n)),
        }
    }
    ArrayD::from_shape_vec(IxDyn(shape), out).unwrap_or_else(|_| unreachable!("verified sizes"))
}
