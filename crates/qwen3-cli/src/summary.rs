//! What an answer cost: speed, collectives and bytes a token.

use qwen3_model::Model;
use qwen3_model::comm::{Collective, Entry, Phase};

use crate::answer::Timing;
use crate::calibration::count;

/// A few lines for people: the model with its ranks, why it is split as it is where the plan said
/// so, what prompts and the tokens after the first of each answer took, and what `entries` of the
/// ledger count for each of those.
pub fn summary(
    model: &Model,
    reason: Option<&str>,
    prefill: Timing,
    decode: Timing,
    entries: &[Entry],
) -> String {
    let (comm, options) = (model.comm(), model.options());
    let plan = reason.map_or(String::new(), |reason| format!("plan         {reason}\n"));
    let each = |of: fn(&Entry) -> u64| {
        let all: u64 = entries.iter().filter(|entry| entry.phase == Phase::Decode).map(of).sum();
        all as f64 / decode.tokens.max(1) as f64
    };
    format!(
        "ranks        {} ({}), {} each, {}\n\
         split        {}, attention {}, weights {}\n\
         {plan}prompt       {:.0} tokens/s ({} tokens)\n\
         answer       {:.0} tokens/s ({} tokens)\n\
         collectives  {:.1} a token: {:.1} Allreduce in {}, the rest chooses the token\n\
         payload      {:.0} bytes a token\n",
        comm.size(),
        comm.transport(),
        count(options.threads, "thread"),
        options.isa.name(),
        options.division(),
        options.attention,
        model.weight_format(),
        prefill.tokens_per_s(),
        prefill.tokens,
        decode.tokens_per_s(),
        decode.tokens,
        each(|entry| entry.calls),
        each(|entry| if entry.collective == Collective::Allreduce { entry.calls } else { 0 }),
        count(model.config().num_hidden_layers, "layer"),
        each(|entry| entry.payload_bytes),
    )
}
