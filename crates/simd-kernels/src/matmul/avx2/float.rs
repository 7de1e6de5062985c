//! The tile of float products: up to 6 tokens times the 16 rows of a panel, in registers.
//!
//! ```text
//! for each column k of the panel:
//!     w0, w1 = the 16 weights of column k, widened to f32
//!     for each token m of the tile:
//!         acc[m][0] += x[k][m] * w0
//!         acc[m][1] += x[k][m] * w1
//! ```
//!
//! 1. Six tokens make twelve accumulators; with two registers of weights and one broadcast that is
//!    15 of 16. Twelve also cover the latency of two FMA units (4 cycles each), so the loop runs at
//!    their full rate.
//! 2. The order of additions is part of the contract: the accumulators start at zero, take the
//!    columns of a part one after the other, and are then added to the sums. It is the same for any
//!    number of tokens, and in AVX-512. With few tokens several panels hide the latency.
//! 3. Packing has put a tile's activations in the order of use, one stream next to the stream of
//!    weights.
//! 4. Bf16, and f16 where tiles are few (`wide`), are widened in registers each time a tile passes.
//!    That takes two instructions next to twelve multiply-adds, on other ports; widening once into
//!    a buffer was slower, because it needs stores, and because f32 fills the L1 cache twice as
//!    fast. For bf16 the two are shuffles: shifts share the ports of multiply-adds on Intel's
//!    cores.
//! 5. What comes next from a slower cache or from memory is prefetched: weights, and the
//!    activations of the next tile. The processor's own prefetchers stop at each 4 KiB page, and at
//!    the end of each tile's part of the columns, and need a few misses to start again.

use std::arch::x86_64::*;

use super::{Ahead, prefetch_weights};
use crate::lanes::{LINE, load, prefetch, store};
use crate::matmul::formats::{Column, Width};
use crate::panels::PANEL;

/// Columns of a round.
const STEP: usize = 4;

/// `acc[p][m] += Σ_k panels[p][k] x[k][m]`, where a panel is `[k, 16]` and `x` is `[k, M]`. Also
/// prefetches what is `ahead`: as many bytes as the panels have (`STREAM`), or a share of weights
/// and as many activations as `x` has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_products<C: Column, const P: usize, const M: usize, const STREAM: bool>(
    panels: [&[[C::Bits; PANEL]]; P],
    x: &[f32],
    acc: &mut [[[f32; PANEL]; M]; P],
    mut ahead: Ahead<P>,
) {
    let x = x.as_chunks::<M>().0;
    for columns in panels {
        assert!(
            columns.len() == x.len(),
            "{} columns of weights, {} of activations",
            columns.len(),
            x.len()
        );
    }
    let mut sums = [[[_mm256_setzero_ps(); 2]; M]; P];
    let (rounds, last_x) = x.as_chunks::<STEP>();
    let stride = ahead.stride(rounds.len());
    for (round, x) in rounds.iter().enumerate() {
        if !STREAM {
            prefetch::<_MM_HINT_T1>(ahead.weights[0].wrapping_add(round * stride));
            for line in (0..size_of_val(x)).step_by(LINE) {
                prefetch::<_MM_HINT_T0>(
                    ahead.activations.wrapping_add(round * size_of_val(x) + line),
                );
            }
        }
        for ((columns, sums), weights) in panels.iter().zip(&mut sums).zip(&mut ahead.weights) {
            let columns = &columns.as_chunks::<STEP>().0[round];
            for (k, (column, x)) in columns.iter().zip(x).enumerate() {
                // Spread over the columns: from memory, two in a row cost 3 % of the bandwidth.
                if STREAM && (k * size_of_val(column)).is_multiple_of(LINE) {
                    prefetch_weights(weights.wrapping_add(k * size_of_val(column)));
                }
                step::<C, M>(column, x, sums);
            }
            if STREAM {
                *weights = weights.wrapping_add(size_of_val(columns));
            }
        }
    }
    for (columns, sums) in panels.into_iter().zip(&mut sums) {
        for (column, x) in columns[rounds.len() * STEP..].iter().zip(last_x) {
            step::<C, M>(column, x, sums);
        }
    }
    for (sums, acc) in sums.iter().zip(acc) {
        for (sums, acc) in sums.iter().zip(acc) {
            for (sum, acc) in sums.iter().zip(acc.as_chunks_mut().0) {
                store(acc, _mm256_add_ps(load(acc), *sum));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn step<C: Column, const M: usize>(
    column: &[C::Bits; PANEL],
    x: &[f32; M],
    sums: &mut [[__m256; 2]; M],
) {
    let (w0, w1) = widen::<C>(column);
    for (x, sums) in x.iter().zip(sums) {
        let x = _mm256_set1_ps(*x);
        sums[0] = _mm256_fmadd_ps(x, w0, sums[0]);
        sums[1] = _mm256_fmadd_ps(x, w1, sums[1]);
    }
}

/// Rows 0..8 and rows 8..16 of a column.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen<C: Column>(column: &[C::Bits; PANEL]) -> (__m256, __m256) {
    let start = column.as_ptr();
    // SAFETY: an array of 16 weights is 64 readable bytes for F32 and 32 for Bf16 and F16, the
    // types that implement `Column`; the loads ask for no alignment.
    unsafe {
        match C::WIDTH {
            Width::F32 => {
                (_mm256_loadu_ps(start.cast()), _mm256_loadu_ps(start.cast::<f32>().add(8)))
            }
            Width::Bf16 => {
                let both = _mm256_loadu_si256(start.cast());
                let zero = _mm256_setzero_si256();
                let halves = [_mm256_unpacklo_epi16(zero, both), _mm256_unpackhi_epi16(zero, both)];
                (_mm256_castsi256_ps(halves[0]), _mm256_castsi256_ps(halves[1]))
            }
            Width::F16 => (
                _mm256_cvtph_ps(_mm_loadu_si128(start.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(start.cast::<u16>().add(8).cast())),
            ),
            Width::Pairs => unreachable!("these dot products are AVX-512's"),
        }
    }
}
