//! Queries, keys and values rounded to int16, in the order in which the kernels read them.

use super::Pair;
use crate::attention::tiles::kernels::{get, put};
use crate::kv::BLOCK;
use crate::lanes::{self, LANES, load, load_tail, magnitude, max_magnitude};
use std::arch::x86_64::*;

/// Largest norms of q̂ and k̂; the product of the two, with half a unit more in each of up to 500,000 elements, is below 2³¹.
const QUERY_NORM: f32 = 65_000.0;
const KEY_NORM: f32 = 32_500.0;
/// Largest element of a v̂.
pub(super) const VALUE: f32 = 8_191.0;

/// Rows of queries [rows][head_dim] times `scale` as [⌈head_dim / 2⌉][rows] pairs and a scale for each.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize_queries(q: &[f32], head_dim: usize, scale: f32, out: &mut [Pair], scales: &mut [f32]) {
    let rows = scales.len();
    for (r, (q, a)) in q.chunks_exact(head_dim).zip(scales).enumerate() {
        let (eights, tail) = q.as_chunks::<LANES>();
        let tail = load_tail(tail);
        let (mut most, mut squares) = (magnitude(tail), _mm256_mul_ps(tail, tail));
        for x in eights {
            most = _mm256_max_epi32(most, magnitude(load(x)));
            squares = _mm256_fmadd_ps(load(x), load(x), squares);
        }
        let (most, norm) = (max_magnitude(most), lanes::sum(squares).sqrt());
        let at_least = |least: f32, x: f32| if x < least { least } else { x };
        let step = at_least(most / f32::from(i16::MAX), norm / QUERY_NORM);
        // Codes of a row that is not finite mean nothing, and their sums may wrap: its step is NaN, as is then all that it gathers.
        let step = if most.is_finite() { step } else { f32::NAN };
        // Of tiny queries any step is right but 0, by which the −∞ of unseen keys must not be multiplied.
        let step = at_least(f32::MIN_POSITIVE, step);
        *a = at_least(f32::MIN_POSITIVE, step * scale.abs());
        let inverse = _mm256_set1_ps(scale.signum() / step);
        let mut out = out[r..].iter_mut().step_by(rows);
        for x in eights.iter().map(|x| load(x)).chain([tail]) {
            let mut pairs = [0; LANES / 2];
            put_codes(&mut pairs, _mm256_mul_ps(x, inverse));
            for (out, pair) in out.by_ref().take(LANES / 2).zip(pairs) {
                *out = pair;
            }
        }
    }
}

/// One block of keys [head_dim][16] as [⌈head_dim / 2⌉][16] pairs and a scale for each key.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize_keys(keys: &[[f32; BLOCK]], out: &mut [[Pair; BLOCK]], scales: &mut [f32; BLOCK]) {
    let mut squares = [_mm256_setzero_ps(); 4];
    for (i, key) in keys.iter().enumerate() {
        let [low, high] = get(key);
        let at = 2 * (i % 2);
        squares[at] = _mm256_fmadd_ps(low, low, squares[at]);
        squares[at + 1] = _mm256_fmadd_ps(high, high, squares[at + 1]);
    }
    let norm = |half: usize| _mm256_sqrt_ps(_mm256_add_ps(squares[half], squares[half + 2]));
    let steps = [0, 1].map(|half| _mm256_mul_ps(norm(half), _mm256_set1_ps(1.0 / KEY_NORM)));
    let inverse = steps.map(|step| inverse(step));
    put(scales, steps);
    for (out, pair) in out.iter_mut().zip(keys.chunks(2)) {
        let first = get(&pair[0]);
        let second = if let [_, second] = pair { get(second) } else { [_mm256_setzero_ps(); 2] };
        for (half, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            put_pair(out, _mm256_mul_ps(first[half], inverse[half]), _mm256_mul_ps(second[half], inverse[half]));
        }
    }
}

/// One block of values [chunks][16 keys][16] as pairs of keys, chunk c in `out[c * room..][..8]`, and a scale for each key.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize_values(
    values: &[[f32; BLOCK]],
    out: &mut [[Pair; BLOCK]],
    room: usize,
    scales: &mut [f32; BLOCK],
) {
    for (key, scale) in scales.iter_mut().enumerate() {
        let mut most = _mm256_setzero_si256();
        for value in values[key..].iter().step_by(BLOCK) {
            for half in get(value) {
                most = _mm256_max_epi32(most, magnitude(half));
            }
        }
        *scale = max_magnitude(most) / VALUE;
    }
    let [low, high] = get(scales).map(|step| inverse(step));
    let mut inverses = [0.0; BLOCK];
    put(&mut inverses, [low, high]);
    for (values, out) in values.chunks_exact(BLOCK).zip(out.chunks_mut(room)) {
        for ((values, inverse), out) in values.as_chunks::<2>().0.iter().zip(inverses.as_chunks::<2>().0).zip(out) {
            let (first, second) = (get(&values[0]), get(&values[1]));
            let inverse = inverse.map(|x| _mm256_set1_ps(x));
            for (half, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                put_pair(out, _mm256_mul_ps(first[half], inverse[0]), _mm256_mul_ps(second[half], inverse[1]));
            }
        }
    }
}

/// 1 / step, and 0 for steps of 0.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn inverse(step: __m256) -> __m256 {
    let zero = _mm256_cmp_ps::<_CMP_EQ_OQ>(step, _mm256_setzero_ps());
    _mm256_andnot_ps(zero, _mm256_div_ps(_mm256_set1_ps(1.0), step))
}

/// Eight rounded numbers, cut to int16, as pairs of neighbours.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn put_codes(out: &mut [Pair; LANES / 2], x: __m256) {
    let codes = _mm256_cvtps_epi32(x);
    let codes = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
    // SAFETY: the array is 16 writable bytes.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), codes) };
}

/// Eight pairs of rounded numbers, each of which fits in int16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put_pair(out: &mut [Pair; LANES], low: __m256, high: __m256) {
    let high = _mm256_slli_epi32::<16>(_mm256_cvtps_epi32(high));
    let pair = _mm256_blend_epi16::<0b1010_1010>(_mm256_cvtps_epi32(low), high);
    // SAFETY: the array is 32 writable bytes.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), pair) }
}
