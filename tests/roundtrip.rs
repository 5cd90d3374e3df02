//! The text form, in and out: a property of every module.

use proptest::prelude::*;
use qrmc_ir::{
    AttnAttr, BinaryOp, Builder, Dim, Elem, Grain, Module, Op, QuantSpec, Real, ReduceOp, RopeAttr,
    RopeScaling, Rule, ScaleType, Shape, Sym, TensorType, UnaryOp, parse, print, structural_hash, verify,
};

use crate::support::{FIXTURES, TINY, import};

fn spec() -> impl Strategy<Value = QuantSpec> {
    let grain =
        prop_oneof![Just(Grain::Row), Just(Grain::Group(4)), Just(Grain::Group(8)), Just(Grain::Tensor),];
    let scale = prop_oneof![Just(ScaleType::F32), Just(ScaleType::F16), Just(ScaleType::BF16)];
    (2u8..=8, any::<bool>(), grain, scale).prop_map(|(bits, sym, grain, scale)| {
        let s = if sym { QuantSpec::sym(bits, grain) } else { QuantSpec::asym(bits, grain) };
        QuantSpec { scale, ..s }
    })
}

/// One step of building a random function over `%x : f32[B, S, 8]`.
#[derive(Clone, Debug)]
enum Step {
    Unary(usize),
    Binary(usize, bool),
    Linear,
    Norm(f64),
    Rope(Option<f64>),
    Softmax,
    Quantized(QuantSpec, bool),
    Literal(Vec<f64>),
    Reduce,
    Shuffle,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0usize..6).prop_map(Step::Unary),
        (0usize..6, any::<bool>()).prop_map(|(o, w)| Step::Binary(o, w)),
        Just(Step::Linear),
        prop_oneof![Just(1e-6), Just(1e-5), 1e-9f64..1.0].prop_map(Step::Norm),
        proptest::option::of(1.0f64..64.0).prop_map(Step::Rope),
        Just(Step::Softmax),
        (spec(), any::<bool>()).prop_map(|(s, r)| Step::Quantized(s, r)),
        proptest::collection::vec(-1e30f64..1e30, 8).prop_map(Step::Literal),
        Just(Step::Reduce),
        Just(Step::Shuffle),
    ]
}

fn build(steps: &[Step], names: &[Option<u8>]) -> Module {
    let mut m = Module::default();
    let w = m.declare("block.w", TensorType::new(Elem::BF16, [8, 8])).unwrap();
    let g = m.declare("block.gain-1", TensorType::new(Elem::F16, [8])).unwrap();
    let mut b = Builder::new(&m, "f");
    let mut x =
        b.param(Some("x"), TensorType::new(Elem::F32, vec![Sym::B.into(), Sym::S.into(), Dim::Fixed(8)]));
    let pos = b.param(Some("pos"), TensorType::new(Elem::I32, vec![Sym::S.into()]));
    let unary = [UnaryOp::Neg, UnaryOp::Exp, UnaryOp::Sqrt, UnaryOp::Sigmoid, UnaryOp::Cos, UnaryOp::Recip];
    let binary = [
        BinaryOp::Add,
        BinaryOp::Sub,
        BinaryOp::Mul,
        BinaryOp::Div,
        BinaryOp::Max,
        BinaryOp::Min,
        BinaryOp::Ge,
    ];
    for (i, step) in steps.iter().enumerate() {
        x = match step {
            Step::Unary(o) => b.op1(Op::Unary(unary[*o]), &[x]).unwrap(),
            Step::Binary(o, weight) => {
                let y = if *weight { b.weight(g) } else { x };
                b.binary(binary[*o], x, y).unwrap()
            }
            Step::Linear => {
                let w = b.weight(w);
                b.linear(x, w).unwrap()
            }
            Step::Norm(eps) => {
                let g = b.weight(g);
                b.op1(Op::RmsNorm(Real(*eps)), &[x, g]).unwrap()
            }
            Step::Rope(factor) => {
                let scaling = factor.map_or(RopeScaling::None, |f| RopeScaling::Linear { factor: Real(f) });
                b.op1(Op::Rope(RopeAttr { head_dim: 4, theta: Real(1e4), scaling }), &[x, pos]).unwrap()
            }
            Step::Softmax => b.op1(Op::Softmax, &[x]).unwrap(),
            Step::Quantized(spec, real) => {
                let w = b.weight(w);
                let q = if *real {
                    let sides = b.op(Op::QParams(*spec, Rule::MinMax), &[w]).unwrap();
                    let codes = b.op1(Op::QCast(*spec), &[&[w], &sides[..]].concat()).unwrap();
                    b.op1(Op::DCast, &[&[codes], &sides[..]].concat()).unwrap()
                } else {
                    b.op1(Op::FakeQuant(*spec, Rule::Awq), &[w]).unwrap()
                };
                b.linear(x, q).unwrap()
            }
            Step::Literal(v) => {
                let c = b.literal(&[8], v);
                b.binary(BinaryOp::Add, x, c).unwrap()
            }
            Step::Reduce => {
                let r = b.op1(Op::Reduce(ReduceOp::Mean, 2), &[x]).unwrap();
                b.binary(BinaryOp::Sub, x, r).unwrap()
            }
            Step::Shuffle => {
                let split = Shape(vec![Sym::B.into(), Sym::S.into(), Dim::Fixed(2), Dim::Fixed(4)]);
                let y = b.op1(Op::Reshape(split), &[x]).unwrap();
                let y = b.op1(Op::Transpose(vec![0, 1, 3, 2]), &[y]).unwrap();
                b.op1(Op::Reshape(Shape(vec![Sym::B.into(), Sym::S.into(), Dim::Fixed(8)])), &[y]).unwrap()
            }
        };
        if let Some(Some(n)) = names.get(i) {
            b.name(x, &format!("v{n}"));
        }
    }
    let attr = AttnAttr { heads: 2, kv_heads: 2, scale: Real(0.5) };
    let y = b.op1(Op::Attention(attr), &[x, x, x]);
    let results: Vec<_> = y.into_iter().chain([x]).collect();
    let f = b.finish(&results);
    m.funcs.push(f);
    m.history.push("rtn \"quoted\" \\ back\nslash".into());
    m.facts.arch = "llama".into();
    m.facts.eos = vec![1, 2];
    m
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn random_modules_round_trip(
        steps in proptest::collection::vec(step(), 1..12),
        names in proptest::collection::vec(proptest::option::of(any::<u8>()), 0..12),
    ) {
        let m = build(&steps, &names);
        verify(&m).unwrap();
        let text = print(&m);
        let back = parse(&text).unwrap();
        prop_assert_eq!(&back, &m);
        prop_assert_eq!(print(&back), text);
        prop_assert_eq!(structural_hash(&back, &back.funcs[0]), structural_hash(&m, &m.funcs[0]));
    }

    #[test]
    fn text_never_makes_the_parser_panic(text in "[ -~\n]{0,200}") {
        let _ = parse(&format!("qir 1\n{text}"));
    }

    #[test]
    fn damaged_modules_never_make_the_parser_panic(
        steps in proptest::collection::vec(step(), 1..6),
        at in any::<prop::sample::Index>(),
        len in 0usize..12,
        put in "[ -~]{0,6}",
    ) {
        let mut text = print(&build(&steps, &[]));
        let from = at.index(text.len());
        let to = (from + len).min(text.len());
        text.replace_range(from..to, &put);
        if let Ok(m) = parse(&text) {
            let _ = verify(&m);
        }
    }
}

#[test]
fn imported_models_round_trip() {
    for name in FIXTURES.iter().map(|f| format!("fixtures/{f}")).chain([TINY.to_owned()]) {
        let m = import(&name).module;
        verify(&m).unwrap();
        assert_eq!(parse(&print(&m)).unwrap(), m, "{name}");
    }
}

#[test]
fn layers_of_one_shape_hash_alike() {
    let m = import(TINY).module;
    let hashes: Vec<_> = m.layers().iter().map(|&f| structural_hash(&m, m.func(f))).collect();
    assert!(hashes.windows(2).all(|w| w[0] == w[1]));
    let head = m.func(m.find_func("head").unwrap());
    assert_ne!(structural_hash(&m, head), hashes[0]);
}
