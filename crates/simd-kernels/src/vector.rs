//! Vectors: dot product, sums, the largest element.

use crate::isa::{Isa, dispatch};

/// `Σ a[i] b[i]`.
///
/// # Panics
/// When the lengths differ.
pub fn dot(isa: Isa, a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot: {} and {} elements", a.len(), b.len());
    dispatch!(isa, avx2::dot, scalar::dot, (a, b))
}

/// `x[i] += y[i]`.
///
/// # Panics
/// When the lengths differ.
pub fn add(isa: Isa, x: &mut [f32], y: &[f32]) {
    scale_add(isa, x, 1.0, y);
}

/// `x[i] += s y[i]`.
///
/// # Panics
/// When the lengths differ.
pub fn scale_add(isa: Isa, x: &mut [f32], s: f32, y: &[f32]) {
    assert_eq!(x.len(), y.len(), "scale_add: {} and {} elements", x.len(), y.len());
    dispatch!(isa, avx2::scale_add, scalar::scale_add, (x, s, y))
}

/// `x[i] *= s`.
pub fn scale(isa: Isa, x: &mut [f32], s: f32) {
    dispatch!(isa, avx2::scale, scalar::scale, (x, s))
}

/// The index of the largest element, the first of equals. NaN never wins; `None` when there is no
/// number.
pub fn argmax(isa: Isa, x: &[f32]) -> Option<usize> {
    dispatch!(isa, avx2::argmax, scalar::argmax, (x))
}

mod scalar {
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    pub(super) fn scale_add(x: &mut [f32], s: f32, y: &[f32]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += s * y);
    }

    pub(super) fn scale(x: &mut [f32], s: f32) {
        x.iter_mut().for_each(|x| *x *= s);
    }

    pub(super) fn argmax(x: &[f32]) -> Option<usize> {
        let mut best = None;
        for (i, &value) in x.iter().enumerate() {
            if !value.is_nan() && best.is_none_or(|b: usize| value > x[b]) {
                best = Some(i);
            }
        }
        best
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use crate::lanes::{LANES, load, load_tail, max, store, store_tail, sum};
    use std::arch::x86_64::*;

    /// Four independent sums hide the latency of the additions.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        let (a, a_tail) = a.as_chunks::<LANES>();
        let (b, b_tail) = b.as_chunks::<LANES>();
        let (a4, a1) = a.as_chunks::<4>();
        let (b4, b1) = b.as_chunks::<4>();
        let mut sums = [_mm256_setzero_ps(); 4];
        for (a, b) in a4.iter().zip(b4) {
            for i in 0..4 {
                sums[i] = _mm256_fmadd_ps(load(&a[i]), load(&b[i]), sums[i]);
            }
        }
        for (a, b) in a1.iter().zip(b1) {
            sums[0] = _mm256_fmadd_ps(load(a), load(b), sums[0]);
        }
        sums[1] = _mm256_fmadd_ps(load_tail(a_tail), load_tail(b_tail), sums[1]);
        let [s0, s1, s2, s3] = sums;
        sum(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn scale_add(x: &mut [f32], s: f32, y: &[f32]) {
        let s = _mm256_set1_ps(s);
        let (x, x_tail) = x.as_chunks_mut();
        let (y, y_tail) = y.as_chunks();
        for (x, y) in x.iter_mut().zip(y) {
            store(x, _mm256_fmadd_ps(s, load(y), load(x)));
        }
        store_tail(x_tail, _mm256_fmadd_ps(s, load_tail(y_tail), load_tail(x_tail)));
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn scale(x: &mut [f32], s: f32) {
        let s = _mm256_set1_ps(s);
        let (x, tail) = x.as_chunks_mut();
        for x in x {
            store(x, _mm256_mul_ps(s, load(x)));
        }
        store_tail(tail, _mm256_mul_ps(s, load_tail(tail)));
    }

    /// Two passes, the second only up to the first place of the maximum: cheaper than carrying
    /// indices along.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn argmax(x: &[f32]) -> Option<usize> {
        let (chunks, tail) = x.as_chunks::<LANES>();
        let (fours, ones) = chunks.as_chunks::<4>();
        // max(x, m) is m where x is NaN.
        let mut best = [_mm256_set1_ps(f32::NEG_INFINITY); 4];
        for four in fours {
            for (best, x) in best.iter_mut().zip(four) {
                *best = _mm256_max_ps(load(x), *best);
            }
        }
        for x in ones {
            best[0] = _mm256_max_ps(load(x), best[0]);
        }
        let [b0, b1, b2, b3] = best;
        let most = max(_mm256_max_ps(_mm256_max_ps(b0, b1), _mm256_max_ps(b2, b3)));
        let most = tail.iter().fold(most, |most, &x| if x > most { x } else { most });
        let wanted = _mm256_set1_ps(most);
        for (i, x) in chunks.iter().enumerate() {
            let equal = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(load(x), wanted));
            if equal != 0 {
                return Some(i * LANES + equal.trailing_zeros() as usize);
            }
        }
        let in_tail = tail.iter().position(|&x| x == most);
        in_tail.map(|i| chunks.len() * LANES + i)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, lengths_and_offsets, noise};
    use crate::isa::witness::assert_entered;
    use proptest::prelude::*;

    /// Both orders of summation err by at most this: n products and n additions, each off by half
    /// an ulp.
    fn dot_tolerance(a: &[f32], b: &[f32]) -> f32 {
        let size: f32 = a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum();
        (a.len() as f32 + 1.0) * f32::EPSILON * size
    }

    fn check_dot(isa: Isa, a: &[f32], b: &[f32]) {
        let expected = dot(Isa::scalar(), a, b);
        let found = dot(isa, a, b);
        let allowed = dot_tolerance(a, b);
        assert!(
            (found - expected).abs() <= allowed,
            "{found}, expected {expected} within {allowed:e}"
        );
    }

    #[test]
    fn every_length_and_offset() {
        let Some(isa) = Isa::avx2() else { return };
        for (len, offset) in lengths_and_offsets() {
            let y = Guarded::of(noise(len, 1), offset);
            let start = noise(len, 2);
            check_dot(isa, &y, &start);

            let mut expected = start.clone();
            scale_add(Isa::scalar(), &mut expected, -0.7, &y);
            let mut x = Guarded::of(start.iter().copied(), offset ^ 1);
            scale_add(isa, &mut x, -0.7, &y);
            x.assert_close(&expected, |e| 2.0 * f32::EPSILON * (e + 1.0));

            let mut expected = start.clone();
            add(Isa::scalar(), &mut expected, &y);
            let mut x = Guarded::of(start.iter().copied(), offset);
            add(isa, &mut x, &y);
            x.assert_close(&expected, |_| 0.0);

            let mut x = Guarded::of(start.iter().copied(), offset);
            scale(isa, &mut x, 1.7);
            x.assert_close(&start.iter().map(|x| x * 1.7).collect::<Vec<_>>(), |_| 0.0);

            assert_eq!(argmax(isa, &y), argmax(Isa::scalar(), &y), "{len} elements");
        }
        for name in ["avx2::dot", "avx2::scale_add", "avx2::scale", "avx2::argmax"] {
            assert_entered(name);
        }
    }

    #[test]
    fn argmax_takes_the_first_number() {
        let (inf, nan) = (f32::NEG_INFINITY, f32::NAN);
        for isa in Isa::all() {
            assert_eq!(argmax(isa, &[]), None);
            assert_eq!(argmax(isa, &[nan; 11]), None);
            assert_eq!(argmax(isa, &[inf; 11]), Some(0));
            assert_eq!(argmax(isa, &[nan, inf, nan, 2.0, 1.0, 2.0, nan, 0.0, nan, 2.0]), Some(3));
            let mut x = vec![nan; 40];
            x[33] = inf;
            assert_eq!(argmax(isa, &x), Some(33));
            x[39] = -5.0;
            assert_eq!(argmax(isa, &x), Some(39));
        }
    }

    proptest! {
        #[test]
        fn dot_matches_scalar(pairs in prop::collection::vec((-1.0e3f32..1.0e3, -1.0e3f32..1.0e3), 0..400)) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            if let Some(isa) = Isa::avx2() {
                check_dot(isa, &a, &b);
            }
        }

        #[test]
        fn argmax_matches_scalar(x in prop::collection::vec(-4i8..4, 0..300)) {
            let x: Vec<f32> = x.into_iter().map(|x| if x == -4 { f32::NAN } else { f32::from(x) }).collect();
            if let Some(isa) = Isa::avx2() {
                prop_assert_eq!(argmax(isa, &x), argmax(Isa::scalar(), &x));
            }
        }
    }
}
