//! What operations keep in memory while they work, from the shapes that they give it: for whoever
//! plans without loading a model.
//!
//! Bytes are those of the buffers at the size that they reach in a pass; tests of `qwen3-model`
//! hold them against what is allocated.

use simd_kernels::{ATTENTION_ROWS, InputKind, Isa, KV_SPAN, KvFormat, PanelData};
use tensor::WeightFormat;

use crate::attention::{AttentionShape, task_rows};
use crate::kv_cache::LayerCache;
use crate::layout::TokenLayout;
use crate::schedule::MlpSchedule;

const F32: usize = size_of::<f32>();

/// What an operation has in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bytes {
    /// From pass to pass.
    pub kept: usize,
    /// While it works.
    pub passing: usize,
}

/// An [`Input`](simd_kernels::Input) that is prepared for one product after another: one buffer for
/// floats, others for integers.
#[derive(Clone, Copy, Debug, Default)]
pub struct InputMemory {
    float: usize,
    integer: usize,
}

impl InputMemory {
    /// Prepares it [tokens, cols] for weights of this format.
    #[must_use]
    pub fn prepare(self, format: WeightFormat, tokens: usize, cols: usize) -> Self {
        let Self { float, integer } = self;
        match kind_of(format, tokens) {
            InputKind::Float => {
                Self { float: grown(float, InputKind::Float.bytes(tokens, cols)), integer }
            }
            kind => Self { float, integer: grown(integer, kind.bytes(tokens, cols)) },
        }
    }

    /// Bytes of all its buffers.
    pub fn bytes(self) -> usize {
        self.float + self.integer
    }
}

/// The kind on machines like this one: with AVX-512 Q8 takes less.
fn kind_of(format: WeightFormat, tokens: usize) -> InputKind {
    let data = match format {
        WeightFormat::F32 => PanelData::F32(&[]),
        WeightFormat::Bf16 => PanelData::Bf16(&[]),
        WeightFormat::F16 => PanelData::F16(&[]),
        WeightFormat::Q8 => PanelData::Q8(&[]),
        WeightFormat::Q4 => PanelData::Q4(&[]),
    };
    InputKind::of(Isa::all().last().unwrap_or(Isa::scalar()), &data, tokens)
}

/// A vector that has to grow to `bytes`: to twice its size at least.
fn grown(capacity: usize, bytes: usize) -> usize {
    if bytes > capacity { bytes.max(2 * capacity) } else { capacity }
}

/// Attention of a pass on one rank.
#[derive(Clone, Debug)]
pub struct AttentionMemory<'a> {
    /// The rank's heads.
    pub shape: &'a AttentionShape,
    /// The format of the cache.
    pub kv: KvFormat,
    /// Threads of the rank.
    pub threads: usize,
    /// The tokens of the pass, and which ranks of those that split positions have them.
    pub layout: &'a TokenLayout,
    /// This rank among these.
    pub rank: usize,
    /// The machines on which they lie.
    pub machines: usize,
    /// Whether there are earlier passes.
    pub past: bool,
}

impl AttentionMemory<'_> {
    /// Beside queries, keys, values and results of the rank's own tokens.
    pub fn bytes(&self) -> Bytes {
        let Self { shape, layout, rank, machines, past, .. } = *self;
        let (heads, width, own, all) =
            (shape.heads(), shape.query_width(), layout.count(rank), layout.tokens());
        let tasks = self.tasks(if past { all } else { own });
        if !layout.is_split() {
            return Bytes { kept: tasks, passing: 0 };
        }
        let numbers = 2 * shape.kv_width();
        let short = self.kv == KvFormat::F16 && machines > 1;
        let places = if short { numbers / 2 } else { numbers };
        // This rank's keys and values as they travel; what comes, as it travels, as numbers and as
        // a cache has it.
        let round = layout.goes_round(machines);
        let (come, block) = if round { (2 * own, own) } else { (all, all) };
        let keys = (own + come) * places + if short { block * numbers } else { 0 };
        let cached =
            block * LayerCache::position_bytes(self.kv, shape.groups.len(), shape.head_dim);
        // The states of this rank's tokens, merged from parts.
        let state = 2 * heads + width;
        let merged = if round || past { own * state } else { 0 };
        // All queries, what they find here with its maxima and sums, and a factor for each; of this
        // rank its queries and what it finds anywhere.
        let (kept, summed) = if past {
            (all * (2 * width + 2 * heads), all * heads + own * 2 * width)
        } else {
            (0, 0)
        };
        Bytes { kept: tasks + F32 * kept, passing: cached + F32 * (keys + merged + summed) }
    }

    /// Of the threads' tasks with the queries of so many tokens.
    fn tasks(&self, tokens: usize) -> usize {
        let (head_dim, heads) = (self.shape.head_dim, self.shape.heads());
        let group = self.shape.groups.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let rows = task_rows(tokens, heads, self.threads).min(tokens * group);
        // Of a row its query, also as the kernels read it, and its result, also as they do; of the
        // rows that go together scores and weights; of a span of keys these and their values as
        // int16.
        let scores = rows.clamp(64, ATTENTION_ROWS / 2) * (F32 + 2) * KV_SPAN;
        self.threads * (rows * 4 * F32 * head_dim + scores + 2 * 2 * KV_SPAN * head_dim)
    }
}

/// The feed-forward block of a layer on one rank.
#[derive(Clone, Copy, Debug)]
pub struct MlpMemory {
    /// What is exchanged.
    pub schedule: MlpSchedule,
    /// Ranks that split the block.
    pub ranks: usize,
    /// Tokens that the rank computes.
    pub tokens: usize,
    /// Those that are its own: fewer where it gathers others' first.
    pub own: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Columns of the block, or of an expert.
    pub columns: usize,
    /// This rank's of them.
    pub inner: usize,
    /// Rows and columns of its share of down.
    pub down: (usize, usize),
    /// The formats of gate and down.
    pub formats: [WeightFormat; 2],
    /// The experts among which it chooses, in a mixture.
    pub experts: Option<ExpertsMemory>,
}

/// The experts of a block.
#[derive(Clone, Copy, Debug)]
pub struct ExpertsMemory {
    /// How many the layer has.
    pub all: usize,
    /// Those of which this rank has something.
    pub here: usize,
    /// Visits of a token.
    pub visits: usize,
    /// The router's format.
    pub router: WeightFormat,
}

impl MlpMemory {
    /// Beside the normalized tokens and the residual stream.
    pub fn bytes(&self) -> Bytes {
        let Self { schedule, ranks, tokens, own, hidden, columns, inner, down, formats, experts } =
            *self;
        let whole = schedule == MlpSchedule::Local || ranks == 1;
        let width = if schedule == MlpSchedule::Gathered { down.0 } else { hidden };
        let inputs = |tokens| {
            InputMemory::default()
                .prepare(formats[0], tokens, hidden)
                .prepare(formats[1], tokens, down.1)
        };
        let result = if whole { 0 } else { tokens * width };
        let (rows, inputs, visited) = match experts {
            None => (tokens, inputs(tokens).bytes(), 0),
            Some(ExpertsMemory { all, here, visits, router }) => {
                // Buffers that grow from layer to layer grow to twice their size: those of each
                // expert, of which hardly one has most visits in the first layer, and with whole
                // experts on ranks those of all visits here.
                let rows = tokens * visits * here / all * if here < all { 2 } else { 1 };
                let routed = InputMemory::default().prepare(router, tokens, hidden).bytes()
                    + F32 * tokens * all;
                (rows, 2 * here * inputs(tokens * visits / all).bytes() + routed, rows * width)
            }
        };
        // This rank's columns, and gate, up and activation where they are made whole, by gathers
        // that bring them before they are in order.
        let whole = rows * columns;
        let (block, passing) = match schedule {
            MlpSchedule::Fused | MlpSchedule::Local => (0, 0),
            MlpSchedule::Naive => (3 * whole, whole),
            MlpSchedule::Gathered => (3 * whole + tokens * hidden, whole),
        };
        let gathered = if own < tokens { (tokens + own) * hidden } else { 0 };
        let kept = inputs + F32 * (rows * inner + block + visited + result + gathered);
        Bytes { kept, passing: F32 * passing }
    }
}
