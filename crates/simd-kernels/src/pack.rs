//! Packing one tile of activations, with quantization to int16 or int8 per group of 32.

use crate::isa::Isa;
use crate::panels::GROUP;

/// Interleaves `m` rows: `out[m k + i] = rows[i cols + k]`, where `rows` is `[m, cols]`.
pub(crate) fn pack_float(_isa: Isa, rows: &[f32], cols: usize, out: &mut [f32]) {
    let m = rows.len() / cols;
    if m == 1 {
        out.copy_from_slice(rows);
        return;
    }
    for (i, row) in rows.chunks_exact(cols).enumerate() {
        for (out, &x) in out[i..].iter_mut().step_by(m).zip(row) {
            *out = x;
        }
    }
}

/// Quantizes to int16 per group and interleaves column pairs; see `Input` for the order.
pub(crate) fn pack_int16(_isa: Isa, rows: &[f32], cols: usize, words: &mut [i32], scales: &mut [f32]) {
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

/// Quantizes to int8 per group, interleaves column quads and notes the zero-point sums; see `Input` for the order.
pub(crate) fn pack_int8(
    _isa: Isa,
    rows: &[f32],
    cols: usize,
    words: &mut [i32],
    scales: &mut [f32],
    offsets: &mut [i32],
) {
    let m = rows.len() / cols;
    for (i, row) in rows.chunks_exact(cols).enumerate() {
        for (g, group) in row.chunks(GROUP).enumerate() {
            let (q, scale) = quantize(group, 127.0);
            scales[g * m + i] = scale;
            let mut sums = [0; 2];
            for (j, quad) in q.as_chunks::<4>().0.iter().enumerate() {
                words[m * (g * GROUP / 4 + j) + i] = i32::from_le_bytes(quad.map(|q| q as u8));
                sums = [sums[0] + quad[0] + quad[1], sums[1] + quad[2] + quad[3]];
            }
            offsets[g * m + i] = join_pair(sums.map(|sum| -8 * sum));
        }
    }
}

/// Two int16 as one word, the first in the low half.
fn join_pair([low, high]: [i16; 2]) -> i32 {
    i32::from(high) << 16 | i32::from(low as u16)
}

/// The two int16 of a word, the low half first.
pub(crate) fn split_pair(word: i32) -> [i16; 2] {
    [word as i16, (word >> 16) as i16]
}

/// Up to 32 numbers as integers of at most `limit`, filled up with zeros, and their scale.
fn quantize(group: &[f32], limit: f32) -> ([i16; GROUP], f32) {
    let (scale, inverse) = scale_for(group, limit);
    let mut q = [0; GROUP];
    for (q, x) in q.iter_mut().zip(group) {
        *q = (x * inverse).round_ties_even() as i16;
    }
    (q, scale)
}

/// The scale of a group whose largest magnitude becomes `limit`, and its inverse.
///
/// A group of nothing but numbers too small to invert becomes zero. A group with an infinity or NaN gets that as
/// its scale and zeros as its integers, so that every sum it enters is NaN rather than a plausible number.
fn scale_for(group: &[f32], limit: f32) -> (f32, f32) {
    // Compared as integers, magnitudes order as the floats do, and NaN is the largest.
    let bits = group.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    let largest = f32::from_bits(bits);
    if largest < limit * f32::MIN_POSITIVE {
        (0.0, 0.0)
    } else if largest.is_finite() {
        (largest / limit, limit / largest)
    } else {
        (f32::NAN, 0.0)
    }
}
