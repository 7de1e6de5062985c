//! Whole tiles of many tokens with float weights and AVX-512, whose registers hold the 16 rows of a
//! panel.
//!
//! ```text
//! for each half of the columns of a part:
//!     for each tile of six tokens:
//!         for each column of the half:
//!             w0..w3 = its weights in four panels, of 16 rows each
//!             for each token of the tile: sum[token] += x[token] * w0..w3
//! ```
//!
//! 1. Four panels and a tile make 24 sums of the 32 registers, with ten loads a column. Two panels
//!    and two tiles make as many with fourteen, and meet all activations twice as often. With 512
//!    tokens of bf16 an Emerald Rapids was 1.03 times as fast with four panels, and 1.2 times where
//!    something else ran on the core, which leaves half of its front end and caches.
//! 2. Widened weights of four panels fit into the L1 cache for half as many columns as AVX2 has in
//!    a part. The terms of a sum come in the order of AVX2, and the sums are the same to the last
//!    bit: those of the first half are kept and go on in the second.
//! 3. bf16 becomes f32 by one shuffle, which also brings its rows in order, and takes a port of the
//!    multiply-adds on some processors: where there are tiles enough, bf16 and f16 come widened
//!    (`wide`). With 66 tokens 1.18 times as fast on an Emerald Rapids, with 516 1.05 times on a
//!    Zen 4.

use std::arch::x86_64::*;

use super::float::{Bf16, Column, F16, F32, Width};
use super::wide::{Part, floats, halves};
use super::{Ahead, Columns, FLOATS, Tile};
use crate::input::Input;
use crate::lanes::{LINE, load16, prefetch, store16};
use crate::panels::{PANEL, PanelData};

/// Panels that meet a tile together.
pub(super) const PANELS: usize = 4;

/// Columns that stay in the L1 cache together.
pub(super) const HALF: usize = FLOATS / 2;

/// Columns of floats that go together.
const STEP: usize = 8;

/// What the sums of some columns of a part start from, and where they go.
pub(super) struct Sums<'a, const P: usize> {
    /// Sums of a part that are not complete.
    pub kept: [&'a mut [Tile]; P],
    /// Whether they start from those kept.
    pub goes_on: bool,
    pub totals: [&'a mut [Tile]; P],
    /// Whether the part ends with these columns and its sums are added to the totals; else they are
    /// kept.
    pub ends: bool,
}

/// Adds the products of panel parts with whole tiles from `first` on to the `sums` of each, and
/// prefetches the share of the weights `ahead` that each tile has, and the activations of the tile
/// after it.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn add_tiles<const P: usize>(
    parts: [Part<'_>; P],
    x: &Columns<'_>,
    first: usize,
    sums: Sums<'_, P>,
    ahead: Ahead<P>,
) {
    let Sums { mut kept, goes_on, mut totals, ends } = sums;
    let weights = Weights::of(parts);
    let tiles = totals[0].len();
    for tile in 0..tiles {
        let activations = if tile + 1 < tiles {
            x.x.start(first + tile + 1, &x.range)
        } else {
            ahead.activations
        };
        let next = ahead.weights.map(|weights| weights.wrapping_add(tile * ahead.share));
        let ahead = Ahead { weights: next, share: ahead.share, activations };
        let kept = kept.each_mut().map(|kept| &mut kept[tile]);
        let mut acc = [[_mm512_setzero_ps(); Input::TILE]; P];
        if goes_on {
            for (acc, kept) in acc.iter_mut().zip(&kept) {
                for (acc, kept) in acc.iter_mut().zip(kept.iter()) {
                    *acc = load16(kept);
                }
            }
        }
        let x = x.x.float_part(first + tile, &x.range).x.as_chunks().0;
        match weights {
            Weights::F32(panels) => add_columns::<F32, P>(panels, x, &mut acc, ahead),
            Weights::Bf16(panels) => add_columns::<Bf16, P>(panels, x, &mut acc, ahead),
            Weights::F16(panels) => add_columns::<F16, P>(panels, x, &mut acc, ahead),
        }
        for ((acc, kept), totals) in acc.iter().zip(kept).zip(&mut totals) {
            for ((acc, kept), total) in acc.iter().zip(kept).zip(&mut totals[tile]) {
                if ends {
                    store16(total, _mm512_add_ps(load16(total), *acc));
                } else {
                    store16(kept, *acc);
                }
            }
        }
    }
}

/// The parts of P panels.
///
/// These, and the columns of a round, are made by functions without target features. In one that
/// has them, a closure that is passed on to `map` has them too, which that has not, so that it may
/// be called: once a tile that does not matter.
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

/// `acc[p][m] += Σ_k panels[p][k] x[k][m]`.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_columns<C: Column, const P: usize>(
    panels: [&[[C::Bits; PANEL]]; P],
    x: &[[f32; Input::TILE]],
    acc: &mut [[__m512; Input::TILE]; P],
    ahead: Ahead<P>,
) {
    assert!(
        panels.iter().all(|panel| panel.len() == x.len()),
        "panels have the {} columns of activations",
        x.len()
    );
    let (rounds, rest) = x.as_chunks::<STEP>();
    let stride = ahead.stride(rounds.len());
    for (round, x) in rounds.iter().enumerate() {
        for line in (round * stride..(round + 1) * stride).step_by(LINE) {
            for weights in ahead.weights {
                prefetch::<_MM_HINT_T1>(weights.wrapping_add(line));
            }
        }
        for line in (0..size_of_val(x)).step_by(LINE) {
            prefetch::<_MM_HINT_T0>(ahead.activations.wrapping_add(round * size_of_val(x) + line));
        }
        let columns = columns_of(panels, round);
        for (k, x) in x.iter().enumerate() {
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

/// The columns of a round.
#[inline]
fn columns_of<B, const P: usize>(
    panels: [&[[B; PANEL]]; P],
    round: usize,
) -> [&[[B; PANEL]; STEP]; P] {
    panels.map(|panel| &panel.as_chunks().0[round])
}

/// `acc[p][m] += x[m] * w[p]`.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn step<const P: usize>(
    w: [__m512; P],
    x: &[f32; Input::TILE],
    acc: &mut [[__m512; Input::TILE]; P],
) {
    for (m, x) in x.iter().enumerate() {
        let x = _mm512_set1_ps(*x);
        for (acc, w) in acc.iter_mut().zip(w) {
            acc[m] = _mm512_fmadd_ps(x, w, acc[m]);
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
                std::arch::asm!("vpermw {}{{{}}}{{z}}, {}, {}", out(zmm_reg) x, in(kreg) 0xaaaa_aaaa_u32, in(zmm_reg) places,
                    in(zmm_reg) bits, options(pure, nomem, nostack, preserves_flags));
                x
            }
            Width::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(start.cast())),
        }
    }
}
