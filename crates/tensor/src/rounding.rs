//! How far packed weights are from those of their source.

use std::ops::AddAssign;

/// What packing rounded: sums over the weights that their packed format does not represent exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rounding {
    /// Sum of the squared differences.
    pub error: f64,
    /// Sum of the squares of the weights.
    pub norm: f64,
    /// Groups of weights so small that all of a group became zero.
    pub vanished: u64,
}

impl Rounding {
    /// The root of the mean squared difference, relative to that of the weights; 0 if nothing was
    /// rounded.
    pub fn relative(&self) -> f64 {
        if self.norm > 0.0 { (self.error / self.norm).sqrt() } else { 0.0 }
    }

    /// Adds weights and what they became.
    pub(crate) fn add(&mut self, from: &[f32], to: impl Iterator<Item = f32>) {
        let (mut error, mut norm) = (0.0_f32, 0.0_f32);
        for (from, to) in from.iter().zip(to) {
            error += (from - to) * (from - to);
            norm += from * from;
        }
        self.error += f64::from(error);
        self.norm += f64::from(norm);
    }
}

impl AddAssign for Rounding {
    fn add_assign(&mut self, other: Self) {
        self.error += other.error;
        self.norm += other.norm;
        self.vanished += other.vanished;
    }
}
