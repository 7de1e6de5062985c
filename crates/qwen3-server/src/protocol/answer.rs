//! Parts of an answer that chat and text completions share.

use serde::Serialize;
use utoipa::ToSchema;

/// An event of a streamed answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ServerSentEvent {
    /// The kind of event, in the streams of `/v1/responses` and `/v1/messages`.
    pub event: Option<String>,
    /// JSON, or `[DONE]` at the end of OpenAI's older streams.
    pub data: String,
}

/// Tokens that a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Generated tokens of all choices.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// Of the prompt's tokens.
    pub prompt_tokens_details: PromptTokensDetails,
    /// Of the generated tokens.
    pub completion_tokens_details: CompletionTokensDetails,
}

/// Details of the prompt's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Tokens whose keys and values an earlier request left in the cache.
    pub cached_tokens: usize,
}

/// Details of the generated tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct CompletionTokensDetails {
    /// Tokens of thinking.
    pub reasoning_tokens: usize,
}

impl Usage {
    /// A usage of these tokens.
    pub fn new(prompt: usize, cached: usize, generated: usize, thinking: usize) -> Self {
        Self {
            prompt_tokens: prompt,
            completion_tokens: generated,
            total_tokens: prompt + generated,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: cached },
            completion_tokens_details: CompletionTokensDetails { reasoning_tokens: thinking },
        }
    }
}

/// How long a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Timings {
    /// Milliseconds from the request to its first step.
    pub queue_ms: f64,
    /// Milliseconds from the first step to the first token.
    pub prompt_ms: f64,
    /// Prompt tokens per second, those from the cache not counted.
    pub prompt_per_second: f64,
    /// Milliseconds from the first token to the last.
    pub predicted_ms: f64,
    /// Generated tokens per second after the first, of one choice.
    pub predicted_per_second: f64,
}

impl Timings {
    /// The timings of one sequence.
    pub fn of(usage: &engine::Usage) -> Self {
        let rate = |tokens: usize, seconds: f64| {
            if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
        };
        let (prompt, decode) = (usage.prompt_time.as_secs_f64(), usage.decode_time.as_secs_f64());
        let computed = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
        Self {
            queue_ms: usage.queue_time.as_secs_f64() * 1e3,
            prompt_ms: prompt * 1e3,
            prompt_per_second: rate(computed, prompt),
            predicted_ms: decode * 1e3,
            predicted_per_second: rate(usage.generated_tokens.saturating_sub(1), decode),
        }
    }
}
