//! What is planned for: a model, the ranks that share it, and the tokens.

use comm::WireFormat;
use ops::{ExpertSplit, KvFormat, MlpSchedule};

use crate::config::Config;
use crate::plan_machine::Machine;
use crate::plan_weights::WeightFormats;

/// What is planned for.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// The model.
    pub config: &'a Config,
    /// Its weights in memory.
    pub weights: &'a WeightFormats,
    /// The format of cached keys and values.
    pub kv: KvFormat,
    /// How sums travel.
    pub wire: WireFormat,
    /// What ranks and links can do.
    pub machine: &'a Machine,
    /// Ranks that share the model.
    pub ranks: usize,
    /// Machines on which they lie, in contiguous blocks.
    pub nodes: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens to generate.
    pub generate: usize,
    /// Prompt tokens of a pass for each rank of those that split positions.
    pub chunk: usize,
    /// The feed-forward schedule, where it is given.
    pub schedule: Option<MlpSchedule>,
    /// How a mixture of experts lies on the ranks, where it is given.
    pub experts: Option<ExpertSplit>,
    /// Bytes that a rank may take, where it is known: ways that need more are not recommended if there are others.
    pub memory: Option<usize>,
    /// Whether schedules that exchange more than they have to are listed too.
    pub all_schedules: bool,
}
