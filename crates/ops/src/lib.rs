//! What a decoder is made of, for one rank of many: each operation computes this rank's share on the
//! rank's team of threads and calls the collectives that make the shares whole.

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

// Modules in reading order, lowest first; a module uses only those above it.
mod attention;
mod attention_headwise;
mod attention_sequence;
mod background;
mod context;
mod embedding;
mod kv_cache;
mod kv_ring;
mod kv_wire;
mod layout;
mod linear;
mod lm_head;
mod memory;
mod merged;
mod mlp;
mod norm;
mod profile;
mod residual;
mod routing;
mod schedule;
mod team;

// What the machine allows.
mod limits;

pub use attention::{AttentionAlgorithm, AttentionScratch, AttentionShape, AttentionSpec, QkNorm, Rotary};
pub use attention_headwise::attention_headwise;
pub use attention_sequence::{SequenceSpan, attention_sequence};
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
pub use simd_kernels::{Input, Isa, IsaError, KvFormat, Store, argmax};
pub use team::{Placement, Team};
