//! Attention of queries to the keys and values that this rank holds, shared among the team's
//! threads.

use simd_kernels::{
    ATTENTION_ROWS, AttentionInput, KV_SPAN, KvFormat, KvHead, MatMut, SoftmaxState,
    attention_materialized, attention_streaming,
};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use tensor::{Activations, split_granular};

use crate::context::Context;
use crate::cost::Work;
use crate::linear::{matrix, reshape, slice_mut};
use crate::norm::SERIAL_TOKENS;

/// How scores become outputs; both give the same answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AttentionAlgorithm {
    /// All scores in memory, then softmax, then the weighted sum: the reference.
    Materialized,
    /// Online softmax over blocks of keys (Milakov & Gimelshein 2018; Dao et al. 2022).
    #[default]
    Streaming,
}

impl AttentionAlgorithm {
    /// Leaves in `state` what the rows of queries see.
    pub(crate) fn run(self, ctx: &Context, input: &AttentionInput<'_>, state: &mut SoftmaxState) {
        state.reset(input.visible.len(), input.kv.head_dim());
        match self {
            Self::Materialized => attention_materialized(ctx.isa, input, state),
            Self::Streaming => attention_streaming(ctx.isa, input, state),
        }
    }
}

impl fmt::Display for AttentionAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Materialized => "materialized",
            Self::Streaming => "streaming",
        })
    }
}

impl FromStr for AttentionAlgorithm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "materialized" => Ok(Self::Materialized),
            "streaming" => Ok(Self::Streaming),
            _ => Err(format!("found `{text}`, expected materialized or streaming")),
        }
    }
}

/// The heads of this rank. A row of its fused projection holds the queries of all its heads, then
/// the keys, then the values of its KV heads: `[queries | keys | values]`, each head `head_dim`
/// wide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// For each KV head here, its query heads among those here; consecutive and ascending.
    pub groups: Vec<Range<usize>>,
    /// Elements of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Query heads of this rank.
    pub fn heads(&self) -> usize {
        self.groups.last().map_or(0, |group| group.end)
    }

    /// Width of the queries of a token, and of its attention output.
    pub fn query_width(&self) -> usize {
        self.heads() * self.head_dim
    }

    /// Width of the keys, or of the values, of a token.
    pub fn kv_width(&self) -> usize {
        self.groups.len() * self.head_dim
    }

    /// Factor of the scores.
    pub(crate) fn score_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Bytes of the cached keys and values of a position.
    pub fn position_bytes(&self, kv: KvFormat) -> usize {
        2 * self.groups.len() * kv.bytes(self.head_dim)
    }

    /// Attention with `pairs` pairs of a token and a key that it sees, over `keys` cached keys: two
    /// products for each pair and query head, and one reading of the keys and values.
    pub fn work(&self, kv: KvFormat, pairs: usize, keys: usize) -> Work {
        Work {
            flops: 4.0 * (pairs * self.query_width()) as f64,
            bytes: (keys * self.position_bytes(kv)) as f64,
        }
    }

    /// Width of a row of the fused projection.
    pub fn qkv_width(&self) -> usize {
        self.query_width() + 2 * self.kv_width()
    }
}

/// Weights of the RMSNorm that Qwen3 applies to each query and key head, each `[head_dim]`.
#[derive(Clone, Copy)]
pub struct QkNorm<'a> {
    /// Weight for queries.
    pub q: &'a [f32],
    /// Weight for keys.
    pub k: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

/// Rotary factors of the tokens at hand, each [tokens, head_dim / 2].
#[derive(Clone, Copy)]
pub struct Rotary<'a> {
    /// Cosines.
    pub cos: &'a Activations,
    /// Sines.
    pub sin: &'a Activations,
}

/// What attention needs to know besides the data.
#[derive(Clone, Copy)]
pub struct AttentionSpec<'a> {
    /// How scores become outputs.
    pub algorithm: AttentionAlgorithm,
    /// The heads of this rank.
    pub shape: &'a AttentionShape,
    /// Norms of queries and keys.
    pub norm: QkNorm<'a>,
    /// Rotary factors of this rank's tokens.
    pub rotary: Rotary<'a>,
}

/// Working memory of attention, kept from layer to layer.
#[derive(Default)]
pub struct AttentionScratch {
    pub(crate) tasks: TaskScratch,
    pub(crate) partial: Partial,
    pub(crate) past: Activations,
    pub(crate) message: Vec<f32>,
    pub(crate) gathered: Vec<f32>,
}

/// Working memory of the team's tasks.
#[derive(Default)]
pub(crate) struct TaskScratch {
    /// Queries and state, one of each a thread.
    threads: Vec<(Vec<f32>, SoftmaxState)>,
    /// States of heads, or of the pieces of a cache that was split over threads.
    pub states: Vec<SoftmaxState>,
}

/// Attention to some of the keys, not yet divided by its sum: what merges with the other keys'
/// part.
#[derive(Default)]
pub(crate) struct Partial {
    /// Largest score, [tokens, heads].
    pub max: Activations,
    /// Sum of exponentials relative to it, [tokens, heads].
    pub sum: Activations,
}

/// Normalizes each query and key head and rotates it by its position; qkv [tokens, `qkv_width`].
pub(crate) fn norm_and_rotate(ctx: &Context, spec: &AttentionSpec<'_>, qkv: &mut Activations) {
    let AttentionSpec { shape, norm, rotary, .. } = *spec;
    let (tokens, width) = qkv.dim();
    assert_eq!(
        (rotary.cos.nrows(), width),
        (tokens, shape.qkv_width()),
        "rotary rows and projection width"
    );
    if width == 0 || tokens == 0 {
        return;
    }
    let rows = tokens.div_ceil(if tokens < SERIAL_TOKENS { 1 } else { ctx.team.threads() });
    let parts: Vec<_> = slice_mut(qkv).chunks_mut(rows * width).enumerate().collect();
    ctx.team.each(parts, |(part, block)| {
        for (index, row) in block.chunks_exact_mut(width).enumerate() {
            let token = part * rows + index;
            let cos = rotary.cos.row(token).to_slice().expect("rows are contiguous");
            let sin = rotary.sin.row(token).to_slice().expect("rows are contiguous");
            let (queries, rest) = row.split_at_mut(shape.query_width());
            let keys = &mut rest[..shape.kv_width()];
            for (heads, weight) in [(queries, norm.q), (keys, norm.k)] {
                simd_kernels::norm_rope(ctx.isa, heads, weight, norm.eps, cos, sin);
            }
        }
    });
}

/// Queries of some tokens against cached heads.
pub(crate) struct Attend<'a> {
    algorithm: AttentionAlgorithm,
    shape: &'a AttentionShape,
    /// [tokens, stride], the queries first in each row.
    queries: &'a [f32],
    stride: usize,
    /// For each token, how many of the cached keys it sees.
    visible: &'a [usize],
    cache: &'a [KvHead],
}

/// Rows of queries that one task handles: at most those that share a tile of keys, and fewer, down
/// to a point, where that leaves a thread too few tasks to balance.
const TASK_ROWS: Range<usize> = 64..ATTENTION_ROWS;
/// Tasks of a thread, so that the last ones to finish do not finish long after the others.
const TASKS: usize = 4;

/// Rows of queries of a task, where a team of `threads` shares those of `heads` heads and some
/// tokens.
fn task_rows(tokens: usize, heads: usize, threads: usize) -> usize {
    (tokens * heads / (TASKS * threads)).clamp(TASK_ROWS.start, TASK_ROWS.end)
}

/// Keys of a piece, at least and on average, where the cache of a head is cut over threads.
const PIECE_KEYS: usize = 256;

/// Into how many pieces few tokens cut the cache of each head: the smallest number with
/// [`PIECE_KEYS`] keys a piece that leaves the fullest thread the fewest keys. Pieces begin where
/// spans of the cache do, so that they differ by up to one.
pub(crate) fn pieces(kv_heads: usize, keys: usize, threads: usize) -> usize {
    // With these all threads have as many.
    let even = threads / gcd(kv_heads, threads);
    // A thread has at most so many pieces, each a share of a head's keys.
    let most = |pieces: usize| (kv_heads * pieces).div_ceil(threads);
    let less = |&a: &usize, &b: &usize| (most(a) * b).cmp(&(most(b) * a));
    (1..=(keys / PIECE_KEYS).clamp(1, even)).min_by(less).expect("a head is at least one piece")
}

/// Attention of the given queries; out [tokens, heads * head_dim]. With `partial`, out is left
/// undivided and the softmax state's maxima and sums go there.
pub(crate) fn attend(
    ctx: &Context,
    task: &Attend<'_>,
    scratch: &mut TaskScratch,
    out: &mut Activations,
    mut partial: Option<&mut Partial>,
) {
    let (tokens, threads) = (task.visible.len(), ctx.team.threads());
    let (heads, kv_heads) = (task.shape.heads(), task.shape.groups.len());
    reshape(out, tokens, task.shape.query_width());
    if let Some(partial) = &mut partial {
        reshape(&mut partial.max, tokens, heads);
        reshape(&mut partial.sum, tokens, heads);
    }
    if tokens == 0 || heads == 0 {
        return;
    }
    let _operation = ctx.profile.operation("attention", task.work());
    let TaskScratch { threads: per_thread, states } = scratch;
    per_thread.resize_with(threads, || (Vec::new(), SoftmaxState::new()));
    let keys = task.visible.iter().copied().max().unwrap_or(0);
    let pieces = pieces(kv_heads, keys, threads);
    if tokens < SERIAL_TOKENS && pieces > 1 {
        states.resize_with(kv_heads * pieces, SoftmaxState::new);
        let parts = states.iter_mut().enumerate().collect();
        ctx.team.drain(parts, per_thread, |(index, state), (queries, _)| {
            // Pieces of a cache begin where its kernels' tiles do.
            let keys = split_granular(keys, KV_SPAN, pieces, index % pieces);
            task.run(ctx, index / pieces, 0..tokens, keys, queries, state);
        });
        let mut blocks = OutputBlocks::whole(out, partial);
        for (head, states) in states.chunks_exact_mut(pieces).enumerate() {
            let (first, rest) = states.split_first_mut().expect("pieces is at least 1");
            rest.iter().for_each(|state| first.merge(ctx.isa, state));
            let own;
            (own, blocks) = blocks.split_heads(task.shape.groups[head].len(), task.shape.head_dim);
            own.write(ctx, first);
        }
        return;
    }
    let rows = task_rows(tokens, heads, threads);
    let mut parts = Vec::new();
    let mut rest = OutputBlocks::whole(out, partial);
    for (head, group) in task.shape.groups.iter().enumerate() {
        let mut column;
        (column, rest) = rest.split_heads(group.len(), task.shape.head_dim);
        // Tasks of about the same size.
        let step = tokens.div_ceil(tokens.div_ceil((rows / group.len()).max(1)));
        for start in (0..tokens).step_by(step) {
            let end = (start + step).min(tokens);
            let block;
            (block, column) = column.split_tokens(end - start);
            parts.push((head, start..end, block));
        }
    }
    // Later tokens see more keys; the cheap tasks last even out the finish.
    parts.sort_by_key(|(_, tokens, _)| std::cmp::Reverse(tokens.start));
    ctx.team.drain(parts, per_thread, |(head, tokens, block), (queries, state)| {
        task.run(ctx, head, tokens, 0..keys, queries, state);
        block.write(ctx, state);
    });
}

impl<'a> Attend<'a> {
    /// queries [tokens, stride], the queries first in each row; of the cached keys each token sees
    /// as many as `visible` says.
    pub fn new(
        spec: &AttentionSpec<'a>,
        queries: &'a [f32],
        stride: usize,
        visible: &'a [usize],
        cache: &'a [KvHead],
    ) -> Self {
        Self { algorithm: spec.algorithm, shape: spec.shape, queries, stride, visible, cache }
    }

    /// What the queries have to do.
    fn work(&self) -> Work {
        let (format, keys) =
            self.cache.first().map_or((KvFormat::F32, 0), |head| (head.format(), head.len()));
        self.shape.work(format, self.visible.iter().sum(), keys)
    }

    /// The softmax state of one KV head's query heads, rows ordered by token and then by head.
    fn run(
        &self,
        ctx: &Context,
        head: usize,
        tokens: Range<usize>,
        keys: Range<usize>,
        queries: &mut Vec<f32>,
        state: &mut SoftmaxState,
    ) {
        let group = &self.shape.groups[head];
        let columns = group.start * self.shape.head_dim..group.end * self.shape.head_dim;
        queries.clear();
        let mut visible = Vec::with_capacity(tokens.len() * group.len());
        for token in tokens.clone() {
            queries.extend_from_slice(&self.queries[token * self.stride..][columns.clone()]);
            visible.extend(std::iter::repeat_n(self.visible[token], group.len()));
        }
        let input = AttentionInput {
            q: queries,
            visible: &visible,
            kv: &self.cache[head],
            keys,
            scale: self.shape.score_scale(),
        };
        self.algorithm.run(ctx, &input, state);
    }
}

/// Where the results of some tokens and heads go.
struct OutputBlocks<'a> {
    out: MatMut<'a>,
    partial: Option<(MatMut<'a>, MatMut<'a>)>,
}

impl<'a> OutputBlocks<'a> {
    fn whole(out: &'a mut Activations, partial: Option<&'a mut Partial>) -> Self {
        Self {
            out: matrix(out),
            partial: partial.map(|partial| (matrix(&mut partial.max), matrix(&mut partial.sum))),
        }
    }

    fn split_heads(self, heads: usize, head_dim: usize) -> (Self, Self) {
        let (out, out_rest) = self.out.split_cols(heads * head_dim);
        let (partial, partial_rest) = split_pair(self.partial, |block| block.split_cols(heads));
        (Self { out, partial }, Self { out: out_rest, partial: partial_rest })
    }

    fn split_tokens(self, tokens: usize) -> (Self, Self) {
        let (out, out_rest) = self.out.split_rows(tokens);
        let (partial, partial_rest) = split_pair(self.partial, |block| block.split_rows(tokens));
        (Self { out, partial }, Self { out: out_rest, partial: partial_rest })
    }

    /// Writes a state whose rows are ordered by token and then by head.
    fn write(mut self, ctx: &Context, state: &SoftmaxState) {
        let tokens = self.out.rows();
        let heads = state.max.len() / tokens;
        let head_dim = self.out.cols() / heads;
        for token in 0..tokens {
            let rows = token * heads..(token + 1) * heads;
            let out = self.out.row_mut(token);
            match &mut self.partial {
                Some((max, sum)) => {
                    out.copy_from_slice(&state.acc[rows.start * head_dim..rows.end * head_dim]);
                    max.row_mut(token).copy_from_slice(&state.max[rows.clone()]);
                    sum.row_mut(token).copy_from_slice(&state.sum[rows]);
                }
                None => {
                    for (row, out) in rows.zip(out.chunks_exact_mut(head_dim)) {
                        state.write(ctx.isa, row, out);
                    }
                }
            }
        }
    }
}

type Pair<'a> = Option<(MatMut<'a>, MatMut<'a>)>;

fn split_pair<'a>(
    pair: Pair<'a>,
    split: impl Fn(MatMut<'a>) -> (MatMut<'a>, MatMut<'a>),
) -> (Pair<'a>, Pair<'a>) {
    match pair {
        Some((max, sum)) => {
            let ((max, max_rest), (sum, sum_rest)) = (split(max), split(sum));
            (Some((max, sum)), Some((max_rest, sum_rest)))
        }
        None => (None, None),
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_are_cut_where_a_thread_has_fewer_keys_then() {
        for (kv_heads, keys, threads, expected) in [
            (8, 100_000, 1, 1),
            (8, 100_000, 2, 1),
            (3, 511, 2, 1),
            (3, 512, 2, 2),
            (8, 511, 16, 1),
            (8, 512, 16, 2),
            // Not enough for all threads, or for as much each.
            (1, 4000, 16, 15),
            (2, 1500, 12, 5),
            (8, 512, 7, 2),
            (8, 600, 3, 1),
            (8, 800, 3, 3),
            (0, 9999, 4, 1),
        ] {
            assert_eq!(
                pieces(kv_heads, keys, threads),
                expected,
                "{kv_heads} heads, {keys} keys, {threads} threads"
            );
        }
    }
}
