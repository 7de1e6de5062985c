//! The cached keys and values of one layer, as far as this rank holds them.

use std::ops::Range;

use simd_kernels::{KvFormat, KvHead};

use crate::attention::AttentionShape;
use crate::context::Context;

/// Keys and values of one layer: one `KvHead` for each KV head that this rank holds.
pub struct LayerCache {
    heads: Vec<KvHead>,
}

impl LayerCache {
    /// An empty cache of `heads` KV heads of size `head_dim`.
    pub fn new(format: KvFormat, heads: usize, head_dim: usize) -> Self {
        Self { heads: (0..heads).map(|_| KvHead::new(format, head_dim)).collect() }
    }

    /// An empty cache for the same heads.
    pub(crate) fn empty_like(&self) -> Self {
        Self {
            heads: self
                .heads
                .iter()
                .map(|head| KvHead::new(head.format(), head.head_dim()))
                .collect(),
        }
    }

    /// Makes room for `tokens` in all.
    pub fn reserve(&mut self, tokens: usize) {
        self.heads.iter_mut().for_each(|head| head.reserve(tokens));
    }

    /// The cached heads.
    pub fn heads(&self) -> &[KvHead] {
        &self.heads
    }

    /// The cached heads, to which a task each may add.
    pub(crate) fn heads_mut(&mut self) -> &mut [KvHead] {
        &mut self.heads
    }

    /// Forgets all but the first `tokens` held here.
    pub fn truncate(&mut self, tokens: usize) {
        self.heads.iter_mut().for_each(|head| head.truncate(tokens));
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.heads.iter().map(KvHead::bytes).sum()
    }

    /// Appends the keys and values of the tokens `range` of fused projections [tokens,
    /// `qkv_width`].
    pub fn push(
        &mut self,
        ctx: &Context,
        qkv: &[f32],
        shape: &AttentionShape,
        range: Range<usize>,
    ) {
        let (isa, width, size) = (ctx.isa, shape.qkv_width(), shape.head_dim);
        assert_eq!(self.heads.len(), shape.groups.len(), "cached heads against the shape's");
        if range.is_empty() {
            return;
        }
        let push = |(index, head): (usize, &mut KvHead)| {
            let start = range.start * width + shape.query_width() + index * size;
            head.push_many(
                isa,
                &qkv[start..],
                &qkv[start + shape.kv_width()..],
                range.len(),
                width,
            );
        };
        // Also a single token, where `attention_headwise` has not stored it itself: a serial loop
        // measured no faster.
        ctx.team.each(self.heads.iter_mut().enumerate().collect(), push);
    }
}
