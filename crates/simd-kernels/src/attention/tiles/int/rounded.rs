//! Queries, keys and values rounded to int16, in the order in which the kernels read them, and rows
//! turned into lanes.

use super::Pair;
use crate::attention::tiles::kernels::{get, put};
use crate::kv::{BLOCK, Plain};
use crate::lanes::{self, LANES, load, load_tail, magnitude, max_magnitude};
use std::arch::x86_64::*;

/// Largest norms of q̂ and k̂; the product of the two, with half a unit more in each of up to
/// 500,000 elements, is below 2³¹.
const QUERY_NORM: f32 = 65_000.0;
const KEY_NORM: f32 = 32_500.0;
/// Largest element of a v̂.
pub(super) const VALUE: f32 = 8_191.0;

/// Rows of queries [rows][head_dim] times `scale` as [rows][⌈head_dim / 2⌉] pairs and a scale for
/// each.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize_queries(
    q: &[f32],
    head_dim: usize,
    scale: f32,
    out: &mut [Pair],
    scales: &mut [f32],
) {
    let out = out.chunks_exact_mut(head_dim.div_ceil(2));
    for ((q, out), a) in q.chunks_exact(head_dim).zip(out).zip(scales) {
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
        // Codes of a row that is not finite mean nothing, and their sums may wrap: its step is NaN,
        // as is then all that it gathers.
        let step = if most.is_finite() { step } else { f32::NAN };
        // Of tiny queries any step is right but 0, by which the −∞ of unseen keys must not be
        // multiplied.
        let step = at_least(f32::MIN_POSITIVE, step);
        *a = at_least(f32::MIN_POSITIVE, step * scale.abs());
        let inverse = _mm256_set1_ps(scale.signum() / step);
        for (x, out) in eights.iter().map(|x| load(x)).chain([tail]).zip(out.chunks_mut(LANES / 2))
        {
            let codes = codes(_mm256_mul_ps(x, inverse));
            out.copy_from_slice(&codes[..out.len()]);
        }
    }
}

/// out[c * out_stride + r] = x[r * stride + c] for rows × cols numbers.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn transpose<T: Plain>(
    x: &[T],
    stride: usize,
    out: &mut [T],
    out_stride: usize,
    [rows, cols]: [usize; 2],
) {
    const { assert!(size_of::<T>() == 4, "numbers of a lane") };
    if rows == 0 || cols == 0 {
        return;
    }
    let (last, last_out) = ((rows - 1) * stride + cols, (cols - 1) * out_stride + rows);
    assert!(
        last <= x.len() && last_out <= out.len(),
        "{rows} x {cols} numbers of {} into {}",
        x.len(),
        out.len()
    );
    let whole = [rows, cols].map(|n| n / LANES * LANES);
    for r in (0..whole[0]).step_by(LANES) {
        for c in (0..whole[1]).step_by(LANES) {
            let row = |i: usize| x[(r + i) * stride + c..][..LANES].as_ptr();
            // SAFETY: eight numbers of four bytes are 32 readable bytes.
            let x = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| unsafe { _mm256_loadu_ps(row(i).cast()) });
            for (i, x) in transpose_8x8(x).into_iter().enumerate() {
                let out = &mut out[(c + i) * out_stride + r..][..LANES];
                // SAFETY: eight numbers of four bytes are 32 writable bytes.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr().cast(), x) };
            }
        }
    }
    for r in 0..rows {
        for c in if r < whole[0] { whole[1]..cols } else { 0..cols } {
            out[c * out_stride + r] = x[r * stride + c];
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose_8x8(x: [__m256; 8]) -> [__m256; 8] {
    // Pairs of rows, then fours, then all eight.
    let two = |i: usize| [_mm256_unpacklo_ps(x[i], x[i + 1]), _mm256_unpackhi_ps(x[i], x[i + 1])];
    let four = |i: usize| {
        let ([a, b], [c, d]) = (two(i), two(i + 2));
        let low = |a, c| _mm256_shuffle_ps::<0b01_00_01_00>(a, c);
        let high = |a, c| _mm256_shuffle_ps::<0b11_10_11_10>(a, c);
        [low(a, c), high(a, c), low(b, d), high(b, d)]
    };
    let (top, bottom) = (four(0), four(4));
    let low = [0, 1, 2, 3].map(|i| _mm256_permute2f128_ps::<0x20>(top[i], bottom[i]));
    let high = [0, 1, 2, 3].map(|i| _mm256_permute2f128_ps::<0x31>(top[i], bottom[i]));
    [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]]
}

/// One block of keys [head_dim][16] as [⌈head_dim / 2⌉][16] pairs and a scale for each key.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize_keys(
    keys: &[[f32; BLOCK]],
    out: &mut [[Pair; BLOCK]],
    scales: &mut [f32; BLOCK],
) {
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
            put_pair(
                out,
                _mm256_mul_ps(first[half], inverse[half]),
                _mm256_mul_ps(second[half], inverse[half]),
            );
        }
    }
}

/// One block of values [chunks][16 keys][16] as pairs of keys, chunk c in `out[c * room..][..8]`,
/// and a scale for each key.
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
        for ((values, inverse), out) in
            values.as_chunks::<2>().0.iter().zip(inverses.as_chunks::<2>().0).zip(out)
        {
            let (first, second) = (get(&values[0]), get(&values[1]));
            let inverse = inverse.map(|x| _mm256_set1_ps(x));
            for (half, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                put_pair(
                    out,
                    _mm256_mul_ps(first[half], inverse[0]),
                    _mm256_mul_ps(second[half], inverse[1]),
                );
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
fn codes(x: __m256) -> [Pair; LANES / 2] {
    let codes = _mm256_cvtps_epi32(x);
    let codes =
        _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
    let mut pairs = [0; LANES / 2];
    // SAFETY: the array is 16 writable bytes.
    unsafe { _mm_storeu_si128(pairs.as_mut_ptr().cast(), codes) };
    pairs
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn rows_become_columns() {
        if Isa::avx2().is_none() {
            return eprintln!("not tested: this CPU has no AVX2");
        }
        for [rows, cols] in [[0, 3], [3, 0], [1, 1], [7, 9], [8, 8], [16, 24], [17, 31], [40, 10]] {
            let (stride, out_stride) = (cols + 3, rows + 5);
            let x: Vec<i32> = (0..(rows * stride) as i32).collect();
            let mut out = vec![-1; cols * out_stride];
            // SAFETY: the CPU has what the function needs, `Isa::avx2` has found it.
            unsafe { transpose(&x, stride, &mut out, out_stride, [rows, cols]) };
            for (i, &found) in out.iter().enumerate() {
                let (c, r) = (i / out_stride, i % out_stride);
                let expected = if r < rows { (r * stride + c) as i32 } else { -1 };
                assert_eq!(found, expected, "{rows} x {cols}: row {r}, column {c}");
            }
        }
    }
}
