//! Pages of keys and values: the memory of a rank's pages, and the rule for which rank owns a page.

use std::ops::Range;

use simd_kernels::{
    KV_SPAN, KvFormat, KvLayout, KvMemory, KvMemoryError, KvReader, KvSpan, KvSpanMut,
};

use crate::context::Context;

/// Positions per page.
pub const PAGE_POSITIONS: usize = KV_SPAN;

/// The number of a page in the arena of a rank.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PageId(pub u32);

impl PageId {
    fn index(self) -> usize {
        self.0 as usize
    }
}

/// A rank's memory for keys and values, in pages. A page holds 128 positions of all layers and KV
/// heads of the rank. The arena does not know which sequence a page belongs to.
///
/// A page holds its layers one after another, and a layer its KV heads, each as a span of
/// [`KvLayout`].
pub struct KvArena {
    memory: KvMemory,
    layers: usize,
}

impl KvArena {
    /// An arena of `pages` pages. The operating system provides the memory of a page at the first
    /// write; [`touch`](Self::touch) requests all of it at once.
    ///
    /// # Errors When the operating system refuses the memory.
    ///
    /// # Panics
    /// When `head_dim` is 0.
    pub fn new(
        format: KvFormat,
        layers: usize,
        heads: usize,
        head_dim: usize,
        pages: usize,
    ) -> Result<Self, KvMemoryError> {
        let layout = KvLayout::new(format, head_dim);
        let memory = KvMemory::new(layout, heads, pages.saturating_mul(layers))?;
        Ok(Self { memory, layers })
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.memory.groups() / self.layers.max(1)
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.layers * self.memory.heads() * self.memory.layout().span_bytes()
    }

    /// Bytes of a page with `layers` layers and `heads` KV heads.
    pub fn bytes_of_page(format: KvFormat, layers: usize, heads: usize, head_dim: usize) -> usize {
        layers * heads * KvLayout::new(format, head_dim).span_bytes()
    }

    /// Bytes that attention to `positions` positions reads.
    pub fn bytes(&self, positions: usize) -> usize {
        self.layers * self.memory.heads() * self.memory.layout().bytes(positions)
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Writes zeros to all pages, so that the operating system provides their memory now.
    pub fn touch(&mut self, ctx: &Context) {
        ctx.team.each(self.memory.parts(ctx.team.threads()), |part| part.clear());
    }

    /// Copies the contents of page `from` to page `to`.
    ///
    /// # Panics
    /// When there is no such page.
    pub fn copy_page(&mut self, from: PageId, to: PageId) {
        let layers = self.layers;
        self.memory.copy(from.index() * layers, to.index() * layers, layers);
    }

    /// The part of all pages that belongs to one layer.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn layer(&mut self, layer: usize) -> LayerPages<'_> {
        assert!(layer < self.layers, "layer {layer} of {}", self.layers);
        LayerPages { memory: &mut self.memory, layer, layers: self.layers }
    }
}

/// The part of an arena's pages that belongs to one layer.
pub struct LayerPages<'a> {
    memory: &'a mut KvMemory,
    layer: usize,
    layers: usize,
}

impl LayerPages<'_> {
    /// How keys and values lie in a span.
    pub(crate) fn layout(&self) -> KvLayout {
        self.memory.layout()
    }

    /// Mutable spans of the pages `written` (ascending), by page and then by head; and read access
    /// to all other pages.
    pub(crate) fn split(&mut self, written: &[PageId]) -> (Vec<KvSpanMut<'_>>, Keys<'_>) {
        let (layer, layers) = (self.layer, self.layers);
        let groups: Vec<_> = written.iter().map(|page| page.index() * layers + layer).collect();
        let (spans, reader) = self.memory.split(&groups);
        (spans, Keys { reader, layer, layers })
    }

    /// Read access to all pages.
    pub(crate) fn keys(&self) -> Keys<'_> {
        Keys { reader: self.memory.reader(), layer: self.layer, layers: self.layers }
    }
}

/// Read access to the keys and values of a layer.
pub(crate) struct Keys<'a> {
    reader: KvReader<'a>,
    layer: usize,
    layers: usize,
}

impl<'a> Keys<'a> {
    /// Access to memory that has one group per page.
    pub fn of(memory: &'a KvMemory) -> Self {
        Self { reader: memory.reader(), layer: 0, layers: 1 }
    }

    /// How keys and values lie in a span.
    pub fn layout(&self) -> KvLayout {
        self.reader.layout()
    }

    /// The span of a head in a page.
    pub fn span(&self, page: PageId, head: usize) -> KvSpan<'a> {
        self.reader.span(page.index() * self.layers + self.layer, head)
    }
}

/// The rule for which rank owns a page of a sequence: page i belongs to rank (first + i) mod
/// `ranks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageOwners {
    /// The rank that owns the first page.
    pub first: usize,
    /// Number of ranks that split positions.
    pub ranks: usize,
    /// The rank that the methods ask about.
    pub rank: usize,
}

impl PageOwners {
    /// Returns true if the rank owns page `index` of the sequence.
    pub fn owns(self, index: usize) -> bool {
        (self.first + index) % self.ranks == self.rank
    }

    /// Number of the first `positions` positions of the sequence that the rank owns.
    pub fn positions(self, positions: usize) -> usize {
        let (whole, rest) = (positions / PAGE_POSITIONS, positions % PAGE_POSITIONS);
        let offset = (self.rank + self.ranks - self.first % self.ranks) % self.ranks;
        let owned = whole.saturating_sub(offset).div_ceil(self.ranks);
        owned * PAGE_POSITIONS + if self.owns(whole) { rest } else { 0 }
    }

    /// The rank's own pages among `pages`, which are all pages of the sequence in order.
    pub fn pages(self, pages: &[PageId]) -> Vec<PageId> {
        let own = pages.iter().enumerate().filter(|(index, _)| self.owns(*index));
        own.map(|(_, page)| *page).collect()
    }

    /// Cuts `positions` at page boundaries and returns the runs that the rank owns, ascending:
    /// (index of the page in the sequence, positions).
    pub fn runs(self, positions: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let pages = positions.start / PAGE_POSITIONS..positions.end.div_ceil(PAGE_POSITIONS);
        pages.filter(move |page| self.owns(*page)).map(move |page| {
            let first = page * PAGE_POSITIONS;
            let run = first.max(positions.start)..(first + PAGE_POSITIONS).min(positions.end);
            (page, run)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_is_on_one_rank() {
        for ranks in 1..=4 {
            for first in 0..ranks {
                for positions in [0, 1, 127, 128, 129, 500, 1024, 1300] {
                    let owners = |rank| PageOwners { first, ranks, rank };
                    let mut sum = 0;
                    for rank in 0..ranks {
                        let own = owners(rank);
                        let runs: Vec<_> = own.runs(0..positions).collect();
                        let held: usize = runs.iter().map(|(_, run)| run.len()).sum();
                        assert_eq!(own.positions(positions), held, "{own:?}, {positions}");
                        assert!(runs.iter().all(|(page, run)| {
                            own.owns(*page) && run.start / PAGE_POSITIONS == *page
                        }));
                        sum += held;
                    }
                    assert_eq!(sum, positions);
                    let pages: Vec<_> = (0..11).map(PageId).collect();
                    let mut all: Vec<_> =
                        (0..ranks).flat_map(|rank| owners(rank).pages(&pages)).collect();
                    all.sort_unstable();
                    assert_eq!(all, pages);
                }
            }
        }
    }
}
