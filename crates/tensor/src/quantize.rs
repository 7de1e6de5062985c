//! Groups of 32 weights with one scale, chosen for the least squared error.
//!
//! For a group w and codes q the best scale is s = Σwq / Σq², and leaves Σw² − (Σwq)² / Σq². So several trial scales give
//! codes, the codes with the largest (Σwq)² / Σq² win, and their best scale, rounded to f16, gives the codes that are
//! kept. The largest weight alone, as in plain absmax, is among the trials, so the result is never worse.

use half::f16;

use crate::GROUP;

/// A quantized group: weight ≈ `scale` · `codes[k]`, codes in −127..=127.
#[derive(Clone, Copy, PartialEq, Default, Debug)]
pub struct GroupQ8 {
    /// Not negative.
    pub scale: f16,
    /// One per weight.
    pub codes: [i8; GROUP],
}

/// A quantized group: weight ≈ `scale` · (`codes[k]` − 8), codes in 0..=15.
#[derive(Clone, Copy, PartialEq, Default, Debug)]
pub struct GroupQ4 {
    /// Negative where the largest weight is positive: code 0 reaches further than code 15.
    pub scale: f16,
    /// One per weight.
    pub codes: [u8; GROUP],
}

/// Lanes that sums run in side by side, so that the compiler can use vector registers.
const LANES: usize = 8;

/// Trial steps for q8, as the code that the largest weight gets.
const TOPS_Q8: [f32; 6] = [127.0, 126.6, 126.2, 125.8, 127.4, 128.2];

/// Trial steps for q4, as the code that the largest weight gets; both signs are tried.
const TOPS_Q4: [f32; 9] = [8.0, 7.6, 7.2, 6.8, 6.4, 8.4, 8.8, 9.2, 9.6];

/// Quantizes a group to 8 bits; `None` if a weight is infinite or not a number.
pub fn quantize_group_q8(weights: &[f32; GROUP]) -> Option<GroupQ8> {
    let (scale, codes) = search::<-127, 127>(weights, &TOPS_Q8, false)?;
    Some(GroupQ8 {
        scale,
        codes: codes.map(|code| code as i8),
    })
}

/// Quantizes a group to 4 bits; `None` if a weight is infinite or not a number.
pub fn quantize_group_q4(weights: &[f32; GROUP]) -> Option<GroupQ4> {
    let (scale, codes) = search::<-8, 7>(weights, &TOPS_Q4, true)?;
    Some(GroupQ4 {
        scale,
        codes: codes.map(|code| (code + 8.0) as u8),
    })
}

/// The best scale among `tops`, and the codes (whole numbers in `MIN..=MAX`) for it.
fn search<const MIN: i32, const MAX: i32>(
    weights: &[f32; GROUP],
    tops: &[f32],
    both_signs: bool,
) -> Option<(f16, [f32; GROUP])> {
    let extreme = extreme(weights)?;
    if extreme == 0.0 {
        return Some((f16::ZERO, [0.0; GROUP]));
    }
    let mut best = (0.0, 0.0);
    for &top in tops {
        for sign in if both_signs {
            &[-1.0, 1.0][..]
        } else {
            &[1.0][..]
        } {
            let inverse = sign * top / extreme;
            let (product, square) = correlate::<MIN, MAX>(weights, inverse);
            if product * product > best.0 * square {
                best = (product * product / square, product / square);
            }
        }
    }
    let plain = if both_signs {
        extreme / MIN as f32
    } else {
        extreme / MAX as f32
    };
    let mut kept = (f16::ZERO, [0.0; GROUP], f32::INFINITY);
    let mut trial = best.1;
    for step in 0..3 {
        let scale = storable(if step == 0 { plain } else { trial });
        let (codes, error) = encode::<MIN, MAX>(weights, scale);
        if error < kept.2 {
            kept = (scale, codes, error);
        }
        if step > 0 {
            let (product, square) = correlate_codes(weights, &codes);
            if square > 0.0 {
                trial = product / square;
            }
        }
    }
    Some((kept.0, kept.1))
}

/// The weight of largest magnitude, with its sign; `None` if any is not finite.
fn extreme(weights: &[f32; GROUP]) -> Option<f32> {
    let (mut low, mut high, mut check) = ([0.0_f32; LANES], [0.0_f32; LANES], [0.0_f32; LANES]);
    for part in weights.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            low[lane] = low[lane].min(part[lane]);
            high[lane] = high[lane].max(part[lane]);
            // 0 for finite weights, and not a number for all others.
            check[lane] += part[lane] * 0.0;
        }
    }
    let low = low.into_iter().fold(0.0, f32::min);
    let high = high.into_iter().fold(0.0, f32::max);
    if check.into_iter().sum::<f32>() != 0.0 {
        return None;
    }
    Some(if high >= -low { high } else { low })
}

/// Nearest whole number in `MIN..=MAX`. Adding 1.5·2²³ leaves no room for a fraction, so the sum rounds to nearest even;
/// `f32::round_ties_even` would call a library function for each weight on CPUs without SSE4.1.
#[inline(always)]
fn nearest<const MIN: i32, const MAX: i32>(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value.max(MIN as f32).min(MAX as f32) + SHIFT) - SHIFT
}

/// (Σwq, Σq²) for the codes that `inverse` (1 / scale) gives.
fn correlate<const MIN: i32, const MAX: i32>(weights: &[f32; GROUP], inverse: f32) -> (f32, f32) {
    let (mut product, mut square) = ([0.0; LANES], [0.0; LANES]);
    for part in weights.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let code = nearest::<MIN, MAX>(part[lane] * inverse);
            product[lane] += part[lane] * code;
            square[lane] += code * code;
        }
    }
    (product.into_iter().sum(), square.into_iter().sum())
}

fn correlate_codes(weights: &[f32; GROUP], codes: &[f32; GROUP]) -> (f32, f32) {
    let (mut product, mut square) = ([0.0; LANES], [0.0; LANES]);
    for (part, code) in weights
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(codes.as_chunks::<LANES>().0)
    {
        for lane in 0..LANES {
            product[lane] += part[lane] * code[lane];
            square[lane] += code[lane] * code[lane];
        }
    }
    (product.into_iter().sum(), square.into_iter().sum())
}

/// The nearest scale that the format can store.
fn storable(scale: f32) -> f16 {
    f16::from_f32(scale.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// Codes for a stored scale, and their squared error.
fn encode<const MIN: i32, const MAX: i32>(
    weights: &[f32; GROUP],
    scale: f16,
) -> ([f32; GROUP], f32) {
    let scale = scale.to_f32();
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut codes = [0.0; GROUP];
    let mut error = [0.0; LANES];
    for (part, code) in weights
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(codes.as_chunks_mut::<LANES>().0)
    {
        for lane in 0..LANES {
            code[lane] = nearest::<MIN, MAX>(part[lane] * inverse);
            let rest = part[lane] - scale * code[lane];
            error[lane] += rest * rest;
        }
    }
    (codes, error.into_iter().sum())
}

/// Stored form of a q8 group: the scale, little endian, and the codes (llama.cpp's Q8_0).
pub(crate) fn store_q8(group: &GroupQ8, block: &mut [u8]) {
    block[..2].copy_from_slice(&group.scale.to_le_bytes());
    block[2..].copy_from_slice(bytemuck::cast_slice(&group.codes));
}

/// Stored form of a q4 group: the scale, little endian, and 16 bytes with the first half of the codes in the low nibbles and
/// the second half in the high ones (llama.cpp's Q4_0).
pub(crate) fn store_q4(group: &GroupQ4, block: &mut [u8]) {
    block[..2].copy_from_slice(&group.scale.to_le_bytes());
    let (low, high) = group.codes.split_at(GROUP / 2);
    for ((byte, low), high) in block[2..].iter_mut().zip(low).zip(high) {
        *byte = low | high << 4;
    }
}

/// Inverse of [`store_q8`].
pub(crate) fn load_q8(block: &[u8]) -> GroupQ8 {
    let mut codes = [0; GROUP];
    codes.copy_from_slice(bytemuck::cast_slice(&block[2..]));
    GroupQ8 {
        scale: f16::from_le_bytes([block[0], block[1]]),
        codes,
    }
}

/// Inverse of [`store_q4`].
pub(crate) fn load_q4(block: &[u8]) -> GroupQ4 {
    let mut codes = [0; GROUP];
    for (index, byte) in block[2..].iter().enumerate() {
        codes[index] = byte & 15;
        codes[index + GROUP / 2] = byte >> 4;
    }
    GroupQ4 {
        scale: f16::from_le_bytes([block[0], block[1]]),
        codes,
    }
}

/// Weights of a stored q8 group.
pub(crate) fn dequantize_q8(block: &[u8]) -> [f32; GROUP] {
    let group = load_q8(block);
    let scale = group.scale.to_f32();
    group.codes.map(|code| scale * f32::from(code))
}

/// Weights of a stored q4 group.
pub(crate) fn dequantize_q4(block: &[u8]) -> [f32; GROUP] {
    let group = load_q4(block);
    let scale = group.scale.to_f32();
    group.codes.map(|code| scale * (f32::from(code) - 8.0))
}
