//! What training starts from (methods.md §7.3): random orthogonal matrices in the published order of draws, scales from
//! the ranges of activations and weights, open clips.

use qrmc_ir::random::LegacyNumpy;
use qrmc_ir::{ModelFacts, Tensor, fermat};

/// Clip parameters start here: `sigmoid(4) = 0.982`.
pub(super) const CLIP: f32 = 4.0;
/// Least scale of a channel.
const MIN_SCALE: f64 = 1e-5;

/// The matrices of a layer in the order of their draws: name, how many, and size. A width that makes no pair has none.
pub(super) fn matrices(facts: &ModelFacts, tp: u64) -> Vec<(String, u64, u64)> {
    let mut list = Vec::new();
    let kron = |list: &mut Vec<_>, name: &str, n: u64, count: u64| {
        if let Some((left, right)) = fermat(n) {
            list.push((format!("{name}.left"), count, left));
            list.push((format!("{name}.right"), count, right));
        }
    };
    kron(&mut list, "attn_in", facts.hidden, 1);
    let heads = [("o_in", tp, facts.heads / tp), ("keys", 1, facts.head_dim), ("values", 1, facts.head_dim)];
    list.extend(heads.map(|(name, count, size)| (format!("{name}.matrix"), count, size)));
    kron(&mut list, "mlp_in", facts.hidden, 1);
    kron(&mut list, "down_in", facts.intermediate / tp, tp);
    list
}

/// Draws the matrices of one layer, `[size, size]`, or `[count, size, size]` for ranks, after those of `before` layers.
/// With `pairs`, each matrix is two, of which the second stands under its name with `.v`.
pub(super) fn draw(
    facts: &ModelFacts,
    tp: u64,
    seed: u32,
    before: usize,
    pairs: bool,
) -> Vec<(String, Tensor)> {
    let list = matrices(facts, tp);
    let each = if pairs { 2 } else { 1 };
    let mut random = LegacyNumpy::new(seed);
    let per_layer: u64 = list.iter().map(|(_, count, n)| count * n * n * each).sum();
    for _ in 0..before as u64 * per_layer {
        random.randn();
    }
    // The ranks of a pair of factors take turns: left and right of the first rank, then of the next.
    let mut out: Vec<(String, Vec<f32>, u64, u64)> = Vec::new();
    for (name, count, n) in &list {
        out.push((name.clone(), Vec::new(), *count, *n));
        if pairs {
            out.push((format!("{name}.v"), Vec::new(), *count, *n));
        }
    }
    let mut at = 0;
    while at < list.len() {
        let together = if list[at].0.ends_with(".left") { 2 } else { 1 };
        for _ in 0..list[at].1 {
            for o in &mut out[at * each as usize..(at + together) * each as usize] {
                o.1.extend(orthogonal(&mut random, o.3 as usize));
            }
        }
        at += together;
    }
    out.into_iter()
        .map(|(name, data, count, n)| {
            let n = n as usize;
            let shape = if count > 1 { vec![count as usize, n, n] } else { vec![n, n] };
            (name, Tensor::f32(shape, data))
        })
        .collect()
}

/// Whether a matrix is one for each rank.
pub(super) fn ranked(name: &str) -> bool {
    name.starts_with("down_in.") || name.starts_with("o_in.")
}

/// The orthogonal factor of a Gaussian matrix, signs fixed so that it is unique: Gram and Schmidt, twice.
fn orthogonal(random: &mut LegacyNumpy, n: usize) -> Vec<f32> {
    let m: Vec<f64> = (0..n * n).map(|_| random.randn()).collect();
    let mut columns: Vec<Vec<f64>> = Vec::with_capacity(n);
    for j in 0..n {
        let mut c: Vec<f64> = (0..n).map(|i| m[i * n + j]).collect();
        for _ in 0..2 {
            for q in &columns {
                let dot: f64 = q.iter().zip(&c).map(|(a, b)| a * b).sum();
                c.iter_mut().zip(q).for_each(|(x, q)| *x -= dot * q);
            }
        }
        let norm = c.iter().map(|x| x * x).sum::<f64>().sqrt();
        c.iter_mut().for_each(|x| *x /= norm);
        columns.push(c);
    }
    (0..n * n).map(|at| columns[at % n][at / n] as f32).collect()
}

/// `d = clamp(max|w|^(1 - alpha) / max|x|^alpha)` by channel.
pub(super) fn diagonal(xmax: &[f32], wmax: &[f32], alpha: f64) -> Vec<f32> {
    let one = |(x, w): (&f32, &f32)| {
        let (x, w) = (f64::from(*x).max(MIN_SCALE), f64::from(*w));
        (w.powf(1.0 - alpha) / x.powf(alpha)).max(MIN_SCALE) as f32
    };
    xmax.iter().zip(wmax).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // methods.md §2.6 [golden]: the sign-fixed Q of np.random.seed(0); randn(2, 2).
    #[test]
    fn orthogonal_golden() {
        let q = orthogonal(&mut LegacyNumpy::new(0), 2);
        let want = [0.874_428_8, -0.485_153_8, 0.485_153_8, 0.874_428_8];
        assert!(q.iter().zip(want).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-6), "{q:?}");
    }

    // methods.md §7.3 [golden].
    #[test]
    fn diagonal_golden() {
        let want = [0.213_846_92, 0.648_262_64, 0.1];
        for (have, want) in diagonal(&[4.0, 0.5, 10.0], &[0.2, 0.4, 0.1], 0.3).iter().zip(want) {
            assert!((f64::from(*have) - want).abs() < 1e-6, "{have} {want}");
        }
    }

    #[test]
    fn layers_continue_the_stream() {
        let facts =
            ModelFacts { hidden: 12, intermediate: 16, heads: 4, head_dim: 3, ..ModelFacts::default() };
        let names: Vec<String> = matrices(&facts, 2).into_iter().map(|(n, ..)| n).collect();
        let want = "attn_in.left attn_in.right o_in.matrix keys.matrix values.matrix mlp_in.left mlp_in.right down_in.left down_in.right";
        assert_eq!(names.join(" "), want);
        let (first, second) = (draw(&facts, 2, 0, 0, false), draw(&facts, 2, 0, 1, false));
        assert_ne!(first[0].1, second[0].1);
        // The second layer's first matrix is what comes after all of the first layer's.
        let total: u64 = matrices(&facts, 2).iter().map(|(_, c, n)| c * n * n).sum();
        let mut random = LegacyNumpy::new(0);
        for _ in 0..total {
            random.randn();
        }
        assert_eq!(second[0].1.as_f32().unwrap(), orthogonal(&mut random, 2));
        assert_eq!(first[8].1.shape(), [2, 4, 4]);
        assert_eq!(first[3].1.shape(), [3, 3]);
    }
}
