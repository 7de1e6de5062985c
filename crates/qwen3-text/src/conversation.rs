//! What a chat template renders, and the chat file that holds it.

use std::path::Path;

use crate::error::TemplateError;
use crate::file;
use crate::json::Json;

/// Largest chat file, in bytes.
const MAX_CHAT_FILE: u64 = 64 << 20;
/// Names that a chat file may not give to the template: `render` sets them, or transformers takes
/// them for itself.
const RESERVED: [&str; 4] = ["messages", "tools", "chat_template", "add_generation_prompt"];

/// A conversation as a chat template sees it.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// Objects with `role` and whatever else the template reads: `content`, `reasoning_content`,
    /// `tool_calls`.
    pub messages: Vec<Json>,
    /// Function descriptions, if there are any.
    pub tools: Option<Vec<Json>>,
    /// Further variables of the template, for example `enable_thinking`. Without that one, the
    /// template decides whether the model thinks.
    pub variables: Vec<(String, Json)>,
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Whether the text ends inside the last message, so that the model continues it.
    pub continue_final_message: bool,
}

impl Conversation {
    /// A conversation that waits for the assistant's answer.
    pub fn new(messages: Vec<Json>, enable_thinking: Option<bool>) -> Self {
        let thinking = |flag| ("enable_thinking".to_owned(), Json::Bool(flag));
        Self {
            messages,
            variables: enable_thinking.map(thinking).into_iter().collect(),
            add_generation_prompt: true,
            ..Self::default()
        }
    }

    /// A single message of a user.
    pub fn question(words: &str, enable_thinking: Option<bool>) -> Self {
        Self::new(vec![Json::message("user", words)], enable_thinking)
    }

    /// The variable `enable_thinking`, if it is set.
    pub fn enable_thinking(&self) -> Option<bool> {
        self.variables.iter().rev().find_map(|(name, value)| match value {
            Json::Bool(flag) if name == "enable_thinking" => Some(*flag),
            _ => None,
        })
    }

    /// Reads a chat file; `from_json` describes its content.
    pub fn open(path: &Path) -> Result<Self, TemplateError> {
        let text = file::read_text(path, MAX_CHAT_FILE)
            .map_err(|source| TemplateError::read(path, source))?;
        Self::from_json(&path.display().to_string(), &text)
    }

    /// Parses the content of a chat file; `origin` names it in error messages. The content is a
    /// list of messages, or an object with
    ///
    /// - `messages`,
    /// - `tools`, `add_generation_prompt` (true if absent) and `continue_final_message`, all
    ///   optional,
    /// - `chat_template_kwargs`, an object whose entries become variables of the template.
    ///
    /// Every other field is a variable of the template too, as in
    /// `apply_chat_template(messages, **fields)` of transformers.
    pub fn from_json(origin: &str, text: &str) -> Result<Self, TemplateError> {
        let wrong = |problem: String| TemplateError::content(origin, problem);
        let parsed = Json::parse(text).map_err(|error| wrong(error.to_string()))?;
        let mut fields = match parsed {
            Json::Object(fields) => fields,
            list @ Json::Array(_) => [("messages".to_owned(), list)].into_iter().collect(),
            other => {
                let found = other.kind();
                return Err(wrong(format!("found {found}, expected an object with messages")));
            }
        };
        let mut take = |field: &str| fields.shift_remove(field).filter(|value| !value.is_null());
        let list = |field: &str, value: Json| match value {
            Json::Array(items) => Ok(items),
            other => Err(wrong(format!("field {field}: found {}, expected a list", other.kind()))),
        };
        let flag = |field: &str, value: Option<Json>, default: bool| match value {
            Some(Json::Bool(flag)) => Ok(flag),
            None => Ok(default),
            Some(other) => {
                Err(wrong(format!("field {field}: found {}, expected true or false", other.kind())))
            }
        };
        let Some(messages) = take("messages") else {
            return Err(wrong("field messages: missing, expected a list".to_owned()));
        };
        let messages = list("messages", messages)?;
        if messages.is_empty() {
            return Err(wrong("field messages: found an empty list".to_owned()));
        }
        for (i, message) in messages.iter().enumerate() {
            if message.get("role").and_then(Json::as_str).is_none() {
                let expected = "expected an object with a text field role";
                return Err(wrong(format!("messages[{i}]: {expected}")));
            }
        }
        let tools = take("tools").map(|tools| list("tools", tools)).transpose()?;
        let continue_final_message =
            flag("continue_final_message", take("continue_final_message"), false)?;
        let add_generation_prompt =
            flag("add_generation_prompt", take("add_generation_prompt"), !continue_final_message)?;
        if continue_final_message && add_generation_prompt {
            let both = "continue_final_message and add_generation_prompt exclude each other";
            return Err(wrong(both.to_owned()));
        }
        let named = match take("chat_template_kwargs") {
            Some(Json::Object(entries)) => entries.into_iter().collect(),
            Some(other) => {
                let found = other.kind();
                let problem =
                    format!("field chat_template_kwargs: found {found}, expected an object");
                return Err(wrong(problem));
            }
            None => Vec::new(),
        };
        let mut variables: Vec<(String, Json)> = fields.into_iter().collect();
        variables.extend(named);
        for (name, value) in &variables {
            if RESERVED.contains(&name.as_str()) {
                return Err(wrong(format!("field {name}: a chat file cannot set this variable")));
            }
            if name == "enable_thinking" && !value.is_null() {
                flag(name, Some(value.clone()), false)?;
            }
        }
        Ok(Self { messages, tools, variables, add_generation_prompt, continue_final_message })
    }
}
