//! What attention over a part of the keys leaves behind, so that parts can be put together.

use crate::exp::scalar::exp1;
use crate::isa::Isa;
use crate::kv::Lines;
use crate::vector::{scale, scale_add};

/// Working memory of the kernels, kept between calls.
#[derive(Clone, Default)]
pub(super) struct Scratch {
    pub scores: Lines,
    pub acc: Lines,
    /// Queries, keys and values as the kernels read them.
    pub q: Lines,
    pub keys: Lines,
    pub values: Lines,
    /// Of integers: weights, rows of queries before they become lanes, and a block on its way from
    /// the cache to `keys` or `values`.
    pub weights: Lines,
    pub codes: Lines,
    pub block: Lines,
}

/// The sum of a row whose largest score is −∞: such scores weigh nothing, for −∞ − (−∞) would be
/// NaN, but one that is NaN must show.
pub(super) fn sum_without_maximum(scores: &[f32]) -> f32 {
    if scores.iter().any(|x| x.is_nan()) { f32::NAN } else { 0.0 }
}

/// The softmax state of rows of queries over the keys seen so far.
///
/// For scores xⱼ and values vⱼ a row holds m = max xⱼ, s = Σ e^(xⱼ − m) and acc = Σ e^(xⱼ − m) vⱼ;
/// its attention is acc / s. A row that saw no key holds (−∞, 0, 0), one that saw NaN has NaN for
/// s. States over disjoint keys merge (Milakov and Gimelshein, 2018): m = max(m₁, m₂), s = s₁ e^(m₁
/// − m) + s₂ e^(m₂ − m), acc likewise.
#[derive(Clone, Default)]
pub struct SoftmaxState {
    /// Largest score of each row: `[rows]`.
    pub max: Vec<f32>,
    /// Sum of exponentials of each row: `[rows]`.
    pub sum: Vec<f32>,
    /// Weighted sum of values of each row, not divided by `sum`: `[rows, head_dim]`.
    pub acc: Vec<f32>,
    head_dim: usize,
    pub(super) scratch: Scratch,
}

impl SoftmaxState {
    /// The state of no rows; [`SoftmaxState::reset`] gives it a shape.
    pub fn new() -> SoftmaxState {
        SoftmaxState::default()
    }

    /// `rows` rows that have seen no key. Keeps its memory.
    pub fn reset(&mut self, rows: usize, head_dim: usize) {
        self.head_dim = head_dim;
        for (part, len, empty) in [
            (&mut self.max, rows, f32::NEG_INFINITY),
            (&mut self.sum, rows, 0.0),
            (&mut self.acc, rows * head_dim, 0.0),
        ] {
            part.clear();
            part.resize(len, empty);
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.max.len()
    }

    /// Elements of a row of `acc`.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Adds what the same rows saw of other keys.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn merge(&mut self, isa: Isa, other: &SoftmaxState) {
        self.merge_rows(isa, &other.max, &other.sum, &other.acc);
    }

    /// As [`SoftmaxState::merge`], from parts that came over the wire; max, sum: `[rows]`, acc:
    /// `[rows, head_dim]`.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn merge_rows(&mut self, isa: Isa, max: &[f32], sum: &[f32], acc: &[f32]) {
        let (rows, head_dim) = (self.rows(), self.head_dim);
        assert_eq!(max.len(), rows, "SoftmaxState: {} maxima merged into {rows} rows", max.len());
        assert_eq!(sum.len(), rows, "SoftmaxState: {} sums merged into {rows} rows", sum.len());
        assert_eq!(
            acc.len(),
            self.acc.len(),
            "SoftmaxState: {} elements merged into {}",
            acc.len(),
            self.acc.len()
        );
        for row in 0..rows {
            // Nothing to add; and −∞ − (−∞) below would be NaN.
            if sum[row] == 0.0 {
                continue;
            }
            let most = self.max[row].max(max[row]);
            let (own, other) = (exp1(self.max[row] - most), exp1(max[row] - most));
            let acc_row = row * head_dim..(row + 1) * head_dim;
            self.max[row] = most;
            self.sum[row] = self.sum[row] * own + sum[row] * other;
            scale(isa, &mut self.acc[acc_row.clone()], own);
            scale_add(isa, &mut self.acc[acc_row.clone()], other, &acc[acc_row]);
        }
    }

    /// The attention of a row, acc / sum; zeros when it saw no key. out: `[head_dim]`.
    ///
    /// # Panics
    /// When there is no such row or `out` has another length.
    pub fn write(&self, isa: Isa, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.acc[row * self.head_dim..(row + 1) * self.head_dim]);
        if self.sum[row] != 0.0 {
            scale(isa, out, 1.0 / self.sum[row]);
        }
    }
}
