//! What the tests of the kernels share.

use super::pool::Pool;

/// Pools of one and two threads.
pub(crate) fn pools() -> [Pool; 2] {
    [Pool::new(1).unwrap(), Pool::new(2).unwrap()]
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
