//! The Qwen3 language models, dense and mixture-of-experts, split over any number of ranks.

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

// Modules in reading order, lowest first; a module uses only those above it.
mod fields;
pub mod rope_config;
pub mod hybrid_config;
mod quantization_config;
pub mod config;
pub mod generation_config;
pub mod names;
pub mod pooling;
pub mod rotary;
pub mod arena;
pub mod batch;
mod error;
pub mod options;
pub mod heads;
mod overlap;
pub mod formats;
pub mod shape;
mod counts;
mod deterministic;
mod candidates;
pub mod sampling;
pub mod presets;
pub mod shards;
pub mod synth;
pub mod quantize;
mod workspace;
mod layer;
mod model;
pub mod load;
mod sequence;
pub mod perplexity;

pub use arena::Arena;
pub use batch::{Batch, Output, Span, Wanted};
pub use checkpoint;
pub use checkpoint::ModelSource;
pub use comm;
pub use config::Config;
pub use error::ModelError;
pub use model::{Logits, Model};
pub use ops;
pub use ops::{Isa, LogitRows, PAGE_POSITIONS, PageId};
pub use options::{ModelOptions, ParallelStrategy};
pub use sampling::{Sampler, SamplingParams};
pub use sequence::Sequence;
pub use tensor;
pub use workspace::Workspace;
