//! Tiles of many tokens with Q8 and Q4 weights and AVX-512: both as codes without a sign.
//!
//! ```text
//! for each tile of six tokens:
//!     for each group of 32 columns:
//!         acc[token] = start[token]                                   two panels of 16 rows
//!         for each word of four columns: acc[token] += word[token] * the codes of the two
//!         sum[token] += acc[token] * (scale of the row * scale of the token)
//! ```
//!
//! 1. `vpdpbusd` wants one factor without a sign. The codes are `EXCESS` above the weights, Q8's
//!    integers or Q4's half steps, and products with them too large by that times the total of the
//!    token's integers: sums start as much below zero (`IntTile::starts`). No zero point is left to
//!    be subtracted.
//! 2. Parts of panels are widened once for all tiles that pass them: 18 KiB of codes for two
//!    panels.
//! 3. Two panels and one tile have twelve sums of integers and as many of floats, all in registers.
//!    Two tiles would share what is read of the weights and keep the sums of floats in memory: on a
//!    Zen 4 as fast with 512 tokens, 0.85 to 0.95 times with 8 to 32.

use std::arch::x86_64::*;

use super::int::{block_bytes, load_bytes, words_in_group};
use super::wide::WideGroup;
use super::{Ahead, Columns, Tile};
use crate::lanes::{LINE, load16, prefetch, store16};
use crate::pack::EXCESS;
use crate::panels::{PANEL, Q4_SCALE};

/// Panels that meet a tile together.
pub(super) const PANELS: usize = 2;

/// Words of a group of int8.
const WORDS: usize = words_in_group(true);

/// Adds the products of panel parts with the tiles from `first` on to the `sums` of each, and
/// prefetches the share of the weights `ahead` that each tile has, and the activations of the tile
/// after it.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn add_tiles<const P: usize>(
    panels: [&[WideGroup]; P],
    x: &Columns<'_>,
    first: usize,
    mut sums: [&mut [Tile]; P],
    ahead: Ahead<P>,
) {
    let tiles = sums[0].len();
    for tile in 0..tiles {
        let activations = if tile + 1 < tiles {
            x.x.start(first + tile + 1, &x.range)
        } else {
            ahead.activations
        };
        let weights = ahead.weights.map(|weights| weights.wrapping_add(tile * ahead.share));
        let ahead = Ahead { weights, share: ahead.share, activations };
        let sums = sums.each_mut().map(|sums| &mut sums[tile]);
        match x.x.tile_tokens(first + tile).len() {
            1 => add_tile::<P, 1>(panels, x, first + tile, sums, ahead),
            2 => add_tile::<P, 2>(panels, x, first + tile, sums, ahead),
            3 => add_tile::<P, 3>(panels, x, first + tile, sums, ahead),
            4 => add_tile::<P, 4>(panels, x, first + tile, sums, ahead),
            5 => add_tile::<P, 5>(panels, x, first + tile, sums, ahead),
            _ => add_tile::<P, 6>(panels, x, first + tile, sums, ahead),
        }
    }
}

/// One tile of M tokens.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_tile<const P: usize, const M: usize>(
    panels: [&[WideGroup]; P],
    x: &Columns<'_>,
    tile: usize,
    sums: [&mut Tile; P],
    ahead: Ahead<P>,
) {
    let tile = x.x.int_part(tile, &x.range);
    let words: &[[[i32; M]; WORDS]] = tile.words.as_chunks().0.as_chunks().0;
    let (scales, starts) = (tile.scales.as_chunks::<M>().0, tile.starts.as_chunks::<M>().0);
    let groups = words.len();
    assert!(
        panels.iter().all(|panel| panel.len() == groups),
        "panels have the {groups} groups of activations"
    );
    let share = ahead.stride(groups);
    let mut results = [[_mm512_setzero_ps(); M]; P];
    for (results, sums) in results.iter_mut().zip(&sums) {
        for (result, sum) in results.iter_mut().zip(sums.iter()) {
            *result = load16(sum);
        }
    }
    for (g, ((words, scales), starts)) in words.iter().zip(scales).zip(starts).enumerate() {
        for line in (g * share..(g + 1) * share).step_by(LINE) {
            for weights in ahead.weights {
                prefetch::<_MM_HINT_T1>(weights.wrapping_add(line));
            }
        }
        for line in (0..size_of_val(words)).step_by(LINE) {
            prefetch::<_MM_HINT_T0>(ahead.activations.wrapping_add(g * size_of_val(words) + line));
        }
        let mut acc = [[_mm512_setzero_si512(); M]; P];
        for acc in &mut acc {
            for (acc, start) in acc.iter_mut().zip(starts) {
                *acc = _mm512_cvtps_epi32(_mm512_set1_ps(*start));
            }
        }
        for (i, word) in words.iter().enumerate() {
            let mut w = [_mm512_setzero_si512(); P];
            for (w, panel) in w.iter_mut().zip(panels) {
                *w = load_word(&panel[g].words[i]);
            }
            for (m, x) in word.iter().enumerate() {
                let x = _mm512_set1_epi32(*x);
                for (acc, w) in acc.iter_mut().zip(w) {
                    acc[m] = _mm512_dpbusd_epi32(acc[m], w, x);
                }
            }
        }
        for ((acc, panel), results) in acc.iter().zip(panels).zip(&mut results) {
            let row_scales = load16(&panel[g].scales);
            for ((acc, scale), result) in acc.iter().zip(scales).zip(results) {
                let both = _mm512_mul_ps(row_scales, _mm512_set1_ps(*scale));
                *result = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*acc), both, *result);
            }
        }
    }
    for (results, sums) in results.iter().zip(sums) {
        for (result, sum) in results.iter().zip(sums) {
            store16(sum, *result);
        }
    }
}

/// Groups of Q8 as codes, or of Q4 in half steps, of which there are -23..=22.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn widen<const Q4: bool>(bytes: &[u8], groups: &mut [WideGroup]) {
    // Where the pairs of row r are in two words, one after the other.
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
    // The nibbles of rows 0..8 are the lower ones: two times a nibble is a bit farther up, or three
    // bits farther down.
    let turns = _mm512_inserti64x4::<1>(_mm512_set1_epi32(1), _mm256_set1_epi32(32 - 3));
    for (group, block) in groups.iter_mut().zip(bytes.chunks_exact(block_bytes(Q4))) {
        let (head, words) = block.split_first_chunk().expect("a block starts with its scales");
        let head = load_bytes(head);
        if Q4 {
            let scales =
                _mm256_and_si256(_mm256_srli_epi16::<1>(head), _mm256_set1_epi16(Q4_SCALE as i16));
            // Exact: the scales are of half precision.
            store16(&mut group.scales, _mm512_mul_ps(_mm512_cvtph_ps(scales), _mm512_set1_ps(0.5)));
            // The excess less the zero point, which is 8 half steps and those of the word, in each
            // byte of a row.
            let zeros = _mm512_cvtepu16_epi32(_mm256_and_si256(head, _mm256_set1_epi16(15)));
            let above = _mm512_sub_epi32(_mm512_set1_epi32(EXCESS as i32 - 8), zeros);
            let above = _mm512_mullo_epi32(above, _mm512_set1_epi32(0x0101_0101));
            for (out, word) in group.words.iter_mut().zip(words.as_chunks().0) {
                let turned = _mm512_rolv_epi32(_mm512_broadcast_i64x4(load_bytes(word)), turns);
                let doubled = _mm512_and_si512(turned, _mm512_set1_epi8(2 * 15));
                store_word(out, _mm512_add_epi8(doubled, above));
            }
        } else {
            store16(&mut group.scales, _mm512_cvtph_ps(head));
            for (out, two) in group.words.iter_mut().zip(words.as_chunks::<32>().0.as_chunks().0) {
                let quads = _mm512_permutexvar_epi16(places, load_word(two));
                store_word(out, _mm512_add_epi8(quads, _mm512_set1_epi8(EXCESS as u8 as i8)));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn store_word(word: &mut [[u8; 32]; 2], bytes: __m512i) {
    // SAFETY: the arrays are 64 writable bytes, and the store asks for no alignment.
    unsafe { _mm512_storeu_si512(word.as_mut_ptr().cast(), bytes) }
}

/// The bytes of the sixteen rows.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn load_word(word: &[[u8; 32]; 2]) -> __m512i {
    // SAFETY: the arrays are 64 readable bytes, and the load asks for no alignment.
    unsafe { _mm512_loadu_si512(word.as_ptr().cast()) }
}
