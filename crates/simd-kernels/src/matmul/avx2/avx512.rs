//! Whole tiles of many tokens with float weights and AVX-512, whose registers hold the 16 rows of a panel.
//!
//! ```text
//! for each two tiles of six tokens:
//!     for each column:
//!         w0, w1 = its weights in two panels, of 16 rows each
//!         for each token of the two: sum[token] += x[token] * w0, x[token] * w1
//! ```
//!
//! 1. Two panels and two tiles make 24 sums of the 32 registers. One panel with four tiles has as many, but broadcasts an
//!    activation for each multiply-add instead of one for two: on an Emerald Rapids 0.7 times as fast with bf16.
//! 2. The terms of a sum come in the order of AVX2, and the sums are the same to the last bit.
//! 3. bf16 becomes f32 by one shuffle, which also brings its rows in order, and takes a port of the multiply-adds on some processors:
//!    where there are tiles enough, bf16 and f16 come widened (`wide`). On a Zen 4 1.05 times as fast with 516 tokens.

use std::arch::x86_64::*;

use super::float::{Bf16, Column, F16, F32, Width};
use super::wide::{Part, floats, halves};
use super::{Ahead, Columns, Tile};
use crate::input::Input;
use crate::lanes::{LINE, load16, prefetch, store16};
use crate::panels::{PANEL, PanelData};

/// Panels that meet a set of tiles together.
pub(super) const PANELS: usize = 2;

/// Tiles of a set.
const TILES: usize = 2;

/// Columns of floats that go together.
const STEP: usize = 4;

/// Adds the products of panel parts with whole tiles from `first` on to the `sums` of each, and prefetches the share of the
/// weights `ahead` that each tile has, and the activations of the tiles after it.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn add_tiles<const P: usize>(
    parts: [Part<'_>; P],
    x: &Columns<'_>,
    first: usize,
    mut sums: [&mut [Tile]; P],
    ahead: Ahead<P>,
) {
    let weights = Weights::of(parts);
    let tiles = sums[0].len();
    for done in (0..tiles).step_by(TILES) {
        let next = (done + TILES).min(tiles);
        // The last set is followed by the first one, with other weights.
        let after = if next < tiles { next } else { 0 };
        let start = |i: usize| x.x.start(first + (after + i).min(tiles - 1), &x.range);
        let set = Set { weights, x, first: first + done, done, ahead };
        if next - done == TILES {
            set.add::<TILES>(some(&mut sums, done), [start(0), start(1)]);
        } else {
            set.add::<1>(some(&mut sums, done), [start(0)]);
        }
    }
}

/// The parts of P panels.
///
/// These and the tiles are made by functions without target features. In one that has them, a closure that is passed on to `map` or
/// `from_fn` has them too, which those have not, so that they may be called.
#[derive(Clone, Copy)]
enum Weights<'a, const P: usize> {
    F32([&'a [[f32; PANEL]]; P]),
    Bf16([&'a [[u16; PANEL]]; P]),
    F16([&'a [[u16; PANEL]]; P]),
}

impl<'a, const P: usize> Weights<'a, P> {
    fn of(parts: [Part<'a>; P]) -> Self {
        match parts[0] {
            Part::Stored(PanelData::Bf16(_)) => Weights::Bf16(parts.map(halves)),
            Part::Stored(PanelData::F16(_)) => Weights::F16(parts.map(halves)),
            _ => Weights::F32(parts.map(floats)),
        }
    }
}

/// Some tiles that meet parts of panels.
struct Set<'a, const P: usize> {
    weights: Weights<'a, P>,
    x: &'a Columns<'a>,
    first: usize,
    /// Tiles before the first one.
    done: usize,
    ahead: Ahead<P>,
}

impl<const P: usize> Set<'_, P> {
    /// Adds the products of T tiles, and asks for as many `activations` of each of T other ones.
    #[inline]
    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    fn add<const T: usize>(&self, sums: [&mut [Tile; T]; P], activations: [*const u8; T]) {
        match self.weights {
            Weights::F32(panels) => self.add_floats::<F32, T>(panels, sums, activations),
            Weights::Bf16(panels) => self.add_floats::<Bf16, T>(panels, sums, activations),
            Weights::F16(panels) => self.add_floats::<F16, T>(panels, sums, activations),
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
        let x: [_; T] = float_tiles(self.x, self.first);
        let columns = x[0].len();
        assert!(x.iter().all(|x| x.len() == columns), "tiles of a set have the same columns");
        assert!(panels.iter().all(|panel| panel.len() == columns), "panels have the {columns} columns of activations");
        let rounds = columns / STEP;
        let stride = (T * self.ahead.share).div_ceil(rounds.max(1));
        let mut acc = [[[_mm512_setzero_ps(); Input::TILE]; T]; P];
        for round in 0..rounds {
            self.prefetch_weights(round * stride);
            let bytes = STEP * size_of::<[f32; Input::TILE]>();
            for activations in activations {
                for line in (0..bytes).step_by(LINE) {
                    prefetch::<_MM_HINT_T0>(activations.wrapping_add(round * bytes + line));
                }
            }
            for column in STEP * round..STEP * (round + 1) {
                step::<C, P, T>(&panels, &x, column, &mut acc);
            }
        }
        for column in STEP * rounds..columns {
            step::<C, P, T>(&panels, &x, column, &mut acc);
        }
        for (acc, sums) in acc.iter().zip(sums) {
            for (acc, sums) in acc.as_flattened().iter().zip(sums.as_flattened_mut()) {
                store16(sums, _mm512_add_ps(load16(sums), *acc));
            }
        }
    }

    /// Asks for the line at `byte` of the weights that are this set's to ask for.
    #[inline]
    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    fn prefetch_weights(&self, byte: usize) {
        for weights in self.ahead.weights {
            prefetch::<_MM_HINT_T1>(weights.wrapping_add(self.done * self.ahead.share + byte));
        }
    }
}

#[inline]
fn float_tiles<'a, const T: usize>(x: &Columns<'a>, first: usize) -> [&'a [[f32; Input::TILE]]; T] {
    std::array::from_fn(|t| x.x.float_part(first + t, &x.range).x.as_chunks().0)
}

/// The sums of T tiles from tile `done` on.
fn some<'a, const P: usize, const T: usize>(sums: &'a mut [&mut [Tile]; P], done: usize) -> [&'a mut [Tile; T]; P] {
    sums.each_mut().map(|sums| sums[done..].first_chunk_mut().expect("as many tiles as the set has"))
}

#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn step<C: Column, const P: usize, const T: usize>(
    panels: &[&[[C::Bits; PANEL]]; P],
    x: &[&[[f32; Input::TILE]]; T],
    column: usize,
    acc: &mut [[[__m512; Input::TILE]; T]; P],
) {
    let mut w = [_mm512_setzero_ps(); P];
    for (w, panel) in w.iter_mut().zip(panels) {
        *w = widen::<C>(&panel[column]);
    }
    for (t, x) in x.iter().enumerate() {
        for (m, x) in x[column].iter().enumerate() {
            let x = _mm512_set1_ps(*x);
            for (acc, w) in acc.iter_mut().zip(w) {
                acc[t][m] = _mm512_fmadd_ps(x, w, acc[t][m]);
            }
        }
    }
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
    // `Column`, and the places are 64; the loads ask for no alignment. The instruction touches the
    // named registers only, and of `bits` moves the sixteen that were loaded.
    unsafe {
        match C::WIDTH {
            Width::F32 => _mm512_loadu_ps(start.cast()),
            Width::Bf16 => {
                let places = _mm512_loadu_si512(PLACES.as_ptr().cast());
                let bits = _mm512_castsi256_si512(_mm256_loadu_si256(start.cast()));
                let x: __m512;
                // The compiler makes two instructions of the intrinsic, and the second one takes a port of the multiply-adds.
                std::arch::asm!("vpermw {}{{{}}}{{z}}, {}, {}", out(zmm_reg) x, in(kreg) 0xaaaa_aaaa_u32, in(zmm_reg) places,
                    in(zmm_reg) bits, options(pure, nomem, nostack, preserves_flags));
                x
            }
            Width::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(start.cast())),
        }
    }
}
