//! The operations of a decoder on one of several ranks. Each operation computes this rank's share
//! with the rank's team of threads and calls the collectives that combine the shares.

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

// Modules in reading order, lowest first; a module uses only those above it.

// The context of every operation: ranks, threads, cost and profile.
pub mod background;
pub mod cost;
pub mod profile;
pub mod team;
mod context;

// Tokens and products with weights.
pub mod layout;
pub mod linear;
mod embedding;
pub mod norm;

// Attention and the KV pages that it reads.
pub mod attention;
pub mod pages;
mod attention_tasks;
pub mod attention_headwise;
mod kv_ring;
mod kv_wire;
mod merged;
pub mod attention_sequence;

// The gated delta rule and its states.
pub mod delta_rule;
pub mod states;

// The feed-forward block.
pub mod residual;
pub mod routing;
pub mod schedule;
pub mod mlp;

// The head.
pub mod lm_head;

// The limits of the hardware.
pub mod limits;

pub use attention_sequence::attention_sequence;
pub use comm;
pub use context::{ActivationFormat, Context};
pub use cost::Cost;
pub use delta_rule::delta_rule;
pub use embedding::Embedding;
pub use linear::Linear;
pub use lm_head::{LogitRows, lm_head};
pub use mlp::mlp;
pub use norm::rms_norm;
pub use pages::{KvArena, PAGE_POSITIONS, PageId};
pub use profile::Profile;
pub use residual::linear_mpi;
pub use simd_kernels::{Isa, KvFormat};
pub use states::StateArena;
pub use team::Placement;
pub use tensor;

/// Names of the crate `simd-kernels` that operations take or return.
pub mod kernels {
    pub use simd_kernels::{
        Input, InputKind, IsaError, KvMemoryError, PanelData, Panels, Store, argmax, exp,
    };
}
