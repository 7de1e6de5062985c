//! Softmax of one row, and the pair (max, sum) it is made of.

use crate::exp;
use crate::isa::{Isa, dispatch};

/// `x[i] = e^(x[i] − max) / Σ e^(x[j] − max)`. An empty row stays empty; a row of nothing but −∞ becomes NaN.
pub fn softmax(isa: Isa, x: &mut [f32]) {
    dispatch!(isa, avx2::softmax, scalar::softmax, (x))
}

/// (max, sum) with `max = max x[i]` and `sum = Σ e^(x[i] − max)`, so that `log Σ e^x[i] = max + ln(sum)`.
/// An empty row, and one of nothing but −∞, gives (−∞, 0).
pub fn log_sum_exp(isa: Isa, x: &[f32]) -> (f32, f32) {
    dispatch!(isa, avx2::log_sum_exp, scalar::log_sum_exp, (x))
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

    pub(super) fn log_sum_exp(x: &[f32]) -> (f32, f32) {
        let max = max(x);
        if max == f32::NEG_INFINITY {
            return (max, if x.iter().any(|x| x.is_nan()) { f32::NAN } else { 0.0 });
        }
        (max, x.iter().map(|x| exp1(x - max)).sum())
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

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn log_sum_exp(x: &[f32]) -> (f32, f32) {
        let most = max(x);
        if most == f32::NEG_INFINITY {
            return (most, if x.iter().any(|x| x.is_nan()) { f32::NAN } else { 0.0 });
        }
        let m = _mm256_set1_ps(most);
        let (chunks, tail) = x.as_chunks::<LANES>();
        let (twos, one) = chunks.as_chunks::<2>();
        let mut sums = [_mm256_setzero_ps(); 2];
        for two in twos {
            sums[0] = _mm256_add_ps(sums[0], exp256(_mm256_sub_ps(load(&two[0]), m)));
            sums[1] = _mm256_add_ps(sums[1], exp256(_mm256_sub_ps(load(&two[1]), m)));
        }
        for x in one {
            sums[0] = _mm256_add_ps(sums[0], exp256(_mm256_sub_ps(load(x), m)));
        }
        let e = exp256(_mm256_sub_ps(load_tail(tail), m));
        let e = _mm256_and_ps(e, _mm256_castsi256_ps(first(tail.len())));
        (most, lanes::sum(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), e)))
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

    /// Relative: 2 ulp of the exponential, its argument rounded at up to `range`, n additions, one division.
    fn tolerance(n: usize, range: f32) -> impl Fn(f32) -> f32 {
        move |e| (6.0 + range + n as f32) * f32::EPSILON * e + f32::MIN_POSITIVE
    }

    #[test]
    fn every_length_and_offset() {
        for isa in Isa::all() {
            for (len, offset) in lengths_and_offsets() {
                let input: Vec<f32> = noise(len, 3).iter().map(|x| x * 20.0).collect();
                let mut x = Guarded::of(input.iter().copied(), offset);
                let (max, sum) = log_sum_exp(isa, &x);
                softmax(isa, &mut x);
                x.assert_close(&exact(&input), tolerance(len, 40.0));
                let log: f64 = input.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
                if len == 0 {
                    assert_eq!((max, sum), (f32::NEG_INFINITY, 0.0));
                } else {
                    let found = f64::from(max) + f64::from(sum).ln();
                    assert!((found - log).abs() <= f64::from(tolerance(len, 40.0)(1.0)), "{found}, expected {log}");
                }
            }
        }
        assert_entered("avx2::softmax");
        assert_entered("avx2::log_sum_exp");
    }

    #[test]
    fn rows_without_a_finite_number() {
        for isa in Isa::all() {
            for len in [1, 7, 8, 9, 33] {
                let mut x = vec![f32::NEG_INFINITY; len];
                assert_eq!(log_sum_exp(isa, &x), (f32::NEG_INFINITY, 0.0));
                softmax(isa, &mut x);
                assert!(x.iter().all(|x| x.is_nan()));
                let mut x = vec![f32::NEG_INFINITY; len];
                x[len / 2] = -3.0;
                softmax(isa, &mut x);
                for (i, &x) in x.iter().enumerate() {
                    assert_eq!(x, if i == len / 2 { 1.0 } else { 0.0 });
                }
                x[len - 1] = f32::NAN;
                assert!(log_sum_exp(isa, &x).1.is_nan());
                assert!(log_sum_exp(isa, &vec![f32::NAN; len]).1.is_nan());
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
