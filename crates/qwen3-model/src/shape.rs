//! The shape of a model on one rank, and what a forward pass costs there: the sum of what its
//! operations state.

use std::ops::Range;

use comm::node_of;
use ops::attention::AttentionShape;
use ops::attention_sequence::{AttentionPass, attention_cost};
use ops::cost::Group;
use ops::delta_rule::DeltaShape;
use ops::layout::TokenLayout;
use ops::linear::MatrixShape;
use ops::lm_head::wanted_rows_cost;
use ops::mlp::MlpShape;
use ops::residual::linear_mpi_cost;
use ops::{Cost, KvFormat, LogitRows};
use tensor::{WeightFormat, split_range};

use crate::config::Config;
use crate::formats::{LayerFormats, WeightFormats, granularity};
use crate::heads::{BlockShape, BlockShare, DeltaPlan, HeadPlan};
use crate::hybrid_config::HybridConfig;
use crate::options::Division;
use crate::overlap::Overlap;

/// Bytes of an f32.
const F32: usize = size_of::<f32>();

/// One rank's share of a decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerShape {
    /// What the mixer reads of the heads.
    pub in_proj: MatrixShape,
    /// The output gates of attention, or strength and decay of a delta rule.
    pub gates: Option<MatrixShape>,
    /// The heads.
    pub mixer: MixerShape,
    /// The output projection.
    pub out_proj: MatrixShape,
    /// The feed-forward block.
    pub mlp: MlpShape,
}

/// The heads of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum MixerShape {
    /// Attention to pages of keys and values.
    Attention(AttentionShape),
    /// A gated delta rule with a recurrent state.
    DeltaRule(DeltaShape),
}

impl LayerShape {
    /// Bytes of weights.
    pub fn bytes(&self) -> usize {
        let gates = self.gates.map_or(0, MatrixShape::bytes);
        self.in_proj.bytes() + gates + self.out_proj.bytes() + self.mlp.bytes()
    }

    /// KV heads of attention, or key heads of a delta rule.
    pub fn key_heads(&self) -> usize {
        match &self.mixer {
            MixerShape::Attention(shape) => shape.groups.len(),
            MixerShape::DeltaRule(shape) => shape.key_heads,
        }
    }

    /// The cost of the layer; `ranks` ranks split its heads, `parts` are this rank's tokens.
    fn cost(&self, pass: &AttentionPass<'_>, ranks: usize, parts: &[usize]) -> Cost {
        let tokens = parts.iter().sum();
        let mixer = match &self.mixer {
            MixerShape::Attention(shape) => attention_cost(shape, pass),
            MixerShape::DeltaRule(shape) => shape.cost(tokens),
        };
        self.in_proj.cost(tokens)
            + self.gates.map_or(Cost::default(), |gates| gates.cost(tokens))
            + mixer
            + linear_mpi_cost(self.out_proj, ranks, parts)
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
        let layer = |(run, formats): &(Range<usize>, LayerFormats)| {
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

    /// The heads of this rank in layers with attention.
    pub fn attention(&self) -> AttentionShape {
        let (tp, _) = self.division.strategy.grid(self.ranks);
        attention_shape(self.config, tp, self.rank)
    }

    /// Bytes of keys, values and recurrent states of a sequence of `positions` positions.
    pub fn cache_bytes(&self, kv: KvFormat, positions: usize) -> usize {
        let (_, sp) = self.division.strategy.grid(self.ranks);
        let layer = |(count, layer): &(usize, LayerShape)| {
            count
                * match &layer.mixer {
                    MixerShape::Attention(shape) => {
                        shape.position_bytes(kv) * positions.div_ceil(sp)
                    }
                    MixerShape::DeltaRule(shape) => F32 * shape.state_len(),
                }
        };
        self.layers.iter().map(layer).sum()
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

/// The heads of layers with attention on a rank of the `tp` that split heads.
pub(crate) fn attention_shape(config: &Config, tp: usize, rank: usize) -> AttentionShape {
    AttentionShape {
        groups: HeadPlan::new(config, tp, rank % tp).groups,
        head_dim: config.head_dim,
    }
}

/// The heads of layers with a gated delta rule on a rank of the `tp` that split heads.
pub(crate) fn delta_shape(hybrid: &HybridConfig, tp: usize, rank: usize) -> DeltaShape {
    let plan = DeltaPlan::new(hybrid, tp, rank % tp);
    DeltaShape {
        key_heads: plan.keys.len(),
        key_of: plan.key_of,
        key_dim: hybrid.linear_key_head_dim,
        value_dim: hybrid.linear_value_head_dim,
        taps: hybrid.linear_conv_kernel_dim,
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
    let hidden = config.hidden_size;
    let matrix = |format, rows, cols| MatrixShape { format, rows, cols };
    let (mixer, inputs, gates, outputs) = match config.delta_of(index) {
        None => {
            let shape = attention_shape(config, tp, rank);
            let (inputs, outputs) = (shape.qkv_width(), shape.query_width());
            (MixerShape::Attention(shape), inputs, outputs, outputs)
        }
        Some(hybrid) => {
            let shape = delta_shape(hybrid, tp, rank);
            let (inputs, gates, outputs) =
                (shape.input_width(), 2 * shape.heads(), shape.value_width());
            (MixerShape::DeltaRule(shape), inputs, gates, outputs)
        }
    };
    let block = BlockShape::new(config, index, formats.granularity());
    let experts = formats.experts.iter().map(|(run, formats)| (run.clone(), *formats));
    let router = formats
        .router
        .zip(config.moe_of(index))
        .map(|(format, moe)| (matrix(format, moe.num_experts, hidden), moe.num_experts_per_tok));
    let shared = formats.shared.map(|(formats, gate)| {
        let block = BlockShape::shared(config, index, granularity(formats[2]));
        let block = block.expect("a layer with a shared expert");
        let shape = mlp_shape(block, [(0..1, formats)].into_iter(), division, ranks, rank);
        (Box::new(shape), matrix(gate, 1, hidden))
    });
    LayerShape {
        in_proj: matrix(formats.in_proj, inputs, hidden),
        gates: formats.gates.map(|format| matrix(format, gates, hidden)),
        mixer,
        out_proj: matrix(formats.out_proj, hidden, outputs),
        mlp: MlpShape { router, shared, ..mlp_shape(block, experts, division, ranks, rank) },
    }
}

/// The share of `rank` of a feed-forward block without its router and shared expert; `experts` are
/// runs of experts with the formats of their matrices.
fn mlp_shape(
    block: BlockShape,
    experts: impl Iterator<Item = (Range<usize>, [WeightFormat; 3])>,
    division: Division,
    ranks: usize,
    rank: usize,
) -> MlpShape {
    let (tp, _) = division.strategy.grid(ranks);
    let parts = division.block_ranks(ranks);
    let share =
        |rank| BlockShare::new(block, division.schedule, division.experts, parts, rank % parts);
    let own = share(rank);
    // Balanced shares are equal where the first and the last are.
    let even = |size: fn(&BlockShare) -> usize| size(&share(0)) == size(&share(parts - 1));
    let (inner, down) = (own.inner.len(), &own.down);
    let experts = experts.map(|(run, [gate, up, down_format])| {
        let count = run.end.min(own.experts.end).saturating_sub(run.start.max(own.experts.start));
        let inner = |format| MatrixShape { format, rows: inner, cols: block.hidden };
        let down = MatrixShape { format: down_format, rows: down.0.len(), cols: down.1.len() };
        (count, [inner(gate), inner(up), down])
    });
    MlpShape {
        schedule: division.schedule,
        group: if tp > 1 { Group::Heads } else { Group::Positions },
        ranks: parts,
        hidden: block.hidden,
        columns: block.columns,
        even: [even(|share| share.inner.len()), even(|share| share.down.0.len())],
        experts: experts.filter(|(count, _)| *count > 0).collect(),
        router: None,
        shared: None,
    }
}
