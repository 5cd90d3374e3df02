//! Several results of which each task writes some rows.
#![allow(unsafe_code, reason = "tasks write disjoint rows of several outputs")]

use smallvec::SmallVec;

use super::pool::{Pool, SharedMut};

/// Elements of a result.
#[derive(Debug)]
pub enum SliceMut<'a> {
    /// Floats.
    F32(&'a mut [f32]),
    /// Positions and token ids.
    I32(&'a mut [i32]),
    /// Signed codes.
    I8(&'a mut [i8]),
    /// Unsigned codes and zero points.
    U8(&'a mut [u8]),
}

enum Shared<'a> {
    F32(SharedMut<'a, f32>),
    I32(SharedMut<'a, i32>),
    I8(SharedMut<'a, i8>),
    U8(SharedMut<'a, u8>),
}

impl SliceMut<'_> {
    /// The same elements, lent on.
    pub fn again(&mut self) -> SliceMut<'_> {
        match self {
            SliceMut::F32(x) => SliceMut::F32(x),
            SliceMut::I32(x) => SliceMut::I32(x),
            SliceMut::I8(x) => SliceMut::I8(x),
            SliceMut::U8(x) => SliceMut::U8(x),
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            SliceMut::F32(x) => x.len(),
            SliceMut::I32(x) => x.len(),
            SliceMut::I8(x) => x.len(),
            SliceMut::U8(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Results of equally many rows, which tasks share.
pub struct RowsMut<'a> {
    rows: usize,
    all: SmallVec<[(Shared<'a>, usize); 4]>,
}

impl<'a> RowsMut<'a> {
    /// Results of `rows` rows each.
    ///
    /// # Panics
    /// If one has no whole number of elements for each row.
    pub fn new(outs: impl Iterator<Item = SliceMut<'a>>, rows: usize) -> Self {
        let shared = |out: SliceMut<'a>| {
            assert!(rows > 0 && out.len().is_multiple_of(rows), "{} elements in {rows} rows", out.len());
            let width = out.len() / rows;
            let out = match out {
                SliceMut::F32(x) => Shared::F32(SharedMut::new(x)),
                SliceMut::I32(x) => Shared::I32(SharedMut::new(x)),
                SliceMut::I8(x) => Shared::I8(SharedMut::new(x)),
                SliceMut::U8(x) => Shared::U8(SharedMut::new(x)),
            };
            (out, width)
        };
        RowsMut { rows, all: outs.map(shared).collect() }
    }

    /// Calls `f(first, count, parts)` for each run of at most `at_once` rows inside of `each`, which divides the rows: `first`
    /// is its first row, `count` how many it has, and `parts` are these rows of all results.
    ///
    /// # Panics
    /// If `at_once` is 0.
    pub fn for_each(
        &self,
        pool: &Pool,
        (each, at_once): (usize, usize),
        f: impl Fn(usize, usize, Parts<'_>) + Sync,
    ) {
        let runs = each.div_ceil(at_once);
        pool.for_each(self.rows / each.max(1) * runs, |task| {
            let within = task % runs * at_once;
            let (first, count) = (task / runs * each + within, at_once.min(each - within));
            let mut parts = Parts::new();
            for (shared, width) in &self.all {
                // SAFETY: runs of rows do not overlap, and each is one task's.
                parts.push(unsafe { shared.part(first * width, count * width) });
            }
            f(first, count, parts);
        });
    }
}

/// The same rows of several results.
pub type Parts<'a> = SmallVec<[SliceMut<'a>; 4]>;

impl Shared<'_> {
    /// # Safety
    /// As [`SharedMut::part`].
    unsafe fn part(&self, at: usize, len: usize) -> SliceMut<'_> {
        // SAFETY: promised by the caller.
        unsafe {
            match self {
                Shared::F32(x) => SliceMut::F32(x.part(at, len)),
                Shared::I32(x) => SliceMut::I32(x.part(at, len)),
                Shared::I8(x) => SliceMut::I8(x.part(at, len)),
                Shared::U8(x) => SliceMut::U8(x.part(at, len)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::pools;
    use super::*;

    #[test]
    fn each_row_is_written_once() {
        for pool in &pools() {
            for (rows, each, at_once) in [(1, 1, 1), (6, 3, 2), (20, 20, 7), (8, 4, 9)] {
                let (mut x, mut y) = (vec![0f32; rows * 3], vec![0u8; rows]);
                let outs = [SliceMut::F32(&mut x), SliceMut::U8(&mut y)];
                RowsMut::new(outs.into_iter(), rows).for_each(
                    pool,
                    (each, at_once),
                    |first, count, parts| {
                        assert!(first / each == (first + count - 1) / each && count <= at_once);
                        for p in parts {
                            match p {
                                SliceMut::F32(x) => {
                                    assert_eq!(x.len(), 3 * count);
                                    x.iter_mut().enumerate().for_each(|(i, x)| *x += (3 * first + i) as f32);
                                }
                                SliceMut::U8(y) => y.iter_mut().for_each(|y| *y += 1),
                                _ => unreachable!(),
                            }
                        }
                    },
                );
                assert!(x.iter().enumerate().all(|(i, x)| *x == i as f32) && y.iter().all(|y| *y == 1));
            }
        }
    }
}
