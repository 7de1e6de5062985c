//! Merges the results of attention to several sets of keys, by their softmax states.

use std::ops::Range;

use simd_kernels::SoftmaxState;
use tensor::{Activations, split_range};

use crate::attention::AttentionShape;
use crate::context::Context;
use crate::linear::slice_mut;
use crate::norm::SERIAL_TOKENS;

/// The softmax states of some tokens, [tokens * heads], in one block of tokens per thread.
pub(crate) struct Merged {
    heads: usize,
    head_dim: usize,
    blocks: Vec<(Range<usize>, SoftmaxState)>,
}

impl Merged {
    /// States that have seen no key yet.
    pub fn new(ctx: &Context, tokens: usize, shape: &AttentionShape) -> Self {
        let (heads, head_dim) = (shape.heads(), shape.head_dim);
        let parts = if tokens < SERIAL_TOKENS { 1 } else { ctx.team.threads() };
        let block = |part| {
            let tokens = split_range(tokens, parts, part);
            let mut state = SoftmaxState::new();
            state.reset(tokens.len() * heads, head_dim);
            (tokens, state)
        };
        Self { heads, head_dim, blocks: (0..parts).map(block).collect() }
    }

    /// Adds the result for another set of keys: maxima and sums [tokens * heads], accumulators
    /// [tokens * heads * head_dim].
    pub fn add(&mut self, ctx: &Context, max: &[f32], sum: &[f32], acc: &[f32]) {
        let (heads, head_dim) = (self.heads, self.head_dim);
        ctx.team.each(self.blocks.iter_mut().collect(), |(tokens, state)| {
            let rows = tokens.start * heads..tokens.end * heads;
            let elements = rows.start * head_dim..rows.end * head_dim;
            state.merge_rows(ctx.isa, &max[rows.clone()], &sum[rows], &acc[elements]);
        });
    }

    /// Writes the attention to all keys added so far; out [tokens, heads * head_dim].
    pub fn write(&self, ctx: &Context, out: &mut Activations) {
        let width = self.heads * self.head_dim;
        let mut rest = slice_mut(out);
        let mut parts = Vec::with_capacity(self.blocks.len());
        for (tokens, state) in &self.blocks {
            let part;
            (part, rest) = rest.split_at_mut(tokens.len() * width);
            parts.push((state, part));
        }
        ctx.team.each(parts, |(state, part)| {
            for (row, out) in part.chunks_exact_mut(self.head_dim).enumerate() {
                state.write(ctx.isa, row, out);
            }
        });
    }
}
