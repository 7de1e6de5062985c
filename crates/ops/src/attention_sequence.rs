//! Attention where each rank owns positions: queries meet the keys of all earlier positions, on
//! whichever rank these are.
//!
//! Split tokens (prefill): each rank attends its own queries to the keys and values of the whole
//! pass. On one machine these are gathered first; between machines they go round in a ring, and a
//! rank attends to one block of them while the next one travels. Since each rank has an early and a
//! late part of the pass, every block is the same work for it. Keys of earlier passes stay where
//! they are; the queries are gathered instead, each rank attends all of them to the keys that it
//! holds, and the partial results merge by their softmax state `(m, s, o)`: `m = max mᵢ`, `s = Σ
//! sᵢ·e^(mᵢ−m)`, `o = Σ oᵢ·e^(mᵢ−m) / s` (an Allreduce of the maxima, one of the rescaled sums, a
//! Reduce-scatter of the rescaled rest).
//!
//! Replicated tokens (decode): each rank attends to the keys that it holds, and one Allgather of
//! the states lets every rank merge them all.

use std::ops::Range;
use std::slice::from_ref;

use comm::{Collective, CommError, CommunicatorExt, ReduceOp};
use simd_kernels::KvFormat;
use tensor::Activations;

use crate::attention::{
    Attend, AttentionScratch, AttentionShape, AttentionSpec, attend, norm_and_rotate,
};
use crate::attention_headwise::attention_headwise;
use crate::context::Context;
use crate::cost::{Call, Cost, F32, Group, Operand};
use crate::kv_cache::LayerCache;
use crate::kv_ring::KvRing;
use crate::kv_wire::KvWire;
use crate::layout::TokenLayout;
use crate::linear::{reshape, slice, slice_mut};
use crate::merged::Merged;

/// The tokens of a pass among all positions of their sequence.
#[derive(Clone, Copy)]
pub struct SequenceSpan<'a> {
    /// Where the tokens of the pass lie.
    pub layout: &'a TokenLayout,
    /// Position of the first of them.
    pub start: usize,
    /// The earlier positions that this rank's cache holds, ascending.
    pub held: &'a [u32],
}

impl SequenceSpan<'_> {
    /// The positions of the pass that join this rank's cache, ascending: its own where the tokens
    /// are split, every `ranks`-th where they are replicated.
    pub fn kept(&self, rank: usize, ranks: usize) -> Vec<u32> {
        let position = |index| (self.start + index) as u32;
        if self.layout.is_split() {
            self.layout.indices(rank).map(position).collect()
        } else {
            (0..self.layout.tokens())
                .map(position)
                .filter(|position| *position as usize % ranks == rank)
                .collect()
        }
    }
}

/// What attention over positions needs to know besides the data.
#[derive(Clone, Copy)]
pub struct SequenceSpec<'a> {
    /// What attention of one rank needs to know.
    pub attention: AttentionSpec<'a>,
    /// The tokens of the pass.
    pub span: SequenceSpan<'a>,
}

/// Attention of this rank's tokens to all positions up to theirs. qkv [own tokens, `qkv_width`] is
/// normalized and rotated in place; the kept keys and values join `cache`; out [own tokens, heads *
/// head_dim]. Where one rank has all positions this is [`attention_headwise`], without any
/// collective.
///
/// # Errors
/// When a collective fails.
pub fn attention_sequence(
    ctx: &Context,
    spec: &SequenceSpec<'_>,
    qkv: &mut Activations,
    cache: &mut LayerCache,
    scratch: &mut AttentionScratch,
    out: &mut Activations,
) -> Result<(), CommError> {
    let SequenceSpec { attention, span } = spec;
    if ctx.positions.size() == 1 {
        attention_headwise(ctx, attention, qkv, cache, scratch, out);
        return Ok(());
    }
    if attention.shape.heads() == 0 {
        // More ranks split heads than there are: those that share positions with this one have none
        // either.
        reshape(out, qkv.nrows(), 0);
        return Ok(());
    }
    norm_and_rotate(ctx, attention, qkv);
    if span.layout.is_split() {
        attend_split(ctx, spec, qkv, cache, scratch, out)
    } else {
        attend_replicated(ctx, spec, qkv, cache, scratch, out)
    }
}

fn attend_replicated(
    ctx: &Context,
    spec: &SequenceSpec<'_>,
    qkv: &Activations,
    cache: &mut LayerCache,
    scratch: &mut AttentionScratch,
    out: &mut Activations,
) -> Result<(), CommError> {
    let SequenceSpec { attention, span } = spec;
    let kept = span.kept(ctx.positions.rank(), ctx.positions.size());
    for position in &kept {
        let index = *position as usize - span.start;
        cache.push(ctx, slice(qkv), attention.shape, index..index + 1);
    }
    let visible: Vec<_> = (0..qkv.nrows())
        .map(|index| {
            span.held.len()
                + kept.partition_point(|position| *position as usize <= span.start + index)
        })
        .collect();
    let task = Attend::new(attention, slice(qkv), qkv.ncols(), &visible, cache.heads());
    let AttentionScratch { tasks, partial, message, gathered, .. } = scratch;
    attend(ctx, &task, tasks, out, Some(partial));
    message.clear();
    for part in [&partial.max, &partial.sum, out] {
        message.extend_from_slice(slice(part));
    }
    gathered.resize(message.len() * ctx.positions.size(), 0.0);
    ctx.positions.all_gather(message, gathered)?;
    let rows = partial.max.len();
    let mut merged = Merged::new(ctx, qkv.nrows(), attention.shape);
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
    spec: &SequenceSpec<'_>,
    qkv: &Activations,
    cache: &mut LayerCache,
    scratch: &mut AttentionScratch,
    out: &mut Activations,
) -> Result<(), CommError> {
    let SequenceSpec { attention, span } = spec;
    let (shape, layout) = (attention.shape, span.layout);
    let (numbers, wire) = (2 * shape.kv_width(), KvWire::new(ctx, cache));
    let width = wire.width(numbers);
    let own: Vec<_> = layout.indices(ctx.positions.rank()).collect();
    let keys = wire.pack(ctx, columns(qkv, shape.query_width(), numbers));
    if layout.goes_round(ctx.positions.machines()) {
        let mut ring = KvRing::new(ctx, layout, width, keys);
        let mut merged = if span.start == 0 {
            Merged::new(ctx, own.len(), shape)
        } else {
            attend_past(ctx, spec, qkv, cache, scratch, Some(&mut ring))?
        };
        while let Some((owner, keys)) = ring.next()? {
            let block = block_of(
                ctx,
                shape,
                cache,
                &wire.unpack(ctx, &keys),
                from_ref(&(0..layout.count(owner))),
            );
            let held: Vec<_> = layout.indices(owner).collect();
            let visible: Vec<_> =
                own.iter().map(|index| held.partition_point(|key| key <= index)).collect();
            let task = Attend::new(attention, slice(qkv), qkv.ncols(), &visible, block.heads());
            attend(ctx, &task, &mut scratch.tasks, out, Some(&mut scratch.partial));
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
        let block =
            block_of(ctx, shape, cache, &wire.unpack(ctx, &gathered), &layout.gathered_ranges());
        let visible: Vec<_> = own.iter().map(|index| index + 1).collect();
        let task = Attend::new(attention, slice(qkv), qkv.ncols(), &visible, block.heads());
        if span.start == 0 {
            attend(ctx, &task, &mut scratch.tasks, out, None);
        } else {
            let mut merged = attend_past(ctx, spec, qkv, cache, scratch, None)?;
            attend(ctx, &task, &mut scratch.tasks, out, Some(&mut scratch.partial));
            merged.add(ctx, slice(&scratch.partial.max), slice(&scratch.partial.sum), slice(out));
            merged.write(ctx, out);
        }
    }
    cache.push(ctx, slice(qkv), shape, 0..qkv.nrows());
    Ok(())
}

/// Keys and values of some tokens, stored as `cache` stores them: the given ranges of rows `keys`,
/// [tokens, 2 * `kv_width`].
fn block_of(
    ctx: &Context,
    shape: &AttentionShape,
    cache: &LayerCache,
    keys: &[f32],
    rows: &[Range<usize>],
) -> LayerCache {
    // The same heads without their queries.
    let bare = AttentionShape { groups: vec![0..0; shape.groups.len()], head_dim: shape.head_dim };
    let mut block = cache.empty_like();
    block.reserve(keys.len() / bare.qkv_width().max(1));
    rows.iter().for_each(|rows| block.push(ctx, keys, &bare, rows.clone()));
    block
}

/// What this rank's queries find in all keys of earlier passes, wherever they are. A block of
/// `ring` travels meanwhile.
fn attend_past(
    ctx: &Context,
    spec: &SequenceSpec<'_>,
    qkv: &Activations,
    cache: &LayerCache,
    scratch: &mut AttentionScratch,
    mut ring: Option<&mut KvRing<'_>>,
) -> Result<Merged, CommError> {
    let SequenceSpec { attention, span } = spec;
    let (heads, head_dim, width) =
        (attention.shape.heads(), attention.shape.head_dim, attention.shape.query_width());
    let tokens = span.layout.tokens();
    let AttentionScratch { tasks, partial, past, gathered, .. } = scratch;
    gathered.resize(tokens * width, 0.0);
    let own = columns(qkv, 0, width);
    ctx.positions.all_gather_v(
        &own,
        &span.layout.lengths(ctx.positions.size(), width),
        gathered,
    )?;
    let visible = vec![span.held.len(); tokens];
    if let Some(ring) = &mut ring {
        ring.pass_on();
    }
    attend(
        ctx,
        &Attend::new(attention, gathered, width, &visible, cache.heads()),
        tasks,
        past,
        Some(partial),
    );
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
    let own = span.layout.count(ctx.positions.rank());
    let mut acc = vec![0.0; own * width];
    ctx.positions.reduce_scatter(
        slice(past),
        &span.layout.lengths(ctx.positions.size(), width),
        &mut acc,
    )?;

    let first: usize = (0..ctx.positions.rank()).map(|rank| span.layout.count(rank)).sum();
    let rows = first * heads..(first + own) * heads;
    let mut merged = Merged::new(ctx, own, attention.shape);
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
    let round = layout.goes_round(machines);
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
