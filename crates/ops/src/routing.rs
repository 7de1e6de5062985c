//! The selection of experts for each token, and the sorting of tokens by expert.

use std::ops::Range;

use simd_kernels::{Input, Store};
use tensor::Activations;

use crate::context::Context;
use crate::linear::{Linear, reshape, slice, slice_mut};
use crate::norm::{SERIAL_TOKENS, prepare_as};

/// The router of a mixture-of-experts block. Every rank holds all of it and computes the same
/// selection.
pub struct Router {
    /// Weights [experts, hidden].
    pub weights: Linear,
    /// Number of experts per token.
    pub experts_per_token: usize,
    /// Whether the probabilities of the selected experts are scaled to sum to 1 (`norm_topk_prob`).
    pub normalize: bool,
}

/// The visits of tokens to this rank's experts, sorted by expert. Indices of experts count from
/// this rank's first expert.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Routing {
    /// The visited experts of this rank in ascending order, each with its non-empty range of rows
    /// in the sorted order.
    pub groups: Vec<(usize, Range<usize>)>,
    /// The token of each row of the sorted order. Empty for a dense block, whose single expert sees
    /// all tokens in their own order.
    pub tokens: Vec<usize>,
    /// The visits token by token: (row of the sorted order, weight of the expert).
    visits: Vec<(usize, f32)>,
    /// For each token, the end of its visits in `visits`.
    ends: Vec<usize>,
}

impl Routing {
    /// The routing of a block with a single expert.
    pub fn dense(tokens: usize) -> Self {
        Self {
            groups: if tokens > 0 { vec![(0, 0..tokens)] } else { Vec::new() },
            ..Self::default()
        }
    }

    /// Number of rows of the sorted order.
    pub fn rows(&self) -> usize {
        self.groups.last().map_or(0, |(_, rows)| rows.end)
    }

    /// Sorts `choices` by expert (counting sort) and keeps the experts `own`. `choices` has the
    /// selected experts and their weights for each token.
    fn sorted(choices: &[Vec<(usize, f32)>], own: &Range<usize>) -> Self {
        let here = |&(expert, weight): &(usize, f32)| {
            own.contains(&expert).then(|| (expert - own.start, weight))
        };
        let mut starts = vec![0; own.len() + 1];
        for (expert, _) in choices.iter().flatten().filter_map(here) {
            starts[expert + 1] += 1;
        }
        for expert in 0..own.len() {
            starts[expert + 1] += starts[expert];
        }
        let groups = (0..own.len())
            .map(|expert| (expert, starts[expert]..starts[expert + 1]))
            .filter(|(_, rows)| !rows.is_empty())
            .collect();
        let mut tokens = vec![0; starts[own.len()]];
        let mut visits = Vec::with_capacity(tokens.len());
        let mut ends = Vec::with_capacity(choices.len());
        for (token, choices) in choices.iter().enumerate() {
            for (expert, weight) in choices.iter().filter_map(here) {
                tokens[starts[expert]] = token;
                visits.push((starts[expert], weight));
                starts[expert] += 1;
            }
            ends.push(visits.len());
        }
        Self { groups, tokens, visits, ends }
    }

    /// `out[t] = Σ weight · y[row]`, or `+=`, over the visits of token t to this rank's experts; y
    /// [visits, n], out [tokens, n].
    pub fn combine(&self, ctx: &Context, y: &Activations, out: &mut Activations, store: Store) {
        let width = y.ncols();
        by_rows(ctx, out, |token, out| {
            if store == Store::Set {
                out.fill(0.0);
            }
            let start = if token == 0 { 0 } else { self.ends[token - 1] };
            for &(row, weight) in &self.visits[start..self.ends[token]] {
                simd_kernels::scale_add(ctx.isa, out, weight, &slice(y)[row * width..][..width]);
            }
        });
    }
}

/// The expected number of distinct experts that `tokens` tokens visit, if each selects `visits` of
/// `experts` and all choices are equally likely.
pub fn visited_experts(experts: usize, visits: usize, tokens: usize) -> f64 {
    let missed = 1.0 - visits as f64 / experts as f64;
    experts as f64 * (1.0 - missed.powf(tokens as f64))
}

/// Number of rows per thread of `count` rows, at least one.
fn part_rows(ctx: &Context, count: usize) -> usize {
    let threads = if count < SERIAL_TOKENS { 1 } else { ctx.team.threads() };
    count.div_ceil(threads).max(1)
}

/// Calls `job(index, row)` for each row; the team's threads share the rows.
fn by_rows(ctx: &Context, rows: &mut Activations, job: impl Fn(usize, &mut [f32]) + Sync) {
    let (count, width) = rows.dim();
    if width == 0 || count == 0 {
        return;
    }
    let part = part_rows(ctx, count);
    ctx.team.each(
        slice_mut(rows).chunks_mut(part * width).enumerate().collect(),
        |(index, rows)| {
            for (offset, row) in rows.chunks_exact_mut(width).enumerate() {
                job(index * part + offset, row);
            }
        },
    );
}

/// Routes `x` [tokens, hidden]: a softmax over all experts, then the `experts_per_token` largest
/// probabilities; of equal ones, the expert with the lower index. The result has the visits to the
/// experts `own`. `input` and `scores` are scratch.
pub(crate) fn route(
    ctx: &Context,
    router: &Router,
    own: &Range<usize>,
    x: &Activations,
    input: &mut Input,
    scores: &mut Activations,
) -> Routing {
    // The router always uses f32 activations, because small errors would select other experts.
    prepare_as(ctx, router.weights.exact_input_kind(ctx), x, input);
    reshape(scores, x.nrows(), router.weights.rows());
    router.weights.apply(ctx, input, scores, Store::Set);
    let mut choices = vec![Vec::new(); x.nrows()];
    let part = part_rows(ctx, x.nrows());
    let parts = slice_mut(scores)
        .chunks_mut(part * router.weights.rows())
        .zip(choices.chunks_mut(part))
        .collect();
    ctx.team.each(parts, |(scores, choices)| {
        for (scores, choices) in scores.chunks_exact_mut(router.weights.rows()).zip(choices) {
            *choices = choose(ctx, router, scores);
        }
    });
    Routing::sorted(&choices, own)
}

fn choose(ctx: &Context, router: &Router, scores: &mut [f32]) -> Vec<(usize, f32)> {
    simd_kernels::softmax(ctx.isa, scores);
    let mut experts: Vec<_> = scores.iter().copied().enumerate().collect();
    let order = |a: &(usize, f32), b: &(usize, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if router.experts_per_token < experts.len() {
        experts.select_nth_unstable_by(router.experts_per_token, order);
        experts.truncate(router.experts_per_token);
    }
    experts.sort_unstable_by(order);
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
        // A token with one choice never meets others with two, but the sort does not mind.
        let choices = [vec![(2, 0.75), (0, 0.25)], vec![(2, 1.0)], vec![(0, 0.5), (3, 0.5)]];
        let routing = Routing::sorted(&choices, &(0..5));
        assert_eq!(routing.groups, [(0, 0..2), (2, 2..4), (3, 4..5)]);
        assert_eq!(routing.tokens, [0, 2, 0, 1, 2]);
        assert_eq!(routing.visits, [(2, 0.75), (0, 0.25), (3, 1.0), (1, 0.5), (4, 0.5)]);
        assert_eq!(routing.ends, [2, 3, 5]);
    }

    #[test]
    fn visits_to_experts_of_other_ranks_are_left_out() {
        let choices = [vec![(2, 0.75), (0, 0.25)], vec![(0, 1.0)], vec![(1, 0.5), (3, 0.5)]];
        let routing = Routing::sorted(&choices, &(2..4));
        assert_eq!(routing.groups, [(0, 0..1), (1, 1..2)]);
        assert_eq!(routing.tokens, [0, 2]);
        assert_eq!((routing.visits, routing.ends), (vec![(0, 0.75), (1, 0.5)], vec![1, 1, 2]));
        let none = Routing::sorted(&choices, &(4..4));
        assert_eq!(
            (none.groups, none.tokens, none.visits, none.ends),
            (vec![], vec![], vec![], vec![0, 0, 0])
        );
    }
}
