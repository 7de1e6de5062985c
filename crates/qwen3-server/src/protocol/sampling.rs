//! How tokens are chosen: the fields that chat and text completions share.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

/// One string or a list of strings.
#[derive(Clone, Debug, Deserialize, PartialEq, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum Strings {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Strings {
    /// The strings as a list.
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(string) => vec![string],
            Self::Many(strings) => strings,
        }
    }
}

/// Options of a streamed answer.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// Ends the stream with a piece that has no choices but the usage.
    pub include_usage: Option<bool>,
    /// Accepted and ignored: this server pads no piece.
    pub include_obfuscation: Option<bool>,
    /// Sends the usage so far with each piece.
    pub continuous_usage_stats: Option<bool>,
}

/// A structure that the answer must have. Exactly one field is set.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StructuredOutputs {
    /// A JSON schema, as an object or as text.
    #[schema(value_type = Option<Object>)]
    pub json: Option<Value>,
    /// A regular expression for the whole answer.
    pub regex: Option<String>,
    /// The possible answers.
    pub choice: Option<Vec<String>>,
    /// A grammar in Lark's notation.
    pub grammar: Option<String>,
}

/// The sampling fields of a request; absent ones default to the checkpoint's
/// `generation_config.json`.
#[derive(Clone, Debug, Default)]
pub struct SamplingFields {
    /// Longest answer in tokens.
    pub max_tokens: Option<usize>,
    /// The answer repeats the prompt, so that it may have no token of its own.
    pub echo: bool,
    /// Divides the logits; 0 takes the most probable token.
    pub temperature: Option<f32>,
    /// Probability mass that stays.
    pub top_p: Option<f32>,
    /// Tokens that stay.
    pub top_k: Option<i64>,
    /// Least probability, relative to the most probable token.
    pub min_p: Option<f32>,
    /// Divides logits of tokens that occurred.
    pub repetition_penalty: Option<f32>,
    /// Subtracted once from logits of generated tokens.
    pub presence_penalty: Option<f32>,
    /// Subtracted per occurrence from logits of generated tokens.
    pub frequency_penalty: Option<f32>,
    /// Added to logits, by token id.
    pub logit_bias: BTreeMap<String, f32>,
    /// Number of answers.
    pub n: Option<usize>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Ids that end the answer.
    pub stop_token_ids: Vec<u32>,
    /// Texts that are never generated.
    pub bad_words: Vec<String>,
    /// Tokens before which no id ends the answer.
    pub min_tokens: Option<usize>,
    /// Goes on after the ids that end a text.
    pub ignore_eos: bool,
    /// Of the random choice.
    pub seed: Option<i64>,
    /// Log-probabilities of each token and of so many of the best.
    pub logprobs: Option<usize>,
    /// A lower value is served first.
    pub priority: Option<i32>,
    /// Requests share cached prefixes only if their salts are equal.
    pub cache_salt: Option<String>,
}

/// Defines a request with the fields of [`SamplingFields`] (but `max_tokens` and `logprobs`, whose
/// form depends on the API) and fields of its own.
macro_rules! request {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, serde::Deserialize, utoipa::ToSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $kind,)*
            /// Longest answer in tokens; without it the context is the limit.
            pub max_tokens: Option<usize>,
            /// Divides the logits; 0 takes the most probable token each time.
            #[schema(minimum = 0, maximum = 2)]
            pub temperature: Option<f32>,
            /// Chooses among the most probable tokens that together have this probability.
            #[schema(minimum = 0, maximum = 1)]
            pub top_p: Option<f32>,
            /// Chooses among so many tokens; 0 or -1 for all.
            #[schema(minimum = -1)]
            pub top_k: Option<i64>,
            /// Drops tokens less probable than this share of the most probable one.
            #[schema(minimum = 0, maximum = 1)]
            pub min_p: Option<f32>,
            /// Divides the logits of tokens that occurred; 1 changes nothing.
            pub repetition_penalty: Option<f32>,
            /// Subtracted from the logits of tokens that were generated.
            #[schema(minimum = -2, maximum = 2)]
            pub presence_penalty: Option<f32>,
            /// Subtracted from the logits of tokens for each time that they were generated.
            #[schema(minimum = -2, maximum = 2)]
            pub frequency_penalty: Option<f32>,
            /// Added to the logits, by token id.
            pub logit_bias: Option<std::collections::BTreeMap<String, f32>>,
            /// Number of answers to the same prompt.
            #[schema(minimum = 1, maximum = 128)]
            pub n: Option<usize>,
            /// Up to 16 texts; the answer ends before the first that occurs.
            pub stop: Option<crate::protocol::sampling::Strings>,
            /// Ids that end the answer.
            pub stop_token_ids: Option<Vec<u32>>,
            /// Up to 64 texts that are never generated.
            pub bad_words: Option<Vec<String>>,
            /// Number of tokens before which nothing ends the answer.
            pub min_tokens: Option<usize>,
            /// Goes on after the tokens that end a text.
            pub ignore_eos: Option<bool>,
            /// Seed of the random choice; without it answers differ.
            pub seed: Option<i64>,
            /// Sends the answer in pieces while it is generated.
            pub stream: Option<bool>,
            /// Options of a streamed answer.
            pub stream_options: Option<crate::protocol::sampling::StreamOptions>,
            /// A structure that the answer must have.
            pub structured_outputs: Option<crate::protocol::sampling::StructuredOutputs>,
            /// A request with a lower value is served first.
            pub priority: Option<i32>,
            /// Requests share cached prefixes only if their salts are equal.
            pub cache_salt: Option<String>,
            /// Adds the token ids of prompt and answer.
            pub return_token_ids: Option<bool>,
        }

        impl $name {
            /// The fields that choose tokens. `logprobs` is left to the API.
            pub fn sampling(&self) -> crate::protocol::sampling::SamplingFields {
                crate::protocol::sampling::SamplingFields {
                    max_tokens: self.max_tokens,
                    echo: false,
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    repetition_penalty: self.repetition_penalty,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    logit_bias: self.logit_bias.clone().unwrap_or_default(),
                    n: self.n,
                    stop: self.stop.clone().map_or_else(Vec::new, |stop| stop.into_vec()),
                    stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
                    bad_words: self.bad_words.clone().unwrap_or_default(),
                    min_tokens: self.min_tokens,
                    ignore_eos: self.ignore_eos.unwrap_or(false),
                    seed: self.seed,
                    logprobs: None,
                    priority: self.priority,
                    cache_salt: self.cache_salt.clone(),
                }
            }
        }
    };
}
pub(crate) use request;
