//! Groups of 32 weights with one scale, chosen for the least squared error.
//!
//! For a group w and codes q the best scale is s = Σwq / Σq², and leaves Σw² − (Σwq)² / Σq². So several trial scales give
//! codes, the codes with the largest (Σwq)² / Σq² win, and their best scale, rounded to the f16 that is stored, gives the
//! codes that are kept, unless one more round of the same does better.

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

/// Trials for q8, as the code that the weight of largest magnitude would get. Below 127 all weights keep within the range.
/// Against plain absmax (127 alone) these four lower the RMS error by 8 % (normally distributed weights); 300 trials from 110
/// to 140 would by 13 %, which is a thousandth of the error that q4 has.
const TRIALS_Q8: [f32; 4] = [127.0, 126.4, 125.8, 125.2];

/// Trials for q4. The largest weight gets the code −8 or thereabouts, the range's longer side, or one around 7 with the
/// other sign; trials beyond the range clip it in favour of the rest. The RMS error is 6 % below that of −8 alone, and within
/// 0.2 % of what 800 trials find.
const TRIALS_Q4: [f32; 8] = [-8.0, -7.6, -8.4, -9.0, -9.7, 7.0, 7.5, 8.1];

/// Quantizes a group to 8 bits; `None` if a weight is not finite, or beyond 127 times the largest f16.
pub fn quantize_group_q8(weights: &[f32; GROUP]) -> Option<GroupQ8> {
    let (scale, codes) = search::<-127, 127>(weights, &TRIALS_Q8)?;
    Some(GroupQ8 { scale, codes: codes.map(|code| code as i8) })
}

/// Quantizes a group to 4 bits; `None` if a weight is not finite, or beyond 7 times the largest f16.
pub fn quantize_group_q4(weights: &[f32; GROUP]) -> Option<GroupQ4> {
    let (scale, codes) = search::<-8, 7>(weights, &TRIALS_Q4)?;
    Some(GroupQ4 { scale, codes: codes.map(|code| (code + 8) as u8) })
}

/// The best scale among the trials, and the codes (in `MIN..=MAX`) for it.
#[inline(always)]
fn search<const MIN: i32, const MAX: i32>(weights: &[f32; GROUP], trials: &[f32]) -> Option<(f16, [i32; GROUP])> {
    let extreme = extreme(weights)?;
    if extreme.abs() > MAX as f32 * f16::MAX.to_f32_const() {
        return None;
    }
    // Half of the smallest f16 is 2⁻²⁵: groups below that times the range have scale 0, and 1 / extreme could overflow.
    if extreme.abs() < 1e-12 {
        return Some((f16::ZERO, [0; GROUP]));
    }
    // A symmetric range has no longer side, and a positive scale says the same as a negative one.
    let inverse = 1.0 / if MIN == -MAX { extreme.abs() } else { extreme };
    // (Σwq)² / Σq² and Σwq / Σq² of the best trial.
    let mut best = (0.0, 0.0);
    for &trial in trials {
        let (product, square) = correlate::<MIN, MAX>(weights, trial * inverse);
        // The largest weight has a code other than 0, so Σq² is at least 1.
        let fit = product / square;
        if product * fit > best.0 {
            best = (product * fit, fit);
        }
    }
    let first = Encoded::new::<MIN, MAX>(weights, best.1);
    let second = Encoded::new::<MIN, MAX>(weights, first.fit);
    let kept = if second.error < first.error { second } else { first };
    Some((kept.scale, kept.codes))
}

/// The weight of largest magnitude, with its sign; `None` if any is not finite.
#[inline(always)]
fn extreme(weights: &[f32; GROUP]) -> Option<f32> {
    let mut check = [0.0; LANES];
    for part in weights.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            // 0 for finite weights, and not a number for all others.
            check[lane] += part[lane] * 0.0;
        }
    }
    if total(check) != 0.0 {
        return None;
    }
    let (low, high) = (fold(weights, smaller), fold(weights, larger));
    Some(if high >= -low { high } else { low })
}

/// One of all weights, as a tree of halves.
#[inline(always)]
fn fold(weights: &[f32; GROUP], pick: impl Fn(f32, f32) -> f32) -> f32 {
    let part: [f32; 16] = std::array::from_fn(|lane| pick(weights[lane], weights[lane + 16]));
    let part: [f32; 8] = std::array::from_fn(|lane| pick(part[lane], part[lane + 8]));
    let part: [f32; 4] = std::array::from_fn(|lane| pick(part[lane], part[lane + 4]));
    pick(pick(part[0], part[2]), pick(part[1], part[3]))
}

/// One instruction, where `f32::max` takes four for its care about NaN.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// As [`larger`].
#[inline(always)]
fn smaller(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// 1.5·2²³: added to a small f32 it leaves no room for a fraction, so the sum is rounded to nearest even, and its low bits are
/// the whole number. `f32::round_ties_even` calls a library function for each weight on CPUs without SSE4.1.
const SHIFT: f32 = 12_582_912.0;

/// Nearest whole number in `MIN..=MAX`, plus [`SHIFT`].
#[inline(always)]
fn nearest<const MIN: i32, const MAX: i32>(value: f32) -> f32 {
    let value = larger(value, MIN as f32);
    let value = smaller(value, MAX as f32);
    value + SHIFT
}

/// (Σwq, Σq²) for the codes that `inverse` (1 / scale) gives.
#[inline(always)]
fn correlate<const MIN: i32, const MAX: i32>(weights: &[f32; GROUP], inverse: f32) -> (f32, f32) {
    let (mut product, mut square) = ([0.0; LANES], [0.0; LANES]);
    for part in weights.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let code = nearest::<MIN, MAX>(part[lane] * inverse) - SHIFT;
            product[lane] += part[lane] * code;
            square[lane] += code * code;
        }
    }
    (total(product), total(square))
}

/// Sum of the lanes, as a tree: in sequence the additions would wait for each other.
#[inline(always)]
fn total(lanes: [f32; LANES]) -> f32 {
    let half: [f32; LANES / 2] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + LANES / 2]);
    (half[0] + half[2]) + (half[1] + half[3])
}

/// Codes for a scale as it is stored, what they leave, and the scale that would suit them best.
struct Encoded {
    scale: f16,
    codes: [i32; GROUP],
    error: f32,
    fit: f32,
}

impl Encoded {
    #[inline(always)]
    fn new<const MIN: i32, const MAX: i32>(weights: &[f32; GROUP], scale: f32) -> Self {
        let stored = f16::from_f32(scale.clamp(f16::MIN.to_f32_const(), f16::MAX.to_f32_const()));
        let scale = stored.to_f32();
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let mut codes = [0; GROUP];
        let (mut error, mut product, mut square) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for (part, codes) in weights.as_chunks::<LANES>().0.iter().zip(codes.as_chunks_mut::<LANES>().0) {
            for lane in 0..LANES {
                let shifted = nearest::<MIN, MAX>(part[lane] * inverse);
                codes[lane] = shifted.to_bits() as i32 - SHIFT.to_bits() as i32;
                let code = shifted - SHIFT;
                let rest = part[lane] - scale * code;
                error[lane] += rest * rest;
                product[lane] += part[lane] * code;
                square[lane] += code * code;
            }
        }
        let square = total(square);
        let fit = if square > 0.0 { total(product) / square } else { scale };
        Self { scale: stored, codes, error: total(error), fit }
    }
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
    GroupQ8 { scale: f16::from_le_bytes([block[0], block[1]]), codes }
}

/// Inverse of [`store_q4`].
pub(crate) fn load_q4(block: &[u8]) -> GroupQ4 {
    let mut codes = [0; GROUP];
    for (index, byte) in block[2..].iter().enumerate() {
        codes[index] = byte & 15;
        codes[index + GROUP / 2] = byte >> 4;
    }
    GroupQ4 { scale: f16::from_le_bytes([block[0], block[1]]), codes }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// 12 uniform numbers summed: normal weights with a standard deviation of 0.02, in groups.
    fn normal_groups(count: usize) -> Vec<[f32; GROUP]> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut uniform = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
        };
        (0..count).map(|_| std::array::from_fn(|_| (0..12).map(|_| uniform()).sum::<f32>() * 0.02)).collect()
    }

    fn error(weights: &[f32; GROUP], values: [f32; GROUP]) -> f64 {
        weights.iter().zip(values).map(|(weight, value)| f64::from(weight - value).powi(2)).sum()
    }

    fn error_q8(weights: &[f32; GROUP]) -> f64 {
        let group = quantize_group_q8(weights).unwrap();
        error(weights, group.codes.map(|code| group.scale.to_f32() * f32::from(code)))
    }

    fn error_q4(weights: &[f32; GROUP]) -> f64 {
        let group = quantize_group_q4(weights).unwrap();
        error(weights, group.codes.map(|code| group.scale.to_f32() * (f32::from(code) - 8.0)))
    }

    /// Squared error when the largest weight alone decides, its code being `top`.
    fn error_plain(weights: &[f32; GROUP], top: f32, range: std::ops::RangeInclusive<f32>) -> f64 {
        let scale = f16::from_f32(extreme(weights).unwrap() / top).to_f32();
        error(weights, weights.map(|weight| scale * (weight / scale).round().clamp(*range.start(), *range.end())))
    }

    /// RMS error relative to the RMS of the weights.
    fn relative(groups: &[[f32; GROUP]], group_error: impl Fn(&[f32; GROUP]) -> f64) -> f64 {
        let power: f64 = groups.iter().map(|weights| error(weights, [0.0; GROUP])).sum();
        (groups.iter().map(group_error).sum::<f64>() / power).sqrt()
    }

    #[test]
    fn the_search_beats_the_largest_weight_by_what_is_claimed() {
        let groups = normal_groups(4000);
        let q8 = relative(&groups, error_q8);
        let q8_plain = relative(&groups, |weights| error_plain(weights, 127.0, -127.0..=127.0));
        let q4 = relative(&groups, error_q4);
        let q4_plain = relative(&groups, |weights| error_plain(weights, -8.0, -8.0..=7.0));
        let q4_symmetric = relative(&groups, |weights| error_plain(weights, 7.0, -8.0..=7.0));
        println!("relative RMS error: q8 {q8:.5}, largest weight alone {q8_plain:.5}");
        println!("relative RMS error: q4 {q4:.5}, largest weight to -8 {q4_plain:.5}, to 7 {q4_symmetric:.5}");
        assert!(q8 < 0.0050 && q8 < 0.93 * q8_plain, "{q8} against {q8_plain}");
        assert!(q4 < 0.0805 && q4 < 0.95 * q4_plain && q4 < 0.85 * q4_symmetric, "{q4} against {q4_plain}");
    }

    #[test]
    fn no_trial_of_many_is_much_better() {
        let groups = normal_groups(300);
        let exhaustive = |weights: &[f32; GROUP], min: f32, max: f32, step: f32| {
            let extreme = extreme(weights).unwrap();
            let trials = (0..400).map(|trial| max * 0.8 + trial as f32 * step);
            let errors = trials.flat_map(|top| [top, -top]).map(|top| {
                let codes = weights.map(|weight| (weight * top / extreme).round().clamp(min, max));
                let product: f32 = weights.iter().zip(&codes).map(|(weight, code)| weight * code).sum();
                let scale = product / codes.iter().map(|code| code * code).sum::<f32>();
                error(weights, codes.map(|code| scale * code))
            });
            errors.fold(f64::INFINITY, f64::min)
        };
        let best = relative(&groups, |weights| exhaustive(weights, -8.0, 7.0, 0.015));
        let found = relative(&groups, error_q4);
        assert!(found < 1.005 * best, "q4: {found} against {best} of 800 trials");
        let best = relative(&groups, |weights| exhaustive(weights, -127.0, 127.0, 0.1));
        let found = relative(&groups, error_q8);
        assert!(found < 1.08 * best, "q8: {found} against {best} of 800 trials");
    }

    #[test]
    fn no_group_is_noticeably_worse_than_by_its_largest_weight() {
        for weights in normal_groups(4000) {
            // The scale's rounding to f16 (11 bits) can cost a little after the codes are chosen.
            assert!(error_q8(&weights) <= 1.1 * error_plain(&weights, 127.0, -127.0..=127.0), "{weights:?}");
            assert!(error_q4(&weights) <= 1.02 * error_plain(&weights, -8.0, -8.0..=7.0), "{weights:?}");
        }
    }

    #[test]
    fn codes_are_the_nearest_for_the_stored_scale() {
        for weights in normal_groups(500) {
            let q8 = quantize_group_q8(&weights).unwrap();
            let q4 = quantize_group_q4(&weights).unwrap();
            assert!(q8.scale.to_f32() > 0.0);
            for (k, weight) in weights.into_iter().enumerate() {
                let exact = weight / q8.scale.to_f32();
                assert!((exact.clamp(-127.0, 127.0) - f32::from(q8.codes[k])).abs() <= 0.5001);
                let exact = weight / q4.scale.to_f32();
                assert!((exact.clamp(-8.0, 7.0) - (f32::from(q4.codes[k]) - 8.0)).abs() <= 0.5001);
            }
        }
    }

    #[test]
    fn the_longer_side_of_q4_goes_to_the_larger_extreme() {
        let mut weights = [0.0; GROUP];
        for (k, weight) in weights.iter_mut().enumerate() {
            *weight = (k as f32 - 15.0) / 2.0 % 8.0;
        }
        weights[0] = 8.0;
        let positive = quantize_group_q4(&weights).unwrap();
        let negative = quantize_group_q4(&weights.map(|weight| -weight)).unwrap();
        assert_eq!(positive.scale, -negative.scale);
        assert_eq!(positive.codes, negative.codes);
    }

    #[test]
    fn groups_at_the_edges_of_the_range() {
        assert_eq!(quantize_group_q8(&[0.0; GROUP]), Some(GroupQ8 { scale: f16::ZERO, codes: [0; GROUP] }));
        assert_eq!(quantize_group_q4(&[-0.0; GROUP]), Some(GroupQ4 { scale: f16::ZERO, codes: [8; GROUP] }));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -9e6] {
            for place in [0, 13, GROUP - 1] {
                let mut weights = [0.01; GROUP];
                weights[place] = bad;
                assert_eq!(quantize_group_q8(&weights), None, "{bad} at {place}");
                assert_eq!(quantize_group_q4(&weights), None, "{bad} at {place}");
            }
        }
        // From far below the smallest f16 scale up to the largest: finite, and never further off than the weight itself.
        for exponent in -149..=18 {
            let magnitude = 2.0_f32.powi(exponent);
            let weights: [f32; GROUP] = std::array::from_fn(|k| magnitude * (k as f32 / 31.0 - 0.5));
            for relative in [error_q8(&weights), error_q4(&weights)] {
                assert!(relative <= 1.0001 * error(&weights, [0.0; GROUP]), "2^{exponent}: {relative}");
            }
        }
        let large = [65504.0 * 7.0; GROUP];
        for left in [error_q8(&large), error_q4(&large)] {
            assert!(left / error(&large, [0.0; GROUP]) < 1e-6, "{left}");
        }
    }

    #[test]
    fn stored_groups_come_back() {
        for weights in normal_groups(50) {
            let (q8, q4) = (quantize_group_q8(&weights).unwrap(), quantize_group_q4(&weights).unwrap());
            let (mut block8, mut block4) = ([0; 34], [0; 18]);
            store_q8(&q8, &mut block8);
            store_q4(&q4, &mut block4);
            assert_eq!((load_q8(&block8), load_q4(&block4)), (q8, q4));
            assert_eq!(dequantize_q8(&block8), q8.codes.map(|code| q8.scale.to_f32() * f32::from(code)));
            assert_eq!(dequantize_q4(&block4), q4.codes.map(|code| q4.scale.to_f32() * (f32::from(code) - 8.0)));
        }
    }
}
