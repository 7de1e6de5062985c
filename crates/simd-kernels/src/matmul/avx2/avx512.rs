//! Whole tiles of many tokens with AVX-512, whose registers hold the 16 rows of a panel.
//!
//! ```text
//! for each two tiles of six tokens:
//!     for each column, or word of quantized columns:
//!         w0, w1 = its weights in two panels, of 16 rows each
//!         for each token of the two: sum[token] += x[token] * w0, x[token] * w1
//! ```
//!
//! 1. Two panels and two tiles make 24 sums of the 32 registers. One panel with four tiles has as many, but broadcasts an
//!    activation for each multiply-add instead of one for two: on an Emerald Rapids 0.7 times as fast with bf16.
//! 2. The terms of a sum come in the order of AVX2, and the sums are the same to the last bit.
//! 3. bf16 becomes f32 by one shuffle, which also brings its rows in order.
//! 4. The registers have no room for totals besides the sums of a group of integers; as in AVX2 they live in memory.

use std::arch::x86_64::*;

use super::float::{Bf16, Column, F16, F32, Width};
use super::int::load_bytes;
use super::wide::{Part, bytes, floats, halves};
use super::{Ahead, Columns, Tile};
use crate::input::{Input, IntTile};
use crate::lanes::{LINE, load16, prefetch, store16};
use crate::panels::{PANEL, PanelData, Q4_BLOCK, Q4_SCALE, Q8_BLOCK};

/// Panels that meet a set of tiles together.
pub(super) const PANELS: usize = 2;

/// Tiles of a set.
const TILES: usize = 2;

/// Columns of floats that go together.
const STEP: usize = 4;

/// Adds the products of panel parts with whole tiles from `first` on to the `sums` of each, and prefetches the share of the weights `ahead` that
/// each tile has, and the activations of the tiles after it.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn add_tiles<const P: usize>(
    parts: [PanelData<'_>; P],
    x: &Columns<'_>,
    first: usize,
    mut sums: [&mut [Tile]; P],
    ahead: Ahead<P>,
) {
    let tiles = sums[0].len();
    for done in (0..tiles).step_by(TILES) {
        let next = (done + TILES).min(tiles);
        // The last set is followed by the first one, with other weights.
        let after = if next < tiles { next } else { 0 };
        let start = |i: usize| x.x.start(first + (after + i).min(tiles - 1), &x.range);
        let weights = ahead.weights.map(|weights| weights.wrapping_add(done * ahead.share));
        let set = Set { parts, x, first: first + done, weights, share: ahead.share * (next - done) };
        let sums = sums.each_mut().map(|sums| &mut sums[done..next]);
        if next - done == TILES {
            set.add::<TILES>(sums.map(|sums| sums.first_chunk_mut().expect("a whole set")), [start(0), start(1)]);
        } else {
            set.add::<1>(sums.map(|sums| sums.first_chunk_mut().expect("one tile")), [start(0)]);
        }
    }
}

/// Some tiles that meet parts of panels.
struct Set<'a, const P: usize> {
    parts: [PanelData<'a>; P],
    x: &'a Columns<'a>,
    first: usize,
    /// For each panel, where the weights to ask for start; and how many bytes.
    weights: [*const u8; P],
    share: usize,
}

impl<const P: usize> Set<'_, P> {
    /// Adds the products of T tiles, and asks for as many `activations` of each of T other ones.
    #[inline]
    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    fn add<const T: usize>(&self, sums: [&mut [Tile; T]; P], activations: [*const u8; T]) {
        match self.parts[0] {
            PanelData::F32(_) => {
                self.add_floats::<F32, T>(self.parts.map(|part| floats(Part::Stored(part))), sums, activations)
            }
            PanelData::Bf16(_) => {
                self.add_floats::<Bf16, T>(self.parts.map(|part| halves(Part::Stored(part))), sums, activations)
            }
            PanelData::F16(_) => {
                self.add_floats::<F16, T>(self.parts.map(|part| halves(Part::Stored(part))), sums, activations)
            }
            PanelData::Q8(_) => {
                self.add_ints::<false, 16, T>(self.parts.map(|part| bytes(Part::Stored(part))), sums, activations)
            }
            PanelData::Q4(_) => {
                self.add_ints::<true, 8, T>(self.parts.map(|part| bytes(Part::Stored(part))), sums, activations)
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    fn add_floats<C: Column, const T: usize>(
        &self,
        panels: [&[[C::Bits; PANEL]]; P],
        sums: [&mut [Tile; T]; P],
        activations: [*const u8; T],
    ) {
        let x: [&[[f32; Input::TILE]]; T] =
            std::array::from_fn(|t| self.x.x.float_part(self.first + t, &self.x.range).x.as_chunks().0);
        let columns = x[0].len();
        assert!(x.iter().all(|x| x.len() == columns), "tiles of a set have the same columns");
        assert!(panels.iter().all(|panel| panel.len() == columns), "panels have the {columns} columns of activations");
        let rounds = columns / STEP;
        let stride = self.share.div_ceil(rounds.max(1));
        let mut acc = [[[_mm512_setzero_ps(); Input::TILE]; T]; P];
        for round in 0..rounds {
            let x = x.map(|x| &x.as_chunks::<STEP>().0[round]);
            let panels = panels.map(|panel| &panel.as_chunks::<STEP>().0[round]);
            for weights in self.weights {
                prefetch::<_MM_HINT_T1>(weights.wrapping_add(round * stride));
            }
            for activations in activations {
                for line in (0..size_of_val(x[0])).step_by(LINE) {
                    prefetch::<_MM_HINT_T0>(activations.wrapping_add(round * size_of_val(x[0]) + line));
                }
            }
            for k in 0..STEP {
                step::<C, P, T>(panels.map(|panel| &panel[k]), x.map(|x| &x[k]), &mut acc);
            }
        }
        for k in rounds * STEP..columns {
            step::<C, P, T>(panels.map(|panel| &panel[k]), x.map(|x| &x[k]), &mut acc);
        }
        for (acc, sums) in acc.iter().zip(sums) {
            for (acc, sums) in acc.as_flattened().iter().zip(sums.as_flattened_mut()) {
                store16(sums, _mm512_add_ps(load16(sums), *acc));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    fn add_ints<const Q4: bool, const WORDS: usize, const T: usize>(
        &self,
        panels: [&[u8]; P],
        mut sums: [&mut [Tile; T]; P],
        activations: [*const u8; T],
    ) {
        let x: [IntTile<'_>; T] = std::array::from_fn(|t| self.x.x.int_part(self.first + t, &self.x.range));
        let words = x.map(|x| x.words.as_chunks::<{ Input::TILE }>().0.as_chunks::<WORDS>().0);
        let scales = x.map(|x| x.scales.as_chunks::<{ Input::TILE }>().0);
        let half_totals = x.map(|x| x.half_totals.as_chunks::<{ Input::TILE }>().0);
        let (size, groups) = (if Q4 { Q4_BLOCK } else { Q8_BLOCK }, words[0].len());
        assert!(words.iter().all(|words| words.len() == groups), "tiles of a set have the same columns");
        assert!(
            panels.iter().all(|panel| panel.len() == groups * size),
            "panels have the {groups} groups of activations"
        );
        let stride = self.share.div_ceil((groups * WORDS / 2).max(1));
        for g in 0..groups {
            let words = words.map(|words| &words[g]);
            let blocks = panels.map(|panel| {
                let (head, weights) =
                    panel[g * size..][..size].split_first_chunk().expect("a block starts with its scales");
                (head, weights.as_chunks::<32>().0.first_chunk::<WORDS>().expect("a block has its words"))
            });
            let mut acc = [[[_mm512_setzero_si512(); Input::TILE]; T]; P];
            for i in 0..WORDS {
                if i % 2 == 0 {
                    for weights in self.weights {
                        prefetch::<_MM_HINT_T1>(weights.wrapping_add((g * WORDS + i) / 2 * stride));
                    }
                    for activations in activations {
                        let line = g * size_of_val(words[0]) + i * size_of::<[i32; Input::TILE]>();
                        prefetch::<_MM_HINT_T0>(activations.wrapping_add(line));
                    }
                }
                let w = blocks.map(|(_, weights)| widen_int::<Q4>(&weights[i]));
                for (t, words) in words.iter().enumerate() {
                    for (m, x) in words[i].iter().enumerate() {
                        let x = _mm512_set1_epi32(*x);
                        for (acc, w) in acc.iter_mut().zip(w) {
                            let acc = &mut acc[t][m];
                            *acc = if Q4 { _mm512_dpbusd_epi32(*acc, w, x) } else { _mm512_dpwssd_epi32(*acc, w, x) };
                        }
                    }
                }
            }
            for ((acc, (head, _)), sums) in acc.iter().zip(blocks).zip(&mut sums) {
                let (row_scales, zeros) = factors::<Q4>(head);
                for (t, acc) in acc.iter().enumerate() {
                    for (m, acc) in acc.iter().enumerate() {
                        let mut sum = _mm512_cvtepi32_ps(*acc);
                        if Q4 {
                            sum = _mm512_fnmadd_ps(zeros, _mm512_set1_ps(half_totals[t][g][m]), sum);
                        }
                        let both = _mm512_mul_ps(row_scales, _mm512_set1_ps(scales[t][g][m]));
                        let sums = &mut sums[t][m];
                        store16(sums, _mm512_fmadd_ps(sum, both, load16(sums)));
                    }
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn step<C: Column, const P: usize, const T: usize>(
    columns: [&[C::Bits; PANEL]; P],
    x: [&[f32; Input::TILE]; T],
    acc: &mut [[[__m512; Input::TILE]; T]; P],
) {
    let w = columns.map(|column| widen::<C>(column));
    for (t, x) in x.into_iter().enumerate() {
        for (m, x) in x.iter().enumerate() {
            let x = _mm512_set1_ps(*x);
            for (acc, w) in acc.iter_mut().zip(w) {
                acc[t][m] = _mm512_fmadd_ps(x, w, acc[t][m]);
            }
        }
    }
}

/// The scales of a block's rows, and of Q4 their half steps from code 0 on.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn factors<const Q4: bool>(head: &[u8; 32]) -> (__m512, __m512) {
    let head = load_bytes(head);
    if !Q4 {
        return (_mm512_cvtph_ps(head), _mm512_setzero_ps());
    }
    let scales = _mm256_and_si256(_mm256_srli_epi16::<1>(head), _mm256_set1_epi16(Q4_SCALE as i16));
    let zeros = _mm256_add_epi16(_mm256_and_si256(head, _mm256_set1_epi16(15)), _mm256_set1_epi16(8));
    (_mm512_cvtph_ps(scales), _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(zeros)))
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
    // SAFETY: an array of 16 weights is 64 readable bytes for F32 and 32 for Bf16 and F16, the types that implement
    // `Column`, and the places are 64; the loads ask for no alignment.
    unsafe {
        match C::WIDTH {
            Width::F32 => _mm512_loadu_ps(start.cast()),
            Width::Bf16 => {
                let places = _mm512_loadu_si512(PLACES.as_ptr().cast());
                let bits = _mm512_castsi256_si512(_mm256_loadu_si256(start.cast()));
                _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaa_aaaa, places, bits))
            }
            Width::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(start.cast())),
        }
    }
}

/// A packed word as int16 pairs (Q8) or unsigned bytes (Q4) of the 16 rows.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn widen_int<const Q4: bool>(word: &[u8; 32]) -> __m512i {
    let packed = load_bytes(word);
    if !Q4 {
        return _mm512_cvtepi8_epi16(packed);
    }
    // Rows 8..16 are the upper nibbles.
    let shifts = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi32(4));
    let nibbles = _mm512_srlv_epi32(_mm512_broadcast_i64x4(packed), shifts);
    _mm512_and_si512(nibbles, _mm512_set1_epi8(15))
}
