//! SwiGLU: silu(gate) · up; and the gate of an attention output, sigmoid(gate) · x.

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::gated256;

use crate::isa::{Isa, dispatch};

/// `out[i] = gate[i] / (1 + e^(−gate[i])) · up[i]`.
///
/// # Panics
/// When the lengths differ.
pub fn swiglu(isa: Isa, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert_eq!(gate.len(), up.len(), "swiglu: gate has {} elements, up {}", gate.len(), up.len());
    assert_eq!(
        gate.len(),
        out.len(),
        "swiglu: gate has {} elements, out {}",
        gate.len(),
        out.len()
    );
    dispatch!(isa, avx2::swiglu, scalar::swiglu, (gate, up, out))
}

/// `x[i] = x[i] / (1 + e^(−gate[i]))`.
///
/// # Panics
/// When the lengths differ.
pub fn sigmoid_gate(isa: Isa, gate: &[f32], x: &mut [f32]) {
    assert_eq!(
        gate.len(),
        x.len(),
        "sigmoid_gate: gate has {} elements, x {}",
        gate.len(),
        x.len()
    );
    dispatch!(isa, avx2::sigmoid_gate, scalar::sigmoid_gate, (gate, x))
}

pub(crate) mod scalar {
    use crate::exp::scalar::exp1;

    pub(super) fn sigmoid_gate(gate: &[f32], x: &mut [f32]) {
        for (x, &gate) in x.iter_mut().zip(gate) {
            *x /= 1.0 + exp1(-gate);
        }
    }

    /// silu(gate) · up.
    pub(crate) fn gated1(gate: f32, up: f32) -> f32 {
        gate / (1.0 + exp1(-gate)) * up
    }

    pub(super) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = gated1(gate, up);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use crate::exp::exp256;
    use crate::lanes::{load, load_tail, store, store_tail};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
        let (gate, gate_tail) = gate.as_chunks();
        let (up, up_tail) = up.as_chunks();
        let (out, out_tail) = out.as_chunks_mut();
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            store(out, gated256(load(gate), load(up)));
        }
        store_tail(out_tail, gated256(load_tail(gate_tail), load_tail(up_tail)));
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn sigmoid_gate(gate: &[f32], x: &mut [f32]) {
        let (gate, gate_tail) = gate.as_chunks();
        let (x, x_tail) = x.as_chunks_mut();
        for (x, gate) in x.iter_mut().zip(gate) {
            store(x, sigmoid256(load(gate), load(x)));
        }
        store_tail(x_tail, sigmoid256(load_tail(gate_tail), load_tail(x_tail)));
    }

    /// x · sigmoid(gate) in each lane.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sigmoid256(gate: __m256, x: __m256) -> __m256 {
        let e = exp256(_mm256_sub_ps(_mm256_setzero_ps(), gate));
        _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0), e))
    }

    /// silu(gate) · up in each lane.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn gated256(gate: __m256, up: __m256) -> __m256 {
        let e = exp256(_mm256_sub_ps(_mm256_setzero_ps(), gate));
        let silu = _mm256_div_ps(gate, _mm256_add_ps(_mm256_set1_ps(1.0), e));
        _mm256_mul_ps(silu, up)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, lengths_and_offsets, noise};
    use crate::isa::witness::assert_entered;
    use proptest::prelude::*;

    fn exact(gate: &[f32], up: &[f32]) -> Vec<f32> {
        let silu = |g: f64| g / (1.0 + (-g).exp());
        gate.iter().zip(up).map(|(&g, &u)| (silu(g.into()) * f64::from(u)) as f32).collect()
    }

    /// 2 ulp of the exponential and one rounding each of sum, quotient and product.
    fn tolerance(e: f32) -> f32 {
        4.0 * f32::EPSILON * e + f32::MIN_POSITIVE
    }

    #[test]
    fn every_length_and_offset() {
        for isa in Isa::all() {
            for (len, offset) in lengths_and_offsets() {
                let gate = Guarded::of(noise(len, 4).iter().map(|x| x * 30.0), offset);
                let up = Guarded::of(noise(len, 5), offset ^ 2);
                let mut out = Guarded::output(len, offset ^ 1);
                swiglu(isa, &gate, &up, &mut out);
                out.assert_close(&exact(&gate, &up), tolerance);
            }
        }
        assert_entered("avx2::swiglu");
    }

    #[test]
    fn sigmoids_of_every_length_and_offset() {
        for isa in Isa::all() {
            for (len, offset) in lengths_and_offsets() {
                let gate = Guarded::of(noise(len, 6).iter().map(|x| x * 30.0), offset);
                let values = noise(len, 7);
                let mut x = Guarded::of(values.iter().copied(), offset ^ 1);
                sigmoid_gate(isa, &gate, &mut x);
                let exact: Vec<_> = gate
                    .iter()
                    .zip(&values)
                    .map(|(&gate, &x)| (f64::from(x) / (1.0 + (-f64::from(gate)).exp())) as f32)
                    .collect();
                x.assert_close(&exact, tolerance);
            }
        }
        assert_entered("avx2::sigmoid_gate");
    }

    #[test]
    fn large_gates_saturate() {
        for isa in Isa::all() {
            let mut out = [f32::NAN; 4];
            swiglu(isa, &[-1.0e4, -89.0, 89.0, 1.0e4], &[1.0; 4], &mut out);
            assert!(out[0].abs() < 1.0e-30 && out[1].abs() < 1.0e-30, "{out:?}");
            assert_eq!(&out[2..], [89.0, 1.0e4]);
            swiglu(isa, &[f32::NAN; 4], &[1.0; 4], &mut out);
            assert!(out.iter().all(|x| x.is_nan()));
        }
    }

    proptest! {
        #[test]
        fn matches_f64(pairs in prop::collection::vec((-80.0f32..80.0, -1.0e3f32..1.0e3), 0..200)) {
            let (gate, up): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            if let Some(isa) = Isa::avx2() {
                let mut out = Guarded::output(gate.len(), gate.len() % 8);
                swiglu(isa, &gate, &up, &mut out);
                out.assert_close(&exact(&gate, &up), tolerance);
            }
        }
    }
}
