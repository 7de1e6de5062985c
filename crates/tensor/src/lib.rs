//! Numbers in memory: activations, weight formats, packed weight matrices and balanced splits.
#![doc = ""]
#![doc = include_str!("../README.md")]

#[cfg(target_endian = "big")]
compile_error!("encoded rows and packed panels are little endian");

// Which indices belong to which rank or thread.
mod split;

// F32, Bf16, F16, Q8, Q4 and their sizes.
mod format;

// Groups of 32 weights to 8 or 4 bits and back.
mod quantize;

// Rows to their stored bytes and back.
mod encode;

// A matrix that gives its weights when asked.
mod source;

// Weights in memory: huge pages, the layout of a panel, filling a panel, the whole matrix.
#[allow(unsafe_code)]
mod buffer;

mod panel;

// What rounding costs.
mod rounding;

mod packer;

mod packed;

pub use buffer::share_heap;
pub use encode::{EncodeError, decode_row, encode_rows};
pub use format::{GROUP, PANEL, UnknownFormat, WeightFormat};
pub use packed::{PackedData, PackedMatrix, PanelChunk};
pub use quantize::{GroupQ4, GroupQ8, quantize_group_q4, quantize_group_q8};
pub use rounding::Rounding;
pub use source::{DenseMatrix, MatrixSource};
pub use split::{split_granular, split_range};

/// Row-major f32 activations, `[tokens, features]`.
pub type Activations = ndarray::Array2<f32>;
