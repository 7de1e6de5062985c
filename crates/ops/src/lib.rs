//! What a decoder is made of, for one rank of many: each operation computes this rank's share on
//! the rank's team of threads and calls the collectives that make the shares whole.

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

// Modules in reading order, lowest first; a module uses only those above it.

// What every operation is given: the ranks, the threads, and what notes their time.
mod background;
mod profile;
mod team;
mod context;

// Tokens and products with weights.
mod layout;
mod linear;
mod embedding;
mod norm;

// Attention and what it reads.
mod attention;
mod kv_cache;
mod attention_headwise;
mod kv_ring;
mod kv_wire;
mod merged;
mod attention_sequence;

// The feed-forward block.
mod residual;
mod routing;
mod schedule;
mod mlp;

// The head.
mod lm_head;

// What operations keep in memory, and what the machine allows.
mod memory;
mod limits;

pub use attention::{
    AttentionAlgorithm, AttentionScratch, AttentionShape, AttentionSpec, QkNorm, Rotary,
};
pub use attention_headwise::attention_headwise;
pub use attention_sequence::{SequenceSpan, SequenceSpec, attention_sequence};
pub use background::{Background, Pending};
pub use context::Context;
pub use embedding::Embedding;
pub use kv_cache::LayerCache;
pub use layout::TokenLayout;
pub use limits::LimitsProbe;
pub use linear::{Linear, gather_columns, reshape};
pub use lm_head::{LogitRows, lm_head, wanted_rows};
pub use memory::{AttentionMemory, Bytes, ExpertsMemory, InputMemory, MlpMemory};
pub use mlp::{Expert, Mlp, MlpScratch, mlp};
pub use norm::{prepare, rms_norm};
pub use profile::{Operation, Profile, Span, Work};
pub use residual::{Residual, linear_mpi};
pub use routing::Router;
pub use schedule::{ExpertSplit, MlpSchedule};
pub use simd_kernels::{Input, Isa, IsaError, KvFormat, Store, argmax, exp};
pub use team::{Placement, Team};
