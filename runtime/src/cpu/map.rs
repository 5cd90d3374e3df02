//! Several elementwise operations in one pass over memory.

use super::elementwise::{BinaryOp, Side, UnaryOp, one, two};
use super::pool::Pool;
use super::simd::Isa;

/// Elements that one task computes, about.
const CHUNK: usize = 16 * 1024;
/// Elements that an operation computes before the next one does: what is between them stays in the first-level cache.
const WIDTH: usize = 1024;

/// An elementwise operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapOp {
    /// On the first of its values.
    Unary(UnaryOp),
    /// On both.
    Binary(BinaryOp),
}

/// One operation of a [`map`]. Values are numbered: the operands, then the results of the operations in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapStep {
    /// What is done.
    pub op: MapOp,
    /// On which values.
    pub args: [usize; 2],
}

/// An operand of a [`map`] whose result is `[rows, n]`.
#[derive(Clone, Copy, Debug)]
pub enum MapIn<'a> {
    /// `[rows, n]`
    All(&'a [f32]),
    /// `[n]`, the same for each row.
    Vector(&'a [f32]),
    /// `[rows]`, one number for each row.
    Rows(&'a [f32]),
    /// One number.
    One(f32),
}

/// `out[rows, n]` = the result of the last of `steps`. The bytes are those of the operations one by one.
///
/// # Panics
/// If a length does not fit, there is no step, or a step reads a value that is not there yet or, if it has one operand,
/// one that is not as large as the result.
pub fn map(pool: &Pool, isa: Isa, ins: &[MapIn<'_>], steps: &[MapStep], n: usize, out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    let rows = out.len() / n.max(1);
    assert_eq!(out.len(), rows * n, "rows of {n} elements");
    for x in ins {
        let (have, want) = match x {
            MapIn::All(x) => (x.len(), out.len()),
            MapIn::Vector(x) => (x.len(), n),
            MapIn::Rows(x) => (x.len(), rows),
            MapIn::One(_) => continue,
        };
        assert_eq!(have, want, "elements of an operand of [{rows}, {n}]");
    }
    let slots = slots(ins.len(), steps);
    // Where no operand knows rows, they are as long as a task.
    let flat = ins.iter().all(|x| matches!(x, MapIn::All(_) | MapIn::One(_)));
    let n = if flat { CHUNK } else { n };
    let per_task = (CHUNK / n).max(1) * n;
    pool.for_chunks(out, per_task, |task, out| {
        let mut room = vec![vec![0f32; WIDTH.min(n)]; slots.iter().max().map_or(0, |most| most + 1)];
        for (r, row) in out.chunks_mut(n).enumerate() {
            let at = task * per_task + r * n;
            for (w, out) in row.chunks_mut(WIDTH).enumerate() {
                let (col, len) = (w * WIDTH, out.len());
                for (s, step) in steps.iter().enumerate() {
                    // Nothing that is read lies where the result goes.
                    let mut to = slots.get(s).map(|&slot| std::mem::take(&mut room[slot]));
                    let [a, b] = step.args.map(|v| match v.checked_sub(ins.len()) {
                        Some(from) => Side::Many(&room[slots[from]][..len]),
                        None => match ins[v] {
                            MapIn::All(x) => Side::Many(&x[at + col..][..len]),
                            MapIn::Vector(x) => Side::Many(&x[col..][..len]),
                            MapIn::Rows(x) => Side::One(x[at / n]),
                            MapIn::One(x) => Side::One(x),
                        },
                    });
                    let y = to.as_mut().map_or(&mut *out, |to| &mut to[..len]);
                    match (step.op, a) {
                        (MapOp::Binary(op), a) => two(isa, op, a, b, y),
                        (MapOp::Unary(op), Side::Many(x)) => one(isa, op, x, y),
                        (MapOp::Unary(op), Side::One(_)) => panic!("{op:?} of an operand that is repeated"),
                    }
                    if let Some(to) = to {
                        room[slots[s]] = to;
                    }
                }
            }
        }
    });
}

/// For each step but the last, where its result is kept until the last step that reads it.
fn slots(ins: usize, steps: &[MapStep]) -> Vec<usize> {
    let (_, inner) = steps.split_last().expect("an operation");
    let reads = |step: &MapStep, s: usize| match step.op {
        MapOp::Unary(_) => step.args[0] == ins + s,
        MapOp::Binary(_) => step.args.contains(&(ins + s)),
    };
    let last = |s: usize| steps.iter().rposition(|step| reads(step, s)).unwrap_or(s);
    let mut out: Vec<usize> = Vec::new();
    for s in 0..inner.len() {
        let busy = |slot: usize| (0..s).any(|t| out[t] == slot && last(t) >= s);
        let slot = (0..).find(|&slot| !busy(slot)).unwrap_or(0);
        out.push(slot);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::elementwise::{binary, unary};
    use super::super::testing::{bits, noise, pools};
    use super::*;

    /// `silu(x) * (x - v) / r + (x - v) * one`: values read twice, and every kind of operand.
    const STEPS: [MapStep; 6] = [
        MapStep { op: MapOp::Binary(BinaryOp::Sub), args: [0, 1] },
        MapStep { op: MapOp::Unary(UnaryOp::Silu), args: [0, 0] },
        MapStep { op: MapOp::Binary(BinaryOp::Mul), args: [5, 4] },
        MapStep { op: MapOp::Binary(BinaryOp::Div), args: [6, 2] },
        MapStep { op: MapOp::Binary(BinaryOp::Mul), args: [4, 3] },
        MapStep { op: MapOp::Binary(BinaryOp::Add), args: [7, 8] },
    ];

    #[test]
    fn same_bytes_as_one_by_one() {
        for (rows, n) in [(1, 1), (3, 1), (5, 7), (2, 1024), (3, 2500), (70, 576), (0, 4)] {
            let (x, v, r) = (noise(rows * n, 1), noise(n, 2), noise(rows, 3));
            for isa in Isa::available() {
                for pool in &pools() {
                    let whole = |op, a: (&[f32], &[usize]), b: (&[f32], &[usize])| {
                        let mut y = vec![0.0; rows * n];
                        binary(pool, isa, op, a, b, &mut y);
                        y
                    };
                    let (all, vector, per_row): (&[usize], &[usize], &[usize]) =
                        (&[rows, n], &[n], &[rows, 1]);
                    let apart = whole(BinaryOp::Sub, (&x, all), (&v, vector));
                    let mut silu = vec![0.0; rows * n];
                    unary(pool, isa, UnaryOp::Silu, &x, &mut silu);
                    let product = whole(BinaryOp::Mul, (&silu, all), (&apart, all));
                    let left = whole(BinaryOp::Div, (&product, all), (&r, per_row));
                    let right = whole(BinaryOp::Mul, (&apart, all), (&[0.3], &[1]));
                    let want = whole(BinaryOp::Add, (&left, all), (&right, all));
                    let ins = [MapIn::All(&x), MapIn::Vector(&v), MapIn::Rows(&r), MapIn::One(0.3)];
                    let mut have = vec![f32::NAN; rows * n];
                    map(pool, isa, &ins, &STEPS, n, &mut have);
                    assert_eq!(bits(&have), bits(&want), "[{rows}, {n}] {}", isa.name());
                }
            }
        }
    }

    #[test]
    fn without_rows_all_is_one_run() {
        let (x, y) = (noise(40_001, 4), noise(40_001, 5));
        let steps = [
            MapStep { op: MapOp::Unary(UnaryOp::Sigmoid), args: [0, 0] },
            MapStep { op: MapOp::Binary(BinaryOp::Sub), args: [2, 3] },
            MapStep { op: MapOp::Binary(BinaryOp::Mul), args: [4, 1] },
        ];
        for pool in &pools() {
            let mut s = vec![0.0; x.len()];
            unary(pool, Isa::detect(), UnaryOp::Sigmoid, &x, &mut s);
            let want: Vec<f32> = s.iter().zip(&y).map(|(s, y)| (1.0 - s) * y).collect();
            let mut have = vec![0.0; x.len()];
            let ins = [MapIn::All(&x), MapIn::All(&y), MapIn::One(1.0)];
            map(pool, Isa::detect(), &ins, &steps, 1, &mut have);
            assert_eq!(bits(&have), bits(&want));
        }
    }

    #[test]
    fn results_that_are_read_no_more_make_room() {
        assert_eq!(slots(4, &STEPS), [0, 1, 2, 1, 2]);
        assert!(slots(2, &STEPS[..1]).is_empty());
    }
}
