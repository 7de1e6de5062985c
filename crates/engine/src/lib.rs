//! Continuous batching for the Qwen3 models over any number of ranks.

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

// Modules in reading order, lowest first; a module uses only those above it.

// What clients see.
mod constraint;
mod request;
mod stats;

// Which sequence computes what, where: rank 0's decisions, without model and clock.
mod pages;
mod chain;
mod pace;
mod states;
mod scheduler;

// One step on every rank.
mod record;
mod sequences;
mod step;
mod steps_file;

// Rank 0 and the ranks that follow it.
mod handle;
mod service;
mod engine;

pub use constraint::{ConstraintError, Next, ThinkingBudget, TokenConstraint};
pub use engine::{Engine, EngineConfig, EngineError, KvMemory};
pub use handle::{EngineHandle, Limits, Stream, TimedOut};
pub use qwen3_model;
pub use record::RecordError;
pub use request::{
    Event, FinishReason, Pooling, Request, RequestError, SubmitError, TokenLogprobs, Usage,
};
pub use stats::{CollectiveStats, RankShare, Stats, StepTime};
