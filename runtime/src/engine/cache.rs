//! Keys and values of all positions so far, in pages.

use qrmc_ir::pack::pack_row;
use qrmc_ir::{EngineError, Grain};
use qrmc_lowering::CacheForm;

use crate::cpu::{self, Isa, KvRows, MatRef};

#[cfg(test)]
mod attention_tests;
mod reader;
mod table;
#[cfg(test)]
mod tests;

pub(super) use reader::{Read, Reader};
pub use table::{Sequence, Table};

/// Positions of a page: keys of a page are multiplied as they lie.
pub const PAGE: usize = cpu::attention::PANEL;
/// Floats in a cache line.
const LINE: usize = 16;

/// Pages of keys or of values of one layer, for all sequences. Which page holds what, the table of a [`Segment`] says.
#[derive(Debug)]
pub struct KvStore {
    shape: PageShape,
    pages: Vec<Page>,
}

/// What a page keeps of each position.
#[derive(Debug)]
struct PageShape {
    form: Option<CacheForm>,
    /// How floats lie.
    order: Order,
    /// Elements of a row, and of one head in it.
    width: usize,
    head_dim: usize,
    /// Bytes of the codes of a row; 0 where rows are floats.
    row_bytes: usize,
    /// Elements that share a scale of their row; 0 where there are none.
    group: usize,
}

/// How the floats of a page lie, head after head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// `[head_dim, PAGE]`: for keys, which are multiplied many at a time.
    Channels,
    /// `[PAGE, head_dim]`: for values.
    Positions,
}

/// Rows of [`PAGE`] positions: floats, or bit streams as of [`qrmc_ir::RawWeight`] with scales and zero points.
#[derive(Debug)]
struct Page {
    /// They begin at a cache line, at most [`LINE`] elements from the first.
    floats: Box<[f32]>,
    skip: usize,
    codes: Box<[u8]>,
    scales: Box<[f32]>,
    zeros: Box<[u8]>,
}

/// New rows, `[rows, width]`.
pub(super) enum NewRows<'a> {
    Floats(&'a [f32]),
    /// Codes, and scales and zero points of their groups, if they are their own.
    Unsigned(&'a [u8], &'a [f32], &'a [u8]),
    Signed(&'a [i8], &'a [f32]),
}

/// The rows of one sequence in a run, and where the sequence lies.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// The first of its new rows among all of the run.
    pub first: usize,
    /// New rows.
    pub rows: usize,
    /// Positions before these.
    pub past: usize,
    /// The page of each [`PAGE`] positions, the new ones among them.
    pub pages: &'a [u32],
    /// The positions of its tokens in the text, the new ones among them.
    pub positions: &'a [i32],
}

/// The sequences of a run, in the order of their rows: one description for the caches of all layers.
#[derive(Debug)]
pub struct Segments<'a> {
    list: Vec<Segment<'a>>,
    furthest: i32,
}

impl<'a> Segments<'a> {
    /// These sequences.
    pub fn new(list: Vec<Segment<'a>>) -> Self {
        let far = |s: &Segment<'_>| s.positions.iter().map(|p| p.saturating_abs()).max().unwrap_or(0);
        let furthest = list.iter().map(far).max().unwrap_or(0);
        Segments { list, furthest }
    }

    /// The sequences.
    pub fn list(&self) -> &[Segment<'a>] {
        &self.list
    }

    /// New rows of all sequences.
    pub fn rows(&self) -> usize {
        self.list.iter().map(|s| s.rows).sum()
    }

    /// Positions of all new rows.
    pub fn new_positions(&self) -> impl Iterator<Item = i32> + '_ {
        self.list.iter().flat_map(|s| &s.positions[s.past..s.past + s.rows]).copied()
    }

    /// The largest magnitude of a position.
    pub(super) fn furthest(&self) -> i32 {
        self.furthest
    }

    /// The positions before the new rows, where there is one sequence; of several there is no one number, and it is 0.
    pub(super) fn past(&self) -> usize {
        if let [s] = &self.list[..] { s.past } else { 0 }
    }
}

impl PageShape {
    fn new((width, head_dim): (usize, usize), order: Order, form: Option<&CacheForm>) -> Self {
        let (bits, group) = match form {
            None => (0, 0),
            Some(form) => {
                let group = match form.spec.grain {
                    Grain::Group(g) => g as usize,
                    Grain::Channel => 0,
                    _ => width,
                };
                (usize::from(form.spec.bits), group)
            }
        };
        let row_bytes = (bits * width).div_ceil(8);
        PageShape { form: form.cloned(), order, width, head_dim, row_bytes, group }
    }

    /// Scales of a row.
    fn groups(&self) -> usize {
        self.width.checked_div(self.group).unwrap_or(0)
    }

    fn zeros(&self) -> bool {
        self.form.as_ref().is_some_and(|f| f.spec.zero)
    }

    fn bytes(&self) -> usize {
        let floats = if self.form.is_none() { 4 * self.width } else { 0 };
        PAGE * (floats + self.row_bytes + self.groups() * if self.zeros() { 5 } else { 4 })
    }

    fn page(&self) -> Page {
        let floats = if self.form.is_none() { PAGE * self.width + LINE } else { 0 };
        let floats: Box<[f32]> = vec![0.0; floats].into();
        let zeros = if self.zeros() { self.groups() } else { 0 };
        Page {
            skip: floats.as_ptr().align_offset(4 * LINE).min(LINE).min(floats.len()),
            floats,
            codes: vec![0; PAGE * self.row_bytes].into(),
            scales: vec![0.0; PAGE * self.groups()].into(),
            zeros: vec![0; PAGE * zeros].into(),
        }
    }
}

impl KvStore {
    /// No pages yet, for rows of `width` elements, heads of `head_dim`, as floats or as codes.
    pub fn new((width, head_dim): (usize, usize), order: Order, form: Option<&CacheForm>) -> Self {
        KvStore { shape: PageShape::new((width, head_dim), order, form), pages: Vec::new() }
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.shape.bytes()
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> usize {
        self.pages.len() * self.page_bytes()
    }

    pub(super) fn width(&self) -> usize {
        self.shape.width
    }

    pub(super) fn head_dim(&self) -> usize {
        self.shape.head_dim
    }

    pub(super) fn form(&self) -> Option<&CacheForm> {
        self.shape.form.as_ref()
    }

    /// Makes new pages until there are `count`; those that are there stay where they are.
    pub fn grow(&mut self, count: usize) {
        while self.pages.len() < count {
            self.pages.push(self.shape.page());
        }
    }

    /// Makes page `to` a copy of page `from`; both must be there.
    pub fn copy(&mut self, from: u32, to: u32) {
        let (from, to) = (from as usize, to as usize);
        if let Ok([x, y]) = self.pages.get_disjoint_mut([from, to]) {
            y.floats[y.skip..].iter_mut().zip(&x.floats[x.skip..]).for_each(|(y, x)| *y = *x);
            y.codes.copy_from_slice(&x.codes);
            y.scales.copy_from_slice(&x.scales);
            y.zeros.copy_from_slice(&x.zeros);
        }
    }

    /// Writes the new rows of all sequences to their pages.
    pub(super) fn append(&mut self, new: &NewRows<'_>, segments: &Segments<'_>) -> Result<(), EngineError> {
        let KvStore { shape, pages } = self;
        let (width, groups) = (shape.width, shape.groups());
        let all = segments.rows();
        let (given, scales) = match new {
            NewRows::Floats(x) => (x.len(), all * groups),
            NewRows::Unsigned(x, scales, _) => (x.len(), scales.len()),
            NewRows::Signed(x, scales) => (x.len(), scales.len()),
        };
        if given != all * width || groups > 0 && scales != all * groups {
            let m = format!("{given} elements are appended to caches of {all} new rows of {width}");
            return Err(EngineError::System(m));
        }
        for s in &segments.list {
            let end = s.past + s.rows;
            let there = |p: &u32| (*p as usize) < pages.len();
            if s.pages.len() * PAGE < end || !s.pages.iter().all(there) {
                let m = format!(
                    "{end} positions do not fit {} pages of {PAGE} positions, of which {} are in memory",
                    s.pages.len(),
                    pages.len()
                );
                return Err(EngineError::System(m));
            }
            for i in 0..s.rows {
                let (at, row) = ((s.past + i) % PAGE, s.first + i);
                let page = &mut pages[s.pages[(s.past + i) / PAGE] as usize];
                shape.put(page, at, new, row)?;
            }
        }
        Ok(())
    }

    /// The rows `from..from + count` of a sequence as they are, `[count, width]`, if they are floats.
    pub(super) fn dense(&self, s: &Segment<'_>, from: usize, count: usize) -> Option<Vec<f32>> {
        self.form().is_none().then(|| {
            let row = |t: usize| {
                let floats = self.pages[s.pages[t / PAGE] as usize].floats();
                (0..self.shape.width).map(move |d| floats[self.shape.at(t % PAGE, d)])
            };
            (from..from + count).flat_map(row).collect()
        })
    }
}

impl Page {
    fn floats(&self) -> &[f32] {
        &self.floats[self.skip..]
    }
}

impl PageShape {
    /// Where element `d` of row `t` of a page lies among its floats.
    fn at(&self, t: usize, d: usize) -> usize {
        match self.order {
            Order::Channels => d * PAGE + t,
            Order::Positions => (d / self.head_dim * PAGE + t) * self.head_dim + d % self.head_dim,
        }
    }

    /// Writes row `row` of the new ones to row `at` of a page.
    fn put(&self, page: &mut Page, at: usize, new: &NewRows<'_>, row: usize) -> Result<(), EngineError> {
        let (width, groups) = (self.width, self.groups());
        let put = |to: &mut [f32], from: &[f32], n: usize| {
            to[at * n..(at + 1) * n].copy_from_slice(&from[row * n..(row + 1) * n]);
        };
        let mut codes = Vec::with_capacity(self.row_bytes);
        let elements = row * width..(row + 1) * width;
        match (new, &self.form) {
            (NewRows::Floats(x), None) => {
                let floats = &mut page.floats[page.skip..];
                match self.order {
                    Order::Channels => {
                        let to = floats[at..].iter_mut().step_by(PAGE);
                        to.zip(&x[elements]).for_each(|(y, x)| *y = *x);
                    }
                    Order::Positions => {
                        for (head, x) in x[elements].chunks_exact(self.head_dim).enumerate() {
                            let to = (head * PAGE + at) * self.head_dim;
                            floats[to..to + self.head_dim].copy_from_slice(x);
                        }
                    }
                }
                return Ok(());
            }
            (NewRows::Unsigned(x, scales, zeros), Some(form)) => {
                pack_row(x[elements].iter().copied(), form.spec.bits, &mut codes);
                put(&mut page.scales, scales, groups);
                if self.zeros() {
                    let zeros = &zeros[row * groups..(row + 1) * groups];
                    page.zeros[at * groups..(at + 1) * groups].copy_from_slice(zeros);
                }
            }
            (NewRows::Signed(x, scales), Some(form)) => {
                let least = form.spec.qmin();
                let codes_of = x[elements].iter().map(|&c| (i32::from(c) - least) as u8);
                pack_row(codes_of, form.spec.bits, &mut codes);
                put(&mut page.scales, scales, groups);
            }
            _ => return Err(EngineError::System("new rows are not what their cache keeps".into())),
        }
        page.codes[at * self.row_bytes..(at + 1) * self.row_bytes].copy_from_slice(&codes);
        Ok(())
    }
}

/// Rows of floats, for those who read them.
pub(super) struct FloatRows<'a> {
    pub(super) store: &'a KvStore,
    pub(super) segments: &'a Segments<'a>,
}

impl FloatRows<'_> {
    /// The page of a position, one head of it.
    fn head(&self, s: usize, head: usize, at: usize) -> &[f32] {
        let each = self.store.shape.head_dim * PAGE;
        let page = &self.store.pages[self.segments.list[s].pages[at / PAGE] as usize];
        &page.floats()[head * each..(head + 1) * each]
    }
}

impl KvRows for FloatRows<'_> {
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
        let (dim, floats) = (self.store.shape.head_dim, self.head(s, head, from));
        match self.store.shape.order {
            Order::Positions => MatRef::new(&floats[from % PAGE * dim..][..count * dim], count, dim),
            Order::Channels => {
                for (t, row) in room.chunks_exact_mut(dim).take(count).enumerate() {
                    let channels = floats[from % PAGE + t..].iter().step_by(PAGE);
                    row.iter_mut().zip(channels).for_each(|(y, x)| *y = *x);
                }
                MatRef::new(room, count, dim)
            }
        }
    }

    fn panel<'s>(
        &'s self,
        isa: Isa,
        s: usize,
        head: usize,
        from: usize,
        count: usize,
        room: &'s mut [f32],
        spare: &mut [f32],
    ) -> &'s [f32] {
        if self.store.shape.order == Order::Channels {
            return self.head(s, head, from);
        }
        cpu::attention::turned(self, isa, (s, head), from, count, room, spare);
        room
    }
}
