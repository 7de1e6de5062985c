//! From f32 to the formats of the cache: half precision, and int8 with a scale per group of 32.

use crate::isa::{Isa, dispatch};

/// out[i] = x[i] in half precision, rounded to nearest even.
pub(crate) fn to_f16(isa: Isa, x: &[f32], out: &mut [u16]) {
    debug_assert_eq!(x.len(), out.len());
    dispatch!(isa, avx2::to_f16, scalar::to_f16, (x, out))
}

/// One group: out[i] = round(x[i] / scale) in −127..=127 with scale = max |x| / 127 in half
/// precision, whose bits are returned. x ≈ scale · out. A group with a NaN or an infinity gets NaN
/// as its scale, one beyond 127 · 65504 infinity, so that what it enters is no plausible number.
pub(crate) fn to_q8(isa: Isa, x: &[f32], out: &mut [i8]) -> u16 {
    debug_assert_eq!(x.len(), out.len());
    dispatch!(isa, avx2::to_q8, scalar::to_q8, (x, out))
}

mod scalar {
    use crate::half_float::{f16_to_f32, f32_to_f16};

    /// Bits in half precision.
    const SMALLEST_NORMAL: u16 = 0x0400;
    const NAN: u16 = 0x7e00;

    pub(super) fn to_f16(x: &[f32], out: &mut [u16]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = f32_to_f16(x);
        }
    }

    pub(super) fn to_q8(x: &[f32], out: &mut [i8]) -> u16 {
        // Compared as integers, magnitudes order as the floats do, and NaN is the largest.
        let most = x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        let (bits, inverse) = scale(f32::from_bits(most));
        for (out, x) in out.iter_mut().zip(x) {
            // Where NaN · 0 and ∞ · 0 become 0.
            *out = (x * inverse).round_ties_even() as i8;
        }
        bits
    }

    /// The scale for numbers up to `most`, and what to multiply them by, after which they round to
    /// at most 127.
    ///
    /// The inverse is of the rounded scale. A normal scale that was rounded down leaves the largest
    /// numbers at 127.07; a subnormal one may be any part smaller than most / 127, so it is rounded
    /// up.
    #[inline]
    pub(super) fn scale(most: f32) -> (u16, f32) {
        if !most.is_finite() {
            return (NAN, 0.0);
        }
        let nearest = f32_to_f16(most / 127.0);
        let short = nearest < SMALLEST_NORMAL && f16_to_f32(nearest) * 127.0 < most;
        let bits = nearest + u16::from(short);
        let scale = f16_to_f32(bits);
        (bits, if scale > 0.0 { 1.0 / scale } else { 0.0 })
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::scalar::scale;
    use crate::lanes::{self, LANES, load, load_tail};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn to_f16(x: &[f32], out: &mut [u16]) {
        let (x, x_tail) = x.as_chunks::<LANES>();
        let (out, out_tail) = out.as_chunks_mut::<LANES>();
        for (out, x) in out.iter_mut().zip(x) {
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load(x));
            // SAFETY: `out` is sixteen writable bytes.
            unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), halves) };
        }
        super::scalar::to_f16(x_tail, out_tail);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn to_q8(x: &[f32], out: &mut [i8]) -> u16 {
        let (x, x_tail) = x.as_chunks::<LANES>();
        let (out, out_tail) = out.as_chunks_mut::<LANES>();
        let mut most = lanes::magnitude(load_tail(x_tail));
        for x in x {
            most = _mm256_max_epi32(lanes::magnitude(load(x)), most);
        }
        let (bits, inverse) = scale(lanes::max_magnitude(most));
        let inverse = _mm256_set1_ps(inverse);
        for (out, x) in out.iter_mut().zip(x) {
            let codes = rounded(load(x), inverse).to_ne_bytes();
            out.iter_mut().zip(codes).for_each(|(out, code)| *out = code as i8);
        }
        let codes = rounded(load_tail(x_tail), inverse).to_ne_bytes();
        out_tail.iter_mut().zip(codes).for_each(|(out, code)| *out = code as i8);
        bits
    }

    /// Eight int8 in an integer.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn rounded(x: __m256, inverse: __m256) -> i64 {
        let x = _mm256_mul_ps(x, inverse);
        // NaN (0 · ∞) becomes 0.
        let words = _mm256_cvtps_epi32(_mm256_and_ps(x, _mm256_cmp_ps::<_CMP_ORD_Q>(x, x)));
        let halves =
            _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        _mm_cvtsi128_si64(_mm_packs_epi16(halves, halves))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, lengths_and_offsets, noise};
    use crate::half_float::f16_to_f32;
    use crate::isa::witness::assert_entered;

    #[test]
    fn avx2_gives_the_same_bits() {
        let Some(isa) = Isa::avx2() else { return };
        for (len, offset) in lengths_and_offsets() {
            for (size, bad) in [1.0, 1.0e-3, 1.0e-6, 1.0e-8, 300.0, 1.0e9, 0.0]
                .map(|size| (size, None))
                .into_iter()
                .chain(
                    [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY]
                        .map(|bad| (1.0, Some(bad))),
                )
            {
                let mut x = Guarded::of(noise(len, 12).iter().map(|x| x * size), offset);
                if let (Some(bad), true) = (bad, len > 0) {
                    x[len / 3] = bad;
                }
                let (mut expected, mut found) = (vec![7u16; len], vec![9u16; len]);
                to_f16(Isa::scalar(), &x, &mut expected);
                to_f16(isa, &x, &mut found);
                assert_eq!(expected, found);

                let (mut expected, mut found) = (vec![7i8; len], vec![9i8; len]);
                let bits = to_q8(Isa::scalar(), &x, &mut expected);
                assert_eq!(to_q8(isa, &x, &mut found), bits);
                assert_eq!(expected, found);
                assert!(
                    len == 0 || f16_to_f32(bits).is_nan() == bad.is_some(),
                    "{bad:?} of {len} has scale {bits:#x}"
                );
            }
        }
        assert_entered("avx2::to_f16");
        assert_entered("avx2::to_q8");
    }

    #[test]
    fn codes_are_within_half_a_step() {
        // Down to where the scale is the smallest subnormal.
        for seed in 0..1000 {
            let size = 2.0f32.powi(seed as i32 % 50 - 38);
            let x: Vec<f32> = noise(32, seed).iter().map(|x| x * size).collect();
            let mut codes = [0i8; 32];
            let step = f16_to_f32(to_q8(Isa::scalar(), &x, &mut codes));
            for (x, code) in x.iter().zip(codes) {
                let error = (x - step * f32::from(code)).abs();
                assert!(error <= 0.51 * step, "{x} became {code} steps of {step}");
            }
        }
    }
}
