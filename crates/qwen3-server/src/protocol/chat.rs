//! `POST /v1/chat/completions`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::answer::{Timings, Usage};
use super::content::Text;
use super::sampling::request;
use crate::body::Accepted;

/// Fields that clients send and that do not change the answer.
pub const ACCEPTED: &[Accepted] = &[
    Accepted::any("user"),
    Accepted::any("metadata"),
    Accepted::any("store"),
    Accepted::any("service_tier"),
    Accepted::any("safety_identifier"),
    Accepted::any("prompt_cache_key"),
    Accepted::any("prompt_cache_retention"),
    Accepted::any("prediction"),
    Accepted { name: "verbosity", without_effect: |value| value == "medium" },
    Accepted { name: "modalities", without_effect: |value| value == &serde_json::json!(["text"]) },
];

request! {
    /// A conversation that the model continues.
    ChatRequest {
        /// The model's name, as `/v1/models` lists it.
        model: Option<String>,
        /// The conversation.
        #[schema(min_items = 1)]
        messages: Vec<ChatMessage>,
        /// Longest answer in tokens; the newer name of `max_tokens`.
        max_completion_tokens: Option<usize>,
        /// Adds log-probabilities of the generated tokens.
        logprobs: Option<bool>,
        /// Adds so many of the most probable tokens at each place.
        #[schema(maximum = 20)]
        top_logprobs: Option<usize>,
        /// The form of the answer.
        response_format: Option<ResponseFormat>,
        /// Functions that the model may call.
        tools: Option<Vec<Tool>>,
        /// Whether and which function is called.
        tool_choice: Option<ToolChoice>,
        /// Allows more than one call in an answer.
        parallel_tool_calls: Option<bool>,
        /// How long the model thinks before it answers.
        reasoning_effort: Option<ReasoningEffort>,
        /// Most tokens of thinking.
        thinking_token_budget: Option<usize>,
        /// Variables of the chat template.
        #[schema(value_type = Option<Object>)]
        chat_template_kwargs: Option<Map<String, Value>>,
        /// Continues the last message, which is the assistant's.
        continue_final_message: Option<bool>,
        /// Ends the prompt where the assistant's answer begins; true unless
        /// `continue_final_message` is set.
        add_generation_prompt: Option<bool>,
    }
}

/// Who says something.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// Instructions, by their newer name.
    Developer,
    /// The user.
    User,
    /// The model.
    Assistant,
    /// The result of a call.
    Tool,
}

/// One message of a conversation.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ChatMessage {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: Option<Text>,
    /// What the assistant thought.
    #[serde(alias = "reasoning")]
    pub reasoning_content: Option<String>,
    /// Calls that the assistant made.
    pub tool_calls: Option<Vec<PastToolCall>>,
    /// The call that a tool's message answers.
    pub tool_call_id: Option<String>,
}

/// A call that the assistant made earlier.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct PastToolCall {
    /// The call's name for the tool's message.
    pub id: Option<String>,
    /// What was called.
    pub function: PastFunction,
}

/// The function of an earlier call.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct PastFunction {
    /// The function's name.
    pub name: String,
    /// Its arguments, as JSON text.
    pub arguments: Option<String>,
}

/// A function that the model may call.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct Tool {
    /// Always `function`.
    #[serde(rename = "type")]
    pub kind: ToolKind,
    /// The function.
    pub function: Function,
}

/// Kinds of tools.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ToolKind {
    /// A function of the client.
    Function,
}

/// A function's description.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct Function {
    /// The name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// Its parameters, as a JSON schema.
    #[schema(value_type = Option<Object>)]
    pub parameters: Option<Map<String, Value>>,
    /// Whether calls follow the schema where the model decides about them. Those of required and
    /// named functions always do.
    pub strict: Option<bool>,
}

/// Whether and which function is called.
#[derive(Clone, Debug, Deserialize, PartialEq, ToSchema)]
#[serde(untagged, expecting = "expected auto, none, required or an object that names a function")]
pub enum ToolChoice {
    /// A word.
    Mode(ToolMode),
    /// A function.
    Named {
        /// Always `function`.
        #[serde(rename = "type")]
        kind: ToolKind,
        /// The function.
        function: ToolName,
    },
}

/// A tool choice in one word.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ToolMode {
    /// The model decides.
    Auto,
    /// No call.
    None,
    /// At least one call.
    Required,
}

/// The name of a function.
#[derive(Clone, Debug, Deserialize, PartialEq, ToSchema)]
pub struct ToolName {
    /// The name.
    pub name: String,
}

/// The form of the answer.
#[derive(Clone, Debug, Deserialize, PartialEq, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Any text.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON that follows a schema.
    JsonSchema {
        /// The schema with its name.
        json_schema: NamedSchema,
    },
}

/// A JSON schema with a name.
#[derive(Clone, Debug, Deserialize, PartialEq, ToSchema)]
pub struct NamedSchema {
    /// The name.
    pub name: Option<String>,
    /// The schema.
    #[schema(value_type = Option<Object>)]
    pub schema: Option<Value>,
}

/// How long the model thinks.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReasoningEffort {
    /// Not at all.
    None,
    /// At most 256 tokens.
    Minimal,
    /// At most 1,024 tokens.
    Low,
    /// At most 4,096 tokens.
    Medium,
    /// As long as it likes.
    High,
    /// As long as it likes.
    Xhigh,
}

impl ReasoningEffort {
    /// The most tokens of thinking, where there is a limit.
    pub fn budget(self) -> Option<usize> {
        match self {
            Self::None => Some(0),
            Self::Minimal => Some(256),
            Self::Low => Some(1024),
            Self::Medium => Some(4096),
            Self::High | Self::Xhigh => None,
        }
    }
}

/// A whole answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// The answer's name.
    pub id: String,
    /// Always `chat.completion`.
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: u64,
    /// The model.
    pub model: String,
    /// The version of the server.
    pub system_fingerprint: &'static str,
    /// The answers.
    pub choices: Vec<ChatChoice>,
    /// Tokens.
    pub usage: Usage,
    /// Times.
    pub timings: Timings,
    /// The prompt's ids, if `return_token_ids` was set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// One answer.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Which of `n`.
    pub index: usize,
    /// What the model says.
    pub message: AnswerMessage,
    /// Log-probabilities, if they were asked for.
    #[schema(required = true)]
    pub logprobs: Option<ChatLogprobs>,
    /// Why the answer ends.
    pub finish_reason: &'static str,
    /// The stop text or stop id that ended the answer.
    #[schema(required = true, value_type = Option<Value>)]
    pub stop_reason: Option<Value>,
    /// The answer's ids, if `return_token_ids` was set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// What the model says.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AnswerMessage {
    /// Always `assistant`.
    pub role: &'static str,
    /// The text; null if there are only calls.
    #[schema(required = true)]
    pub content: Option<String>,
    /// Always null.
    #[schema(required = true)]
    pub refusal: Option<String>,
    /// What the model thought.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pub tool_calls: Vec<ToolCall>,
}

impl Default for AnswerMessage {
    fn default() -> Self {
        Self {
            role: "assistant",
            content: None,
            refusal: None,
            reasoning_content: None,
            tool_calls: Vec::new(),
        }
    }
}

/// A call.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ToolCall {
    /// The call's name.
    pub id: String,
    /// Always `function`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// What is called.
    pub function: CalledFunction,
}

/// The function of a call.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct CalledFunction {
    /// The name.
    pub name: String,
    /// The arguments, as JSON text.
    pub arguments: String,
}

/// Log-probabilities of the generated tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One entry per token.
    pub content: Vec<TokenLogprob>,
    /// Always null.
    #[schema(required = true)]
    pub refusal: Option<Vec<TokenLogprob>>,
}

/// A token with its log-probability.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct TokenLogprob {
    /// The token's text.
    pub token: String,
    /// Its natural logarithm of probability.
    pub logprob: f32,
    /// The text's bytes.
    pub bytes: Vec<u8>,
    /// The most probable tokens at this place.
    pub top_logprobs: Vec<TopLogprob>,
}

/// One of the most probable tokens.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct TopLogprob {
    /// The token's text.
    pub token: String,
    /// Its natural logarithm of probability.
    pub logprob: f32,
    /// The text's bytes.
    pub bytes: Vec<u8>,
}

/// A piece of a streamed answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChunk {
    /// The answer's name.
    pub id: String,
    /// Always `chat.completion.chunk`.
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: u64,
    /// The model.
    pub model: String,
    /// The version of the server.
    pub system_fingerprint: &'static str,
    /// At most one choice.
    pub choices: Vec<ChunkChoice>,
    /// Tokens, in the last piece if they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Times, in the piece that ends a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
    /// The prompt's ids, in the first piece if `return_token_ids` was set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// What a piece adds to a choice.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct ChunkChoice {
    /// Which of `n`.
    pub index: usize,
    /// What is added.
    pub delta: Delta,
    /// Log-probabilities of the added tokens.
    #[schema(required = true)]
    pub logprobs: Option<ChatLogprobs>,
    /// Why the answer ends, in its last piece.
    #[schema(required = true)]
    pub finish_reason: Option<&'static str>,
    /// The stop text or stop id that ended the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    pub stop_reason: Option<Value>,
    /// Ids of the added tokens, if `return_token_ids` was set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// Text, thinking or calls that a piece adds.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct Delta {
    /// `assistant`, in the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Thinking.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Parts of calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCallDelta>>,
}

/// A part of a call.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ToolCallDelta {
    /// Which call of the answer.
    pub index: usize,
    /// The call's name, in its first part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`, in the first part.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// What is added.
    pub function: FunctionDelta,
}

/// A part of a call's function.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FunctionDelta {
    /// The function's name, in the first part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Text that is added to the arguments.
    pub arguments: String,
}

/// Log-probabilities by token text, as text completions have them.
pub type TopByText = BTreeMap<String, f32>;
