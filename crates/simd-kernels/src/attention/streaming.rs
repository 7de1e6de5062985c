//! Attention by online softmax, a block of keys at a time: the portable version.

use super::state::sum_without_maximum;
use super::{AttentionInput, SoftmaxState};
use crate::exp::scalar::exp1;
use crate::kv::BLOCK;

/// For each block of sixteen keys, widened once, and each row that sees some of it:
///
/// ```text
/// x = q · k · scale                      for the keys that the row sees
/// m' = max(m, x)
/// s, acc = s e^(m − m'), acc e^(m − m')  only when m' ≠ m
/// s, acc += e^(x − m'), e^(x − m') v
/// ```
pub(super) fn attention(input: &AttentionInput<'_>, state: &mut SoftmaxState) {
    let (kv, head_dim) = (input.kv, input.kv.head_dim());
    let mut keys = vec![[0.0f32; BLOCK]; head_dim];
    let mut values = vec![0.0f32; BLOCK * head_dim];
    let mut column = vec![0.0f32; head_dim];
    let last = (0..input.visible.len()).map(|row| input.row_keys(row).end).max().unwrap_or(0);
    for start in (input.keys.start..last).step_by(BLOCK) {
        let count = BLOCK.min(last - start);
        for j in 0..count {
            kv.key(start + j, &mut column);
            keys.iter_mut().zip(&column).for_each(|(lanes, &x)| lanes[j] = x);
            kv.value(start + j, &mut values[j * head_dim..(j + 1) * head_dim]);
        }
        for row in 0..input.visible.len() {
            let seen = input.row_keys(row).end.saturating_sub(start).min(count);
            let q = &input.q[row * head_dim..(row + 1) * head_dim];
            let mut scores = [0.0f32; BLOCK];
            for (q, keys) in q.iter().zip(&keys) {
                scores.iter_mut().zip(keys).for_each(|(x, k)| *x += q * k);
            }
            let scores = &mut scores[..seen];
            scores.iter_mut().for_each(|x| *x *= input.scale);

            let most = scores.iter().copied().fold(state.max[row], f32::max);
            if most == f32::NEG_INFINITY {
                state.sum[row] += sum_without_maximum(scores);
                continue;
            }
            let acc = &mut state.acc[row * head_dim..(row + 1) * head_dim];
            if most > state.max[row] {
                let factor = exp1(state.max[row] - most);
                state.max[row] = most;
                state.sum[row] *= factor;
                acc.iter_mut().for_each(|x| *x *= factor);
            }
            for (x, value) in scores.iter().zip(values.chunks_exact(head_dim)) {
                let weight = exp1(x - most);
                state.sum[row] += weight;
                acc.iter_mut().zip(value).for_each(|(acc, v)| *acc += weight * v);
            }
        }
    }
}
