//! Prompts: from a conversation to token ids.

use axum::http::StatusCode;
use qwen3_text::{Conversation, Prompt};
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::protocol::chat::{ChatMessage, Function, PastToolCall, Role};
use crate::service::ServedModel;

/// Variables of the chat template that the server sets itself.
const RESERVED: [&str; 6] = [
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
];

/// A conversation as all APIs ask for it.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// Messages as chat templates read them.
    pub messages: Vec<Value>,
    /// Functions that the model may call.
    pub tools: Vec<Function>,
    /// Further variables of the chat template.
    pub variables: Map<String, Value>,
    /// Ends the prompt where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Ends the prompt inside the last message.
    pub continue_final_message: bool,
}

impl Chat {
    /// A conversation that waits for the assistant's answer.
    pub fn new(messages: Vec<Value>, tools: Vec<Function>) -> Self {
        Self { messages, tools, add_generation_prompt: true, ..Self::default() }
    }

    /// Adds variables of the chat template from a request.
    pub fn set_variables(&mut self, variables: Map<String, Value>) -> Result<(), ApiError> {
        if let Some(name) = variables.keys().find(|name| RESERVED.contains(&name.as_str())) {
            let param = format!("chat_template_kwargs.{name}");
            return Err(ApiError::param(param, format!("{name} cannot be replaced")));
        }
        self.variables = variables;
        Ok(())
    }

    /// The prompt as text and as ids.
    pub fn prompt(self, model: &ServedModel) -> Result<Prompt, ApiError> {
        let template = model.template.as_ref().ok_or_else(|| {
            ApiError::new(
                StatusCode::BAD_REQUEST,
                "the model has no chat template; /v1/completions continues plain text",
            )
        })?;
        let tools = self.tools.iter().map(|tool| tool_json(tool).into()).collect::<Vec<_>>();
        let conversation = Conversation {
            messages: self.messages.into_iter().map(Into::into).collect(),
            tools: (!tools.is_empty()).then_some(tools),
            variables: self.variables.into_iter().map(|(k, value)| (k, value.into())).collect(),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
        };
        template
            .prompt(&model.tokenizer, &conversation, model.control_tokens)
            .map_err(|error| ApiError::param("messages", error.to_string()))
    }
}

/// The ids of a text, or the client's error.
pub fn encoded(ids: Result<Vec<u32>, qwen3_text::TokenizerError>) -> Result<Vec<u32>, ApiError> {
    ids.map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, error.to_string()))
}

/// A function as chat templates print it.
pub fn tool_json(tool: &Function) -> Value {
    let mut function = Map::new();
    function.insert("name".into(), tool.name.clone().into());
    if let Some(description) = &tool.description {
        function.insert("description".into(), description.clone().into());
    }
    let parameters = match &tool.parameters {
        Some(parameters) => Value::Object(parameters.clone()),
        None => json!({"type": "object", "properties": {}}),
    };
    function.insert("parameters".into(), parameters);
    json!({"type": "function", "function": function})
}

/// Messages of a chat request as chat templates read them.
pub fn messages(messages: &[ChatMessage]) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::param("messages", "messages is empty, expected at least one"));
    }
    Ok(messages.iter().map(message).collect())
}

fn message(message: &ChatMessage) -> Value {
    let role = match message.role {
        Role::System | Role::Developer => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    };
    let text = message.content.clone().unwrap_or_default().0;
    let mut fields = Map::new();
    fields.insert("role".into(), role.into());
    fields.insert("content".into(), text.into());
    if let Some(thinking) = &message.reasoning_content {
        fields.insert("reasoning_content".into(), thinking.clone().into());
    }
    if let Some(calls) = message.tool_calls.as_ref().filter(|calls| !calls.is_empty()) {
        let calls = calls.iter().map(|call: &PastToolCall| {
            call_json(
                call.id.as_deref(),
                &call.function.name,
                call.function.arguments.as_deref().unwrap_or("{}"),
            )
        });
        fields.insert("tool_calls".into(), calls.collect());
    }
    if let Some(id) = &message.tool_call_id {
        fields.insert("tool_call_id".into(), id.clone().into());
    }
    Value::Object(fields)
}

/// A call as chat templates read it. Arguments that are a JSON object become one, because some
/// templates print them one by one; other text stays as it is.
pub fn call_json(id: Option<&str>, name: &str, arguments: &str) -> Value {
    let parsed = serde_json::from_str::<Map<String, Value>>(arguments);
    let arguments = parsed.map_or_else(|_| Value::from(arguments), Value::Object);
    let mut call = json!({"type": "function", "function": {"name": name, "arguments": arguments}});
    if let (Some(id), Value::Object(fields)) = (id, &mut call) {
        fields.insert("id".into(), id.into());
    }
    call
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_become_what_templates_read() {
        let request = json!([
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
            {"role": "assistant", "content": null, "reasoning": "hm", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}},
                {"function": {"name": "g", "arguments": "not json"}},
            ]},
            {"role": "tool", "tool_call_id": "1", "content": "c"},
        ]);
        let parsed: Vec<ChatMessage> = serde_json::from_value(request).unwrap();
        let expected = json!([
            {"role": "system", "content": "be short"},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}, "id": "1"},
                {"type": "function", "function": {"name": "g", "arguments": "not json"}},
            ]},
            {"role": "tool", "content": "c", "tool_call_id": "1"},
        ]);
        assert_eq!(Value::from(messages(&parsed).unwrap()), expected);
        assert_eq!(messages(&[]).unwrap_err().param.as_deref(), Some("messages"));
    }

    #[test]
    fn variables_cannot_replace_the_conversation() {
        let mut chat = Chat::new(Vec::new(), Vec::new());
        let variables = |name: &str| Map::from_iter([(name.to_owned(), json!([]))]);
        for name in RESERVED {
            let error = chat.set_variables(variables(name)).unwrap_err();
            assert_eq!(error.param, Some(format!("chat_template_kwargs.{name}")));
        }
        assert!(chat.set_variables(variables("enable_thinking")).is_ok());
    }
}
