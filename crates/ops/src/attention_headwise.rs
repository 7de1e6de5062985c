//! Attention where each rank owns heads: local, without any collective.

use simd_kernels::KvHead;
use tensor::Activations;

use crate::attention::{Attend, AttentionScratch, AttentionSpec, attend, norm_and_rotate};
use crate::context::Context;
use crate::kv_cache::LayerCache;
use crate::linear::slice;

/// Attention of the heads of this rank for tokens that follow all those in `cache`, whose keys and
/// values join it. qkv [tokens, `qkv_width`] is normalized and rotated in place; out [tokens, heads * head_dim].
pub fn attention_headwise(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    qkv: &mut Activations,
    cache: &mut LayerCache,
    scratch: &mut AttentionScratch,
    out: &mut Activations,
) {
    norm_and_rotate(ctx, spec, qkv);
    let past = cache.heads().first().map_or(0, KvHead::len);
    cache.push(ctx, slice(qkv), spec.shape, 0..qkv.nrows());
    let visible: Vec<_> = (past + 1..=past + qkv.nrows()).collect();
    let task = Attend {
        algorithm: spec.algorithm,
        shape: spec.shape,
        queries: slice(qkv),
        stride: qkv.ncols(),
        visible: &visible,
        cache: cache.heads(),
    };
    attend(ctx, &task, &mut scratch.tasks, out, None);
}
