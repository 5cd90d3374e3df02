//! Orthogonal and learned transforms of channels: mode products and Hadamard matrices.

use super::gemm::{MatRef, matmul, product};
use super::pool::{Pool, Scratch};
use super::simd::{Isa, Kernel, Lanes};
use super::small::{last, middle};

/// Elements that one task computes, about.
const CHUNK: usize = 32 * 1024;
/// Neighbours that a butterfly mixes in registers.
const LANES: usize = 16;
/// Largest matrix that is worth no packing.
const IN_REGISTERS: usize = 64;

/// `out = x (I ⊗ m ⊗ I_inner)` for rows of `n` channels, read as `[outer, l, inner]`. `m` is a list of matrices `[l, l]`;
/// each serves as many neighbours of the `outer` ones.
///
/// # Panics
/// If the sizes do not fit.
pub fn mode_mul(
    pool: &Pool,
    isa: Isa,
    x: &[f32],
    n: usize,
    (m, l, inner): (&[f32], usize, usize),
    out: &mut [f32],
) {
    assert_eq!(x.len(), out.len(), "input and output of a mode product");
    if x.is_empty() {
        return;
    }
    assert!(
        l > 0 && m.len().is_multiple_of(l * l) && n.is_multiple_of(l * inner),
        "matrices for {n} channels"
    );
    let (outer, count) = (n / (l * inner), m.len() / (l * l));
    assert!(count > 0 && outer.is_multiple_of(count), "{count} matrices for {outer} blocks");
    let matrix = |c: usize| MatRef::new(&m[c * l * l..][..l * l], l, l);
    if inner == 1 && count == 1 && l > IN_REGISTERS {
        let rows = x.len() / l;
        return matmul(pool, isa, MatRef::new(x, rows, l), matrix(0), out, l);
    }
    let turned: Vec<_> = (0..count).map(|c| matrix(c).t()).collect();
    let rows = (CHUNK / n).max(if inner == 1 { 32 } else { 1 });
    pool.for_chunks(out, rows * n, |c, y| {
        let x = &x[c * rows * n..][..y.len()];
        if inner > 1 {
            middle(isa, &turned, (outer, l, inner), x, 1.0, y);
        } else if l <= IN_REGISTERS {
            last(isa, x, n, (m, l), y);
        } else {
            // All rows of a block of channels at once.
            let rows = y.len() / n;
            for o in 0..outer {
                let x = MatRef::strided(&x[o * l..], rows, l, n, 1);
                product(x, matrix(o * count / outer), 1.0, &mut y[o * l..], n);
            }
        }
    });
}

/// The transform of [`qrmc_ir::hadamard`] on each run of `block` of the rows of `n` channels of `x`: `signs`, one for each
/// channel, come before it, or after the inverse.
///
/// # Panics
/// If there is no such transform or the sizes do not fit.
#[allow(clippy::too_many_arguments, reason = "an operand and the options of the transform")]
pub fn hadamard(
    pool: &Pool,
    isa: Isa,
    x: &[f32],
    n: usize,
    (block, inverse): (usize, bool),
    signs: Option<&[f32]>,
    out: &mut [f32],
    scratch: &Scratch,
) {
    assert_eq!(x.len(), out.len(), "input and output of a transform");
    if x.is_empty() {
        return;
    }
    assert!(block > 0 && n.is_multiple_of(block), "blocks of {block} in {n} channels");
    assert!(signs.is_none_or(|s| s.len() == n), "signs of {n} channels");
    let order = qrmc_ir::hadamard::core_order(block as u64).unwrap_or(0);
    let core: Vec<f32> =
        qrmc_ir::hadamard::core(order).unwrap_or_default().into_iter().map(f32::from).collect();
    assert!(!core.is_empty(), "no transform of {block} channels");
    let k = order as usize;
    let run = block / k;
    let norm = (1.0 / (block as f64).sqrt()) as f32;
    let core = MatRef::new(&core, k, k);
    let core = if inverse { core.t() } else { core };
    let (before, after) = if inverse { (None, signs) } else { (signs, None) };
    let rows = (CHUNK / n).max(1);
    pool.for_chunks(out, rows * n, |c, out| {
        let x = &x[c * rows * n..][..out.len()];
        let scale = if k == 1 { norm } else { 1.0 };
        let mix = |y: &mut [f32]| isa.run(Butterflies { x, y, n, run, signs: before, scale });
        if k == 1 {
            mix(out);
        } else {
            let mut mixed = scratch.take(out.len());
            mix(&mut mixed);
            if run == 1 {
                let blocks = out.len() / k;
                product(MatRef::new(&mixed, blocks, k), core.t(), norm, out, k);
            } else {
                middle(isa, &[core], (1, k, run), &mixed, norm, out);
            }
        }
        if let Some(signs) = after {
            isa.run(Signs { y: out, signs });
        }
    });
}

/// `y` = `x * signs` with the Walsh-Hadamard matrix of `run` on each run, times `scale`.
struct Butterflies<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
    n: usize,
    run: usize,
    signs: Option<&'a [f32]>,
    scale: f32,
}

impl Kernel for Butterflies<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Butterflies { x, y, n, run, signs, scale } = self;
        for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
            match signs {
                None => {
                    for (y, &x) in y.iter_mut().zip(x) {
                        *y = x * scale;
                    }
                }
                Some(signs) => {
                    for ((y, &x), &s) in y.iter_mut().zip(x).zip(signs) {
                        *y = x * s * scale;
                    }
                }
            }
            let mut half = 1;
            if run >= LANES {
                let (parts, _) = y.as_chunks_mut::<LANES>();
                for v in parts {
                    *v = pairs::<8>(pairs::<4>(pairs::<2>(pairs::<1>(*v))));
                }
                half = LANES;
            }
            while half < run {
                for pair in y.chunks_exact_mut(2 * half) {
                    let (low, high) = pair.split_at_mut(half);
                    for (a, b) in low.iter_mut().zip(high) {
                        (*a, *b) = (*a + *b, *a - *b);
                    }
                }
                half *= 2;
            }
        }
    }
}

/// Sums and differences of the elements that are `HALF` apart.
#[inline(always)]
fn pairs<const HALF: usize>(v: [f32; LANES]) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        let (a, b) = (v[i & !HALF], v[i | HALF]);
        out[i] = if i & HALF == 0 { a + b } else { a - b };
    }
    out
}

/// Rows of `y` times `signs`.
struct Signs<'a> {
    y: &'a mut [f32],
    signs: &'a [f32],
}

impl Kernel for Signs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for y in self.y.chunks_exact_mut(self.signs.len()) {
            for (y, &s) in y.iter_mut().zip(self.signs) {
                *y *= s;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{bits, close, noise, pools3};
    use super::*;

    #[test]
    fn mode_products_match_the_definition() {
        // rows, outer, l, inner, matrices
        let cases = [
            (1, 1, 1, 1, 1),
            (5, 1, 7, 3, 1),
            (37, 1, 24, 24, 1),
            (3, 1, 32, 48, 1),
            (70, 9, 5, 1, 1),
            (70, 9, 5, 1, 9),
            (35, 6, 8, 1, 3),
            (11, 6, 5, 9, 3),
            (2, 1, 9, 64, 1),
            (3000, 1, 2, 6, 1),
            (0, 1, 4, 4, 1),
        ];
        for (rows, outer, l, inner, count) in cases {
            let n = outer * l * inner;
            let (x, m) = (noise(rows * n, 1), noise(count * l * l, 2));
            let want: Vec<f64> = (0..rows * n)
                .map(|at| {
                    let (row, o, i, p) = (at / n, at % n / (l * inner), at / inner % l, at % inner);
                    let m = &m[o * count / outer * l * l..];
                    let x = |j: usize| x[row * n + (o * l + j) * inner + p];
                    (0..l).map(|j| f64::from(m[j * l + i]) * f64::from(x(j))).sum()
                })
                .collect();
            for isa in Isa::available() {
                let mut first = None;
                for pool in &pools3() {
                    let mut out = vec![f32::NAN; x.len()];
                    mode_mul(pool, isa, &x, n, (&m, l, inner), &mut out);
                    close(&out, &want, 1e-5, &format!("{outer} x {l} x {inner} {}", isa.name()));
                    assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out));
                }
            }
        }
    }

    /// The transform of one block, by its matrix.
    fn naive(x: &[f32], block: usize, inverse: bool) -> Vec<f64> {
        let k = qrmc_ir::hadamard::core_order(block as u64).unwrap();
        let core = qrmc_ir::hadamard::core(k).unwrap();
        let (k, run) = (k as usize, block / k as usize);
        // `y = x (coreᵀ ⊗ W)`; `W` is symmetric.
        let at = |i: usize, j: usize| {
            let (i, j) = if inverse { (j, i) } else { (i, j) };
            let sign = if ((i % run) & (j % run)).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
            f64::from(core[j / run * k + i / run]) * sign
        };
        (0..block)
            .map(|j| (0..block).map(|i| f64::from(x[i]) * at(i, j)).sum::<f64>() / (block as f64).sqrt())
            .collect()
    }

    #[test]
    fn hadamard_matches_its_matrix_and_its_expansion() {
        for (block, blocks, rows) in [
            (1, 3, 2),
            (4, 5, 3),
            (12, 2, 3),
            (40, 1, 2),
            (64, 3, 5),
            (192, 1, 3),
            (576, 1, 67),
            (768, 2, 2),
            (1536, 1, 1),
            (8960, 1, 1),
        ] {
            let n = block * blocks;
            let (x, signs) = (noise(rows * n, 1), noise(n, 2));
            let signs: Vec<f32> = signs.iter().map(|s| s.signum()).collect();
            let times =
                |x: &[f32]| -> Vec<f32> { x.iter().zip(signs.iter().cycle()).map(|(x, s)| x * s).collect() };
            for (inverse, signed) in [(false, false), (false, true), (true, false), (true, true)] {
                let from = if signed && !inverse { times(&x) } else { x.clone() };
                let mut want: Vec<f64> = from.chunks(block).flat_map(|x| naive(x, block, inverse)).collect();
                if signed && inverse {
                    want.iter_mut().zip(signs.iter().cycle()).for_each(|(w, s)| *w *= f64::from(*s));
                }
                let op = qrmc_ir::Op::Hadamard { block: block as u64, inverse };
                close(&expanded(&op, &x, n, signed.then_some(&signs)), &want, 1e-5, "expansion");
                for isa in Isa::available() {
                    let mut first = None;
                    for pool in &pools3() {
                        let mut out = vec![f32::NAN; x.len()];
                        let signs = signed.then_some(&signs[..]);
                        let how = (block, inverse);
                        hadamard(pool, isa, &x, n, how, signs, &mut out, &Scratch::new());
                        close(&out, &want, 1e-5, &format!("{block} {inverse} {signed} {}", isa.name()));
                        assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out));
                    }
                }
            }
        }
    }

    /// What the definition in the IR gives.
    fn expanded(op: &qrmc_ir::Op, x: &[f32], n: usize, signs: Option<&Vec<f32>>) -> Vec<f32> {
        let mut args = vec![(vec![x.len() / n, n], x.to_vec())];
        args.extend(signs.map(|s| (vec![n], s.clone())));
        super::super::testing::expanded(op, &args, None).remove(0)
    }
}
