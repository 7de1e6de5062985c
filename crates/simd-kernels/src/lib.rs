//! Transformer kernels over slices, each as a scalar reference and in AVX2, some also in AVX-512,
//! chosen once at run time.
#![doc = include_str!("../README.md")]
// Loads, stores and calls that need an instruction set are in most files; each block says what it
// relies on.
#![allow(unsafe_code)]

// Modules in reading order, lowest first; a module uses only those above it.

#[cfg(test)]
mod guarded;

// The instruction set and the number formats.
mod half_float;
mod isa;
#[cfg(target_arch = "x86_64")]
mod lanes;

mod halves;

// Elementwise kernels and one row at a time.
mod causal_conv;
mod delta_rule;
mod exp;
mod norm;
mod rope;
mod softmax;
mod swiglu;
mod vector;

// Attention over the cache of one KV head.
mod kv;

mod attention;

// Matrix products with packed weights.
mod panels;

mod matrix;

mod pack;

mod input;

mod matmul;

// Threads, and what a machine can do at best.
mod fork_join;
mod limits;

pub use attention::{
    ATTENTION_ROWS, AttentionArithmetic, AttentionInput, SoftmaxState, attention_materialized,
    attention_streaming,
};
pub use causal_conv::causal_conv_silu;
pub use delta_rule::{DeltaTokens, delta_rule, delta_state_len};
pub use exp::exp;
pub use fork_join::{ForkJoin, ThreadError};
pub use halves::{pack_halves, unpack_halves};
pub use input::{Input, InputKind, InputPart};
pub use isa::{Isa, IsaError};
pub use kv::{
    KV_SPAN, KvFormat, KvHead, KvLayout, KvMemory, KvMemoryError, KvPart, KvReader, KvSpan,
    KvSpanMut, UnknownKvFormat,
};
pub use limits::{
    DOT_BF16_OPS, MULTIPLY_ADD_FLOPS, dot_bf16, dot_int8, dot_int8_ops, multiply_add, read,
};
pub use matmul::{Store, matmul, matmul_swiglu};
pub use matrix::MatMut;
pub use norm::rms_norm;
pub use panels::{GROUP, PANEL, PanelData, Panels};
pub use rope::{norm_rope, rope};
pub use softmax::softmax;
pub use swiglu::{sigmoid_gate, swiglu};
pub use vector::{add, argmax, dot, scale, scale_add};
