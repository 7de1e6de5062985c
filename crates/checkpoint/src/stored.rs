//! The formats in which files store matrices, one module each.

mod float;
mod group32;

pub(crate) use float::Float;
pub(crate) use group32::Group32;
