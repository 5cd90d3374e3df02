//! Every rule against central differences, in `f64`-accurate evaluation by the interpreter on smooth data.

use qrmc_ir::{
    AttnAttr, BinaryOp, Builder, Dim, Elem, Func, Grain, ModelFacts, Module, NoWeights, Op, QuantSpec, Real,
    ReduceOp, RopeAttr, RopeScaling, Rule, Shape, Sym, Tensor, TensorType, UnaryOp, ValueId, interp,
};

use super::{GradOptions, grad};

fn noise(seed: u64, n: usize) -> Vec<f64> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
        })
        .collect()
}

/// Builds `sum(weights * f(params))`, and compares the gradient of every parameter with central differences.
fn check(
    what: &str,
    params: &[(TensorType, Vec<usize>)],
    shift: f64,
    build: impl Fn(&mut Builder<'_>, &[ValueId]) -> ValueId,
) {
    let module = Module::new(ModelFacts::default());
    let mut b = Builder::new(&module, "f");
    let ids: Vec<ValueId> = params.iter().map(|(ty, _)| b.param(None, ty.clone())).collect();
    let y = build(&mut b, &ids);
    // A fixed weight for each element makes every partial derivative count: y * cos(y) would hide none either, but
    // its slope varies too fast for differences.
    let seven = b.scalar(0.7);
    let t = b.binary(BinaryOp::Mul, y, seven).unwrap();
    let t = b.op1(Op::Unary(UnaryOp::Sin), &[t]).unwrap();
    let mut loss = b.binary(BinaryOp::Add, t, y).unwrap();
    for axis in (0..b.ty(loss).shape.rank()).rev() {
        loss = b.op1(Op::Reduce(ReduceOp::Sum, axis as u8), &[loss]).unwrap();
    }
    let f = b.finish(&[loss]);
    let args: Vec<Tensor> = params
        .iter()
        .enumerate()
        .map(|(i, (ty, shape))| {
            let v = noise(i as u64 + 3, shape.iter().product());
            match ty.elem {
                Elem::I32 => Tensor::i32(shape.clone(), (0..v.len() as i32).collect()),
                Elem::F64 => {
                    Tensor::new(shape.clone(), qrmc_ir::Data::F64(v.iter().map(|x| x + shift).collect()))
                }
                _ => Tensor::f32(shape.clone(), v.iter().map(|x| (x + shift) as f32).collect()),
            }
        })
        .collect();
    let wrt: Vec<usize> = (0..params.len()).filter(|&i| params[i].0.elem.is_float()).collect();
    let g = grad(&module, &f, &wrt, &GradOptions::default()).unwrap_or_else(|d| panic!("{what}: {d}"));
    let run = |f: &Func, args: &[Tensor]| interp::run(&module, f, &NoWeights, args, &f.results).unwrap();
    let number = |t: &Tensor, i: usize| match t.data() {
        qrmc_ir::Data::F64(v) => v[i],
        qrmc_ir::Data::F32(v) => f64::from(v[i]),
        _ => panic!("no floats"),
    };
    let grads = run(&g, &args);
    for (&p, g) in wrt.iter().zip(&grads[1..]) {
        assert_eq!(g.shape(), args[p].shape(), "{what}: gradient of parameter {p}");
        for i in 0..args[p].len() {
            let h = 1e-6;
            let moved = |d: f64| {
                let mut args = args.clone();
                let mut v: Vec<f64> = (0..args[p].len()).map(|j| number(&args[p], j)).collect();
                v[i] += d;
                args[p] = Tensor::new(args[p].shape(), qrmc_ir::Data::F64(v));
                number(&run(&f, &args)[0], 0)
            };
            let want = (moved(h) - moved(-h)) / (2.0 * h);
            let have = number(g, i);
            assert!(
                (have - want).abs() < 2e-6 * (1.0 + want.abs()),
                "{what}: d/dp{p}[{i}] is {have}, not {want}"
            );
        }
    }
}

fn ty(shape: &[usize]) -> (TensorType, Vec<usize>) {
    (TensorType::new(Elem::F64, shape.iter().map(|&n| Dim::from(n)).collect::<Vec<_>>()), shape.to_vec())
}

/// `[B, S, n]`
fn rows(batch: usize, seq: usize, n: usize) -> (TensorType, Vec<usize>) {
    let dims = vec![Sym::B.into(), Sym::S.into(), Dim::from(n)];
    (TensorType::new(Elem::F64, dims), vec![batch, seq, n])
}

#[test]
fn elementwise() {
    for u in [
        UnaryOp::Neg,
        UnaryOp::Abs,
        UnaryOp::Exp,
        UnaryOp::Sigmoid,
        UnaryOp::Cos,
        UnaryOp::Sin,
        UnaryOp::Log,
        UnaryOp::Sqrt,
        UnaryOp::Rsqrt,
        UnaryOp::Recip,
    ] {
        check(&format!("{u:?}"), &[ty(&[3, 4])], 2.0, |b, p| b.op1(Op::Unary(u), &[p[0]]).unwrap());
    }
    for op in [BinaryOp::Add, BinaryOp::Sub, BinaryOp::Mul, BinaryOp::Div, BinaryOp::Max, BinaryOp::Min] {
        for (x, y) in [(&[3, 4][..], &[3, 4][..]), (&[2, 3, 4], &[4]), (&[3, 1], &[2, 3, 4]), (&[1], &[3, 4])]
        {
            check(&format!("{op:?} {x:?} {y:?}"), &[ty(x), ty(y)], 1.5, |b, p| {
                b.binary(op, p[0], p[1]).unwrap()
            });
        }
    }
}

#[test]
fn shapes_and_sums() {
    for r in [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Max] {
        for axis in 0..3 {
            check(&format!("{r:?} {axis}"), &[rows(2, 3, 4)], 0.0, |b, p| {
                b.op1(Op::Reduce(r, axis), p).unwrap()
            });
        }
    }
    check("transpose", &[ty(&[2, 3, 4])], 0.0, |b, p| b.op1(Op::Transpose(vec![2, 0, 1]), p).unwrap());
    check("reshape", &[ty(&[2, 6])], 0.0, |b, p| b.op1(Op::Reshape(Shape::fixed(&[3, 4])), p).unwrap());
    check("slice", &[ty(&[2, 6])], 0.0, |b, p| b.op1(Op::Slice { axis: 1, start: 2, len: 3 }, p).unwrap());
    check("concat", &[ty(&[2, 3]), ty(&[2, 2])], 0.0, |b, p| b.op1(Op::Concat(1), p).unwrap());
    check("like", &[ty(&[1, 3]), ty(&[4, 3])], 0.0, |b, p| b.op1(Op::BroadcastLike, p).unwrap());
}

#[test]
fn products() {
    for trans_b in [false, true] {
        let w = if trans_b { [4, 3] } else { [3, 4] };
        check("matmul rows", &[rows(2, 5, 3), ty(&w)], 0.0, |b, p| b.op1(Op::MatMul { trans_b }, p).unwrap());
        let w = if trans_b { [2, 4, 3] } else { [2, 3, 4] };
        check("matmul batch", &[ty(&[2, 5, 3]), ty(&w)], 0.0, |b, p| {
            b.op1(Op::MatMul { trans_b }, p).unwrap()
        });
        let w = if trans_b { [2, 1, 4, 3] } else { [2, 1, 3, 4] };
        check("matmul broadcast", &[ty(&[2, 3, 5, 3]), ty(&w)], 0.0, |b, p| {
            b.op1(Op::MatMul { trans_b }, p).unwrap()
        });
    }
}

#[test]
fn transforms() {
    check("inverse", &[ty(&[3, 3])], 0.5, |b, p| {
        let eye = b.literal(&[3, 3], &[2.0, 0.0, 0.0, 0.0, 2.5, 0.0, 0.0, 0.0, 3.0]);
        let m = b.binary(BinaryOp::Add, p[0], eye).unwrap();
        b.op1(Op::Inverse, &[m]).unwrap()
    });
    check("inverses", &[ty(&[2, 2, 2])], 0.0, |b, p| {
        let eye = b.literal(&[2, 2], &[2.0, 0.0, 0.0, 2.5]);
        let m = b.binary(BinaryOp::Add, p[0], eye).unwrap();
        b.op1(Op::Inverse, &[m]).unwrap()
    });
    for (n, m, inner) in [
        (6, vec![3, 3], 1),
        (6, vec![2, 2], 3),
        (12, vec![2, 2], 3),
        (12, vec![2, 3, 3], 2),
        (12, vec![2, 2, 2], 1),
    ] {
        check(&format!("mode_mul {n} {m:?} {inner}"), &[rows(2, 3, n), ty(&m)], 0.0, |b, p| {
            b.op1(Op::ModeMul { inner }, p).unwrap()
        });
    }
    for inverse in [false, true] {
        check("hadamard", &[rows(1, 2, 24)], 0.0, |b, p| {
            b.op1(Op::Hadamard { block: 12, inverse }, &[p[0]]).unwrap()
        });
    }
}

#[test]
fn layers() {
    check("silu", &[ty(&[2, 3])], 0.0, |b, p| b.op1(Op::Silu, p).unwrap());
    check("softmax", &[ty(&[2, 5])], 0.0, |b, p| b.op1(Op::Softmax, p).unwrap());
    check("rms_norm", &[rows(1, 2, 5), ty(&[5])], 0.3, |b, p| b.op1(Op::RmsNorm(Real(1e-5)), p).unwrap());
    let rope = RopeAttr { head_dim: 4, theta: Real(100.0), scaling: RopeScaling::None };
    let pos = (TensorType::new(Elem::I32, vec![Sym::S.into()]), vec![3]);
    check("rope", &[rows(2, 3, 8), pos.clone()], 0.0, |b, p| b.op1(Op::Rope(rope), p).unwrap());
    check("rope of a row", &[ty(&[1, 1, 8]), pos], 0.0, |b, p| b.op1(Op::Rope(rope), p).unwrap());
    let attr = AttnAttr { heads: 4, kv_heads: 2, scale: Real(0.5) };
    check("attention", &[rows(2, 3, 8), rows(2, 3, 4), rows(2, 3, 4)], 0.0, |b, p| {
        b.op1(Op::Attention(attr), p).unwrap()
    });
}

#[test]
fn rounding_is_straight_through() {
    // With 8 bits a step of the grid is far above the differences, so that only what is not rounded moves: the ends of
    // the range. Gradients through the rounding itself are tested against frozen residuals in `qrmc_ir::grid`.
    let module = Module::new(ModelFacts::default());
    let mut b = Builder::new(&module, "f");
    let x = b.param(None, TensorType::new(Elem::F32, [2usize, 8]));
    let spec = QuantSpec::asym(8, Grain::Token);
    let y = b.op1(Op::FakeQuant(spec, Rule::Dynamic), &[x]).unwrap();
    let loss = b.op1(Op::Reduce(ReduceOp::Sum, 1), &[y]).unwrap();
    let loss = b.op1(Op::Reduce(ReduceOp::Sum, 0), &[loss]).unwrap();
    let f = b.finish(&[loss]);
    let g = grad(&module, &f, &[0], &GradOptions::default()).unwrap();
    let x = Tensor::f32([2, 8], noise(9, 16).iter().map(|x| *x as f32).collect());
    let out = interp::run(&module, &g, &NoWeights, &[x], &g.results).unwrap();
    // Every element but the ends of its row has a slope of one.
    let ones = out[1].as_f32().unwrap().iter().filter(|d| **d == 1.0).count();
    assert_eq!(ones, 12, "{:?}", out[1]);
}

#[test]
fn factors_of_gradients_of_linear_layers_may_be_rounded() {
    let module = Module::new(ModelFacts::default());
    let mut b = Builder::new(&module, "f");
    let x = b.param(None, TensorType::new(Elem::F32, [2usize, 3, 8]));
    let w = b.param(None, TensorType::new(Elem::F32, [6usize, 8]));
    let y = b.op1(Op::MatMul { trans_b: true }, &[x, w]).unwrap();
    let mut loss = b.binary(BinaryOp::Mul, y, y).unwrap();
    for axis in [2, 1, 0] {
        loss = b.op1(Op::Reduce(ReduceOp::Sum, axis), &[loss]).unwrap();
    }
    let f = b.finish(&[loss]);
    let data = |seed, n| -> Vec<f32> { noise(seed, n).iter().map(|x| *x as f32).collect() };
    let args = [Tensor::f32([2, 3, 8], data(1, 48)), Tensor::f32([6, 8], data(2, 48))];
    let run = |bf16| {
        let g = grad(&module, &f, &[0, 1], &GradOptions { bf16 }).unwrap();
        interp::run(&module, &g, &NoWeights, &args, &g.results).unwrap()
    };
    let (exact, coarse) = (run(false), run(true));
    assert_eq!(exact[0], coarse[0], "the loss itself is not rounded");
    for (e, c) in exact[1..].iter().zip(&coarse[1..]) {
        let (e, c) = (e.as_f32().unwrap(), c.as_f32().unwrap());
        let most = e.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(e != c && e.iter().zip(c).all(|(e, c)| (e - c).abs() <= most / 128.0), "{e:?} {c:?}");
    }
}

#[test]
fn what_has_no_gradient_is_refused() {
    let module = Module::new(ModelFacts::default());
    let mut b = Builder::new(&module, "f");
    let x = b.param(None, TensorType::new(Elem::F32, [2usize, 8]));
    let g = b.op1(Op::QParams(QuantSpec::sym(4, Grain::Row), Rule::MinMax), &[x]).unwrap();
    let y = b.op1(Op::Reduce(ReduceOp::Sum, 0), &[g]).unwrap();
    let (vector, scalar) = (b.op1(Op::Reduce(ReduceOp::Sum, 1), &[x]).unwrap(), y);
    let f = b.finish(&[scalar, vector]);
    assert_eq!(grad(&module, &f, &[0], &GradOptions::default()).unwrap_err().code, "Q0608");
}
