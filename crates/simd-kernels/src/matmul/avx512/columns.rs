//! Products of up to six tokens with panels of float weights, in AVX-512.
//!
//! ```text
//! acc = 0
//! for each column of the part:
//!     w0..w3 = its weights in four panels, of 16 rows each
//!     for each token: acc[token] += x[token] * w0..w3
//! sum[token] += acc[token]
//! ```
//!
//! 1. The order of additions is part of the contract: within a part of [`DEPTH`] columns one
//!    accumulator takes the terms column by column, then the sum takes the parts in order. It is
//!    the same for any number of tokens and panels, and in AVX2. The latency of the additions is
//!    hidden by the number of accumulators: four panels and six tokens have 24, one token has four.
//! 2. bf16 becomes f32 by one shuffle, which also brings the rows in order. It takes a port of the
//!    multiply-adds on some processors: from [`WIDEN_TILES`] tiles on, bf16 and f16 are widened
//!    once for all tiles.
//! 3. Widened weights of four panels fit into the L1 cache for half of the columns of a part. The
//!    accumulators of the first half are stored and loaded for the second, which changes no bit.

use std::arch::x86_64::*;

use super::{Ahead, Part, TILES, Tile, activations_after, prefetch_stream};
use crate::input::Input;
use crate::lanes::{LINE, load16, prefetch, store16};
use crate::matmul::formats::{Bf16, Column, F16, F32, Width};
use crate::panels::{PANEL, PanelData};

/// Panels that meet a tile together, at most.
pub(super) const PANELS: usize = 4;

/// Columns of a part.
pub(super) const DEPTH: usize = 256;

/// Columns whose widened weights stay in the L1 cache together.
const HALF: usize = DEPTH / 2;

/// Tiles from which on it pays to widen bf16 and f16 once for all tiles.
const WIDEN_TILES: usize = 4;

/// Columns of a round of the inner loop.
const STEP: usize = 8;

/// Memory of a block of tiles.
#[repr(align(64))]
pub(super) struct Scratch {
    /// Accumulators between the halves of a part.
    halfway: [[Tile; TILES]; PANELS],
    /// Widened weights.
    columns: [[f32; PANEL]; PANELS * HALF],
}

impl Scratch {
    pub(super) const fn new() -> Scratch {
        Scratch {
            halfway: [[[[0.0; PANEL]; Input::TILE]; TILES]; PANELS],
            columns: [[0.0; PANEL]; PANELS * HALF],
        }
    }
}

/// Adds the products of the parts of P panels with each tile to `sums`.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn add_tiles<const P: usize>(
    weights: [PanelData<'_>; P],
    part: &Part<'_>,
    sums: &mut [[Tile; TILES]; P],
    ahead: Ahead<P>,
    scratch: &mut Scratch,
) {
    #[cfg(test)]
    crate::isa::witness::record("columns::add_tiles");
    match weights[0] {
        PanelData::F32(_) => add_format::<F32, P>(floats(weights), part, sums, ahead, scratch),
        PanelData::Bf16(_) => add_format::<Bf16, P>(halves(weights), part, sums, ahead, scratch),
        PanelData::F16(_) => add_format::<F16, P>(halves(weights), part, sums, ahead, scratch),
        PanelData::Q8(_) | PanelData::Q4(_) => unreachable!("these weights meet integers"),
    }
}

#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_format<C: Column, const P: usize>(
    panels: [&[[C::Bits; PANEL]]; P],
    part: &Part<'_>,
    sums: &mut [[Tile; TILES]; P],
    ahead: Ahead<P>,
    scratch: &mut Scratch,
) {
    let Scratch { halfway, columns } = scratch;
    let halfway = halfway.first_chunk_mut::<P>().expect("room for all panels");
    let tiles = part.tiles.len();
    if tiles < WIDEN_TILES {
        let acc = Accumulators { halfway, resume: false, sums, complete: true };
        return if tiles == 1 {
            add_piece::<C, P, true>(panels, part, acc, ahead)
        } else {
            add_piece::<C, P, false>(panels, part, acc, ahead)
        };
    }
    let pieces = part.columns.len().div_ceil(HALF);
    let share = ahead.share.div_ceil(pieces);
    for i in 0..pieces {
        let start = part.columns.start + i * HALF;
        let end = (start + HALF).min(part.columns.end);
        let piece = Part { x: part.x, columns: start..end, tiles: part.tiles.clone() };
        let complete = i + 1 == pieces;
        let mut ahead = Ahead { share, ..ahead }.of_tile(i * tiles, ahead.activations);
        if !complete {
            ahead.activations = part.x.start(part.tiles.start, &(end..part.columns.end));
        }
        #[cfg(test)]
        if i > 0 {
            crate::isa::witness::record("columns::second_half");
        }
        let acc = Accumulators { halfway, resume: i > 0, sums, complete };
        let panels = some_columns::<C::Bits, P>(panels, i * HALF..i * HALF + (end - start));
        if let Width::F32 = C::WIDTH {
            add_piece::<C, P, false>(panels, &piece, acc, ahead);
        } else {
            let panels = widen_all::<C, P>(panels, columns);
            add_piece::<F32, P, false>(panels, &piece, acc, ahead);
        }
    }
}

/// Where the accumulators of some columns of a part start, and where they go.
struct Accumulators<'a, const P: usize> {
    /// Accumulators after the columns before these.
    halfway: &'a mut [[Tile; TILES]; P],
    /// Whether the accumulators start from `halfway`, or else from zero.
    resume: bool,
    sums: &'a mut [[Tile; TILES]; P],
    /// Whether the part ends with these columns, so that the accumulators are added to `sums`, or
    /// else stored in `halfway`.
    complete: bool,
}

/// Multiplies some columns of a part with all tiles.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_piece<C: Column, const P: usize, const STREAM: bool>(
    panels: [&[[C::Bits; PANEL]]; P],
    piece: &Part<'_>,
    mut acc: Accumulators<'_, P>,
    ahead: Ahead<P>,
) {
    for (i, tile) in piece.tiles.clone().enumerate() {
        let ahead = ahead.of_tile(i, activations_after(piece, tile, &ahead));
        let x = piece.x.float_part(tile, &piece.columns);
        match x.m {
            1 => add_tile::<C, P, 1, STREAM>(panels, x.x, i, &mut acc, ahead),
            2 => add_tile::<C, P, 2, STREAM>(panels, x.x, i, &mut acc, ahead),
            3 => add_tile::<C, P, 3, STREAM>(panels, x.x, i, &mut acc, ahead),
            4 => add_tile::<C, P, 4, STREAM>(panels, x.x, i, &mut acc, ahead),
            5 => add_tile::<C, P, 5, STREAM>(panels, x.x, i, &mut acc, ahead),
            _ => add_tile::<C, P, 6, STREAM>(panels, x.x, i, &mut acc, ahead),
        }
    }
}

/// Multiplies some columns `panels` with the M tokens `x [columns, M]` of a tile.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_tile<C: Column, const P: usize, const M: usize, const STREAM: bool>(
    panels: [&[[C::Bits; PANEL]]; P],
    x: &[f32],
    tile: usize,
    between: &mut Accumulators<'_, P>,
    ahead: Ahead<P>,
) {
    let mut acc = [[_mm512_setzero_ps(); M]; P];
    if between.resume {
        for (acc, halfway) in acc.iter_mut().zip(&*between.halfway) {
            for (acc, halfway) in acc.iter_mut().zip(&halfway[tile]) {
                *acc = load16(halfway);
            }
        }
    }
    add_columns::<C, P, M, STREAM>(panels, x.as_chunks().0, &mut acc, ahead);
    for (p, acc) in acc.iter().enumerate() {
        for (m, acc) in acc.iter().enumerate() {
            if between.complete {
                let sum = &mut between.sums[p][tile][m];
                store16(sum, _mm512_add_ps(load16(sum), *acc));
            } else {
                store16(&mut between.halfway[p][tile][m], *acc);
            }
        }
    }
}

/// `acc[p][m] += Σ_k panels[p][k] x[k][m]`.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_columns<C: Column, const P: usize, const M: usize, const STREAM: bool>(
    panels: [&[[C::Bits; PANEL]]; P],
    x: &[[f32; M]],
    acc: &mut [[__m512; M]; P],
    ahead: Ahead<P>,
) {
    assert!(
        panels.iter().all(|panel| panel.len() == x.len()),
        "panels have the {} columns of activations",
        x.len()
    );
    let (rounds, rest) = x.as_chunks::<STEP>();
    let stride = if STREAM { 0 } else { ahead.stride(rounds.len()) };
    for (round, x) in rounds.iter().enumerate() {
        if !STREAM {
            for line in (round * stride..(round + 1) * stride).step_by(LINE) {
                for weights in ahead.weights {
                    prefetch::<_MM_HINT_T1>(weights.wrapping_add(line));
                }
            }
            for line in (0..size_of_val(x)).step_by(LINE) {
                let next = ahead.activations.wrapping_add(round * size_of_val(x) + line);
                prefetch::<_MM_HINT_T0>(next);
            }
        }
        let columns = round_of(panels, round);
        for (k, x) in x.iter().enumerate() {
            let size = size_of::<[C::Bits; PANEL]>();
            // Spread over the columns: several prefetches in a row are slower from memory.
            if STREAM && (k * size).is_multiple_of(LINE) {
                for weights in ahead.weights {
                    prefetch_stream(weights.wrapping_add((round * STEP + k) * size));
                }
            }
            let mut w = [_mm512_setzero_ps(); P];
            for (w, columns) in w.iter_mut().zip(columns) {
                *w = widen::<C>(&columns[k]);
            }
            step(w, x, acc);
        }
    }
    for (i, x) in rest.iter().enumerate() {
        let mut w = [_mm512_setzero_ps(); P];
        for (w, panel) in w.iter_mut().zip(panels) {
            *w = widen::<C>(&panel[rounds.len() * STEP + i]);
        }
        step(w, x, acc);
    }
}

/// `acc[p][m] += x[m] * w[p]`.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn step<const P: usize, const M: usize>(w: [__m512; P], x: &[f32; M], acc: &mut [[__m512; M]; P]) {
    for (m, x) in x.iter().enumerate() {
        let x = _mm512_set1_ps(*x);
        for (acc, w) in acc.iter_mut().zip(w) {
            acc[m] = _mm512_fmadd_ps(x, w, acc[m]);
        }
    }
}

/// Converts columns of P panels to f32, side by side in `room`.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn widen_all<'a, C: Column, const P: usize>(
    panels: [&[[C::Bits; PANEL]]; P],
    room: &'a mut [[f32; PANEL]; PANELS * HALF],
) -> [&'a [[f32; PANEL]]; P] {
    for (panel, room) in panels.iter().zip(room.chunks_exact_mut(HALF)) {
        for (column, room) in panel.iter().zip(room) {
            store16(room, widen::<C>(column));
        }
    }
    widened(room, panels[0].len())
}

/// The rows of a column in order.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn widen<C: Column>(column: &[C::Bits; PANEL]) -> __m512 {
    // Where in a column of bf16 (`PanelData::Bf16`) row r is, for the upper half of lane r.
    const fn places() -> [u16; 2 * PANEL] {
        let mut places = [0; 2 * PANEL];
        let mut r = 0;
        while r < PANEL {
            places[2 * r + 1] = (8 * (r / 4 % 2) + 4 * (r / 8) + r % 4) as u16;
            r += 1;
        }
        places
    }
    const PLACES: [u16; 2 * PANEL] = places();
    let start = column.as_ptr();
    // SAFETY: an array of 16 weights is 64 readable bytes for F32 and 32 for Bf16 and F16, the
    // types that implement `Column`, and the places are 64; the loads ask for no alignment. The
    // instruction touches the named registers only, and of `bits` moves the sixteen that were
    // loaded.
    unsafe {
        match C::WIDTH {
            Width::F32 => _mm512_loadu_ps(start.cast()),
            Width::Bf16 => {
                let places = _mm512_loadu_si512(PLACES.as_ptr().cast());
                let bits = _mm512_castsi256_si512(_mm256_loadu_si256(start.cast()));
                let x: __m512;
                // The compiler makes two instructions of the intrinsic, and the second one takes a
                // port of the multiply-adds.
                std::arch::asm!(
                    "vpermw {}{{{}}}{{z}}, {}, {}",
                    out(zmm_reg) x,
                    in(kreg) 0xaaaa_aaaa_u32,
                    in(zmm_reg) places,
                    in(zmm_reg) bits,
                    options(pure, nomem, nostack, preserves_flags)
                );
                x
            }
            Width::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(start.cast())),
        }
    }
}

// Functions without target features, since closures in the others would not be inlined.

fn floats<const P: usize>(parts: [PanelData<'_>; P]) -> [&[[f32; PANEL]]; P] {
    parts.map(|part| match part {
        PanelData::F32(part) => part.as_chunks().0,
        _ => panic!("panels of one product have one format"),
    })
}

fn halves<const P: usize>(parts: [PanelData<'_>; P]) -> [&[[u16; PANEL]]; P] {
    parts.map(|part| match part {
        PanelData::Bf16(part) | PanelData::F16(part) => part.as_chunks().0,
        _ => panic!("panels of one product have one format"),
    })
}

fn some_columns<B, const P: usize>(
    panels: [&[[B; PANEL]]; P],
    columns: std::ops::Range<usize>,
) -> [&[[B; PANEL]]; P] {
    panels.map(|panel| &panel[columns.clone()])
}

/// The columns of a round.
#[inline]
fn round_of<B, const P: usize>(
    panels: [&[[B; PANEL]]; P],
    round: usize,
) -> [&[[B; PANEL]; STEP]; P] {
    panels.map(|panel| &panel.as_chunks().0[round])
}

fn widened<const P: usize>(
    room: &[[f32; PANEL]; PANELS * HALF],
    columns: usize,
) -> [&[[f32; PANEL]]; P] {
    std::array::from_fn(|p| &room[p * HALF..][..columns])
}
