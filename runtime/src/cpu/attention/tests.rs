use super::super::testing::{bits, close, noise, pools};
use super::*;

fn naive(s: &AttnShape, scale: f32, q: &[f32], k: Rows<'_>, v: Rows<'_>) -> Vec<f64> {
    let mut out = Vec::new();
    for (b, i, h) in
        (0..s.batch).flat_map(|b| (0..s.seq).flat_map(move |i| (0..s.heads).map(move |h| (b, i, h))))
    {
        let q = &q[((b * s.seq + i) * s.heads + h) * s.head_dim..][..s.head_dim];
        let at = |x: &Rows<'_>, t: usize, d: usize| {
            let kv = h / (s.heads / s.kv_heads);
            f64::from(x.data[b * x.batch_stride + t * x.row_stride + kv * x.head_stride + d])
        };
        let scores: Vec<f64> = (0..=s.past + i)
            .map(|t| f64::from(scale) * (0..s.head_dim).map(|d| f64::from(q[d]) * at(&k, t, d)).sum::<f64>())
            .collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|x| (x - top).exp()).sum();
        out.extend((0..s.head_dim).map(|d| {
            scores.iter().enumerate().map(|(t, x)| (x - top).exp() / sum * at(&v, t, d)).sum::<f64>()
        }));
    }
    out
}

#[test]
fn matches_the_definition() {
    // batch, seq, past, heads, kv_heads, head_dim
    let cases = [
        (1, 1, 0, 1, 1, 8),
        (2, 1, 9, 9, 3, 16),
        (1, 1, 1200, 4, 2, 64),
        (1, 2, 0, 3, 1, 8),
        (2, 7, 5, 9, 3, 64),
        (1, 140, 0, 2, 2, 128),
        (2, 131, 30, 4, 1, 20),
        (0, 3, 1, 2, 1, 8),
    ];
    for (batch, seq, past, heads, kv_heads, head_dim) in cases {
        let s = AttnShape { batch, seq, past, heads, kv_heads, head_dim };
        let q: Vec<f32> = noise(batch * seq * heads * head_dim, 1).iter().map(|x| 3.0 * x).collect();
        // A cache with room for five more positions, by position and by head.
        let room = past + seq + 5;
        let (kd, vd) =
            (noise(batch * room * kv_heads * head_dim, 2), noise(batch * room * kv_heads * head_dim, 3));
        let by_row = |d| Rows::dense(d, room, kv_heads, head_dim);
        let by_head = |data| Rows {
            data,
            batch_stride: room * kv_heads * head_dim,
            row_stride: head_dim,
            head_stride: room * head_dim,
            head_dim,
        };
        for (k, v) in [(by_row(&kd), by_row(&vd)), (by_head(&kd), by_head(&vd))] {
            let want = naive(&s, 0.3, &q, k, v);

            for isa in Isa::available() {
                let mut first = None;
                for pool in &pools() {
                    let mut out = vec![f32::NAN; q.len()];
                    let (heads, scratch) = (s.of_heads(), Scratch::new());
                    attention(pool, isa, &heads, &s.queries(), 0.3, &q, &k, &v, &mut out, &scratch);
                    close(&out, &want, 3e-6, &format!("{s:?} {}", isa.name()));
                    assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out));
                }
            }
        }
    }
}
