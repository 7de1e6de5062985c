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
    /// The ranks that share the model, on their machines in contiguous blocks, and what they and
    /// their links can do.
    pub machine: &'a Machine,
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
    /// Bytes that a rank may take, where it is known: ways that need more are not recommended if
    /// there are others.
    pub memory: Option<usize>,
    /// Whether schedules that exchange more than they have to are listed too.
    pub all_schedules: bool,
}

impl<'a> PlanInput<'a> {
    /// A prompt of 512 tokens in one pass and an answer of 256, a cache in f16 and sums in f32.
    /// Neither a schedule nor a place of experts is given, nor is the memory known.
    pub fn new(config: &'a Config, weights: &'a WeightFormats, machine: &'a Machine) -> Self {
        Self {
            config,
            weights,
            kv: KvFormat::F16,
            wire: WireFormat::F32,
            machine,
            prompt: 512,
            generate: 256,
            chunk: 512,
            schedule: None,
            experts: None,
            memory: None,
            all_schedules: false,
        }
    }
}
