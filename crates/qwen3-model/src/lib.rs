#![doc = include_str!("../README.md")]

// In reading order; a module uses only modules listed above it.
mod fields;
mod rope_config;
mod config;

pub use config::{Config, MoeConfig};
pub use fields::ConfigError;
pub use rope_config::{RopeConfig, RopeScaling, Yarn};
