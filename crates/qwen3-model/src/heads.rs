//! Which heads, feed-forward columns and vocabulary rows each rank owns.

use std::ops::Range;

use tensor::{split_granular, split_range};

use crate::config::Config;

/// The attention heads of one rank.
///
/// Query heads are split contiguously and evenly, one head at a time; the KV heads are those that they look at. Where a KV head's
/// query heads lie on several ranks, each of them holds a copy of that KV head: keys and values are few, and the alternative, whole
/// groups only, would leave ranks beyond the number of KV heads without work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadPlan {
    /// Query heads.
    pub query_heads: Range<usize>,
    /// KV heads, some of them perhaps also on neighbouring ranks.
    pub kv_heads: Range<usize>,
    /// For each of these KV heads its query heads here, counted from the first one here; consecutive and ascending.
    pub groups: Vec<Range<usize>>,
}

impl HeadPlan {
    /// The heads of `rank` among `ranks`; none where there are more ranks than query heads and this is one of the last.
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

    /// The KV head, counted from the first one here, that a query head looks at, also counted from the first one here.
    pub fn kv_of(&self, query_head: usize) -> Option<usize> {
        self.groups.iter().position(|group| group.contains(&query_head))
    }
}

/// All that one rank owns when weights are split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankPlan {
    /// Attention heads.
    pub heads: HeadPlan,
    /// Columns of a dense feed-forward block.
    pub columns: Range<usize>,
    /// Columns of each expert; empty in a dense model.
    pub expert_columns: Range<usize>,
    /// Rows of the head and of the embedding.
    pub vocabulary: Range<usize>,
}

impl RankPlan {
    /// What `rank` of `ranks` owns. Feed-forward columns are cut at multiples of `granularity`: 1, or the group of a quantized format.
    ///
    /// # Panics
    ///
    /// If `rank >= ranks` or `granularity` is 0.
    pub fn new(config: &Config, ranks: usize, rank: usize, granularity: usize) -> Self {
        let expert_columns = config.moe.as_ref().map_or(0, |moe| moe.moe_intermediate_size);
        Self {
            heads: HeadPlan::new(config, ranks, rank),
            columns: split_granular(config.intermediate_size, granularity, ranks, rank),
            expert_columns: split_granular(expert_columns, granularity, ranks, rank),
            vocabulary: split_range(config.vocab_size, ranks, rank),
        }
    }

    /// Elements of the layers' matrices on this rank, replicated KV heads and the replicated router included.
    pub fn layer_elements(&self, config: &Config) -> u64 {
        let hidden = config.hidden_size as u64;
        let heads = 2 * (self.heads.query_heads.len() + self.heads.kv_heads.len()) * config.head_dim;
        (0..config.num_hidden_layers)
            .map(|layer| {
                let columns = match &config.moe {
                    Some(moe) if config.is_sparse(layer) => moe.num_experts * (3 * self.expert_columns.len() + 1),
                    _ => 3 * self.columns.len(),
                };
                hidden * (heads + columns) as u64
            })
            .sum()
    }
}

/// How unevenly one kind of work lies on the ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// The most that a rank has.
    pub most: usize,
    /// The least that a rank has.
    pub least: usize,
    /// The sum over the ranks; more than there is where something is replicated.
    pub sum: usize,
    /// What there is.
    pub total: usize,
    ranks: usize,
}

impl Share {
    fn of(total: usize, parts: impl Iterator<Item = usize>) -> Self {
        let empty = Self { most: 0, least: usize::MAX, sum: 0, total, ranks: 0 };
        parts.fold(empty, |share, part| Self {
            most: share.most.max(part),
            least: share.least.min(part),
            sum: share.sum + part,
            total,
            ranks: share.ranks + 1,
        })
    }

    /// The time lost to it: the largest part relative to an equal share of the total, 1 where all are equal.
    pub fn imbalance(&self) -> f64 {
        if self.total == 0 { 1.0 } else { self.most as f64 * self.ranks as f64 / self.total as f64 }
    }
}

/// How evenly a model lies on a number of ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Imbalance {
    /// Query heads.
    pub query_heads: Share,
    /// KV heads; replication shows as a sum above the total.
    pub kv_heads: Share,
    /// Columns of dense feed-forward blocks, or of an expert in a model that has only sparse ones.
    pub columns: Share,
    /// Rows of the vocabulary.
    pub vocabulary: Share,
}

impl Imbalance {
    /// The shares of `ranks` ranks, with feed-forward columns cut at multiples of `granularity`.
    pub fn new(config: &Config, ranks: usize, granularity: usize) -> Self {
        let plans: Vec<_> = (0..ranks).map(|rank| RankPlan::new(config, ranks, rank, granularity)).collect();
        let share = |total, part: fn(&RankPlan) -> usize| Share::of(total, plans.iter().map(part));
        let sparse = (0..config.num_hidden_layers).all(|layer| config.is_sparse(layer));
        let columns = match &config.moe {
            Some(moe) if sparse => share(moe.moe_intermediate_size, |plan| plan.expert_columns.len()),
            _ => share(config.intermediate_size, |plan| plan.columns.len()),
        };
        Self {
            query_heads: share(config.num_attention_heads, |plan| plan.heads.query_heads.len()),
            kv_heads: share(config.num_key_value_heads, |plan| plan.heads.kv_heads.len()),
            columns,
            vocabulary: share(config.vocab_size, |plan| plan.vocabulary.len()),
        }
    }
}
