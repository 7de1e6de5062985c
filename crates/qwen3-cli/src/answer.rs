//! One answer of the model, shown as it comes.

use std::time::{Duration, Instant};

use engine::{EngineConfig, EngineHandle, Event, FinishReason, KvMemory, Request};
use qwen3_model::generation_config::eos_token_ids;
use qwen3_model::{Model, SamplingParams};
use qwen3_text::Tokenizer;
use ranks::{Failure, Rank, print};

use crate::ctrl_c;
use crate::empty_thought::EmptyThought;
use crate::failure::CliError;
use crate::options::EngineOptions;

/// How often an answer looks whether Ctrl-C was pressed while there is no token.
const INTERRUPT_CHECK: Duration = Duration::from_millis(20);

/// How answers are made.
#[derive(Clone, Debug)]
pub struct AnswerOptions {
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// The largest number of tokens of an answer.
    pub max_new_tokens: usize,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Go on after these.
    pub ignore_eos: bool,
    /// Nothing is shown before the end.
    pub quiet: bool,
    /// A thought without content at the start of an answer is not shown.
    pub hide_empty_thought: bool,
}

impl AnswerOptions {
    /// Answers of at most `max_new_tokens` tokens. They end at the tokens that end a text: those of
    /// `generation_config.json`, else of `config.json`.
    pub fn new(
        rank: &Rank,
        model: &Model,
        engine: &EngineOptions,
        sampling: SamplingParams,
        max_new_tokens: usize,
    ) -> Result<Self, Failure> {
        // Rank 0's count: the files of others may be of another day.
        let eos_token_ids =
            rank.broadcast(|| Ok(eos_token_ids(&*engine.model.open()?, model.config())?))?;
        let (ignore_eos, quiet, hide_empty_thought) = (false, false, false);
        Ok(Self { sampling, max_new_tokens, eos_token_ids, ignore_eos, quiet, hide_empty_thought })
    }

    /// The request for an answer to `tokens`.
    pub fn request(&self, tokens: &[u32]) -> Request {
        Request {
            sampling: self.sampling.clone(),
            eos_token_ids: self.eos_token_ids.clone(),
            ignore_eos: self.ignore_eos,
            ..Request::new(tokens.to_vec(), self.max_new_tokens)
        }
    }
}

/// The configuration of an engine for one sequence at a time, of at most `positions` tokens and
/// never more than the context.
pub fn single_sequence(model: &Model, engine: &EngineOptions, positions: usize) -> EngineConfig {
    EngineConfig {
        kv_memory: KvMemory::Positions(positions.min(model.config().context_length())),
        max_sequences: 1,
        // Enough for a conversation that goes on, or returns to an earlier message.
        state_snapshots: 4,
        step_rows: engine.chunk,
        // Whoever reads standard output may take any time.
        stream_limit: usize::MAX,
        ..EngineConfig::default()
    }
}

/// How long some tokens took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// Number of tokens.
    pub tokens: usize,
    /// Their time.
    pub elapsed: Duration,
}

impl Timing {
    /// Tokens per second; 0 if no time was measured.
    pub fn tokens_per_s(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.tokens as f64 / seconds } else { 0.0 }
    }
}

/// One answer, whole.
#[derive(Debug)]
pub struct Answer {
    /// Its tokens, with the one that ended it.
    pub ids: Vec<u32>,
    /// Their text, without special tokens; empty without a tokenizer.
    pub text: String,
    /// Why it ended; `None` if Ctrl-C ended it.
    pub reason: Option<FinishReason>,
    /// Tokens of the prompt that were computed, and the time until the first new token.
    pub prefill: Timing,
    /// New tokens after the first, and their time.
    pub decode: Timing,
}

impl Answer {
    /// Asks for the answer to `tokens` and shows it; without a tokenizer it shows ids.
    pub fn write(
        handle: &EngineHandle,
        tokens: &[u32],
        text: Option<&Tokenizer>,
        options: &AnswerOptions,
    ) -> Result<Self, CliError> {
        let start = Instant::now();
        let stream = handle.submit(options.request(tokens))?;
        let mut words = text.map(Tokenizer::detokenizer);
        let mut filter = options.hide_empty_thought.then(EmptyThought::default);
        let mut ids = Vec::new();
        let (mut computed, mut first, mut last) = (tokens.len(), start, start);
        let reason = loop {
            if ctrl_c::pressed() {
                break None;
            }
            let Ok(event) = stream.recv_timeout(INTERRUPT_CHECK) else { continue };
            match event.ok_or(CliError::EngineEnded)? {
                Event::Started { cached_tokens, .. } => computed = tokens.len() - cached_tokens,
                Event::Token { id, .. } => {
                    last = Instant::now();
                    if ids.is_empty() {
                        first = last;
                    }
                    ids.push(id);
                    if !options.quiet {
                        let words = words.as_mut().map_or(format!("{id} "), |words| words.push(id));
                        print(&filter.as_mut().map_or(words.clone(), |held| held.push(&words)))?;
                    }
                }
                Event::Finished { reason, .. } => break Some(reason),
                Event::Failed(error) => return Err(error.into()),
                Event::PromptLogprobs(_) | Event::Hidden(_) => {}
            }
        };
        if let Some(words) = words.filter(|_| !options.quiet && reason.is_some()) {
            let words = words.finish();
            print(&filter.map_or(words.clone(), |mut held| held.push(&words) + &held.finish()))?;
        }
        let text = text.map(|text| text.decode(&ids)).unwrap_or_default();
        let prefill = Timing { tokens: computed, elapsed: first - start };
        let decode = Timing { tokens: ids.len().saturating_sub(1), elapsed: last - first };
        Ok(Self { ids, text, reason, prefill, decode })
    }
}

/// Why an answer ended, as the JSON of `generate` has it.
pub fn stop_word(reason: Option<FinishReason>) -> &'static str {
    match reason {
        Some(FinishReason::EndOfSequence | FinishReason::StopToken(_)) => "end",
        Some(FinishReason::Length) => "limit",
        Some(FinishReason::Context) => "context",
        Some(FinishReason::Constraint | FinishReason::Deadline) | None => "stopped",
    }
}
