//! `POST /v1/completions`.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::answer::{Timings, Usage};
use super::chat::TopByText;
use super::sampling::request;
use crate::body::Accepted;

/// Fields that clients send and that do not change the answer.
pub const ACCEPTED: &[Accepted] = &[
    Accepted::any("user"),
    Accepted { name: "suffix", without_effect: |value| value == "" },
    Accepted { name: "best_of", without_effect: |value| value == 1 },
];

request! {
    /// Text that the model continues.
    CompletionRequest {
        /// The model's name, as `/v1/models` lists it.
        model: Option<String>,
        /// What is continued.
        prompt: Prompt,
        /// Repeats the prompt before the answer.
        echo: Option<bool>,
        /// Adds log-probabilities of the tokens and of so many of the best.
        #[schema(maximum = 20)]
        logprobs: Option<usize>,
    }
}

/// One prompt or several, each as text or as token ids.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a text, a list of texts, a list of token ids or a list of such lists"
)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// The ids of one prompt.
    Ids(Vec<u32>),
    /// The ids of several prompts.
    IdLists(Vec<Vec<u32>>),
}

/// A whole answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Completion {
    /// The answer's name.
    pub id: String,
    /// Always `text_completion`.
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: u64,
    /// The model.
    pub model: String,
    /// The version of the server.
    pub system_fingerprint: &'static str,
    /// The answers: `n` for the first prompt, then `n` for the next.
    pub choices: Vec<CompletionChoice>,
    /// Tokens; in a stream only in the last piece, if they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Times of the first answer; in a stream only in the piece that ends a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
}

/// One answer, or what a piece adds to it.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Which answer.
    pub index: usize,
    /// The text.
    pub text: String,
    /// Log-probabilities, if they were asked for.
    #[schema(required = true)]
    pub logprobs: Option<CompletionLogprobs>,
    /// Why the answer ends.
    #[schema(required = true)]
    pub finish_reason: Option<&'static str>,
    /// The stop text or stop id that ended the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    pub stop_reason: Option<Value>,
    /// The prompt's ids, if `return_token_ids` was set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// The answer's ids, if `return_token_ids` was set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// Log-probabilities, one entry per token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// The tokens' texts.
    pub tokens: Vec<String>,
    /// Their natural logarithms of probability; null for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The most probable tokens at each place.
    pub top_logprobs: Vec<Option<TopByText>>,
    /// Where each token begins in the text, in characters.
    pub text_offset: Vec<usize>,
}
