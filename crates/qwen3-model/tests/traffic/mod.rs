//! The stated collectives of a forward pass, in the form of the ledger's entries.

use comm::{Collective, WireFormat};
use qwen3_model::formats::WeightFormats;
use qwen3_model::options::{Division, KvFormat, WeightFormat};
use qwen3_model::shape::{ModelShape, PassShape};
use qwen3_model::{Config, LogitRows};

/// Calls of a collective and the payload bytes of all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    pub collective: Collective,
    pub calls: u64,
    pub payload_bytes: u64,
}

/// One rank of some.
#[derive(Clone, Copy, Debug)]
pub struct Statement<'a> {
    pub config: &'a Config,
    pub ranks: usize,
    pub nodes: usize,
    pub rank: usize,
    pub division: Division,
    pub weights: WeightFormat,
    pub kv: KvFormat,
    pub overlap: usize,
}

impl Statement<'_> {
    /// The collectives of a pass of `tokens` tokens after `past` others, in the ledger's order.
    pub fn forward(&self, tokens: usize, past: usize, rows: LogitRows) -> Vec<Traffic> {
        let Self { config, ranks, nodes, rank, division, weights, kv, overlap } = *self;
        let formats = WeightFormats::uniform(config, weights, WeightFormat::F32);
        let shape = ModelShape::new(config, &formats, division, ranks, rank);
        let pass = shape.pass(&PassShape { tokens, past, rows, kv, nodes, overlap });
        let of = |collective| {
            let mut sum = Traffic { collective, calls: 0, payload_bytes: 0 };
            for (count, cost) in pass.iter() {
                for call in cost.calls.iter().filter(|call| call.collective == collective) {
                    sum.calls += count as u64;
                    sum.payload_bytes += count as u64 * call.bytes(WireFormat::F32);
                }
            }
            sum
        };
        Collective::ALL.into_iter().map(of).filter(|sum| sum.calls > 0).collect()
    }
}
