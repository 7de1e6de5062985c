//! Activations, weight formats, packed weight matrices, balanced splits and a checkpoint reader
//! that reads only what a rank owns.
#![doc = ""]
#![doc = include_str!("../README.md")]

#[cfg(target_endian = "big")]
compile_error!("safetensors files and packed panels are little endian");

// Which indices belong to which rank or thread.
mod split;

// F32, Bf16, F16, Q8, Q4 and their sizes.
mod format;

// Groups of 32 weights to 8 or 4 bits and back.
mod quantize;

// Rows to their stored bytes.
mod encode;

// A checkpoint on disk: what can be wrong with it, an open file, its header, a rectangle of a
// matrix in it, the folder.
mod error;

mod source;

mod header;

mod matrix;

mod checkpoint;

// The other direction.
mod writer;

// Weights in memory: huge pages, the layout of a panel, the way from a file to a panel, the whole
// matrix.
#[allow(unsafe_code)]
mod buffer;

mod panel;

mod packer;

mod packed;

pub use checkpoint::Checkpoint;
pub use encode::{EncodeError, encode_rows};
pub use error::CheckpointError;
pub use format::{GROUP, PANEL, UnknownFormat, WeightFormat};
pub use matrix::Matrix;
pub use packed::{PackedData, PackedMatrix, PanelChunk};
pub use quantize::{GroupQ4, GroupQ8, quantize_group_q4, quantize_group_q8};
pub use split::{split_granular, split_range};
pub use writer::{CheckpointWriter, TensorSpec, WriteError};

/// Row-major f32 activations, `[tokens, features]`.
pub type Activations = ndarray::Array2<f32>;
