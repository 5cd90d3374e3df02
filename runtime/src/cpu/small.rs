//! Products with a small matrix, in registers: for mode products, their gradients, and the cores of Hadamard transforms,
//! where packing for a large product would take longer than the product.

use super::gemm::MatRef;
use super::pool::{Pool, Scratch};
use super::simd::{Isa, Kernel, Lanes};
use super::transpose::TurnSmall;

/// Rows of a result that are computed at a time.
pub(super) const ROWS: usize = 8;

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

/// `out = scale a b` for up to [`ROWS`] rows of `a`.
pub(super) fn product(isa: Isa, a: MatRef<'_>, s: &mut Sides<'_>) {
    #[cfg(target_arch = "x86_64")]
    if isa.level() == super::simd::Level::Avx512 {
        return super::small_avx512::product(isa, a, s);
    }
    isa.run(RowByRow { a, s });
}

struct RowByRow<'a, 's> {
    a: MatRef<'a>,
    s: &'a mut Sides<'s>,
}

impl Kernel for RowByRow<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let RowByRow { a, s } = self;
        for r in 0..a.rows() {
            let out = &mut s.out[r * s.out_stride..][..s.n];
            if !s.add {
                out.fill(0.0);
            }
            for (j, row) in s.b.chunks(s.stride).enumerate().take(a.cols()) {
                let x = a.at(r, j) * s.scale;
                for (o, &v) in out.iter_mut().zip(row) {
                    *o = L::mul_add(x, v, *o);
                }
            }
        }
    }
}

/// `y = scale (a ⊗ I_inner) x` for each of the blocks `[k, inner]` of `x`, `outer` of them a row; the matrices `[k, k]`
/// serve equally many neighbours each.
pub(super) fn middle(
    isa: Isa,
    a: &[MatRef<'_>],
    (outer, k, inner): (usize, usize, usize),
    x: &[f32],
    scale: f32,
    y: &mut [f32],
) {
    let each = k * inner;
    for (i, (b, y)) in x.chunks_exact(each).zip(y.chunks_exact_mut(each)).enumerate() {
        let a = a[i % outer * a.len() / outer];
        for (t, out) in y.chunks_mut(ROWS * inner).enumerate() {
            let a = a.part(t * ROWS, 0, out.len() / inner, k);
            product(
                isa,
                a,
                &mut Sides { b, stride: inner, n: inner, out, out_stride: inner, scale, add: false },
            );
        }
    }
}

/// `y = x m` for the runs of `k` channels of rows of `n`; the matrices `[k, k]` serve equally many runs each.
pub(super) fn last(isa: Isa, x: &[f32], n: usize, (m, k): (&[f32], usize), y: &mut [f32]) {
    let (runs, count) = (n / k, m.len() / (k * k));
    for (x, y) in x.chunks(ROWS * n).zip(y.chunks_mut(ROWS * n)) {
        for o in 0..runs {
            let a = MatRef::strided(&x[o * k..], x.len() / n, k, n, 1);
            let (b, out) = (&m[o * count / runs * k * k..][..k * k], &mut y[o * k..]);
            product(isa, a, &mut Sides { b, stride: k, n: k, out, out_stride: n, scale: 1.0, add: false });
        }
    }
}

/// `out[i, j] = Σ a[t, i] b[t, j]` over all `t`, for `a[.., m]` and `b[.., n]`: in `f32` over some thousand terms, then in
/// `f64`, in one order.
///
/// # Panics
/// If the sizes do not fit.
pub fn outer_small(
    pool: &Pool,
    isa: Isa,
    (a, b): (&[f32], &[f32]),
    (m, n): (usize, usize),
    out: &mut [f32],
    scratch: &Scratch,
) {
    assert!(m > 0 && n > 0 && out.len() == m * n, "a product [{m}, {n}]");
    let count = a.len() / m;
    assert_eq!((a.len(), b.len()), (count * m, count * n), "operands of [{m}, {n}]");
    // Terms of one task, and of one product, whose factors stay in the first-level cache.
    const TASK: usize = 8 * 1024;
    let group = (4096 / (m + n)).max(1);
    sum_of_tasks(pool, count.div_ceil(TASK), out, scratch, |task, out| {
        for from in (task * TASK..count.min((task + 1) * TASK)).step_by(group) {
            let k = group.min(count.min((task + 1) * TASK) - from);
            let b = &b[from * n..][..k * n];
            for (t, out) in out.chunks_mut(ROWS * n).enumerate() {
                let a = MatRef::strided(&a[from * m + t * ROWS..], out.len() / n, k, 1, m);
                product(isa, a, &mut Sides { b, stride: n, n, out, out_stride: n, scale: 1.0, add: true });
            }
        }
    });
}

/// The sum of what the tasks add to zeros, in their order, in `f64`.
fn sum_of_tasks(
    pool: &Pool,
    tasks: usize,
    out: &mut [f32],
    scratch: &Scratch,
    add: impl Fn(usize, &mut [f32]) + Sync,
) {
    let len = out.len();
    let mut parts = scratch.take(tasks * len);
    pool.for_chunks(&mut parts, len, |task, out| {
        out.fill(0.0);
        add(task, out);
    });
    for (i, out) in out.iter_mut().enumerate() {
        *out = (0..tasks).map(|t| f64::from(parts[t * len + i])).sum::<f64>() as f32;
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
    let task = (8 * 1024 / inner).max(1);
    sum_of_tasks(pool, count.div_ceil(task), out, scratch, |t, out| {
        let mut right = vec![0.0; inner * n];
        for block in t * task..count.min((t + 1) * task) {
            let (a, b) = (&a[block * m * inner..][..m * inner], &b[block * n * inner..][..n * inner]);
            isa.run(TurnSmall { x: b, cols: inner, out: &mut right });
            for (t, out) in out.chunks_mut(ROWS * n).enumerate() {
                let a = MatRef::new(&a[t * ROWS * inner..], out.len() / n, inner);
                let b = &right;
                product(isa, a, &mut Sides { b, stride: n, n, out, out_stride: n, scale: 1.0, add: true });
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::{bits, close, noise, pools3};
    use super::*;

    #[test]
    fn outer_products_match_the_definition() {
        for (count, m, n) in [(1, 1, 1), (3, 24, 24), (17_000, 9, 33), (700, 48, 64), (0, 4, 2)] {
            let (a, b) = (noise(count * m, 1), noise(count * n, 2));
            let term = |t: usize, at: usize| f64::from(a[t * m + at / n]) * f64::from(b[t * n + at % n]);
            let want: Vec<f64> = (0..m * n).map(|at| (0..count).map(|t| term(t, at)).sum()).collect();
            for isa in Isa::available() {
                let mut first = None;
                for pool in &pools3() {
                    let mut out = vec![f32::NAN; m * n];
                    outer_small(pool, isa, (&a, &b), (m, n), &mut out, &Scratch::new());
                    close(&out, &want, 2e-4, &format!("{count} x [{m}, {n}] {}", isa.name()));
                    assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out));
                }
            }
        }
    }

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
