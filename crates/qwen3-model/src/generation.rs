//! Continuing a sequence token by token: prefill in chunks, then decode.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use comm::{CommError, Communicator, Phase, ReduceOp};
use ops::LogitRows;

use crate::error::ModelError;
use crate::model::{Logits, Model};
use crate::sampling::{SampleRow, Sampler, SamplingError, SamplingParams};
use crate::sequence::Sequence;

/// How a sequence is continued; the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateParams {
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// The most tokens to generate.
    pub max_new_tokens: usize,
    /// Ids that end the sequence.
    pub eos_token_ids: Vec<u32>,
    /// Whether to go on past them.
    pub ignore_eos: bool,
    /// Tokens of the prompt that run through the model at once, at least 1, for each rank of those
    /// that split positions: longer chunks make better use of the processor and of a ring of keys
    /// and values, and take more memory.
    pub prefill_chunk: usize,
}

impl Default for GenerateParams {
    /// Greedy, up to 256 tokens, chunks of 512.
    fn default() -> Self {
        Self {
            sampling: SamplingParams::default(),
            max_new_tokens: 256,
            eos_token_ids: Vec::new(),
            ignore_eos: false,
            prefill_chunk: 512,
        }
    }
}

/// Why a continuation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The model ended the sequence.
    EndOfSequence,
    /// The wanted number of tokens is there.
    MaxNewTokens,
    /// The cache is full.
    ContextFull,
    /// A rank's callback asked for it.
    Callback,
}

/// What a continuation's callback is told, and may break at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A chunk of the prompt is about to run.
    Prompt,
    /// A token was chosen.
    Token(u32),
}

/// How long some tokens took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// Tokens.
    pub tokens: usize,
    /// Time that they took.
    pub elapsed: Duration,
}

impl Timing {
    /// Tokens a second; 0 where nothing was timed.
    pub fn tokens_per_s(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.tokens as f64 / seconds } else { 0.0 }
    }
}

/// A continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The new tokens, the one that ended the sequence included.
    pub ids: Vec<u32>,
    /// Why there are no more.
    pub stop: StopReason,
    /// Tokens of the prompt that ran through the model, and the time until the first new token was
    /// chosen.
    pub prefill: Timing,
    /// New tokens after the first, and their time.
    pub decode: Timing,
}

/// Why a sequence cannot be continued.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// There is nothing to continue.
    #[error("the prompt is empty, expected at least one token")]
    EmptyPrompt,
    /// All of the prompt is in the cache already, so that no logits follow it.
    #[error(
        "the prompt has {tokens} tokens and the cache already holds {cached}, expected at least one new token"
    )]
    NothingNew {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens in the cache.
        cached: usize,
    },
    /// A prompt that the cache has no room for.
    #[error(
        "the prompt has {tokens} tokens, expected at most {capacity}, the length of the context"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens that the cache may hold.
        capacity: usize,
    },
    /// The next token cannot be chosen.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// Continues `prompt`, the whole sequence so far, of which the first `cache.len()` tokens are in
/// `cache` already (none for a new sequence, all but the latest message in a conversation). All
/// ranks call it with the same arguments.
///
/// `on_progress` sees each new token as it is chosen, on every rank, and is asked before each chunk
/// of the prompt. Where it breaks on any rank, all ranks stop before the next token or chunk. The
/// request travels in an Allreduce of four bytes, before each token and before each chunk of the
/// prompt, so that no rank is left waiting.
///
/// Afterwards `cache` holds the prompt and the new tokens except the last one, which has not been
/// run; of a prompt that was stopped, the chunks that are complete.
pub fn generate(
    model: &Model,
    cache: &mut Sequence,
    prompt: &[u32],
    params: &GenerateParams,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Generated, GenerateError> {
    check_prompt(prompt, cache.len(), cache.capacity(), model.config().vocab_size)?;
    let vocab_size = model.config().vocab_size;
    params.sampling.validate(vocab_size)?;
    let mut sampler = Sampler::new(vocab_size, model.comm().clone(), model.options().isa);
    let result = run(model, cache, prompt, params, &mut sampler, on_progress);
    model.comm().ledger().set_phase(Phase::Other);
    result
}

fn run(
    model: &Model,
    cache: &mut Sequence,
    prompt: &[u32],
    params: &GenerateParams,
    sampler: &mut Sampler,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Generated, GenerateError> {
    let ledger = model.comm().ledger();
    ledger.set_phase(Phase::Prefill);
    let start = Instant::now();
    let new = &prompt[cache.len()..];
    let cached = cache.len();
    let mut stop = || on_progress(Progress::Prompt).is_break();
    let Some(mut logits) = prefill(model, cache, new, params.prefill_chunk, &mut stop)? else {
        let prefill = Timing { tokens: cache.len() - cached, elapsed: start.elapsed() };
        return Ok(Generated {
            ids: Vec::new(),
            stop: StopReason::Callback,
            prefill,
            decode: Timing::default(),
        });
    };
    let mut prefill = Timing { tokens: new.len(), elapsed: start.elapsed() };
    let mut decode = Timing::default();

    let mut history = prompt.to_vec();
    let mut wishes_to_stop = false;
    let stop = loop {
        let count = history.len() - prompt.len();
        if count == params.max_new_tokens {
            break StopReason::MaxNewTokens;
        }
        if count > 0 {
            ledger.set_phase(Phase::Decode);
            if cache.len() == cache.capacity() {
                break StopReason::ContextFull;
            }
            logits = cache.decode(model, history[history.len() - 1])?;
        }
        if any_rank_requests_stop(&**model.comm(), wishes_to_stop).map_err(ModelError::from)? {
            // The wish took effect after the last token was run. On one rank that token is not run:
            // without it the cache is the same on any number of ranks.
            cache.truncate(history.len() - 1);
            break StopReason::Callback;
        }
        let (prompt, generated) = history.split_at(prompt.len());
        let row = SampleRow {
            row: 0,
            params: &params.sampling,
            prompt,
            generated,
            step: history.len() as u64,
            mask: None,
            forced: None,
        };
        let mut samples = sampler.sample_rows(&logits, &[row]).map_err(ModelError::from)?;
        let sample = samples.pop().expect("one row was sampled")?;
        history.push(sample.id);
        if count == 0 {
            prefill.elapsed = start.elapsed();
        } else {
            decode = Timing { tokens: count, elapsed: start.elapsed() - prefill.elapsed };
        }
        wishes_to_stop |= on_progress(Progress::Token(sample.id)).is_break();
        if !params.ignore_eos && params.eos_token_ids.contains(&sample.id) {
            break StopReason::EndOfSequence;
        }
        if wishes_to_stop && model.comm().size() == 1 {
            break StopReason::Callback;
        }
    };
    Ok(Generated { ids: history.split_off(prompt.len()), stop, prefill, decode })
}

/// Runs the tokens in chunks and returns the last one's logits; nothing where a rank wants to stop
/// before.
fn prefill(
    model: &Model,
    cache: &mut Sequence,
    tokens: &[u32],
    chunk: usize,
    stop: &mut dyn FnMut() -> bool,
) -> Result<Option<Logits>, ModelError> {
    let mut chunks = tokens.chunks(model.pass_tokens(chunk)).peekable();
    loop {
        let chunk = chunks.next().expect("a checked prompt has new tokens");
        let rows = if chunks.peek().is_some() { LogitRows::None } else { LogitRows::Last };
        if any_rank_requests_stop(&**model.comm(), stop())? {
            return Ok(None);
        }
        let logits = cache.forward(model, chunk, rows)?;
        if rows == LogitRows::Last {
            return Ok(Some(logits));
        }
    }
}

/// Returns true on every rank if `here` is true on at least one.
fn any_rank_requests_stop(comm: &dyn Communicator, here: bool) -> Result<bool, CommError> {
    if comm.size() == 1 {
        return Ok(here);
    }
    let mut requests = [f32::from(u8::from(here))];
    comm.all_reduce(&mut requests, ReduceOp::Max)?;
    Ok(requests[0] > 0.0)
}

fn check_prompt(
    prompt: &[u32],
    cached: usize,
    capacity: usize,
    vocab_size: usize,
) -> Result<(), GenerateError> {
    let tokens = prompt.len();
    if prompt.is_empty() {
        return Err(GenerateError::EmptyPrompt);
    }
    ModelError::check_tokens(prompt, vocab_size)?;
    if tokens > capacity {
        return Err(GenerateError::PromptTooLong { tokens, capacity });
    }
    if tokens <= cached {
        return Err(GenerateError::NothingNew { tokens, cached });
    }
    Ok(())
}
