//! The products of integers with AVX-512: one register holds the sixteen keys of a block, or the elements of a chunk.
//!
//! A panel of rows meets four blocks, or four chunks, at once: 24 sums, which share what is broadcast for a row. The sums are those of
//! AVX2.

use super::{BLOCK, KEY_TILE, LANES, LOG2_E, Pair, code_step, raise};
use crate::exp::pow2_512;
use crate::lanes::{self, load16, store16};
use std::arch::asm;
use std::arch::x86_64::*;

/// Blocks of keys, or chunks of elements, that meet a panel together.
pub(super) const TOGETHER: usize = 4;
const _: () = assert!((KEY_TILE / BLOCK).is_multiple_of(TOGETHER));

/// out[r * stride + 16 n + j] = scales[n][j] Σ q[i][r] · keys[n][i][j], for R rows and the sixteen keys of each of four blocks.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn scores<const R: usize>(
    keys: &[[Pair; BLOCK]],
    scales: &[[f32; BLOCK]],
    q: &[Pair],
    out: &mut [f32],
    stride: usize,
) {
    let q = q.as_chunks::<R>().0;
    assert!(keys.len() == TOGETHER * q.len(), "{} pairs of keys for {} of queries", keys.len(), q.len());
    let blocks = runs::<_, TOGETHER>(keys, q.len(), q.len());
    let mut sums = [[_mm512_setzero_si512(); R]; TOGETHER];
    for (i, q) in q.iter().enumerate() {
        add_products(blocks.map(|block| &block[i]), |r| q[r], &mut sums);
    }
    for ((n, sums), scales) in sums.iter().enumerate().zip(scales) {
        for (r, sum) in sums.iter().enumerate() {
            let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(*sum), load16(scales));
            store16(block(&mut out[r * stride + n * BLOCK..]), scaled);
        }
    }
}

/// acc[r * acc_stride + 16 n + i] = acc[r * acc_stride + 16 n + i] f + t Σ weights[r * 64 + j] · values[n * 64 + j][i] for j
/// in 0..pairs, where f and t are `factors[r]`, for R rows and the sixteen elements of each of C chunks. (64 is KEY_TILE / 2.)
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn blend<const R: usize, const C: usize>(
    values: &[[Pair; BLOCK]],
    pairs: usize,
    weights: &[Pair],
    factors: &[[f32; 2]],
    acc: &mut [f32],
    acc_stride: usize,
) {
    let chunks = runs::<_, C>(values, KEY_TILE / 2, pairs);
    let rows = runs::<_, R>(weights, KEY_TILE / 2, pairs);
    let mut sums = [[_mm512_setzero_si512(); R]; C];
    for j in 0..pairs {
        add_products(chunks.map(|chunk| &chunk[j]), |r| rows[r][j], &mut sums);
    }
    for (r, [before, step]) in factors.iter().enumerate().take(R) {
        let (before, step) = (_mm512_set1_ps(*before), _mm512_set1_ps(*step));
        for (n, sums) in sums.iter().enumerate() {
            let acc = block(&mut acc[r * acc_stride + n * BLOCK..]);
            let old = _mm512_mul_ps(load16(acc), before);
            store16(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), step, old));
        }
    }
}

/// As [`super::soften`], of N vectors of sixteen, all in registers: the even vectors of eight are the lower halves, the odd ones the upper
/// halves.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn soften<const N: usize>(
    scores: &[[f32; LANES]],
    scale: f32,
    value_scales: &[[f32; LANES]],
    weights: &mut [[Pair; LANES / 2]],
    [max, sum]: [&mut f32; 2],
) -> [f32; 2] {
    let scores = sixteens::<N>(scores).each_ref().map(|x| load16(x));
    let value_scales = sixteens::<N>(value_scales);
    let floor = _mm512_set1_ps(f32::NEG_INFINITY);
    let most = scores.into_iter().fold(floor, |most, x| _mm512_max_ps(x, most));
    let factor = raise(lanes::max(_mm256_max_ps(low(most), high(most))) * scale, max, sum);

    let (scale, m) = (_mm512_set1_ps(scale * LOG2_E), _mm512_set1_ps(*max * LOG2_E));
    let [mut sums, mut totals, mut most] = [_mm512_setzero_ps(); 3];
    let mut scaled = scores;
    for (x, value_scale) in scaled.iter_mut().zip(value_scales) {
        let p = pow2_512(_mm512_fmsub_ps(*x, scale, m));
        *x = _mm512_maskz_mul_ps(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(*x, floor), p, load16(value_scale));
        sums = _mm512_add_ps(sums, p);
        totals = _mm512_add_ps(totals, *x);
        most = _mm512_max_ps(most, *x);
    }
    *sum += lanes::sum(_mm256_add_ps(low(sums), high(sums)));
    let totals = lanes::sum(_mm256_add_ps(low(totals), high(totals)));
    let (step, inverse) = code_step(lanes::max(_mm256_max_ps(low(most), high(most))), totals);
    let inverse = _mm512_set1_ps(inverse);
    let weights: &mut [[_; 2]; N] = weights.as_chunks_mut().0.try_into().expect("N vectors of sixteen weights");
    for (x, out) in scaled.into_iter().zip(weights) {
        let codes = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
        // SAFETY: two arrays are 32 writable bytes.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), codes) };
    }
    [factor, step]
}

/// sums[n][r] += dot(x[n], y(r)) of the two int16 in each lane.
///
/// By its name, not as `_mm512_dpwssd_epi32`: of 4 of 24 of those in [`blend`] the compiler made `vpmaddwd` and `vpaddd`.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_products<const R: usize, const N: usize>(
    x: [&[Pair; BLOCK]; N],
    y: impl Fn(usize) -> Pair,
    sums: &mut [[__m512i; R]; N],
) {
    // SAFETY: each array is 64 readable bytes.
    let x = x.map(|x| unsafe { _mm512_loadu_si512(x.as_ptr().cast()) });
    for r in 0..R {
        let y = _mm512_set1_epi32(y(r));
        for (sums, x) in sums.iter_mut().zip(x) {
            // SAFETY: the target features of this function have the instruction, which touches the named registers only.
            unsafe {
                asm!("vpdpwssd {}, {}, {}", inout(zmm_reg) sums[r], in(zmm_reg) x, in(zmm_reg) y,
                    options(pure, nomem, nostack, preserves_flags));
            }
        }
    }
}

/// N runs of `len`, each `step` after the one before. Without target features: where there are some, `from_fn` may call its closure.
#[inline]
fn runs<T, const N: usize>(x: &[T], step: usize, len: usize) -> [&[T]; N] {
    std::array::from_fn(|n| &x[n * step..][..len])
}

fn block(x: &mut [f32]) -> &mut [f32; BLOCK] {
    x.first_chunk_mut().expect("a block of sixteen")
}

/// N vectors of sixteen, of as many pairs of eight.
#[inline]
fn sixteens<const N: usize>(x: &[[f32; LANES]]) -> &[[f32; BLOCK]; N] {
    x.as_flattened().as_chunks().0.try_into().expect("N vectors of sixteen")
}

#[inline]
#[target_feature(enable = "avx512f")]
fn low(v: __m512) -> __m256 {
    _mm512_castps512_ps256(v)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn high(v: __m512) -> __m256 {
    _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)))
}
