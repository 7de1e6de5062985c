//! The AVX2 products: one stream over the weights for few tokens, blocks that stay in the caches for many.
//!
//! ```text
//! few (one tile of tokens):           many:
//! for each panel of 16 rows:          for each block of up to 86 tiles (516 tokens):
//!     acc = 0                             for each 4 panels:
//!     acc += panel * tile                     acc = 0                                  [4, tiles, 6, 16]
//!     finish acc into out                     for each part of the columns (1 KiB of a token):
//!                                                 for each panel:
//!                                                     for each tile: acc += panel part * tile part
//!                                             finish acc into out
//! ```
//!
//! 1. For few tokens memory is the limit; a panel and the next are one stream, and a prefetch runs ahead of it.
//! 2. For many, a part of a panel (8 to 18 KiB) stays in the L1 cache while the tiles pass it, and the same part of
//!    all tiles (512 KiB) stays in the L2 cache while four panels pass. One panel at a time, activations would stream
//!    from L3 at 17 GB/s for one core.
//! 3. The sums of a panel are kept next to each other and written to `out` once: rows of `out` are often a multiple
//!    of 4 KiB apart, which would put all of them into the same few cache sets.
//! 4. While the first tile meets a part of the weights, the part after it is prefetched; while the others do, the
//!    activations of the next tile.
//! 5. Products with two matrices (gate and up) alternate between them panel by panel, and `finish` combines their sums.

use std::cell::RefCell;
use std::ops::Range;

use super::Store;
use crate::input::{Input, InputKind};
use crate::lanes::{load, prefetch, store};
use crate::matrix::MatMut;
use crate::panels::{PANEL, PanelData, Panels};
use crate::swiglu::gated256;

use std::arch::x86_64::*;

mod float;
mod int;

/// Bytes by which the prefetch into the L1 cache runs ahead of weights that stream from memory.
const AHEAD: usize = 2048;

/// Bytes by which a prefetch into the L2 cache runs ahead of that.
///
/// A core of a Sapphire Rapids, which gets 20 GB/s, reaches 0.88 of a plain read of memory with both, 0.81 with the first
/// alone, and 0.70 with one of 6 KiB into the L1 cache, whose few buffers then wait for memory; that one was the best on a Zen 5,
/// at 0.96.
const FARTHER: usize = 2048;

/// Columns in a part: 1 KiB of a token, a multiple of the group.
fn depth(kind: InputKind) -> usize {
    match kind {
        InputKind::Float => 256,
        InputKind::Int16 => 512,
        InputKind::Int8 => 1024,
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

/// The sums of a block of tiles with some panels.
type Sums = [[Tile; TILES]; SLOTS];

thread_local! {
    /// Kept between calls; 129 KiB, which is why it is not on the stack.
    static SUMS: RefCell<Box<Sums>> = RefCell::new(Box::new([[[[0.0; PANEL]; Input::TILE]; TILES]; SLOTS]));
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul(w: Panels<'_>, panels: Range<usize>, x: &Input, out: MatMut<'_>, store: Store, vnni: bool) {
    multiply([w], panels, x, out, Finish::Store(store), vnni);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul_swiglu(
    gate: Panels<'_>,
    up: Panels<'_>,
    panels: Range<usize>,
    x: &Input,
    out: MatMut<'_>,
    vnni: bool,
) {
    multiply([gate, up], panels, x, out, Finish::SwiGlu, vnni);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<const N: usize>(
    ws: [Panels<'_>; N],
    panels: Range<usize>,
    x: &Input,
    out: MatMut<'_>,
    finish: Finish,
    vnni: bool,
) {
    let x = Columns { x, range: 0..x.cols(), vnni };
    match x.x.tokens() {
        1 => few::<N, 1, 4>(ws, panels, &x, out, finish),
        2 => few::<N, 2, 2>(ws, panels, &x, out, finish),
        3 => few::<N, 3, 2>(ws, panels, &x, out, finish),
        4 => few::<N, 4, 1>(ws, panels, &x, out, finish),
        5 => few::<N, 5, 1>(ws, panels, &x, out, finish),
        6 => few::<N, 6, 1>(ws, panels, &x, out, finish),
        _ => SUMS.with_borrow_mut(|sums| many(ws, panels, x, out, finish, sums)),
    }
}

/// Some columns of the activations, and how they are multiplied.
struct Columns<'a> {
    x: &'a Input,
    range: Range<usize>,
    /// Whether AVX-VNNI is there for integers.
    vnni: bool,
}

#[target_feature(enable = "avx2,fma,f16c")]
fn few<const N: usize, const M: usize, const SETS: usize>(
    ws: [Panels<'_>; N],
    panels: Range<usize>,
    x: &Columns<'_>,
    mut out: MatMut<'_>,
    finish: Finish,
) {
    for (i, panel) in panels.enumerate() {
        let mut acc = [[[0.0; PANEL]; M]; N];
        for (w, acc) in ws.iter().zip(&mut acc) {
            let part = w.part(panel, &x.range);
            add_tile::<M, SETS, true>(part, x, 0, acc, start(part).wrapping_add(AHEAD));
        }
        for m in 0..M {
            finish_row(finish, acc.each_ref().map(|acc| &acc[m]), out.row_mut(m), i * PANEL);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn many<const N: usize>(
    ws: [Panels<'_>; N],
    panels: Range<usize>,
    all: Columns<'_>,
    mut out: MatMut<'_>,
    finish: Finish,
    sums: &mut Sums,
) {
    let (x, cols, depth) = (all.x, all.range.end, depth(all.x.kind()));
    // Blocks of about the same size: a small last one would read all the weights for few tokens.
    let blocks = x.tiles().div_ceil(TILES);
    let block = x.tiles().div_ceil(blocks);
    for first in (0..x.tiles()).step_by(block) {
        let tiles = first..(first + block).min(x.tiles());
        for group in panels.clone().step_by(SLOTS / N) {
            let group = group..(group + SLOTS / N).min(panels.end);
            for sums in &mut sums[..group.len() * N] {
                sums[..tiles.len()].fill([[0.0; PANEL]; Input::TILE]);
            }
            for column in (0..cols).step_by(depth) {
                let columns = Columns { range: column..(column + depth).min(cols), ..all };
                // The parts in the order of use: panel by panel, the matrices in turn.
                let part = |slot: usize| ws[slot % N].part(group.start + slot / N, &columns.range);
                for (slot, sums) in sums[..group.len() * N].iter_mut().enumerate() {
                    let next = if slot + 1 < group.len() * N {
                        start(part(slot + 1))
                    } else if columns.range.end < cols {
                        start(ws[0].part(group.start, &(columns.range.end..cols)))
                    } else {
                        start(ws[0].part(group.end.min(ws[0].count() - 1), &(0..cols)))
                    };
                    add_part(part(slot), &columns, tiles.clone(), &mut sums[..tiles.len()], next);
                }
            }
            for tile in tiles.clone() {
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

/// Adds the products of a panel part with each tile to `sums`, and prefetches the next part of weights from `ahead` on.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_part(part: PanelData<'_>, x: &Columns<'_>, tiles: Range<usize>, sums: &mut [Tile], ahead: *const u8) {
    for (i, (tile, sums)) in tiles.clone().zip(sums).enumerate() {
        let next = if tile + 1 < tiles.end { tile + 1 } else { tiles.start };
        let next = x.x.start(next, &x.range);
        match x.x.tile_tokens(tile).len() {
            1 => add_tile::<1, 4, false>(part, x, tile, first(sums), next),
            2 => add_tile::<2, 2, false>(part, x, tile, first(sums), next),
            3 => add_tile::<3, 2, false>(part, x, tile, first(sums), next),
            4 => add_tile::<4, 1, false>(part, x, tile, first(sums), next),
            5 => add_tile::<5, 1, false>(part, x, tile, first(sums), next),
            _ if i == 0 => add_tile::<6, 1, true>(part, x, tile, first(sums), ahead),
            _ => add_tile::<6, 1, false>(part, x, tile, first(sums), next),
        }
    }
}

/// Adds the products of a panel part with one tile, and prefetches from `ahead` on: weights, or activations.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_tile<const M: usize, const SETS: usize, const WEIGHTS: bool>(
    part: PanelData<'_>,
    x: &Columns<'_>,
    tile: usize,
    acc: &mut [[f32; PANEL]; M],
    ahead: *const u8,
) {
    let float = || x.x.float_part(tile, &x.range).x;
    let int = || x.x.int_part(tile, &x.range);
    match part {
        PanelData::F32(part) => float::add_products::<float::F32, M, SETS, WEIGHTS>(part, float(), acc, ahead),
        PanelData::Bf16(part) => float::add_products::<float::Bf16, M, SETS, WEIGHTS>(part, float(), acc, ahead),
        PanelData::F16(part) => float::add_products::<float::F16, M, SETS, WEIGHTS>(part, float(), acc, ahead),
        PanelData::Q8(part) if x.vnni => int::add_products::<false, true, M, WEIGHTS>(part, int(), acc, ahead),
        PanelData::Q8(part) => int::add_products::<false, false, M, WEIGHTS>(part, int(), acc, ahead),
        PanelData::Q4(part) if x.vnni => int::add_products::<true, true, M, WEIGHTS>(part, int(), acc, ahead),
        PanelData::Q4(part) => int::add_products::<true, false, M, WEIGHTS>(part, int(), acc, ahead),
    }
}

/// Asks for a line of weights that is soon needed, and for one that is needed later.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch_weights(line: *const u8) {
    prefetch::<_MM_HINT_T0>(line);
    prefetch::<_MM_HINT_T1>(line.wrapping_add(FARTHER));
}

/// The address of the first weight.
fn start(part: PanelData<'_>) -> *const u8 {
    match part {
        PanelData::F32(part) => part.as_ptr().cast(),
        PanelData::Bf16(part) | PanelData::F16(part) => part.as_ptr().cast(),
        PanelData::Q8(part) | PanelData::Q4(part) => part.as_ptr(),
    }
}

/// The sums of the first `M` tokens of a tile.
fn first<const M: usize>(sums: &mut Tile) -> &mut [[f32; PANEL]; M] {
    sums.first_chunk_mut().expect("a tile has at most six tokens")
}

/// Finishes the sums of one token and panel into `out_row[at..]`, as many as the row has left.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn finish_row<const N: usize>(finish: Finish, sums: [&[f32; PANEL]; N], out_row: &mut [f32], at: usize) {
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
