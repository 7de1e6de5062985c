//! How unevenly a model lies on its ranks.

use qwen3_model::Config;
use qwen3_model::ops::schedule::MlpSchedule;
use qwen3_model::options::Division;
use qwen3_model::shape::ModelShape;

/// How unevenly one kind of work lies on the ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// The most that a rank has.
    pub most: usize,
    /// The least that a rank has.
    pub least: usize,
    /// The sum over the ranks; above the total where something is replicated.
    pub sum: usize,
    /// The total of the model.
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

    /// The largest part relative to an equal share of the total: 1 where all parts are equal and
    /// nothing is replicated.
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
    /// Columns of dense feed-forward blocks; in a model with sparse blocks only, those of all
    /// experts together. One rank's where each rank computes the whole block for its positions.
    pub columns: Share,
    /// Rows of the vocabulary.
    pub vocabulary: Share,
}

impl Imbalance {
    /// The imbalance of `shapes`, one for each rank of `division`.
    pub fn new(config: &Config, division: Division, shapes: &[ModelShape<'_>]) -> Self {
        let (tp, _) = division.strategy.grid(shapes.len());
        let blocks = match division.schedule {
            MlpSchedule::Local if tp == 1 => 1,
            _ => division.block_ranks(shapes.len()),
        };
        let heads = || shapes[..tp].iter().map(ModelShape::attention);
        let columns = shapes[..blocks].iter().map(|shape| {
            let mut layers = shape.layers.iter().map(|(_, layer)| &layer.mlp);
            let mlp = layers.clone().find(|mlp| mlp.router.is_none()).or_else(|| layers.next());
            let experts = mlp.into_iter().flat_map(|mlp| &mlp.experts);
            experts.map(|(count, [gate, ..])| count * gate.rows).sum()
        });
        let all = match &config.moe {
            Some(moe) if (0..config.num_hidden_layers).all(|layer| config.is_sparse(layer)) => {
                moe.num_experts * moe.moe_intermediate_size
            }
            _ => config.intermediate_size,
        };
        Self {
            query_heads: Share::of(config.num_attention_heads, heads().map(|heads| heads.heads())),
            kv_heads: Share::of(config.num_key_value_heads, heads().map(|h| h.groups.len())),
            columns: Share::of(all, columns),
            vocabulary: Share::of(config.vocab_size, shapes.iter().map(|shape| shape.head.rows)),
        }
    }
}
