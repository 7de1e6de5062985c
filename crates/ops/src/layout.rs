//! Which tokens of a forward pass a rank holds.

use std::ops::Range;

use tensor::split_range;

/// Tokens of a rank from which its keys and values go round. On 2 ranks with 1 GbE between them the
/// shape of Qwen3-0.6B loses 1 % to it with 256 tokens a rank, and gains 3 % with 512 and 7 % with
/// 1024.
const ROUND_TOKENS: usize = 512;

/// How the tokens of one forward pass lie on the ranks.
///
/// `Split` gives rank i the chunks i and 2R−1−i of 2R: causal attention costs the later chunks
/// more, and each such pair costs about the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenLayout {
    /// Every rank holds all the tokens.
    Replicated {
        /// Tokens of the pass.
        tokens: usize,
    },
    /// Each token is on one rank.
    Split {
        /// Tokens of the pass.
        tokens: usize,
        /// Ranks that hold them.
        ranks: usize,
    },
}

impl TokenLayout {
    /// Splits `tokens` over `ranks` where each gets at least two; fewer are replicated, since then
    /// a pass over the weights costs the same for one token as for a few.
    pub fn balanced(tokens: usize, ranks: usize) -> Self {
        if ranks > 1 && tokens >= 2 * ranks {
            Self::Split { tokens, ranks }
        } else {
            Self::Replicated { tokens }
        }
    }

    /// Tokens of the pass, on all ranks together.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Replicated { tokens } | Self::Split { tokens, .. } => *tokens,
        }
    }

    /// Whether each token is on one rank only.
    pub fn is_split(&self) -> bool {
        matches!(self, Self::Split { .. })
    }

    /// Whether keys and values of the pass go round the ranks block by block instead of being
    /// gathered: where they travel between machines, and a block is long enough for attention to it
    /// to take longer than merging its result.
    pub fn goes_round(&self, machines: usize) -> bool {
        matches!(*self, Self::Split { tokens, ranks } if machines > 1 && tokens >= ranks * ROUND_TOKENS)
    }

    /// The tokens of `rank`, as up to two ascending ranges of indices into the pass.
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

    /// How many tokens `rank` holds.
    pub fn count(&self, rank: usize) -> usize {
        self.ranges(rank).iter().map(ExactSizeIterator::len).sum()
    }

    /// How many elements each rank holds where a token has `width`.
    pub fn lengths(&self, ranks: usize, width: usize) -> Vec<usize> {
        (0..ranks).map(|rank| self.count(rank) * width).collect()
    }

    /// The rows of a gather in the order of the tokens: consecutive ranges.
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

    /// The index of each token in the order of a gather: rank 0's tokens, rank 1's, and so on.
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
