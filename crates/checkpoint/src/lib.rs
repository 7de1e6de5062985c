//! Model files: a Hugging Face folder or a GGUF file, opened once, of which each rank reads only
//! what it owns.
#![doc = ""]
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little endian");

// Modules in reading order, lowest first; a module uses only those above it.
mod error;
mod file;
mod region;
mod matrix;
mod stored;
mod header;
mod gguf;
mod gguf_model;
mod names;
mod quantization;
mod checkpoint;
mod locate;
mod source;
mod writer;

pub use checkpoint::Checkpoint;
pub use error::{CheckpointError, DocumentError, OpenError};
pub use file::Document;
pub use locate::hub_folder;
pub use matrix::{Matrix, Scratch};
pub use source::ModelSource;
pub use writer::{CheckpointWriter, TensorSpec, WriteError};
