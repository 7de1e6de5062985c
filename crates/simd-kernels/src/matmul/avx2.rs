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
//!    by side (`few`).
//! 2. For many, a part of a panel (8 to 18 KiB; `wide`) stays in the L1 cache while the tiles pass
//!    it, and the same part of all tiles (at most 512 KiB) stays in the L2 cache while four panels
//!    pass. One panel at a time, activations would stream from L3 at 17 GB/s for one core.
//! 3. The sums of a panel are kept next to each other and written to `out` once: rows of `out` are
//!    often a multiple of 4 KiB apart, which would put all of them into the same few cache sets.
//! 4. While a tile meets a part of float weights, its share of the part after it is prefetched, and
//!    the activations of the next tile. A share: all of a part during its first tile is more than
//!    the few buffers between L1 and L2 take, and the tile waits for memory (33 tokens with bf16
//!    experts: 0.73 of the multiply-add rate instead of 0.87). With AVX2, Q8 and Q4 do ask for all
//!    of it there: they are fewer bytes, and prefetches in each tile took 4 to 6 % of the speed of
//!    Q8.
//! 5. With AVX-512 four panels of floats (`avx512`) or two of Q8 and Q4 (`codes`) meet a tile
//!    together, and parts of all of them share the L1 cache; widened floats, half a part at a time,
//!    are 32 KiB, all there is on some processors, and still faster. Where four panels go together,
//!    activations are read once for all of them, from wherever they are.
//! 6. Products of many tokens with two matrices (gate and up) alternate between them panel by
//!    panel; `finish` combines the sums.

use std::cell::RefCell;
use std::ops::Range;

use super::Store;
use crate::input::{Input, InputKind, IntTile};
use crate::isa::Isa;
use crate::lanes::{load, prefetch, store};
use crate::matrix::MatMut;
use crate::panels::{PANEL, PanelData, Panels};
use crate::swiglu::gated256;

use std::arch::x86_64::*;

mod avx512;
mod codes;
mod few;
mod float;
mod int;
mod wide;

use few::few;
use wide::{Part, Wide, bytes, floats, halves};

/// Bytes by which a prefetch into the L2 cache runs ahead of the one into L1.
///
/// Without it, or with more than 2 KiB, a core of a Sapphire Rapids, which gets 20 GB/s, reads two
/// bf16 streams 5 % slower. A single prefetch 6 KiB ahead into the L1 cache, whose few buffers then
/// wait for memory, takes 30 % there; with one stream it was the best on a Zen 5.
const FARTHER: usize = 1024;

/// Columns in a part of float weights and of integers, multiples of the group: 1 KiB of a token in
/// f32 and in int16.
const FLOATS: usize = 256;
const INTS: usize = 512;

/// Columns in a part. Those of Q4 are half as large as Q8's as long as they are not widened.
fn depth(kind: InputKind, isa: Isa) -> usize {
    match kind {
        InputKind::Float => FLOATS,
        InputKind::Int8 if !isa.has_avx512() => 2 * INTS,
        InputKind::Int16 | InputKind::Int8 => INTS,
    }
}

/// Tiles that share a panel part in L1.
const TILES: usize = 86;

/// Panels whose sums are kept.
const SLOTS: usize = 4;

/// What becomes of the sums of N matrices.
#[derive(Clone, Copy)]
enum Finish {
    /// The sums of the one matrix are stored.
    Store(Store),
    /// `silu(first) * second` is stored.
    SwiGlu,
}

/// The sums of one tile: a row of 16 for each token.
type Tile = [[f32; PANEL]; Input::TILE];

/// What a block of tiles needs, on lines of its own: a vector that crosses two is slower to store.
#[repr(align(64))]
struct Block {
    /// The sums of its tiles with some panels.
    sums: [[Tile; TILES]; SLOTS],
    scratch: Scratch,
}

/// What the products with some parts of panels need.
struct Scratch {
    /// Sums of a part that are not complete.
    kept: [[Tile; TILES]; avx512::PANELS],
    wide: Wide,
}

thread_local! {
    /// Kept between calls.
    static BLOCK: RefCell<Box<Block>> = RefCell::new(Box::new(Block {
        sums: [[[[0.0; PANEL]; Input::TILE]; TILES]; SLOTS],
        scratch: Scratch { kept: [[[[0.0; PANEL]; Input::TILE]; TILES]; avx512::PANELS], wide: Wide::new() },
    }));
}
const _: () = assert!(size_of::<Block>() == 324 << 10, "plans of memory count on it");

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
        1 => few::<N, 1, 2>(ws, panels, &x, out, finish),
        2 => few::<N, 2, 1>(ws, panels, &x, out, finish),
        3 => few::<N, 3, 1>(ws, panels, &x, out, finish),
        4 => few::<N, 4, 1>(ws, panels, &x, out, finish),
        5 => few::<N, 5, 1>(ws, panels, &x, out, finish),
        6 => few::<N, 6, 1>(ws, panels, &x, out, finish),
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
    let Block { sums, scratch } = block;
    let (x, cols, depth) = (all.x, all.range.end, depth(all.x.kind(), all.isa));
    // Blocks of about the same size: a small last one would read all the weights for few tokens.
    let blocks = x.tiles().div_ceil(TILES);
    let block = x.tiles().div_ceil(blocks);
    let together = match x.kind() {
        _ if !all.isa.has_avx512() => 1,
        InputKind::Float => avx512::PANELS,
        InputKind::Int16 | InputKind::Int8 => codes::PANELS,
    };
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
                for (i, sums) in sums.chunks_mut(together).enumerate() {
                    let slot = i * together;
                    match sums.len() {
                        1 => {
                            add_parts::<N, 1>(&slots, slot, &columns, tiles.clone(), sums, scratch)
                        }
                        2 => {
                            add_parts::<N, 2>(&slots, slot, &columns, tiles.clone(), sums, scratch)
                        }
                        3 => {
                            add_parts::<N, 3>(&slots, slot, &columns, tiles.clone(), sums, scratch)
                        }
                        SLOTS => add_parts::<N, SLOTS>(
                            &slots,
                            slot,
                            &columns,
                            tiles.clone(),
                            sums,
                            scratch,
                        ),
                        more => unreachable!("{more} of {SLOTS} slots"),
                    }
                }
            }
            for tile in tiles.clone() {
                // Rows of `out` are often pages apart: those of the next tile are asked for now, or
                // each would be waited for.
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

    /// Bytes between prefetches of the share, if there are that many. Usually less than a line:
    /// asking for some lines again costs less than a branch that avoids it, which took 4 % of the
    /// speed with 36 tokens.
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

/// Adds the products of the parts of P slots with each tile to `sums`, and prefetches as many of
/// those that come next.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_parts<const N: usize, const P: usize>(
    slots: &Slots<'_, N>,
    slot: usize,
    x: &Columns<'_>,
    tiles: Range<usize>,
    sums: &mut [[Tile; TILES]],
    scratch: &mut Scratch,
) {
    let Scratch { kept, wide } = scratch;
    let mut sums = sums
        .first_chunk_mut::<P>()
        .expect("as many sums as slots")
        .each_mut()
        .map(|sums| &mut sums[..tiles.len()]);
    let parts: [_; P] = std::array::from_fn(|p| slots.part(slot + p, &x.range));
    let next: [_; P] = std::array::from_fn(|p| slots.start(slot + P + p, &x.range));
    let share = parts[0].bytes().div_ceil(tiles.len());
    // The last tile is followed by the first one, with other panels.
    let after =
        if slot + P < slots.count() { x.range.clone() } else { slots.columns_after(&x.range) };
    let activations = x.x.start(tiles.start, &after);
    // Tiles that AVX-512 takes: all of integers, and whole ones of floats.
    let mut done = 0;
    if x.isa.has_avx512() {
        if x.x.kind() != InputKind::Float {
            #[cfg(test)]
            crate::isa::witness::record("codes::add_tiles");
            let panels = wide.widen(parts, tiles.len(), x.isa).map(wide::codes);
            let ahead = Ahead { weights: next, share, activations };
            // SAFETY: the instruction set proves the target features.
            return unsafe { codes::add_tiles(panels, x, tiles.start, sums, ahead) };
        }
        done = tiles.len() - usize::from(x.x.tile_tokens(tiles.end - 1).len() < Input::TILE);
        #[cfg(test)]
        crate::isa::witness::record("avx512::add_tiles");
        // Few tiles meet parts as they are stored, for which it does not pay to keep sums.
        let piece = if tiles.len() < wide::SOME { FLOATS } else { avx512::HALF };
        let pieces = x.range.len().div_ceil(piece);
        let share = share.div_ceil(pieces);
        for i in 0..pieces {
            let start = x.range.start + i * piece;
            let columns = Columns { range: start..(start + piece).min(x.range.end), ..*x };
            let (goes_on, ends) = (i > 0, i + 1 == pieces);
            #[cfg(test)]
            if goes_on {
                crate::isa::witness::record("avx512::second_half");
            }
            let parts: [_; P] = std::array::from_fn(|p| slots.part(slot + p, &columns.range));
            let parts = wide.widen(parts, tiles.len(), x.isa);
            let weights = next.map(|next| next.wrapping_add(i * done * share));
            let activations = if ends {
                activations
            } else {
                x.x.start(tiles.start, &(columns.range.end..x.range.end))
            };
            let ahead = Ahead { weights, share, activations };
            let kept = kept
                .first_chunk_mut::<P>()
                .expect("as many as panels")
                .each_mut()
                .map(|kept| &mut kept[..done]);
            let totals = sums.each_mut().map(|sums| &mut sums[..done]);
            let sums = avx512::Sums { kept, goes_on, totals, ends };
            // SAFETY: the instruction set proves the target features.
            unsafe { avx512::add_tiles(parts, &columns, tiles.start, sums, ahead) };
        }
        if done == tiles.len() {
            return;
        }
    }
    // One tile that is left after those of AVX-512 does not pay for widening.
    let parts = if x.isa.has_avx512() {
        parts.map(Part::Stored)
    } else {
        wide.widen(parts, tiles.len(), x.isa)
    };
    for ((part, sums), next) in parts.into_iter().zip(sums).zip(next) {
        for (i, (tile, sums)) in tiles.clone().zip(sums).enumerate().skip(done) {
            let activations =
                if tile + 1 < tiles.end { x.x.start(tile + 1, &x.range) } else { activations };
            let ahead = Ahead { weights: [next.wrapping_add(i * share)], share, activations };
            match x.x.tile_tokens(tile).len() {
                1 => add_tile::<1, 1, 4, false>([part], x, tile, first(sums), ahead),
                2 => add_tile::<1, 2, 2, false>([part], x, tile, first(sums), ahead),
                3 => add_tile::<1, 3, 2, false>([part], x, tile, first(sums), ahead),
                4 => add_tile::<1, 4, 1, false>([part], x, tile, first(sums), ahead),
                5 => add_tile::<1, 5, 1, false>([part], x, tile, first(sums), ahead),
                _ if i == 0 && x.x.kind() != InputKind::Float => {
                    add_tile::<1, 6, 1, true>([part], x, tile, first(sums), Ahead::stream([next]));
                }
                _ => add_tile::<1, 6, 1, false>([part], x, tile, first(sums), ahead),
            }
        }
    }
}

/// Adds the products of panel parts with one tile, and prefetches what is `ahead`: streams of
/// weights (`STREAM`), or a share of weights and activations.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_tile<const P: usize, const M: usize, const SETS: usize, const STREAM: bool>(
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
        Part::Codes(_) => unreachable!("AVX-512 takes all tiles of codes"),
        Part::Stored(PanelData::F32(_)) => {
            float::add_products::<float::F32, P, M, SETS, STREAM>(
                parts.map(floats),
                float(),
                acc,
                ahead,
            );
        }
        Part::Stored(PanelData::Bf16(_)) => {
            float::add_products::<float::Bf16, P, M, SETS, STREAM>(
                parts.map(halves),
                float(),
                acc,
                ahead,
            );
        }
        Part::Stored(PanelData::F16(_)) => {
            float::add_products::<float::F16, P, M, SETS, STREAM>(
                parts.map(halves),
                float(),
                acc,
                ahead,
            );
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
        Isa::AVX512_VNNI => {
            int::add_products::<Q4, { Isa::AVX512_VNNI }, P, M, STREAM>(panels, x, acc, ahead)
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

/// Finishes the sums of one token and panel into `out_row[at..]`, as many as the row has left.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn finish_row<const N: usize>(
    finish: Finish,
    sums: [&[f32; PANEL]; N],
    out_row: &mut [f32],
    at: usize,
) {
    let out = &mut out_row[at..];
    if let Some(out) = out.first_chunk_mut::<PANEL>() {
        finish_whole(finish, sums, out);
    } else {
        let mut whole = [0.0; PANEL];
        whole[..out.len()].copy_from_slice(out);
        finish_whole(finish, sums, &mut whole);
        out.copy_from_slice(&whole[..out.len()]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn finish_whole<const N: usize>(finish: Finish, sums: [&[f32; PANEL]; N], out: &mut [f32; PANEL]) {
    for (half, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
        let sum = |n: usize| load(&sums[n].as_chunks().0[half]);
        let result = match finish {
            Finish::Store(Store::Set) => sum(0),
            Finish::Store(Store::Add) => _mm256_add_ps(load(out), sum(0)),
            Finish::SwiGlu => gated256(sum(0), sum(1)),
        };
        store(out, result);
    }
}
