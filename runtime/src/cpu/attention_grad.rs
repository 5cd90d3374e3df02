//! The gradient of causal attention with grouped query heads, in `f32`.

use super::attention::{AttnShape, Rows};
use super::gemm::{MatRef, product, product_add};
use super::pool::{Pool, Scratch};
use super::reduce::exp_in_place;
use super::simd::{Isa, Kernel, Lanes};

/// Queries that are worked on at a time: hidden keys beyond the last of them are not touched.
const BLOCK: usize = 128;

/// Gradients of [`super::attention()`] with respect to `q`, `k` and `v`, given that of its output, `dy`. All are dense:
/// `[batch, seq, heads * head_dim]`, or `[batch, past + seq, kv_heads * head_dim]`.
///
/// A key head and the query heads that share it are one task; these add to its gradient in their order.
///
/// # Panics
/// If a length does not fit the shape.
#[allow(clippy::too_many_arguments, reason = "four operands and their sizes")]
pub fn attention_grad(
    pool: &Pool,
    isa: Isa,
    shape: &AttnShape,
    scale: f32,
    [q, k, v, dy]: [&[f32]; 4],
    [dq, dk, dv]: [&mut [f32]; 3],
    scratch: &Scratch,
) {
    let AttnShape { batch, seq, past, heads, kv_heads, head_dim } = *shape;
    let (keys, width, kv_width) = (past + seq, heads * head_dim, kv_heads * head_dim);
    assert!(q.len() == batch * seq * width && dy.len() == q.len() && dq.len() == q.len(), "{shape:?}");
    assert!(k.len() == batch * keys * kv_width && v.len() == k.len(), "keys and values of {shape:?}");
    assert!(dk.len() == k.len() && dv.len() == k.len(), "gradients of keys and values of {shape:?}");
    if q.is_empty() {
        dk.fill(0.0);
        dv.fill(0.0);
        return;
    }
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} query heads on {kv_heads}");
    let group = heads / kv_heads;
    let rows = |data| Rows::dense(data, seq, heads, head_dim);
    let kv_rows = |data| Rows::dense(data, keys, kv_heads, head_dim);
    let (q, dy, k, v) = (rows(q), rows(dy), kv_rows(k), kv_rows(v));
    // For each task `dk`, `dv`, and `dq` of each head, all `[positions, head_dim]`.
    let each = (2 * keys + group * seq) * head_dim;
    let mut parts = scratch.take(batch * kv_heads * each);
    pool.for_chunks(&mut parts, each, |task, part| {
        let (b, kv) = (task / kv_heads, task % kv_heads);
        let (dk, rest) = part.split_at_mut(keys * head_dim);
        let (dv, dq) = rest.split_at_mut(keys * head_dim);
        dk.fill(0.0);
        dv.fill(0.0);
        let most = BLOCK.min(seq) * keys;
        let mut room = scratch.take(2 * most);
        for (g, dq) in dq.chunks_exact_mut(seq * head_dim).enumerate() {
            let h = kv * group + g;
            for (block, dq) in dq.chunks_mut(BLOCK * head_dim).enumerate() {
                let (from, count) = (block * BLOCK, dq.len() / head_dim);
                let seen = past + from + count;
                let (k, v) = (k.head(b, kv, seen), v.head(b, kv, seen));
                let part = |x: &Rows<'_>, data| Rows { data, ..*x }.head(b, h, seq);
                let q = part(&q, q.data).part(from, 0, count, head_dim);
                let dy = part(&dy, dy.data).part(from, 0, count, head_dim);
                let (probs, scores) = room.split_at_mut(most);
                let (probs, scores) = (&mut probs[..count * seen], &mut scores[..count * seen]);
                product(q, k.t(), scale, probs, seen);
                product(dy, v.t(), 1.0, scores, seen);
                isa.run(Scores { probs, scores, seen, first: past + from, scale });
                let (probs, scores) = (MatRef::new(probs, count, seen), MatRef::new(scores, count, seen));
                product(scores, k, 1.0, dq, head_dim);
                product_add(scores.t(), q, 1.0, &mut dk[..seen * head_dim], head_dim);
                product_add(probs.t(), dy, 1.0, &mut dv[..seen * head_dim], head_dim);
            }
        }
    });
    let parts = &parts;
    let of = |b: usize, kv: usize| &parts[(b * kv_heads + kv) * each..][..each];
    join(pool, dq, (seq, heads, head_dim), |b, h, i| {
        &of(b, h / group)[(2 * keys + h % group * seq + i) * head_dim..][..head_dim]
    });
    for (out, at) in [(dk, 0), (dv, keys)] {
        join(pool, out, (keys, kv_heads, head_dim), |b, h, i| &of(b, h)[(at + i) * head_dim..][..head_dim]);
    }
}

/// Writes `[batch, positions, heads * head_dim]` from the rows of `(sequence, head, position)`.
fn join<'a>(
    pool: &Pool,
    out: &mut [f32],
    (positions, heads, head_dim): (usize, usize, usize),
    row: impl Fn(usize, usize, usize) -> &'a [f32] + Sync,
) {
    const ROWS: usize = 64;
    pool.for_chunks(out, ROWS * heads * head_dim, |c, out| {
        for (r, out) in out.chunks_exact_mut(heads * head_dim).enumerate() {
            let at = c * ROWS + r;
            for (h, out) in out.chunks_exact_mut(head_dim).enumerate() {
                out.copy_from_slice(row(at / positions, h, at % positions));
            }
        }
    });
}

/// Turns rows of scores into probabilities, and rows of their gradients into gradients of the scores; 0 for the keys
/// that are not seen.
struct Scores<'a> {
    /// Scaled scores before, probabilities after.
    probs: &'a mut [f32],
    /// Gradients of the probabilities before, of `q kᵀ` after.
    scores: &'a mut [f32],
    seen: usize,
    /// The last key that the first row sees.
    first: usize,
    scale: f32,
}

impl Kernel for Scores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Scores { probs, scores, seen, first, scale } = self;
        for (i, (p, d)) in probs.chunks_exact_mut(seen).zip(scores.chunks_exact_mut(seen)).enumerate() {
            let (p, p_hidden) = p.split_at_mut(first + i + 1);
            let (d, d_hidden) = d.split_at_mut(first + i + 1);
            p_hidden.fill(0.0);
            d_hidden.fill(0.0);
            let inv = (1.0 / exp_in_place(p)) as f32;
            for p in p.iter_mut() {
                *p *= inv;
            }
            let mean = dot::<L>(p, d);
            for (d, &p) in d.iter_mut().zip(&*p) {
                *d = (*d - mean) * p * scale;
            }
        }
    }
}

/// `Σ a b` in 32 lanes.
#[inline(always)]
fn dot<L: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0f32; 32];
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<32>(), b.as_chunks::<32>());
    for (a, b) in a.iter().zip(b) {
        for l in 0..32 {
            acc[l] = L::mul_add(a[l], b[l], acc[l]);
        }
    }
    for (l, (&a, &b)) in a_tail.iter().zip(b_tail).enumerate() {
        acc[l] = L::mul_add(a, b, acc[l]);
    }
    let mut width = 16;
    while width > 0 {
        for l in 0..width {
            acc[l] += acc[l + width];
        }
        width /= 2;
    }
    acc[0]
}

#[cfg(test)]
mod tests {
    use qrmc_ir::{AttnAttr, Dim, Op, Real, Sym};

    use super::super::testing::{bits, close, expanded, noise, pools3};
    use super::*;

    #[test]
    fn matches_the_expansion() {
        // batch, seq, past, heads, kv_heads, head_dim
        for (batch, seq, past, heads, kv_heads, head_dim) in [
            (1, 1, 0, 1, 1, 4),
            (2, 37, 0, 9, 3, 16),
            (1, 37, 11, 4, 2, 64),
            (1, 1, 9, 2, 1, 8),
            (1, 140, 0, 3, 1, 20),
            (1, 131, 30, 2, 2, 8),
        ] {
            let s = AttnShape { batch, seq, past, heads, kv_heads, head_dim };
            let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
            let ins = [(seq, wide, 1), (past + seq, narrow, 2), (past + seq, narrow, 3), (seq, wide, 4)]
                .map(|(rows, n, seed)| (vec![batch, rows, n], noise(batch * rows * n, seed)));
            let types = [(Sym::S, wide), (Sym::T, narrow), (Sym::T, narrow), (Sym::S, wide)]
                .map(|(rows, n)| vec![Dim::Sym(Sym::B), Dim::Sym(rows), Dim::Fixed(n as u64)]);
            let attr = AttnAttr { heads: heads as u32, kv_heads: kv_heads as u32, scale: Real(0.3) };
            let want = expanded(&Op::AttentionGrad(attr), &ins, Some(&types));
            for isa in Isa::available() {
                let mut first = None;
                for pool in &pools3() {
                    let mut outs = [0, 1, 2].map(|i| vec![f32::NAN; want[i].len()]);
                    let [dq, dk, dv] = &mut outs;
                    let data = [&ins[0].1[..], &ins[1].1, &ins[2].1, &ins[3].1];
                    attention_grad(pool, isa, &s, 0.3, data, [dq, dk, dv], &Scratch::new());
                    for (out, want) in outs.iter().zip(&want) {
                        let want: Vec<f64> = want.iter().map(|w| f64::from(*w)).collect();
                        close(out, &want, 1e-5, &format!("{s:?} {}", isa.name()));
                    }
                    let all = bits(&outs.concat());
                    assert_eq!(*first.get_or_insert_with(|| all.clone()), all);
                }
            }
        }
    }
}
