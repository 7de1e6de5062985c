//! The values that a user chooses: how the model is split, computed and stored.

use std::fmt;
use std::str::FromStr;

pub use ops::attention::AttentionAlgorithm;
pub use ops::kernels::IsaError;
pub use ops::schedule::{ExpertSplit, MlpSchedule};
pub use ops::{ActivationFormat, Isa, KvFormat, Placement};
pub use tensor::WeightFormat;

/// What the ranks divide among themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ParallelStrategy {
    /// Weights: each rank owns heads and feed-forward columns and sees all tokens.
    #[default]
    Heads,
    /// Positions: each rank owns tokens and their part of the cache.
    Sequence,
    /// Both: rows of `tp` ranks split weights, columns of `sp` ranks split positions.
    Grid {
        /// Ranks that split weights.
        tp: usize,
        /// Ranks that split positions.
        sp: usize,
    },
}

impl ParallelStrategy {
    /// How many of `ranks` split weights and how many split positions.
    pub fn grid(self, ranks: usize) -> (usize, usize) {
        match self {
            Self::Heads => (ranks, 1),
            Self::Sequence => (1, ranks),
            Self::Grid { tp, sp } => (tp, sp),
        }
    }
}

impl fmt::Display for ParallelStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Heads => f.pad("heads"),
            Self::Sequence => f.pad("sequence"),
            Self::Grid { tp, sp } => write!(f, "tp={tp},sp={sp}"),
        }
    }
}

impl FromStr for ParallelStrategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let grid = || {
            let (tp, sp) = text.strip_prefix("tp=")?.split_once(",sp=")?;
            let (tp, sp) = (tp.parse().ok()?, sp.parse().ok()?);
            (tp > 0 && sp > 0).then_some(Self::Grid { tp, sp })
        };
        match text {
            "heads" => Ok(Self::Heads),
            "sequence" => Ok(Self::Sequence),
            _ => grid()
                .ok_or_else(|| format!("found `{text}`, expected heads, sequence or tp=A,sp=B")),
        }
    }
}

/// How ranks divide a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Division {
    /// What they divide.
    pub strategy: ParallelStrategy,
    /// How feed-forward blocks are split and what is exchanged.
    pub schedule: MlpSchedule,
    /// How a mixture of experts lies on them.
    pub experts: ExpertSplit,
}

impl Division {
    /// How many of `ranks` ranks divide a feed-forward block: those that split weights, or where
    /// none do those that split positions.
    pub fn block_ranks(self, ranks: usize) -> usize {
        let (tp, _) = self.strategy.grid(ranks);
        if tp > 1 { tp } else { ranks }
    }
}

impl fmt::Display for Division {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let experts =
            if self.experts == ExpertSplit::Ranks { ", whole experts on ranks" } else { "" };
        write!(f, "{}, feed-forward {}{experts}", self.strategy, self.schedule)
    }
}

/// From this many tokens on, the products of half of them run at the speed of all: the default of
/// [`ModelOptions::overlap`].
pub const OVERLAP_TOKENS: usize = 128;

/// Tokens of a pass that gives each of the ranks that split positions at most `chunk` of them, and
/// at least one.
pub fn pass_tokens(chunk: usize, positions: usize) -> usize {
    chunk.max(1).saturating_mul(positions)
}

/// How a model is split, computed and stored; the same on every rank.
#[derive(Clone, Copy, Debug)]
pub struct ModelOptions {
    /// What the ranks divide.
    pub strategy: ParallelStrategy,
    /// How attention scores become outputs.
    pub attention: AttentionAlgorithm,
    /// The feed-forward schedule; `None` takes the strategy's own.
    pub mlp: Option<MlpSchedule>,
    /// How a mixture of experts lies on the ranks.
    pub experts: ExpertSplit,
    /// The format of the weights in memory; `None` keeps the checkpoint's.
    pub weights: Option<WeightFormat>,
    /// The format of cached keys and values.
    pub kv: KvFormat,
    /// The activations of products with bf16 weights. `Bf16` needs AVX512-BF16 on all ranks.
    pub activations: ActivationFormat,
    /// The least tokens of a pass (in a mixture of experts, of an expert on average) that goes
    /// through the layers in halves, so that between machines the sums of one half travel while the
    /// other computes.
    pub overlap: usize,
    /// The kernels' instruction set.
    pub isa: Isa,
    /// Threads of this rank.
    pub threads: usize,
    /// Where they run.
    pub placement: Placement,
}

impl ModelOptions {
    /// The defaults with the given instruction set: `Heads`, `Streaming`, experts split `Inside`,
    /// the checkpoint's weights, an f32 cache, f32 activations, one thread.
    pub fn new(isa: Isa) -> Self {
        Self {
            strategy: ParallelStrategy::default(),
            attention: AttentionAlgorithm::default(),
            mlp: None,
            experts: ExpertSplit::default(),
            weights: None,
            kv: KvFormat::F32,
            activations: ActivationFormat::F32,
            overlap: OVERLAP_TOKENS,
            isa,
            threads: 1,
            placement: Placement::Free,
        }
    }

    /// How the ranks divide the model.
    pub fn division(&self) -> Division {
        Division { strategy: self.strategy, schedule: self.schedule(), experts: self.experts }
    }

    /// The feed-forward schedule: the chosen one, or `Fused` where weights are split and `Local`
    /// where only positions are.
    pub fn schedule(&self) -> MlpSchedule {
        self.mlp.unwrap_or(match self.strategy {
            ParallelStrategy::Sequence | ParallelStrategy::Grid { tp: 1, .. } => MlpSchedule::Local,
            ParallelStrategy::Heads | ParallelStrategy::Grid { .. } => MlpSchedule::Fused,
        })
    }
}
