//! Ways to split a Qwen3 model over ranks: what each of them costs, and the recommended one.

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

// Modules in reading order, lowest first; a module uses only those above it.
mod machine;
mod imbalance;
mod plan;
mod measure;

pub use imbalance::{Imbalance, Share};
pub use machine::{LinkFigures, Machine, Rate};
pub use measure::{Effort, measure_attention, measure_link, measure_products};
pub use plan::{PassCost, Plan, PlanInput, Prediction, plan};
