//! The two 16-bit float formats, converted one value at a time in plain integer arithmetic.

/// The value of bfloat16 bits: the upper half of an f32.
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bfloat16 bits, ties to even.
#[inline]
pub(crate) fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    // Rounding could carry a NaN's payload away and leave an infinity.
    if value.is_nan() { (bits >> 16) as u16 | 0x40 } else { nearest }
}

/// The value of IEEE 754 half-precision bits; exact.
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    let value = match magnitude >> 10 {
        // Subnormal: a multiple of 2^-24, which f32 holds exactly.
        0 => magnitude as f32 * f32::from_bits(0x3380_0000),
        // Infinity and NaN keep their payload; VCVTPH2PS also makes a NaN quiet.
        31 => {
            let quiet = if magnitude & 0x3ff != 0 { 0x0040_0000 } else { 0 };
            f32::from_bits(0x7f80_0000 | quiet | (magnitude << 13))
        }
        // The exponent bias changes from 15 to 127.
        _ => f32::from_bits((magnitude << 13) + (112 << 23)),
    };
    f32::from_bits(value.to_bits() | sign)
}

/// The nearest half-precision bits, ties to even; beyond 65504 infinity, as VCVTPS2PH rounds.
pub(crate) fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let half = if magnitude > 0x7f80_0000 {
        0x7e00 | (magnitude >> 13) as u16 & 0x3ff
    } else if magnitude >= 0x4780_0000 {
        0x7c00
    } else if magnitude < 0x3880_0000 {
        // Subnormal: adding 0.5 makes the f32 addition itself round to a multiple of 2^-24.
        (f32::from_bits(magnitude) + 0.5).to_bits() as u16
    } else {
        let rebased = magnitude - (112 << 23);
        let odd = (rebased >> 13) & 1;
        ((rebased + 0xfff + odd) >> 13) as u16
    };
    half | sign
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let back = f32_to_f16(f16_to_f32(bits));
            let nan = bits & 0x7fff > 0x7c00;
            assert_eq!(back, if nan { bits | 0x200 } else { bits }, "{bits:#06x}");
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even_and_keeps_what_is_not_finite() {
        let rounded = |bits: u32| f32_to_bf16(f32::from_bits(bits));
        assert_eq!(rounded(0x3f80_8000), 0x3f80);
        assert_eq!(rounded(0x3f81_8000), 0x3f82);
        assert_eq!(rounded(0x3f80_8001), 0x3f81);
        assert_eq!(rounded(0xff80_0000), 0xff80);
        assert!(bf16_to_f32(rounded(0x7f80_0001)).is_nan());
    }

    #[test]
    fn rounding_between_neighbours_is_to_nearest_even() {
        for bits in 0..0x7bff_u16 {
            let (low, high) = (f16_to_f32(bits), f16_to_f32(bits + 1));
            let middle = 0.5 * (low + high);
            assert_eq!(f32_to_f16(middle), bits + (bits & 1), "tie above {bits:#06x}");
            assert_eq!(f32_to_f16(f32::from_bits(middle.to_bits() - 1)), bits);
            assert_eq!(f32_to_f16(f32::from_bits(middle.to_bits() + 1)), bits + 1);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn agrees_with_the_cpu() {
        use std::arch::x86_64::{
            _mm_cvtph_ps, _mm_cvtps_ph, _mm_cvtsi32_si128, _mm_cvtsi128_si32, _mm_cvtss_f32,
            _mm_set_ss,
        };
        #[target_feature(enable = "avx2,fma,f16c")]
        fn both(bits: u16, value: f32) -> (u32, u16) {
            let widened = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))));
            (widened.to_bits(), _mm_cvtsi128_si32(_mm_cvtps_ph::<0>(_mm_set_ss(value))) as u16)
        }
        if crate::Isa::avx2().is_none() {
            return;
        }
        for bits in 0..=u16::MAX {
            // Spread over all exponents; the odd multiplier reaches ties and non-ties.
            let value = f32::from_bits(u32::from(bits).wrapping_mul(0x0001_0a55));
            // SAFETY: the check above found F16C.
            let (widened, narrowed) = unsafe { both(bits, value) };
            assert_eq!(f16_to_f32(bits).to_bits(), widened, "{bits:#06x}");
            assert_eq!(f32_to_f16(value), narrowed, "{value:e}");
        }
    }
}
