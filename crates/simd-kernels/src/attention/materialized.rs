//! Attention in three steps through a matrix of all scores: the textbook form, and the reference
//! for the streaming one.

use super::state::sum_without_maximum;
use super::{AttentionInput, SoftmaxState};
use crate::exp::exp;
use crate::isa::Isa;
use crate::vector::{dot, scale_add};

/// Attention with all scores in memory: [rows, keys] floats, beside the keys and values as f32.
///
/// Adds the rows' softmax over `input.keys` to `state`, as
/// [`attention_streaming`](super::attention_streaming) does.
///
/// # Panics
/// When the shapes do not fit together.
pub fn attention_materialized(isa: Isa, input: &AttentionInput<'_>, state: &mut SoftmaxState) {
    input.check(state);
    let (rows, head_dim) = (input.visible.len(), input.kv.head_dim());
    let keys = input.keys.clone();
    let count = keys.len();
    let seen: Vec<usize> = (0..rows).map(|row| input.row_keys(row).len()).collect();

    // Scores: Q Kᵀ · scale, [rows, count]. What a row does not see stays −∞.
    let mut scores = vec![f32::NEG_INFINITY; rows * count];
    let mut vector = vec![0.0; head_dim];
    for (j, key) in keys.clone().enumerate() {
        input.kv.key(key, &mut vector);
        for row in (0..rows).filter(|&row| j < seen[row]) {
            let q = &input.q[row * head_dim..(row + 1) * head_dim];
            scores[row * count + j] = input.scale * dot(isa, q, &vector);
        }
    }

    // Softmax without the division, which the state does last.
    let mut part = SoftmaxState::new();
    part.reset(rows, head_dim);
    for row in 0..rows {
        let row_scores = &mut scores[row * count..][..seen[row]];
        let most = row_scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if most > f32::NEG_INFINITY {
            row_scores.iter_mut().for_each(|x| *x -= most);
            exp(isa, row_scores);
            part.max[row] = most;
            part.sum[row] = row_scores.iter().sum();
        } else {
            part.sum[row] = sum_without_maximum(row_scores);
        }
    }

    // acc = P V, [rows, head_dim].
    for (j, key) in keys.enumerate() {
        input.kv.value(key, &mut vector);
        for row in (0..rows).filter(|&row| j < seen[row] && part.max[row] > f32::NEG_INFINITY) {
            let acc = &mut part.acc[row * head_dim..(row + 1) * head_dim];
            scale_add(isa, acc, scores[row * count + j], &vector);
        }
    }
    state.merge(isa, &part);
}
