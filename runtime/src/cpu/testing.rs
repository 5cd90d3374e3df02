//! What the tests of the kernels share.

use qrmc_ir::{Builder, Dim, Elem, Module, NoWeights, Op, Shape, Tensor, TensorType};

use super::pool::Pool;

/// Pools of one and two threads.
pub(crate) fn pools() -> [Pool; 2] {
    [Pool::new(1).unwrap(), Pool::new(2).unwrap()]
}

/// Pools of one, two and three threads.
pub(crate) fn pools3() -> [Pool; 3] {
    [1, 2, 3].map(|threads| Pool::new(threads).unwrap())
}

/// `n` repeatable values in -1..1.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Checks `got` against `want` with an error relative to `1 + |want|`.
pub(crate) fn close(got: &[f32], want: &[f64], tol: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let gap = (f64::from(g) - w).abs();
        assert!(gap <= tol * (1.0 + w.abs()), "{what}: element {i} is {g}, not {w}");
    }
}

/// Bits, for exact comparison.
pub(crate) fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|x| x.to_bits()).collect()
}

/// The results of an operation as the reference interpreter computes them, which expands it. The operands have fixed
/// sizes if no types are given.
pub(crate) fn expanded(op: &Op, ins: &[(Vec<usize>, Vec<f32>)], types: Option<&[Vec<Dim>]>) -> Vec<Vec<f32>> {
    let module = Module::default();
    let mut b = Builder::new(&module, "expanded");
    let params: Vec<_> = ins
        .iter()
        .enumerate()
        .map(|(i, (shape, _))| {
            let fixed = || shape.iter().map(|&n| Dim::Fixed(n as u64)).collect();
            let dims = types.map_or_else(fixed, |t| t[i].clone());
            b.param(None, TensorType::new(Elem::F32, Shape(dims)))
        })
        .collect();
    let results = b.op(op.clone(), &params).unwrap();
    let func = b.finish(&results);
    let args: Vec<Tensor> = ins.iter().map(|(shape, x)| Tensor::f32(shape.clone(), x.clone())).collect();
    let outs = qrmc_ir::interp::run(&module, &func, &NoWeights, &args, &func.results).unwrap();
    outs.iter().map(|t| t.as_f32().unwrap().to_vec()).collect()
}
