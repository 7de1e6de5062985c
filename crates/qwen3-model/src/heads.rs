//! Which heads, feed-forward columns, experts and vocabulary rows each rank owns.

use std::ops::Range;

use ops::schedule::{ExpertSplit, MlpSchedule};
use tensor::{split_granular, split_range};

use crate::config::Config;
use crate::hybrid_config::HybridConfig;

/// The attention heads of one rank.
///
/// Query heads are split contiguously and evenly, one head at a time; the KV heads are those that
/// they look at. Where a KV head's query heads lie on several ranks, each of them holds a copy of
/// that KV head: keys and values are few, and the alternative, whole groups only, would leave ranks
/// beyond the number of KV heads without work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadPlan {
    /// Query heads.
    pub query_heads: Range<usize>,
    /// KV heads, some of them perhaps also on neighbouring ranks.
    pub kv_heads: Range<usize>,
    /// For each of these KV heads its query heads here, counted from the first one here;
    /// consecutive and ascending.
    pub groups: Vec<Range<usize>>,
}

impl HeadPlan {
    /// The heads of `rank` among `ranks`; none where there are more ranks than query heads and this
    /// is one of the last.
    ///
    /// # Panics
    ///
    /// If `rank >= ranks`.
    pub fn new(config: &Config, ranks: usize, rank: usize) -> Self {
        let query_heads = split_range(config.num_attention_heads, ranks, rank);
        if query_heads.is_empty() {
            return Self { query_heads, kv_heads: 0..0, groups: Vec::new() };
        }
        let size = config.group_size();
        let kv_heads = query_heads.start / size..(query_heads.end - 1) / size + 1;
        let groups = kv_heads.clone().map(|kv| {
            let start = (kv * size).max(query_heads.start);
            let end = ((kv + 1) * size).min(query_heads.end);
            start - query_heads.start..end - query_heads.start
        });
        let groups = groups.collect();
        Self { query_heads, kv_heads, groups }
    }
}

/// The heads of a gated delta rule on one rank.
///
/// Value heads are split like query heads; the key heads are those that they need, some of them
/// perhaps also on other ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaPlan {
    /// Value heads.
    pub values: Range<usize>,
    /// Key heads, ascending.
    pub keys: Vec<usize>,
    /// For each value head the place of its key head in `keys`.
    pub key_of: Vec<usize>,
}

impl DeltaPlan {
    /// The heads of `rank` among `ranks`.
    ///
    /// # Panics
    ///
    /// If `rank >= ranks`.
    pub fn new(hybrid: &HybridConfig, ranks: usize, rank: usize) -> Self {
        let values = split_range(hybrid.linear_num_value_heads, ranks, rank);
        let of_values: Vec<_> = values.clone().map(|head| hybrid.key_head(head)).collect();
        let mut keys = of_values.clone();
        keys.sort_unstable();
        keys.dedup();
        let place = |head: &usize| keys.binary_search(head).expect("all key heads are listed");
        let key_of = of_values.iter().map(place).collect();
        Self { values, keys, key_of }
    }
}

/// The shape of a layer's feed-forward block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockShape {
    /// Experts; `None` in a dense block.
    pub experts: Option<usize>,
    /// Columns of the block, or of each expert.
    pub columns: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Columns that are never cut apart: 1, or the group of a quantized format, so that no scale
    /// straddles ranks.
    pub granularity: usize,
}

impl BlockShape {
    /// The expert of `layer` that every token visits, as a dense block; `None` without one.
    pub fn shared(config: &Config, layer: usize, granularity: usize) -> Option<Self> {
        let columns = config.moe_of(layer)?.shared_expert_intermediate_size?;
        Some(Self { experts: None, columns, hidden: config.hidden_size, granularity })
    }

    /// The block of `layer`.
    pub fn new(config: &Config, layer: usize, granularity: usize) -> Self {
        let moe = config.moe_of(layer);
        let columns = moe.map_or(config.intermediate_size, |moe| moe.moe_intermediate_size);
        Self {
            experts: moe.map(|moe| moe.num_experts),
            columns,
            hidden: config.hidden_size,
            granularity,
        }
    }
}

/// What one rank has of a feed-forward block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockShare {
    /// The experts of which it has something; one in a dense block.
    pub experts: Range<usize>,
    /// Rows of gate and up, of each of them.
    pub inner: Range<usize>,
    /// Rows and columns of down.
    pub down: (Range<usize>, Range<usize>),
}

impl BlockShare {
    /// The share of `rank` among the `ranks` that split the block.
    pub fn new(
        shape: BlockShape,
        schedule: MlpSchedule,
        split: ExpertSplit,
        ranks: usize,
        rank: usize,
    ) -> Self {
        let (columns, hidden) = (0..shape.columns, 0..shape.hidden);
        if let (Some(experts), ExpertSplit::Ranks) = (shape.experts, split) {
            return Self {
                experts: split_range(experts, ranks, rank),
                inner: columns.clone(),
                down: (hidden, columns),
            };
        }
        let own = split_granular(shape.columns, shape.granularity, ranks, rank);
        let (inner, down) = match schedule {
            MlpSchedule::Local => (columns.clone(), (hidden, columns)),
            MlpSchedule::Gathered => (own, (split_range(shape.hidden, ranks, rank), columns)),
            MlpSchedule::Fused | MlpSchedule::Naive => (own.clone(), (hidden, own)),
        };
        Self { experts: 0..shape.experts.unwrap_or(1), inner, down }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where each rank goes through the whole block it is on all of them. No group is cut.
    #[test]
    fn every_weight_of_a_block_is_on_one_rank() {
        use MlpSchedule::{Fused, Gathered, Local, Naive};
        let hidden = 10;
        let inside =
            [Fused, Naive, Gathered, Local].map(|schedule| (schedule, ExpertSplit::Inside));
        let ways: Vec<_> = inside.into_iter().chain([(Fused, ExpertSplit::Ranks)]).collect();
        for (experts, columns, granularity) in [(None, 200, 32), (None, 11, 1), (Some(5), 40, 32)] {
            let shape = BlockShape { experts, columns, hidden, granularity };
            for (schedule, split) in &ways {
                for ranks in [1, 2, 3, 7, 16] {
                    // On how many ranks each row of gate and up lies, and each element of down.
                    let mut inner = vec![0; experts.unwrap_or(1) * columns];
                    let mut down = vec![0; inner.len() * hidden];
                    for rank in 0..ranks {
                        let share = BlockShare::new(shape, *schedule, *split, ranks, rank);
                        let end = share.inner.end;
                        assert!(end.is_multiple_of(granularity) || end == columns, "{share:?}");
                        for expert in share.experts {
                            share
                                .inner
                                .clone()
                                .for_each(|column| inner[expert * columns + column] += 1);
                            for row in share.down.0.clone() {
                                let start = (expert * hidden + row) * columns;
                                share.down.1.clone().for_each(|column| down[start + column] += 1);
                            }
                        }
                    }
                    let times = if *schedule == Local { ranks } else { 1 };
                    let once = inner.iter().chain(&down).all(|count| *count == times);
                    assert!(once, "{shape:?}, {schedule} {split} on {ranks} ranks");
                }
            }
        }
    }
}
