//! What the search for scales and zero points is worth, and the edges of what groups can express.

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
    (0..count)
        .map(|_| std::array::from_fn(|_| (0..12).map(|_| uniform()).sum::<f32>() * 0.02))
        .collect()
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
    error(weights, group.weights())
}

/// The weight of largest magnitude, with its sign.
fn extreme(weights: &[f32; GROUP]) -> f32 {
    let (low, high) = extremes(weights).unwrap();
    if high >= -low { high } else { low }
}

/// Squared error when the largest weight alone decides, its code being `top`.
fn error_plain(weights: &[f32; GROUP], top: f32, range: std::ops::RangeInclusive<f32>) -> f64 {
    let scale = f16::from_f32(extreme(weights) / top).to_f32();
    error(
        weights,
        weights.map(|weight| scale * (weight / scale).round().clamp(*range.start(), *range.end())),
    )
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
    println!("relative RMS error: q8 {q8:.5}, largest weight alone {q8_plain:.5}");
    println!("relative RMS error: q4 {q4:.5}, largest weight to -8 {q4_plain:.5}");
    assert!(q8 < 0.0050 && q8 < 0.93 * q8_plain, "{q8} against {q8_plain}");
    // 0.0802 with the best scale among 800 without a zero point.
    assert!(q4 < 0.0732 && q4 < 0.87 * q4_plain, "{q4} against {q4_plain}");
}

#[test]
fn no_trial_of_many_is_much_better() {
    let groups = normal_groups(300);
    // The best of many scales for each zero point, each made the best one for its codes.
    let exhaustive =
        |weights: &[f32; GROUP], zeros: &[f32], (min, max): (f32, f32), scales: &[f32]| {
            let errors = zeros
                .iter()
                .flat_map(|zero| scales.iter().map(move |scale| (zero, scale)))
                .map(|(zero, scale)| {
                    let codes = weights
                        .map(|weight| (weight / scale + zero).round().clamp(min, max) - zero);
                    let product: f32 =
                        weights.iter().zip(&codes).map(|(weight, code)| weight * code).sum();
                    let scale = product / codes.iter().map(|code| code * code).sum::<f32>();
                    error(weights, codes.map(|code| scale * code))
                });
            errors.fold(f64::INFINITY, f64::min)
        };
    let zeros: Vec<f32> = (0..16).map(|zero| 4.0 + zero as f32 / 2.0).collect();
    let best = relative(&groups, |weights| {
        let (low, high) = extremes(weights).unwrap();
        let scales: Vec<f32> =
            (0..100).map(|trial| (high - low) / (13.0 + trial as f32 / 20.0)).collect();
        exhaustive(weights, &zeros, (0.0, 15.0), &scales)
    });
    let found = relative(&groups, error_q4);
    assert!(found < 1.02 * best, "q4: {found} against {best} of 1600 trials");
    let best = relative(&groups, |weights| {
        let scales: Vec<f32> =
            (0..400).map(|trial| extreme(weights).abs() / (101.6 + trial as f32 * 0.1)).collect();
        exhaustive(weights, &[0.0], (-127.0, 127.0), &scales)
    });
    let found = relative(&groups, error_q8);
    assert!(found < 1.08 * best, "q8: {found} against {best} of 400 trials");
}

#[test]
fn no_group_is_noticeably_worse_than_by_its_largest_weight() {
    let mut worst = 0.0_f64;
    for weights in normal_groups(4000) {
        // The scale's rounding to f16 (11 bits) can cost a little after the codes are chosen.
        assert!(
            error_q8(&weights) <= 1.1 * error_plain(&weights, 127.0, -127.0..=127.0),
            "{weights:?}"
        );
        worst = worst.max(error_q4(&weights) / error_plain(&weights, -8.0, -8.0..=7.0));
    }
    // The codes of one group may happen to lie better without a zero point: 1.39 is the worst of
    // these.
    assert!(worst < 1.4, "q4: {worst}");
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
            let exact = weight / q4.scale.to_f32() + 4.0 + f32::from(q4.zero) / 2.0;
            assert!((exact.clamp(0.0, 15.0) - f32::from(q4.codes[k])).abs() <= 0.5001);
        }
    }
}

#[test]
fn the_zero_point_of_q4_follows_the_weights() {
    // All codes twice over come back as they are.
    for zero in 0..=15_u8 {
        let weights: [f32; GROUP] =
            std::array::from_fn(|k| 0.25 * ((k % 16) as f32 - 4.0 - f32::from(zero) / 2.0));
        let group = quantize_group_q4(&weights).unwrap();
        assert_eq!((group.scale.to_f32(), group.zero), (0.25, zero));
        assert_eq!(group.weights(), weights);
    }
    // All on one side: the last code reaches as far as they do.
    for sign in [1.0, -1.0] {
        let weights: [f32; GROUP] = std::array::from_fn(|k| sign * (1.0 + k as f32 / 31.0));
        assert!(
            error_q4(&weights) < 0.002 * error(&weights, [0.0; GROUP]),
            "{}",
            error_q4(&weights)
        );
    }
}

#[test]
fn words_of_scale_and_zero_point_come_back() {
    for bits in (0..0x7c00).step_by(8) {
        for zero in 0..=15 {
            let group = GroupQ4 { scale: f16::from_bits(bits), zero, codes: [8; GROUP] };
            assert_eq!(GroupQ4::from_word(group.word()), (group.scale, zero));
        }
    }
    // The nearest scale, also of what an f16 cannot hold.
    assert_eq!(round_scale(1.0 + 1.0 / 256.0 + 1e-3).to_f32(), 1.0 + 1.0 / 128.0);
    assert_eq!((round_scale(-1.0), round_scale(1e9).to_f32()), (f16::ZERO, LARGEST_Q4));
}

#[test]
fn groups_at_the_edges_of_the_range() {
    assert_eq!(quantize_group_q8(&[0.0; GROUP]), Some(GroupQ8::default()));
    assert_eq!(quantize_group_q4(&[-0.0; GROUP]), Some(GroupQ4::default()));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -9e6] {
        for place in [0, 13, GROUP - 1] {
            let mut weights = [0.01; GROUP];
            weights[place] = bad;
            assert_eq!(quantize_group_q8(&weights), None, "{bad} at {place}");
            assert_eq!(quantize_group_q4(&weights), None, "{bad} at {place}");
        }
    }
    // From far below the smallest f16 scale up to the largest: finite, and never further off than
    // the weight itself.
    for exponent in -149..=18 {
        let magnitude = 2.0_f32.powi(exponent);
        let weights: [f32; GROUP] = std::array::from_fn(|k| magnitude * (k as f32 / 31.0 - 0.5));
        for relative in [error_q8(&weights), error_q4(&weights)] {
            assert!(relative <= 1.0001 * error(&weights, [0.0; GROUP]), "2^{exponent}: {relative}");
        }
    }
    let large = [65504.0 * 7.0; GROUP];
    // A q4 scale has 8 bits.
    for (left, most) in [(error_q8(&large), 1e-6), (error_q4(&large), 0.004_f64.powi(2))] {
        assert!(left / error(&large, [0.0; GROUP]) < most, "{left}");
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
        assert_eq!(
            dequantize_q8(&block8),
            q8.codes.map(|code| q8.scale.to_f32() * f32::from(code))
        );
        assert_eq!(dequantize_q4(&block4), q4.weights());
    }
}
