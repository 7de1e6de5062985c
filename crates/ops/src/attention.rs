//! The description of attention (heads, norms, rotary factors), and the norm and rotation before
//! it.

use simd_kernels::{
    AttentionInput, KvFormat, SoftmaxState, attention_materialized, attention_streaming,
    sigmoid_gate,
};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use tensor::Activations;

use crate::context::Context;
use crate::cost::Work;
use crate::linear::{slice, slice_mut};
use crate::norm::SERIAL_TOKENS;

/// The algorithm of attention. Both give the same answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AttentionAlgorithm {
    /// Stores all scores, then computes the softmax, then the weighted sum: the reference.
    Materialized,
    /// Online softmax over blocks of keys (Milakov & Gimelshein 2018; Dao et al. 2022).
    #[default]
    Streaming,
}

impl AttentionAlgorithm {
    /// Computes attention of the query rows and leaves their softmax states in `state`.
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

/// The heads of this rank. A row of the fused projection is `[queries | keys | values]`: the
/// queries of the rank's heads, then the keys and the values of its KV heads. Each head has
/// `head_dim` elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// For each KV head of this rank, the range of this rank's query heads that use it; consecutive
    /// and ascending.
    pub groups: Vec<Range<usize>>,
    /// Elements per head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Number of query heads of this rank.
    pub fn heads(&self) -> usize {
        self.groups.last().map_or(0, |group| group.end)
    }

    /// Number of elements of a token's queries, and of its attention output.
    pub fn query_width(&self) -> usize {
        self.heads() * self.head_dim
    }

    /// Number of elements of a token's keys; its values have the same number.
    pub fn kv_width(&self) -> usize {
        self.groups.len() * self.head_dim
    }

    /// The factor of the scores, 1 / sqrt(head_dim).
    pub(crate) fn score_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Bytes of the cached keys and values of one position in one layer.
    pub fn position_bytes(&self, kv: KvFormat) -> usize {
        2 * self.groups.len() * kv.bytes(self.head_dim)
    }

    /// The work of attention with `pairs` (token, visible key) pairs over `keys` cached positions:
    /// two products per pair and query head, and one reading of the keys and values.
    pub fn work(&self, kv: KvFormat, pairs: usize, keys: usize) -> Work {
        Work {
            flops: 4.0 * (pairs * self.query_width()) as f64,
            bytes: (keys * self.position_bytes(kv)) as f64,
        }
    }

    /// Number of elements of a row of the fused projection.
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

/// Rotary factors of the rank's tokens, each [tokens, head_dim / 2].
#[derive(Clone, Copy)]
pub struct Rotary<'a> {
    /// Cosines.
    pub cos: &'a Activations,
    /// Sines.
    pub sin: &'a Activations,
}

/// The parameters of attention in one layer.
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

/// Multiplies the outputs of attention by the sigmoid of their gates; both [tokens, heads *
/// head_dim].
///
/// # Panics
/// When the shapes differ.
pub fn gate(ctx: &Context, gates: &Activations, out: &mut Activations) {
    assert_eq!(gates.dim(), out.dim(), "shapes of the gates and of the outputs");
    let tokens = gates.nrows();
    if tokens < SERIAL_TOKENS {
        return sigmoid_gate(ctx.isa, slice(gates), slice_mut(out));
    }
    let part = (tokens.div_ceil(ctx.team.threads()) * gates.ncols()).max(1);
    let parts = slice(gates).chunks(part).zip(slice_mut(out).chunks_mut(part)).collect();
    ctx.team.each(parts, |(gates, out)| sigmoid_gate(ctx.isa, gates, out));
}

/// Normalizes each query and key head of the rows in `ranges` and rotates it by its position; qkv
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
