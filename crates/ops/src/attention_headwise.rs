//! Attention where each rank owns heads: local, without any collective.

use simd_kernels::{AttentionInput, KvHead, SoftmaxState, norm_rope};
use tensor::Activations;

use crate::attention::{Attend, AttentionScratch, AttentionSpec, attend, norm_and_rotate, pieces};
use crate::context::Context;
use crate::kv_cache::LayerCache;
use crate::linear::{reshape, slice, slice_mut};

/// Attention of the heads of this rank for tokens that follow all those in `cache`, whose keys and
/// values join it. qkv [tokens, `qkv_width`] is normalized and rotated in place; out [tokens, heads
/// * head_dim].
pub fn attention_headwise(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    qkv: &mut Activations,
    cache: &mut LayerCache,
    scratch: &mut AttentionScratch,
    out: &mut Activations,
) {
    let past = cache.heads().first().map_or(0, KvHead::len);
    if qkv.nrows() == 1 && pieces(cache.heads().len(), past + 1, ctx.team.threads()) == 1 {
        return attend_one(ctx, spec, qkv, cache, &mut scratch.tasks.states, out);
    }
    norm_and_rotate(ctx, spec, qkv);
    cache.push(ctx, slice(qkv), spec.shape, 0..qkv.nrows());
    let visible: Vec<_> = (past + 1..=past + qkv.nrows()).collect();
    let task = Attend::new(spec, slice(qkv), qkv.ncols(), &visible, cache.heads());
    attend(ctx, &task, &mut scratch.tasks, out, None);
}

/// Attention of one token, with a fork of the team where its steps take three: a KV head's norms,
/// its rotations, its place in the cache and its attention are one task, and one operation of the
/// profile.
fn attend_one(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    qkv: &mut Activations,
    cache: &mut LayerCache,
    states: &mut Vec<SoftmaxState>,
    out: &mut Activations,
) {
    let AttentionSpec { algorithm, shape, norm, rotary } = *spec;
    assert_eq!(qkv.ncols(), shape.qkv_width(), "the projection's width against the shape's");
    assert_eq!(cache.heads().len(), shape.groups.len(), "cached heads against the shape's");
    reshape(out, 1, shape.query_width());
    let Some(first) = cache.heads().first() else { return };
    let seen = first.len() + 1;
    let work = shape.work(first.format(), seen, seen);
    let _operation = ctx.profile.operation("attention", work);

    let angles = [rotary.cos, rotary.sin].map(slice);
    let norm_rope = |heads: &mut [f32], weight: &[f32]| {
        norm_rope(ctx.isa, heads, weight, norm.eps, angles[0], angles[1])
    };
    let (mut queries, rest) = slice_mut(qkv).split_at_mut(shape.query_width());
    let (keys, values) = rest.split_at_mut(shape.kv_width());
    let (keys, values) =
        (keys.chunks_exact_mut(shape.head_dim), values.chunks_exact(shape.head_dim));
    let mut out = slice_mut(out);
    states.resize_with(shape.groups.len(), SoftmaxState::new);
    let heads = cache.heads_mut().iter_mut().zip(states).zip(keys.zip(values)).zip(&shape.groups);
    let parts = heads.map(|(((kv, state), (key, value)), group)| {
        let width = group.len() * shape.head_dim;
        let (q, o);
        (q, queries) = std::mem::take(&mut queries).split_at_mut(width);
        (o, out) = std::mem::take(&mut out).split_at_mut(width);
        (kv, state, key, value, q, o)
    });
    ctx.team.each(parts.collect(), |(kv, state, key, value, q, o)| {
        norm_rope(q, norm.q);
        norm_rope(key, norm.k);
        kv.push(ctx.isa, key, value);
        let visible = vec![kv.len(); q.len() / shape.head_dim];
        let input = AttentionInput {
            q,
            visible: &visible,
            kv,
            keys: 0..kv.len(),
            scale: shape.score_scale(),
        };
        algorithm.run(ctx, &input, state);
        o.chunks_exact_mut(shape.head_dim)
            .enumerate()
            .for_each(|(row, o)| state.write(ctx.isa, row, o));
    });
}
