//! Products of up to six tokens of int8 with panels of Q8 and Q4 weights, by `vpdpbusd`.
//!
//! ```text
//! for each group of 32 columns:
//!     acc[token] = start[token]                                   two panels of 16 rows
//!     for each word of four columns: acc[token] += word[token] * the codes of the two
//!     sum[token] += acc[token] * (scale of the row * scale of the token)
//! ```
//!
//! 1. `vpdpbusd` takes one factor without a sign. The codes are `EXCESS` above the weights, Q8's
//!    integers or Q4's half steps, and products with them too large by that times the total of the
//!    token's integers: accumulators start as much below zero (`IntTile::starts`). No zero point
//!    is left to be subtracted.
//! 2. The sums of a group are exact, and the sums over groups are formed in order. The bits do not
//!    depend on the number of tokens, nor on where a part of the columns ends.
//! 3. Up to [`DIRECT_TILES`] tiles make the codes in registers. For more, the codes of a part are
//!    stored once for all tiles: 18 KiB for two panels.
//! 4. Two panels and one tile have twelve sums of integers and as many of floats, all in registers.

use std::arch::x86_64::*;

use super::{Ahead, Part, TILES, Tile, activations_after, prefetch_stream};
use crate::input::IntTile;
use crate::lanes::{LINE, load16, prefetch, store16};
use crate::pack::EXCESS;
use crate::panels::{GROUP, PANEL, PanelData, Q4_BLOCK, Q4_SCALE, Q8_BLOCK};

/// Panels that meet a tile together, at most.
pub(super) const PANELS: usize = 2;

/// Columns of a part.
pub(super) const DEPTH: usize = 512;

/// Tiles up to which it does not pay to store the codes.
const DIRECT_TILES: usize = 2;

/// Words of a group, of four columns each.
const WORDS: usize = GROUP / 4;

/// Bytes of a group of codes: 16 scales in f32, then 16 rows of codes for each word.
const CODE_BLOCK: usize = 4 * PANEL + PANEL * GROUP;

/// The forms in which a kernel reads the weights of a group.
const Q8: u8 = 0;
const Q4: u8 = 1;
const CODES: u8 = 2;

/// Bytes of a group in a form.
const fn block_bytes(form: u8) -> usize {
    match form {
        Q8 => Q8_BLOCK,
        Q4 => Q4_BLOCK,
        _ => CODE_BLOCK,
    }
}

/// Memory of a block of tiles: the codes of the panels that meet a tile together.
#[repr(align(64))]
pub(super) struct Scratch([[u8; CODE_BLOCK * (DEPTH / GROUP)]; PANELS]);

impl Scratch {
    pub(super) const fn new() -> Scratch {
        Scratch([[0; CODE_BLOCK * (DEPTH / GROUP)]; PANELS])
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
    crate::isa::witness::record("codes::add_tiles");
    let panels = bytes(weights);
    match (weights[0], part.tiles.len()) {
        (_, 1) => stream(weights, part, sums, ahead),
        (PanelData::Q8(_), 2..=DIRECT_TILES) => {
            add_form::<Q8, P, false>(panels, part, sums, ahead);
        }
        (PanelData::Q4(_), 2..=DIRECT_TILES) => {
            add_form::<Q4, P, false>(panels, part, sums, ahead);
        }
        (data, _) => {
            let q4 = matches!(data, PanelData::Q4(_));
            let mut groups = 0;
            for (panel, codes) in panels.iter().zip(&mut scratch.0) {
                groups = if q4 { encode::<Q4>(panel, codes) } else { encode::<Q8>(panel, codes) };
            }
            let panels = first_groups(&scratch.0, groups);
            add_form::<CODES, P, false>(panels, part, sums, ahead);
        }
    }
}

/// The panels that one tile of so many tokens meets together: with few tokens of Q8, more streams
/// are slower.
pub(super) fn stream_panels(data: &PanelData<'_>, tokens: usize) -> usize {
    if matches!(data, PanelData::Q8(_)) && tokens < 3 { 2 } else { 4 }
}

/// As [`add_tiles`], of one tile.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn stream<const P: usize>(
    weights: [PanelData<'_>; P],
    part: &Part<'_>,
    sums: &mut [[Tile; TILES]; P],
    ahead: Ahead<P>,
) {
    let panels = bytes(weights);
    if let PanelData::Q4(_) = weights[0] {
        add_form::<Q4, P, true>(panels, part, sums, ahead)
    } else {
        add_form::<Q8, P, true>(panels, part, sums, ahead)
    }
}

/// Stores groups of Q8 or Q4 as codes, and returns their number.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn encode<const FORM: u8>(panel: &[u8], codes: &mut [u8]) -> usize {
    let groups = panel.chunks_exact(block_bytes(FORM));
    let count = groups.len();
    for (group, codes) in groups.zip(codes.chunks_exact_mut(CODE_BLOCK)) {
        let head = Head::of::<FORM>(group);
        store_line(codes, 0, _mm512_castps_si512(head.scales));
        for i in 0..WORDS {
            store_line(codes, 1 + i, head.word::<FORM>(group, i));
        }
    }
    count
}

#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_form<const FORM: u8, const P: usize, const STREAM: bool>(
    panels: [&[u8]; P],
    part: &Part<'_>,
    sums: &mut [[Tile; TILES]; P],
    ahead: Ahead<P>,
) {
    for (i, tile) in part.tiles.clone().enumerate() {
        let ahead = ahead.of_tile(i, activations_after(part, tile, &ahead));
        let x = part.x.int_part(tile, &part.columns);
        match x.m {
            1 => add_tile::<FORM, P, 1, STREAM>(panels, x, i, sums, ahead),
            2 => add_tile::<FORM, P, 2, STREAM>(panels, x, i, sums, ahead),
            3 => add_tile::<FORM, P, 3, STREAM>(panels, x, i, sums, ahead),
            4 => add_tile::<FORM, P, 4, STREAM>(panels, x, i, sums, ahead),
            5 => add_tile::<FORM, P, 5, STREAM>(panels, x, i, sums, ahead),
            _ => add_tile::<FORM, P, 6, STREAM>(panels, x, i, sums, ahead),
        }
    }
}

/// One tile of M tokens.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_tile<const FORM: u8, const P: usize, const M: usize, const STREAM: bool>(
    panels: [&[u8]; P],
    x: IntTile<'_>,
    tile: usize,
    sums: &mut [[Tile; TILES]; P],
    ahead: Ahead<P>,
) {
    let words: &[[[i32; M]; WORDS]] = x.words.as_chunks().0.as_chunks().0;
    let (scales, starts) = (x.scales.as_chunks::<M>().0, x.starts.as_chunks::<M>().0);
    let size = block_bytes(FORM);
    assert!(
        panels.iter().all(|panel| panel.len() == size * words.len()),
        "panels have the {} groups of activations",
        words.len()
    );
    let stride = if STREAM { size } else { ahead.stride(words.len()) };
    let mut results = [[_mm512_setzero_ps(); M]; P];
    for (results, sums) in results.iter_mut().zip(&*sums) {
        for (result, sum) in results.iter_mut().zip(&sums[tile]) {
            *result = load16(sum);
        }
    }
    for (g, ((words, scales), starts)) in words.iter().zip(scales).zip(starts).enumerate() {
        if !STREAM {
            for line in (g * stride..(g + 1) * stride).step_by(LINE) {
                for weights in ahead.weights {
                    prefetch::<_MM_HINT_T1>(weights.wrapping_add(line));
                }
            }
            for line in (0..size_of_val(words)).step_by(LINE) {
                let next = ahead.activations.wrapping_add(g * size_of_val(words) + line);
                prefetch::<_MM_HINT_T0>(next);
            }
        }
        let groups = groups_of::<FORM, P>(panels, g);
        let mut heads = [Head::zero(); P];
        let mut acc = [[_mm512_setzero_si512(); M]; P];
        for ((acc, head), group) in acc.iter_mut().zip(&mut heads).zip(groups) {
            *head = Head::of::<FORM>(group);
            for (acc, start) in acc.iter_mut().zip(starts) {
                *acc = _mm512_cvtps_epi32(_mm512_set1_ps(*start));
            }
        }
        for (i, word) in words.iter().enumerate() {
            if STREAM && LINE * i < stride {
                for weights in ahead.weights {
                    prefetch_stream(weights.wrapping_add(g * stride + LINE * i));
                }
            }
            let mut w = [_mm512_setzero_si512(); P];
            for ((w, head), group) in w.iter_mut().zip(&heads).zip(groups) {
                *w = head.word::<FORM>(group, i);
            }
            for (m, x) in word.iter().enumerate() {
                let x = _mm512_set1_epi32(*x);
                for (acc, w) in acc.iter_mut().zip(w) {
                    acc[m] = _mm512_dpbusd_epi32(acc[m], w, x);
                }
            }
        }
        if STREAM {
            // A block is half a line longer than its words: else every second block would leave
            // out a line.
            for weights in ahead.weights {
                prefetch_stream(weights.wrapping_add(g * stride + stride / LINE * LINE));
            }
        }
        for ((acc, head), results) in acc.iter().zip(&heads).zip(&mut results) {
            for ((acc, scale), result) in acc.iter().zip(scales).zip(results) {
                let both = _mm512_mul_ps(head.scales, _mm512_set1_ps(*scale));
                *result = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*acc), both, *result);
            }
        }
    }
    for (results, sums) in results.iter().zip(sums) {
        for (result, sum) in results.iter().zip(&mut sums[tile]) {
            store16(sum, *result);
        }
    }
}

/// What the sixteen rows of a group have for all of its columns.
#[derive(Clone, Copy)]
struct Head {
    /// Q4's scales are those of half steps.
    scales: __m512,
    /// What is added to each byte of Q4 to make it a code.
    above: __m512i,
}

impl Head {
    #[inline]
    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    fn zero() -> Head {
        Head { scales: _mm512_setzero_ps(), above: _mm512_setzero_si512() }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    fn of<const FORM: u8>(group: &[u8]) -> Head {
        let mut head = Head::zero();
        match FORM {
            CODES => head.scales = _mm512_castsi512_ps(load_line(group, 0)),
            Q8 => head.scales = _mm512_cvtph_ps(load_half_line(group, 0)),
            _ => {
                let words = load_half_line(group, 0);
                let scales = _mm256_and_si256(
                    _mm256_srli_epi16::<1>(words),
                    _mm256_set1_epi16(Q4_SCALE as i16),
                );
                // Exact: the scales have half precision.
                head.scales = _mm512_mul_ps(_mm512_cvtph_ps(scales), _mm512_set1_ps(0.5));
                // The excess less the zero point, which is 8 half steps and those of the word, in
                // each byte of a row.
                let zeros = _mm512_cvtepu16_epi32(_mm256_and_si256(words, _mm256_set1_epi16(15)));
                let above = _mm512_sub_epi32(_mm512_set1_epi32(EXCESS as i32 - 8), zeros);
                head.above = _mm512_shuffle_epi8(
                    above,
                    _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0),
                );
            }
        }
        head
    }

    /// The codes of word `i` of the group: four columns of each row.
    #[inline]
    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    fn word<const FORM: u8>(&self, group: &[u8], i: usize) -> __m512i {
        match FORM {
            CODES => load_line(&group[4 * PANEL..], i),
            Q8 => {
                // Where the pairs of row r are in two words of pairs, one after the other.
                const fn places() -> [u16; 2 * PANEL] {
                    let mut places = [0; 2 * PANEL];
                    let mut r = 0;
                    while r < PANEL {
                        places[2 * r] = r as u16;
                        places[2 * r + 1] = (PANEL + r) as u16;
                        r += 1;
                    }
                    places
                }
                const PLACES: [u16; 2 * PANEL] = places();
                // SAFETY: the array is 64 readable bytes, and the load asks for no alignment.
                let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
                let quads = _mm512_permutexvar_epi16(places, load_line(&group[2 * PANEL..], i));
                // Adds 128 to each byte.
                _mm512_xor_si512(quads, _mm512_set1_epi8(i8::MIN))
            }
            _ => {
                // The nibbles of rows 0..8 are the lower ones: two times a nibble is a bit farther
                // up, or three bits farther down.
                let turns =
                    _mm512_inserti64x4::<1>(_mm512_set1_epi32(1), _mm256_set1_epi32(32 - 3));
                let both = _mm512_broadcast_i64x4(load_half_line(&group[2 * PANEL..], i));
                let doubled =
                    _mm512_and_si512(_mm512_rolv_epi32(both, turns), _mm512_set1_epi8(2 * 15));
                _mm512_add_epi8(doubled, self.above)
            }
        }
    }
}
const _: () =
    assert!(EXCESS == 128.0, "the codes of Q8 differ from the weights in their first bit");

/// Line `i` of a group.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn load_line(group: &[u8], i: usize) -> __m512i {
    let line: &[u8; 64] = &group.as_chunks().0[i];
    // SAFETY: the array is 64 readable bytes, and the load asks for no alignment.
    unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
}

/// Half line `i` of a group.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn load_half_line(group: &[u8], i: usize) -> __m256i {
    let line: &[u8; 32] = &group.as_chunks().0[i];
    // SAFETY: the array is 32 readable bytes, and the load asks for no alignment.
    unsafe { _mm256_loadu_si256(line.as_ptr().cast()) }
}

/// Writes line `i` of a group.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn store_line(group: &mut [u8], i: usize, v: __m512i) {
    let line: &mut [u8; 64] = &mut group.as_chunks_mut().0[i];
    // SAFETY: the array is 64 writable bytes, and the store asks for no alignment.
    unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), v) }
}

// Functions without target features, since closures in the others would not be inlined.

fn bytes<const P: usize>(parts: [PanelData<'_>; P]) -> [&[u8]; P] {
    parts.map(|part| match part {
        PanelData::Q8(part) | PanelData::Q4(part) => part,
        _ => panic!("panels of one product have one format"),
    })
}

fn first_groups<const N: usize, const P: usize>(
    codes: &[[u8; N]; PANELS],
    groups: usize,
) -> [&[u8]; P] {
    std::array::from_fn(|p| &codes[p][..groups * CODE_BLOCK])
}

/// Group `g` of each panel.
#[inline]
fn groups_of<const FORM: u8, const P: usize>(panels: [&[u8]; P], g: usize) -> [&[u8]; P] {
    panels.map(|panel| &panel[g * block_bytes(FORM)..][..block_bytes(FORM)])
}
