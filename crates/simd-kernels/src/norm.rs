//! RMSNorm: x · weight / sqrt(mean(x²) + eps) (Zhang and Sennrich, 2019).

use crate::isa::{Isa, dispatch};

/// `out[i] = weight[i] · x[i] / sqrt(mean(x²) + eps)`, one row.
///
/// # Panics
/// When the lengths differ.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(
        x.len(),
        weight.len(),
        "rms_norm: x has {} elements, weight {}",
        x.len(),
        weight.len()
    );
    assert_eq!(x.len(), out.len(), "rms_norm: x has {} elements, out {}", x.len(), out.len());
    dispatch!(isa, avx2::rms_norm, scalar::rms_norm, (x, weight, eps, out))
}

/// 1 / sqrt(mean(x²) + eps), from the sum of the squares of `x`. A sum that overflows is computed
/// anew in f64, so that huge finite elements have a finite norm.
#[inline]
pub(crate) fn inverse_rms(x: &[f32], sum_of_squares: f32, eps: f32) -> f32 {
    if sum_of_squares.is_infinite() {
        return inverse_rms_f64(x, eps);
    }
    1.0 / (sum_of_squares / x.len() as f32 + eps).sqrt()
}

#[cold]
fn inverse_rms_f64(x: &[f32], eps: f32) -> f32 {
    let sum: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    (1.0 / (sum / x.len() as f64 + f64::from(eps)).sqrt()) as f32
}

pub(crate) mod scalar {
    use super::inverse_rms;

    pub(crate) fn sum_of_squares(x: &[f32]) -> f32 {
        x.iter().map(|x| x * x).sum()
    }

    pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let factor = inverse_rms(x, sum_of_squares(x), eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * weight;
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2 {
    use super::inverse_rms;
    use crate::lanes::{self, LANES, load, load_tail, store, store_tail};
    use std::arch::x86_64::*;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn sum_of_squares(x: &[f32]) -> f32 {
        let (chunks, tail) = x.as_chunks::<LANES>();
        let (fours, ones) = chunks.as_chunks::<4>();
        let mut sums = [_mm256_setzero_ps(); 4];
        for four in fours {
            for (sum, x) in sums.iter_mut().zip(four) {
                *sum = _mm256_fmadd_ps(load(x), load(x), *sum);
            }
        }
        for x in ones {
            sums[0] = _mm256_fmadd_ps(load(x), load(x), sums[0]);
        }
        let x = load_tail(tail);
        sums[1] = _mm256_fmadd_ps(x, x, sums[1]);
        let [s0, s1, s2, s3] = sums;
        lanes::sum(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let factor = _mm256_set1_ps(inverse_rms(x, sum_of_squares(x), eps));
        let (x, x_tail) = x.as_chunks();
        let (weight, weight_tail) = weight.as_chunks();
        let (out, out_tail) = out.as_chunks_mut();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            store(out, _mm256_mul_ps(_mm256_mul_ps(load(x), factor), load(weight)));
        }
        let scaled = _mm256_mul_ps(load_tail(x_tail), factor);
        store_tail(out_tail, _mm256_mul_ps(scaled, load_tail(weight_tail)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, lengths_and_offsets, noise};
    use crate::isa::witness::assert_entered;
    use proptest::prelude::*;

    const EPS: f32 = 1.0e-6;

    fn exact(x: &[f32], weight: &[f32]) -> Vec<f32> {
        let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        let factor = 1.0 / (squares / x.len() as f64 + f64::from(EPS)).sqrt();
        x.iter().zip(weight).map(|(&x, &w)| (f64::from(x) * factor * f64::from(w)) as f32).collect()
    }

    /// Relative: half of the n roundings of the sum of squares (the root halves them), and four
    /// operations after it.
    fn tolerance(n: usize) -> impl Fn(f32) -> f32 {
        move |e| (n as f32 / 2.0 + 4.0) * f32::EPSILON * e + f32::MIN_POSITIVE
    }

    #[test]
    fn every_length_and_offset() {
        for isa in Isa::all() {
            for (len, offset) in lengths_and_offsets() {
                let input = noise(len, 6);
                let x = Guarded::of(input.iter().copied(), offset);
                let weight = Guarded::of(noise(len, 7), offset ^ 2);
                let mut out = Guarded::output(len, offset ^ 1);
                rms_norm(isa, &x, &weight, EPS, &mut out);
                out.assert_close(&exact(&input, &weight), tolerance(len));
            }
        }
        assert_entered("avx2::rms_norm");
    }

    #[test]
    fn zeros_stay_zeros() {
        for isa in Isa::all() {
            let mut out = [f32::NAN; 19];
            rms_norm(isa, &[0.0; 19], &[1.0; 19], EPS, &mut out);
            assert_eq!(out, [0.0; 19]);
        }
    }

    #[test]
    fn huge_elements_have_a_finite_norm() {
        let x: Vec<f32> = noise(67, 6).iter().map(|x| x * 1.0e37).collect();
        let weight = noise(67, 7);
        for isa in Isa::all() {
            let mut out = Guarded::output(67, 0);
            rms_norm(isa, &x, &weight, EPS, &mut out);
            out.assert_close(&exact(&x, &weight), tolerance(67));
        }
    }

    proptest! {
        #[test]
        fn matches_f64(pairs in prop::collection::vec((-1.0e4f32..1.0e4, -10.0f32..10.0), 1..300)) {
            let (x, weight): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            if let Some(isa) = Isa::avx2() {
                let mut out = Guarded::output(x.len(), x.len() % 8);
                rms_norm(isa, &x, &weight, EPS, &mut out);
                out.assert_close(&exact(&x, &weight), tolerance(x.len()));
            }
        }
    }
}
