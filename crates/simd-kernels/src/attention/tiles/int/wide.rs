//! The products of integers with AVX-512: one register holds the sixteen keys of a block, or the elements of a chunk.
//!
//! A panel of rows meets four blocks, or four chunks, at once: 24 sums, which share what is broadcast for a row. The sums are those of
//! AVX2.

use super::{BLOCK, KEY_TILE, LANES, LOG2_E, Pair, code_step, raise};
use crate::exp::pow2_512;
use crate::lanes::{self, load16, store16};
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
        add_products(blocks.map(|block| &block[i]), q, &mut sums);
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
        add_products(chunks.map(|chunk| &chunk[j]), &rows.map(|row| row[j]), &mut sums);
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

/// As [`super::soften`]: the even vectors of eight are the lower halves, the odd ones the upper halves.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn soften(
    scores: &mut [[f32; LANES]],
    scale: f32,
    value_scales: &[[f32; LANES]],
    weights: &mut [[Pair; LANES / 2]],
    max: &mut f32,
    sum: &mut f32,
) -> [f32; 2] {
    assert!(scores.len() == value_scales.len() && scores.len() == weights.len(), "a scale and a weight for each score");
    let (scores, value_scales) = (scores.as_flattened_mut(), value_scales.as_flattened());
    let floor = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut most = floor;
    for x in scores.chunks(BLOCK) {
        most = _mm512_max_ps(some(x, floor), most);
    }
    let factor = raise(lanes::max(_mm256_max_ps(low(most), high(most))) * scale, max, sum);

    let (scale, m) = (_mm512_set1_ps(scale * LOG2_E), _mm512_set1_ps(*max * LOG2_E));
    let [mut sums, mut totals, mut most] = [_mm512_setzero_ps(); 3];
    for (x, value_scale) in scores.chunks_mut(BLOCK).zip(value_scales.chunks(BLOCK)) {
        let score = some(x, floor);
        let p = pow2_512(_mm512_fmsub_ps(score, scale, m));
        let seen = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(score, floor);
        let scaled = _mm512_maskz_mul_ps(seen, p, some(value_scale, _mm512_setzero_ps()));
        put_some(x, scaled);
        sums = _mm512_add_ps(sums, p);
        totals = _mm512_add_ps(totals, scaled);
        most = _mm512_max_ps(most, scaled);
    }
    *sum += lanes::sum(_mm256_add_ps(low(sums), high(sums)));
    let totals = lanes::sum(_mm256_add_ps(low(totals), high(totals)));
    let (step, inverse) = code_step(lanes::max(_mm256_max_ps(low(most), high(most))), totals);
    let inverse = _mm512_set1_ps(inverse);
    for (x, out) in scores.chunks(BLOCK).zip(weights.chunks_mut(2)) {
        let codes = _mm512_cvtps_epi32(_mm512_mul_ps(some(x, floor), inverse));
        let codes = _mm512_cvtsepi32_epi16(codes);
        // SAFETY: two arrays are 32 writable bytes, one is 16.
        unsafe {
            match out {
                [_, _] => _mm256_storeu_si256(out.as_mut_ptr().cast(), codes),
                _ => _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_castsi256_si128(codes)),
            }
        }
    }
    [factor, step]
}

#[inline]
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn add_products<const R: usize, const N: usize>(x: [&[Pair; BLOCK]; N], y: &[Pair; R], sums: &mut [[__m512i; R]; N]) {
    // SAFETY: each array is 64 readable bytes.
    let x = x.map(|x| unsafe { _mm512_loadu_si512(x.as_ptr().cast()) });
    for (r, y) in y.iter().enumerate() {
        let y = _mm512_set1_epi32(*y);
        for (sums, x) in sums.iter_mut().zip(x) {
            sums[r] = _mm512_dpwssd_epi32(sums[r], x, y);
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

/// Sixteen floats, or eight with the upper half of `rest`.
#[inline]
#[target_feature(enable = "avx512f")]
fn some(x: &[f32], rest: __m512) -> __m512 {
    match x.first_chunk() {
        Some(x) => load16(x),
        None => {
            let half = lanes::load(x.first_chunk().expect("vectors of eight"));
            _mm512_castpd_ps(_mm512_insertf64x4::<0>(_mm512_castps_pd(rest), _mm256_castps_pd(half)))
        }
    }
}

/// Into sixteen floats, or eight.
#[inline]
#[target_feature(enable = "avx512f")]
fn put_some(x: &mut [f32], v: __m512) {
    if let Some(x) = x.first_chunk_mut() {
        store16(x, v);
    } else {
        lanes::store(x.first_chunk_mut().expect("vectors of eight"), low(v));
    }
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
