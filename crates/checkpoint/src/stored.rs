//! The formats in which files store matrices, one module each.

pub(crate) mod coded;
mod float;
mod ggml;
mod group32;

pub(crate) use float::Float;
pub(crate) use ggml::{Ggml, GgmlType};
pub(crate) use group32::Group32;
