//! Logarithm, exponential and noise that give the same bits on every machine.
//!
//! Ranks agree on a token without sending it when they compute the same from the same candidates.
//! The system's `exp` and `ln` differ between versions of its library, and with them two nodes of a
//! cluster; these use only operations that IEEE 754 rounds correctly.

use std::f64::consts::{LOG2_E, SQRT_2};

/// ln 2 in two parts: the first has 32 trailing zero bits, so that its product with a small integer
/// is exact.
const LN2_HIGH: f64 = 0.693_147_180_369_123_8;
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// 1 / n! for n = 13 down to 0. The first term left out of e^x, x^14 / 14!, is below 1e-17 for |x|
/// ≤ ln 2 / 2.
const EXP_TERMS: [f64; 14] = {
    let mut terms = [1.0; 14];
    let mut n = 1;
    while n < 14 {
        terms[13 - n] = terms[14 - n] / n as f64;
        n += 1;
    }
    terms
};

/// 1 / n for odd n from 21 down to 1. The first term left out of artanh f is below 1e-17 of the sum
/// for |f| ≤ 0.172.
const LN_TERMS: [f64; 11] = {
    let mut terms = [1.0; 11];
    let mut n = 0;
    while n < 11 {
        terms[10 - n] = 1.0 / (2 * n + 1) as f64;
        n += 1;
    }
    terms
};

/// e^x for x ≤ 0, to within 2 units in the last place; 0 below -700.
pub(crate) fn exp(x: f64) -> f64 {
    debug_assert!(x <= 0.0, "exp of {x}, expected at most 0");
    if x < -700.0 {
        return 0.0;
    }
    let power = (x * LOG2_E - 0.5).trunc();
    let rest = (x - power * LN2_HIGH) - power * LN2_LOW;
    let sum = EXP_TERMS.iter().fold(0.0, |sum, term| sum * rest + term);
    sum * f64::from_bits(((1023 + power as i64) as u64) << 52)
}

/// ln x for normal, positive x, to within 2 units in the last place, also close to 1.
pub(crate) fn ln(x: f64) -> f64 {
    debug_assert!(x.is_normal() && x > 0.0, "ln of {x}");
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if mantissa > SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    // ln m = 2 artanh f
    let f = (mantissa - 1.0) / (mantissa + 1.0);
    let square = f * f;
    let sum = LN_TERMS.iter().fold(0.0, |sum, term| sum * square + term);
    let exponent = exponent as f64;
    exponent * LN2_HIGH + (2.0 * f * sum + exponent * LN2_LOW)
}

/// The random numbers of one step: a function of the token's id, so that they do not depend on who
/// draws them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Noise {
    key: u64,
}

impl Noise {
    /// The noise of step `step` under `seed`.
    pub fn new(seed: u64, step: u64) -> Self {
        Self { key: mix(mix(seed) ^ mix(step.wrapping_add(0x632b_e59b_d9b4_e019))) }
    }

    /// 64 random bits of `id`: the SplitMix64 stream that starts at the key.
    pub fn bits(self, id: u32) -> u64 {
        mix(self.key.wrapping_add((u64::from(id) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// A draw from the standard Gumbel distribution: −ln(−ln u).
    pub fn gumbel(self, id: u32) -> f64 {
        -ln(-ln(1.0 - tail(self.bits(id))))
    }

    /// A bound that [`Noise::gumbel`] does not exceed, at a fraction of its cost.
    pub fn gumbel_bound(self, id: u32) -> f64 {
        // −ln(1 − w) ≥ w, and w = tail ≥ 2^−(zeros + 1).
        f64::from(self.bits(id).leading_zeros() + 1) * std::f64::consts::LN_2 * (1.0 + 1e-12)
    }
}

/// A number in (0, 1) from the upper 52 bits; an odd multiple of 2⁻⁵³, so that 1 minus it is exact.
fn tail(bits: u64) -> f64 {
    (2 * (bits >> 12) + 1) as f64 * (0.5 / (1u64 << 52) as f64)
}

/// The output function of SplitMix64 (Steele, Lea & Flood 2014).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_ln_agree_with_the_system() {
        for i in 0..200_000 {
            let x = -f64::from(i) * 0.0035;
            let (found, expected) = (exp(x), x.exp());
            assert!(
                (found - expected).abs() <= 3.0 * f64::EPSILON * expected,
                "exp({x}): {found} against {expected}"
            );
            let y = 1e-9 * 1.0002f64.powi(i);
            let (found, expected) = (ln(y), y.ln());
            assert!(
                (found - expected).abs() <= 3.0 * f64::EPSILON * expected.abs(),
                "ln({y}): {found}, {expected}"
            );
        }
        assert_eq!((exp(0.0), exp(-701.0), ln(1.0)), (1.0, 0.0, 0.0));
        for step in 1..1000 {
            let y = 1.0 - f64::from(step) * f64::EPSILON / 2.0;
            assert!((ln(y) - y.ln()).abs() <= 2.0 * f64::EPSILON * y.ln().abs(), "ln({y})");
        }
    }

    #[test]
    fn gumbel_noise_has_its_mean_and_variance_and_respects_the_bound() {
        let noise = Noise::new(7, 3);
        let count = 200_000;
        let (mut sum, mut squares) = (0.0, 0.0);
        for id in 0..count {
            let draw = noise.gumbel(id);
            assert!(draw <= noise.gumbel_bound(id), "draw {draw} of {id}");
            sum += draw;
            squares += draw * draw;
        }
        let mean = sum / f64::from(count);
        let variance = squares / f64::from(count) - mean * mean;
        // Euler's constant and π²/6; five standard errors of each.
        assert!(
            (mean - 0.577_215_664_9).abs() < 5.0 * 1.2825 / f64::from(count).sqrt(),
            "mean {mean}"
        );
        assert!((variance - 1.644_934).abs() < 0.05, "variance {variance}");
    }

    #[test]
    fn extreme_bits_give_finite_noise() {
        for bits in [0, 1, u64::MAX, u64::MAX - 1, 1 << 63, 1 << 12] {
            let w = tail(bits);
            assert!(w > 0.0 && w < 1.0 && (-ln(-ln(1.0 - w))).is_finite(), "{bits:#x}");
        }
    }
}
