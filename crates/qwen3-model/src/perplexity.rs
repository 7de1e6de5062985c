//! How well a model predicts a text.
//!
//! The text is cut into windows of `context` tokens that do not see each other; each window's
//! tokens are scored from the second one on, and the perplexity is the exponential of the mean
//! negative log-likelihood. A last window may be shorter; one of a single token scores nothing and
//! is left out.

use comm::{CommError, Communicator, CommunicatorExt, Phase};
use ops::LogitRows;

use crate::error::ModelError;
use crate::model::{Logits, Model};
use crate::sequence::Sequence;

/// Logits that a rank computes at once: 64 MiB of f32.
const LOGITS_AT_ONCE: usize = 1 << 24;

/// The result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// Tokens of the text.
    pub tokens: usize,
    /// Tokens that were scored.
    pub scored: usize,
    /// Mean negative log-likelihood of these, in nats.
    pub mean_nll: f64,
    /// Its exponential.
    pub perplexity: f64,
}

/// Why a text cannot be scored.
#[derive(Debug, thiserror::Error)]
pub enum PerplexityError {
    /// A window in which nothing can be scored, or that the model cannot reach.
    #[error(
        "the windows have {found} tokens, expected 2 to {context_length}, the length of the context"
    )]
    Context {
        /// The window.
        found: usize,
        /// The model's longest.
        context_length: usize,
    },
    /// A text of fewer than two tokens.
    #[error("the text has {found} tokens, expected at least 2")]
    TooShort {
        /// Tokens of the text.
        found: usize,
    },
    /// The model gives a token of the text no probability: its weights are damaged, or a value
    /// overflowed.
    #[error("the mean negative log-likelihood is {found}, expected a finite number")]
    NotFinite {
        /// What was computed.
        found: f64,
    },
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A collective failed.
    #[error("{0}")]
    Comm(#[from] CommError),
}

/// Scores `tokens` in windows of `context`, in passes of at most `chunk` tokens for each rank that
/// splits positions. All ranks call it with the same arguments and get the same result; `progress`
/// is told how many tokens are done.
pub fn perplexity(
    model: &Model,
    tokens: &[u32],
    context: usize,
    chunk: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Perplexity, PerplexityError> {
    let context_length = model.config().context_length();
    if !(2..=context_length).contains(&context) {
        return Err(PerplexityError::Context { found: context, context_length });
    }
    if tokens.len() < 2 {
        return Err(PerplexityError::TooShort { found: tokens.len() });
    }
    // Also those that are only predicted, which the model does not see.
    ModelError::check_tokens(tokens, model.config().vocab_size)?;
    model.comm().ledger().set_phase(Phase::Prefill);
    let result = score(model, tokens, context, chunk, progress);
    model.comm().ledger().set_phase(Phase::Other);
    let result = result?;
    if result.mean_nll.is_finite() {
        Ok(result)
    } else {
        Err(PerplexityError::NotFinite { found: result.mean_nll })
    }
}

fn score(
    model: &Model,
    tokens: &[u32],
    context: usize,
    chunk: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Perplexity, PerplexityError> {
    // The same on every rank, although their slices of the vocabulary differ by one.
    let slice = model.config().vocab_size.div_ceil(model.comm().size());
    let chunk = (LOGITS_AT_ONCE / slice).clamp(1, model.pass_tokens(chunk));
    let mut cache = Sequence::new(model, context.min(tokens.len()))?;
    let (mut scored, mut sum, mut done) = (0, 0.0, 0);
    for window in tokens.chunks(context) {
        // The logits of the last token predict nothing within the window, so it need not run.
        let inputs = &window[..window.len() - 1];
        let targets = &window[1..];
        cache.truncate(0);
        for (inputs, targets) in inputs.chunks(chunk).zip(targets.chunks(chunk)) {
            let logits = cache.forward(model, inputs, LogitRows::All)?;
            sum += negative_log_likelihood(&**model.comm(), &logits, targets)?;
            scored += targets.len();
            progress(done + cache.len());
        }
        done += window.len();
        progress(done);
    }
    let mean_nll = sum / scored as f64;
    Ok(Perplexity { tokens: tokens.len(), scored, mean_nll, perplexity: mean_nll.exp() })
}

/// `Σ ln Σ eˣ − x_target` over the rows, with the vocabulary split over the ranks: one Allgather of
/// each rank's log-sum-exp and, on the rank that has it, the target's logit. (Gathered rather than
/// reduced, so that a narrow wire format does not blur the result.)
fn negative_log_likelihood(
    comm: &dyn Communicator,
    logits: &Logits,
    targets: &[u32],
) -> Result<f64, CommError> {
    let rows = targets.len();
    assert_eq!(logits.values.nrows(), rows, "rows of logits against targets");
    let mut own = vec![f64::NEG_INFINITY; 2 * rows];
    for ((own, row), &target) in
        own.chunks_exact_mut(2).zip(logits.values.outer_iter()).zip(targets)
    {
        own[0] = log_sum_exp(row.iter().copied());
        let local = (target as usize).checked_sub(logits.vocab.start);
        if let Some(&logit) = local.and_then(|local| row.get(local)) {
            own[1] = f64::from(logit);
        }
    }
    let mut all = vec![0.0; own.len() * comm.size()];
    comm.all_gather(&own, &mut all)?;
    let of_row =
        |row: usize, part: usize| all.chunks_exact(2 * rows).map(move |rank| rank[2 * row + part]);
    let loss = |row| {
        let max = of_row(row, 0).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = of_row(row, 0).map(|part| (part - max).exp()).sum();
        max + sum.ln() - of_row(row, 1).fold(f64::NEG_INFINITY, f64::max)
    };
    Ok((0..rows).map(loss).sum())
}

/// `ln Σ eˣ`; −∞ where there is nothing to sum.
fn log_sum_exp(values: impl Iterator<Item = f32> + Clone) -> f64 {
    let max = values.clone().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = values.map(|x| f64::from((x - max).exp())).sum();
    f64::from(max) + sum.ln()
}
