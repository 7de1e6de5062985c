//! Transformer kernels over slices, each as a scalar reference and in AVX2, chosen once at run time.

// Modules in reading order, lowest first; a module uses only those above it.

// The instruction set and the number formats.
mod half_float;
mod isa;

// Matrix products with packed weights.
mod panels;

mod matrix;

mod pack;

mod input;

mod matmul;

// Threads.
mod fork_join;

pub use fork_join::ForkJoin;
pub use input::{Input, InputKind, InputPart};
pub use isa::{Isa, IsaError};
pub use matmul::{Store, matmul, matmul_swiglu};
pub use matrix::MatMut;
pub use panels::{GROUP, PANEL, PanelData, Panels};
