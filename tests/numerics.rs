//! Engine and interpreter against values that transformers computed.

use qrmc_ir::{
    BinaryOp, Builder, Dim, Elem, Engine, Grain, ModelFacts, Module, Op, QuantSpec, Rule, Tensor, TensorType,
    UnaryOp, ValueId, interp,
};
use qrmc_lowering::{Cpu, Kernel, lower_func};
use qrmc_runtime::engine::CpuEngine;

use crate::support::{FIXTURES, Reference, Stored, gap, import, main_args};

#[test]
fn fixtures_match_transformers() {
    let engine = CpuEngine::new(2).unwrap();
    for name in FIXTURES {
        let model = import(&format!("fixtures/{name}"));
        let reference = Reference::open(name);
        let main = model.module.func(model.module.find_func("main").unwrap());
        for (ids, logits) in [("input_ids", "logits"), ("input_ids_long", "logits_long")] {
            let args = main_args(&model.module, &reference.get(ids));
            let refs: Vec<_> = args.iter().collect();
            let have = engine.run(&model.module, main, &*model.source.weights, &refs).unwrap();
            let want = reference.get(logits);
            // The long reference holds the last positions only.
            let (rows, vocab) = (want.shape()[1], want.shape()[2]);
            let have = last_rows(&have[0], rows, vocab);
            let (diff, size) = gap(&have, &want);
            assert!(diff <= 1e-4, "{name} {logits}: off by {diff} of {size}");
        }
    }
}

fn last_rows(t: &Tensor, rows: usize, width: usize) -> Tensor {
    let (b, s) = (t.shape()[0], t.shape()[1]);
    let data = t.as_f32().unwrap();
    let cut = (0..b).flat_map(|i| data[(i * s + s - rows) * width..(i + 1) * s * width].to_vec()).collect();
    Tensor::f32([b, rows, width], cut)
}

#[test]
fn interpreter_is_the_same_function() {
    let engine = CpuEngine::new(2).unwrap();
    for name in FIXTURES {
        let model = import(&format!("fixtures/{name}"));
        let reference = Reference::open(name);
        let main = model.module.func(model.module.find_func("main").unwrap());
        let args = main_args(&model.module, &reference.get("input_ids"));
        let want = interp::run(&model.module, main, &*model.source.weights, &args, &main.results).unwrap();
        let (diff, _) = gap(&want[0], &reference.get("logits"));
        assert!(diff <= 1e-4, "{name}: the interpreter is off by {diff}");
        let refs: Vec<_> = args.iter().collect();
        let have = engine.run(&model.module, main, &*model.source.weights, &refs).unwrap();
        for (h, w) in have.iter().zip(&want) {
            let (diff, size) = gap(h, w);
            assert!(
                diff <= 2e-5 * size.max(1.0),
                "{name}: engine and interpreter differ by {diff} of {size}"
            );
        }
    }
}

#[test]
fn named_values_match_transformers() {
    for name in FIXTURES {
        let model = import(&format!("fixtures/{name}"));
        let reference = Reference::open(name);
        let layer = model.module.func(model.module.find_func("layer0").unwrap());
        let x = reference.get("hidden.0");
        let width = (model.module.facts.kv_heads * model.module.facts.head_dim) as usize;
        let s = x.shape()[1];
        let empty = Tensor::zeros([1, 0, width]);
        let args = [x, Tensor::i32([s], (0..s as i32).collect()), empty.clone(), empty];
        let probes =
            [("attn_in", "L0.attn_in"), ("o_in", "L0.o_in"), ("mlp_in", "L0.mlp_in"), ("y", "hidden.1")];
        let wanted: Vec<_> = probes.iter().map(|(v, _)| layer.find(v).unwrap()).collect();
        let have = interp::run(&model.module, layer, &*model.source.weights, &args, &wanted).unwrap();
        for (h, (v, r)) in have.iter().zip(probes) {
            let (diff, size) = gap(h, &reference.get(r));
            assert!(diff <= 2e-5 * size.max(1.0), "{name} %{v}: off by {diff} of {size}");
        }
    }
}

#[test]
fn thread_count_does_not_show() {
    let model = import("fixtures/qwen2-bias-tied");
    let reference = Reference::open("qwen2-bias-tied");
    let main = model.module.func(model.module.find_func("main").unwrap());
    let args = main_args(&model.module, &reference.get("input_ids_long"));
    let refs: Vec<_> = args.iter().collect();
    let run = |threads| {
        CpuEngine::new(threads).unwrap().run(&model.module, main, &*model.source.weights, &refs).unwrap()
    };
    assert_eq!(run(1), run(2));
    assert_eq!(run(2), run(3));
}

/// Runs a function of tensors of these shapes on the engine and in the interpreter, and compares; the program's kernels
/// are all of this kind.
fn fused(
    shapes: &[&[usize]],
    fits: fn(&Kernel) -> bool,
    build: impl Fn(&mut Builder<'_>, &[ValueId]) -> Vec<ValueId>,
) {
    let module = Module::new(ModelFacts::default());
    let dims = |s: &[usize]| s.iter().map(|&n| Dim::from(n)).collect::<Vec<_>>();
    let mut b = Builder::new(&module, "fused");
    let params: Vec<ValueId> =
        shapes.iter().map(|s| b.param(None, TensorType::new(Elem::F32, dims(s)))).collect();
    let results = build(&mut b, &params);
    let f = b.finish(&results);
    let program = lower_func(&module, &f, &Cpu).unwrap();
    assert!(program.steps.iter().all(|s| fits(&s.kernel)), "{program}");
    let args: Vec<Tensor> = shapes
        .iter()
        .map(|s| {
            let data = (0..s.iter().product()).map(|i: usize| ((i * 37 % 101) as f32 - 50.0) / 49.0);
            Tensor::f32(s.to_vec(), data.collect())
        })
        .collect();
    let want = interp::run(&module, &f, &Stored::default(), &args, &f.results).unwrap();
    let refs: Vec<_> = args.iter().collect();
    let engine = CpuEngine::new(2).unwrap();
    let engines = [(Some(&engine as &dyn Engine), 1e-5), (engine.coarse(), 1e-4)];
    for (engine, most) in engines.into_iter().filter_map(|(e, most)| Some((e?, most))) {
        let have = engine.run(&module, &f, &Stored::default(), &refs).unwrap();
        for (h, w) in have.iter().zip(&want) {
            let (diff, size) = gap(h, w);
            assert!(diff <= most * size, "{shapes:?}: off by {diff} of {size}");
        }
    }
}

#[test]
fn products_of_bfloat16_are_one_kernel() {
    // Rows enough for the matrix unit, and too few for it.
    for rows in [130, 3] {
        fused(
            &[&[rows, 70], &[33, 70], &[rows, 33]],
            |k| matches!(k, Kernel::Bf16(_)),
            |b, params| {
                let half: Vec<_> =
                    params.iter().map(|&p| b.op1(Op::Cast(Elem::BF16), &[p]).unwrap()).collect();
                let wide: Vec<_> = half.iter().map(|&p| b.op1(Op::Cast(Elem::F32), &[p]).unwrap()).collect();
                vec![
                    b.op1(Op::MatMul { trans_b: true }, &[wide[0], wide[1]]).unwrap(),
                    b.op1(Op::MatMul { trans_b: false }, &[wide[2], wide[1]]).unwrap(),
                    b.op1(Op::Outer, &[wide[0], wide[2]]).unwrap(),
                ]
            },
        );
    }
}

#[test]
fn products_over_the_middle_move_no_axes() {
    fused(
        &[&[3, 5, 9, 17], &[3, 5, 6, 17]],
        |k| *k == Kernel::OuterMiddle,
        |b, params| {
            let turned: Vec<_> =
                params.iter().map(|&p| b.op1(Op::Transpose(vec![0, 1, 3, 2]), &[p]).unwrap()).collect();
            vec![b.op1(Op::Outer, &turned).unwrap()]
        },
    );
}

#[test]
fn products_of_rounded_factors_are_products_of_codes() {
    let token = [QuantSpec::sym, QuantSpec::asym];
    for (bits, rows, x) in [(4, 130, token[0]), (4, 130, token[1]), (8, 130, token[1]), (4, 3, token[1])] {
        let (x, w) = (x(bits, Grain::Token), QuantSpec::sym(bits, Grain::Row));
        fused(
            &[&[2, rows, 70], &[2, rows, 1], &[33, 70], &[33, 1]],
            |k| {
                matches!(
                    k,
                    Kernel::OnGrid { .. } | Kernel::Op(Op::FakeQuant(..) | Op::Binary(_) | Op::Const { .. })
                )
            },
            |b, params| {
                // Rows of different ranges, in buffers that must outlive their rounding.
                let [low, high, one] = [0.5, 0.9, 2.0].map(|c| b.scalar(c));
                let uneven = |b: &mut Builder<'_>, x, by| {
                    let factor = b.binary(BinaryOp::Add, by, one).unwrap();
                    b.binary(BinaryOp::Mul, x, factor).unwrap()
                };
                let (wide_x, wide_w) = (uneven(b, params[0], params[1]), uneven(b, params[2], params[3]));
                let x = b.op1(Op::FakeQuant(x, Rule::Dynamic), &[wide_x, high, low]).unwrap();
                let w = b.op1(Op::FakeQuant(w, Rule::MinMax), &[wide_w]).unwrap();
                vec![b.op1(Op::MatMul { trans_b: true }, &[x, w]).unwrap()]
            },
        );
    }
}

#[test]
fn elementwise_operations_in_a_row_are_one_pass() {
    // The middle value is read twice, by operations that end in the same result; the product is read by two others, so
    // it is written down.
    fused(
        &[&[3, 70, 40], &[40], &[3, 70, 1], &[1]],
        |k| matches!(k, Kernel::Map { steps, .. } if [2, 4].contains(&steps.len())),
        |b, params| {
            let [x, v, r, one] = params else { unreachable!() };
            let apart = b.binary(BinaryOp::Sub, *x, *v).unwrap();
            let gate = b.op1(Op::Silu, &[apart]).unwrap();
            let scaled = b.binary(BinaryOp::Mul, gate, *r).unwrap();
            let product = b.binary(BinaryOp::Mul, scaled, apart).unwrap();
            let (left, right) =
                (b.binary(BinaryOp::Add, product, *one), b.binary(BinaryOp::Mul, product, *v));
            let (left, right) = (left.unwrap(), right.unwrap());
            vec![b.op1(Op::Unary(UnaryOp::Neg), &[left]).unwrap(), b.op1(Op::Silu, &[right]).unwrap()]
        },
    );
}
