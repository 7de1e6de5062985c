//! The AVX2 products: two streams over the weights for few tokens, blocks that stay in the caches
//! for many.
//!
//! ```text
//! few (one tile of tokens):           many:
//! for each 2 panels of 16 rows:       for each block of up to 86 tiles (516 tokens):
//!     acc = 0                             for each 4 panels:
//!     acc += both panels * tile               acc = 0                      [4, tiles, 6, 16]
//!     finish acc into out                     for each part of the columns (1 KiB of a token):
//!                                                 for each panel:
//!                                                     for each tile: acc += panel part * tile part
//!                                             finish acc into out
//! ```
//!
//! 1. For few tokens memory is the limit. Two panels, or one of gate and one of up, are read side
//!    by side (`stream`).
//! 2. For many, a part of a panel (8 to 18 KiB; `wide`) stays in the L1 cache while the tiles pass
//!    it, and the same part of all tiles (at most 512 KiB) stays in the L2 cache while four panels
//!    pass. One panel at a time, activations would stream from the L3 cache.
//! 3. The sums of a panel are kept next to each other and written to `out` once: rows of `out` are
//!    often a multiple of 4 KiB apart, which would put all of them into the same few cache sets.
//! 4. While a tile meets a part of float weights, its share of the part after it is prefetched, and
//!    the activations of the next tile. The few buffers between L1 and L2 do not take a whole part
//!    at once. Q8 and Q4 do prefetch all of the next part during the first tile: they are fewer
//!    bytes, and prefetches in each tile were slower.
//! 5. Products of many tokens with two matrices (gate and up) alternate between them panel by
//!    panel; `finish` combines the sums.
//! 6. The bits of a row do not depend on the number of rows. Sums of floats are formed as in
//!    `float`, part by part; a last tile of few tokens meets several panels at once, which hides
//!    the latency of its few accumulators. Sums of integers are exact in each group, and the groups
//!    are added in order.

use std::cell::RefCell;
use std::ops::Range;

use super::Store;
use super::finish::{Finish, finish_row};
use super::formats::{Bf16, F16, F32};
use crate::input::{Input, InputKind, IntTile};
use crate::isa::Isa;
use crate::lanes::prefetch;
use crate::matrix::MatMut;
use crate::panels::{PANEL, PanelData, Panels};

use std::arch::x86_64::*;

mod float;
mod int;
mod stream;
mod wide;

use stream::stream;
use wide::{Part, Wide, bytes, floats, halves};

/// Bytes by which a prefetch into the L2 cache runs ahead of the one into L1. Without it, or with
/// more than 2 KiB, streams from memory were slower; so was a single prefetch that runs so far
/// ahead into the L1 cache, whose few buffers then wait for memory.
const FARTHER: usize = 1024;

/// Columns in a part of float weights and of integers, multiples of the group: 1 KiB of a token in
/// f32 and in int16.
const FLOATS: usize = 256;
const INTS: usize = 512;

/// Columns in a part. Those of Q4 are half as large as Q8's.
fn depth(kind: InputKind) -> usize {
    match kind {
        InputKind::Float | InputKind::Bf16 => FLOATS,
        InputKind::Int16 => INTS,
        InputKind::Int8 => 2 * INTS,
    }
}

/// Tiles that share a panel part in L1.
const TILES: usize = 86;

/// Panels whose sums are kept.
const SLOTS: usize = 4;

/// The sums of one tile: a row of 16 for each token.
type Tile = [[f32; PANEL]; Input::TILE];

/// What a block of tiles needs, on lines of its own: a vector that crosses two is slower to store.
#[repr(align(64))]
struct Block {
    /// The sums of its tiles with some panels.
    sums: [[Tile; TILES]; SLOTS],
    wide: Wide,
}

thread_local! {
    /// Kept between calls.
    static BLOCK: RefCell<Box<Block>> = RefCell::new(Box::new(Block {
        sums: [[[[0.0; PANEL]; Input::TILE]; TILES]; SLOTS],
        wide: Wide::new(),
    }));
}
const _: () = assert!(size_of::<Block>() <= 324 << 10, "predictions of memory count on it");

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul(
    w: Panels<'_>,
    panels: Range<usize>,
    x: &Input,
    out: MatMut<'_>,
    store: Store,
    isa: Isa,
) {
    multiply([w], panels, x, out, Finish::Store(store), isa);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul_swiglu(
    gate: Panels<'_>,
    up: Panels<'_>,
    panels: Range<usize>,
    x: &Input,
    out: MatMut<'_>,
    isa: Isa,
) {
    multiply([gate, up], panels, x, out, Finish::SwiGlu, isa);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<const N: usize>(
    ws: [Panels<'_>; N],
    panels: Range<usize>,
    x: &Input,
    out: MatMut<'_>,
    finish: Finish,
    isa: Isa,
) {
    let x = Columns { x, range: 0..x.cols(), isa };
    match x.x.tokens() {
        1 => stream::<N, 1>(ws, panels, &x, out, finish),
        2 => stream::<N, 2>(ws, panels, &x, out, finish),
        3 => stream::<N, 3>(ws, panels, &x, out, finish),
        4 => stream::<N, 4>(ws, panels, &x, out, finish),
        5 => stream::<N, 5>(ws, panels, &x, out, finish),
        6 => stream::<N, 6>(ws, panels, &x, out, finish),
        _ => BLOCK.with_borrow_mut(|block| many(ws, panels, x, out, finish, block)),
    }
}

/// Some columns of the activations, and how they are multiplied.
struct Columns<'a> {
    x: &'a Input,
    range: Range<usize>,
    isa: Isa,
}

#[target_feature(enable = "avx2,fma,f16c")]
fn many<const N: usize>(
    ws: [Panels<'_>; N],
    panels: Range<usize>,
    all: Columns<'_>,
    mut out: MatMut<'_>,
    finish: Finish,
    block: &mut Block,
) {
    let Block { sums, wide } = block;
    let (x, cols, depth) = (all.x, all.range.end, depth(all.x.kind()));
    // Blocks of about the same size: a small last one would read all the weights for few tokens.
    let blocks = x.tiles().div_ceil(TILES);
    let block = x.tiles().div_ceil(blocks);
    for first in (0..x.tiles()).step_by(block) {
        let tiles = first..(first + block).min(x.tiles());
        for group in panels.clone().step_by(SLOTS / N) {
            let group = group..(group + SLOTS / N).min(panels.end);
            let slots = Slots { ws, panels: group.clone() };
            let sums = &mut sums[..slots.count()];
            for sums in &mut *sums {
                sums[..tiles.len()].fill([[0.0; PANEL]; Input::TILE]);
            }
            for column in (0..cols).step_by(depth) {
                let columns = Columns { range: column..(column + depth).min(cols), ..all };
                add_parts(&slots, &columns, tiles.clone(), sums, wide);
            }
            for tile in tiles.clone() {
                // Rows of `out` are often pages apart: those of the next tile are prefetched, or
                // the stores would wait for each of them.
                if tile + 1 < tiles.end {
                    for token in x.tile_tokens(tile + 1) {
                        let out = &out.row_mut(token)[(group.start - panels.start) * PANEL..];
                        for line in out.chunks(PANEL).take(group.len()) {
                            prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
                        }
                    }
                }
                for (m, token) in x.tile_tokens(tile).enumerate() {
                    let out = out.row_mut(token);
                    for (i, panel) in group.clone().enumerate() {
                        let sums = std::array::from_fn(|n| &sums[i * N + n][tile - first][m]);
                        finish_row::<N>(finish, sums, out, (panel - panels.start) * PANEL);
                    }
                }
            }
        }
    }
}

/// What a tile asks for before it is needed.
#[derive(Clone, Copy)]
struct Ahead<const P: usize> {
    /// For each panel, where the weights to ask for start.
    weights: [*const u8; P],
    /// Bytes of weights that are this tile's to ask for; not used where weights stream.
    share: usize,
    /// The activations of the next tile; of some tiles, those after the last one.
    activations: *const u8,
}

impl<const P: usize> Ahead<P> {
    /// Weights that are met once.
    fn stream(weights: [*const u8; P]) -> Self {
        Self { weights, share: 0, activations: std::ptr::null() }
    }

    /// Bytes between prefetches of the share, if there are that many. Usually less than a line: to
    /// prefetch some lines again costs less than a branch that avoids it.
    fn stride(&self, prefetches: usize) -> usize {
        self.share.div_ceil(prefetches.max(1))
    }
}

/// The parts of some panels in the order of use: panel by panel, the matrices in turn.
struct Slots<'a, const N: usize> {
    ws: [Panels<'a>; N],
    panels: Range<usize>,
}

impl<'a, const N: usize> Slots<'a, N> {
    fn count(&self) -> usize {
        self.panels.len() * N
    }

    fn part(&self, slot: usize, columns: &Range<usize>) -> PanelData<'a> {
        self.ws[slot % N].part(self.panels.start + slot / N, columns)
    }

    /// Where the part of a slot starts; past the last one, where that starts which comes then.
    fn start(&self, slot: usize, columns: &Range<usize>) -> *const u8 {
        let Some(more) = slot.checked_sub(self.count()) else {
            return self.part(slot, columns).start();
        };
        let (w, after) = (self.ws[more % N], self.columns_after(columns));
        let panels = if after.start == 0 { self.panels.end } else { self.panels.start };
        w.part((panels + more / N).min(w.count() - 1), &after).start()
    }

    /// The columns that come after those in all slots: the first ones after the last ones.
    fn columns_after(&self, columns: &Range<usize>) -> Range<usize> {
        let cols = self.ws[0].cols();
        if columns.end < cols { columns.end..cols } else { 0..cols }
    }
}

/// Adds the products of the parts of all slots with each tile to `sums`, and prefetches the parts
/// that come next.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_parts<const N: usize>(
    slots: &Slots<'_, N>,
    x: &Columns<'_>,
    tiles: Range<usize>,
    sums: &mut [[Tile; TILES]],
    wide: &mut Wide,
) {
    // A last tile with few tokens of floats meets several panels at once.
    let last = x.x.tile_tokens(tiles.end - 1).len();
    let few = x.x.kind() == InputKind::Float && last <= stream::SIDE_BY_SIDE;
    let whole = tiles.start..tiles.end - usize::from(few);
    for (slot, sums) in sums.iter_mut().enumerate() {
        let part = slots.part(slot, &x.range);
        let next = slots.start(slot + 1, &x.range);
        let share = part.bytes().div_ceil(tiles.len());
        // The last tile is followed by the first one, with another panel.
        let after =
            if slot + 1 < slots.count() { x.range.clone() } else { slots.columns_after(&x.range) };
        let part = wide.widen(part, whole.len(), x.isa);
        for (i, (tile, sums)) in whole.clone().zip(&mut *sums).enumerate() {
            let activations = if tile + 1 < whole.end {
                x.x.start(tile + 1, &x.range)
            } else {
                x.x.start(tiles.start, &after)
            };
            let ahead = Ahead { weights: [next.wrapping_add(i * share)], share, activations };
            match x.x.tile_tokens(tile).len() {
                1 => add_tile::<1, 1, false>([part], x, tile, first(sums), ahead),
                2 => add_tile::<1, 2, false>([part], x, tile, first(sums), ahead),
                3 => add_tile::<1, 3, false>([part], x, tile, first(sums), ahead),
                4 => add_tile::<1, 4, false>([part], x, tile, first(sums), ahead),
                5 => add_tile::<1, 5, false>([part], x, tile, first(sums), ahead),
                _ if i == 0 && x.x.kind() != InputKind::Float => {
                    add_tile::<1, 6, true>([part], x, tile, first(sums), Ahead::stream([next]));
                }
                _ => add_tile::<1, 6, false>([part], x, tile, first(sums), ahead),
            }
        }
    }
    if few {
        let mut slot = 0;
        while slot < sums.len() {
            let sums = &mut sums[slot..];
            slot += match (last, sums.len()) {
                (1, 4..) => add_last::<N, 4, 1>(slots, slot, x, whole.end, sums, whole.len()),
                (1, 2..) => add_last::<N, 2, 1>(slots, slot, x, whole.end, sums, whole.len()),
                (1, _) => add_last::<N, 1, 1>(slots, slot, x, whole.end, sums, whole.len()),
                (2, 2..) => add_last::<N, 2, 2>(slots, slot, x, whole.end, sums, whole.len()),
                (2, _) => add_last::<N, 1, 2>(slots, slot, x, whole.end, sums, whole.len()),
                (_, 2..) => add_last::<N, 2, 3>(slots, slot, x, whole.end, sums, whole.len()),
                (_, _) => add_last::<N, 1, 3>(slots, slot, x, whole.end, sums, whole.len()),
            };
        }
    }
}

/// Adds the products of the parts of P slots with a tile of M tokens of floats, number `i` of its
/// block, and returns P.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_last<const N: usize, const P: usize, const M: usize>(
    slots: &Slots<'_, N>,
    slot: usize,
    x: &Columns<'_>,
    tile: usize,
    sums: &mut [[Tile; TILES]],
    i: usize,
) -> usize {
    let mut acc = [[[0.0; PANEL]; M]; P];
    let parts = std::array::from_fn(|p| Part::Stored(slots.part(slot + p, &x.range)));
    // Nothing is left to be prefetched.
    let here = slots.start(slot, &x.range);
    let ahead = Ahead { weights: [here; P], share: 0, activations: x.x.start(tile, &x.range) };
    for (acc, sums) in acc.iter_mut().zip(&*sums) {
        acc.copy_from_slice(&sums[i][..M]);
    }
    add_tile::<P, M, false>(parts, x, tile, &mut acc, ahead);
    for (acc, sums) in acc.iter().zip(sums) {
        sums[i][..M].copy_from_slice(acc);
    }
    P
}

/// Adds the products of panel parts with one tile, and prefetches what is `ahead`: streams of
/// weights (`STREAM`), or a share of weights and activations.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_tile<const P: usize, const M: usize, const STREAM: bool>(
    parts: [Part<'_>; P],
    x: &Columns<'_>,
    tile: usize,
    acc: &mut [[[f32; PANEL]; M]; P],
    ahead: Ahead<P>,
) {
    let either = if STREAM { ahead.weights } else { [ahead.activations; P] };
    let float = || x.x.float_part(tile, &x.range).x;
    let int = || x.x.int_part(tile, &x.range);
    match parts[0] {
        Part::Pairs(groups) => int::add_wide::<M, STREAM>(groups, int(), &mut acc[0], either[0]),
        Part::Stored(PanelData::F32(_)) => {
            float::add_products::<F32, P, M, STREAM>(parts.map(floats), float(), acc, ahead);
        }
        Part::Stored(PanelData::Bf16(_)) => {
            float::add_products::<Bf16, P, M, STREAM>(parts.map(halves), float(), acc, ahead);
        }
        Part::Stored(PanelData::F16(_)) => {
            float::add_products::<F16, P, M, STREAM>(parts.map(halves), float(), acc, ahead);
        }
        Part::Stored(PanelData::Q8(_)) => {
            add_ints::<false, P, M, STREAM>(parts.map(bytes), int(), acc, either, x.isa)
        }
        Part::Stored(PanelData::Q4(_)) => {
            add_ints::<true, P, M, STREAM>(parts.map(bytes), int(), acc, either, x.isa)
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_ints<const Q4: bool, const P: usize, const M: usize, const STREAM: bool>(
    panels: [&[u8]; P],
    x: IntTile<'_>,
    acc: &mut [[[f32; PANEL]; M]; P],
    ahead: [*const u8; P],
    isa: Isa,
) {
    match isa.vnni() {
        Isa::AVX_VNNI => {
            int::add_products::<Q4, { Isa::AVX_VNNI }, P, M, STREAM>(panels, x, acc, ahead)
        }
        _ => int::add_products::<Q4, { Isa::PLAIN }, P, M, STREAM>(panels, x, acc, ahead),
    }
}

/// Asks for a line of weights that is soon needed, and for one that is needed later.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch_weights(line: *const u8) {
    prefetch::<_MM_HINT_T0>(line);
    prefetch::<_MM_HINT_T1>(line.wrapping_add(FARTHER));
}

/// The sums of the first `M` tokens of a tile, as those of one panel.
fn first<const M: usize>(sums: &mut Tile) -> &mut [[[f32; PANEL]; M]; 1] {
    std::array::from_mut(sums.first_chunk_mut().expect("a tile has at most six tokens"))
}
