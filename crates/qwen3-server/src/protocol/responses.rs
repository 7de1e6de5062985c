//! `POST /v1/responses`, OpenAI's newer API. Answers are not stored.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::chat::{ReasoningEffort, ToolKind, ToolMode};
use super::content::{Text, kind};
use super::sampling::StreamOptions;
use crate::body::Accepted;

/// Fields that clients send and that do not change the answer.
pub const ACCEPTED: &[Accepted] = &[
    Accepted::any("user"),
    Accepted::any("store"),
    Accepted::any("service_tier"),
    Accepted::any("safety_identifier"),
    Accepted::any("prompt_cache_key"),
    Accepted::any("prompt_cache_retention"),
    Accepted::any("include"),
    Accepted::off("background"),
    Accepted { name: "truncation", without_effect: |value| value == "disabled" },
];

/// Text or a conversation that the model continues.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResponsesRequest {
    /// The model's name, as `/v1/models` lists it.
    pub model: Option<String>,
    /// A text, or a list of messages, calls and results of calls.
    #[schema(value_type = Text)]
    pub input: Items,
    /// Instructions before the conversation.
    pub instructions: Option<String>,
    /// Longest answer in tokens, thinking included.
    #[schema(minimum = 1)]
    pub max_output_tokens: Option<usize>,
    /// Divides the logits; 0 takes the most probable token each time.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f32>,
    /// Chooses among the most probable tokens that together have this probability.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Sends the answer as events while it is generated.
    pub stream: Option<bool>,
    /// Options of a streamed answer.
    pub stream_options: Option<StreamOptions>,
    /// Functions that the model may call.
    pub tools: Option<Vec<FunctionTool>>,
    /// Whether and which function is called.
    pub tool_choice: Option<FunctionChoice>,
    /// Allows more than one call in an answer.
    pub parallel_tool_calls: Option<bool>,
    /// How the model thinks.
    pub reasoning: Option<Reasoning>,
    /// The form of the answer.
    pub text: Option<TextOptions>,
    /// Returned as it is.
    #[schema(value_type = Option<Object>)]
    pub metadata: Option<Map<String, Value>>,
}

/// The items of a conversation; a text alone counts as a user's message.
#[derive(Clone, Debug, PartialEq)]
pub struct Items(pub Vec<Item>);

/// An item of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// Somebody says something.
    Message {
        /// `user`, `assistant`, `system` or `developer`.
        role: String,
        /// What is said.
        text: String,
    },
    /// What the assistant thought.
    Reasoning(String),
    /// A call of the assistant.
    Call {
        /// The call's name.
        id: String,
        /// The function.
        name: String,
        /// Its arguments, as JSON text.
        arguments: String,
    },
    /// The result of a call.
    Output {
        /// The call's name.
        id: String,
        /// The result.
        text: String,
    },
}

impl<'de> Deserialize<'de> for Items {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => Ok(Self(vec![Item::Message { role: "user".into(), text }])),
            Value::Array(items) => {
                let items: Result<Vec<Item>, String> = items.into_iter().map(item).collect();
                Ok(Self(items.map_err(D::Error::custom)?))
            }
            other => Err(D::Error::custom(format!(
                "found {}, expected a text or a list of items",
                kind(&other)
            ))),
        }
    }
}

fn item(mut item: Value) -> Result<Item, String> {
    let kind = item.get("type").and_then(Value::as_str).unwrap_or("message").to_owned();
    let mut take = |field: &str| item.get_mut(field).map_or(Value::Null, Value::take);
    let string = |value: Value, field: &str| match value {
        Value::String(text) => Ok(text),
        _ => Err(format!("an item of type {kind} has no text field {field}")),
    };
    let text = |value: Value| {
        serde_json::from_value::<Text>(value).map(|text| text.0).map_err(|error| error.to_string())
    };
    Ok(match kind.as_str() {
        "message" => {
            let role = string(take("role"), "role")?;
            if !["user", "assistant", "system", "developer"].contains(&&*role) {
                return Err(format!(
                    "found role {role:?}, expected user, assistant, system or developer"
                ));
            }
            Item::Message { role, text: text(take("content"))? }
        }
        "reasoning" => {
            let parts = match take("content") {
                Value::Array(parts) if !parts.is_empty() => parts,
                _ => take("summary").as_array().cloned().unwrap_or_default(),
            };
            let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
            Item::Reasoning(texts.collect::<Vec<_>>().join("\n"))
        }
        "function_call" => Item::Call {
            id: string(take("call_id"), "call_id")?,
            name: string(take("name"), "name")?,
            arguments: string(take("arguments"), "arguments")?,
        },
        "function_call_output" => {
            Item::Output { id: string(take("call_id"), "call_id")?, text: text(take("output"))? }
        }
        _ => {
            return Err(format!(
                "found an item of type {kind:?}, expected message, reasoning, function_call or \
                 function_call_output"
            ));
        }
    })
}

/// A function that the model may call.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct FunctionTool {
    /// Always `function`.
    #[serde(rename = "type", serialize_with = "function")]
    pub kind: ToolKind,
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

fn function<S: serde::Serializer>(_: &ToolKind, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("function")
}

/// Whether and which function is called.
#[derive(Clone, Debug, Deserialize, PartialEq, ToSchema)]
#[serde(untagged, expecting = "expected auto, none, required or an object that names a function")]
pub enum FunctionChoice {
    /// A word.
    Mode(ToolMode),
    /// A function.
    Named {
        /// Always `function`.
        #[serde(rename = "type")]
        kind: ToolKind,
        /// The function.
        name: String,
    },
}

/// How the model thinks.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct Reasoning {
    /// How long.
    pub effort: Option<ReasoningEffort>,
}

/// The form of the answer.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct TextOptions {
    /// The form.
    pub format: Option<TextFormat>,
}

/// The form of the answer.
#[derive(Clone, Debug, Deserialize, PartialEq, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TextFormat {
    /// Any text.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON that follows a schema.
    JsonSchema {
        /// The schema's name.
        name: Option<String>,
        /// The schema.
        #[schema(value_type = Object)]
        schema: Value,
    },
}

/// A whole answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ResponseObject {
    /// The answer's name.
    pub id: String,
    /// Always `response`.
    pub object: &'static str,
    /// Unix time in seconds.
    pub created_at: u64,
    /// `in_progress`, `completed`, `incomplete` or `failed`.
    pub status: &'static str,
    /// Why the answer failed.
    #[schema(required = true, value_type = Option<Object>)]
    pub error: Option<Value>,
    /// Why the answer is incomplete.
    #[schema(required = true)]
    pub incomplete_details: Option<IncompleteDetails>,
    /// The instructions of the request.
    #[schema(required = true)]
    pub instructions: Option<String>,
    /// The limit of the request.
    #[schema(required = true)]
    pub max_output_tokens: Option<usize>,
    /// The model.
    pub model: String,
    /// Thinking, messages and calls.
    pub output: Vec<OutputItem>,
    /// Whether several calls were allowed.
    pub parallel_tool_calls: bool,
    /// Always null: answers are not stored.
    #[schema(required = true)]
    pub previous_response_id: Option<String>,
    /// Always false.
    pub store: bool,
    /// The temperature.
    #[schema(required = true)]
    pub temperature: Option<f32>,
    /// The tool choice of the request.
    #[schema(value_type = Value)]
    pub tool_choice: Value,
    /// The tools of the request.
    pub tools: Vec<FunctionTool>,
    /// The probability mass.
    #[schema(required = true)]
    pub top_p: Option<f32>,
    /// Always `disabled`.
    pub truncation: &'static str,
    /// Tokens, at the end.
    #[schema(required = true)]
    pub usage: Option<ResponseUsage>,
    /// The metadata of the request.
    #[schema(value_type = Object)]
    pub metadata: Map<String, Value>,
}

/// Why an answer is incomplete.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct IncompleteDetails {
    /// Always `max_output_tokens`.
    pub reason: &'static str,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputItem {
    /// Thinking.
    Reasoning {
        /// The item's name.
        id: String,
        /// Always empty.
        summary: Vec<OutputPart>,
        /// The thinking.
        content: Vec<OutputPart>,
        /// `in_progress`, `completed` or `incomplete`.
        status: &'static str,
    },
    /// Text.
    Message {
        /// The item's name.
        id: String,
        /// Always `assistant`.
        role: &'static str,
        /// The text.
        content: Vec<OutputPart>,
        /// `in_progress`, `completed` or `incomplete`.
        status: &'static str,
    },
    /// A call.
    FunctionCall {
        /// The item's name.
        id: String,
        /// The call's name.
        call_id: String,
        /// The function.
        name: String,
        /// Its arguments, as JSON text.
        arguments: String,
        /// `in_progress`, `completed` or `incomplete`.
        status: &'static str,
    },
}

/// A part of an item.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputPart {
    /// Thinking.
    ReasoningText {
        /// The text.
        text: String,
    },
    /// Text.
    OutputText {
        /// The text.
        text: String,
        /// Always empty.
        #[schema(value_type = Vec<Object>)]
        annotations: Vec<Value>,
        /// Always empty.
        #[schema(value_type = Vec<Object>)]
        logprobs: Vec<Value>,
    },
}

/// Tokens that a request took.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct ResponseUsage {
    /// Tokens of the prompt.
    pub input_tokens: usize,
    /// Of those.
    pub input_tokens_details: InputDetails,
    /// Generated tokens.
    pub output_tokens: usize,
    /// Of those.
    pub output_tokens_details: OutputDetails,
    /// Both.
    pub total_tokens: usize,
}

/// Details of the prompt's tokens.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct InputDetails {
    /// Tokens that an earlier request left in the cache.
    pub cached_tokens: usize,
}

/// Details of the generated tokens.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct OutputDetails {
    /// Tokens of thinking.
    pub reasoning_tokens: usize,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn items(value: Value) -> Result<Vec<Item>, String> {
        serde_json::from_value::<Items>(value)
            .map(|items| items.0)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn items_of_every_kind_are_read() {
        let found = items(json!([
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "b"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "c"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "d"}]},
        ]));
        let message =
            |role: &str, text: &str| Item::Message { role: role.into(), text: text.into() };
        let expected = vec![
            message("user", "a"),
            Item::Reasoning("b".into()),
            Item::Call { id: "1".into(), name: "f".into(), arguments: "{}".into() },
            Item::Output { id: "1".into(), text: "c".into() },
            message("assistant", "d"),
        ];
        assert_eq!(found.unwrap(), expected);
        assert_eq!(items(json!("a")).unwrap(), [message("user", "a")]);
    }

    #[test]
    fn items_that_are_not_supported_are_refused() {
        let search = items(json!([{"type": "web_search_call"}])).unwrap_err();
        assert!(search.contains("web_search_call"), "{search}");
        let role = items(json!([{"role": "judge", "content": "a"}])).unwrap_err();
        assert!(role.contains("judge"), "{role}");
        assert!(items(json!(1)).unwrap_err().contains("found a number"));
        let call = items(json!([{"type": "function_call", "name": "f"}])).unwrap_err();
        assert!(call.contains("no text field call_id"), "{call}");
    }
}
