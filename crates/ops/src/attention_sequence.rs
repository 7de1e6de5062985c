//! Attention with positions split over ranks: each rank owns pages of positions, and queries see
//! the keys of all earlier positions on all ranks.
//!
//! Split tokens (a prompt): each rank attends its own queries to the keys and values of the whole
//! pass. On one machine these are gathered first; between machines they go round in a ring, and a
//! rank attends to one block of them while the next one travels. Since each rank has an early and a
//! late part of the pass, every block is the same work for it. Each rank stores the keys and values
//! of the positions that it owns as they come by. Keys of earlier passes stay where they are; the
//! queries are gathered instead, each rank attends all of them to the keys that it holds, and the
//! partial results merge by their softmax state `(m, s, o)`: `m = max mᵢ`, `s = Σ sᵢ·e^(mᵢ−m)`,
//! `o = Σ oᵢ·e^(mᵢ−m) / s` (an Allreduce of the maxima, one of the rescaled sums, a Reduce-scatter
//! of the rescaled rest).
//!
//! Replicated tokens (decode, and any batch of several spans): each rank attends to the keys that
//! it holds, and one Allgather of the states lets every rank merge them all, in rank order.

use comm::{Collective, CommError, CommunicatorExt, ReduceOp};
use simd_kernels::{KvFormat, KvMemory};
use tensor::Activations;

use crate::attention::{AttentionShape, AttentionSpec, norm_and_rotate};
use crate::attention_headwise::{
    AttentionPlan, AttentionScratch, TokenSpan, attend_own, attention_headwise,
};
use crate::attention_tasks::{AttentionTasks, Queries, RowSpan, attend};
use crate::context::Context;
use crate::cost::{Call, Cost, F32, Group, Operand};
use crate::kv_ring::KvRing;
use crate::kv_wire::KvWire;
use crate::layout::TokenLayout;
use crate::linear::{reshape, slice, slice_mut};
use crate::merged::Merged;
use crate::pages::{Keys, LayerPages, PAGE_POSITIONS, PageId};

/// The attention plan of a pass, the same for all layers.
pub struct PassPlan {
    layout: TokenLayout,
    way: Way,
}

/// Where the tokens of a pass are.
enum Way {
    /// All on this rank.
    Here(AttentionPlan),
    /// Those of one sequence, split over ranks.
    Split(TokenSpan),
}

impl PassPlan {
    /// The plan of a pass: its tokens are those of the spans, in order. A single span of at least
    /// two tokens for each rank that splits positions is split over these; any other pass is
    /// computed on each of them.
    ///
    /// # Panics
    /// When the pages of a span end before its last token.
    pub fn new(ctx: &Context, shape: &AttentionShape, spans: &[TokenSpan]) -> Self {
        let tokens = spans.iter().map(|span| span.tokens).sum();
        if let [span] = spans {
            let layout = TokenLayout::balanced(tokens, ctx.positions.size());
            if layout.is_split() {
                return Self { layout, way: Way::Split(span.clone()) };
            }
        }
        let plan = AttentionPlan::new(ctx, shape, spans);
        Self { layout: TokenLayout::Replicated { tokens }, way: Way::Here(plan) }
    }

    /// Where the tokens of the pass are.
    pub fn layout(&self) -> &TokenLayout {
        &self.layout
    }
}

/// Attention of this rank's tokens to all positions up to theirs. qkv [own tokens, `qkv_width`] is
/// normalized and rotated; keys and values of the positions that this rank owns are stored in
/// `pages`; out [own tokens, heads * head_dim]. Where one rank has all positions this is
/// [`attention_headwise`], without any collective.
///
/// # Errors
/// When a collective fails.
pub fn attention_sequence(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    plan: &PassPlan,
    qkv: &mut Activations,
    pages: &mut LayerPages<'_>,
    scratch: &mut AttentionScratch,
    out: &mut Activations,
) -> Result<(), CommError> {
    match &plan.way {
        Way::Here(plan) if ctx.positions.size() == 1 => {
            attention_headwise(ctx, spec, plan, qkv, pages, scratch, out);
            Ok(())
        }
        // More ranks split heads than there are: those that share positions with this one have none
        // either.
        _ if spec.shape.heads() == 0 => {
            reshape(out, qkv.nrows(), 0);
            Ok(())
        }
        Way::Here(plan) => attend_replicated(ctx, spec, plan, qkv, pages, scratch, out),
        Way::Split(span) => {
            let rows = 0..qkv.nrows();
            norm_and_rotate(ctx, spec, qkv, &[rows]);
            attend_split(ctx, spec, (span, &plan.layout), qkv, pages, scratch, out)
        }
    }
}

fn attend_replicated(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    plan: &AttentionPlan,
    qkv: &mut Activations,
    pages: &mut LayerPages<'_>,
    scratch: &mut AttentionScratch,
    out: &mut Activations,
) -> Result<(), CommError> {
    let AttentionScratch { tasks, partial, message, gathered, .. } = scratch;
    attend_own(ctx, spec, plan, qkv, pages, tasks, (out, Some(partial)));
    message.clear();
    for part in [&partial.max, &partial.sum, out] {
        message.extend_from_slice(slice(part));
    }
    gathered.resize(message.len() * ctx.positions.size(), 0.0);
    ctx.positions.all_gather(message, gathered)?;
    let rows = partial.max.len();
    let mut merged = Merged::new(ctx, qkv.nrows(), spec.shape);
    for state in gathered.chunks_exact(message.len().max(1)) {
        let (max, rest) = state.split_at(rows);
        let (sum, acc) = rest.split_at(rows);
        merged.add(ctx, max, sum, acc);
    }
    merged.write(ctx, out);
    Ok(())
}

fn attend_split(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    (span, layout): (&TokenSpan, &TokenLayout),
    qkv: &Activations,
    pages: &mut LayerPages<'_>,
    scratch: &mut AttentionScratch,
    out: &mut Activations,
) -> Result<(), CommError> {
    let shape = spec.shape;
    let (numbers, wire) =
        (2 * shape.kv_width(), KvWire::of(pages.layout().format(), ctx.positions.machines()));
    let width = wire.width(numbers);
    let own: Vec<_> = layout.indices(ctx.positions.rank()).collect();
    let keys = wire.pack(ctx, columns(qkv, shape.query_width(), numbers));
    let mut block = scratch.block.take();
    if layout.uses_ring(ctx.positions.machines()) {
        let mut ring = KvRing::new(ctx, layout, width, keys);
        let mut merged = if span.start == 0 {
            Merged::new(ctx, own.len(), shape)
        } else {
            attend_past(ctx, spec, (span, layout), qkv, pages, scratch, Some(&mut ring))?
        };
        while let Some((owner, keys)) = ring.next()? {
            let keys = wire.unpack(ctx, &keys);
            let held: Vec<_> = layout.indices(owner).collect();
            let rows: Vec<_> = (0..held.len()).collect();
            store_own(ctx, shape, span, &held, &keys, pages);
            let visible: Vec<_> =
                own.iter().map(|index| held.partition_point(|key| key <= index)).collect();
            let block = fill(ctx, shape, pages, &mut block, &keys, &rows);
            attend_block(ctx, spec, span, qkv, (block, visible), scratch, (out, true));
            merged.add(ctx, slice(&scratch.partial.max), slice(&scratch.partial.sum), slice(out));
        }
        merged.write(ctx, out);
    } else {
        let mut gathered = vec![0.0; layout.tokens() * width];
        ctx.positions.all_gather_v(
            &keys,
            &layout.lengths(ctx.positions.size(), width),
            &mut gathered,
        )?;
        let keys = wire.unpack(ctx, &gathered);
        let order: Vec<_> = layout.gathered_ranges().into_iter().flatten().collect();
        store_own(ctx, shape, span, &layout.gathered_order(), &keys, pages);
        let visible: Vec<_> = own.iter().map(|index| index + 1).collect();
        let filled = fill(ctx, shape, pages, &mut block, &keys, &order);
        if span.start == 0 {
            attend_block(ctx, spec, span, qkv, (filled, visible), scratch, (out, false));
        } else {
            let mut merged = attend_past(ctx, spec, (span, layout), qkv, pages, scratch, None)?;
            attend_block(ctx, spec, span, qkv, (filled, visible), scratch, (out, true));
            merged.add(ctx, slice(&scratch.partial.max), slice(&scratch.partial.sum), slice(out));
            merged.write(ctx, out);
        }
    }
    scratch.block = block;
    Ok(())
}

/// Attention of this rank's tokens to a block of the pass's keys, of which each sees the first
/// `visible`.
fn attend_block(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    span: &TokenSpan,
    qkv: &Activations,
    (block, visible): (&KvMemory, Vec<usize>),
    scratch: &mut AttentionScratch,
    (out, partial): (&mut Activations, bool),
) {
    let keys = visible.iter().copied().max().unwrap_or(0);
    let rows = RowSpan {
        rows: 0..qkv.nrows(),
        visible,
        pages: (0..keys.div_ceil(PAGE_POSITIONS) as u32).map(PageId).collect(),
        arithmetic: span.arithmetic(),
        fresh: None,
    };
    let tasks = AttentionTasks::new(spec.shape, ctx.team.threads(), vec![rows]);
    let queries = Queries { rows: slice(qkv), stride: qkv.ncols() };
    let AttentionScratch { tasks: task_scratch, partial: sums, .. } = scratch;
    let out = (out, partial.then_some(sums));
    attend(ctx, spec, &tasks, queries, (&Keys::of(block), Vec::new()), task_scratch, out);
}

/// Keys and values of some tokens of the pass in memory of their own, stored as the pages store
/// them: those of the given rows of `keys`, [tokens, 2 * `kv_width`].
fn fill<'a>(
    ctx: &Context,
    shape: &AttentionShape,
    pages: &LayerPages<'_>,
    memory: &'a mut Option<KvMemory>,
    keys: &[f32],
    rows: &[usize],
) -> &'a KvMemory {
    let (layout, heads) = (pages.layout(), shape.groups.len());
    let groups = rows.len().div_ceil(PAGE_POSITIONS);
    let fits = |memory: &KvMemory| {
        memory.layout() == layout && memory.heads() == heads && memory.groups() >= groups
    };
    if !memory.as_ref().is_some_and(fits) {
        *memory = None;
    }
    let memory = memory.get_or_insert_with(|| {
        KvMemory::new(layout, heads, groups).unwrap_or_else(|error| panic!("{error}"))
    });
    let all: Vec<_> = (0..groups).collect();
    let (spans, _) = memory.split(&all);
    let (width, size) = (2 * shape.kv_width(), shape.head_dim);
    let runs = rows.chunks(PAGE_POSITIONS);
    let targets = runs.flat_map(|rows| (0..heads).map(move |head| (rows, head)));
    ctx.team.each(targets.zip(spans).collect(), |((rows, head), mut span): ((&[usize], _), _)| {
        for (position, row) in rows.iter().enumerate() {
            let key = &keys[row * width + head * size..];
            let value = &key[shape.kv_width()..][..size];
            simd_kernels::KvSpanMut::store(&mut span, ctx.isa, position, &key[..size], value);
        }
    });
    memory
}

/// Stores keys and values of the positions that this rank owns: of token `indices[i]` of the pass
/// row i of `keys`, [tokens, 2 * `kv_width`].
fn store_own(
    ctx: &Context,
    shape: &AttentionShape,
    span: &TokenSpan,
    indices: &[usize],
    keys: &[f32],
    pages: &mut LayerPages<'_>,
) {
    let owners = span.owners(ctx.positions.rank(), ctx.positions.size());
    // The page, the position in it and the row.
    let mut places: Vec<(PageId, usize, usize)> = Vec::new();
    for (row, index) in indices.iter().enumerate() {
        let (page, position) =
            ((span.start + index) / PAGE_POSITIONS, (span.start + index) % PAGE_POSITIONS);
        if owners.owns(page) {
            places.push((span.pages[page], position, row));
        }
    }
    places.sort_unstable();
    let runs: Vec<_> = places.chunk_by(|a, b| a.0 == b.0).collect();
    let written: Vec<_> = runs.iter().map(|run| run[0].0).collect();
    let (spans, _) = pages.split(&written);
    let (width, size) = (2 * shape.kv_width(), shape.head_dim);
    let targets = runs.iter().flat_map(|run| (0..shape.groups.len()).map(move |head| (*run, head)));
    ctx.team.each(targets.zip(spans).collect(), |((run, head), mut span): ((&[_], _), _)| {
        for &(_, position, row) in run {
            let key = &keys[row * width + head * size..];
            let value = &key[shape.kv_width()..][..size];
            simd_kernels::KvSpanMut::store(&mut span, ctx.isa, position, &key[..size], value);
        }
    });
}

/// What this rank's queries find in all keys of earlier passes, wherever they are. A block of
/// `ring` travels meanwhile.
fn attend_past(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    (span, layout): (&TokenSpan, &TokenLayout),
    qkv: &Activations,
    pages: &LayerPages<'_>,
    scratch: &mut AttentionScratch,
    mut ring: Option<&mut KvRing<'_>>,
) -> Result<Merged, CommError> {
    let shape = spec.shape;
    let (heads, head_dim, width) = (shape.heads(), shape.head_dim, shape.query_width());
    let tokens = layout.tokens();
    let AttentionScratch { tasks, partial, past, gathered, .. } = scratch;
    gathered.resize(tokens * width, 0.0);
    let own = columns(qkv, 0, width);
    ctx.positions.all_gather_v(&own, &layout.lengths(ctx.positions.size(), width), gathered)?;
    if let Some(ring) = &mut ring {
        ring.start_transfer();
    }
    let owners = span.owners(ctx.positions.rank(), ctx.positions.size());
    let rows = RowSpan {
        rows: 0..tokens,
        visible: vec![owners.positions(span.start); tokens],
        pages: span.local_pages(owners, span.start),
        arithmetic: span.arithmetic(),
        fresh: None,
    };
    let list = AttentionTasks::new(shape, ctx.team.threads(), vec![rows]);
    let queries = Queries { rows: gathered, stride: width };
    attend(ctx, spec, &list, queries, (&pages.keys(), Vec::new()), tasks, (past, Some(partial)));
    if let Some(ring) = &mut ring {
        ring.settle()?;
    }

    // Relative to the common maxima, sums and accumulators can be added. The sums divide: they are
    // exact on any wire.
    let mut factors = slice(&partial.max).to_vec();
    ctx.positions.all_reduce(slice_mut(&mut partial.max), ReduceOp::Max)?;
    for (factor, max) in factors.iter_mut().zip(slice(&partial.max)) {
        *factor = if *factor == f32::NEG_INFINITY { 0.0 } else { (*factor - max).exp() };
    }
    let results =
        slice_mut(&mut partial.sum).iter_mut().zip(slice_mut(past).chunks_exact_mut(head_dim));
    for ((sum, acc), factor) in results.zip(&factors) {
        *sum *= factor;
        acc.iter_mut().for_each(|acc| *acc *= factor);
    }
    ctx.positions.all_reduce(slice_mut(&mut partial.sum), ReduceOp::ExactSum)?;
    let own = layout.count(ctx.positions.rank());
    let mut acc = vec![0.0; own * width];
    ctx.positions.reduce_scatter(
        slice(past),
        &layout.lengths(ctx.positions.size(), width),
        &mut acc,
    )?;

    let first: usize = (0..ctx.positions.rank()).map(|rank| layout.count(rank)).sum();
    let rows = first * heads..(first + own) * heads;
    let mut merged = Merged::new(ctx, own, shape);
    merged.add(ctx, &slice(&partial.max)[rows.clone()], &slice(&partial.sum)[rows], &acc);
    Ok(merged)
}

/// Columns `start..start + width` of each row, contiguous.
fn columns(rows: &Activations, start: usize, width: usize) -> Vec<f32> {
    let stride = rows.ncols().max(1);
    slice(rows).chunks_exact(stride).flat_map(|row| &row[start..start + width]).copied().collect()
}

/// The tokens of a pass as attention on one of the ranks that split positions sees them.
#[derive(Clone, Copy, Debug)]
pub struct AttentionPass<'a> {
    /// Where the tokens of the pass lie.
    pub layout: &'a TokenLayout,
    /// Ranks that split positions, and this rank among them.
    pub ranks: usize,
    /// This rank.
    pub rank: usize,
    /// Machines on which these ranks lie.
    pub machines: usize,
    /// Positions of earlier passes.
    pub past: usize,
    /// Format of the cache.
    pub kv: KvFormat,
}

/// The cost of [`attention_sequence`], beside queries, keys and values of this rank's own tokens.
/// Causal work is taken to be equal on all ranks.
pub fn attention_cost(shape: &AttentionShape, pass: &AttentionPass<'_>) -> Cost {
    use Collective::{Allgather, Allgatherv, Allreduce, Recv, ReduceScatter, Send};
    let AttentionPass { layout, ranks, rank, machines, past, kv } = *pass;
    let (heads, width) = (shape.heads(), shape.query_width());
    let (tokens, own) = (layout.tokens(), layout.count(rank));
    if heads == 0 {
        return Cost::default();
    }
    let here = if layout.is_split() { tokens } else { tokens.div_ceil(ranks) };
    let pairs = (tokens * past + tokens * (tokens + 1) / 2).div_ceil(ranks);
    let work = shape.work(kv, pairs, past.div_ceil(ranks) + here);
    let mut cost = Cost {
        work: vec![(Operand::Cache(kv), work)],
        scratch: F32 * own * width,
        calls: Vec::new(),
    };
    if ranks == 1 {
        return cost;
    }
    let mut call = |collective, elements| {
        cost.calls.push(Call::new(Group::Positions, collective, elements));
    };
    let state = 2 * heads + width;
    if !layout.is_split() {
        call(Allgather, ranks * tokens * state);
        cost.scratch += F32 * (ranks + 1) * tokens * state;
        return cost;
    }
    let keys = KvWire::of(kv, machines).width(2 * shape.kv_width());
    let round = layout.uses_ring(machines);
    if round {
        // Every block but the next rank's leaves, every block but this rank's own arrives.
        let block = |number: usize| keys * layout.count((rank + ranks - number) % ranks);
        for number in 1..ranks {
            call(Send, block(number - 1));
            call(Recv, block(number));
        }
    } else {
        call(Allgatherv, tokens * keys);
    }
    if past > 0 {
        call(Allgatherv, tokens * width);
        call(Allreduce, tokens * heads);
        call(Allreduce, tokens * heads);
        call(ReduceScatter, tokens * width);
    }
    cost.calls.iter_mut().for_each(|call| call.exact = call.collective == Allreduce);
    // Keys and values on their way, as numbers, and as a cache holds them; states of own tokens;
    // queries of all tokens and what they find in earlier passes.
    let (come, block) = if round { (2 * own, own) } else { (tokens, tokens) };
    let merged = if round || past > 0 { own * state } else { 0 };
    let gathered = if past > 0 { 2 * tokens * state + 2 * own * width } else { 0 };
    let numbers = if keys < 2 * shape.kv_width() { 2 * block * keys } else { 0 };
    cost.scratch += block * shape.position_bytes(kv)
        + F32 * ((own + come) * keys + numbers + merged + gathered);
    cost
}
