//! Which page holds what: page tables of sequences, pages that are shared, and pages that are free.

use std::collections::{BTreeMap, HashMap};

use qrmc_ir::EngineError;

use super::{PAGE, Segment, Segments};

/// A sequence of a [`Table`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Sequence(usize);

/// The tokens of a page, and what came before them: the number of the content of the page before, 0 at the beginning.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Content {
    before: u64,
    tokens: Box<[u32]>,
}

#[derive(Debug, Default)]
struct PageState {
    /// Sequences that hold it.
    uses: usize,
    /// What it is known to hold, with a number that no other content ever has.
    known: Option<(u64, Content)>,
    /// When it was last let go, while it is known and not in use.
    idle: u64,
}

#[derive(Debug, Default)]
struct Held {
    pages: Vec<u32>,
    /// Of all rows.
    positions: Vec<i32>,
}

/// The pages of all sequences, the same for every layer. A full page may be held by several sequences; a page that is written
/// to belongs to one.
#[derive(Debug)]
pub struct Table {
    sequences: Vec<Option<Held>>,
    pages: Vec<PageState>,
    free: Vec<u32>,
    /// Full pages by what they hold.
    known: HashMap<Content, u32>,
    /// Known pages that no sequence holds, by when they were let go.
    idle: BTreeMap<u64, u32>,
    /// The most pages.
    most: usize,
    /// Counts contents and events.
    clock: u64,
}

impl Table {
    /// No sequences, and room for `most` pages.
    pub fn new(most: usize) -> Self {
        Table {
            sequences: Vec::new(),
            pages: Vec::new(),
            free: Vec::new(),
            known: HashMap::new(),
            idle: BTreeMap::new(),
            most,
            clock: 0,
        }
    }

    /// Pages that were ever in use: a store needs as many.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Pages that sequences hold, each once.
    pub fn used(&self) -> usize {
        self.pages.iter().filter(|p| p.uses > 0).count()
    }

    /// Positions of a sequence; none if it was let go.
    pub fn len(&self, s: Sequence) -> usize {
        self.held(s).map_or(0, |h| h.positions.len())
    }

    /// Whether no sequence is there.
    pub fn is_empty(&self) -> bool {
        self.sequences.iter().all(Option::is_none)
    }

    fn held(&self, s: Sequence) -> Option<&Held> {
        self.sequences.get(s.0)?.as_ref()
    }

    /// A new sequence without positions.
    pub fn add(&mut self) -> Sequence {
        self.put(Held::default())
    }

    fn put(&mut self, held: Held) -> Sequence {
        let at = self.sequences.iter().position(Option::is_none).unwrap_or(self.sequences.len());
        if at == self.sequences.len() {
            self.sequences.push(None);
        }
        self.sequences[at] = Some(held);
        Sequence(at)
    }

    /// A sequence that holds what another does. Pages are shared until one of them writes.
    pub fn fork(&mut self, s: Sequence) -> Sequence {
        let Some(held) = self.held(s) else { return self.add() };
        let (pages, positions) = (held.pages.clone(), held.positions.clone());
        pages.iter().for_each(|&p| self.pages[p as usize].uses += 1);
        self.put(Held { pages, positions })
    }

    /// How many of these tokens are held in whole pages of known content, from the first on.
    pub fn known(&self, tokens: &[u32]) -> usize {
        self.chain(tokens).count() * PAGE
    }

    fn chain<'t>(&'t self, tokens: &'t [u32]) -> impl Iterator<Item = u32> + 't {
        let mut before = 0;
        tokens.chunks_exact(PAGE).map_while(move |tokens| {
            let page = *self.known.get(&Content { before, tokens: tokens.into() })?;
            before = self.pages[page as usize].known.as_ref()?.0;
            Some(page)
        })
    }

    /// A new sequence that takes over the pages of these tokens, which are [`Table::known`].
    pub fn take_over(&mut self, tokens: &[u32]) -> Sequence {
        let pages: Vec<u32> = self.chain(tokens).collect();
        for &p in &pages {
            let page = &mut self.pages[p as usize];
            if page.uses == 0 {
                self.idle.remove(&page.idle);
            }
            page.uses += 1;
        }
        let positions = (0..pages.len() * PAGE).map(|p| p as i32).collect();
        self.put(Held { pages, positions })
    }

    /// Says that a sequence begins with these tokens: its full pages may be taken over by others.
    pub fn know(&mut self, s: Sequence, tokens: &[u32]) {
        let Some(held) = self.held(s) else { return };
        let full = held.positions.len() / PAGE;
        let pages: Vec<u32> = held.pages[..full].to_vec();
        let mut before = 0;
        for (tokens, page) in tokens.chunks_exact(PAGE).zip(pages) {
            let content = Content { before, tokens: tokens.into() };
            let holder = *self.known.entry(content.clone()).or_insert(page);
            if holder == page && self.pages[page as usize].known.is_none() {
                self.clock += 1;
                self.pages[page as usize].known = Some((self.clock, content));
            }
            let Some((number, _)) = &self.pages[holder as usize].known else { return };
            before = *number;
        }
    }

    /// Forgets what a page holds.
    fn forget(&mut self, page: u32) {
        if let Some((_, content)) = self.pages[page as usize].known.take() {
            self.known.remove(&content);
        }
    }

    fn take_page(&mut self) -> Result<u32, EngineError> {
        let page = if let Some(page) = self.free.pop() {
            page
        } else if self.pages.len() < self.most {
            self.pages.push(PageState::default());
            self.pages.len() as u32 - 1
        } else if let Some((_, page)) = self.idle.pop_first() {
            self.forget(page);
            page
        } else {
            return Err(self.full(1));
        };
        self.pages[page as usize].uses = 1;
        Ok(page)
    }

    fn full(&self, more: usize) -> EngineError {
        let held = || self.sequences.iter().flatten();
        EngineError::System(format!(
            "the cache is full: {} sequences hold {} positions, and {more} more do not fit its {} pages of {PAGE}; let a \
             sequence go, shorten the texts, or make the cache larger",
            held().count(),
            held().map(|h| h.positions.len()).sum::<usize>(),
            self.most
        ))
    }

    /// The page that a sequence writes to first, if it is there and others hold it, too.
    fn shared_end(&self, held: &Held, rows: usize) -> Option<u32> {
        let last = *held.pages.get(held.positions.len() / PAGE)?;
        (rows > 0 && self.pages[last as usize].uses > 1).then_some(last)
    }

    fn let_go(&mut self, page: u32) {
        let state = &mut self.pages[page as usize];
        state.uses -= 1;
        if state.uses > 0 {
            return;
        }
        if state.known.is_some() {
            self.clock += 1;
            state.idle = self.clock;
            self.idle.insert(self.clock, page);
        } else {
            self.free.push(page);
        }
    }

    /// Lets a sequence go.
    pub fn remove(&mut self, s: Sequence) {
        self.truncate(s, 0);
        if let Some(held) = self.sequences.get_mut(s.0) {
            *held = None;
        }
    }

    /// Forgets the positions of a sequence from `len` on.
    pub fn truncate(&mut self, s: Sequence, len: usize) {
        let Some(Some(held)) = self.sequences.get_mut(s.0) else { return };
        held.positions.truncate(len);
        let kept = held.positions.len().div_ceil(PAGE).min(held.pages.len());
        // The last pages are the first to be used again: what follows on them is of no use without them.
        for page in held.pages.split_off(kept).into_iter().rev() {
            self.let_go(page);
        }
    }

    /// Makes room for `rows` more positions of each of these sequences, which then count. Yields the pages that are to be
    /// copied first, from and to.
    ///
    /// # Errors
    /// If there are too few pages, a sequence was let go, or stands in the list twice; then nothing has changed.
    pub fn extend(&mut self, parts: &[(Sequence, usize)]) -> Result<Vec<(u32, u32)>, EngineError> {
        let mut need = 0;
        for (i, &(s, rows)) in parts.iter().enumerate() {
            let Some(held) = self.held(s).filter(|_| parts[..i].iter().all(|(t, _)| *t != s)) else {
                let m = format!("sequence {} of a run was let go, or is in it twice", i + 1);
                return Err(EngineError::System(m));
            };
            let end = (held.positions.len() + rows).div_ceil(PAGE);
            need += end.saturating_sub(held.pages.len()) + usize::from(self.shared_end(held, rows).is_some());
        }
        if need > self.free.len() + self.idle.len() + (self.most - self.pages.len()) {
            return Err(self.full(parts.iter().map(|(_, rows)| rows).sum()));
        }
        let mut copies = Vec::new();
        for &(s, rows) in parts {
            self.reserve(s, rows, &mut copies)?;
        }
        for &(s, rows) in parts {
            if let Some(Some(held)) = self.sequences.get_mut(s.0) {
                let next = held.positions.len();
                held.positions.extend((next..next + rows).map(|p| p as i32));
            }
        }
        Ok(copies)
    }

    /// Gives a sequence pages of its own for its next `rows` positions.
    fn reserve(&mut self, s: Sequence, rows: usize, copies: &mut Vec<(u32, u32)>) -> Result<(), EngineError> {
        let Some(held) = self.held(s) else { return Ok(()) };
        let (len, have) = (held.positions.len(), held.pages.len());
        if let Some(last) = self.shared_end(held, rows) {
            let own = self.take_page()?;
            self.let_go(last);
            copies.push((last, own));
            self.own(s).pages[len / PAGE] = own;
        } else if let Some(&last) = held.pages.get(len / PAGE).filter(|_| rows > 0) {
            self.forget(last);
        }
        for _ in have..(len + rows).div_ceil(PAGE) {
            let page = self.take_page()?;
            self.own(s).pages.push(page);
        }
        Ok(())
    }

    fn own(&mut self, s: Sequence) -> &mut Held {
        self.sequences[s.0].get_or_insert_default()
    }

    /// What a run sees of these sequences, the last `rows` positions of each being new.
    pub fn segments(&self, parts: &[(Sequence, usize)]) -> Segments<'_> {
        let mut first = 0;
        let segment = |&(s, rows): &(Sequence, usize)| {
            let held = self.held(s)?;
            let past = held.positions.len().checked_sub(rows)?;
            first += rows;
            let (pages, positions) = (&held.pages[..], &held.positions[..]);
            Some(Segment { first: first - rows, rows, past, pages, positions })
        };
        Segments::new(parts.iter().filter_map(segment).collect())
    }
}

#[cfg(test)]
mod tests;
