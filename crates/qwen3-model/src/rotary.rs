//! Cosines and sines of rotary positions, as Hugging Face transformers computes them in f32.

use tensor::Activations;

use crate::rope_config::{RopeConfig, RopeScaling, Yarn};

/// The frequencies of a model's rotary positions.
///
/// The formulas are those of `_compute_default_rope_parameters` and `_compute_yarn_parameters` in
/// transformers' `modeling_rope_utils.py`, in the same order and precision (f32 tensors, f64
/// scalars): an angle at position 40,000 has an f32 error of 0.002, so a more precise frequency
/// would be a different model.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryTable {
    /// `[head_dim / 2]`
    inv_freq: Vec<f32>,
    /// Pairs that positions rotate; the frequencies after them are 0.
    rotated: usize,
    /// Multiplies cosines and sines of the rotated pairs.
    attention_factor: f32,
}

impl RotaryTable {
    /// Frequencies for heads of `head_dim` elements. Where positions rotate only a part of a head,
    /// the pairs beyond it have frequency 0.
    ///
    /// # Panics
    /// When `head_dim` is odd.
    pub fn new(config: &RopeConfig, head_dim: usize) -> Self {
        assert!(head_dim.is_multiple_of(2), "head_dim is {head_dim}, expected an even number");
        let dim = config.rotary_dim(head_dim);
        let (mut inv_freq, attention_factor): (Vec<f32>, _) = match &config.scaling {
            RopeScaling::Default => {
                (wavelengths(config.theta, dim).map(|length| 1.0 / length).collect(), 1.0)
            }
            RopeScaling::Yarn(yarn) => {
                (yarn_frequencies(config.theta, yarn, dim), yarn.attention_factor as f32)
            }
        };
        let rotated = inv_freq.len();
        inv_freq.resize(head_dim / 2, 0.0);
        Self { inv_freq, rotated, attention_factor }
    }

    /// Radians a position, `[head_dim / 2]`.
    pub fn frequencies(&self) -> &[f32] {
        &self.inv_freq
    }

    /// Cosines and sines, each `[positions, head_dim / 2]`.
    pub fn rows(&self, positions: &[usize]) -> (Activations, Activations) {
        let shape = (positions.len(), self.inv_freq.len());
        let (mut cos, mut sin) = (Activations::zeros(shape), Activations::zeros(shape));
        self.fill(positions, &mut cos, &mut sin);
        (cos, sin)
    }

    /// As [`RotaryTable::rows`], into existing arrays.
    ///
    /// # Panics
    ///
    /// If their shape is not `[positions, head_dim / 2]`.
    pub fn fill(&self, positions: &[usize], cos: &mut Activations, sin: &mut Activations) {
        let shape = (positions.len(), self.inv_freq.len());
        assert_eq!(
            (cos.dim(), sin.dim()),
            (shape, shape),
            "shapes of cos and sin, expected {shape:?}"
        );
        for ((&position, mut cos), mut sin) in
            positions.iter().zip(cos.rows_mut()).zip(sin.rows_mut())
        {
            for (pair, &frequency) in self.inv_freq.iter().enumerate() {
                let (sine, cosine) = (position as f32 * frequency).sin_cos();
                let factor = if pair < self.rotated { self.attention_factor } else { 1.0 };
                (cos[pair], sin[pair]) = (cosine * factor, sine * factor);
            }
        }
    }
}

/// `theta ** (arange(0, head_dim, 2) / head_dim)` in f32, correctly rounded.
fn wavelengths(theta: f64, head_dim: usize) -> impl Iterator<Item = f32> {
    let base = f64::from(theta as f32);
    (0..head_dim / 2)
        .map(move |pair| base.powf(f64::from((2 * pair) as f32 / head_dim as f32)) as f32)
}

/// Fast dimensions keep their frequency, slow ones are divided by the factor, and a ramp lies
/// between them.
fn yarn_frequencies(theta: f64, yarn: &Yarn, head_dim: usize) -> Vec<f32> {
    let (low, high) = correction_range(theta, yarn, head_dim);
    let (low, span) = (low as f32, (high - low) as f32);
    let factor = yarn.factor as f32;
    wavelengths(theta, head_dim)
        .enumerate()
        .map(|(pair, length)| {
            let ramp = ((pair as f32 - low) / span).clamp(0.0, 1.0);
            let kept = 1.0 - ramp;
            let (extrapolated, interpolated) = (1.0 / length, 1.0 / (factor * length));
            interpolated * (1.0 - kept) + extrapolated * kept
        })
        .collect()
}

/// The pairs between which the ramp lies: those that turn `beta_fast` and `beta_slow` times within
/// the original window.
fn correction_range(theta: f64, yarn: &Yarn, head_dim: usize) -> (f64, f64) {
    let dimension = |rotations: f64| {
        let window = yarn.original_max_position_embeddings as f64;
        head_dim as f64 * (window / (rotations * 2.0 * std::f64::consts::PI)).ln()
            / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (dimension(yarn.beta_fast), dimension(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
    // A ramp of no length would divide by 0.
    if low == high { (low, high + 0.001) } else { (low, high) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f64, scaling: RopeScaling) -> RopeConfig {
        RopeConfig { theta, partial_rotary_factor: 1.0, scaling }
    }

    #[test]
    fn a_part_of_a_head_rotates() {
        let mut config = rope(10_000.0, RopeScaling::Default);
        config.partial_rotary_factor = 0.25;
        let table = RotaryTable::new(&config, 32);
        let whole = RotaryTable::new(&rope(10_000.0, RopeScaling::Default), 8);
        assert_eq!(table.frequencies()[..4], *whole.frequencies());
        assert_eq!(table.frequencies()[4..], [0.0; 12]);
        let (cos, sin) = table.rows(&[7]);
        assert!((4..16).all(|pair| (cos[(0, pair)], sin[(0, pair)]) == (1.0, 0.0)));
    }

    fn yarn() -> Yarn {
        Yarn {
            factor: 4.0,
            original_max_position_embeddings: 64,
            attention_factor: 0.1 * 4f64.ln() + 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
        }
    }

    #[test]
    fn default_frequencies_are_a_geometric_series() {
        let table = RotaryTable::new(&rope(10_000.0, RopeScaling::Default), 8);
        let expected = [1.0, 0.1, 0.01, 0.001];
        for (found, expected) in table.frequencies().iter().zip(expected) {
            assert!(
                (found / expected - 1.0f32).abs() <= 2.0 * f32::EPSILON,
                "{found} against {expected}"
            );
        }
        let (cos, sin) = table.rows(&[0, 3, 70_000]);
        assert_eq!((cos.dim(), sin.dim()), ((3, 4), (3, 4)));
        assert_eq!((cos[(0, 2)], sin[(0, 2)]), (1.0, 0.0));
        assert_eq!((cos[(1, 0)], sin[(1, 0)]), (3f32.cos(), 3f32.sin()));
        // The angle itself is rounded to f32 before the cosine is taken.
        let angle = 70_000.0 * table.frequencies()[1];
        assert!((f64::from(cos[(2, 1)]) - f64::from(angle).cos()).abs() < 1e-7);
    }

    #[test]
    fn yarn_keeps_fast_dimensions_and_divides_slow_ones() {
        // low = floor(32 ln(64 / 64π) / 2 ln 1e6) = -2, cut to 0; high = ceil(32 ln(64 / 2π) / 2 ln
        // 1e6) = ceil(2.688) = 3.
        let config = rope(1e6, RopeScaling::Yarn(yarn()));
        let table = RotaryTable::new(&config, 32);
        let plain = RotaryTable::new(&rope(1e6, RopeScaling::Default), 32);
        for (pair, (&scaled, &plain)) in
            table.frequencies().iter().zip(plain.frequencies()).enumerate()
        {
            let ramp = (pair as f32 / 3.0).min(1.0);
            let expected = plain / 4.0 * ramp + plain * (1.0 - ramp);
            assert!(
                (scaled / expected - 1.0).abs() <= 4.0 * f32::EPSILON,
                "pair {pair}: {scaled} against {expected}"
            );
        }
        let (cos, _) = table.rows(&[0]);
        assert!(
            (cos[(0, 5)] - 1.138_629_4).abs() < 1e-6,
            "attention factor, found {}",
            cos[(0, 5)]
        );
    }

    #[test]
    fn yarn_without_truncation_and_without_a_ramp() {
        let theta = 1e6;
        let exact = Yarn { truncate: false, ..yarn() };
        let (low, high) = correction_range(theta, &exact, 32);
        let expected = 32.0 * (64.0 / (2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
        assert_eq!((low, high), (0.0, expected));
        let steep = Yarn { beta_fast: 2.0, beta_slow: 2.0, ..exact };
        let (low, high) = correction_range(theta, &steep, 32);
        assert!(high > low, "a ramp from {low} to {high}");
        let table = RotaryTable::new(&rope(theta, RopeScaling::Yarn(steep)), 32);
        assert!(
            table.frequencies().iter().all(|frequency| frequency.is_finite() && *frequency > 0.0)
        );
    }
}
