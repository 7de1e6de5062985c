//! The AVX-512 products, whose registers hold the 16 rows of a panel.
//!
//! ```text
//! for each block of up to 86 tiles of six tokens:
//!     for each group of panels (4, or as many as one kernel call takes if there is one tile):
//!         sums = 0                                            [panels, tiles, 6, 16]
//!         for each part of the columns (256 of floats, 512 of integers):
//!             for each 4 panels of floats, or 2 of integers:
//!                 for each tile: sums += parts of these panels * part of the tile
//!         finish the sums into `out`
//! ```
//!
//! 1. One loop serves every number of tokens, and a tile of one to six tokens has a kernel for
//!    each number. The order in which the terms of a sum are added is the same in all of them
//!    (`columns`, `codes`), so the bits of a row do not depend on the other rows.
//! 2. With one tile, memory is the limit. The panels of a group are then far apart, so that each
//!    kernel reads as many contiguous streams as it takes panels, and prefetches in each of them.
//! 3. With more tiles, the parts of a group's panels stay in the L1 cache while the tiles pass,
//!    and the same part of all tiles (at most 512 KiB) stays in the L2 cache while the panels
//!    pass. Each tile prefetches its share of the parts that come next: the few buffers between
//!    L1 and L2 do not take a whole part at once.
//! 4. The sums are kept next to each other and written to `out` once. Rows of `out` are often a
//!    multiple of 4 KiB apart, which would put all of them into the same few cache sets.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::Store;
use super::finish::{Finish, finish_row};
use crate::input::{Input, InputKind};
use crate::lanes::prefetch;
use crate::matrix::MatMut;
use crate::panels::{PANEL, PanelData, Panels};

mod codes;
mod columns;

/// Tiles of a block, for which the parts of panels in the L1 cache are read once.
const TILES: usize = 86;

/// Parts of panels that are multiplied before the next columns, and whose sums are kept.
const SLOTS: usize = 4;

/// Bytes by which the prefetch of a stream runs ahead of its use, into the L1 cache.
const NEAR: usize = 1024;

/// The same for the prefetch into the L2 cache.
const FAR: usize = 3072;

/// The sums of one tile: a row of 16 for each token.
type Tile = [[f32; PANEL]; Input::TILE];

/// Memory for the products of a block of tiles with a group of panels. Its alignment keeps vectors
/// from crossing cache lines.
#[repr(align(64))]
struct Block {
    /// The sums of each slot and tile.
    sums: [[Tile; TILES]; SLOTS],
    floats: columns::Scratch,
    codes: codes::Scratch,
}

thread_local! {
    /// Kept between calls.
    static BLOCK: RefCell<Box<Block>> = RefCell::new(Box::new(Block {
        sums: [[[[0.0; PANEL]; Input::TILE]; TILES]; SLOTS],
        floats: columns::Scratch::new(),
        codes: codes::Scratch::new(),
    }));
}
const _: () = assert!(size_of::<Block>() <= 324 << 10, "predictions of memory count on it");

#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn matmul(
    w: Panels<'_>,
    panels: Range<usize>,
    x: &Input,
    out: MatMut<'_>,
    store: Store,
) {
    multiply([w], panels, x, out, Finish::Store(store));
}

#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn matmul_swiglu(
    gate: Panels<'_>,
    up: Panels<'_>,
    panels: Range<usize>,
    x: &Input,
    out: MatMut<'_>,
) {
    multiply([gate, up], panels, x, out, Finish::SwiGlu);
}

#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn multiply<const N: usize>(
    ws: [Panels<'_>; N],
    panels: Range<usize>,
    x: &Input,
    mut out: MatMut<'_>,
    finish: Finish,
) {
    BLOCK.with_borrow_mut(|block| {
        // Blocks of about the same size: a small last one would read all weights for few tokens.
        let blocks = x.tiles().div_ceil(TILES);
        let step = x.tiles().div_ceil(blocks);
        for first in (0..x.tiles()).step_by(step) {
            let tiles = first..(first + step).min(x.tiles());
            multiply_block(ws, panels.clone(), x, tiles, &mut out, finish, block);
        }
    });
}

/// The products of a block of tiles with all panels.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn multiply_block<const N: usize>(
    ws: [Panels<'_>; N],
    panels: Range<usize>,
    x: &Input,
    tiles: Range<usize>,
    out: &mut MatMut<'_>,
    finish: Finish,
    block: &mut Block,
) {
    let streams = tiles.len() == 1;
    let (together, depth) = match x.kind() {
        InputKind::Float | InputKind::Bf16 => (columns::stream_panels(x.tokens()), columns::DEPTH),
        // One tile needs no part of a panel twice.
        InputKind::Int16 | InputKind::Int8 if streams => {
            (codes::stream_panels(&ws[0].data(), x.tokens()), x.cols().max(1))
        }
        InputKind::Int16 | InputKind::Int8 => (codes::PANELS, codes::DEPTH),
    };
    let groups = Groups {
        panels: panels.clone(),
        width: if streams { together } else { SLOTS } / N,
        streams,
    };
    for g in 0..groups.count() {
        let slots = Slots { ws, group: groups.get(g), next: groups.get(g + 1) };
        for sums in &mut block.sums[..slots.count()] {
            sums[..tiles.len()].fill([[0.0; PANEL]; Input::TILE]);
        }
        for column in (0..x.cols()).step_by(depth) {
            let part =
                Part { x, columns: column..(column + depth).min(x.cols()), tiles: tiles.clone() };
            let mut slot = 0;
            while slot < slots.count() {
                let left = slots.count() - slot;
                let float = matches!(x.kind(), InputKind::Float | InputKind::Bf16);
                slot += match float {
                    true if left >= 4 => add_floats::<N, 4>(&slots, slot, &part, block),
                    true if left >= 2 => add_floats::<N, 2>(&slots, slot, &part, block),
                    true => add_floats::<N, 1>(&slots, slot, &part, block),
                    _ if streams && left >= 4 => stream_codes::<N, 4>(&slots, slot, &part, block),
                    _ if left >= 2 => add_codes::<N, 2>(&slots, slot, &part, block),
                    _ => add_codes::<N, 1>(&slots, slot, &part, block),
                };
            }
        }
        finish_group(&slots, panels.start, x, &tiles, out, finish, block);
    }
}

/// Adds the products of P slots of float weights with the tiles to their sums, and returns P.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_floats<const N: usize, const P: usize>(
    slots: &Slots<'_, N>,
    slot: usize,
    part: &Part<'_>,
    block: &mut Block,
) -> usize {
    const { assert!(P <= columns::PANELS) }
    let sums = block.sums[slot..].first_chunk_mut::<P>().expect("as many sums as slots");
    let (weights, ahead) = (parts_of(slots, slot, &part.columns), ahead_of(slots, slot, part));
    columns::add_tiles(weights, part, sums, ahead, &mut block.floats);
    P
}

/// The same for Q8 and Q4.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_codes<const N: usize, const P: usize>(
    slots: &Slots<'_, N>,
    slot: usize,
    part: &Part<'_>,
    block: &mut Block,
) -> usize {
    const { assert!(P <= codes::PANELS) }
    let sums = block.sums[slot..].first_chunk_mut::<P>().expect("as many sums as slots");
    let (weights, ahead) = (parts_of(slots, slot, &part.columns), ahead_of(slots, slot, part));
    codes::add_tiles(weights, part, sums, ahead, &mut block.codes);
    P
}

/// The same for one tile of Q8 and Q4.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn stream_codes<const N: usize, const P: usize>(
    slots: &Slots<'_, N>,
    slot: usize,
    part: &Part<'_>,
    block: &mut Block,
) -> usize {
    let sums = block.sums[slot..].first_chunk_mut::<P>().expect("as many sums as slots");
    let (weights, ahead) = (parts_of(slots, slot, &part.columns), ahead_of(slots, slot, part));
    codes::stream(weights, part, sums, ahead);
    P
}

/// Writes the sums of a group of panels to their columns of `out`, which starts at panel `start`.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn finish_group<const N: usize>(
    slots: &Slots<'_, N>,
    start: usize,
    x: &Input,
    tiles: &Range<usize>,
    out: &mut MatMut<'_>,
    finish: Finish,
    block: &Block,
) {
    for tile in tiles.clone() {
        // Rows of `out` are often pages apart: the rows of the next tile are prefetched, or the
        // stores would wait for each of them.
        if tile + 1 < tiles.end {
            for token in x.tile_tokens(tile + 1) {
                let out = out.row_mut(token);
                for panel in slots.group.iter() {
                    prefetch::<_MM_HINT_T0>(out[(panel - start) * PANEL..].as_ptr().cast());
                }
            }
        }
        for (m, token) in x.tile_tokens(tile).enumerate() {
            let out = out.row_mut(token);
            for (i, panel) in slots.group.iter().enumerate() {
                let sums = std::array::from_fn(|n| &block.sums[i * N + n][tile - tiles.start][m]);
                finish_row::<N>(finish, sums, out, (panel - start) * PANEL);
            }
        }
    }
}

/// Some columns of some tiles of activations.
struct Part<'a> {
    x: &'a Input,
    columns: Range<usize>,
    tiles: Range<usize>,
}

/// What a kernel prefetches.
#[derive(Clone, Copy)]
struct Ahead<const P: usize> {
    /// Where the weights to prefetch start, for each panel: with one tile further on in the same
    /// streams, else at the start of the parts that come next.
    weights: [*const u8; P],
    /// Bytes of each part that one tile prefetches; not used with one tile.
    share: usize,
    /// The activations that follow those of the last tile.
    activations: *const u8,
}

impl<const P: usize> Ahead<P> {
    /// What the tile with number `i` prefetches, whose activations `activations` follow.
    fn of_tile(self, i: usize, activations: *const u8) -> Self {
        let weights = self.weights.map(|weights| weights.wrapping_add(i * self.share));
        Ahead { weights, share: self.share, activations }
    }

    /// Bytes between prefetches of the share, if a kernel has so many rounds. Usually less than a
    /// line: to prefetch some lines again costs less than a branch that avoids it.
    fn stride(&self, rounds: usize) -> usize {
        self.share.div_ceil(rounds.max(1))
    }
}

/// How the panels are grouped.
struct Groups {
    panels: Range<usize>,
    /// Panels of a group.
    width: usize,
    /// Whether panel `i` of all groups together is one contiguous stream, instead of each group.
    streams: bool,
}

impl Groups {
    fn count(&self) -> usize {
        self.panels.len().div_ceil(self.width)
    }

    /// The panels of group `g`; of the last group past the end.
    fn get(&self, g: usize) -> Group {
        let (whole, g) = (self.panels.len() / self.width, g.min(self.count().saturating_sub(1)));
        let mut group = Group { panels: [0; SLOTS], len: self.width };
        if g >= whole {
            group.len = self.panels.len() - whole * self.width;
        }
        for (i, panel) in group.panels[..group.len].iter_mut().enumerate() {
            *panel = self.panels.start
                + if self.streams && g < whole { i * whole + g } else { g * self.width + i };
        }
        group
    }
}

/// Panels that are multiplied together.
struct Group {
    panels: [usize; SLOTS],
    len: usize,
}

impl Group {
    fn iter(&self) -> impl Iterator<Item = usize> {
        self.panels[..self.len].iter().copied()
    }
}

/// The parts of a group of panels in the order of use: panel by panel, the matrices in turn.
struct Slots<'a, const N: usize> {
    ws: [Panels<'a>; N],
    group: Group,
    next: Group,
}

impl<'a, const N: usize> Slots<'a, N> {
    fn count(&self) -> usize {
        self.group.len * N
    }

    fn part(&self, slot: usize, columns: &Range<usize>) -> PanelData<'a> {
        self.ws[slot % N].part(self.group.panels[slot / N], columns)
    }

    /// Where the part of a slot starts; past the last slot, where the part starts that comes then.
    fn start(&self, slot: usize, columns: &Range<usize>) -> *const u8 {
        let Some(more) = slot.checked_sub(self.count()) else {
            return self.part(slot, columns).start();
        };
        let after = self.columns_after(columns);
        let group = if after.start == 0 { &self.next } else { &self.group };
        self.ws[more % N].part(group.panels[(more / N).min(group.len - 1)], &after).start()
    }

    /// The columns that come after those in all slots: the first ones after the last ones.
    fn columns_after(&self, columns: &Range<usize>) -> Range<usize> {
        let cols = self.ws[0].cols();
        if columns.end < cols { columns.end..cols } else { 0..cols }
    }
}

/// Prefetches a line of a stream that is soon used, and a line that is used later.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch_stream(line: *const u8) {
    prefetch::<_MM_HINT_T0>(line);
    prefetch::<_MM_HINT_T1>(line.wrapping_add(FAR - NEAR));
}

// These are functions without target features: a closure in a function that has them has them too,
// and `from_fn`, which does not, could not inline it.

/// The parts of P slots from `slot` on.
fn parts_of<'a, const N: usize, const P: usize>(
    slots: &Slots<'a, N>,
    slot: usize,
    columns: &Range<usize>,
) -> [PanelData<'a>; P] {
    std::array::from_fn(|p| slots.part(slot + p, columns))
}

/// What a kernel prefetches that multiplies P slots from `slot` on.
fn ahead_of<const N: usize, const P: usize>(
    slots: &Slots<'_, N>,
    slot: usize,
    part: &Part<'_>,
) -> Ahead<P> {
    let (columns, tiles) = (&part.columns, part.tiles.len());
    Ahead {
        weights: std::array::from_fn(|p| match tiles {
            1 => slots.start(slot + p, columns).wrapping_add(NEAR),
            _ => slots.start(slot + P + p, columns),
        }),
        share: slots.part(slot, columns).bytes().div_ceil(tiles),
        // The last tile is followed by the first one, with other panels or columns.
        activations: part.x.start(
            part.tiles.start,
            &if slot + P < slots.count() { columns.clone() } else { slots.columns_after(columns) },
        ),
    }
}

/// The activations that follow those of a tile.
fn activations_after<const P: usize>(part: &Part<'_>, tile: usize, ahead: &Ahead<P>) -> *const u8 {
    if tile + 1 < part.tiles.end {
        part.x.start(tile + 1, &part.columns)
    } else {
        ahead.activations
    }
}
