//! The shape of a model on one rank, and what a forward pass costs there: the sum of what its
//! operations state.

use comm::node_of;
use ops::attention::AttentionShape;
use ops::attention_sequence::{AttentionPass, attention_cost};
use ops::cost::Group;
use ops::layout::TokenLayout;
use ops::linear::MatrixShape;
use ops::lm_head::wanted_rows_cost;
use ops::mlp::MlpShape;
use ops::residual::linear_mpi_cost;
use ops::{Cost, KvFormat, LogitRows};
use tensor::split_range;

use crate::config::Config;
use crate::formats::{LayerFormats, WeightFormats};
use crate::heads::{BlockShape, BlockShare, HeadPlan};
use crate::options::Division;
use crate::overlap::Overlap;

/// Bytes of an f32.
const F32: usize = size_of::<f32>();

/// One rank's share of a decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerShape {
    /// Queries over keys over values.
    pub qkv: MatrixShape,
    /// The heads.
    pub attention: AttentionShape,
    /// The output projection.
    pub output: MatrixShape,
    /// The feed-forward block.
    pub mlp: MlpShape,
}

impl LayerShape {
    /// Bytes of weights.
    pub fn bytes(&self) -> usize {
        self.qkv.bytes() + self.output.bytes() + self.mlp.bytes()
    }

    /// The cost of the layer; `ranks` ranks split its heads, `parts` are this rank's tokens.
    fn cost(&self, pass: &AttentionPass<'_>, ranks: usize, parts: &[usize]) -> Cost {
        self.qkv.cost(parts.iter().sum())
            + attention_cost(&self.attention, pass)
            + linear_mpi_cost(self.output, ranks, parts)
            + self.mlp.cost(pass.layout, parts)
    }
}

/// A model as one rank holds it.
#[derive(Clone, Debug)]
pub struct ModelShape<'a> {
    config: &'a Config,
    division: Division,
    ranks: usize,
    rank: usize,
    /// Consecutive layers of equal shape: their number and their shape.
    pub layers: Vec<(usize, LayerShape)>,
    /// This rank's rows of the vocabulary.
    pub head: MatrixShape,
}

/// A forward pass.
#[derive(Clone, Copy, Debug)]
pub struct PassShape {
    /// Tokens of the pass.
    pub tokens: usize,
    /// Tokens of earlier passes.
    pub past: usize,
    /// The logits that are wanted.
    pub rows: LogitRows,
    /// Format of the cache.
    pub kv: KvFormat,
    /// Machines on which the ranks lie, in equal contiguous blocks.
    pub nodes: usize,
    /// The least tokens of a pass that goes in halves:
    /// [`ModelOptions::overlap`](crate::ModelOptions::overlap).
    pub overlap: usize,
}

/// What a forward pass costs one rank.
#[derive(Clone, Debug)]
pub struct ForwardCost {
    /// Numbers of layers and what each of them costs.
    pub layers: Vec<(usize, Cost)>,
    /// Rows for the head, and the head.
    pub head: Cost,
    /// Whether the pass goes in halves, so that sums travel while the ranks compute.
    pub halves: bool,
    /// Bytes of all buffers that are allocated at once.
    pub scratch: usize,
}

impl ForwardCost {
    /// The cost of each layer in turn, then that of the head.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Cost)> {
        let layers = self.layers.iter().map(|(count, cost)| (*count, cost));
        layers.chain([(1, &self.head)])
    }
}

impl<'a> ModelShape<'a> {
    /// The share of `rank` among `ranks`.
    pub fn new(
        config: &'a Config,
        formats: &WeightFormats,
        division: Division,
        ranks: usize,
        rank: usize,
    ) -> Self {
        let layer = |(run, formats): &(std::ops::Range<usize>, LayerFormats)| {
            (run.len(), layer_shape(config, formats, run.start, division, ranks, rank))
        };
        Self {
            config,
            division,
            ranks,
            rank,
            layers: formats.layers.iter().map(layer).collect(),
            head: MatrixShape {
                format: formats.head,
                rows: split_range(config.head_rows(), ranks, rank).len(),
                cols: config.hidden_size,
            },
        }
    }

    /// Bytes of packed weights, replicated KV heads and routers included: what
    /// [`Model::weight_bytes`](crate::Model::weight_bytes) is after loading.
    pub fn weight_bytes(&self) -> usize {
        let layers: usize = self.layers.iter().map(|(count, layer)| count * layer.bytes()).sum();
        layers + self.head.bytes()
    }

    /// Bytes of keys and values of a sequence of `positions` positions.
    pub fn cache_bytes(&self, kv: KvFormat, positions: usize) -> usize {
        let (_, sp) = self.division.strategy.grid(self.ranks);
        let layer =
            |(count, layer): &(usize, LayerShape)| count * layer.attention.position_bytes(kv);
        self.layers.iter().map(layer).sum::<usize>() * positions.div_ceil(sp)
    }

    /// The cost of a forward pass, without that of choosing a token.
    pub fn pass(&self, pass: &PassShape) -> ForwardCost {
        let PassShape { tokens, past, rows, kv, nodes, overlap } = *pass;
        let Self { config, division, ranks, rank, .. } = *self;
        let (tp, sp) = division.strategy.grid(ranks);
        let layout = TokenLayout::balanced(tokens, sp);
        let own = layout.count(rank / tp);
        // Only where all ranks split heads does a pass go in halves; these lie on all machines.
        let overlap = Overlap { machines: nodes, tokens: overlap };
        let parts = overlap.parts(config, sp, division.schedule, own);
        let parts: Vec<usize> = parts.iter().map(ExactSizeIterator::len).collect();
        let mut machines: Vec<_> =
            (0..sp).map(|row| node_of(row * tp + rank % tp, ranks, nodes)).collect();
        machines.dedup();
        let attention = AttentionPass {
            layout: &layout,
            ranks: sp,
            rank: rank / tp,
            machines: machines.len(),
            past,
            kv,
        };
        let layer =
            |(count, layer): &(usize, LayerShape)| (*count, layer.cost(&attention, tp, &parts));
        let layers: Vec<_> = self.layers.iter().map(layer).collect();
        let wanted = match rows {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::All => tokens,
        };
        let hidden = config.hidden_size;
        let head = wanted_rows_cost(&layout, rows, hidden) + self.head.cost(wanted);
        // The residual stream and its norm; parts are joined for the head.
        let stream = F32 * (2 * own + if parts.len() > 1 { own } else { 0 }) * hidden;
        let layer = layers.iter().map(|(_, cost)| cost.scratch).max().unwrap_or(0);
        let scratch = stream + layer + head.scratch;
        ForwardCost { layers, head, halves: parts.len() > 1, scratch }
    }
}

/// The share of `rank` of the layer `index`.
fn layer_shape(
    config: &Config,
    formats: &LayerFormats,
    index: usize,
    division: Division,
    ranks: usize,
    rank: usize,
) -> LayerShape {
    let (tp, _) = division.strategy.grid(ranks);
    let groups = HeadPlan::new(config, tp, rank % tp).groups;
    let attention = AttentionShape { groups, head_dim: config.head_dim };
    let hidden = config.hidden_size;
    let matrix = |format, rows, cols| MatrixShape { format, rows, cols };

    let block = BlockShape::new(config, index, formats.granularity());
    let parts = division.block_ranks(ranks);
    let share =
        |rank| BlockShare::new(block, division.schedule, division.experts, parts, rank % parts);
    let own = share(rank);
    // Balanced shares are equal where the first and the last are.
    let even = |size: fn(&BlockShare) -> usize| size(&share(0)) == size(&share(parts - 1));
    let (inner, down) = (own.inner.len(), &own.down);
    let experts = formats.experts.iter().map(|(run, [gate, up, down_format])| {
        let count = run.end.min(own.experts.end).saturating_sub(run.start.max(own.experts.start));
        let gate_up = [*gate, *up].map(|format| matrix(format, inner, hidden));
        (count, [gate_up[0], gate_up[1], matrix(*down_format, down.0.len(), down.1.len())])
    });
    let experts = experts.filter(|(count, _)| *count > 0).collect();
    let router = formats
        .router
        .zip(config.moe_of(index))
        .map(|(format, moe)| (matrix(format, moe.num_experts, hidden), moe.num_experts_per_tok));
    LayerShape {
        qkv: matrix(formats.qkv, attention.qkv_width(), hidden),
        output: matrix(formats.output, hidden, attention.query_width()),
        attention,
        mlp: MlpShape {
            schedule: division.schedule,
            group: if tp > 1 { Group::Heads } else { Group::Positions },
            ranks: parts,
            hidden,
            columns: block.columns,
            even: [even(|share| share.inner.len()), even(|share| share.down.0.len())],
            experts,
            router,
        },
    }
}
