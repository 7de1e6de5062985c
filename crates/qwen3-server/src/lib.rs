//! An HTTP server in front of the engine: the APIs of OpenAI and Anthropic, metrics and a web page.
#![forbid(unsafe_code)]

// Modules in reading order; a module uses only those above it.
mod error;
mod body;
pub mod protocol;
mod access;
mod config;
mod request_id;
mod logging;
mod engine_metrics;
mod metrics;
mod notify;
mod record;
mod service;
mod listen;
mod sse;
mod thinking;
mod answer;
mod plan;
mod prompt;
mod gate;
mod structure;
mod conversation;
mod routes;
mod openapi;
mod server;

pub use access::{KeyError, Keys};
pub use body::BodyLimits;
pub use config::{Limits, Listen, ServerConfig, Tls};
pub use engine;
pub use listen::ListenError;
pub use logging::{LogFormat, escape, start as start_logging};
pub use notify::notify;
pub use server::{Control, Server};
pub use service::{Expected, Phase, PoolingModel, SamplingDefaults, ServedModel};
