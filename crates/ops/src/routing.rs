//! Which experts a token visits, and the order in which the experts see the tokens.

use std::ops::Range;

use simd_kernels::{Input, Store};
use tensor::Activations;

use crate::context::Context;
use crate::linear::{Linear, reshape, slice, slice_mut};
use crate::norm::prepare;

/// The router of a mixture-of-experts block; every rank holds all of it and routes alike.
pub struct Router {
    /// Weights [experts, hidden].
    pub weights: Linear,
    /// Experts that each token visits.
    pub experts_per_token: usize,
    /// Whether the chosen experts' probabilities are scaled to sum to 1 (`norm_topk_prob`).
    pub normalize: bool,
}

/// The visits of some tokens to experts, sorted by expert.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Routing {
    /// The experts that are visited, each with its rows of the sorted order; ascending, none empty.
    pub groups: Vec<(usize, Range<usize>)>,
    /// For each row of the sorted order, its token and the expert's weight there. Empty for a dense
    /// block: one expert sees all the tokens in their own order.
    pub visits: Vec<(usize, f32)>,
}

impl Routing {
    /// The routing of a block with a single expert.
    pub fn dense(tokens: usize) -> Self {
        Self { groups: if tokens > 0 { vec![(0, 0..tokens)] } else { Vec::new() }, visits: Vec::new() }
    }

    /// Counting sort of `choices`, for each token its experts and their weights.
    fn sorted(choices: &[Vec<(usize, f32)>], experts: usize) -> Self {
        let mut starts = vec![0; experts + 1];
        for (expert, _) in choices.iter().flatten() {
            starts[expert + 1] += 1;
        }
        for expert in 0..experts {
            starts[expert + 1] += starts[expert];
        }
        let groups = (0..experts)
            .map(|expert| (expert, starts[expert]..starts[expert + 1]))
            .filter(|(_, rows)| !rows.is_empty())
            .collect();
        let mut visits = vec![(0, 0.0); starts[experts]];
        for (token, choices) in choices.iter().enumerate() {
            for &(expert, weight) in choices {
                visits[starts[expert]] = (token, weight);
                starts[expert] += 1;
            }
        }
        Self { groups, visits }
    }

    /// The tokens in the order of the visits.
    pub fn gather(&self, x: &Activations, out: &mut Activations) {
        reshape(out, self.visits.len(), x.ncols());
        for (mut row, (token, _)) in out.outer_iter_mut().zip(&self.visits) {
            row.assign(&x.row(*token));
        }
    }

    /// `out[t] = Σ weight · y[row]` over the visits of token t.
    pub fn combine(&self, ctx: &Context, y: &Activations, tokens: usize, out: &mut Activations) {
        reshape(out, tokens, y.ncols());
        out.fill(0.0);
        let width = y.ncols().max(1);
        for (y, &(token, weight)) in slice(y).chunks_exact(width).zip(&self.visits) {
            simd_kernels::scale_add(ctx.isa, &mut slice_mut(out)[token * width..(token + 1) * width], weight, y);
        }
    }
}

/// Routes `x` [tokens, hidden]: softmax over all experts, then the largest `experts_per_token`; among
/// equals the lower expert. `input` and `scores` are scratch.
pub(crate) fn route(
    ctx: &Context,
    router: &Router,
    x: &Activations,
    input: &mut Input,
    scores: &mut Activations,
) -> Routing {
    prepare(ctx, router.weights.input_kind(), x, input);
    reshape(scores, x.nrows(), router.weights.rows());
    router.weights.apply(ctx, input, scores, Store::Set);
    let choices: Vec<_> = scores
        .outer_iter_mut()
        .map(|row| choose(ctx, router, row.into_slice().expect("rows of activations are contiguous")))
        .collect();
    Routing::sorted(&choices, router.weights.rows())
}

fn choose(ctx: &Context, router: &Router, scores: &mut [f32]) -> Vec<(usize, f32)> {
    simd_kernels::softmax(ctx.isa, scores);
    let mut experts: Vec<_> = scores.iter().copied().enumerate().collect();
    experts.sort_by(|a, b| b.1.total_cmp(&a.1));
    experts.truncate(router.experts_per_token);
    if router.normalize {
        let sum: f32 = experts.iter().map(|(_, weight)| weight).sum();
        experts.iter_mut().for_each(|(_, weight)| *weight /= sum);
    }
    experts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visits_are_sorted_by_expert_and_then_by_token() {
        let choices = [vec![(2, 0.75), (0, 0.25)], vec![(2, 1.0)], vec![(0, 0.5), (3, 0.5)]];
        let routing = Routing::sorted(&choices, 5);
        assert_eq!(routing.groups, [(0, 0..2), (2, 2..4), (3, 4..5)]);
        assert_eq!(routing.visits, [(0, 0.25), (2, 0.5), (0, 0.75), (1, 1.0), (2, 0.5)]);
    }
}
