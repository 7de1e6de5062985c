//! Jobs of ranks: starting them, agreeing on errors, signals, and ending all of them together.
#![doc = ""]
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

// Modules in reading order, lowest first; a module uses only those above it.
mod terminal;
mod error;
mod launcher;
mod signals;
mod rank;
mod neighbours;
mod job;
mod launch;
#[cfg(feature = "mpi")]
mod processes;

#[cfg(feature = "mpi")]
pub use comm::mpi_library;
pub use error::{BoxError, Failure, RankError};
pub use job::{Emulation, JobOptions, default_wire, run_in_threads};
pub use launch::{launch, refuse_start};
pub use launcher::LaunchedProcess;
pub use neighbours::{Neighbours, available_cores, numa_domains};
pub use rank::{Rank, print};
pub use signals::{Response, Signal};
pub use terminal::{one_line, printable};
