//! `POST /v1/responses`, OpenAI's newer API.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Response;
use serde_json::{Map, Value, json as value};

use super::chat::call_id;
use super::{From, json, ok, respond_to_prompt};
use crate::answer::{Answer, Delta, Part, Reason, Whole};
use crate::conversation::{Continuation, ToolChoice};
use crate::error::{ApiError, Dialect, ErrorBody};
use crate::prompt::{Chat, call_json};
use crate::protocol::answer::ServerSentEvent;
use crate::protocol::chat::{Function, ReasoningEffort, ToolMode};
use crate::protocol::responses::{
    ACCEPTED, FunctionChoice, IncompleteDetails, InputDetails, Item, OutputDetails, OutputItem,
    OutputPart, ResponseObject, ResponseUsage, ResponsesRequest, TextFormat,
};
use crate::protocol::sampling::SamplingFields;
use crate::request_id;
use crate::service::{Service, now};
use crate::sse::{self, Events, StreamError};
use crate::structure::Structure;

/// Continues a text or a conversation. The answer is not stored.
#[utoipa::path(post, path = "/v1/responses", request_body = ResponsesRequest,
    responses((status = 200, content(
        (ResponseObject = "application/json"), (ServerSentEvent = "text/event-stream"))),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
pub async fn create(
    State(service): State<Arc<Service>>,
    caller: From,
    request: Request,
) -> Response<Body> {
    let answer = async {
        let body: ResponsesRequest = json(&service, request, ACCEPTED).await?;
        let model = service.model_named(body.model.as_deref())?;
        let object = object(&body, &model.name);
        let stream = body.stream.unwrap_or(false);
        let continuation = continuation(body)?;
        let (mut answer, _) = continuation.submit(&service, &caller).await?;
        if stream {
            return Ok(self::stream(&service, object, answer));
        }
        let whole = answer.whole().await?.into_iter().next().unwrap_or_default();
        Ok(ok(&finished(object, &answer, whole)))
    };
    respond_to_prompt(Dialect::OpenAi, "input", answer.await)
}

/// The response before its first token.
fn object(body: &ResponsesRequest, model: &str) -> ResponseObject {
    ResponseObject {
        id: request_id::new("resp_"),
        object: "response",
        created_at: now(),
        status: "in_progress",
        error: None,
        incomplete_details: None,
        instructions: body.instructions.clone(),
        max_output_tokens: body.max_output_tokens,
        model: model.to_owned(),
        output: Vec::new(),
        parallel_tool_calls: body.parallel_tool_calls.unwrap_or(true),
        previous_response_id: None,
        store: false,
        temperature: body.temperature,
        tool_choice: match &body.tool_choice {
            None | Some(FunctionChoice::Mode(ToolMode::Auto)) => "auto".into(),
            Some(FunctionChoice::Mode(ToolMode::None)) => "none".into(),
            Some(FunctionChoice::Mode(ToolMode::Required)) => "required".into(),
            Some(FunctionChoice::Named { name, .. }) => {
                value!({"type": "function", "name": name})
            }
        },
        tools: body.tools.clone().unwrap_or_default(),
        top_p: body.top_p,
        truncation: "disabled",
        usage: None,
        metadata: body.metadata.clone().unwrap_or_default(),
    }
}

fn continuation(body: ResponsesRequest) -> Result<Continuation, ApiError> {
    let mut messages = Vec::new();
    if let Some(instructions) = body.instructions {
        messages.push(value!({"role": "system", "content": instructions}));
    }
    if body.input.0.is_empty() {
        return Err(ApiError::param("input", "input is empty, expected at least one item"));
    }
    for item in body.input.0 {
        add(item, &mut messages);
    }
    let tools = body.tools.unwrap_or_default().into_iter().map(|tool| Function {
        name: tool.name,
        description: tool.description,
        parameters: tool.parameters,
        strict: tool.strict,
    });
    let effort = body.reasoning.and_then(|reasoning| reasoning.effort);
    Ok(Continuation {
        chat: Chat::new(messages, tools.collect()),
        sampling: SamplingFields {
            max_tokens: body.max_output_tokens,
            temperature: body.temperature,
            top_p: body.top_p,
            ..SamplingFields::default()
        },
        thinking: effort.map(|effort| effort != ReasoningEffort::None),
        thinking_budget: effort.and_then(ReasoningEffort::budget),
        tool_choice: match body.tool_choice {
            None | Some(FunctionChoice::Mode(ToolMode::Auto)) => ToolChoice::Auto,
            Some(FunctionChoice::Mode(ToolMode::None)) => ToolChoice::None,
            Some(FunctionChoice::Mode(ToolMode::Required)) => ToolChoice::Required,
            Some(FunctionChoice::Named { name, .. }) => ToolChoice::Named(name),
        },
        one_call: body.parallel_tool_calls == Some(false),
        structure: match body.text.and_then(|text| text.format) {
            None | Some(TextFormat::Text) => None,
            Some(TextFormat::JsonObject) => Some(("text.format", Structure::JsonObject)),
            Some(TextFormat::JsonSchema { schema, .. }) => {
                Some(("text.format", Structure::JsonSchema(schema)))
            }
        },
    })
}

/// Adds an item to the messages. Thinking, text and calls of the assistant in a row are one
/// message.
fn add(item: Item, messages: &mut Vec<Value>) {
    let (field, new) = match item {
        Item::Message { role, text } if role != "assistant" => {
            let role = if role == "developer" { "system" } else { &*role };
            messages.push(value!({"role": role, "content": text}));
            return;
        }
        Item::Output { id, text } => {
            messages.push(value!({"role": "tool", "content": text, "tool_call_id": id}));
            return;
        }
        Item::Message { text, .. } => ("content", Value::from(text)),
        Item::Reasoning(text) => ("reasoning_content", text.into()),
        Item::Call { id, name, arguments } => {
            ("tool_calls", value!([call_json(Some(&id), &name, &arguments)]))
        }
    };
    let continues = messages.last().is_some_and(|last| last["role"] == "assistant");
    if !continues {
        messages.push(value!({"role": "assistant", "content": ""}));
    }
    let Some(Value::Object(message)) = messages.last_mut() else { return };
    match (message.get_mut(field), new) {
        (Some(Value::Array(calls)), Value::Array(new)) => calls.extend(new),
        (Some(Value::String(text)), Value::String(new)) => {
            if !text.is_empty() && !new.is_empty() {
                text.push('\n');
            }
            text.push_str(&new);
        }
        (_, new) => {
            message.insert(field.to_owned(), new);
        }
    }
}

/// The response after its last token.
fn finished(mut object: ResponseObject, answer: &Answer, whole: Whole) -> ResponseObject {
    let incomplete = whole.end().reason == Reason::Length;
    object.status = if incomplete { "incomplete" } else { "completed" };
    object.incomplete_details =
        incomplete.then_some(IncompleteDetails { reason: "max_output_tokens" });
    let id = object.id.clone();
    let last = whole.parts.len().saturating_sub(1);
    let items = whole.parts.into_iter().enumerate().map(|(at, part)| {
        item(&id, at, part, if incomplete && at == last { "incomplete" } else { "completed" })
    });
    object.output = items.collect();
    object.usage = Some(usage(answer));
    object
}

fn usage(answer: &Answer) -> ResponseUsage {
    let usage = answer.usage();
    ResponseUsage {
        input_tokens: usage.prompt_tokens,
        input_tokens_details: InputDetails {
            cached_tokens: usage.prompt_tokens_details.cached_tokens,
        },
        output_tokens: usage.completion_tokens,
        output_tokens_details: OutputDetails {
            reasoning_tokens: usage.completion_tokens_details.reasoning_tokens,
        },
        total_tokens: usage.total_tokens,
    }
}

/// An item whose name follows from its place in the response.
fn item(response: &str, at: usize, part: Part, status: &'static str) -> OutputItem {
    let random = response.trim_start_matches("resp_");
    match part {
        Part::Thinking(text) => OutputItem::Reasoning {
            id: format!("rs_{random}{at:02}"),
            summary: Vec::new(),
            content: vec![OutputPart::ReasoningText { text }],
            status,
        },
        Part::Text(text) => OutputItem::Message {
            id: format!("msg_{random}{at:02}"),
            role: "assistant",
            content: vec![text_part(text)],
            status,
        },
        Part::Call { name, arguments } => OutputItem::FunctionCall {
            id: format!("fc_{random}{at:02}"),
            call_id: call_id(&format!("-{random}"), 0, at),
            name,
            arguments,
            status,
        },
    }
}

fn text_part(text: String) -> OutputPart {
    OutputPart::OutputText { text, annotations: Vec::new(), logprobs: Vec::new() }
}

fn stream(service: &Arc<Service>, object: ResponseObject, mut answer: Answer) -> Response<Body> {
    sse::stream(&service.limits, Dialect::OpenAi, |events| async move {
        let mut items = Items {
            events: &events,
            response: object.id.clone(),
            number: 0,
            whole: Whole::default(),
        };
        items.send("response.created", value!({"response": object})).await?;
        items.send("response.in_progress", value!({"response": object})).await?;
        loop {
            let piece = match answer.next().await {
                Ok(Some(piece)) => piece,
                Ok(None) => break,
                Err(error) => {
                    let mut failed = object.clone();
                    failed.status = "failed";
                    failed.error = Some(value!({"code": "server_error", "message": error.message}));
                    items.send("response.failed", value!({"response": failed})).await?;
                    return Err(StreamError::Gone);
                }
            };
            for delta in piece.deltas.clone() {
                items.add(delta).await?;
            }
            items.whole.ids.extend(piece.ids);
            if let Some(end) = piece.end {
                let cut = end.reason == Reason::Length;
                items.close(if cut { "incomplete" } else { "completed" }).await?;
                items.whole.end = Some(end);
            }
        }
        let whole = std::mem::take(&mut items.whole);
        let object = finished(object, &answer, whole);
        let kind = format!("response.{}", object.status);
        Ok::<_, StreamError>(items.send(&kind, value!({"response": object})).await?)
    })
}

/// The items of a streamed response; the last one is open until another begins.
struct Items<'a> {
    events: &'a Events,
    response: String,
    number: usize,
    whole: Whole,
}

impl Items<'_> {
    /// Sends an event whose data begins with its type and number.
    async fn send(&mut self, kind: &str, mut data: Value) -> Result<(), sse::Gone> {
        let mut event = Map::new();
        event.insert("type".to_owned(), kind.into());
        event.insert("sequence_number".to_owned(), self.number.into());
        if let Value::Object(fields) = &mut data {
            event.append(fields);
        }
        self.number += 1;
        self.events.send_named(kind, &event).await
    }

    async fn add(&mut self, delta: Delta) -> Result<(), sse::Gone> {
        let same = matches!(
            (&delta, self.whole.parts.last()),
            (Delta::Thinking(_), Some(Part::Thinking(_)))
                | (Delta::Text(_), Some(Part::Text(_)))
                | (Delta::CallArguments { .. }, Some(Part::Call { .. }))
        );
        if !same {
            self.close("completed").await?;
            let empty = match &delta {
                Delta::Thinking(_) => Part::Thinking(String::new()),
                Delta::Text(_) => Part::Text(String::new()),
                Delta::CallStart { name, .. } => {
                    Part::Call { name: name.clone(), arguments: String::new() }
                }
                // Arguments follow the start of their call.
                Delta::CallArguments { .. } => return Ok(()),
            };
            self.open(empty).await?;
        }
        let (id, at) = self.place();
        let (kind, text) = match delta {
            Delta::Thinking(text) => ("response.reasoning_text.delta", text),
            Delta::Text(text) => ("response.output_text.delta", text),
            Delta::CallArguments { text, .. } => ("response.function_call_arguments.delta", text),
            Delta::CallStart { .. } => return Ok(()),
        };
        let mut data = value!({"item_id": id, "output_index": at, "delta": text});
        match self.whole.parts.last_mut() {
            Some(Part::Thinking(last)) => {
                data["content_index"] = 0.into();
                last.push_str(&text);
            }
            Some(Part::Text(last)) => {
                data["content_index"] = 0.into();
                data["logprobs"] = value!([]);
                last.push_str(&text);
            }
            Some(Part::Call { arguments, .. }) => arguments.push_str(&text),
            None => {}
        }
        self.send(kind, data).await
    }

    /// The name and place of the open item.
    fn place(&self) -> (String, usize) {
        let at = self.whole.parts.len().saturating_sub(1);
        let part = self.whole.parts.last().cloned().unwrap_or(Part::Text(String::new()));
        let id = match item(&self.response, at, part, "in_progress") {
            OutputItem::Reasoning { id, .. }
            | OutputItem::Message { id, .. }
            | OutputItem::FunctionCall { id, .. } => id,
        };
        (id, at)
    }

    async fn open(&mut self, part: Part) -> Result<(), sse::Gone> {
        self.whole.parts.push(part.clone());
        let (id, at) = self.place();
        let mut opened = item(&self.response, at, part, "in_progress");
        let first = match &mut opened {
            OutputItem::Reasoning { content, .. } | OutputItem::Message { content, .. } => {
                content.pop()
            }
            OutputItem::FunctionCall { .. } => None,
        };
        let data = value!({"output_index": at, "item": opened});
        self.send("response.output_item.added", data).await?;
        if let Some(part) = first {
            let data =
                value!({"item_id": id, "output_index": at, "content_index": 0, "part": part});
            self.send("response.content_part.added", data).await?;
        }
        Ok(())
    }

    /// Closes the open item, if there is one.
    async fn close(&mut self, status: &'static str) -> Result<(), sse::Gone> {
        let Some(part) = self.whole.parts.last().cloned() else { return Ok(()) };
        let (id, at) = self.place();
        let place = value!({"item_id": id, "output_index": at});
        let with = |field: &str, content: Value| {
            let mut data = place.clone();
            data[field] = content;
            data
        };
        let mut content = match &part {
            Part::Thinking(text) => {
                let mut data = with("text", text.clone().into());
                data["content_index"] = 0.into();
                self.send("response.reasoning_text.done", data).await?;
                Some(value!(OutputPart::ReasoningText { text: text.clone() }))
            }
            Part::Text(text) => {
                let mut data = with("text", text.clone().into());
                data["content_index"] = 0.into();
                data["logprobs"] = value!([]);
                self.send("response.output_text.done", data).await?;
                Some(value!(text_part(text.clone())))
            }
            Part::Call { name, arguments } => {
                let mut data = with("arguments", arguments.clone().into());
                data["name"] = name.clone().into();
                self.send("response.function_call_arguments.done", data).await?;
                None
            }
        };
        if let Some(part) = content.take() {
            let mut data = with("part", part);
            data["content_index"] = 0.into();
            self.send("response.content_part.done", data).await?;
        }
        let done = item(&self.response, at, part, status);
        self.send("response.output_item.done", value!({"output_index": at, "item": done})).await
    }
}
