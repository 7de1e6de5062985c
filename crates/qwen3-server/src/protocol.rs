//! Requests and responses of each API, as JSON.

pub mod sampling;
pub mod content;
pub mod answer;
pub mod chat;
pub mod completions;
pub mod messages;
pub mod responses;
pub mod plain;
pub mod pooling;
