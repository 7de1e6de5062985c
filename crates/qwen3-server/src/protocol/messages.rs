//! `POST /v1/messages`, Anthropic's API.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::content::{Text, kind};
use crate::body::Accepted;

/// Fields that clients send and that do not change the answer.
pub const ACCEPTED: &[Accepted] = &[
    Accepted::any("metadata"),
    Accepted::any("service_tier"),
    Accepted::any("container"),
    Accepted::any("inference_geo"),
    Accepted::any("context_management"),
    Accepted::any("betas"),
    Accepted::any("cache_control"),
    Accepted { name: "mcp_servers", without_effect: is_empty_list },
];

fn is_empty_list(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

/// A conversation that the model continues.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MessagesRequest {
    /// The model's name, as `/v1/models` lists it.
    pub model: String,
    /// The conversation.
    #[schema(min_items = 1)]
    pub messages: Vec<InputMessage>,
    /// Longest answer in tokens, thinking included.
    #[schema(minimum = 1)]
    pub max_tokens: usize,
    /// Instructions.
    pub system: Option<Text>,
    /// Up to 16 texts; the answer ends before the first that occurs.
    pub stop_sequences: Option<Vec<String>>,
    /// Sends the answer as events while it is generated.
    pub stream: Option<bool>,
    /// Divides the logits; 0 takes the most probable token each time.
    #[schema(minimum = 0, maximum = 1)]
    pub temperature: Option<f32>,
    /// Chooses among the most probable tokens that together have this probability.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Chooses among so many tokens.
    #[schema(minimum = 0)]
    pub top_k: Option<i64>,
    /// Functions that the model may call.
    pub tools: Option<Vec<InputTool>>,
    /// Whether and which function is called.
    pub tool_choice: Option<InputToolChoice>,
    /// Whether the model thinks before it answers; it does not unless this says so.
    pub thinking: Option<Thinking>,
}

/// A conversation whose tokens are counted. Fields that only choose tokens are ignored.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CountTokensRequest {
    /// The model's name, as `/v1/models` lists it.
    pub model: String,
    /// The conversation.
    #[schema(min_items = 1)]
    pub messages: Vec<InputMessage>,
    /// Instructions.
    pub system: Option<Text>,
    /// Functions that the model may call.
    pub tools: Option<Vec<InputTool>>,
    /// Whether and which function is called.
    pub tool_choice: Option<InputToolChoice>,
    /// Whether the model thinks before it answers.
    pub thinking: Option<Thinking>,
}

/// Tokens of a prompt.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct TokenCount {
    /// How many there are.
    pub input_tokens: usize,
}

/// Who says something.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum InputRole {
    /// The user, also with results of calls.
    User,
    /// The model.
    Assistant,
}

/// One message of a conversation.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct InputMessage {
    /// Who says it.
    pub role: InputRole,
    /// What is said.
    #[schema(value_type = Text)]
    pub content: Blocks,
}

/// The blocks of a message; a text alone counts as one block.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks(pub Vec<Block>);

/// A block of a message.
#[derive(Clone, Debug, PartialEq)]
pub enum Block {
    /// Text.
    Text(String),
    /// What the assistant thought.
    Thinking(String),
    /// A call of the assistant.
    ToolUse {
        /// The call's name.
        id: String,
        /// The function.
        name: String,
        /// Its arguments.
        input: Value,
    },
    /// The result of a call.
    ToolResult {
        /// The call's name.
        id: String,
        /// The result.
        text: String,
    },
}

impl<'de> Deserialize<'de> for Blocks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => Ok(Self(vec![Block::Text(text)])),
            Value::Array(blocks) => {
                let blocks: Result<Vec<Option<Block>>, String> =
                    blocks.into_iter().map(block).collect();
                Ok(Self(blocks.map_err(D::Error::custom)?.into_iter().flatten().collect()))
            }
            other => Err(D::Error::custom(format!(
                "found {}, expected a text or a list of blocks",
                kind(&other)
            ))),
        }
    }
}

fn block(mut block: Value) -> Result<Option<Block>, String> {
    let kind = block.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut take = |field: &str| block.get_mut(field).map_or(Value::Null, Value::take);
    let text = |value: Value, field: &str| match value {
        Value::String(text) => Ok(text),
        _ => Err(format!("a block of type {kind} has no text field {field}")),
    };
    Ok(Some(match kind.as_str() {
        "text" => Block::Text(text(take("text"), "text")?),
        "thinking" => Block::Thinking(text(take("thinking"), "thinking")?),
        // Encrypted for another server; this one never sends such blocks.
        "redacted_thinking" => return Ok(None),
        "tool_use" => Block::ToolUse {
            id: text(take("id"), "id")?,
            name: text(take("name"), "name")?,
            input: take("input"),
        },
        "tool_result" => Block::ToolResult {
            id: text(take("tool_use_id"), "tool_use_id")?,
            text: match take("content") {
                Value::Null => String::new(),
                content => {
                    serde_json::from_value::<Text>(content).map_err(|error| error.to_string())?.0
                }
            },
        },
        _ => {
            return Err(format!(
                "found a block of type {kind:?}, expected text, thinking, tool_use or \
                 tool_result; this server reads no images or documents"
            ));
        }
    }))
}

/// A function that the model may call.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct InputTool {
    /// `custom` or absent. Tools that a server runs are not supported.
    #[serde(rename = "type")]
    pub kind: Option<InputToolKind>,
    /// The name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// Its parameters, as a JSON schema.
    #[schema(value_type = Object)]
    pub input_schema: Map<String, Value>,
}

/// Kinds of tools.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum InputToolKind {
    /// A function of the client.
    Custom,
}

/// Whether and which function is called.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct InputToolChoice {
    /// The choice.
    #[serde(rename = "type")]
    pub kind: InputToolMode,
    /// The function, with `tool`.
    pub name: Option<String>,
    /// Allows at most one call.
    pub disable_parallel_tool_use: Option<bool>,
}

/// A tool choice in one word.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum InputToolMode {
    /// The model decides.
    Auto,
    /// At least one call.
    Any,
    /// A call of the named function.
    Tool,
    /// No call.
    None,
}

/// Whether the model thinks.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct Thinking {
    /// Whether it does.
    #[serde(rename = "type")]
    pub kind: ThinkingMode,
    /// Most tokens of thinking.
    pub budget_tokens: Option<usize>,
}

/// Whether the model thinks, in one word.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ThinkingMode {
    /// It thinks.
    Enabled,
    /// It thinks.
    Adaptive,
    /// It does not.
    Disabled,
}

/// A whole answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MessagesResponse {
    /// The answer's name.
    pub id: String,
    /// Always `message`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Always `assistant`.
    pub role: &'static str,
    /// The model.
    pub model: String,
    /// Thinking, text and calls.
    pub content: Vec<AnswerBlock>,
    /// Why the answer ends; null in the event that starts a stream.
    #[schema(required = true)]
    pub stop_reason: Option<&'static str>,
    /// The stop text that ended the answer.
    #[schema(required = true)]
    pub stop_sequence: Option<String>,
    /// Tokens.
    pub usage: MessagesUsage,
}

/// A block of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AnswerBlock {
    /// Text.
    Text {
        /// The text.
        text: String,
    },
    /// Thinking.
    Thinking {
        /// The text.
        thinking: String,
        /// Always empty: this server signs nothing.
        signature: String,
    },
    /// A call.
    ToolUse {
        /// The call's name.
        id: String,
        /// The function.
        name: String,
        /// Its arguments.
        #[schema(value_type = Object)]
        input: Value,
    },
}

/// Tokens that a request took.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct MessagesUsage {
    /// Tokens of the prompt that were computed.
    pub input_tokens: usize,
    /// Always 0: writing to the cache costs nothing.
    pub cache_creation_input_tokens: usize,
    /// Tokens of the prompt that an earlier request left in the cache.
    pub cache_read_input_tokens: usize,
    /// Generated tokens.
    pub output_tokens: usize,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn blocks(value: Value) -> Result<Vec<Block>, String> {
        serde_json::from_value::<Blocks>(value)
            .map(|blocks| blocks.0)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn blocks_of_every_kind_are_read() {
        let found = blocks(json!([
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
            {"type": "thinking", "thinking": "b", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "c"}]},
        ]));
        let expected = vec![
            Block::Text("a".into()),
            Block::Thinking("b".into()),
            Block::ToolUse { id: "1".into(), name: "f".into(), input: json!({"x": 1}) },
            Block::ToolResult { id: "1".into(), text: "c".into() },
        ];
        assert_eq!(found.unwrap(), expected);
        assert_eq!(blocks(json!("a")).unwrap(), [Block::Text("a".into())]);
    }

    #[test]
    fn images_and_incomplete_blocks_are_refused() {
        let image = blocks(json!([{"type": "image", "source": {}}])).unwrap_err();
        assert!(image.contains("reads no images"), "{image}");
        let call = blocks(json!([{"type": "tool_use", "name": "f"}])).unwrap_err();
        assert!(call.contains("no text field id"), "{call}");
        assert!(blocks(json!(1)).unwrap_err().contains("found a number"));
    }
}
