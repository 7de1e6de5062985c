//! The gated delta rule of this rank's heads (Yang et al., "Gated Delta Networks", 2024): causal
//! convolution of queries, keys and values, the recurrence over the tokens of each sequence, and
//! the gated norm of the result. No collective: each rank has whole value heads.

use std::ops::Range;

use simd_kernels::{DeltaTokens, KvFormat, MatMut, causal_conv_silu, delta_state_len, swiglu};
use tensor::Activations;

use crate::context::Context;
use crate::cost::{Cost, F32, Operand, Work};
use crate::linear::{matrix, reshape, slice};

/// Tokens of a sequence that go through a head together: few enough for their rows to stay in the
/// second-level cache.
const BLOCK_TOKENS: usize = 32;

/// Added to the sum of squares of a query or key before the square root.
const L2_EPS: f32 = 1e-6;

/// The heads of the delta rule on this rank.
///
/// A row of the fused projection is `[queries | keys | values | output gates]`: a query and a key
/// for each key head, a value and an output gate for each value head. The convolution goes over the
/// first three.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeltaShape {
    /// Key heads of this rank; there are as many query heads.
    pub key_heads: usize,
    /// For each value head of this rank the key head that it uses.
    pub key_of: Vec<usize>,
    /// Elements of a query and of a key.
    pub key_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Tokens that the convolution covers.
    pub taps: usize,
}

impl DeltaShape {
    /// Value heads of this rank.
    pub fn heads(&self) -> usize {
        self.key_of.len()
    }

    /// Elements of all queries of a token; its keys have as many.
    fn key_width(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Elements of all values of a token, and of its result.
    pub fn value_width(&self) -> usize {
        self.heads() * self.value_dim
    }

    /// Channels of the convolution.
    pub fn channels(&self) -> usize {
        2 * self.key_width() + self.value_width()
    }

    /// Elements of a row of the fused projection.
    pub fn input_width(&self) -> usize {
        self.channels() + self.value_width()
    }

    /// Elements of the state of a sequence in one layer: the state of each value head, then the
    /// inputs of the convolution for the last `taps - 1` tokens, [taps − 1, channels], as a ring.
    pub fn state_len(&self) -> usize {
        self.heads() * self.head_state_len() + self.taps.saturating_sub(1) * self.channels()
    }

    fn head_state_len(&self) -> usize {
        delta_state_len(self.key_dim, self.value_dim)
    }

    /// The work of `tokens` tokens of `sequences` sequences: four multiply-adds per element of the
    /// state and token; the state is read once per sequence.
    pub fn work(&self, tokens: usize, sequences: usize) -> Work {
        let state = self.heads() * self.key_dim * self.value_dim;
        Work {
            flops: (8 * tokens * state) as f64,
            bytes: (sequences * self.state_len() * F32) as f64,
        }
    }

    /// The cost of [`delta_rule`] for `tokens` tokens of one sequence.
    pub fn cost(&self, tokens: usize) -> Cost {
        Cost {
            work: vec![(Operand::Cache(KvFormat::F32), self.work(tokens, 1))],
            scratch: F32 * tokens * (self.input_width() + 2 * self.heads() + self.value_width()),
            calls: Vec::new(),
        }
    }
}

/// The weights of one layer for this rank's heads.
pub struct DeltaWeights {
    /// Weights of the convolution: [taps, elements] for each query head, each key head and each
    /// value head in turn, the last tap for the token itself.
    pub conv: Vec<f32>,
    /// The rate of decay, e^A_log, [value heads].
    pub rate: Vec<f32>,
    /// Bias of the decay, [value heads].
    pub dt_bias: Vec<f32>,
    /// Weight of the norm of each head's result, one number an element.
    pub norm: Vec<f32>,
    /// Added to the mean square in that norm.
    pub eps: f32,
}

/// Tokens of one sequence in a pass.
pub struct DeltaSpan<'a> {
    /// Position of the first token.
    pub start: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// The state of the sequence in this layer, at least [`DeltaShape::state_len`] elements; zeros
    /// before its first token.
    pub state: &'a mut [f32],
}

/// Working memory, kept from layer to layer.
#[derive(Default)]
pub struct DeltaScratch {
    threads: Vec<ThreadScratch>,
}

#[derive(Default)]
struct ThreadScratch {
    window: Vec<f32>,
    mixed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    key_query: Vec<f32>,
    decay: Vec<f32>,
    beta: Vec<f32>,
    result: Vec<f32>,
    normed: Vec<f32>,
}

/// Runs the tokens of the spans through the delta rule of this rank's heads and updates the states.
/// `projected` [tokens, `input_width`]; `gates` [tokens, 2 · value heads]: the strength of each
/// head, then its decay, both before their activation; `out` [tokens, `value_width`].
pub fn delta_rule(
    ctx: &Context,
    shape: &DeltaShape,
    weights: &DeltaWeights,
    (projected, gates): (&Activations, &Activations),
    spans: &mut [DeltaSpan<'_>],
    scratch: &mut DeltaScratch,
    out: &mut Activations,
) {
    let tokens = projected.nrows();
    assert_eq!(
        (projected.dim(), gates.dim()),
        ((tokens, shape.input_width()), (tokens, 2 * shape.heads())),
        "shapes of the projection and of the gates"
    );
    reshape(out, tokens, shape.value_width());
    let _operation = ctx.profile.operation("delta_rule", shape.work(tokens, spans.len()));
    scratch.threads.resize_with(ctx.team.threads(), ThreadScratch::default);
    let heads_len = shape.heads() * shape.head_state_len();

    // One task for each span and value head. Value heads of one key head repeat the convolution of
    // its query and key, which costs little, and need not wait for each other.
    let mut tasks = Vec::new();
    let (mut first, mut rest) = (0, matrix(out));
    for span in spans.iter_mut() {
        let (states, conv) = span.state[..shape.state_len()].split_at_mut(heads_len);
        let (block, below) = rest.split_rows(span.tokens);
        rest = below;
        let mut states = states.chunks_exact_mut(shape.head_state_len().max(1));
        let mut block = Some(block);
        for (head, &key_head) in shape.key_of.iter().enumerate() {
            let (own, right) = block.take().expect("columns are left").split_cols(shape.value_dim);
            block = Some(right);
            tasks.push(Task {
                rows: first..first + span.tokens,
                start: span.start,
                key_head,
                head,
                conv: &*conv,
                state: states.next().expect("a state for each value head"),
                out: own,
            });
        }
        first += span.tokens;
    }
    assert_eq!(first, tokens, "tokens of the spans");
    tasks.sort_by_key(|task| std::cmp::Reverse(task.rows.len()));
    ctx.team.drain(tasks, &mut scratch.threads, |task, scratch| {
        task.run(ctx, shape, weights, (projected, gates), scratch);
    });

    let mut first = 0;
    for span in spans {
        let rows = first..first + span.tokens;
        let conv = &mut span.state[heads_len..shape.state_len()];
        remember(conv, projected, rows, span.start, shape.channels());
        first += span.tokens;
    }
}

/// Keeps the inputs of the convolution that the next tokens need: row `position % (taps - 1)` of
/// `state` has those of that position.
fn remember(
    state: &mut [f32],
    projected: &Activations,
    rows: Range<usize>,
    start: usize,
    channels: usize,
) {
    let kept = state.len().checked_div(channels).unwrap_or(0);
    for row in rows.end - rows.len().min(kept)..rows.end {
        let slot = (start + row - rows.start) % kept;
        state[slot * channels..][..channels].copy_from_slice(&row_of(projected, row)[..channels]);
    }
}

/// A row of activations.
fn row_of(activations: &Activations, row: usize) -> &[f32] {
    let width = activations.ncols();
    &slice(activations)[row * width..(row + 1) * width]
}

/// The tokens of one span in one value head.
struct Task<'a> {
    /// The tokens' rows in the pass.
    rows: Range<usize>,
    /// The position of the first one.
    start: usize,
    key_head: usize,
    /// The value head on this rank.
    head: usize,
    /// The inputs of the convolution before the first token, a ring of [taps − 1, channels].
    conv: &'a [f32],
    state: &'a mut [f32],
    /// [tokens, value_dim]
    out: MatMut<'a>,
}

impl Task<'_> {
    fn run(
        mut self,
        ctx: &Context,
        shape: &DeltaShape,
        weights: &DeltaWeights,
        (projected, gates): (&Activations, &Activations),
        scratch: &mut ThreadScratch,
    ) {
        let &DeltaShape { key_dim, value_dim, .. } = shape;
        let (keys, heads) = (shape.key_width(), shape.heads());
        let query = self.key_head * key_dim;
        let value = 2 * keys + self.head * value_dim;
        let gate = shape.channels() + self.head * value_dim;
        // RMSNorm with these weights is L2 normalization; queries are also scaled as in attention.
        let key_norm = (key_dim as f32).sqrt().recip();
        let query_norm = key_norm * key_norm;
        let rate = weights.rate[self.head];
        let ThreadScratch { window, mixed, q, k, v, key_query, decay, beta, result, normed } =
            scratch;
        for start in self.rows.clone().step_by(BLOCK_TOKENS) {
            let block = start..(start + BLOCK_TOKENS).min(self.rows.end);
            let mut convolve = |column: usize, width: usize, out: &mut Vec<f32>| {
                self.fill_window(shape, projected, &block, column..column + width, window);
                out.resize(block.len() * width, 0.0);
                let weights = &weights.conv[shape.taps * column..shape.taps * (column + width)];
                causal_conv_silu(ctx.isa, weights, window, width, out);
            };
            convolve(query, key_dim, mixed);
            normalize(ctx, mixed, key_dim, query_norm, q);
            convolve(keys + query, key_dim, mixed);
            normalize(ctx, mixed, key_dim, key_norm, k);
            convolve(value, value_dim, v);
            decay.clear();
            beta.clear();
            for row in block.clone() {
                let gates = row_of(gates, row);
                let step = softplus(gates[heads + self.head] + weights.dt_bias[self.head]);
                decay.push((-rate * step).exp());
                beta.push(1.0 / (1.0 + (-gates[self.head]).exp()));
            }
            key_query.clear();
            let pairs = k.chunks_exact(key_dim).zip(q.chunks_exact(key_dim));
            key_query.extend(pairs.map(|(k, q)| simd_kernels::dot(ctx.isa, k, q)));
            let tokens = DeltaTokens { q, k, v, key_query, decay, beta };
            result.resize(v.len(), 0.0);
            simd_kernels::delta_rule(ctx.isa, &tokens, (key_dim, value_dim), self.state, result);
            normed.resize(value_dim, 0.0);
            for (row, result) in block.zip(result.chunks_exact(value_dim)) {
                simd_kernels::rms_norm(ctx.isa, result, &weights.norm, weights.eps, normed);
                let gate = &row_of(projected, row)[gate..gate + value_dim];
                swiglu(ctx.isa, gate, normed, self.out.row_mut(row - self.rows.start));
            }
        }
    }

    /// The columns `columns` of the tokens `block` and of the `taps - 1` tokens before them.
    fn fill_window(
        &self,
        shape: &DeltaShape,
        projected: &Activations,
        block: &Range<usize>,
        columns: Range<usize>,
        window: &mut Vec<f32>,
    ) {
        window.clear();
        let (past, channels) = (shape.taps - 1, shape.channels());
        // Row `i` is token `i - past` of the span.
        for row in block.start - self.rows.start..block.end - self.rows.start + past {
            let source = match row.checked_sub(past) {
                // Position `start + row - past`, which lies before the first one where the ring is
                // still zero.
                None => &self.conv[(self.start + row) % past * channels..][..channels],
                Some(token) => row_of(projected, self.rows.start + token),
            };
            window.extend_from_slice(&source[columns.clone()]);
        }
    }
}

/// `out = x / sqrt(Σx² + eps)` for each row of `width` elements, times `weight · sqrt(width)`.
fn normalize(ctx: &Context, x: &[f32], width: usize, weight: f32, out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    let (weights, eps) = (vec![weight; width], L2_EPS / width as f32);
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        simd_kernels::rms_norm(ctx.isa, x, &weights, eps, out);
    }
}

/// ln(1 + eˣ), as PyTorch computes it: x itself above 20.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use comm::SoloComm;
    use simd_kernels::Isa;

    use super::*;
    use crate::states::StateArena;
    use crate::team::Placement;

    /// The rows `rows` of some endless activations.
    fn noise(rows: Range<usize>, width: usize, seed: usize) -> Activations {
        Activations::from_shape_fn((rows.len(), width), |(row, column)| {
            let x = ((rows.start + row) * 7919 + column * 104_729 + seed * 31) % 2003;
            x as f32 / 1000.0 - 1.0
        })
    }

    /// Two sequences of 50 tokens, in passes that end at `cuts` and over so many threads: the rows
    /// of their results, and the states.
    fn run(isa: Isa, threads: usize, cuts: &[usize]) -> ([Vec<Vec<f32>>; 2], Vec<f32>) {
        const TOKENS: usize = 50;
        let shape = DeltaShape {
            key_heads: 2,
            key_of: vec![0, 1, 1, 0, 1],
            key_dim: 12,
            value_dim: 20,
            taps: 4,
        };
        let ctx = Context::new(isa, Arc::new(SoloComm::new()), 1, threads, Placement::Free)
            .expect("threads");
        let numbers = |len, seed| noise(0..1, len, seed).into_raw_vec_and_offset().0;
        let weights = DeltaWeights {
            conv: numbers(4 * shape.channels(), 1),
            rate: numbers(5, 2).iter().map(|x| x.exp()).collect(),
            dt_bias: numbers(5, 3),
            norm: numbers(20, 4),
            eps: 1e-6,
        };
        let mut arena = StateArena::new(shape.state_len(), 1, 2).expect("memory");
        let mut scratch = DeltaScratch::default();
        let mut results = [Vec::new(), Vec::new()];
        let mut start = 0;
        for &end in cuts.iter().chain([&TOKENS]) {
            let both = |width, seed| {
                let mut rows = noise(start..end, width, seed);
                let second = noise(start..end, width, seed + 1);
                rows.append(ndarray::Axis(0), second.view()).expect("equal widths");
                rows
            };
            let (projected, gates) = (both(shape.input_width(), 5), both(10, 7));
            let states = arena.layer(0, &[1, 0]).into_iter();
            let tokens = end - start;
            let mut spans: Vec<_> =
                states.map(|state| DeltaSpan { start, tokens, state }).collect();
            let mut out = Activations::default((0, 0));
            let input = (&projected, &gates);
            delta_rule(&ctx, &shape, &weights, input, &mut spans, &mut scratch, &mut out);
            for (row, values) in out.outer_iter().enumerate() {
                results[row / tokens].push(values.to_vec());
            }
            start = end;
        }
        (results, arena.layer(0, &[0, 1]).concat())
    }

    #[test]
    fn results_do_not_depend_on_the_cuts_and_the_threads() {
        for isa in Isa::all() {
            let (whole, states) = run(isa, 1, &[]);
            assert!(whole.iter().flatten().all(|row| row.iter().any(|x| x.abs() > 1e-3)));
            for (threads, cuts) in [(1, &[1, 2, 3, 4, 40][..]), (3, &[32]), (2, &[2, 49])] {
                let (found, found_states) = run(isa, threads, cuts);
                assert_eq!(found, whole, "{isa}, {threads} threads, {cuts:?}");
                assert_eq!(found_states, states, "{isa}, {threads} threads, {cuts:?}");
            }
        }
    }

    #[test]
    fn a_rank_without_heads_has_nothing_to_do() {
        let shape =
            DeltaShape { key_heads: 0, key_of: Vec::new(), key_dim: 12, value_dim: 20, taps: 4 };
        let ctx = Context::new(Isa::detect(), Arc::new(SoloComm::new()), 1, 2, Placement::Free)
            .expect("threads");
        let weights = DeltaWeights {
            conv: Vec::new(),
            rate: Vec::new(),
            dt_bias: Vec::new(),
            norm: vec![1.0; 20],
            eps: 1e-6,
        };
        let mut arena = StateArena::new(shape.state_len(), 1, 1).expect("memory");
        let mut states = arena.layer(0, &[0]);
        let mut spans = [DeltaSpan { start: 0, tokens: 3, state: &mut *states[0] }];
        let (input, mut out) = (Activations::zeros((3, 0)), Activations::default((0, 0)));
        let scratch = &mut DeltaScratch::default();
        delta_rule(&ctx, &shape, &weights, (&input, &input), &mut spans, scratch, &mut out);
        assert_eq!(out.dim(), (3, 0));
    }
}
