//! Attention of the query heads that share one KV head: its inputs, the softmax state, and the two
//! algorithms.

mod materialized;
mod state;
mod streaming;
#[cfg(target_arch = "x86_64")]
mod tiles;

pub use materialized::attention_materialized;
pub use state::SoftmaxState;

use crate::isa::{Isa, dispatch};
use crate::kv::KvHead;
use std::ops::Range;

/// Rows of one call that share each tile of keys, half as many where the cache is in f32; more are
/// taken in parts.
pub const ATTENTION_ROWS: usize = 528;

/// How queries meet a cache of 16 or 8 bits with AVX2. A cache in f32 is always attended in f32,
/// and without AVX2 any cache is.
///
/// The two round differently. The caller chooses, and not the number of rows, so that the bits of a
/// row do not depend on the rows that come with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttentionArithmetic {
    /// f32, in tiles of up to 12 rows that read the cache as it lies: for few rows.
    Float,
    /// Both products in int16, keys and values rounded once for all rows of a tile: for many rows.
    Int16,
}

/// Rows of queries over a range of one KV head's keys.
#[derive(Clone)]
pub struct AttentionInput<'a> {
    /// The queries, all heads of the group and all tokens in any order: `[rows, head_dim]`.
    pub q: &'a [f32],
    /// Row i sees the keys of `keys` below `visible[i]`: `[rows]`. Any values: not sorted, also
    /// beyond the cache.
    pub visible: &'a [usize],
    /// The keys and values.
    pub kv: KvHead<'a>,
    /// The keys to go over, at most `kv.len()`; may be empty.
    pub keys: Range<usize>,
    /// Factor of the scores, 1 / sqrt(head_dim) as a rule.
    pub scale: f32,
    /// How queries meet a cache of 16 or 8 bits.
    pub arithmetic: AttentionArithmetic,
}

impl AttentionInput<'_> {
    /// The keys that a row sees.
    fn row_keys(&self, row: usize) -> Range<usize> {
        self.keys.start
            ..self.visible[row].clamp(self.keys.start, self.keys.end.max(self.keys.start))
    }

    fn check(&self, state: &SoftmaxState) {
        let (rows, head_dim) = (self.visible.len(), self.kv.head_dim());
        assert_eq!(
            self.q.len(),
            rows * head_dim,
            "attention: q has {} elements, {rows} rows of {head_dim} expected",
            self.q.len()
        );
        assert!(
            self.keys.is_empty() || self.keys.end <= self.kv.len(),
            "attention: keys up to {}, the cache holds {}",
            self.keys.end,
            self.kv.len()
        );
        assert_eq!(
            (state.rows(), state.head_dim()),
            (rows, head_dim),
            "attention: the state's rows and head size, and those of the input"
        );
    }
}

/// Attention by online softmax in tiles, with scratch of one tile: adds the rows' softmax over
/// `input.keys` to `state`.
///
/// Rows that share a KV head should come in one call, whichever their tokens: each tile of keys and
/// values is read once for all of them. Tiles that no row sees are skipped.
///
/// NaN and infinity in a query, or in a key or value that a row sees, reach its result, as NaN or
/// infinity; in one that it does not see they do not. Only a score of −∞ weighs nothing; with
/// [`AttentionArithmetic::Int16`] a row may have NaN for one, if the key is infinite.
///
/// The bits of a row depend on its query, its keys and `input.arithmetic` only, and on where
/// `input.keys` begins; not on the other rows.
///
/// # Panics
/// When the shapes of `input` and `state` do not fit together, or `input.keys` reaches beyond the
/// cache.
pub fn attention_streaming(isa: Isa, input: &AttentionInput<'_>, state: &mut SoftmaxState) {
    input.check(state);
    dispatch!(isa, tiles::attention, streaming::attention, (input, state), avx2: (isa))
}

#[cfg(test)]
mod tests;
