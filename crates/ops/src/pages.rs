//! Pages of keys and values: their memory on a rank, and which rank holds which page.

use std::ops::Range;

use simd_kernels::{
    KV_SPAN, KvFormat, KvLayout, KvMemory, KvMemoryError, KvReader, KvSpan, KvSpanMut,
};

use crate::context::Context;

/// Positions of a page.
pub const PAGE_POSITIONS: usize = KV_SPAN;

/// The number of a page in the arena of a rank.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PageId(pub u32);

impl PageId {
    fn index(self) -> usize {
        self.0 as usize
    }
}

/// The memory of keys and values of a rank: pages of 128 positions, each of all layers and KV heads
/// of the rank. What a page holds, whoever fills it decides.
///
/// Within a page the layers follow each other, within a layer the KV heads, each as a span of
/// [`KvLayout`].
pub struct KvArena {
    memory: KvMemory,
    layers: usize,
}

impl KvArena {
    /// An arena of `pages` pages. The system provides the memory of a page when it is first
    /// written; [`touch`](Self::touch) has it provided at once.
    ///
    /// # Errors
    /// When the system refuses so much memory.
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

    /// Bytes of a page of so many layers and KV heads.
    pub fn bytes_of_page(format: KvFormat, layers: usize, heads: usize, head_dim: usize) -> usize {
        layers * heads * KvLayout::new(format, head_dim).span_bytes()
    }

    /// Bytes of `positions` positions in pages that they fill: what attention to all of them reads.
    pub fn bytes(&self, positions: usize) -> usize {
        self.layers * self.memory.heads() * self.memory.layout().bytes(positions)
    }

    /// Layers of a page.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Overwrites all pages with zeros, so that the system provides their memory.
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

    /// The pages' share of a layer.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn layer(&mut self, layer: usize) -> LayerPages<'_> {
        assert!(layer < self.layers, "layer {layer} of {}", self.layers);
        LayerPages { memory: &mut self.memory, layer, layers: self.layers }
    }
}

/// What the pages of an arena hold for one layer.
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

    /// The spans of the pages `written`, which ascend, by page and then by head; and all other
    /// pages, to be read meanwhile.
    pub(crate) fn split(&mut self, written: &[PageId]) -> (Vec<KvSpanMut<'_>>, Keys<'_>) {
        let (layer, layers) = (self.layer, self.layers);
        let groups: Vec<_> = written.iter().map(|page| page.index() * layers + layer).collect();
        let (spans, reader) = self.memory.split(&groups);
        (spans, Keys { reader, layer, layers })
    }

    /// All pages, to be read.
    pub(crate) fn keys(&self) -> Keys<'_> {
        Keys { reader: self.memory.reader(), layer: self.layer, layers: self.layers }
    }
}

/// Keys and values of a layer that are read.
pub(crate) struct Keys<'a> {
    reader: KvReader<'a>,
    layer: usize,
    layers: usize,
}

impl<'a> Keys<'a> {
    /// Those of memory with one group for each page.
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

/// Which pages of a sequence lie on a rank: page i on rank (first + i) mod `ranks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageOwners {
    /// The rank of the first page.
    pub first: usize,
    /// Ranks that split positions.
    pub ranks: usize,
    /// The rank in question.
    pub rank: usize,
}

impl PageOwners {
    /// Whether page `index` of the sequence lies on the rank.
    pub fn owns(self, index: usize) -> bool {
        (self.first + index) % self.ranks == self.rank
    }

    /// How many of the first `positions` positions of the sequence lie on the rank.
    pub fn positions(self, positions: usize) -> usize {
        let (whole, rest) = (positions / PAGE_POSITIONS, positions % PAGE_POSITIONS);
        let offset = (self.rank + self.ranks - self.first % self.ranks) % self.ranks;
        let owned = whole.saturating_sub(offset).div_ceil(self.ranks);
        owned * PAGE_POSITIONS + if self.owns(whole) { rest } else { 0 }
    }

    /// Of `pages`, all those of the sequence in order, the ones on the rank.
    pub fn pages(self, pages: &[PageId]) -> Vec<PageId> {
        let own = pages.iter().enumerate().filter(|(index, _)| self.owns(*index));
        own.map(|(_, page)| *page).collect()
    }

    /// The runs of `positions` that lie in one page of the rank: the index of the page in the
    /// sequence and the positions, ascending.
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
