//! Products of up to six tokens with panels of float weights, in AVX-512, and of tokens rounded to
//! bf16 with bf16 weights, in AVX512-BF16.
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
//! 3. With tokens in bf16 (`InputKind::Bf16`), `vdpbf16ps` multiplies two columns at once. What the
//!    kernel below calls a column is a pair of columns then: for each row the weights of both in 32
//!    bits, by one shuffle of two stored columns.
//! 4. Widened weights of four panels fit into the L1 cache for half of the columns of a part. The
//!    accumulators of the first half are stored and loaded for the second, which changes no bit.

use std::arch::x86_64::*;

use super::{Ahead, Part, TILES, Tile, activations_after, prefetch_stream};
use crate::input::{Input, InputKind};
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

/// How AVX-512 multiplies columns that are stored in one of the formats.
trait Multiply: Column {
    /// The columns after they have been widened, or paired, once for many tiles.
    type Wide: Multiply<Bits = f32>;
    /// Whether the factors are pairs of bf16.
    const DOT: bool = false;
}

impl Multiply for F32 {
    type Wide = F32;
}

impl Multiply for Bf16 {
    type Wide = F32;
}

impl Multiply for F16 {
    type Wide = F32;
}

/// Two columns of `PanelData::Bf16`, one after the other.
struct StoredPairs;

impl Column for StoredPairs {
    type Bits = [u16; 2];
    const WIDTH: Width = Width::Pairs;
}

impl Multiply for StoredPairs {
    type Wide = RowPairs;
    const DOT: bool = true;
}

/// Two columns of bf16, both weights of a row in the 32 bits of an f32.
struct RowPairs;

impl Column for RowPairs {
    type Bits = f32;
    const WIDTH: Width = Width::F32;
}

impl Multiply for RowPairs {
    type Wide = RowPairs;
    const DOT: bool = true;
}

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

/// The panels that so many tokens meet together: one token reads more than two streams slower.
pub(super) fn stream_panels(tokens: usize) -> usize {
    if tokens == 1 { 2 } else { PANELS }
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
        PanelData::Bf16(_) if part.x.kind() == InputKind::Bf16 => {
            #[cfg(test)]
            crate::isa::witness::record("columns::pairs");
            let (panels, last) = pairs(weights);
            add_format::<StoredPairs, P>(panels, last, part, sums, ahead, scratch);
        }
        PanelData::F32(_) => {
            add_format::<F32, P>(floats(weights), None, part, sums, ahead, scratch)
        }
        PanelData::Bf16(_) => {
            add_format::<Bf16, P>(halves(weights), None, part, sums, ahead, scratch)
        }
        PanelData::F16(_) => {
            add_format::<F16, P>(halves(weights), None, part, sums, ahead, scratch)
        }
        PanelData::Q8(_) | PanelData::Q4(_) => unreachable!("these weights meet integers"),
    }
}

#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_format<C: Multiply, const P: usize>(
    panels: [&[[C::Bits; PANEL]]; P],
    last: Last<C, P>,
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
            add_piece::<C, P, true>(panels, last, part, acc, ahead)
        } else {
            add_piece::<C, P, false>(panels, last, part, acc, ahead)
        };
    }
    // Stored columns of a piece: HALF after they have been widened or paired.
    let width = if C::DOT { 2 * HALF } else { HALF };
    let pieces = part.columns.len().div_ceil(width);
    let share = ahead.share.div_ceil(pieces);
    for i in 0..pieces {
        let start = part.columns.start + i * width;
        let end = (start + width).min(part.columns.end);
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
        let panels = some_columns::<C::Bits, P>(panels, i * HALF);
        if let Width::F32 = C::WIDTH {
            add_piece::<C, P, false>(panels, None, &piece, acc, ahead);
        } else {
            let panels = widen_all::<C, P>(panels, if complete { last } else { None }, columns);
            add_piece::<C::Wide, P, false>(panels, None, &piece, acc, ahead);
        }
    }
}

/// A column that ends the part and is not among those stored in pairs.
type Last<C, const P: usize> = Option<[[<C as Column>::Bits; PANEL]; P]>;

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
fn add_piece<C: Multiply, const P: usize, const STREAM: bool>(
    panels: [&[[C::Bits; PANEL]]; P],
    last: Last<C, P>,
    piece: &Part<'_>,
    mut acc: Accumulators<'_, P>,
    ahead: Ahead<P>,
) {
    for (i, tile) in piece.tiles.clone().enumerate() {
        let ahead = ahead.of_tile(i, activations_after(piece, tile, &ahead));
        let x = piece.x.float_part(tile, &piece.columns);
        match x.m {
            1 => add_tile::<C, P, 1, STREAM>(panels, last, x.x, i, &mut acc, ahead),
            2 => add_tile::<C, P, 2, STREAM>(panels, last, x.x, i, &mut acc, ahead),
            3 => add_tile::<C, P, 3, STREAM>(panels, last, x.x, i, &mut acc, ahead),
            4 => add_tile::<C, P, 4, STREAM>(panels, last, x.x, i, &mut acc, ahead),
            5 => add_tile::<C, P, 5, STREAM>(panels, last, x.x, i, &mut acc, ahead),
            _ => add_tile::<C, P, 6, STREAM>(panels, last, x.x, i, &mut acc, ahead),
        }
    }
}

/// Multiplies some columns `panels` with the M tokens `x [columns, M]` of a tile.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_tile<C: Multiply, const P: usize, const M: usize, const STREAM: bool>(
    panels: [&[[C::Bits; PANEL]]; P],
    last: Last<C, P>,
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
    add_columns::<C, P, M, STREAM>(panels, last, x.as_chunks().0, &mut acc, ahead);
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
fn add_columns<C: Multiply, const P: usize, const M: usize, const STREAM: bool>(
    panels: [&[[C::Bits; PANEL]]; P],
    last: Last<C, P>,
    x: &[[f32; M]],
    acc: &mut [[__m512; M]; P],
    ahead: Ahead<P>,
) {
    let stored = x.len() - usize::from(last.is_some());
    assert!(
        panels.iter().all(|panel| panel.len() == stored),
        "panels have the {stored} columns of activations"
    );
    let (rounds, rest) = x[..stored].as_chunks::<STEP>();
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
            step::<C, P, M>(w, x, acc);
        }
    }
    for (i, x) in rest.iter().enumerate() {
        let mut w = [_mm512_setzero_ps(); P];
        for (w, panel) in w.iter_mut().zip(panels) {
            *w = widen::<C>(&panel[rounds.len() * STEP + i]);
        }
        step::<C, P, M>(w, x, acc);
    }
    if let (Some(last), Some(x)) = (last, x.get(stored)) {
        let mut w = [_mm512_setzero_ps(); P];
        for (w, column) in w.iter_mut().zip(&last) {
            *w = widen::<C>(column);
        }
        step::<C, P, M>(w, x, acc);
    }
}

/// `acc[p][m] += x[m] * w[p]`, or the sum of the products of two pairs.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn step<C: Multiply, const P: usize, const M: usize>(
    w: [__m512; P],
    x: &[f32; M],
    acc: &mut [[__m512; M]; P],
) {
    for (m, x) in x.iter().enumerate() {
        let x = _mm512_set1_ps(*x);
        for (acc, w) in acc.iter_mut().zip(w) {
            if C::DOT {
                dot_pairs(&mut acc[m], w, x);
            } else {
                acc[m] = _mm512_fmadd_ps(x, w, acc[m]);
            }
        }
    }
}

/// `sum += w.0 * x.0 + w.1 * x.1` of the pairs of bf16 in each lane.
///
/// The intrinsic would need functions that enable AVX512-BF16, all the way up from here.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn dot_pairs(sum: &mut __m512, w: __m512, x: __m512) {
    // SAFETY: `matmul` accepts activations in bf16 only where the CPU has the instruction, which
    // touches the named registers only.
    unsafe {
        std::arch::asm!(
            "vdpbf16ps {}, {}, {}",
            inout(zmm_reg) *sum,
            in(zmm_reg) w,
            in(zmm_reg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
}

/// Converts columns of P panels to their wide form, side by side in `room`.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn widen_all<'a, C: Multiply, const P: usize>(
    panels: [&[[C::Bits; PANEL]]; P],
    last: Last<C, P>,
    room: &'a mut [[f32; PANEL]; PANELS * HALF],
) -> [&'a [[f32; PANEL]]; P] {
    for (panel, room) in panels.iter().zip(room.chunks_exact_mut(HALF)) {
        for (column, room) in panel.iter().zip(room) {
            store16(room, widen::<C>(column));
        }
    }
    let mut columns = panels[0].len();
    if let Some(last) = last {
        for (column, room) in last.iter().zip(room.chunks_exact_mut(HALF)) {
            store16(&mut room[columns], widen::<C>(column));
        }
        columns += 1;
    }
    widened(room, columns)
}

/// The rows of a column in order.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn widen<C: Multiply>(column: &[C::Bits; PANEL]) -> __m512 {
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
    // Where in two columns of bf16 the two weights of row r are.
    const fn pair_places() -> [u16; 2 * PANEL] {
        let mut pairs = [0; 2 * PANEL];
        let mut r = 0;
        while r < PANEL {
            pairs[2 * r] = PLACES[2 * r + 1];
            pairs[2 * r + 1] = PANEL as u16 + PLACES[2 * r + 1];
            r += 1;
        }
        pairs
    }
    const PAIR_PLACES: [u16; 2 * PANEL] = pair_places();
    let start = column.as_ptr();
    // SAFETY: an array of 16 weights is 64 readable bytes for F32 and RowPairs, 32 for Bf16 and
    // F16, and 16 pairs are 64 for StoredPairs: these are the types that implement `Multiply`. The
    // places are 64 bytes; the loads ask for no alignment. The
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
            Width::Pairs => {
                let places = _mm512_loadu_si512(PAIR_PLACES.as_ptr().cast());
                let columns = _mm512_loadu_si512(start.cast());
                _mm512_castsi512_ps(_mm512_permutexvar_epi16(places, columns))
            }
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

/// The columns from `start` on, at most those of a piece.
fn some_columns<B, const P: usize>(panels: [&[[B; PANEL]]; P], start: usize) -> [&[[B; PANEL]]; P] {
    panels.map(|panel| &panel[start..panel.len().min(start + HALF)])
}

/// Columns of P panels of bf16 in twos.
type TwoColumns<'a, const P: usize> = [&'a [[[u16; 2]; PANEL]]; P];

/// Stored columns of bf16 in twos, and the last one beside a column of zeros if it is left over.
fn pairs<const P: usize>(parts: [PanelData<'_>; P]) -> (TwoColumns<'_, P>, Last<StoredPairs, P>) {
    let columns: [&[[u16; PANEL]]; P] = halves(parts);
    let last = (columns[0].len() % 2 == 1).then(|| {
        columns.map(|columns| {
            let mut two = [0; 2 * PANEL];
            two[..PANEL].copy_from_slice(&columns[columns.len() - 1]);
            std::array::from_fn(|i| [two[2 * i], two[2 * i + 1]])
        })
    });
    (columns.map(|columns| columns.as_flattened().as_chunks().0.as_chunks().0), last)
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
