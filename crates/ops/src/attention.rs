//! What attention needs to know besides the data, and the steps before it: norm and rotation.

use simd_kernels::{
    AttentionInput, KvFormat, SoftmaxState, attention_materialized, attention_streaming,
};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use tensor::Activations;

use crate::context::Context;
use crate::cost::Work;
use crate::linear::slice_mut;
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

/// Normalizes each query and key head of some consecutive rows and rotates it by its position; qkv
/// [tokens, `qkv_width`].
pub(crate) fn norm_and_rotate(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    qkv: &mut Activations,
    ranges: &[Range<usize>],
) {
    let AttentionSpec { shape, norm, rotary, .. } = *spec;
    let (tokens, width) = qkv.dim();
    assert_eq!(
        (rotary.cos.nrows(), width),
        (tokens, shape.qkv_width()),
        "rotary rows and projection width"
    );
    let count: usize = ranges.iter().map(ExactSizeIterator::len).sum();
    if width == 0 || count == 0 {
        return;
    }
    let most = count.div_ceil(if count < SERIAL_TOKENS { 1 } else { ctx.team.threads() });
    let (mut parts, mut rest, mut first) = (Vec::new(), slice_mut(qkv), 0);
    for range in ranges {
        let (_, tail) = rest.split_at_mut((range.start - first) * width);
        let (rows, tail) = tail.split_at_mut(range.len() * width);
        parts.extend((range.start..).step_by(most).zip(rows.chunks_mut(most * width)));
        (rest, first) = (tail, range.end);
    }
    ctx.team.each(parts, |(first, rows)| {
        for (token, row) in (first..).zip(rows.chunks_exact_mut(width)) {
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
