//! Keys and values of every layer, for sequences that share pages.

use qrmc_ir::EngineError;

use crate::engine::{KvStore, PAGE, Segments, Sequence, Table};

/// Keys and values of every layer, in pages that sequences share where they begin alike.
pub struct Caches {
    layers: Vec<(KvStore, KvStore)>,
    table: Table,
}

impl Caches {
    /// Nothing yet, with room for `pages` pages in each of these stores of keys and of values.
    pub(crate) fn new(layers: Vec<(KvStore, KvStore)>, pages: usize) -> Self {
        Caches { layers, table: Table::new(pages) }
    }

    /// A new sequence without positions.
    pub fn add(&mut self) -> Sequence {
        self.table.add()
    }

    /// A sequence that holds what another does.
    pub fn fork(&mut self, s: Sequence) -> Sequence {
        self.table.fork(s)
    }

    /// Lets a sequence go. What is known of its beginning may still be taken over, until its pages are used again.
    pub fn remove(&mut self, s: Sequence) {
        self.table.remove(s);
    }

    /// Positions that a sequence holds.
    pub fn len(&self, s: Sequence) -> usize {
        self.table.len(s)
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Forgets all positions of a sequence from `len` on.
    pub fn truncate(&mut self, s: Sequence, len: usize) {
        self.table.truncate(s, len);
    }

    /// How many of these tokens are held in whole pages, from the first on.
    pub fn known(&self, tokens: &[u32]) -> usize {
        self.table.known(tokens)
    }

    /// A new sequence that takes over the pages of these tokens, as far as they are [`Caches::known`].
    pub fn take_over(&mut self, tokens: &[u32]) -> Sequence {
        self.table.take_over(tokens)
    }

    /// Says that a sequence begins with these tokens, so that others may take its pages over.
    pub fn know(&mut self, s: Sequence, tokens: &[u32]) {
        self.table.know(s, tokens);
    }

    /// Bytes of the memory that all pages take, those that are free among them.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|(k, v)| k.bytes() + v.bytes()).sum()
    }

    /// Bytes of the pages that sequences hold.
    pub fn used_bytes(&self) -> usize {
        let page: usize = self.layers.iter().map(|(k, v)| k.page_bytes() + v.page_bytes()).sum();
        self.table.used() * page
    }

    /// Makes room for `rows` more positions of each of these sequences.
    pub(crate) fn extend(&mut self, parts: &[(Sequence, usize)]) -> Result<(), EngineError> {
        let copies = self.table.extend(parts)?;
        for store in self.layers.iter_mut().flat_map(|(k, v)| [k, v]) {
            store.grow(self.table.pages());
            copies.iter().for_each(|&(from, to)| store.copy(from, to));
        }
        Ok(())
    }

    /// The stores of all layers, and what a run sees of these sequences, whose last rows are new.
    pub(crate) fn run(&mut self, parts: &[(Sequence, usize)]) -> (&mut [(KvStore, KvStore)], Segments<'_>) {
        (&mut self.layers, self.table.segments(parts))
    }
}

/// Pages for this many positions.
pub fn pages(positions: usize) -> usize {
    positions.div_ceil(PAGE)
}
