//! Products against sums in double precision, at odd sizes and strides.

use super::*;
use crate::cpu::testing::{bits, close, noise, pools};

/// Sizes, in elements of the backing slice, of every layout that is tried.
fn naive(a: MatRef<'_>, b: MatRef<'_>) -> Vec<f64> {
    let at = |x: &MatRef<'_>, i: usize, j: usize| f64::from(x.data[i * x.row_stride + j * x.col_stride]);
    (0..a.rows * b.cols)
        .map(|o| (0..a.cols).map(|p| at(&a, o / b.cols, p) * at(&b, p, o % b.cols)).sum())
        .collect()
}

#[test]
fn products_match_f64_at_every_stride() {
    let shapes =
        [(0, 3, 4), (1, 1, 1), (1, 37, 5), (3, 0, 4), (3, 65, 70), (8, 100, 33), (9, 17, 401), (70, 300, 97)];
    for (m, k, n) in shapes {
        let (a, b) = (noise(m * (k + 3), 1), noise((k + 2) * (n + 1), 2));
        let lefts = [MatRef::strided(&a, m, k, k + 3, 1), MatRef::strided(&a, k, m, m, 1).t()];
        let rights = [MatRef::strided(&b, k, n, n + 1, 1), MatRef::strided(&b, n, k, k + 1, 1).t()];
        for (a, b) in lefts.into_iter().flat_map(|a| rights.map(|b| (a, b))) {
            let want = naive(a, b);
            for isa in Isa::available() {
                let mut first = None;
                for pool in &pools() {
                    let stride = n + 2;
                    let mut out = vec![9.0; m * stride];
                    matmul(pool, isa, a, b, &mut out, stride);
                    assert!(out.chunks(stride).all(|r| r[n..] == [9.0, 9.0]), "what lies between is kept");
                    let got: Vec<f32> = out.chunks(stride).flat_map(|r| r[..n].to_vec()).collect();
                    close(&got, &want, 1e-5, &format!("[{m}, {k}] x [{k}, {n}] {}", isa.name()));
                    assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out));
                }
            }
        }
    }
}

#[test]
fn tiles_cover_a_large_product_alike_on_any_threads() {
    for (m, k, n) in [(600, 64, 1500), (1500, 33, 200), (9, 40, 5000), (2100, 16, 30)] {
        let (a, b) = (noise(m * k, 3), noise(k * n, 4));
        let mut first = None;
        for pool in &pools() {
            let mut out = vec![0.0; m * n];
            matmul(pool, Isa::detect(), MatRef::new(&a, m, k), MatRef::new(&b, n, k).t(), &mut out, n);
            for (i, j) in [(0, 0), (m - 1, n - 1), (m / 2, n / 3)] {
                let want: f64 = (0..k).map(|p| f64::from(a[i * k + p]) * f64::from(b[j * k + p])).sum();
                assert!((f64::from(out[i * n + j]) - want).abs() < 1e-4);
            }
            assert!(*first.get_or_insert_with(|| bits(&out)) == bits(&out));
        }
    }
}

#[test]
fn double_products_add_alike_on_any_threads() {
    for (m, k, n) in [(1, 1, 1), (3, 0, 4), (70, 128, 97), (600, 33, 700), (5, 128, 2000)] {
        let wide = |v: Vec<f32>| v.into_iter().map(f64::from).collect::<Vec<f64>>();
        let (a, b) = (wide(noise(m * (k + 1), 5)), wide(noise(n * (k + 2), 6)));
        let left = MatRef::strided(&a, m, k, k + 1, 1);
        let right = MatRef::strided(&b, n, k, k + 2, 1).t();
        let stride = n + 3;
        let start: Vec<f64> = (0..m * stride).map(|i| i as f64).collect();
        let mut first: Option<Vec<u64>> = None;
        for pool in &pools() {
            let mut out = start.clone();
            add_product(pool, left, right, -2.0, &mut out, stride);
            for (i, (have, was)) in out.iter().zip(&start).enumerate() {
                let (r, c) = (i / stride, i % stride);
                let dot = |c: usize| (0..k).map(|p| a[r * (k + 1) + p] * b[c * (k + 2) + p]).sum::<f64>();
                let want = if c < n { was - 2.0 * dot(c) } else { *was };
                assert!((have - want).abs() <= 1e-12 * (1.0 + want.abs()), "[{m}, {k}, {n}] at {i}");
            }
            let bits: Vec<u64> = out.iter().map(|x| x.to_bits()).collect();
            assert!(*first.get_or_insert_with(|| bits.clone()) == bits);
        }
    }
}

#[test]
fn batches_step_through_their_operands() {
    for (batch, m, k, n) in [(0, 2, 2, 2), (3, 2, 5, 7), (4, 20, 11, 13)] {
        let (a, b) = (noise(batch * m * k, 5), noise(k * n, 6));
        for pool in &pools() {
            let mut out = vec![0.0; batch * m * n];
            let left = if batch == 0 { MatRef::new(&[], 0, k) } else { MatRef::new(&a, m, k) };
            let right = MatRef::new(&b, n, k).t();
            matmul_batched(pool, Isa::detect(), batch, (left, m * k), (right, 0), &mut out, (n, m * n));
            for i in 0..batch {
                let want = naive(MatRef::new(&a[i * m * k..], m, k), right);
                close(&out[i * m * n..(i + 1) * m * n], &want, 1e-5, "batched");
            }
        }
    }
}

#[test]
fn a_gram_matrix_is_symmetric_and_alike_on_any_threads() {
    for (count, n) in [(3, 1), (40, 70), (70, 300), (9, 600)] {
        let x = noise(count * n, 7);
        let x = MatRef::new(&x, count, n);
        let (want, mut first) = (naive(x.t(), x), None);
        for threads in [1, 2, 3] {
            let mut out = vec![f32::NAN; n * n];
            gram(&Pool::new(threads).unwrap(), x, &mut out);
            close(&out, &want, 1e-5, "gram");
            assert!((0..n * n).all(|i| (out[i] - out[i % n * n + i / n]).abs() < 1e-5));
            assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out));
        }
    }
}

#[test]
#[should_panic(expected = "inner dimensions")]
fn inner_dimensions_must_agree() {
    let x = [0.0; 6];
    matmul(&pools()[0], Isa::PORTABLE, MatRef::new(&x, 2, 3), MatRef::new(&x, 2, 3), &mut [0.0; 6], 3);
}

#[test]
fn a_row_is_the_same_among_many() {
    let (n, k) = (700, 1100);
    let (a, b) = (noise(600 * k, 1), noise(n * k, 2));
    let (pool, isa) = (Pool::new(2).unwrap(), Isa::detect());
    let run = |from: usize, m: usize| {
        let mut out = vec![0.0; m * n];
        let a = MatRef::new(&a[from * k..(from + m) * k], m, k);
        matmul(&pool, isa, a, MatRef::new(&b, n, k).t(), &mut out, n);
        bits(&out)
    };
    let all = run(0, 600);
    for (from, m) in [(0, 33), (1, 47), (64, 64), (100, 130), (88, 512), (0, 257)] {
        assert!(all[from * n..(from + m) * n] == run(from, m), "rows {from}+{m}");
    }
}
