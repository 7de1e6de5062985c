//! What a decoder is made of, for one rank of many: each operation computes this rank's share on
//! the rank's team of threads and calls the collectives that make the shares whole.

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

// Modules in reading order, lowest first; a module uses only those above it.

// What every operation is given: the ranks, the threads, and what notes their time.
mod background;
mod cost;
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

// What the machine allows.
mod limits;

pub use attention::{
    AttentionAlgorithm, AttentionScratch, AttentionShape, AttentionSpec, QkNorm, Rotary,
};
pub use attention_headwise::attention_headwise;
pub use attention_sequence::{
    AttentionPass, SequenceSpan, SequenceSpec, attention_cost, attention_sequence,
};
pub use background::{Background, Pending};
pub use context::Context;
pub use cost::{Call, Cost, Group, Operand, Work};
pub use embedding::Embedding;
pub use kv_cache::LayerCache;
pub use layout::TokenLayout;
pub use limits::LimitsProbe;
pub use linear::{Linear, MatrixShape, gather_columns, reshape};
pub use lm_head::{LogitRows, lm_head, wanted_rows, wanted_rows_cost};
pub use mlp::{Expert, Mlp, MlpScratch, MlpShape, mlp};
pub use norm::{prepare, rms_norm};
pub use profile::{Operation, Profile, Span};
pub use residual::{Residual, linear_mpi, linear_mpi_cost};
pub use routing::Router;
pub use schedule::{ExpertSplit, MlpSchedule};
pub use simd_kernels::{Input, Isa, IsaError, KvFormat, Store, argmax, exp};
pub use team::{Placement, Team};
