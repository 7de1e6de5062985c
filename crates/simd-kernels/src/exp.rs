//! e^x: the vector polynomial under softmax, attention and SwiGLU, and the slice version.
//!
//! Both instruction sets share these limits, so that no result is infinite or subnormal:
//! below [`LOWEST`] the result is 0, above [`HIGHEST`] it is e^HIGHEST (3.4028e38); NaN stays NaN.

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::{exp256, pow2_256, pow2_512};

use crate::isa::{Isa, dispatch};

/// The smallest argument whose exponential is not taken as zero, just above ln(f32::MIN_POSITIVE).
pub(crate) const LOWEST: f32 = -87.3365;
/// Larger arguments give the exponential of this one, just below ln(f32::MAX).
pub(crate) const HIGHEST: f32 = 88.7228;

/// `x[i] = e^x[i]`, within 2 ulp on AVX2; 0 below −87.3365, at most 3.4028e38, never infinite.
pub fn exp(isa: Isa, x: &mut [f32]) {
    dispatch!(isa, avx2::exp, scalar::exp, (x))
}

pub(crate) mod scalar {
    use super::{HIGHEST, LOWEST};

    /// e^x of one value, with the limits of this module.
    #[inline]
    pub(crate) fn exp1(x: f32) -> f32 {
        if x < LOWEST {
            0.0
        } else if x > HIGHEST {
            HIGHEST.exp()
        } else {
            x.exp()
        }
    }

    pub(super) fn exp(x: &mut [f32]) {
        x.iter_mut().for_each(|x| *x = exp1(*x));
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{HIGHEST, LOWEST};
    use crate::lanes::{load, load_tail, store, store_tail};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn exp(x: &mut [f32]) {
        let (chunks, tail) = x.as_chunks_mut();
        for chunk in chunks {
            store(chunk, exp256(load(chunk)));
        }
        store_tail(tail, exp256(load_tail(tail)));
    }

    /// e^x in each lane, with the limits of this module.
    ///
    /// ```text
    /// n = round(x / ln 2)
    /// r = x − n ln 2                     |r| ≤ ln(2)/2
    /// e^x = 2^n (1 + r + r² P(r))        P of degree 5
    /// ```
    /// 1. Rounding is an addition of 1.5·2²³, which leaves n as an integer in the low bits of the
    ///    sum: one shift then makes it an exponent, without a conversion.
    /// 2. ln 2 is two floats, so that r is exact to the last bit also for large n.
    /// 3. 2^n is added to the exponent bits, not multiplied: n = 128 occurs (just below the upper
    ///    limit) and has no float of its own.
    /// 4. The lower limit is a mask at the end and not a clamp: scores of −∞ must give exactly 0.
    ///
    /// P is that of the Cephes library (`expf.c`, S. Moshier); measured over all floats between the
    /// limits the error stays below 2 ulp.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn exp256(x: __m256) -> __m256 {
        // The second operand wins when one is NaN, here and in the comparison below.
        let clamped = _mm256_min_ps(_mm256_set1_ps(HIGHEST), x);
        let magic = _mm256_set1_ps(12_582_912.0);
        let shifted = _mm256_fmadd_ps(clamped, _mm256_set1_ps(std::f32::consts::LOG2_E), magic);
        let n = _mm256_sub_ps(shifted, magic);
        let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(std::f32::consts::LN_2), clamped);
        let r = _mm256_fmadd_ps(n, _mm256_set1_ps(1.904_654_3e-9), r);

        let mut p = _mm256_set1_ps(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
        }
        let p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r);
        let p = _mm256_add_ps(p, _mm256_set1_ps(1.0));

        let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
        let y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
        _mm256_and_ps(y, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, _mm256_set1_ps(LOWEST)))
    }

    /// The coefficients of 2^x between −1/2 and 1/2, of x⁴ first.
    const POW2: [f32; 5] = [9.582_85e-3, 5.590_643e-2, 0.240_240_99, 0.693_124_2, 1.0];
    /// 1.5·2²³, whose sum with a number has it rounded in its low bits.
    const POW2_MAGIC: f32 = 12_582_912.0;
    /// 2^x is taken as this power of two below it: nothing next to 1, and its products are not yet
    /// denormal, which takes a processor long.
    const POW2_LOWEST: f32 = -60.0;

    /// 2^x in each lane for x up to 127, within 3e-6 of it; 2⁻⁶⁰ below −60, and exactly 1 for 0.
    ///
    /// As [`exp256`], without what that needs for the other base, for large x and for the last
    /// bits: half of its instructions. Beside 1 the polynomial has the coefficients of the least
    /// largest relative error between −1/2 and 1/2, 2.8e-6.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn pow2_256(x: __m256) -> __m256 {
        let x = _mm256_max_ps(_mm256_set1_ps(POW2_LOWEST), x);
        let magic = _mm256_set1_ps(POW2_MAGIC);
        let shifted = _mm256_add_ps(x, magic);
        let r = _mm256_sub_ps(x, _mm256_sub_ps(shifted, magic));
        let mut p = _mm256_set1_ps(POW2[0]);
        for c in &POW2[1..] {
            p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
        }
        let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent))
    }

    /// 2^x in each lane, as [`pow2_256`], bit by bit.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn pow2_512(x: __m512) -> __m512 {
        let x = _mm512_max_ps(_mm512_set1_ps(POW2_LOWEST), x);
        let magic = _mm512_set1_ps(POW2_MAGIC);
        let shifted = _mm512_add_ps(x, magic);
        let r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
        let mut p = _mm512_set1_ps(POW2[0]);
        for c in &POW2[1..] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
        }
        let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
        _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, lengths_and_offsets};
    use crate::isa::witness::assert_entered;

    /// |y − e^x| in units of the last place of the exact value.
    fn ulps(x: f32, y: f32) -> f64 {
        let exact = f64::from(x).exp();
        let place =
            f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
        (f64::from(y) - exact).abs() / place
    }

    #[test]
    fn within_two_ulp_between_the_limits() {
        let Some(isa) = Isa::avx2() else { return };
        let step = 1.0 / 4096.0 + 1.0e-6;
        let xs: Vec<f32> = (0..)
            .map(|i| LOWEST + i as f32 * step)
            .take_while(|&x| x < 88.7)
            .chain((-2000..2000).map(|i| i as f32 * 1.0e-7))
            .collect();
        let mut ys = xs.clone();
        exp(isa, &mut ys);
        for (&x, &y) in xs.iter().zip(&ys) {
            assert!(ulps(x, y) < 2.0, "exp({x}) = {y}, {} ulp off", ulps(x, y));
        }
        assert_entered("avx2::exp");
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn powers_of_two() {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn eight(x: &mut [f32; 8]) {
            crate::lanes::store(x, pow2_256(crate::lanes::load(x)));
        }
        if Isa::avx2().is_none() {
            return;
        }
        let xs =
            (0..2_000_000).map(|i| -60.0 + i as f32 * (186.9 / 2_000_000.0)).chain([-1.0, 127.0]);
        for x in xs {
            let mut y = [x; 8];
            // SAFETY: the CPU has what the function needs, `Isa::avx2` has found it.
            unsafe { eight(&mut y) };
            let exact = f64::from(x).exp2();
            let error = (f64::from(y[7]) - exact).abs() / exact;
            assert!(error < 3.0e-6, "2^{x} = {}, {error:e} off", y[7]);
        }
        let least = 1.0 / (1u64 << 60) as f32;
        for (x, expected) in
            [(0.0, 1.0), (-60.01, least), (f32::MIN, least), (f32::NEG_INFINITY, least)]
        {
            let mut y = [x; 8];
            // SAFETY: as above.
            unsafe { eight(&mut y) };
            assert_eq!(y, [expected; 8], "2^{x}");
        }
        let mut y = [f32::NAN; 8];
        // SAFETY: as above.
        unsafe { eight(&mut y) };
        assert!(y[0].is_nan());
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn powers_of_two_of_sixteen_are_those_of_eight() {
        #[target_feature(enable = "avx512f")]
        fn both(x: f32) -> [u32; 2] {
            let (mut y, mut z) = ([x; 16], [x; 8]);
            let (wide, narrow) =
                (pow2_512(crate::lanes::load16(&y)), pow2_256(crate::lanes::load(&z)));
            crate::lanes::store16(&mut y, wide);
            crate::lanes::store(&mut z, narrow);
            [y[15].to_bits(), z[7].to_bits()]
        }
        if Isa::avx512().is_none() {
            return eprintln!("not tested: this CPU has no AVX-512");
        }
        let special = [127.0, -60.0, -60.01, f32::MIN, f32::NEG_INFINITY, -0.0];
        for x in (0..1_000_000).map(|i| -127.0 + i as f32 * (254.0 / 1_000_000.0)).chain(special) {
            // SAFETY: the CPU has what the function needs, `Isa::avx512` has found it.
            let [wide, narrow] = unsafe { both(x) };
            assert_eq!(wide, narrow, "2^{x}");
        }
        // SAFETY: as above.
        let [wide, narrow] = unsafe { both(f32::NAN) }.map(f32::from_bits);
        assert!(wide.is_nan() && narrow.is_nan());
    }

    #[test]
    fn limits_and_special_values_agree() {
        let xs = [
            0.0,
            -0.0,
            LOWEST,
            LOWEST - 1.0e-5,
            -87.4,
            -100.0,
            f32::MIN,
            f32::NEG_INFINITY,
            88.0,
            HIGHEST,
            89.0,
            1.0e4,
            f32::MAX,
            f32::INFINITY,
            f32::NAN,
            -f32::NAN,
            1.0,
            -1.0,
            1.0e-30,
        ];
        for isa in Isa::all() {
            for x in xs {
                let mut y = [x; 9];
                exp(isa, &mut y);
                for y in y {
                    if x.is_nan() {
                        assert!(y.is_nan(), "{isa}: exp({x}) = {y}");
                    } else if x < LOWEST {
                        assert_eq!(y.to_bits(), 0, "{isa}: exp({x}) = {y}");
                    } else {
                        assert!(ulps(x.min(HIGHEST), y) < 2.0, "{isa}: exp({x}) = {y}");
                    }
                }
            }
        }
        assert_entered("avx2::exp");
    }

    #[test]
    fn every_length_and_offset() {
        let Some(isa) = Isa::avx2() else { return };
        for (len, offset) in lengths_and_offsets() {
            let mut x = Guarded::of((0..len).map(|i| i as f32 * 0.37 - 20.0), offset);
            let expected: Vec<f32> = x.iter().map(|&x| scalar::exp1(x)).collect();
            exp(isa, &mut x);
            x.assert_close(&expected, |e| 4.0 * f32::EPSILON * e);
        }
        assert_entered("avx2::exp");
    }
}
