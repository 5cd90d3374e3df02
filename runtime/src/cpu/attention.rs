//! Causal attention with grouped query heads, in `f32`.
#![allow(unsafe_code, reason = "tasks write disjoint heads and rows of one output")]

use super::dot::dot_rows;
use super::gemm::{MatRef, product};
use super::pool::{Pool, Scratch, SharedMut};
use super::reduce::{exp_in_place, max_of};
use super::simd::{Isa, Kernel, Lanes, exp, max};
use super::weight::Row;

/// Queries that one task of a prefill takes.
const BLOCK: usize = 128;
/// Keys that one task of a decode step takes.
const RUN: usize = 512;

/// The sizes of an attention.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AttnShape {
    /// Sequences.
    pub batch: usize,
    /// Queries of each sequence.
    pub seq: usize,
    /// Keys before the first query.
    pub past: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// Rows of keys or values, possibly a cache with room for more: element `d` of head `h` at position `t` of
/// sequence `b` is `data[b * batch_stride + t * row_stride + h * head_stride + d]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// From a sequence to the next.
    pub batch_stride: usize,
    /// From a position to the next.
    pub row_stride: usize,
    /// From a head to the next.
    pub head_stride: usize,
}

impl<'a> Rows<'a> {
    /// Dense `[batch, positions, heads * head_dim]`.
    pub fn dense(data: &'a [f32], positions: usize, heads: usize, head_dim: usize) -> Self {
        let row_stride = heads * head_dim;
        Rows { data, batch_stride: positions * row_stride, row_stride, head_stride: head_dim }
    }

    /// The first `positions` rows of one head, `[positions, head_dim]`.
    pub(super) fn head(&self, b: usize, h: usize, positions: usize, head_dim: usize) -> MatRef<'a> {
        let at = b * self.batch_stride + h * self.head_stride;
        MatRef::strided(&self.data[at..], positions, head_dim, self.row_stride, 1)
    }
}

/// Rows of keys or values that are computed when they are read.
pub trait HeadRows: Sync {
    /// Writes the positions `from..from + count` of a head of a sequence, `[count, head_dim]`.
    fn read(&self, b: usize, head: usize, from: usize, count: usize, out: &mut [f32]);
}

/// Keys or values of all positions.
#[derive(Clone, Copy)]
pub enum KvRows<'a> {
    /// In memory as they are.
    Floats(Rows<'a>),
    /// Kept in another form.
    Other(&'a dyn HeadRows),
}

impl KvRows<'_> {
    /// Elements of memory that [`KvRows::head`] needs for `count` positions.
    fn room(&self, count: usize, head_dim: usize) -> usize {
        if let KvRows::Floats(_) = self { 0 } else { count * head_dim }
    }

    /// The positions `from..from + count` of a head, `[count, head_dim]`.
    fn head<'s>(
        &'s self,
        (b, h): (usize, usize),
        from: usize,
        count: usize,
        head_dim: usize,
        room: &'s mut [f32],
    ) -> MatRef<'s> {
        match self {
            KvRows::Floats(rows) => rows.head(b, h, from + count, head_dim).part(from, 0, count, head_dim),
            KvRows::Other(rows) => {
                rows.read(b, h, from, count, room);
                MatRef::new(room, count, head_dim)
            }
        }
    }
}

/// `softmax(scale * q kᵀ) v` with query `i` of each sequence seeing the keys `0..=past + i`.
///
/// `q` and `out` are `[batch, seq, heads * head_dim]`; `k` and `v` hold at least `past + seq` positions. Query head
/// `h` reads key head `h / (heads / kv_heads)`.
///
/// # Panics
/// If a length does not fit the shape.
#[allow(clippy::too_many_arguments, reason = "three operands and their sizes")]
pub fn attention(
    pool: &Pool,
    isa: Isa,
    shape: &AttnShape,
    scale: f32,
    q: &[f32],
    k: KvRows<'_>,
    v: KvRows<'_>,
    out: &mut [f32],
    scratch: &Scratch,
) {
    let AttnShape { batch, seq, heads, kv_heads, head_dim, .. } = *shape;
    let len = batch * seq * heads * head_dim;
    assert_eq!(q.len(), len, "queries of {shape:?}");
    assert_eq!(out.len(), len, "output of {shape:?}");
    if len == 0 {
        return;
    }
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} query heads on {kv_heads}");
    if seq == 1 {
        decode(pool, isa, shape, scale, q, k, v, out, scratch);
    } else {
        prefill(pool, isa, shape, scale, q, k, v, out, scratch);
    }
}

#[allow(clippy::too_many_arguments, reason = "as `attention`")]
fn prefill(
    pool: &Pool,
    isa: Isa,
    shape: &AttnShape,
    scale: f32,
    q: &[f32],
    k: KvRows<'_>,
    v: KvRows<'_>,
    out: &mut [f32],
    scratch: &Scratch,
) {
    let AttnShape { batch, seq, past, heads, kv_heads, head_dim } = *shape;
    let (width, blocks) = (heads * head_dim, seq.div_ceil(BLOCK));
    let q = Rows::dense(q, seq, heads, head_dim);
    let out = SharedMut::new(out);
    pool.for_each(batch * heads * blocks, |task| {
        // The last blocks see the most keys: they come first, so that none is left over at the end.
        let (block, task) = (blocks - 1 - task / (batch * heads), task % (batch * heads));
        let (b, h) = (task / heads, task % heads);
        let from = block * BLOCK;
        let rows = BLOCK.min(seq - from);
        let seen = past + from + rows;
        let kv = h / (heads / kv_heads);
        let rooms = [k.room(seen, head_dim), v.room(seen, head_dim)];
        let mut room = scratch.take(rooms[0] + rooms[1]);
        let (k_room, v_room) = room.split_at_mut(rooms[0]);
        let k = k.head((b, kv), 0, seen, head_dim, k_room);
        let v = v.head((b, kv), 0, seen, head_dim, v_room);
        let q = q.head(b, h, seq, head_dim).part(from, 0, rows, head_dim);
        let mut scores = scratch.take(rows * seen + rows * head_dim);
        let (scores, acc) = scores.split_at_mut(rows * seen);
        product(q, k.t(), scale, scores, seen);
        let mut sums = [0f32; BLOCK];
        isa.run(Weights { scores, seen, first: past + from, sums: &mut sums });
        product(MatRef::new(scores, rows, seen), v, 1.0, acc, head_dim);
        for (i, (acc, inv)) in acc.chunks_exact(head_dim).zip(sums).enumerate() {
            // SAFETY: this task alone writes head `h` of these rows.
            let out = unsafe { out.part((b * seq + from + i) * width + h * head_dim, head_dim) };
            for (o, &a) in out.iter_mut().zip(acc) {
                *o = a * inv;
            }
        }
    });
}

/// Turns rows of scores into exponentials, with 0 for the keys that are not seen, and the inverses of their sums.
struct Weights<'a> {
    scores: &'a mut [f32],
    seen: usize,
    /// The last key that the first row sees.
    first: usize,
    sums: &'a mut [f32],
}

impl Kernel for Weights<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (i, row) in self.scores.chunks_exact_mut(self.seen).enumerate() {
            let (row, hidden) = row.split_at_mut(self.first + i + 1);
            self.sums[i] = (1.0 / exp_in_place(row)) as f32;
            hidden.fill(0.0);
        }
    }
}

/// One query a sequence: runs of keys for each key head, then the runs are joined in order.
#[allow(clippy::too_many_arguments, reason = "as `attention`")]
fn decode(
    pool: &Pool,
    isa: Isa,
    shape: &AttnShape,
    scale: f32,
    q: &[f32],
    k: KvRows<'_>,
    v: KvRows<'_>,
    out: &mut [f32],
    scratch: &Scratch,
) {
    let AttnShape { batch, past, heads, kv_heads, head_dim, .. } = *shape;
    let (group, keys) = (heads / kv_heads, past + 1);
    let runs = keys.div_ceil(RUN);
    // For each (sequence, key head, run): the weighted values of each query head, then maxima, then sums.
    let each = group * (head_dim + 2);
    let mut parts = scratch.take(batch * kv_heads * runs * each);
    pool.for_chunks(&mut parts, each, |task, part| {
        let (task, run) = (task / runs, task % runs);
        let (b, kv) = (task / kv_heads, task % kv_heads);
        let from = run * RUN;
        let count = RUN.min(keys - from);
        let rooms = [k.room(count, head_dim), v.room(count, head_dim)];
        let mut room = scratch.take(rooms[0] + rooms[1]);
        let (k_room, v_room) = room.split_at_mut(rooms[0]);
        let k = k.head((b, kv), from, count, head_dim, k_room);
        let v = v.head((b, kv), from, count, head_dim, v_room);
        let q = &q[(b * heads + kv * group) * head_dim..][..group * head_dim];
        let mut scores = scratch.take(group * count);
        let mut of_heads: Vec<&mut [f32]> = scores.chunks_exact_mut(count).collect();
        let q = |g: usize| &q[g * head_dim..][..head_dim];
        dot_rows(isa, count, |j| Row::F32(k.row(j)), q, &mut of_heads, 0);
        isa.run(OneQuery { v, scale, scores: &mut scores, part });
    });
    let parts = &parts;
    pool.for_chunks(out, head_dim * heads, |b, out| {
        for (h, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let (kv, g) = (h / group, h % group);
            let part = |run: usize| &parts[((b * kv_heads + kv) * runs + run) * each..][..each];
            let stat = |run: usize, i: usize| part(run)[group * head_dim + i * group + g];
            let top = (0..runs).map(|r| stat(r, 0)).fold(f32::NEG_INFINITY, max);
            let weight = |run: usize| exp(stat(run, 0) - top);
            let sum: f64 = (0..runs).map(|r| f64::from(stat(r, 1)) * f64::from(weight(r))).sum();
            out.fill(0.0);
            for r in 0..runs {
                let w = (f64::from(weight(r)) / sum) as f32;
                for (o, &a) in out.iter_mut().zip(&part(r)[g * head_dim..]) {
                    *o += w * a;
                }
            }
        }
    });
}

/// Joins a run of values by the scores of each query head of one key head.
struct OneQuery<'a> {
    v: MatRef<'a>,
    scale: f32,
    /// `[group, keys]`
    scores: &'a mut [f32],
    /// `[group, head_dim]`, then maximum and then sum of each query head.
    part: &'a mut [f32],
}

impl Kernel for OneQuery<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let OneQuery { v, scale, scores, part } = self;
        let (dim, keys) = (v.cols(), v.rows());
        let group = scores.len() / keys;
        let (acc, stats) = part.split_at_mut(group * dim);
        for (g, scores) in scores.chunks_exact_mut(keys).enumerate() {
            for s in scores.iter_mut() {
                *s *= scale;
            }
            stats[g] = max_of(scores);
            stats[group + g] = exp_in_place(scores) as f32;
        }
        acc.fill(0.0);
        // Four keys at a time, so that what is accumulated is loaded and stored less often.
        let whole = keys / 4 * 4;
        for j in (0..whole).step_by(4) {
            let (v0, v1, v2, v3) = (v.row(j), v.row(j + 1), v.row(j + 2), v.row(j + 3));
            for (g, acc) in acc.chunks_exact_mut(dim).enumerate() {
                let at = g * keys + j;
                let p = [scores[at], scores[at + 1], scores[at + 2], scores[at + 3]];
                for ((((a, &v0), &v1), &v2), &v3) in acc.iter_mut().zip(v0).zip(v1).zip(v2).zip(v3) {
                    let low = L::mul_add(p[1], v1, p[0] * v0);
                    let high = L::mul_add(p[3], v3, p[2] * v2);
                    *a += low + high;
                }
            }
        }
        for j in whole..keys {
            for (g, acc) in acc.chunks_exact_mut(dim).enumerate() {
                let p = scores[g * keys + j];
                for (a, &v) in acc.iter_mut().zip(v.row(j)) {
                    *a = L::mul_add(p, v, *a);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
                .map(|t| {
                    f64::from(scale) * (0..s.head_dim).map(|d| f64::from(q[d]) * at(&k, t, d)).sum::<f64>()
                })
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
            };
            for (k, v) in [(by_row(&kd), by_row(&vd)), (by_head(&kd), by_head(&vd))] {
                let want = naive(&s, 0.3, &q, k, v);
                let (k, v) = (KvRows::Floats(k), KvRows::Floats(v));
                for isa in Isa::available() {
                    let mut first = None;
                    for pool in &pools() {
                        let mut out = vec![f32::NAN; q.len()];
                        attention(pool, isa, &s, 0.3, &q, k, v, &mut out, &Scratch::new());
                        close(&out, &want, 3e-6, &format!("{s:?} {}", isa.name()));
                        assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out));
                    }
                }
            }
        }
    }
}
