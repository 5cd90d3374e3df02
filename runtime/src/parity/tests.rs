use std::collections::HashMap;

use proptest::prelude::*;
use qrmc_ir::pack::pack;
use qrmc_ir::{Builder, Dim, Elem, Func, Grain, Op, QuantSpec, RawWeight, Rule, TensorType, WeightError};

use super::*;
use crate::cpu::testing::noise;
use crate::engine::{CpuEngine, Input};

struct Stored(HashMap<String, (TensorType, Vec<u8>)>);

impl WeightSource for Stored {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        let (ty, bytes) = self.0.get(name).ok_or_else(|| WeightError::new(name, "there is none"))?;
        Ok(RawWeight { ty: ty.clone(), bytes: bytes[..].into() })
    }
}

fn fixed(elem: Elem, sizes: &[usize]) -> TensorType {
    TensorType::new(elem, sizes.iter().map(|&n| Dim::Fixed(n as u64)).collect::<Vec<_>>())
}

/// `x -> fake_quant -> x wᵀ + bias, x uᵀ` for packed `w` and `u`.
#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    cols: usize,
    groups: usize,
    inner: usize,
    bits: u8,
    sym: bool,
    /// Width, whether it is symmetric, and whether each group of the weight has a scale of its own, where it may.
    act: Option<(u8, bool, bool)>,
    /// Powers of two of the activation and of the scales of the weight.
    size: (i32, i32),
    /// Every so many rows of the activation are 0.
    zero_rows: usize,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let inner = prop_oneof![1usize..150, (1usize..3).prop_map(|n| 64 * n)];
    let shape = (1usize..40, 1usize..70, 1usize..4, inner);
    let act = prop_oneof![Just(None), (2u8..=8, any::<bool>(), any::<bool>()).prop_map(Some)];
    let sizes = (prop_oneof![Just(0), -110..110i32], prop_oneof![Just(-4), -60..20i32]);
    (shape, 2u8..=8, any::<bool>(), act, sizes, 1usize..6, any::<u64>()).prop_map(
        |((rows, cols, groups, inner), bits, sym, act, size, zero_rows, seed)| Case {
            rows,
            cols,
            groups,
            inner,
            bits,
            sym,
            act,
            size,
            zero_rows,
            seed,
        },
    )
}

impl Case {
    fn spec(self) -> QuantSpec {
        let grain = Grain::Group(self.inner as u32);
        if self.sym { QuantSpec::sym(self.bits, grain) } else { QuantSpec::asym(self.bits, grain) }
    }

    fn weight(self, name: &str, module: &mut Module, stored: &mut Stored) -> Vec<qrmc_ir::WeightId> {
        let (n, k, spec) = (self.cols, self.inner * self.groups, self.spec());
        let random = noise(n * k, self.seed ^ name.len() as u64);
        let span = (spec.qmax() - spec.qmin() + 1) as f32;
        let code = |x: &f32| ((x + 1.0) / 2.0 * span).floor() as i32 + spec.qmin();
        let codes: Vec<i32> = random.iter().map(code).map(|c| c.min(spec.qmax())).collect();
        let codes = if spec.signed {
            Tensor::new([n, k], Data::I8(codes.iter().map(|&c| c as i8).collect()))
        } else {
            Tensor::new([n, k], Data::U8(codes.iter().map(|&c| c as u8).collect()))
        };
        let factor = 2f32.powi(self.size.1);
        let scales: Vec<f32> =
            noise(n * self.groups, self.seed + 3).iter().map(|s| (s.abs() + 0.1) * factor).collect();
        let side = [n, self.groups];
        let mut parts = vec![
            ("codes", fixed(Elem::Quant(spec), &[n, k]), pack(&codes, spec).unwrap()),
            ("scales", fixed(Elem::F32, &side), scales.iter().flat_map(|s| s.to_le_bytes()).collect()),
        ];
        if spec.zero {
            let zeros: Vec<u8> = noise(n * self.groups, self.seed + 4)
                .iter()
                .map(|x| ((x + 1.0) / 2.0 * span) as u8)
                .collect();
            parts.push(("zeros", fixed(Elem::U8, &side), zeros));
        }
        let declare = |(part, ty, bytes): (&str, TensorType, Vec<u8>)| {
            let name = format!("{name}.{part}");
            stored.0.insert(name.clone(), (ty.clone(), bytes));
            module.declare(&name, ty).unwrap()
        };
        parts.into_iter().map(declare).collect()
    }

    fn build(self) -> (Module, Func, Stored) {
        let (mut module, mut stored) = (Module::default(), Stored(HashMap::new()));
        let w = self.weight("w", &mut module, &mut stored);
        let u = self.weight("up", &mut module, &mut stored);
        let bias = fixed(Elem::F32, &[self.cols]);
        let bytes = noise(self.cols, 5).iter().flat_map(|s| s.to_le_bytes()).collect();
        stored.0.insert("bias".into(), (bias.clone(), bytes));
        let bias = module.declare("bias", bias).unwrap();
        let mut b = Builder::new(&module, "case");
        let k = (self.inner * self.groups) as u64;
        let ty = TensorType::new(Elem::F32, vec![Dim::Fixed(1), Dim::Sym(qrmc_ir::Sym::S), Dim::Fixed(k)]);
        let mut x = b.param(Some("x"), ty);
        if let Some((bits, sym, runs)) = self.act {
            let runs = runs && self.inner.is_multiple_of(64);
            let grain = if runs { Grain::Group(self.inner as u32) } else { Grain::Token };
            let spec = if sym { QuantSpec::sym(bits, grain) } else { QuantSpec::asym(bits, grain) };
            x = b.op1(Op::FakeQuant(spec, Rule::Dynamic), &[x]).unwrap();
        }
        let mut product = |ids: &[qrmc_ir::WeightId]| {
            let parts: Vec<_> = ids.iter().map(|&w| b.weight(w)).collect();
            let w = b.op1(Op::DCast, &parts).unwrap();
            b.op1(Op::MatMul { trans_b: true }, &[x, w]).unwrap()
        };
        let (y, z) = (product(&w), product(&u));
        let bias = b.weight(bias);
        let y = b.binary(qrmc_ir::BinaryOp::Add, y, bias).unwrap();
        let func = std::mem::replace(&mut b, Builder::new(&module, "")).finish(&[y, z]);
        (module, func, stored)
    }
}

#[test]
fn what_is_no_number_is_a_difference() {
    let x = [1.0, 2.0];
    for bad in [f32::NAN, f32::INFINITY] {
        let mut kind = KindParity::default();
        for got in [[1.0, bad], [1.0, 2.0]] {
            kind.gap = worse(kind.gap, gap(&got, &x, &x));
        }
        assert!(!kind.holds(), "{bad} against 2: {}", kind.gap);
    }
    assert_eq!(gap(&[f32::NAN, 2.0], &[f32::NAN, 2.0], &x), 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn kernels_are_what_the_interpreter_computes(case in cases()) {
        let (module, func, stored) = case.build();
        let k = case.inner * case.groups;
        let factor = 2f32.powi(case.size.0);
        let mut x: Vec<f32> = noise(case.rows * k, case.seed).iter().map(|x| x * factor).collect();
        for row in x.chunks_exact_mut(k).step_by(case.zero_rows).skip(1) {
            row.fill(0.0);
        }
        let x = Tensor::f32([1, case.rows, k], x);
        let mut bits: Option<Vec<Vec<u32>>> = None;
        for threads in [1, 2] {
            let engine = CpuEngine::new(threads).unwrap();
            let loaded = engine.load(&module, &func, &stored).unwrap();
            let kernels: Vec<String> =
                loaded.program().steps.iter().map(|s| s.kernel.to_string()).collect();
            prop_assert_eq!(kernels.iter().any(|k| k.starts_with("quantize")), case.act.is_some());
            prop_assert_eq!(kernels.last().map(String::as_str), Some("linear"));
            let mut parity = Parity::default();
            let mut watch = Comparing { module: &module, limit: u64::MAX, parity: &mut parity };
            let out = loaded.run_watched(&mut [Input::Tensor(&x)], &mut watch).unwrap();
            prop_assert!(parity.holds(), "{case:?}: {parity:?}");
            let now: Vec<Vec<u32>> =
                out.iter().map(|t| t.as_f32().unwrap().iter().map(|x| x.to_bits()).collect()).collect();
            prop_assert_eq!(bits.get_or_insert_with(|| now.clone()), &now);
        }
    }
}
