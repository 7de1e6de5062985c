//! What an answer cost: speed, collectives and bytes a token.

use std::fmt;

use qwen3_model::comm::{Collective, Entry, Phase};
use qwen3_model::{Model, Timing};

/// Calls and payload of one phase, in all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Collectives of this rank.
    pub calls: u64,
    /// Their payload.
    pub bytes: u64,
    /// The Allreduce among `calls`.
    pub all_reduces: u64,
}

impl Traffic {
    /// What `entries` count in `phase`.
    pub fn of(entries: &[Entry], phase: Phase) -> Self {
        entries.iter().filter(|entry| entry.phase == phase).fold(Self::default(), |sum, entry| {
            let all_reduce = entry.collective == Collective::Allreduce;
            Self {
                calls: sum.calls + entry.calls,
                bytes: sum.bytes + entry.payload_bytes,
                all_reduces: sum.all_reduces + if all_reduce { entry.calls } else { 0 },
            }
        })
    }
}

/// A few lines for people.
pub struct Summary<'a> {
    /// The model, with its ranks.
    pub model: &'a Model,
    /// Why the model is split as it is, where the plan said so.
    pub reason: Option<&'a str>,
    /// Prompt tokens and their time.
    pub prefill: Timing,
    /// The tokens after the first of each answer, and their time.
    pub decode: Timing,
    /// The ledger's entries since the measurement began.
    pub entries: &'a [Entry],
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (model, prefill, decode) = (self.model, &self.prefill, &self.decode);
        let (comm, options) = (model.comm(), model.options());
        let one = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        writeln!(
            f,
            "ranks        {} ({}), {} each, {}",
            comm.size(),
            comm.transport(),
            one(options.threads, "thread"),
            options.isa.name()
        )?;
        writeln!(
            f,
            "split        {}, attention {}, weights {}",
            options.division(),
            options.attention,
            model.weight_format()
        )?;
        if let Some(reason) = self.reason {
            writeln!(f, "plan         {reason}")?;
        }
        writeln!(f, "prompt       {:.0} tokens/s ({} tokens)", prefill.tokens_per_s(), prefill.tokens)?;
        writeln!(f, "answer       {:.0} tokens/s ({} tokens)", decode.tokens_per_s(), decode.tokens)?;
        let traffic = Traffic::of(self.entries, Phase::Decode);
        let passes = decode.tokens.max(1) as f64;
        let layers = model.config().num_hidden_layers;
        writeln!(
            f,
            "collectives  {:.1} a token: {:.1} Allreduce in {}, the rest chooses the token",
            traffic.calls as f64 / passes,
            traffic.all_reduces as f64 / passes,
            one(layers, "layer"),
        )?;
        writeln!(f, "payload      {:.0} bytes a token", traffic.bytes as f64 / passes)
    }
}
