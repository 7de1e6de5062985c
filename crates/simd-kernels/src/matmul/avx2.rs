//! The AVX2 products: one stream over the weights for few tokens, widened panels for many.
//!
//! ```text
//! few (one tile of tokens):                many:
//! for each panel of 16 rows:               for each block of up to 85 tiles (510 tokens):
//!     acc = 0                                  for each panel of 16 rows:
//!     acc += panel * tile                          acc = 0                            [tile, 6, 16]
//!     finish acc into out                          for each 256 columns:
//!                                                      widen these columns of the panel
//!                                                      for each tile: acc += widened * tile
//!                                                  finish acc into out
//! ```
//!
//! 1. For few tokens the weights are widened in registers on their way from memory, which is the limit then.
//! 2. For many, a widened part of a panel (16 KiB of f32) stays in the L1 cache while the tiles of the block pass
//!    it; widening costs as much as one or two tokens.
//! 3. The sums of a panel are kept next to each other (`acc`, 32 KiB) and written to `out` once: rows of `out` are
//!    often a multiple of 4 KiB apart, which would put all of them into the same few cache sets.
//! 4. While the tiles of one part are computed, the next part of the weights is prefetched, a few lines a tile;
//!    otherwise each part would begin with a wait for memory.
//! 5. Products with two matrices (gate and up) alternate between them panel by panel, and `finish` combines their sums.

use std::cell::RefCell;
use std::ops::Range;

use super::Store;
use crate::input::Input;
use crate::lanes::{load, store};
use crate::matrix::MatMut;
use crate::panels::{GROUP, PANEL, PanelData, Panels};
use crate::swiglu::gated256;

use std::arch::x86_64::*;

mod float;
mod int;

/// Bytes by which the prefetch runs ahead of weights that stream from memory. Shorter leaves bandwidth unused where
/// a core gets 40 GB/s (2 KiB: 0.87 of it, 6 KiB: 0.96), longer gains nothing and spills over the L1 cache.
const AHEAD: usize = 6144;

/// Columns of a panel that are widened at a time; a multiple of the group.
const DEPTH: usize = 256;

/// Tiles that share a widened panel.
const TILES: usize = 85;

/// Panels whose sums are kept.
const SLOTS: usize = 8;

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

/// What a thread needs to widen panels and sum up a block of tiles; it is kept between calls.
#[repr(align(64))]
struct Scratch {
    floats: [[f32; PANEL]; DEPTH],
    words: [int::WideWord; DEPTH / 2],
    scales: [[f32; PANEL]; DEPTH / GROUP],
    sums: [[Tile; TILES]; SLOTS],
}

thread_local! {
    static SCRATCH: RefCell<Box<Scratch>> = RefCell::new(Box::new(Scratch {
        floats: [[0.0; PANEL]; DEPTH],
        words: [[0; 64]; DEPTH / 2],
        scales: [[0.0; PANEL]; DEPTH / GROUP],
        sums: [[[[0.0; PANEL]; Input::TILE]; TILES]; SLOTS],
    }));
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul(w: Panels<'_>, panels: Range<usize>, x: &Input, out: MatMut<'_>, store: Store) {
    multiply([w], panels, x, out, Finish::Store(store));
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul_swiglu(gate: Panels<'_>, up: Panels<'_>, panels: Range<usize>, x: &Input, out: MatMut<'_>) {
    multiply([gate, up], panels, x, out, Finish::SwiGlu);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<const N: usize>(ws: [Panels<'_>; N], panels: Range<usize>, x: &Input, out: MatMut<'_>, finish: Finish) {
    match x.tokens() {
        1 => few::<N, 1, 4>(ws, panels, x, out, finish),
        2 => few::<N, 2, 2>(ws, panels, x, out, finish),
        3 => few::<N, 3, 2>(ws, panels, x, out, finish),
        4 => few::<N, 4, 1>(ws, panels, x, out, finish),
        5 => few::<N, 5, 1>(ws, panels, x, out, finish),
        6 => few::<N, 6, 1>(ws, panels, x, out, finish),
        _ => SCRATCH.with_borrow_mut(|scratch| many(ws, panels, x, out, finish, scratch)),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn few<const N: usize, const M: usize, const SETS: usize>(
    ws: [Panels<'_>; N],
    panels: Range<usize>,
    x: &Input,
    mut out: MatMut<'_>,
    finish: Finish,
) {
    for (i, panel) in panels.enumerate() {
        let mut acc = [[[0.0; PANEL]; M]; N];
        for (w, acc) in ws.iter().zip(&mut acc) {
            let range = panel * w.stride()..(panel + 1) * w.stride();
            match w.data() {
                PanelData::F32(data) => {
                    float::add_products::<float::F32, M, SETS, true>(&data[range], x.float_tile(0).x, acc);
                }
                PanelData::Bf16(data) => {
                    float::add_products::<float::Bf16, M, SETS, true>(&data[range], x.float_tile(0).x, acc);
                }
                PanelData::F16(data) => {
                    float::add_products::<float::F16, M, SETS, true>(&data[range], x.float_tile(0).x, acc);
                }
                PanelData::Q8(data) => int::add_products::<false, M>(&data[range], x.int_tile(0), acc),
                PanelData::Q4(data) => int::add_products::<true, M>(&data[range], x.int_tile(0), acc),
            }
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
    x: &Input,
    mut out: MatMut<'_>,
    finish: Finish,
    scratch: &mut Scratch,
) {
    for first in (0..x.tiles()).step_by(TILES) {
        let tiles = first..(first + TILES).min(x.tiles());
        for group in panels.clone().step_by(SLOTS / N) {
            let group = group..(group + SLOTS / N).min(panels.end);
            for sums in &mut scratch.sums[..group.len() * N] {
                sums[..tiles.len()].fill([[0.0; PANEL]; Input::TILE]);
            }
            for depth in (0..ws[0].cols()).step_by(DEPTH) {
                let columns = depth..(depth + DEPTH).min(ws[0].cols());
                for (i, panel) in group.clone().enumerate() {
                    for (n, w) in ws.iter().enumerate() {
                        add_part(w, panel, columns.clone(), x, tiles.clone(), i * N + n, scratch);
                    }
                }
            }
            for tile in tiles.clone() {
                for (m, token) in x.tile_tokens(tile).enumerate() {
                    let out = out.row_mut(token);
                    for (i, panel) in group.clone().enumerate() {
                        let sums = std::array::from_fn(|n| &scratch.sums[i * N + n][tile - first][m]);
                        finish_row::<N>(finish, sums, out, (panel - panels.start) * PANEL);
                    }
                }
            }
        }
    }
}

/// Widens some columns of a panel and adds their products with each tile to the sums of matrix `n`.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_part(
    w: &Panels<'_>,
    panel: usize,
    columns: Range<usize>,
    x: &Input,
    tiles: Range<usize>,
    n: usize,
    scratch: &mut Scratch,
) {
    let Scratch { floats, words, scales, sums } = scratch;
    let sums = &mut sums[n][..tiles.len()];
    let start = panel * w.stride();
    let elements = start + columns.start * PANEL..start + columns.end * PANEL;
    let floats = &mut floats[..columns.len()];
    match w.data() {
        PanelData::F32(data) => {
            add_float_part(&data[elements], columns, x, tiles, sums);
        }
        PanelData::Bf16(data) => {
            float::widen_columns::<float::Bf16>(&data[elements], floats);
            add_float_part(floats.as_flattened(), columns, x, tiles, sums);
        }
        PanelData::F16(data) => {
            float::widen_columns::<float::F16>(&data[elements], floats);
            add_float_part(floats.as_flattened(), columns, x, tiles, sums);
        }
        PanelData::Q8(data) => add_int_part::<false>(&data[start..], columns, x, tiles, (words, scales), sums),
        PanelData::Q4(data) => add_int_part::<true>(&data[start..], columns, x, tiles, (words, scales), sums),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn add_float_part(panel: &[f32], columns: Range<usize>, x: &Input, tiles: Range<usize>, sums: &mut [Tile]) {
    use float::{F32, add_products};
    for (tile, sums) in tiles.zip(sums) {
        let tile = x.float_tile(tile);
        let x = &tile.x[columns.start * tile.m..columns.end * tile.m];
        match tile.m {
            1 => add_products::<F32, 1, 4, false>(panel, x, first(sums)),
            2 => add_products::<F32, 2, 2, false>(panel, x, first(sums)),
            3 => add_products::<F32, 3, 2, false>(panel, x, first(sums)),
            4 => add_products::<F32, 4, 1, false>(panel, x, first(sums)),
            5 => add_products::<F32, 5, 1, false>(panel, x, first(sums)),
            _ => add_products::<F32, 6, 1, false>(panel, x, first(sums)),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn add_int_part<const Q4: bool>(
    panel: &[u8],
    columns: Range<usize>,
    x: &Input,
    tiles: Range<usize>,
    (words, scales): (&mut [int::WideWord], &mut [[f32; PANEL]]),
    sums: &mut [Tile],
) {
    let groups = columns.start / GROUP..columns.end.div_ceil(GROUP);
    let blocks = groups.start * int::block_bytes(Q4)..groups.end * int::block_bytes(Q4);
    let (words, scales) = (&mut words[..groups.len() * int::words_in_group(Q4)], &mut scales[..groups.len()]);
    int::widen_groups::<Q4>(&panel[blocks], words, scales);
    for (tile, sums) in tiles.zip(sums) {
        let tile = x.int_tile(tile).groups(groups.clone());
        match tile.m {
            1 => int::add_wide_products::<Q4, 1>(words, scales, tile, first(sums)),
            2 => int::add_wide_products::<Q4, 2>(words, scales, tile, first(sums)),
            3 => int::add_wide_products::<Q4, 3>(words, scales, tile, first(sums)),
            4 => int::add_wide_products::<Q4, 4>(words, scales, tile, first(sums)),
            5 => int::add_wide_products::<Q4, 5>(words, scales, tile, first(sums)),
            _ => int::add_wide_products::<Q4, 6>(words, scales, tile, first(sums)),
        }
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
