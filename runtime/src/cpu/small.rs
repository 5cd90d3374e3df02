//! Products with a small matrix, in registers: for mode products, their gradients, and the cores of Hadamard transforms,
//! where packing for a large product would take longer than the product.

use super::gemm::MatRef;
use super::pool::{Pool, Scratch};
use super::simd::{Isa, Kernel, Lanes};

/// Rows of a result that are computed at a time.
pub(super) const ROWS: usize = 8;

/// A left factor `[m, k]`: [`ROWS`] rows at a time, element after element of their inner dimension, zeros beyond `m`.
pub(super) fn packed(a: MatRef<'_>) -> Vec<[f32; ROWS]> {
    let (m, k) = (a.rows(), a.cols());
    let mut out = vec![[0.0; ROWS]; m.div_ceil(ROWS) * k];
    for (at, to) in out.iter_mut().enumerate() {
        let (tile, j) = (at / k, at % k);
        for (i, to) in (tile * ROWS..m).zip(to) {
            *to = a.at(i, j);
        }
    }
    out
}

/// The right factor `[k, n]` of a product, and where the result `[m, n]` goes.
pub(super) struct Sides<'a> {
    /// Rows of `n` elements, `stride` apart.
    pub b: &'a [f32],
    pub stride: usize,
    pub n: usize,
    pub out: &'a mut [f32],
    pub out_stride: usize,
    /// Factor of the result.
    pub scale: f32,
    /// Whether `out` is added to.
    pub add: bool,
}

/// `out = scale a b` for up to [`ROWS`] rows of `a`, packed.
pub(super) fn product(isa: Isa, a: &[[f32; ROWS]], rows: usize, s: &mut Sides<'_>) {
    #[cfg(target_arch = "x86_64")]
    if isa.level() == super::simd::Level::Avx512 {
        return super::small_avx512::product(isa, a, rows, s);
    }
    isa.run(RowByRow { a, rows, s });
}

struct RowByRow<'a, 's> {
    a: &'a [[f32; ROWS]],
    rows: usize,
    s: &'a mut Sides<'s>,
}

impl Kernel for RowByRow<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let RowByRow { a, rows, s } = self;
        for r in 0..rows {
            let out = &mut s.out[r * s.out_stride..][..s.n];
            if !s.add {
                out.fill(0.0);
            }
            for (x, row) in a.iter().zip(s.b.chunks(s.stride)) {
                let x = x[r] * s.scale;
                for (o, &v) in out.iter_mut().zip(row) {
                    *o = L::mul_add(x, v, *o);
                }
            }
        }
    }
}

/// `y = scale (a ⊗ I_inner) x` for each of the blocks `[k, inner]` of `x`, `outer` of them a row; the packed matrices
/// `[k, k]` serve equally many neighbours each.
pub(super) fn middle(
    isa: Isa,
    a: &[Vec<[f32; ROWS]>],
    (outer, k, inner): (usize, usize, usize),
    x: &[f32],
    scale: f32,
    y: &mut [f32],
) {
    let each = k * inner;
    for (i, (x, y)) in x.chunks_exact(each).zip(y.chunks_exact_mut(each)).enumerate() {
        let tiles = a[i % outer * a.len() / outer].chunks_exact(k);
        for (tile, out) in tiles.zip(y.chunks_mut(ROWS * inner)) {
            let (n, rows) = (inner, out.len() / inner);
            let mut s = Sides { b: x, stride: n, n, out, out_stride: n, scale, add: false };
            product(isa, tile, rows, &mut s);
        }
    }
}

/// `y = x m` for the runs of `k` channels of rows of `n`; the matrices `[k, k]` serve equally many runs each.
pub(super) fn last(isa: Isa, x: &[f32], n: usize, (m, k): (&[f32], usize), y: &mut [f32]) {
    let (runs, count) = (n / k, m.len() / (k * k));
    let mut left = vec![[0.0; ROWS]; k];
    for (x, y) in x.chunks(ROWS * n).zip(y.chunks_mut(ROWS * n)) {
        let rows = x.len() / n;
        for o in 0..runs {
            for (r, x) in x.chunks_exact(n).enumerate() {
                for (left, x) in left.iter_mut().zip(&x[o * k..]) {
                    left[r] = *x;
                }
            }
            let b = &m[o * count / runs * k * k..][..k * k];
            let out = &mut y[o * k..];
            let mut s = Sides { b, stride: k, n: k, out, out_stride: n, scale: 1.0, add: false };
            product(isa, &left, rows, &mut s);
        }
    }
}

/// `out[i, j] = Σ a[t, i, c] b[t, j, c]` over all `t` and `c`, for `a[.., m, inner]` and `b[.., n, inner]`: in `f32` over
/// some thousand terms, then in `f64`, in one order.
///
/// # Panics
/// If the sizes do not fit.
pub fn outer_middle(
    pool: &Pool,
    isa: Isa,
    (a, b): (&[f32], &[f32]),
    (m, n, inner): (usize, usize, usize),
    out: &mut [f32],
    scratch: &Scratch,
) {
    assert!(m > 0 && n > 0 && inner > 0 && out.len() == m * n, "a product [{m}, {n}] over {inner}");
    let count = a.len() / (m * inner);
    assert_eq!(
        (a.len(), b.len()),
        (count * m * inner, count * n * inner),
        "operands of [{m}, {n}] over {inner}"
    );
    // Blocks of one task, and of one product.
    let (task, group) = ((8 * 1024 / inner).max(1), (256 / inner).max(1));
    let tasks = count.div_ceil(task);
    let mut parts = scratch.take(tasks * m * n);
    pool.for_chunks(&mut parts, m * n, |t, out| {
        out.fill(0.0);
        let blocks = task.min(count - t * task);
        let a = &a[t * task * m * inner..][..blocks * m * inner];
        let b = &b[t * task * n * inner..][..blocks * n * inner];
        add_blocks(isa, (a, b), (m, n, inner), group, out);
    });
    for (i, out) in out.iter_mut().enumerate() {
        *out = (0..tasks).map(|t| f64::from(parts[t * m * n + i])).sum::<f64>() as f32;
    }
}

/// Adds the products of some blocks, `group` of them at a time.
fn add_blocks(
    isa: Isa,
    (a, b): (&[f32], &[f32]),
    (m, n, inner): (usize, usize, usize),
    group: usize,
    out: &mut [f32],
) {
    let mut left = vec![[0.0; ROWS]; group * inner];
    let mut right = vec![0.0; group * inner * n];
    for (a, b) in a.chunks(group * m * inner).zip(b.chunks(group * n * inner)) {
        let k = a.len() / m;
        for (b, right) in b.chunks_exact(n * inner).zip(right.chunks_exact_mut(n * inner)) {
            for (j, b) in b.chunks_exact(inner).enumerate() {
                for (c, b) in b.iter().enumerate() {
                    right[c * n + j] = *b;
                }
            }
        }
        for (t, out) in out.chunks_mut(ROWS * n).enumerate() {
            let rows = out.len() / n;
            for (a, left) in a.chunks_exact(m * inner).zip(left.chunks_exact_mut(inner)) {
                for (r, a) in a[t * ROWS * inner..].chunks_exact(inner).take(rows).enumerate() {
                    for (left, a) in left.iter_mut().zip(a) {
                        left[r] = *a;
                    }
                }
            }
            let b = &right[..k * n];
            let mut s = Sides { b, stride: n, n, out, out_stride: n, scale: 1.0, add: true };
            product(isa, &left[..k], rows, &mut s);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{bits, close, noise, pools3};
    use super::*;

    #[test]
    fn outer_products_over_the_middle_match_the_definition() {
        for (count, m, n, inner) in
            [(1, 1, 1, 1), (3, 24, 24, 24), (700, 9, 9, 64), (70, 32, 20, 48), (5, 3, 41, 300), (0, 4, 4, 2)]
        {
            let (a, b) = (noise(count * m * inner, 1), noise(count * n * inner, 2));
            let want: Vec<f64> = (0..m * n)
                .map(|at| {
                    let (i, j) = (at / n, at % n);
                    let pairs = (0..count * inner).map(|p| (p / inner, p % inner));
                    pairs
                        .map(|(t, c)| {
                            f64::from(a[(t * m + i) * inner + c]) * f64::from(b[(t * n + j) * inner + c])
                        })
                        .sum()
                })
                .collect();
            for isa in Isa::available() {
                let mut first = None;
                for pool in &pools3() {
                    let mut out = vec![f32::NAN; m * n];
                    outer_middle(pool, isa, (&a, &b), (m, n, inner), &mut out, &Scratch::new());
                    close(&out, &want, 2e-4, &format!("{count} x [{m}, {n}] over {inner} {}", isa.name()));
                    assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out));
                }
            }
        }
    }
}
