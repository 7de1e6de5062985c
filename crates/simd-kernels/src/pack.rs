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
pub(crate) fn pack_int16(
    _isa: Isa,
    rows: &[f32],
    cols: usize,
    out: &mut [i16],
    scales: &mut [f32],
) {
    let m = rows.len() / cols;
    for (i, row) in rows.chunks_exact(cols).enumerate() {
        for (g, group) in row.chunks(GROUP).enumerate() {
            let (scale, inverse) = scale_for(group, 32767.0);
            scales[g * m + i] = scale;
            let out = &mut out[g * m * GROUP..(g + 1) * m * GROUP];
            for k in 0..GROUP {
                let q = group
                    .get(k)
                    .map_or(0.0, |x| (x * inverse).round_ties_even());
                out[2 * (m * (k / 2) + i) + k % 2] = q as i16;
            }
        }
    }
}

/// Quantizes to int8 per group, interleaves column quads and notes the zero-point sums; see `Input` for the order.
pub(crate) fn pack_int8(
    _isa: Isa,
    rows: &[f32],
    cols: usize,
    out: &mut [i8],
    scales: &mut [f32],
    zeros: &mut [[i16; 2]],
) {
    let m = rows.len() / cols;
    for (i, row) in rows.chunks_exact(cols).enumerate() {
        for (g, group) in row.chunks(GROUP).enumerate() {
            let (scale, inverse) = scale_for(group, 127.0);
            scales[g * m + i] = scale;
            let out = &mut out[g * m * GROUP..(g + 1) * m * GROUP];
            let mut sums = [0_i16; 2];
            for k in 0..GROUP {
                let q = group
                    .get(k)
                    .map_or(0.0, |x| (x * inverse).round_ties_even()) as i8;
                out[4 * (m * (k / 4) + i) + k % 4] = q;
                sums[k % 4 / 2] += i16::from(q);
            }
            zeros[g * m + i] = sums.map(|sum| -8 * sum);
        }
    }
}

/// The scale of a group whose largest magnitude becomes `limit`, and its inverse.
///
/// A group of nothing but numbers too small to invert becomes zero. A group with an infinity or NaN gets that as
/// its scale and zeros as its integers, so that every sum it enters is NaN rather than a plausible number.
fn scale_for(group: &[f32], limit: f32) -> (f32, f32) {
    // Compared as integers, magnitudes order as the floats do, and NaN is the largest.
    let bits = group
        .iter()
        .map(|x| x.to_bits() & 0x7fff_ffff)
        .max()
        .unwrap_or(0);
    let largest = f32::from_bits(bits);
    if largest < limit * f32::MIN_POSITIVE {
        (0.0, 0.0)
    } else if largest.is_finite() {
        (largest / limit, limit / largest)
    } else {
        (f32::NAN, 0.0)
    }
}
