//! Causal depthwise convolution, followed by SiLU.

use crate::isa::{Isa, dispatch};

/// `out[t][c] = silu(Σₖ weights[k][c] · window[t + k][c])`: each channel of a token is convolved
/// with the same channel of the `taps - 1` tokens before it.
///
/// weights [taps, width], the last row for the token itself; window [taps − 1 + tokens, width], the
/// rows before the first token first; out [tokens, width]. The bits of a token do not depend on the
/// other tokens of the call.
///
/// # Panics
/// When a length does not fit the others.
pub fn causal_conv_silu(isa: Isa, weights: &[f32], window: &[f32], width: usize, out: &mut [f32]) {
    if width == 0 {
        return;
    }
    let (taps, tokens) = (weights.len() / width, out.len() / width);
    assert!(
        taps > 0
            && [weights.len(), out.len()] == [taps * width, tokens * width]
            && window.len() == (taps - 1 + tokens) * width,
        "causal_conv_silu: weights of {}, window of {} and out of {} elements at width {width}",
        weights.len(),
        window.len(),
        out.len()
    );
    dispatch!(isa, avx2::causal_conv_silu, scalar::causal_conv_silu, (weights, window, width, out))
}

mod scalar {
    use crate::swiglu::scalar::gated1;

    pub(super) fn causal_conv_silu(weights: &[f32], window: &[f32], width: usize, out: &mut [f32]) {
        for (token, out) in out.chunks_exact_mut(width).enumerate() {
            for (channel, out) in out.iter_mut().enumerate() {
                let rows = window[token * width..].chunks_exact(width);
                let pairs = weights.chunks_exact(width).zip(rows);
                let sum = pairs.fold(0.0f32, |sum, (weights, row)| {
                    weights[channel].mul_add(row[channel], sum)
                });
                *out = gated1(sum, 1.0);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use crate::lanes::{load, load_tail, store, store_tail};
    use crate::swiglu::gated256;
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn causal_conv_silu(weights: &[f32], window: &[f32], width: usize, out: &mut [f32]) {
        for (token, out) in out.chunks_exact_mut(width).enumerate() {
            let rows = || window[token * width..].chunks_exact(width);
            let (blocks, tail) = out.as_chunks_mut::<8>();
            let whole = blocks.len();
            for (block, out) in blocks.iter_mut().enumerate() {
                let mut sum = _mm256_setzero_ps();
                for (weights, row) in weights.chunks_exact(width).zip(rows()) {
                    let (weights, row) = (weights.as_chunks().0, row.as_chunks().0);
                    sum = _mm256_fmadd_ps(load(&weights[block]), load(&row[block]), sum);
                }
                store(out, gated256(sum, _mm256_set1_ps(1.0)));
            }
            if tail.is_empty() {
                continue;
            }
            let mut sum = _mm256_setzero_ps();
            for (weights, row) in weights.chunks_exact(width).zip(rows()) {
                let (weights, row) = (&weights[whole * 8..], &row[whole * 8..]);
                sum = _mm256_fmadd_ps(load_tail(weights), load_tail(row), sum);
            }
            store_tail(tail, gated256(sum, _mm256_set1_ps(1.0)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, noise};
    use crate::isa::witness::assert_entered;
    use proptest::prelude::*;

    fn exact(weights: &[f32], window: &[f32], width: usize, tokens: usize) -> Vec<f32> {
        let taps = weights.len() / width;
        let element = |token: usize, channel: usize| {
            let at = |x: &[f32], row: usize| f64::from(x[row * width + channel]);
            let sum: f64 = (0..taps).map(|tap| at(weights, tap) * at(window, token + tap)).sum();
            (sum / (1.0 + (-sum).exp())) as f32
        };
        (0..tokens)
            .flat_map(|t| (0..width).map(move |c| (t, c)))
            .map(|(t, c)| element(t, c))
            .collect()
    }

    proptest! {
        #[test]
        fn every_instruction_set_follows_the_formula(
            (taps, tokens, width) in (1usize..6, 0usize..9, 1usize..40),
            seed in 0u64..1000,
        ) {
            let weights = Guarded::of(noise(taps * width, seed), 1);
            let window = Guarded::of(noise((taps - 1 + tokens) * width, seed + 1), 2);
            let exact = exact(&weights, &window, width, tokens);
            for isa in Isa::all() {
                let mut out = Guarded::output(tokens * width, 3);
                causal_conv_silu(isa, &weights, &window, width, &mut out);
                out.assert_close(&exact, |x| 1e-6 * x + 1e-6);
                // Token by token, bit for bit.
                for (token, expected) in out.chunks(width).enumerate() {
                    let mut alone = Guarded::output(width, 0);
                    let rows = token * width..(token + taps) * width;
                    causal_conv_silu(isa, &weights, &window[rows], width, &mut alone);
                    prop_assert_eq!(&*alone, expected);
                }
            }
            if tokens > 0 {
                assert_entered("avx2::causal_conv_silu");
            }
        }
    }
}
