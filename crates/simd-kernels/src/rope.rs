//! Rotary positions (Su et al., 2021), halves rotated against each other as in Hugging Face's
//! Qwen3, alone and fused with the per-head RMSNorm that comes before.

use crate::isa::{Isa, dispatch};

/// Rotates one head in place: with h = head_dim / 2, the pair `(head[i], head[h + i])` turns by the
/// angle of `cos[i]`, `sin[i]`.
///
/// head: `[head_dim]`, cos and sin: `[head_dim / 2]`.
///
/// # Panics
/// When the lengths do not fit.
pub fn rope(isa: Isa, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    assert_eq!(
        head.len(),
        2 * cos.len(),
        "rope: head has {} elements, cos {}",
        head.len(),
        cos.len()
    );
    assert_eq!(cos.len(), sin.len(), "rope: cos has {} elements, sin {}", cos.len(), sin.len());
    dispatch!(isa, avx2::rope, scalar::rope, (head, cos, sin))
}

/// RMSNorm over each head, then [`rope`], for all the heads of one token: one pass where two calls
/// a head make two.
///
/// heads: `[heads, head_dim]`, weight: `[head_dim]`, cos and sin: `[head_dim / 2]`.
///
/// # Panics
/// When the lengths do not fit.
pub fn norm_rope(isa: Isa, heads: &mut [f32], weight: &[f32], eps: f32, cos: &[f32], sin: &[f32]) {
    assert_eq!(
        weight.len(),
        2 * cos.len(),
        "norm_rope: weight has {} elements, cos {}",
        weight.len(),
        cos.len()
    );
    assert_eq!(
        cos.len(),
        sin.len(),
        "norm_rope: cos has {} elements, sin {}",
        cos.len(),
        sin.len()
    );
    if weight.is_empty() {
        assert!(heads.is_empty(), "norm_rope: {} elements in heads of size 0", heads.len());
        return;
    }
    assert_eq!(
        heads.len() % weight.len(),
        0,
        "norm_rope: {} elements in heads of {}",
        heads.len(),
        weight.len()
    );
    dispatch!(isa, avx2::norm_rope, scalar::norm_rope, (heads, weight, eps, cos, sin))
}

mod scalar {
    use crate::norm::{inverse_rms, scalar::sum_of_squares};

    pub(super) fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
        let (low, high) = head.split_at_mut(cos.len());
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }

    pub(super) fn norm_rope(heads: &mut [f32], weight: &[f32], eps: f32, cos: &[f32], sin: &[f32]) {
        for head in heads.chunks_exact_mut(weight.len()) {
            let factor = inverse_rms(head, sum_of_squares(head), eps);
            head.iter_mut().zip(weight).for_each(|(x, w)| *x *= factor * w);
            rope(head, cos, sin);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use crate::lanes::{load, load_tail, store, store_tail};
    use crate::norm::{avx2::sum_of_squares, inverse_rms};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
        rotate(head, cos, sin, |low, high, _| (low, high));
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn norm_rope(heads: &mut [f32], weight: &[f32], eps: f32, cos: &[f32], sin: &[f32]) {
        let (w_low, w_high) = weight.split_at(cos.len());
        let (w_low, w_low_tail) = w_low.as_chunks();
        let (w_high, w_high_tail) = w_high.as_chunks();
        for head in heads.chunks_exact_mut(weight.len()) {
            let factor = _mm256_set1_ps(inverse_rms(head, sum_of_squares(head), eps));
            rotate(head, cos, sin, |low, high, i| {
                let (w_low, w_high) = if i < w_low.len() {
                    (load(&w_low[i]), load(&w_high[i]))
                } else {
                    (load_tail(w_low_tail), load_tail(w_high_tail))
                };
                let low = _mm256_mul_ps(_mm256_mul_ps(low, factor), w_low);
                let high = _mm256_mul_ps(_mm256_mul_ps(high, factor), w_high);
                (low, high)
            });
        }
    }

    /// Turns the pairs of a head after `before(low, high, i)` has seen the i-th vector of each
    /// half.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn rotate(
        head: &mut [f32],
        cos: &[f32],
        sin: &[f32],
        before: impl Fn(__m256, __m256, usize) -> (__m256, __m256),
    ) {
        let turn = |low, high, cos, sin, i| {
            let (low, high) = before(low, high, i);
            let new_low = _mm256_fmsub_ps(low, cos, _mm256_mul_ps(high, sin));
            let new_high = _mm256_fmadd_ps(high, cos, _mm256_mul_ps(low, sin));
            (new_low, new_high)
        };
        let (low, high) = head.split_at_mut(cos.len());
        let (low, low_tail) = low.as_chunks_mut();
        let (high, high_tail) = high.as_chunks_mut();
        let (cos, cos_tail) = cos.as_chunks();
        let (sin, sin_tail) = sin.as_chunks();
        for (i, (((low, high), cos), sin)) in low.iter_mut().zip(high).zip(cos).zip(sin).enumerate()
        {
            let (new_low, new_high) = turn(load(low), load(high), load(cos), load(sin), i);
            store(low, new_low);
            store(high, new_high);
        }
        let (new_low, new_high) = turn(
            load_tail(low_tail),
            load_tail(high_tail),
            load_tail(cos_tail),
            load_tail(sin_tail),
            cos.len(),
        );
        store_tail(low_tail, new_low);
        store_tail(high_tail, new_high);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, lengths_and_offsets, noise};
    use crate::isa::witness::assert_entered;
    use proptest::prelude::*;

    fn angles(half: usize, position: f32) -> (Vec<f32>, Vec<f32>) {
        (0..half).map(|i| (position * 0.7f32.powi(i as i32)).sin_cos()).map(|(s, c)| (c, s)).unzip()
    }

    fn exact(head: &[f32], cos: &[f32], sin: &[f32]) -> Vec<f32> {
        let half = cos.len();
        (0..2 * half)
            .map(|i| {
                let (c, s) = (f64::from(cos[i % half]), f64::from(sin[i % half]));
                let other = f64::from(head[(i + half) % (2 * half)]);
                let turned = if i < half { -other } else { other };
                (f64::from(head[i]) * c + turned * s) as f32
            })
            .collect()
    }

    fn exact_norm(head: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
        let squares: f64 = head.iter().map(|&x| f64::from(x).powi(2)).sum();
        let factor = 1.0 / (squares / head.len() as f64 + f64::from(eps)).sqrt();
        head.iter()
            .zip(weight)
            .map(|(&x, &w)| (f64::from(x) * factor * f64::from(w)) as f32)
            .collect()
    }

    /// A rotation mixes two values of at most `size`: three roundings of that size.
    fn tolerance(size: f32) -> impl Fn(f32) -> f32 {
        move |_| 3.0 * f32::EPSILON * size
    }

    #[test]
    fn every_length_and_offset() {
        for isa in Isa::all() {
            for (half, offset) in lengths_and_offsets() {
                let (cos, sin) = angles(half, 5.0);
                let (cos, sin) = (Guarded::of(cos, offset ^ 1), Guarded::of(sin, offset ^ 2));
                let input = noise(2 * half, 9);
                let mut head = Guarded::of(input.iter().copied(), offset);
                rope(isa, &mut head, &cos, &sin);
                head.assert_close(&exact(&input, &cos, &sin), tolerance(1.5));

                let weight = Guarded::of(noise(2 * half, 10), offset ^ 3);
                let input = noise(6 * half, 11);
                let mut heads = Guarded::of(input.iter().copied(), offset);
                norm_rope(isa, &mut heads, &weight, 1.0e-6, &cos, &sin);
                let mut expected = Vec::new();
                for head in input.chunks_exact((2 * half).max(1)) {
                    expected.extend(exact(&exact_norm(head, &weight, 1.0e-6), &cos, &sin));
                }
                // Normalized values are below sqrt(2 half), and the norm adds half of 2 half
                // roundings.
                let size = (2.0 * half as f32).sqrt();
                heads.assert_close(&expected, tolerance((half as f32 + 4.0) * size));
            }
        }
        assert_entered("avx2::rope");
        assert_entered("avx2::norm_rope");
    }

    #[test]
    fn a_quarter_turn_swaps_the_halves() {
        for isa in Isa::all() {
            let mut head: Vec<f32> = (0..22).map(|i| i as f32).collect();
            rope(isa, &mut head, &[0.0; 11], &[1.0; 11]);
            let expected: Vec<f32> =
                (11..22).map(|i| -(i as f32)).chain((0..11).map(|i| i as f32)).collect();
            assert_eq!(head, expected);
        }
    }

    proptest! {
        #[test]
        fn matches_f64(head in prop::collection::vec(-100.0f32..100.0, 0..150), position in 0.0f32..40000.0) {
            let half = head.len() / 2;
            let head = &head[..2 * half];
            let (cos, sin) = angles(half, position);
            if let Some(isa) = Isa::avx2() {
                let mut turned = Guarded::of(head.iter().copied(), half % 8);
                rope(isa, &mut turned, &cos, &sin);
                turned.assert_close(&exact(head, &cos, &sin), tolerance(150.0));
            }
        }
    }
}
