//! The pages of the key-value cache: who refers to a page, what a page holds, and which page is
//! given away next.
//!
//! A page is *free* (it holds nothing), *used* (sequences refer to it) or *cached* (nothing refers
//! to it, but its contents are known by their hash and can be used again). Cached pages are given
//! away in the order in which they were last used. Where the positions of a sequence are split over
//! ranks, each of these ranks has its own arena; page `i` of a chain lies in arena
//! `(first + i) mod arenas`.

use std::collections::{BTreeMap, HashMap};

use qwen3_model::{PAGE_POSITIONS, PageId};

use crate::chain::PageHash;

/// A page of one of the arenas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Page {
    /// The arena.
    pub arena: usize,
    /// The page within the arena.
    pub id: PageId,
}

/// The number of pages that hold `tokens` positions.
pub(crate) fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_POSITIONS)
}

#[derive(Default)]
struct State {
    /// Sequences that refer to the page.
    references: u32,
    /// What the page holds, if other sequences may find it.
    hash: Option<PageHash>,
    /// The key in `Arena::cached`, if the page is cached.
    stamp: u64,
}

#[derive(Default)]
struct Arena {
    states: Vec<State>,
    free: Vec<PageId>,
    /// Cached pages by the time of their last use.
    cached: BTreeMap<u64, PageId>,
}

/// All pages of all arenas.
pub(crate) struct PagePool {
    arenas: Vec<Arena>,
    index: HashMap<PageHash, Page>,
    clock: u64,
    evicted: u64,
}

impl PagePool {
    /// A pool of `arenas` arenas with `pages` pages each.
    pub fn new(arenas: usize, pages: usize) -> Self {
        let arena = || Arena {
            states: (0..pages).map(|_| State::default()).collect(),
            // The lowest page is taken first.
            free: (0..pages as u32).rev().map(PageId).collect(),
            cached: BTreeMap::new(),
        };
        let arenas = (0..arenas).map(|_| arena()).collect();
        Self { arenas, index: HashMap::new(), clock: 0, evicted: 0 }
    }

    /// The number of arenas.
    pub fn arenas(&self) -> usize {
        self.arenas.len()
    }

    /// The arena of page `index` of a chain that starts in arena `first`.
    pub fn arena_of(&self, first: usize, index: usize) -> usize {
        (first + index) % self.arenas.len()
    }

    /// Pages of one arena.
    pub fn pages_per_arena(&self) -> usize {
        self.arenas[0].states.len()
    }

    /// The arena with the most pages that can be taken.
    pub fn emptiest(&self) -> usize {
        let most = (0..self.arenas.len()).max_by_key(|arena| (self.available(*arena), !arena));
        most.expect("a pool has at least one arena")
    }

    /// Pages of an arena that can be taken: free and cached ones.
    pub fn available(&self, arena: usize) -> usize {
        self.arenas[arena].free.len() + self.arenas[arena].cached.len()
    }

    /// Pages that sequences refer to, cached pages, and pages given away while they were cached, in
    /// all arenas.
    pub fn counts(&self) -> (usize, usize, u64) {
        let cached = self.arenas.iter().map(|arena| arena.cached.len()).sum();
        let free: usize = self.arenas.iter().map(|arena| arena.free.len()).sum();
        (self.arenas.len() * self.pages_per_arena() - free - cached, cached, self.evicted)
    }

    /// Takes a page of `arena` with unknown contents, with one reference.
    pub fn take(&mut self, arena: usize) -> Option<Page> {
        let pages = &mut self.arenas[arena];
        let id = match pages.free.pop() {
            Some(id) => id,
            None => {
                let (_, id) = pages.cached.pop_first()?;
                let hash = pages.states[id.0 as usize].hash.take();
                self.index.remove(&hash.expect("a cached page has a hash"));
                self.evicted += 1;
                id
            }
        };
        pages.states[id.0 as usize].references = 1;
        Some(Page { arena, id })
    }

    /// The page with these contents, if there is one; it gains no reference.
    pub fn find(&self, hash: &PageHash) -> Option<Page> {
        self.index.get(hash).copied()
    }

    /// Whether nothing refers to `page`.
    pub fn is_cached(&self, page: Page) -> bool {
        self.arenas[page.arena].states[page.id.0 as usize].references == 0
    }

    /// Adds a reference to a page that is used or cached.
    pub fn retain(&mut self, page: Page) {
        let arena = &mut self.arenas[page.arena];
        let state = &mut arena.states[page.id.0 as usize];
        if state.references == 0 {
            arena.cached.remove(&state.stamp).expect("an unused page that is found is cached");
        }
        state.references += 1;
    }

    /// Drops references to the pages of a chain, in chain order. Pages that nothing refers to any
    /// more become cached if their contents are known, otherwise free. Of one chain the last page
    /// is given away first: the pages before it are of use without it, but not the reverse.
    pub fn release(&mut self, chain: &[Page]) {
        for page in chain.iter().rev() {
            let arena = &mut self.arenas[page.arena];
            let state = &mut arena.states[page.id.0 as usize];
            state.references = state.references.checked_sub(1).expect("a reference to drop");
            if state.references > 0 {
                continue;
            }
            if state.hash.is_some() {
                self.clock += 1;
                state.stamp = self.clock;
                arena.cached.insert(state.stamp, page.id);
            } else {
                arena.free.push(page.id);
            }
        }
    }

    /// Makes a full page known by its contents, unless another page with these contents is known.
    pub fn publish(&mut self, page: Page, hash: PageHash) {
        if let std::collections::hash_map::Entry::Vacant(entry) = self.index.entry(hash) {
            entry.insert(page);
            self.arenas[page.arena].states[page.id.0 as usize].hash = Some(hash);
        }
    }

    /// References to each page, for tests of balance.
    #[cfg(test)]
    pub fn references(&self) -> HashMap<Page, u32> {
        let mut all = HashMap::new();
        for (arena, pages) in self.arenas.iter().enumerate() {
            for (id, state) in (0..).zip(&pages.states) {
                if state.references > 0 {
                    all.insert(Page { arena, id: PageId(id) }, state.references);
                }
            }
        }
        all
    }

    /// Checks that every page is free, used or cached, and exactly one of these.
    #[cfg(test)]
    pub fn check(&self) {
        for (number, arena) in self.arenas.iter().enumerate() {
            let mut seen = vec![0; arena.states.len()];
            arena.free.iter().chain(arena.cached.values()).for_each(|id| seen[id.0 as usize] += 1);
            for (id, state) in arena.states.iter().enumerate() {
                let expected = u32::from(state.references == 0);
                assert_eq!(seen[id], expected, "page {id} of arena {number}");
                if let Some(hash) = state.hash {
                    let page = Page { arena: number, id: PageId(id as u32) };
                    assert_eq!(self.index.get(&hash), Some(&page));
                }
            }
            assert!(arena.free.iter().all(|id| arena.states[id.0 as usize].hash.is_none()));
        }
        let known = self.arenas.iter().flat_map(|arena| &arena.states);
        assert_eq!(known.filter(|state| state.hash.is_some()).count(), self.index.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::ChainKey;

    fn hashes(count: u32) -> Vec<PageHash> {
        let key = ChainKey::new([7; 32], b"model");
        let mut last = key.start(b"", 0);
        (0..count)
            .map(|token| {
                last = key.next(&last, &[token], 1);
                last
            })
            .collect()
    }

    #[test]
    fn pages_are_given_away_in_the_order_of_their_last_use_and_chains_from_their_end() {
        let mut pool = PagePool::new(1, 4);
        let hashes = hashes(4);
        let pages: Vec<_> = (0..4).map(|_| pool.take(0).expect("a free page")).collect();
        assert_eq!(pool.take(0), None);
        for (page, hash) in pages.iter().zip(&hashes) {
            pool.publish(*page, *hash);
        }
        pool.release(&pages[..2]);
        pool.release(&pages[2..]);
        assert_eq!(pool.counts(), (0, 4, 0));
        // The first chain is used again, and is now the younger one.
        pool.retain(pages[0]);
        pool.retain(pages[1]);
        pool.release(&pages[..2]);
        let order: Vec<_> = (0..4).map(|_| pool.take(0).expect("a cached page")).collect();
        assert_eq!(order, [pages[3], pages[2], pages[1], pages[0]]);
        assert_eq!((pool.counts(), pool.find(&hashes[0])), ((4, 0, 4), None));
        pool.check();
    }

    #[test]
    fn shared_pages_stay_until_the_last_reference_goes() {
        let mut pool = PagePool::new(2, 2);
        let hash = hashes(1)[0];
        let page = pool.take(1).expect("a free page");
        pool.publish(page, hash);
        pool.retain(page);
        pool.release(&[page]);
        assert_eq!((pool.available(1), pool.is_cached(page)), (1, false));
        pool.release(&[page]);
        assert_eq!((pool.available(1), pool.find(&hash)), (2, Some(page)));
        // A second page with the same contents stays unknown, and is free afterwards.
        let other = pool.take(1).expect("a free page");
        pool.publish(other, hash);
        assert_eq!(pool.find(&hash), Some(page));
        pool.release(&[other]);
        pool.check();
        assert_eq!(pool.counts(), (0, 1, 0));
        assert_eq!(pool.arena_of(1, 4), 1);
    }
}
