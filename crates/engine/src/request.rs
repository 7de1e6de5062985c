//! What a client asks for and what it receives.

use std::time::Duration;

use qwen3_model::SamplingParams;
use qwen3_model::sampling::SamplingError;

use crate::constraint::{ConstraintError, TokenConstraint};

/// One request: a prompt, and how it is continued.
///
/// With `n` above 1 the request has several sequences that share the pages of the prompt.
pub struct Request {
    /// The tokens of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen. Sequence `i` of `n` draws with a seed derived from `sampling.seed`
    /// and `i`; sequence 0 draws with `sampling.seed` itself.
    pub sampling: SamplingParams,
    /// The largest number of tokens to generate per sequence. With 0 only the prompt is computed.
    pub max_tokens: usize,
    /// Ids that end a sequence with [`FinishReason::EndOfSequence`]. `sampling.stop_token_ids`
    /// end it with [`FinishReason::StopToken`].
    pub eos_token_ids: Vec<u32>,
    /// Continues after ids of `eos_token_ids`.
    pub ignore_eos: bool,
    /// Number of sequences, at least 1.
    pub n: usize,
    /// A lower value is served first.
    pub priority: i32,
    /// Longest time from submission to the end of the answer. A sequence that reaches it ends with
    /// [`FinishReason::Deadline`].
    pub deadline: Option<Duration>,
    /// Requests share cached pages only if their salts are equal.
    pub cache_salt: Vec<u8>,
    /// Returns the log-probability of each prompt token but the first, and of so many of the most
    /// probable tokens at its place.
    pub prompt_logprobs: Option<usize>,
    /// One constraint per sequence, or none at all.
    pub constraints: Vec<Box<dyn TokenConstraint>>,
    /// Returns a hidden state of the prompt instead of a continuation.
    pub pooling: Option<Pooling>,
}

impl Request {
    /// A greedy request for at most `max_tokens` tokens after `prompt`.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            sampling: SamplingParams::default(),
            max_tokens,
            eos_token_ids: Vec::new(),
            ignore_eos: false,
            n: 1,
            priority: 0,
            deadline: None,
            cache_salt: Vec::new(),
            prompt_logprobs: None,
            constraints: Vec::new(),
            pooling: None,
        }
    }
}

/// Which hidden state of a prompt is returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The last token's, after the final norm.
    LastToken,
}

/// A token with its log-probability and those of the most probable tokens at its place.
///
/// Log-probabilities are natural logarithms of the softmax of the model's logits, before penalties,
/// bias, masks and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub id: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The most probable tokens, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// What a [`Stream`](crate::Stream) delivers, in this order: `Started`, `PromptLogprobs` (several
/// pieces), then `Token` and one `Finished` per sequence, or `Hidden` and `Finished`. `Failed` can
/// come at any time and is the last event.
#[derive(Debug)]
pub enum Event {
    /// The first step with tokens of this request starts.
    Started {
        /// Time from submission to this event.
        queue_time: Duration,
        /// Tokens of the prompt that were found in cached pages.
        cached_tokens: usize,
    },
    /// Log-probabilities of further prompt tokens, in order, from the second token on.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// A sequence has one more token.
    Token {
        /// The sequence, `0..n`.
        index: usize,
        /// The token. The token that ends a sequence is delivered as well.
        id: u32,
        /// Its log-probability, if `sampling.logprobs` is set.
        logprob: Option<f32>,
        /// The most probable tokens, best first, as many as `sampling.logprobs` says.
        top: Vec<(u32, f32)>,
    },
    /// The hidden state that `pooling` asked for, `[hidden_size]`.
    Hidden(Vec<f32>),
    /// A sequence has ended. The last sequence's is the last event.
    Finished {
        /// The sequence, `0..n`.
        index: usize,
        /// Why it ended.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// The request failed; no event follows.
    Failed(RequestError),
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model chose an id of `eos_token_ids`.
    EndOfSequence,
    /// The model chose this id of `stop_token_ids`.
    StopToken(u32),
    /// `max_tokens` tokens were generated, or the prompt was all that was asked for.
    Length,
    /// The sequence reached the length of the model's context.
    Context,
    /// The constraint allows no further token.
    Constraint,
    /// The request's deadline passed.
    Deadline,
}

/// What a sequence took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that were found in cached pages.
    pub cached_tokens: usize,
    /// Generated tokens, the one that ended the sequence included.
    pub generated_tokens: usize,
    /// Time from submission to the first step with tokens of this request.
    pub queue_time: Duration,
    /// Time from that step's start to the sequence's first token.
    pub prompt_time: Duration,
    /// Time from the first token to the last.
    pub decode_time: Duration,
    /// How often the sequence lost its pages to another one and was computed again.
    pub preemptions: usize,
}

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The engine ends, or has ended.
    #[error("the engine is shutting down and takes no further requests")]
    ShuttingDown,
    /// Too many requests wait.
    #[error("{waiting} requests wait already, expected fewer than {limit}")]
    QueueFull {
        /// Waiting requests.
        waiting: usize,
        /// The largest number of waiting requests.
        limit: usize,
    },
    /// Too many prompt tokens wait.
    #[error(
        "{waiting_tokens} prompt tokens wait already and the prompt has {tokens}, \
         expected at most {limit} together"
    )]
    QueueTokens {
        /// Prompt tokens of waiting requests.
        waiting_tokens: usize,
        /// Tokens of the prompt.
        tokens: usize,
        /// The largest number of waiting prompt tokens.
        limit: usize,
    },
    /// The prompt has no token.
    #[error("the prompt is empty, expected at least one token")]
    EmptyPrompt,
    /// A prompt token is not in the vocabulary.
    #[error("prompt token {index} has id {id}, expected an id below {vocab_size}")]
    TokenOutOfRange {
        /// Its index in the prompt.
        index: usize,
        /// Its id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// The prompt is longer than the model's context.
    #[error("the prompt has {tokens} tokens, expected at most {limit}, the length of the context")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens of the context.
        limit: usize,
    },
    /// All pages together could not hold the request.
    #[error("the request needs {pages} pages of 128 positions, expected at most {available}")]
    NeverFits {
        /// Pages that the prompt and `max_tokens` need (within the context).
        pages: usize,
        /// Pages of the arena.
        available: usize,
    },
    /// A number of sequences outside the limits.
    #[error("n is {found}, expected 1 to {limit}")]
    Sequences {
        /// The request's `n`.
        found: usize,
        /// The largest number of sequences that run together.
        limit: usize,
    },
    /// Another number of constraints than sequences.
    #[error("the request has {found} constraints, expected 0 or one for each of {n} sequences")]
    Constraints {
        /// Constraints of the request.
        found: usize,
        /// Sequences of the request.
        n: usize,
    },
    /// More log-probabilities than the engine returns.
    #[error("{found} log-probabilities per token were asked for, expected at most {limit}")]
    Logprobs {
        /// The number asked for.
        found: usize,
        /// The largest number.
        limit: usize,
    },
    /// A pooling request that also asks for tokens.
    #[error("a pooling request has max_tokens {max_tokens} and n {n}, expected 0 and 1")]
    Pooling {
        /// The request's `max_tokens`.
        max_tokens: usize,
        /// The request's `n`.
        n: usize,
    },
    /// A request for tokens to a model without a head.
    #[error(
        "the model has no head over the vocabulary: it gives embeddings or scores, expected a \
         model that generates text"
    )]
    NoHead,
    /// A sampling parameter is out of range.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
}

/// Why a request failed after it was accepted. Other requests are not affected, except by
/// [`RequestError::Engine`].
#[derive(Clone, Debug, thiserror::Error)]
pub enum RequestError {
    /// No token could be chosen.
    #[error("sequence {index}: {reason}")]
    Sampling {
        /// The sequence.
        index: usize,
        /// The sampler's words.
        reason: String,
    },
    /// The constraint refused a token or failed.
    #[error("sequence {index}: {source}")]
    Constraint {
        /// The sequence.
        index: usize,
        /// The constraint's words.
        source: ConstraintError,
    },
    /// The reader took no event while too many were delivered.
    #[error("{events} events were not read, expected at most {limit}: the reader is too slow")]
    SlowReader {
        /// Events that wait.
        events: usize,
        /// The largest number of events that may wait.
        limit: usize,
    },
    /// The whole engine ended: a rank was lost, or the engine was shut down.
    #[error("the engine ended: {reason}")]
    Engine {
        /// The error that ended it.
        reason: String,
    },
}
