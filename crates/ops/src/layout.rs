//! The distribution of a forward pass's tokens over the ranks.

use std::ops::Range;

use tensor::split_range;

/// Smallest number of tokens per rank for which keys and values travel in a ring. With fewer
/// tokens, attention to a block takes less time than merging its result (measured with the shapes
/// of Qwen3-0.6B on 2 ranks over 1 GbE).
const RING_TOKENS: usize = 512;

/// The distribution of a forward pass's tokens over the ranks.
///
/// `Split` cuts the tokens into 2R chunks and gives rank i the chunks i and 2R−1−i. In causal
/// attention later chunks cost more; each such pair costs about the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenLayout {
    /// Every rank holds all tokens.
    Replicated {
        /// Tokens of the pass.
        tokens: usize,
    },
    /// Each token is on one rank.
    Split {
        /// Tokens of the pass.
        tokens: usize,
        /// Number of ranks that hold them.
        ranks: usize,
    },
}

impl TokenLayout {
    /// Splits `tokens` over `ranks` if each rank gets at least two. Fewer tokens are replicated:
    /// reading the weights then takes the time, for one token as for a few.
    pub fn balanced(tokens: usize, ranks: usize) -> Self {
        if ranks > 1 && tokens >= 2 * ranks {
            Self::Split { tokens, ranks }
        } else {
            Self::Replicated { tokens }
        }
    }

    /// Number of tokens of the pass on all ranks.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Replicated { tokens } | Self::Split { tokens, .. } => *tokens,
        }
    }

    /// Returns true if each token is on exactly one of several ranks.
    pub fn is_split(&self) -> bool {
        matches!(self, Self::Split { .. })
    }

    /// Returns true if the pass's keys and values travel round the ranks block by block (ring
    /// attention) instead of being gathered. It is so between machines, for blocks that are long
    /// enough that attention to a block takes longer than merging its result.
    pub fn uses_ring(&self, machines: usize) -> bool {
        matches!(*self, Self::Split { tokens, ranks } if machines > 1 && tokens >= ranks * RING_TOKENS)
    }

    /// The tokens of `rank` as two ascending ranges of indices into the pass; the second may be
    /// empty.
    pub fn ranges(&self, rank: usize) -> [Range<usize>; 2] {
        match *self {
            Self::Replicated { tokens } => [0..tokens, tokens..tokens],
            Self::Split { tokens, ranks } => [
                split_range(tokens, 2 * ranks, rank),
                split_range(tokens, 2 * ranks, 2 * ranks - 1 - rank),
            ],
        }
    }

    /// The indices of the tokens of `rank`, ascending.
    pub fn indices(&self, rank: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let [first, second] = self.ranges(rank);
        first.chain(second)
    }

    /// Number of tokens that `rank` holds.
    pub fn count(&self, rank: usize) -> usize {
        self.ranges(rank).iter().map(ExactSizeIterator::len).sum()
    }

    /// Number of elements that each rank holds, with `width` elements per token.
    pub fn lengths(&self, ranks: usize, width: usize) -> Vec<usize> {
        (0..ranks).map(|rank| self.count(rank) * width).collect()
    }

    /// The rows of a gathered buffer, as consecutive ranges in the order of the tokens.
    pub fn gathered_ranges(&self) -> Vec<Range<usize>> {
        let Self::Split { ranks, .. } = *self else {
            return std::iter::once(0..self.tokens()).collect();
        };
        let mut first = 0;
        let mut ranges = vec![0..0; 2 * ranks];
        for rank in 0..ranks {
            let [early, late] = self.ranges(rank).map(|range| range.len());
            ranges[rank] = first..first + early;
            ranges[2 * ranks - 1 - rank] = first + early..first + early + late;
            first += early + late;
        }
        ranges
    }

    /// The token of each row of a gathered buffer: rank 0's tokens, then rank 1's, and so on.
    pub fn gathered_order(&self) -> Vec<usize> {
        match self {
            Self::Replicated { tokens } => (0..*tokens).collect(),
            Self::Split { ranks, .. } => (0..*ranks).flat_map(|rank| self.indices(rank)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_on_one_rank_and_the_causal_work_is_balanced() {
        for ranks in 1..=7 {
            for tokens in 0..=97 {
                let layout = TokenLayout::balanced(tokens, ranks);
                let mut order = layout.gathered_order();
                order.sort_unstable();
                assert_eq!(
                    order,
                    (0..tokens).collect::<Vec<_>>(),
                    "{tokens} tokens, {ranks} ranks"
                );
                let gathered = layout.gathered_order();
                let rows = layout.gathered_ranges().into_iter().flatten().map(|row| gathered[row]);
                assert!(rows.eq(0..tokens), "{tokens} tokens, {ranks} ranks");
                if layout.is_split() {
                    let work = |rank| layout.indices(rank).map(|i| i + 1).sum::<usize>();
                    let (least, most) = ((0..ranks).map(work).min(), (0..ranks).map(work).max());
                    let slack = 4 * (tokens + 1);
                    assert!(
                        most <= least.map(|least| least + slack),
                        "{tokens} tokens, {ranks} ranks: {least:?} to {most:?}"
                    );
                    assert!((0..ranks).all(|rank| layout.count(rank) >= 1));
                }
            }
        }
    }
}
