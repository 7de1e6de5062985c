//! Packing one tile of activations, with quantization to int16 or int8 per group of 32.

use crate::half_float::f32_to_bf16;
use crate::isa::{Isa, dispatch};
use crate::panels::GROUP;

/// How much codes without a sign, which meet int8, are above weights: sums of products start as
/// many times the total of the int8 below zero.
pub(crate) const EXCESS: f32 = 128.0;

/// Interleaves `m` rows: `out[m k + i] = rows[i cols + k]`, where `rows` is `[m, cols]`.
pub(crate) fn pack_float(isa: Isa, rows: &[f32], cols: usize, out: &mut [f32]) {
    dispatch!(isa, avx2::pack_float, scalar::pack_float, (rows, cols, out))
}

/// Rounds `rows [m, cols]` to bf16 and interleaves pairs of columns, as the bits of floats; see
/// `Input` for the order. Pairs beyond the columns are zero.
pub(crate) fn pack_bf16(isa: Isa, rows: &[f32], cols: usize, out: &mut [f32]) {
    let (m, width) = (rows.len() / cols, cols.div_ceil(GROUP) * GROUP / 2);
    let mut pairs = vec![0.0; m * width];
    for (row, pairs) in rows.chunks_exact(cols).zip(pairs.chunks_exact_mut(width)) {
        let (twos, last) = row.as_chunks::<2>();
        for (pair, out) in twos.iter().zip(&mut *pairs) {
            *out = pair_of_bf16(*pair);
        }
        if let [last] = last {
            pairs[twos.len()] = pair_of_bf16([*last, 0.0]);
        }
    }
    pack_float(isa, &pairs, width, out);
}

/// Two numbers in bf16 as the bits of a float, the first one in the low half.
#[inline]
fn pair_of_bf16([low, high]: [f32; 2]) -> f32 {
    f32::from_bits(u32::from(f32_to_bf16(low)) | u32::from(f32_to_bf16(high)) << 16)
}

/// Quantizes `rows [m, cols]` to int16 per group and interleaves column pairs; see `Input` for the
/// order.
pub(crate) fn pack_int16(
    isa: Isa,
    rows: &[f32],
    cols: usize,
    words: &mut [i32],
    scales: &mut [f32],
) {
    dispatch!(isa, avx2::pack_int16, scalar::pack_int16, (rows, cols, words, scales))
}

/// Quantizes `rows [m, cols]` to int8 per group, interleaves column quads and notes where the
/// groups' sums of products start; see `Input` and `IntTile` for the order.
pub(crate) fn pack_int8(
    isa: Isa,
    rows: &[f32],
    cols: usize,
    words: &mut [i32],
    scales: &mut [f32],
    starts: &mut [f32],
) {
    dispatch!(isa, avx2::pack_int8, scalar::pack_int8, (rows, cols, words, scales, starts))
}

/// The two int16 of a word, the low half first.
pub(crate) fn split_pair(word: i32) -> [i16; 2] {
    [word as i16, (word >> 16) as i16]
}

/// Two int16 as one word, the first in the low half.
fn join_pair([low, high]: [i16; 2]) -> i32 {
    i32::from(high) << 16 | i32::from(low as u16)
}

/// The scale of a group whose largest magnitude becomes `limit`, and its inverse.
///
/// A group of nothing but numbers too small to invert becomes zero. A group with an infinity or NaN
/// gets NaN as its scale, so that every sum it enters is NaN rather than a plausible number.
fn scale_for(largest: f32, limit: f32) -> (f32, f32) {
    if largest < limit * f32::MIN_POSITIVE {
        (0.0, 0.0)
    } else if largest.is_finite() {
        (largest / limit, limit / largest)
    } else {
        (f32::NAN, 0.0)
    }
}

mod scalar {
    use super::{EXCESS, GROUP, join_pair, scale_for};

    pub(super) fn pack_float(rows: &[f32], cols: usize, out: &mut [f32]) {
        interleave(rows, cols, 0, out);
    }

    /// The columns from `first` on.
    pub(super) fn interleave(rows: &[f32], cols: usize, first: usize, out: &mut [f32]) {
        let m = rows.len() / cols;
        for (i, row) in rows.chunks_exact(cols).enumerate() {
            for (out, &x) in out.iter_mut().skip(m * first + i).step_by(m).zip(&row[first..]) {
                *out = x;
            }
        }
    }

    pub(super) fn pack_int16(rows: &[f32], cols: usize, words: &mut [i32], scales: &mut [f32]) {
        let m = rows.len() / cols;
        for (i, row) in rows.chunks_exact(cols).enumerate() {
            for (g, group) in row.chunks(GROUP).enumerate() {
                let (q, scale) = quantize(group, 32767.0);
                scales[g * m + i] = scale;
                for (j, pair) in q.as_chunks::<2>().0.iter().enumerate() {
                    words[m * (g * GROUP / 2 + j) + i] = join_pair(*pair);
                }
            }
        }
    }

    pub(super) fn pack_int8(
        rows: &[f32],
        cols: usize,
        words: &mut [i32],
        scales: &mut [f32],
        starts: &mut [f32],
    ) {
        let m = rows.len() / cols;
        for (i, row) in rows.chunks_exact(cols).enumerate() {
            for (g, group) in row.chunks(GROUP).enumerate() {
                let (q, scale) = quantize(group, 127.0);
                scales[g * m + i] = scale;
                for (j, quad) in q.as_chunks::<4>().0.iter().enumerate() {
                    words[m * (g * GROUP / 4 + j) + i] = i32::from_le_bytes(quad.map(|q| q as u8));
                }
                starts[g * m + i] = -EXCESS * f32::from(q.iter().sum::<i16>());
            }
        }
    }

    /// Up to 32 numbers as integers of at most `limit`, filled up with zeros, and their scale.
    fn quantize(group: &[f32], limit: f32) -> ([i16; GROUP], f32) {
        // Compared as integers, magnitudes order as the floats do, and NaN is the largest.
        let largest = group.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        let (scale, inverse) = scale_for(f32::from_bits(largest), limit);
        let mut q = [0; GROUP];
        for (q, x) in q.iter_mut().zip(group) {
            *q = (x * inverse).round_ties_even() as i16;
        }
        (q, scale)
    }
}

/// The same integers and scales, to the bit, for finite activations.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{EXCESS, GROUP, scale_for};
    use crate::lanes::{load, magnitude, max_magnitude, store};

    /// Six rows eight columns at a time, else as the reference.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn pack_float(rows: &[f32], cols: usize, out: &mut [f32]) {
        let mut done = 0;
        if rows.len() == 6 * cols {
            let row = |i: usize| rows[i * cols..(i + 1) * cols].as_chunks::<8>().0;
            let blocks = out.as_chunks_mut::<48>().0.iter_mut();
            let (first, last) =
                (row(0).iter().zip(row(1)).zip(row(2)), row(3).iter().zip(row(4)).zip(row(5)));
            for (out, (((a, b), c), ((d, e), f))) in blocks.zip(first.zip(last)) {
                let interleaved = interleave([a, b, c, d, e, f].map(|x| load(x)));
                for (out, v) in out.as_chunks_mut().0.iter_mut().zip(interleaved) {
                    store(out, v);
                }
                done += 8;
            }
        }
        super::scalar::interleave(rows, cols, done, out);
    }

    /// 48 numbers, number `6 k + i` is `rows[i][k]`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn interleave(rows: [__m256; 6]) -> [__m256; 6] {
        let [a, b, c, d, e, f] = rows;
        // In the comments a digit is a column of the lower half; the upper half has the one four
        // columns later.
        let (ab01, ab23) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); // a0 b0 a1 b1, a2 b2 a3 b3
        let (cd01, cd23) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        let (ef01, ef23) = (_mm256_unpacklo_ps(e, f), _mm256_unpackhi_ps(e, f));
        let mut quarters = [_mm256_setzero_ps(); 6];
        for (quarters, (ab, cd, ef)) in
            quarters.as_chunks_mut().0.iter_mut().zip([(ab01, cd01, ef01), (ab23, cd23, ef23)])
        {
            let odd = _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd); // a1 b1 c1 d1
            *quarters = [
                _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd),  // a0 b0 c0 d0
                _mm256_shuffle_ps::<0b01_00_01_00>(ef, odd), // e0 f0 a1 b1
                _mm256_shuffle_ps::<0b11_10_11_10>(odd, ef), // c1 d1 e1 f1
            ];
        }
        let [q0, q1, q2, q3, q4, q5] = quarters;
        [
            _mm256_permute2f128_ps::<0x20>(q0, q1),
            _mm256_permute2f128_ps::<0x20>(q2, q3),
            _mm256_permute2f128_ps::<0x20>(q4, q5),
            _mm256_permute2f128_ps::<0x31>(q0, q1),
            _mm256_permute2f128_ps::<0x31>(q2, q3),
            _mm256_permute2f128_ps::<0x31>(q4, q5),
        ]
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn pack_int16(rows: &[f32], cols: usize, words: &mut [i32], scales: &mut [f32]) {
        let m = rows.len() / cols;
        let groups = words.chunks_exact_mut(m * GROUP / 2).zip(scales.chunks_exact_mut(m));
        for (g, (words, scales)) in groups.enumerate() {
            let mut pairs = [[_mm256_setzero_si256(); 2]; 6];
            for (i, pairs) in pairs[..m].iter_mut().enumerate() {
                let q;
                (q, scales[i]) = quantize(group(&rows[i * cols..(i + 1) * cols], g), 32767.0);
                // Packing works within halves of a register; the permutation puts the quarters back
                // in order.
                *pairs = [
                    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(q[0], q[1])),
                    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(q[2], q[3])),
                ];
            }
            store_words(&pairs[..m], words);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn pack_int8(
        rows: &[f32],
        cols: usize,
        words: &mut [i32],
        scales: &mut [f32],
        starts: &mut [f32],
    ) {
        let m = rows.len() / cols;
        let scales = scales.chunks_exact_mut(m).zip(starts.chunks_exact_mut(m));
        for (g, (words, (scales, starts))) in
            words.chunks_exact_mut(m * GROUP / 4).zip(scales).enumerate()
        {
            let mut quads = [[_mm256_setzero_si256(); 1]; 6];
            for (i, quads) in quads[..m].iter_mut().enumerate() {
                let q;
                (q, scales[i]) = quantize(group(&rows[i * cols..(i + 1) * cols], g), 127.0);
                let bytes = _mm256_packs_epi16(
                    _mm256_packs_epi32(q[0], q[1]),
                    _mm256_packs_epi32(q[2], q[3]),
                );
                *quads =
                    [_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))];
                starts[i] = -EXCESS * total(quads[0]);
            }
            store_words(&quads[..m], words);
        }
    }

    /// Group `g` of a row; the last one may be short.
    #[inline]
    fn group(row: &[f32], g: usize) -> &[f32] {
        &row[g * GROUP..row.len().min((g + 1) * GROUP)]
    }

    /// Interleaves the words of up to six tokens: `out[m k + i]` is word `k` of token `i`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn store_words<const N: usize>(tokens: &[[__m256i; N]], out: &mut [i32]) {
        if let [a, b, c, d, e, f] = tokens {
            for (n, out) in out.as_chunks_mut::<48>().0.iter_mut().enumerate() {
                let interleaved =
                    interleave([a, b, c, d, e, f].map(|words| _mm256_castsi256_ps(words[n])));
                for (out, v) in out.as_chunks_mut().0.iter_mut().zip(interleaved) {
                    *out = lanes(_mm256_castps_si256(v));
                }
            }
        } else {
            for (i, words) in tokens.iter().enumerate() {
                let words = words.map(|words| lanes(words));
                for (out, word) in
                    out.iter_mut().skip(i).step_by(tokens.len()).zip(words.as_flattened())
                {
                    *out = *word;
                }
            }
        }
    }

    /// The sum of 32 int8.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn total(bytes: __m256i) -> f32 {
        let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
        let quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        let four =
            _mm_add_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256::<1>(quads));
        let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
        _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two))) as f32
    }

    /// Up to 32 numbers as integers of at most `limit`, filled up with zeros, and their scale.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn quantize(group: &[f32], limit: f32) -> ([__m256i; 4], f32) {
        let mut whole = [0.0; GROUP];
        let x = group.first_chunk().unwrap_or_else(|| {
            whole[..group.len()].copy_from_slice(group);
            &whole
        });
        let [x0, x1, x2, x3] = x.as_chunks::<8>().0 else { unreachable!("32 is four times 8") };
        let x = [load(x0), load(x1), load(x2), load(x3)];
        let largest = _mm256_max_epi32(
            _mm256_max_epi32(magnitude(x[0]), magnitude(x[1])),
            _mm256_max_epi32(magnitude(x[2]), magnitude(x[3])),
        );
        let (scale, inverse) = scale_for(max_magnitude(largest), limit);
        let inverse = _mm256_set1_ps(inverse);
        (x.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse))), scale)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn lanes(v: __m256i) -> [i32; 8] {
        let mut lanes = [0; 8];
        // SAFETY: the array is 32 writable bytes, and the unaligned store asks for nothing else.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), v) }
        lanes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, noise};
    use crate::isa::witness::assert_entered;

    /// One packed tile: words, the bits of the scales, starts.
    fn packed(isa: Isa, x: &[f32], cols: usize, int8: bool) -> (Vec<i32>, Vec<u32>, Vec<f32>) {
        let groups = x.len() / cols * cols.div_ceil(GROUP);
        let (mut scales, mut starts) = (vec![f32::NAN; groups], vec![0.5; groups]);
        let mut words = vec![7; groups * if int8 { 8 } else { 16 }];
        if int8 {
            pack_int8(isa, x, cols, &mut words, &mut scales, &mut starts);
        } else {
            pack_int16(isa, x, cols, &mut words, &mut scales);
        }
        (words, scales.into_iter().map(f32::to_bits).collect(), starts)
    }

    #[test]
    fn both_implementations_agree_to_the_bit() {
        let Some(avx2) = Isa::avx2() else { return };
        for cols in 1..=130 {
            for m in 1..=6 {
                // Sizes from subnormal to huge, and groups of zeros.
                for scale in
                    [1.0, 3.0e-3, 0.0, f32::MIN_POSITIVE * 100.0, f32::MIN_POSITIVE * 1.0e5, 1.0e38]
                {
                    let values = noise(m * cols, cols as u64).into_iter().map(|x| x * scale);
                    let x = Guarded::of(values, cols % 4);
                    for int8 in [false, true] {
                        let (fast, plain) =
                            (packed(avx2, &x, cols, int8), packed(Isa::scalar(), &x, cols, int8));
                        assert_eq!(fast, plain, "[{m}, {cols}] times {scale:e}, int8: {int8}");
                    }
                }
            }
        }
        assert_entered("avx2::pack_int16");
        assert_entered("avx2::pack_int8");
    }

    #[test]
    fn integers_are_the_nearest_and_starts_fit_their_sums() {
        for isa in Isa::all() {
            let (cols, m) = (70, 3);
            let x = noise(m * cols, 2);
            for int8 in [false, true] {
                let (words, scales, starts) = packed(isa, &x, cols, int8);
                for (i, row) in x.chunks(cols).enumerate() {
                    for (g, group) in row.chunks(GROUP).enumerate() {
                        let scale = f32::from_bits(scales[g * m + i]);
                        let mut total = 0_i32;
                        for k in 0..GROUP {
                            let q = if int8 {
                                words[m * (g * 8 + k / 4) + i].to_le_bytes()[k % 4] as i8 as i16
                            } else {
                                split_pair(words[m * (g * 16 + k / 2) + i])[k % 2]
                            };
                            let x = group.get(k).copied().unwrap_or(0.0);
                            let error = (f32::from(q) * scale - x).abs();
                            // Scale, inverse, product and the check itself round once each.
                            let allowed = 0.5 * scale + 4.0 * f32::EPSILON * x.abs();
                            assert!(
                                error <= allowed,
                                "column {k} of group {g}, row {i}: {x} became {q}"
                            );
                            total += i32::from(q);
                        }
                        if int8 {
                            assert_eq!(starts[g * m + i], -EXCESS * total as f32);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn floats_are_interleaved() {
        for isa in Isa::all() {
            for cols in 1..=130 {
                for m in 1..=6 {
                    let rows = Guarded::of(noise(m * cols, 1), cols % 4);
                    let mut out = Guarded::output(m * cols, m % 4);
                    pack_float(isa, &rows, cols, &mut out);
                    for (j, x) in out.iter().enumerate() {
                        assert_eq!(*x, rows[j % m * cols + j / m], "[{m}, {cols}] at {j}");
                    }
                }
            }
        }
        assert_entered("avx2::pack_float");
    }
}
