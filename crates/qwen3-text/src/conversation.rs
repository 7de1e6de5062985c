//! What a chat template renders, and the chat file that holds it.

use std::path::Path;

use serde_json::{Map, Value as Json, json};

use crate::error::{TemplateError, kind, read_json};

/// What a template renders: messages, and what it is told about them.
#[derive(Debug, Clone)]
pub struct Conversation {
    /// Objects with `role` and what else the template reads: `content`, `reasoning_content`,
    /// `tool_calls`.
    pub messages: Vec<Json>,
    /// Function descriptions, where there are any.
    pub tools: Option<Vec<Json>>,
    /// Absent: the template decides.
    pub enable_thinking: Option<bool>,
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
}

impl Conversation {
    /// A conversation that waits for the assistant's answer.
    pub fn new(messages: Vec<Json>, enable_thinking: Option<bool>) -> Self {
        Self { messages, tools: None, enable_thinking, add_generation_prompt: true }
    }

    /// A user's message alone.
    pub fn question(words: &str, enable_thinking: Option<bool>) -> Self {
        Self::new(vec![json!({ "role": "user", "content": words })], enable_thinking)
    }

    /// Reads a chat file: an object with `messages` and optionally `tools`, `enable_thinking` and
    /// `add_generation_prompt` (true when absent), or the list of messages alone.
    pub fn open(path: &Path) -> Result<Self, TemplateError> {
        let wrong = |problem: String| TemplateError::Json { path: path.to_owned(), problem };
        let mut chat = match read_json(path)? {
            Some(Json::Object(chat)) => chat,
            Some(list @ Json::Array(_)) => Map::from_iter([("messages".to_owned(), list)]),
            Some(other) => {
                return Err(wrong(format!(
                    "found {}, expected an object with messages",
                    kind(&other)
                )));
            }
            None => {
                return Err(TemplateError::Read {
                    path: path.to_owned(),
                    source: std::io::ErrorKind::NotFound.into(),
                });
            }
        };
        let mut take = |field: &str| chat.remove(field).filter(|value| !value.is_null());
        let messages = match take("messages") {
            Some(Json::Array(messages)) if !messages.is_empty() => messages,
            Some(Json::Array(_)) => {
                return Err(wrong("field messages: found an empty list".to_owned()));
            }
            Some(other) => {
                return Err(wrong(format!(
                    "field messages: found {}, expected a list",
                    kind(&other)
                )));
            }
            None => return Err(wrong("field messages: missing, expected a list".to_owned())),
        };
        for (i, message) in messages.iter().enumerate() {
            if !message.get("role").is_some_and(Json::is_string) {
                return Err(wrong(format!(
                    "messages[{i}]: expected an object with a text field role"
                )));
            }
        }
        let tools = match take("tools") {
            Some(Json::Array(tools)) => Some(tools),
            Some(other) => {
                return Err(wrong(format!("field tools: found {}, expected a list", kind(&other))));
            }
            None => None,
        };
        let mut flag = |field: &str| match take(field) {
            Some(Json::Bool(value)) => Ok(Some(value)),
            Some(other) => {
                Err(wrong(format!("field {field}: found {}, expected true or false", kind(&other))))
            }
            None => Ok(None),
        };
        Ok(Self {
            messages,
            tools,
            enable_thinking: flag("enable_thinking")?,
            add_generation_prompt: flag("add_generation_prompt")?.unwrap_or(true),
        })
    }
}
