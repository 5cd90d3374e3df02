//! Causal attention with grouped query heads, in `f32`, over sequences of any lengths.
//!
//! The keys of a sequence are cut into runs at multiples of [`RUN`]. A run gives each query row a maximum, a sum and weighted
//! values, and runs are joined in their order. So a row has the same bits whatever rows run with it, in whatever pieces its
//! keys lie in memory, and on any number of threads.
#![allow(unsafe_code, reason = "tasks write disjoint heads and rows of one output")]

use std::cmp::Reverse;
use std::ops::Range;

use smallvec::SmallVec;

use super::gemm::MatRef;
use super::pool::{Pool, Scratch, SharedMut};
use super::simd::Isa;
use run::{Join, Joined, Run};

#[cfg(target_arch = "x86_64")]
mod avx512;
mod run;

/// Keys of a run.
pub const RUN: usize = 256;
/// Keys that lie side by side where they are multiplied.
pub const PANEL: usize = 64;
/// Floats in a cache line.
const LINE: usize = 16;
/// Query rows of all heads of a group that one task takes, about, and the most positions of these.
const BLOCK: (usize, usize) = (512, 128);
/// Sequences with more new positions are not cut into tasks at runs.
const FEW: usize = 8;

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

impl AttnShape {
    /// The heads.
    pub fn of_heads(&self) -> Heads {
        Heads { heads: self.heads, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    /// The queries of each sequence.
    pub fn queries(&self) -> Vec<Queries> {
        (0..self.batch).map(|b| Queries { first: b * self.seq, rows: self.seq, past: self.past }).collect()
    }
}

/// The heads of an attention.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// The queries of one sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Queries {
    /// Their first row among the rows of all sequences.
    pub first: usize,
    /// How many there are.
    pub rows: usize,
    /// Keys before the first of them.
    pub past: usize,
}

/// Dense rows of keys or values: element `d` of head `h` at position `t` of sequence `b` is
/// `data[b * batch_stride + t * row_stride + h * head_stride + d]`.
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
    /// Elements of a head.
    pub head_dim: usize,
}

impl<'a> Rows<'a> {
    /// Dense `[batch, positions, heads * head_dim]`.
    pub fn dense(data: &'a [f32], positions: usize, heads: usize, head_dim: usize) -> Self {
        let row_stride = heads * head_dim;
        Rows { data, batch_stride: positions * row_stride, row_stride, head_stride: head_dim, head_dim }
    }

    /// The first `positions` rows of one head, `[positions, head_dim]`.
    pub(super) fn head(&self, b: usize, h: usize, positions: usize) -> MatRef<'a> {
        let at = b * self.batch_stride + h * self.head_stride;
        MatRef::strided(&self.data[at..], positions, self.head_dim, self.row_stride, 1)
    }
}

/// Keys or values of some sequences.
pub trait KvRows: Sync {
    /// How many positions of a sequence lie together from `from` on; at least one.
    fn together(&self, sequence: usize, from: usize) -> usize;

    /// The positions `from..from + count` of a head of a sequence, `[count, head_dim]`, which lie together. What is not in
    /// memory as floats is written to `room`, which has `count * head_dim` elements.
    fn piece<'s>(
        &'s self,
        sequence: usize,
        head: usize,
        from: usize,
        count: usize,
        room: &'s mut [f32],
    ) -> MatRef<'s>;

    /// The positions `from..from + count` of a head of a sequence, channel after channel: `[head_dim, PANEL]`, of which the
    /// first `count` columns count. `from` is a multiple of [`PANEL`] and `count` at most that. `room` has as many elements,
    /// and `spare`.
    #[allow(clippy::too_many_arguments, reason = "what is read, and room for it")]
    fn panel<'s>(
        &'s self,
        isa: Isa,
        sequence: usize,
        head: usize,
        from: usize,
        count: usize,
        room: &'s mut [f32],
        spare: &mut [f32],
    ) -> &'s [f32] {
        turned(self, isa, (sequence, head), from, count, room, spare);
        room
    }
}

/// [`KvRows::panel`] of pieces, which are turned.
pub fn turned<K: KvRows + ?Sized>(
    of: &K,
    isa: Isa,
    (sequence, head): (usize, usize),
    from: usize,
    count: usize,
    room: &mut [f32],
    spare: &mut [f32],
) {
    let (mut at, dim) = (0, room.len() / PANEL);
    while at < count {
        let together = of.together(sequence, from + at).min(count - at);
        let piece = of.piece(sequence, head, from + at, together, &mut spare[..together * dim]);
        run::turn(isa, piece, &mut room[at..], PANEL);
        at += together;
    }
}

impl KvRows for Rows<'_> {
    fn together(&self, _: usize, _: usize) -> usize {
        usize::MAX
    }

    fn piece<'s>(&'s self, b: usize, head: usize, from: usize, count: usize, _: &'s mut [f32]) -> MatRef<'s> {
        self.head(b, head, from + count).part(from, 0, count, self.head_dim)
    }
}

/// `softmax(scale * q kᵀ) v` with query `i` of each sequence seeing the keys `0..=past + i`.
///
/// `q` and `out` are `[rows, heads * head_dim]`, the rows of all sequences; query head `h` reads key head
/// `h / (heads / kv_heads)`.
///
/// # Panics
/// If a length does not fit.
#[allow(clippy::too_many_arguments, reason = "three operands and their sizes")]
pub fn attention(
    pool: &Pool,
    isa: Isa,
    heads: &Heads,
    sequences: &[Queries],
    scale: f32,
    q: &[f32],
    k: &dyn KvRows,
    v: &dyn KvRows,
    out: &mut [f32],
    scratch: &Scratch,
) {
    let width = heads.heads * heads.head_dim;
    let rows = sequences.iter().map(|s| s.first + s.rows).max().unwrap_or(0);
    assert_eq!(q.len(), out.len(), "queries and output of an attention");
    assert!(q.len() >= rows * width, "{rows} rows of {heads:?}");
    if rows * width == 0 {
        return;
    }
    let kv_heads = heads.kv_heads;
    assert!(
        kv_heads > 0 && heads.heads.is_multiple_of(kv_heads),
        "{} query heads on {kv_heads}",
        heads.heads
    );
    let group = heads.heads / kv_heads;
    let (tasks, splits, room) = tasks(sequences, heads);
    let mut parts = scratch.take(room);
    let parts_out = SharedMut::new(&mut parts);
    let out = SharedMut::new(out);
    let at = |s: &Queries, i: usize, kv: usize| (s.first + i) * width + kv * group * heads.head_dim;
    pool.for_each(tasks.len(), |i| {
        let task = &tasks[i];
        let s = &sequences[task.sequence];
        let of = Block { isa, scale, task, past: s.past, k, v, head_dim: heads.head_dim, group };
        let rows = (task.rows.start..task.rows.end).map(|i| at(s, i, task.kv));
        let q: Vec<&[f32]> =
            rows.flat_map(|at| q[at..at + group * heads.head_dim].chunks_exact(heads.head_dim)).collect();
        of.run(&q, scratch, |values, stats| match task.part {
            // SAFETY: each task has a part of its own.
            Some((part, len)) => store(unsafe { parts_out.part(part, len) }, values, stats),
            None => {
                let each = group * heads.head_dim;
                let rows = values.chunks_exact(each).zip(stats.chunks_exact(group)).zip(task.rows.clone());
                for ((values, stats), i) in rows {
                    // SAFETY: this task alone writes these heads of this row.
                    finish(values, stats, unsafe { out.part(at(s, i, task.kv), each) });
                }
            }
        });
    });
    let parts = &parts;
    pool.for_each(splits.len(), |i| {
        let split = &splits[i];
        let s = &sequences[split.sequence];
        let each = group * heads.head_dim;
        let mut room = scratch.take(s.rows * each);
        let mut stats = vec![(0.0, 0.0); s.rows * group];
        let mut joined = Joined { values: &mut room, stats: &mut stats };
        let len = s.rows * group * (heads.head_dim + 2);
        for (run, part) in parts[split.part..][..len * split.runs].chunks_exact(len).enumerate() {
            let (values, rest) = part.split_at(s.rows * each);
            let stats: Vec<(f32, f32)> = rest.as_chunks::<2>().0.iter().map(|s| (s[0], s[1])).collect();
            let limits = limits(s.past, &(0..s.rows), run, group);
            let first = run == 0;
            isa.run(Join { joined: &mut joined, values, stats: &stats, limits: &limits, first });
        }
        let rows = room.chunks_exact(each).zip(stats.chunks_exact(group));
        for (i, (values, stats)) in rows.enumerate() {
            // SAFETY: this task alone writes these heads of this row.
            finish(values, stats, unsafe { out.part(at(s, i, split.kv), each) });
        }
    });
}

/// Query rows of one sequence on one key head, over some runs of its keys.
struct Task {
    sequence: usize,
    kv: usize,
    rows: Range<usize>,
    runs: Range<usize>,
    /// Where the result of a run goes that is joined later.
    part: Option<(usize, usize)>,
}

/// Runs that several tasks computed.
struct Split {
    sequence: usize,
    kv: usize,
    part: usize,
    runs: usize,
}

/// The tasks of an attention, the largest first, what is to be joined after them, and the elements that this takes.
fn tasks(sequences: &[Queries], heads: &Heads) -> (Vec<Task>, Vec<Split>, usize) {
    let group = heads.heads / heads.kv_heads;
    let block = (BLOCK.0 / group).clamp(1, BLOCK.1);
    let (mut tasks, mut splits, mut room) = (Vec::new(), Vec::new(), 0);
    for (sequence, s) in sequences.iter().enumerate().filter(|(_, s)| s.rows > 0) {
        let runs = |rows: &Range<usize>| (s.past + rows.end).div_ceil(RUN);
        for kv in 0..heads.kv_heads {
            let all = 0..s.rows;
            if s.rows <= FEW && runs(&all) > 1 {
                let len = s.rows * group * (heads.head_dim + 2);
                splits.push(Split { sequence, kv, part: room, runs: runs(&all) });
                for run in 0..runs(&all) {
                    let part = Some((room, len));
                    tasks.push(Task { sequence, kv, rows: all.clone(), runs: run..run + 1, part });
                    room += len;
                }
                continue;
            }
            for from in all.step_by(block) {
                let rows = from..s.rows.min(from + block);
                let runs = 0..runs(&rows);
                tasks.push(Task { sequence, kv, rows, runs, part: None });
            }
        }
    }
    tasks.sort_by_key(|t| Reverse(t.rows.len() * t.runs.len()));
    (tasks, splits, room)
}

/// How many keys of a run each query row sees: of each position `group` heads.
fn limits(past: usize, rows: &Range<usize>, run: usize, group: usize) -> Vec<usize> {
    let seen = |i: usize| (past + i + 1).saturating_sub(run * RUN).min(RUN);
    rows.clone().flat_map(|i| std::iter::repeat_n(seen(i), group)).collect()
}

/// A task with its operands.
struct Block<'a> {
    isa: Isa,
    scale: f32,
    task: &'a Task,
    past: usize,
    k: &'a dyn KvRows,
    v: &'a dyn KvRows,
    head_dim: usize,
    group: usize,
}

impl Block<'_> {
    /// Computes the runs and hands over weighted values `[rows, head_dim]` with the maximum and the sum of each row.
    fn run(&self, q: &[&[f32]], scratch: &Scratch, done: impl FnOnce(&[f32], &[(f32, f64)])) {
        let (dim, rows, isa) = (self.head_dim, q.len(), self.isa);
        let keys = (self.past + self.task.rows.end).min(RUN).next_multiple_of(PANEL);
        let len = (2 * keys + PANEL) * dim + rows * (keys + 2 * dim);
        let mut room = scratch.take(len + LINE);
        let skip = room.as_ptr().align_offset(4 * LINE).min(LINE);
        let (panels, rest) = room[skip..skip + len].split_at_mut(keys * dim);
        let (pieces, rest) = rest.split_at_mut(keys * dim);
        let (spare, rest) = rest.split_at_mut(PANEL * dim);
        let (scores, rest) = rest.split_at_mut(rows * keys);
        let (values, joined) = rest.split_at_mut(rows * dim);
        let (mut stats, mut all) = (vec![(0.0, 0.0); rows], vec![(0.0, 0.0); rows]);
        let mut joined = Joined { values: joined, stats: &mut all };
        let (sequence, kv) = (self.task.sequence, self.task.kv);
        for run in self.task.runs.clone() {
            let limits = limits(self.past, &self.task.rows, run, self.group);
            let count = limits.last().copied().unwrap_or(0);
            let mut k: SmallVec<[&[f32]; RUN / PANEL]> = SmallVec::new();
            for (at, room) in (0..count).step_by(PANEL).zip(panels.chunks_exact_mut(PANEL * dim)) {
                let (from, count) = (run * RUN + at, PANEL.min(count - at));
                k.push(self.k.panel(isa, sequence, kv, from, count, room, spare));
            }
            let v = self.pieces(run, count, pieces);
            let of = Run { keys: &k, values: &v, scale: self.scale };
            of.compute(isa, q, &limits, (&mut *scores, keys), values, &mut stats);
            let first = run == self.task.runs.start;
            isa.run(Join { joined: &mut joined, values, stats: &stats, limits: &limits, first });
        }
        done(joined.values, joined.stats);
    }

    /// The first `count` values of a run.
    fn pieces<'s>(&'s self, run: usize, count: usize, mut room: &'s mut [f32]) -> SmallVec<[MatRef<'s>; 8]> {
        let (sequence, kv) = (self.task.sequence, self.task.kv);
        let (mut pieces, mut at) = (SmallVec::new(), 0);
        while at < count {
            let from = run * RUN + at;
            // Pieces that stay in the first-level cache for all rows.
            let together = self.v.together(sequence, from).min(count - at).min(PANEL);
            let (mine, rest) = room.split_at_mut(together * self.head_dim);
            pieces.push(self.v.piece(sequence, kv, from, together, mine));
            (room, at) = (rest, at + together);
        }
        pieces
    }
}

/// Writes what a run gave to its part.
fn store(part: &mut [f32], values: &[f32], stats: &[(f32, f64)]) {
    let (to, rest) = part.split_at_mut(values.len());
    to.copy_from_slice(values);
    for (to, &(top, sum)) in rest.as_chunks_mut::<2>().0.iter_mut().zip(stats) {
        // The sum of one run is an `f32`.
        *to = [top, sum as f32];
    }
}

/// Divides the weighted values of a few heads by their sums.
fn finish(values: &[f32], stats: &[(f32, f64)], out: &mut [f32]) {
    let dim = values.len() / stats.len().max(1);
    for ((values, out), (_, sum)) in values.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).zip(stats) {
        let inv = (1.0 / sum) as f32;
        for (o, &x) in out.iter_mut().zip(values) {
            *o = x * inv;
        }
    }
}

#[cfg(test)]
mod tests;
