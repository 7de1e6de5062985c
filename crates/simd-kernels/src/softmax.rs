//! Softmax of one row.

use crate::exp;
use crate::isa::{Isa, dispatch};

/// `x[i] = e^(x[i] − max) / Σ e^(x[j] − max)`. An empty row stays empty; a row with a NaN, or of
/// nothing but −∞, becomes NaN.
pub fn softmax(isa: Isa, x: &mut [f32]) {
    dispatch!(isa, avx2::softmax, scalar::softmax, (x))
}

mod scalar {
    use super::exp::scalar::exp1;

    fn max(x: &[f32]) -> f32 {
        x.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    pub(super) fn softmax(x: &mut [f32]) {
        let max = max(x);
        let mut sum = 0.0;
        for x in x.iter_mut() {
            *x = exp1(*x - max);
            sum += *x;
        }
        x.iter_mut().for_each(|x| *x /= sum);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::exp::exp256;
    use crate::lanes::{self, LANES, first, load, load_tail, store, store_tail};
    use std::arch::x86_64::*;

    /// The largest number; NaN is passed over.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn max(x: &[f32]) -> f32 {
        let (chunks, tail) = x.as_chunks::<LANES>();
        let mut m = [_mm256_set1_ps(f32::NEG_INFINITY); 2];
        let (twos, one) = chunks.as_chunks::<2>();
        for two in twos {
            m[0] = _mm256_max_ps(load(&two[0]), m[0]);
            m[1] = _mm256_max_ps(load(&two[1]), m[1]);
        }
        for x in one {
            m[0] = _mm256_max_ps(load(x), m[0]);
        }
        let most = lanes::max(_mm256_max_ps(m[0], m[1]));
        tail.iter().copied().fold(most, f32::max)
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn softmax(x: &mut [f32]) {
        let most = _mm256_set1_ps(max(x));
        let (chunks, tail) = x.as_chunks_mut::<LANES>();
        let mut sums = _mm256_setzero_ps();
        for x in chunks.iter_mut() {
            let e = exp256(_mm256_sub_ps(load(x), most));
            sums = _mm256_add_ps(sums, e);
            store(x, e);
        }
        let e = exp256(_mm256_sub_ps(load_tail(tail), most));
        let e = _mm256_and_ps(e, _mm256_castsi256_ps(first(tail.len())));
        let factor = _mm256_set1_ps(1.0 / lanes::sum(_mm256_add_ps(sums, e)));
        for x in chunks {
            store(x, _mm256_mul_ps(load(x), factor));
        }
        store_tail(tail, _mm256_mul_ps(e, factor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, lengths_and_offsets, noise};
    use crate::isa::witness::assert_entered;
    use proptest::prelude::*;

    /// Softmax in f64.
    fn exact(x: &[f32]) -> Vec<f32> {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let e: Vec<f64> = x.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.iter().map(|e| (e / sum) as f32).collect()
    }

    /// Relative: 2 ulp of the exponential, its argument rounded at up to `range`, n additions, one
    /// division.
    fn tolerance(n: usize, range: f32) -> impl Fn(f32) -> f32 {
        move |e| (6.0 + range + n as f32) * f32::EPSILON * e + f32::MIN_POSITIVE
    }

    #[test]
    fn every_length_and_offset() {
        for isa in Isa::all() {
            for (len, offset) in lengths_and_offsets() {
                let input: Vec<f32> = noise(len, 3).iter().map(|x| x * 20.0).collect();
                let mut x = Guarded::of(input.iter().copied(), offset);
                softmax(isa, &mut x);
                x.assert_close(&exact(&input), tolerance(len, 40.0));
            }
        }
        assert_entered("avx2::softmax");
    }

    #[test]
    fn rows_of_infinities_and_nan() {
        for isa in Isa::all() {
            for len in [1, 7, 8, 9, 33] {
                let mut x = vec![f32::NEG_INFINITY; len];
                softmax(isa, &mut x);
                assert!(x.iter().all(|x| x.is_nan()));
                let mut x = vec![f32::NEG_INFINITY; len];
                x[len / 2] = -3.0;
                softmax(isa, &mut x);
                for (i, &x) in x.iter().enumerate() {
                    assert_eq!(x, if i == len / 2 { 1.0 } else { 0.0 });
                }
                x[len - 1] = f32::NAN;
                softmax(isa, &mut x);
                assert!(x.iter().all(|x| x.is_nan()));
            }
        }
    }

    proptest! {
        #[test]
        fn matches_f64(x in prop::collection::vec(-80.0f32..80.0, 1..300)) {
            if let Some(isa) = Isa::avx2() {
                let mut y = Guarded::of(x.iter().copied(), x.len() % 8);
                softmax(isa, &mut y);
                y.assert_close(&exact(&x), tolerance(x.len(), 160.0));
            }
        }
    }
}
