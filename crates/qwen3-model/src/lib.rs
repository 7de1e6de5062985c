//! The Qwen3 language models, dense and mixture-of-experts, split over any number of ranks.

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

// Modules in reading order, lowest first; a module uses only those above it.
mod fields;
mod rope_config;
mod config;
mod counts;
mod generation_config;
mod names;
mod rotary;
mod error;
mod options;
mod heads;
mod overlap;
mod formats;
mod shape;
mod deterministic;
mod candidates;
mod sampling;
mod presets;
mod shards;
mod synth;
mod quantize;
mod cache;
mod layer;
mod model;
mod load;
mod generation;
mod perplexity;

pub use cache::KvCache;
pub use comm;
pub use config::{Config, MoeConfig};
pub use error::ModelError;
pub use fields::ConfigError;
pub use formats::WeightFormats;
pub use generation::{
    GenerateError, GenerateParams, Generated, Progress, StopReason, Timing, generate,
};
pub use generation_config::{GenerationConfig, eos_token_ids};
pub use heads::HeadPlan;
pub use load::LoadProgress;
pub use model::{Logits, Model};
pub use names::{
    EMBEDDING, FINAL_NORM, LM_HEAD, LayerNames, MlpNames, TensorRole, TensorSpec, open_weights,
    tensor_specs,
};
pub use ops;
pub use ops::{
    AttentionAlgorithm, ExpertSplit, Isa, IsaError, KvFormat, LimitsProbe, LogitRows, MlpSchedule,
    Placement, Profile, Span, Work,
};
pub use options::{Division, ModelOptions, OVERLAP_TOKENS, ParallelStrategy, pass_tokens};
pub use perplexity::{Perplexity, PerplexityError, perplexity};
pub use presets::{Preset, UnknownPreset};
pub use quantize::quantize;
pub use rope_config::{RopeConfig, RopeScaling, Yarn};
pub use rotary::RotaryTable;
pub use sampling::{SampleRow, SampledToken, Sampler, SamplingError, SamplingParams};
pub use shape::{ForwardCost, LayerShape, ModelShape, PassShape};
pub use shards::{ExportError, ExportProgress};
pub use synth::{SynthOptions, synthesize};
pub use tensor;
pub use tensor::{Checkpoint, CheckpointError, WeightFormat};
