//! Tokenization, models, health and version.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::chat::{ChatMessage, Tool};

/// Text, or a conversation, to be encoded.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizeRequest {
    /// The model's name.
    pub model: Option<String>,
    /// A text; either this or `messages` is present.
    pub prompt: Option<String>,
    /// A conversation.
    pub messages: Option<Vec<ChatMessage>>,
    /// Functions that the conversation's prompt describes.
    pub tools: Option<Vec<Tool>>,
    /// Variables of the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Ends a conversation's prompt where the assistant's answer begins.
    pub add_generation_prompt: Option<bool>,
    /// Adds the text of each token.
    pub return_token_strs: Option<bool>,
}

/// Token ids.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenizeResponse {
    /// How many ids there are.
    pub count: usize,
    /// The length of the model's context.
    pub max_model_len: usize,
    /// The ids.
    pub tokens: Vec<u32>,
    /// The text of each token, if `return_token_strs` was set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_strs: Option<Vec<String>>,
}

/// Token ids to be decoded.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DetokenizeRequest {
    /// The model's name.
    pub model: Option<String>,
    /// The ids.
    pub tokens: Vec<u32>,
}

/// Decoded text.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DetokenizeResponse {
    /// The text, without special tokens.
    pub prompt: String,
}

/// A conversation to be written with the chat template.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateRequest {
    /// The model's name.
    pub model: Option<String>,
    /// The conversation.
    pub messages: Vec<ChatMessage>,
    /// Functions that the prompt describes.
    pub tools: Option<Vec<Tool>>,
    /// Variables of the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Ends the prompt where the assistant's answer begins.
    pub add_generation_prompt: Option<bool>,
}

/// A rendered conversation.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TemplateResponse {
    /// The prompt.
    pub prompt: String,
}

/// A model.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelEntry {
    /// Its name.
    pub id: String,
    /// Always `model`.
    pub object: &'static str,
    /// Unix time in seconds at which the server started.
    pub created: u64,
    /// Always `qwen3-mpi`.
    pub owned_by: &'static str,
    /// The length of its context.
    pub max_model_len: usize,
}

/// The models.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// Always `list`.
    pub object: &'static str,
    /// The one model.
    pub data: Vec<ModelEntry>,
}

/// Whether the server answers requests.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Health {
    /// `ok`, `loading`, `draining` or `failed`.
    pub status: &'static str,
}

/// The server's version.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Version {
    /// The version.
    pub version: String,
}
