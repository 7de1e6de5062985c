//! Attention of many rows as one list of tasks: (span, KV head, rows, segments of the keys),
//! balanced by keys.
//!
//! Keys are cut into segments of a fixed length. Each segment has a softmax state of its own, and
//! the states are merged in order of position. The result is therefore bit-identical for every
//! assignment of segments to tasks and every number of threads.

use std::ops::Range;

use simd_kernels::{
    ATTENTION_ROWS, AttentionArithmetic, AttentionInput, KvHead, KvSpan, KvSpanMut, MatMut,
    SoftmaxState, norm_rope,
};
use tensor::{Activations, split_range};

use crate::attention::{AttentionShape, AttentionSpec};
use crate::context::Context;
use crate::cost::Work;
use crate::linear::{matrix, reshape, slice};
use crate::pages::{Keys, PAGE_POSITIONS, PageId};

/// Positions per segment. Shorter segments spread over more threads; longer ones need fewer merges.
const SEGMENT: usize = 8 * PAGE_POSITIONS;
/// Range for the number of query rows per task. The maximum is what shares a tile of keys. Fewer
/// rows give more tasks, which balance better over the threads.
const TASK_ROWS: Range<usize> = 64..ATTENTION_ROWS;
/// Number of tasks per thread. With several, the threads finish at about the same time.
const TASKS_PER_THREAD: usize = 4;
/// Number of query rows whose arithmetic takes as long as reading the keys.
const READING_ROWS: usize = 8;

/// Number of query rows per task, for a team of `threads` threads.
fn task_rows(tokens: usize, heads: usize, threads: usize) -> usize {
    (tokens * heads / (TASKS_PER_THREAD * threads)).clamp(TASK_ROWS.start, TASK_ROWS.end)
}

/// Consecutive query rows that see keys in the same pages.
pub(crate) struct RowSpan {
    /// The rows.
    pub rows: Range<usize>,
    /// For each row, the number of keys that it sees.
    pub visible: Vec<usize>,
    /// The pages of the keys, in order.
    pub pages: Vec<PageId>,
    /// The arithmetic of products between queries and keys of 16 or 8 bits.
    pub arithmetic: AttentionArithmetic,
    /// Set for a span of a single row that its tasks normalize, rotate and store.
    pub fresh: Option<Fresh>,
}

/// A row that is not yet normalized, rotated and stored.
#[derive(Clone, Copy)]
pub(crate) struct Fresh {
    /// Where the row's key and value are stored if this rank owns the position: the index in the
    /// list of written pages, and the position in the page. It is the span's last page.
    pub store: Option<(usize, usize)>,
}

/// Rows of a span that are multiplied with the keys of one KV head together.
struct Tile {
    span: usize,
    head: usize,
    /// Counted from the first row of the span.
    rows: Range<usize>,
    segments: usize,
    /// Number of tasks that compute the segments.
    pieces: usize,
}

/// The attention tasks of a pass, the same for all layers.
pub(crate) struct AttentionTasks {
    spans: Vec<RowSpan>,
    tiles: Vec<Tile>,
    /// Pairs (tile, piece), the most expensive first.
    order: Vec<(usize, usize)>,
}

impl AttentionTasks {
    /// The tasks for `spans`, which cover all rows in order.
    pub fn new(shape: &AttentionShape, threads: usize, spans: Vec<RowSpan>) -> Self {
        let tokens = spans.iter().map(|span| span.rows.len()).sum();
        let most = task_rows(tokens, shape.heads(), threads);
        let mut tiles = Vec::new();
        for (index, span) in spans.iter().enumerate() {
            for (head, group) in shape.groups.iter().enumerate() {
                // The tiles of a span have about the same size.
                let count = span.rows.len().div_ceil((most / group.len()).max(1));
                for part in 0..count {
                    let rows = split_range(span.rows.len(), count, part);
                    let keys = span.visible[rows.clone()].iter().copied().max().unwrap_or(0);
                    let segments = keys.div_ceil(SEGMENT).max(1);
                    tiles.push(Tile { span: index, head, rows, segments, pieces: 1 });
                }
            }
        }
        let cost = |tile: &Tile| {
            let keys: usize = spans[tile.span].visible[tile.rows.clone()].iter().sum();
            let rows = tile.rows.len() * shape.groups[tile.head].len();
            keys * (rows + READING_ROWS) / tile.rows.len().max(1) + 1
        };
        let costs: Vec<_> = tiles.iter().map(cost).collect();
        cut(&mut tiles, &costs, threads);
        let pieces = tiles.iter().enumerate();
        let mut order: Vec<_> =
            pieces.flat_map(|(tile, t)| (0..t.pieces).map(move |piece| (tile, piece))).collect();
        order.sort_by_key(|(tile, _)| std::cmp::Reverse(costs[*tile] / tiles[*tile].pieces));
        Self { spans, tiles, order }
    }

    /// The work of all tasks in one layer.
    fn work(&self, shape: &AttentionShape, keys: &Keys<'_>) -> Work {
        let pairs = self.spans.iter().flat_map(|span| &span.visible).sum();
        let most = |span: &RowSpan| span.visible.iter().copied().max().unwrap_or(0);
        shape.work(keys.layout().format(), pairs, self.spans.iter().map(most).sum())
    }
}

/// Cuts long tiles into pieces if whole tiles would leave threads waiting for the longest one.
fn cut(tiles: &mut [Tile], costs: &[usize], threads: usize) {
    let total: usize = costs.iter().sum();
    let mut sorted = costs.to_vec();
    sorted.sort_unstable_by_key(|cost| std::cmp::Reverse(*cost));
    // The load of each thread if a thread takes the next tile whenever it is free.
    let mut loads = vec![0; threads.max(1)];
    for cost in sorted {
        *loads.iter_mut().min().expect("at least one thread") += cost;
    }
    let longest = loads.into_iter().max().unwrap_or(0);
    if 10 * longest * threads <= 11 * total {
        return;
    }
    let limit = (total / (TASKS_PER_THREAD * threads)).max(1);
    for (tile, cost) in tiles.iter_mut().zip(costs) {
        tile.pieces = cost.div_ceil(limit).clamp(1, tile.segments);
    }
}

/// Working memory of a team's attention.
#[derive(Default)]
pub(crate) struct TaskScratch {
    threads: Vec<ThreadScratch>,
    /// One state per segment, for tiles that are cut into pieces.
    states: Vec<Rows>,
}

/// Working memory of a thread.
#[derive(Default)]
struct ThreadScratch {
    queries: Vec<f32>,
    key: Vec<f32>,
    visible: Vec<usize>,
    /// The state of the current segment, with the kernels' working memory; then the merged state of
    /// the segments so far.
    state: SoftmaxState,
    total: SoftmaxState,
}

/// The softmax states of the rows of a tile.
#[derive(Default)]
struct Rows {
    max: Vec<f32>,
    sum: Vec<f32>,
    acc: Vec<f32>,
}

/// Maxima and sums of attention to a part of the keys, for merging with the results of other parts.
#[derive(Default)]
pub(crate) struct Partial {
    /// Largest scores, [rows, heads].
    pub max: Activations,
    /// Sums of `exp(score - max)`, [rows, heads].
    pub sum: Activations,
}

/// The projected rows that the tasks read.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// [rows, stride]. Each row starts with the queries; in fresh rows keys and values follow.
    pub rows: &'a [f32],
    /// Elements per row.
    pub stride: usize,
}

/// Attention of the given queries; out [rows, heads * head_dim]. `written` has the memory of the
/// pages that fresh rows are stored in, by page and then by head. With `partial`, `out` is not
/// divided by the sums, and the maxima and sums go to `partial`.
pub(crate) fn attend(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    tasks: &AttentionTasks,
    queries: Queries<'_>,
    (keys, written): (&Keys<'_>, Vec<KvSpanMut<'_>>),
    scratch: &mut TaskScratch,
    (out, mut partial): (&mut Activations, Option<&mut Partial>),
) {
    let shape = spec.shape;
    let (tokens, heads, head_dim) =
        (tasks.spans.iter().map(|span| span.rows.len()).sum(), shape.heads(), shape.head_dim);
    reshape(out, tokens, shape.query_width());
    if let Some(partial) = &mut partial {
        reshape(&mut partial.max, tokens, heads);
        reshape(&mut partial.sum, tokens, heads);
    }
    if tokens == 0 || heads == 0 {
        return;
    }
    let _operation = ctx.profile.operation("attention", tasks.work(shape, keys));
    let TaskScratch { threads, states } = scratch;
    threads.resize_with(ctx.team.threads(), ThreadScratch::default);

    // The output block of each tile, in the order of the tiles.
    let mut blocks = Vec::with_capacity(tasks.tiles.len());
    let mut rest = OutputBlocks::whole(out, partial);
    let mut tiles = tasks.tiles.iter().peekable();
    for (index, span) in tasks.spans.iter().enumerate() {
        let mut rows;
        (rows, rest) = rest.split_tokens(span.rows.len());
        for (head, group) in shape.groups.iter().enumerate() {
            let mut column;
            (column, rows) = rows.split_heads(group.len(), head_dim);
            while let Some(tile) = tiles.next_if(|tile| (tile.span, tile.head) == (index, head)) {
                let block;
                (block, column) = column.split_tokens(tile.rows.len());
                blocks.push(Some(block));
            }
        }
    }
    // The segment states of tiles that are cut into pieces.
    let cut: Vec<_> =
        tasks.tiles.iter().map(|tile| if tile.pieces > 1 { tile.segments } else { 0 }).collect();
    states.resize_with(cut.iter().sum(), Rows::default);
    let mut rest = &mut states[..];
    let mut of_tile: Vec<_> = Vec::with_capacity(tasks.tiles.len());
    for segments in cut {
        let own;
        (own, rest) = rest.split_at_mut(segments);
        of_tile.push(own.iter_mut().map(Some).collect::<Vec<_>>());
    }
    let mut written: Vec<_> = written.into_iter().map(Some).collect();
    let parts = tasks.order.iter().map(|&(index, piece)| {
        let tile = &tasks.tiles[index];
        let segments = split_range(tile.segments, tile.pieces, piece);
        let last = segments.end == tile.segments;
        let store = tasks.spans[tile.span].fresh.and_then(|fresh| fresh.store);
        let store = store.filter(|_| last).map(|(page, position)| {
            let span = written[page * shape.groups.len() + tile.head].take();
            (span.expect("each page is written by one row"), position)
        });
        let result = if tile.pieces == 1 {
            Outcome::Whole(blocks[index].take().expect("one task for a whole tile"))
        } else {
            let states = of_tile[index][segments.clone()].iter_mut();
            Outcome::Segments(states.map(|state| state.take().expect("one task each")).collect())
        };
        Part { tile, segments, store, result }
    });
    let parts: Vec<_> = parts.collect();
    ctx.team.drain(parts, threads, |part, thread| {
        let span = &tasks.spans[part.tile.span];
        part.run(ctx, spec, span, queries, keys, thread);
    });

    let mut rest = &mut states[..];
    let mut parts = Vec::new();
    for (tile, block) in tasks.tiles.iter().zip(blocks) {
        let Some(block) = block else { continue };
        let own;
        (own, rest) = rest.split_at_mut(tile.segments);
        parts.push((&*own, block));
    }
    if !parts.is_empty() {
        ctx.team.drain(parts, threads, |(segments, block), thread| {
            let state = &mut thread.total;
            state.reset(segments[0].max.len(), head_dim);
            state.max.copy_from_slice(&segments[0].max);
            state.sum.copy_from_slice(&segments[0].sum);
            state.acc.copy_from_slice(&segments[0].acc);
            for Rows { max, sum, acc } in &segments[1..] {
                state.merge_rows(ctx.isa, max, sum, acc);
            }
            block.write(ctx, state);
        });
    }
}

/// What a task does with its segment states.
enum Outcome<'a> {
    /// The task has all segments of a tile: it merges the states and writes the output.
    Whole(OutputBlocks<'a>),
    /// The task has some segments of a tile: it stores each state for a later merge.
    Segments(Vec<&'a mut Rows>),
}

/// A task.
struct Part<'a> {
    tile: &'a Tile,
    segments: Range<usize>,
    /// Where the task stores the key and value of a fresh row before attention: the memory of the
    /// page and head, and the position in the page.
    store: Option<(KvSpanMut<'a>, usize)>,
    result: Outcome<'a>,
}

impl Part<'_> {
    fn run(
        mut self,
        ctx: &Context,
        spec: &AttentionSpec<'_>,
        span: &RowSpan,
        source: Queries<'_>,
        keys: &Keys<'_>,
        thread: &mut ThreadScratch,
    ) {
        let ThreadScratch { queries, key, visible, state, total } = thread;
        let (shape, head, head_dim) = (spec.shape, self.tile.head, spec.shape.head_dim);
        let group = &shape.groups[head];
        let columns = group.start * head_dim..group.end * head_dim;
        queries.clear();
        visible.clear();
        for row in self.tile.rows.clone() {
            let start = (span.rows.start + row) * source.stride;
            queries.extend_from_slice(&source.rows[start..][columns.clone()]);
            visible.extend(std::iter::repeat_n(span.visible[row], group.len()));
        }
        if span.fresh.is_some() {
            let row = span.rows.start;
            let [cos, sin] = [spec.rotary.cos, spec.rotary.sin]
                .map(|angles| &slice(angles)[row * angles.ncols()..(row + 1) * angles.ncols()]);
            let norm = spec.norm;
            norm_rope(ctx.isa, queries, norm.q, norm.eps, cos, sin);
            if let Some((written, position)) = &mut self.store {
                let start = row * source.stride + shape.query_width() + head * head_dim;
                let value = &source.rows[start + shape.kv_width()..][..head_dim];
                key.clear();
                key.extend_from_slice(&source.rows[start..][..head_dim]);
                norm_rope(ctx.isa, key, norm.k, norm.eps, cos, sin);
                written.store(ctx.isa, *position, key, value);
            }
        }
        // Only the task that stores a fresh row reads the page it is stored in.
        let stored = span.fresh.is_some_and(|fresh| fresh.store.is_some());
        let read = &span.pages[..span.pages.len() - usize::from(stored)];
        let mut spans: Vec<KvSpan<'_>> = Vec::with_capacity(span.pages.len());
        spans.extend(read.iter().map(|page| keys.span(*page, head)));
        spans.extend(self.store.as_ref().map(|(written, _)| written.as_span()));
        let len = visible.iter().copied().max().unwrap_or(0).min(spans.len() * PAGE_POSITIONS);
        let kv = KvHead::new(keys.layout(), &spans, len);

        let input = |segment: usize| AttentionInput {
            q: queries,
            visible,
            kv,
            keys: (segment * SEGMENT).min(len)..((segment + 1) * SEGMENT).min(len),
            scale: shape.score_scale(),
            arithmetic: span.arithmetic,
        };
        match self.result {
            Outcome::Whole(block) => {
                spec.algorithm.run(ctx, &input(0), state);
                if self.tile.segments == 1 {
                    return block.write(ctx, state);
                }
                total.reset(state.rows(), head_dim);
                total.max.copy_from_slice(&state.max);
                total.sum.copy_from_slice(&state.sum);
                total.acc.copy_from_slice(&state.acc);
                for next in 1..self.tile.segments {
                    spec.algorithm.run(ctx, &input(next), state);
                    total.merge(ctx.isa, state);
                }
                block.write(ctx, total);
            }
            Outcome::Segments(rows) => {
                for (next, rows) in self.segments.zip(rows) {
                    spec.algorithm.run(ctx, &input(next), state);
                    for (to, from) in [
                        (&mut rows.max, &state.max),
                        (&mut rows.sum, &state.sum),
                        (&mut rows.acc, &state.acc),
                    ] {
                        to.clone_from(from);
                    }
                }
            }
        }
    }
}

/// The output memory of some rows and heads.
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

    /// Writes `state`, whose rows are ordered by token and then by head.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// How the tiles of sequences of these lengths, one row each, are cut.
    fn pieces(kv_heads: usize, lengths: &[usize], threads: usize) -> Vec<usize> {
        let groups = (0..kv_heads).map(|head| 2 * head..2 * head + 2).collect();
        let spans = lengths.iter().enumerate().map(|(row, length)| RowSpan {
            rows: row..row + 1,
            visible: vec![*length],
            pages: Vec::new(),
            arithmetic: AttentionArithmetic::Float,
            fresh: None,
        });
        let shape = AttentionShape { groups, head_dim: 8 };
        let tasks = AttentionTasks::new(&shape, threads, spans.collect());
        assert_eq!(tasks.order.len(), tasks.tiles.iter().map(|tile| tile.pieces).sum::<usize>());
        tasks.tiles.iter().map(|tile| tile.pieces).collect()
    }

    #[test]
    fn keys_are_cut_where_a_thread_would_wait_else() {
        assert_eq!(pieces(8, &[100_000], 1), [1; 8]);
        assert_eq!(pieces(8, &[100_000], 2), [1; 8]);
        // Three heads on two threads; a segment is never cut.
        assert_eq!(pieces(3, &[1000], 2), [1; 3]);
        assert_eq!(pieces(3, &[2000], 2), [2; 3]);
        assert_eq!(pieces(1, &[4096], 16), [4]);
        // Only the long sequence.
        assert_eq!(pieces(1, &[100, 4096, 200], 2), [1, 4, 1]);
        // Many alike fill the threads by themselves.
        assert_eq!(pieces(1, &[2048; 16], 2), [1; 16]);
    }
}
