//! Rows of codes as floats.

use std::borrow::Cow;
use std::sync::Arc;

use super::{KvStore, PAGE, Segment, Segments};
use crate::cpu::{self, Isa, KvRows, MatRef, Pool, Scratch, WeightView};
use crate::engine::turns::Turns;

/// Something that is done to a row that is read, with what it needs.
pub(in crate::engine) enum Read<'a> {
    Add(Cow<'a, [f32]>),
    Rope(Arc<Turns>),
    AddTurned(Cow<'a, [f32]>, Arc<Turns>, Option<usize>),
}

/// Scales of channels, and zero points if there are some.
pub(in crate::engine) type Channels<'a> = (Cow<'a, [f32]>, Option<&'a [u8]>);

/// The rows of a cache of codes, for those who read them.
pub(in crate::engine) struct Reader<'a> {
    pub(in crate::engine) store: &'a KvStore,
    pub(in crate::engine) segments: &'a Segments<'a>,
    pub(in crate::engine) isa: Isa,
    /// Where scales belong to channels: these.
    pub(in crate::engine) channels: Option<Channels<'a>>,
    pub(in crate::engine) reads: Vec<Read<'a>>,
    pub(in crate::engine) head_dim: usize,
    /// One thread: rows are read inside of a task.
    pub(in crate::engine) alone: Pool,
    pub(in crate::engine) scratch: &'a Scratch,
}

impl Reader<'_> {
    /// The rows `from..from + count` of a sequence as floats, `[count, width]`.
    pub(in crate::engine) fn dense(&self, s: usize, from: usize, count: usize) -> Vec<f32> {
        let (width, d) = (self.store.shape.width, self.head_dim);
        let mut out = vec![0.0; count * width];
        let mut head = vec![0.0; PAGE * d];
        let mut t = from;
        while t < from + count {
            let rows = self.together(s, t).min(from + count - t);
            for h in 0..width / d {
                self.read(&self.segments.list[s], h, t, &mut head[..rows * d]);
                for (i, row) in head[..rows * d].chunks_exact(d).enumerate() {
                    out[(t - from + i) * width + h * d..][..d].copy_from_slice(row);
                }
            }
            t += rows;
        }
        out
    }

    /// Rows of one head in one page, from position `from` on.
    fn read(&self, s: &Segment<'_>, head: usize, from: usize, out: &mut [f32]) {
        let (shape, d) = (&self.store.shape, self.head_dim);
        let Some(form) = &shape.form else { return };
        let page = &self.store.pages[s.pages[from / PAGE] as usize];
        let (first, count) = (from % PAGE, out.len() / d);
        let groups = shape.groups();
        let span = first * groups..(first + count) * groups;
        // Scales of channels come after: until then, codes are values.
        let ones = [1.0; PAGE];
        let own = shape.group > 0;
        let view = WeightView::Packed {
            bits: form.spec.bits,
            signed: form.spec.signed,
            codes: &page.codes[first * shape.row_bytes..][..count * shape.row_bytes],
            group: if own { shape.group } else { shape.width },
            scales: if own { &page.scales[span.clone()] } else { &ones[..count] },
            zeros: if own && form.spec.zero { Some(&page.zeros[span]) } else { None },
        };
        cpu::weight::read_part(self.isa, &view, shape.width, head * d, d, out);
        if let Some((scales, zeros)) = &self.channels {
            let channels = head * d..(head + 1) * d;
            let scales = &scales[channels.clone()];
            let zeros = zeros.map(|z| &z[channels]);
            for row in out.chunks_exact_mut(d) {
                match zeros {
                    Some(zeros) => {
                        for ((y, &s), &z) in row.iter_mut().zip(scales).zip(zeros) {
                            *y = s * (*y - f32::from(z));
                        }
                    }
                    None => row.iter_mut().zip(scales).for_each(|(y, s)| *y *= s),
                }
            }
        }
        let positions = || &s.positions[from..from + count];
        for r in &self.reads {
            match r {
                Read::Add(v) => {
                    for row in out.chunks_exact_mut(d) {
                        row.iter_mut().zip(&v[head * d..]).for_each(|(y, v)| *y += v);
                    }
                }
                Read::Rope(turns) => turns.turn(&self.alone, self.isa, positions(), d, out),
                Read::AddTurned(v, turns, block) => {
                    let mut added = v[head * d..(head + 1) * d].repeat(count);
                    turns.turn(&self.alone, self.isa, positions(), d, &mut added);
                    if let Some(n) = *block {
                        let x = added.clone();
                        let how = (n, false);
                        cpu::hadamard(&self.alone, self.isa, &x, d, how, None, &mut added, self.scratch);
                    }
                    out.iter_mut().zip(&added).for_each(|(y, v)| *y += v);
                }
            }
        }
    }
}

impl KvRows for Reader<'_> {
    fn together(&self, _: usize, from: usize) -> usize {
        PAGE - from % PAGE
    }

    fn piece<'s>(
        &'s self,
        s: usize,
        head: usize,
        from: usize,
        count: usize,
        room: &'s mut [f32],
    ) -> MatRef<'s> {
        let room = &mut room[..count * self.head_dim];
        self.read(&self.segments.list[s], head, from, room);
        MatRef::new(room, count, self.head_dim)
    }
}
