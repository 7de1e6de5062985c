//! The keys and values of one sequence, as far as this rank holds them.

use ops::LayerCache;

/// The cache of one sequence; several may be open on one model.
pub struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    /// Tokens of the sequence, on all ranks together.
    pub(crate) len: usize,
    /// The positions held here, ascending; only kept where ranks own positions.
    pub(crate) held: Vec<u32>,
    pub(crate) capacity: usize,
}

impl KvCache {
    /// Tokens of the sequence so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence is still empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most tokens that the sequence may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all but the first `tokens` of the sequence.
    pub fn truncate(&mut self, tokens: usize) {
        if tokens >= self.len {
            return;
        }
        let held = if self.held.is_empty() {
            tokens
        } else {
            self.held.partition_point(|position| (*position as usize) < tokens)
        };
        self.layers.iter_mut().for_each(|layer| layer.truncate(held));
        self.held.truncate(held);
        self.len = tokens;
    }

    /// Bytes of keys and values on this rank.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }
}
