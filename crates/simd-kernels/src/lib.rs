//! Transformer kernels over slices, each as a scalar reference and in AVX2, chosen once at run time.

// Modules in reading order, lowest first; a module uses only those above it.
mod isa;

pub use isa::{Isa, IsaError};
