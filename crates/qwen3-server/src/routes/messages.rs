//! `POST /v1/messages` and `/v1/messages/count_tokens`, Anthropic's API.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Response;
use serde_json::{Map, Value, json as value};

use super::chat::call_id;
use super::{From, json, ok, respond, respond_to_prompt};
use crate::answer::{Answer, Delta, Part, Reason};
use crate::conversation::{Continuation, ToolChoice};
use crate::error::{ApiError, Dialect, MessagesErrorBody};
use crate::prompt::{Chat, call_json};
use crate::protocol::answer::ServerSentEvent;
use crate::protocol::chat::Function;
use crate::protocol::messages::{
    ACCEPTED, AnswerBlock, Block, CountTokensRequest, InputMessage, InputRole, InputTool,
    InputToolChoice, InputToolMode, MessagesRequest, MessagesResponse, MessagesUsage, Thinking,
    ThinkingMode, TokenCount,
};
use crate::protocol::sampling::SamplingFields;
use crate::request_id;
use crate::service::Service;
use crate::sse::{self, Events, StreamError};

type Shared = State<Arc<Service>>;

/// Continues a conversation, in Anthropic's form.
#[utoipa::path(post, path = "/v1/messages", request_body = MessagesRequest,
    responses((status = 200, content(
        (MessagesResponse = "application/json"), (ServerSentEvent = "text/event-stream"))),
        (status = "4XX", body = MessagesErrorBody), (status = "5XX", body = MessagesErrorBody)))]
pub async fn create(State(service): Shared, caller: From, request: Request) -> Response<Body> {
    let answer = async {
        let body: MessagesRequest = json(&service, request, ACCEPTED).await?;
        service.model_named(Some(&body.model))?;
        let id = request_id::new("msg_");
        let stream = body.stream.unwrap_or(false);
        let continuation = continuation(body)?;
        let (mut answer, _) = continuation.submit(&service, &caller).await?;
        if stream {
            return Ok(self::stream(&service, id, answer));
        }
        whole(id, &mut answer).await
    };
    respond_to_prompt(Dialect::Anthropic, "messages", answer.await)
}

/// Counts the tokens of a conversation's prompt.
#[utoipa::path(post, path = "/v1/messages/count_tokens", request_body = CountTokensRequest,
    responses((status = 200, body = TokenCount), (status = "4XX", body = MessagesErrorBody),
        (status = 503, body = MessagesErrorBody)))]
pub async fn count(State(service): Shared, request: Request) -> Response<Body> {
    let answer = async {
        let body: CountTokensRequest = json(&service, request, ACCEPTED).await?;
        service.model_named(Some(&body.model))?;
        let mut chat = chat(body.messages, body.system, body.tools)?;
        if body.tool_choice.is_some_and(|choice| choice.kind == InputToolMode::None) {
            chat.tools.clear();
        }
        let thinking = thinks(body.thinking.as_ref());
        chat.variables.insert("enable_thinking".into(), thinking.into());
        let prompt = service.encode(move |model| chat.prompt(model)).await?;
        Ok(ok(&TokenCount { input_tokens: prompt.tokens.len() }))
    };
    respond(Dialect::Anthropic, answer.await)
}

/// Anthropic's models think only if the request says so.
fn thinks(thinking: Option<&Thinking>) -> bool {
    thinking.is_some_and(|thinking| thinking.kind != ThinkingMode::Disabled)
}

fn continuation(body: MessagesRequest) -> Result<Continuation, ApiError> {
    let (tool_choice, one_call) = tool_choice(body.tool_choice)?;
    if let Some(temperature) = body.temperature.filter(|t| !(0.0..=1.0).contains(t)) {
        let message = format!("temperature is {temperature}, expected a number from 0 to 1");
        return Err(ApiError::param("temperature", message));
    }
    Ok(Continuation {
        chat: chat(body.messages, body.system, body.tools)?,
        sampling: SamplingFields {
            max_tokens: Some(body.max_tokens),
            temperature: body.temperature,
            top_p: body.top_p,
            top_k: body.top_k,
            stop: body.stop_sequences.unwrap_or_default(),
            ..SamplingFields::default()
        },
        thinking: Some(thinks(body.thinking.as_ref())),
        thinking_budget: body.thinking.and_then(|thinking| thinking.budget_tokens),
        tool_choice,
        one_call,
        structure: None,
    })
}

fn tool_choice(choice: Option<InputToolChoice>) -> Result<(ToolChoice, bool), ApiError> {
    let Some(choice) = choice else {
        return Ok((ToolChoice::Auto, false));
    };
    let one_call = choice.disable_parallel_tool_use.unwrap_or(false);
    let choice = match (choice.kind, choice.name) {
        (InputToolMode::Auto, _) => ToolChoice::Auto,
        (InputToolMode::None, _) => ToolChoice::None,
        (InputToolMode::Any, _) => ToolChoice::Required,
        (InputToolMode::Tool, Some(name)) => ToolChoice::Named(name),
        (InputToolMode::Tool, None) => {
            return Err(ApiError::param("tool_choice.name", "tool_choice names no tool"));
        }
    };
    Ok((choice, one_call))
}

/// The conversation as chat templates read it.
fn chat(
    messages: Vec<InputMessage>,
    system: Option<crate::protocol::content::Text>,
    tools: Option<Vec<InputTool>>,
) -> Result<Chat, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::param("messages", "messages is empty, expected at least one"));
    }
    let mut rendered = Vec::new();
    if let Some(system) = system {
        rendered.push(value!({"role": "system", "content": system.0}));
    }
    // A message of the assistant at the end is the beginning of the answer.
    let continues = messages.last().is_some_and(|message| message.role == InputRole::Assistant);
    for message in messages {
        match message.role {
            InputRole::User => user(message.content.0, &mut rendered)?,
            InputRole::Assistant => rendered.push(assistant(message.content.0)?),
        }
    }
    let tools = tools.unwrap_or_default().into_iter().map(|tool| Function {
        name: tool.name,
        description: tool.description,
        parameters: Some(tool.input_schema),
        strict: None,
    });
    let mut chat = Chat::new(rendered, tools.collect());
    chat.continue_final_message = continues;
    chat.add_generation_prompt = !continues;
    Ok(chat)
}

/// Results of calls are messages of their own, before the user's text.
fn user(blocks: Vec<Block>, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut texts = Vec::new();
    for block in blocks {
        match block {
            Block::Text(text) => texts.push(text),
            Block::ToolResult { id, text } => {
                messages.push(value!({"role": "tool", "content": text, "tool_call_id": id}));
            }
            Block::Thinking(_) | Block::ToolUse { .. } => {
                let message = "thinking and tool_use belong to messages of the assistant";
                return Err(ApiError::param("messages", message));
            }
        }
    }
    if !texts.is_empty() {
        messages.push(value!({"role": "user", "content": texts.join("\n")}));
    }
    Ok(())
}

fn assistant(blocks: Vec<Block>) -> Result<Value, ApiError> {
    let (mut texts, mut thinking, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for block in blocks {
        match block {
            Block::Text(text) => texts.push(text),
            Block::Thinking(text) => thinking.push(text),
            Block::ToolUse { id, name, input } => {
                calls.push(call_json(Some(&id), &name, &input.to_string()));
            }
            Block::ToolResult { .. } => {
                let message = "tool_result belongs to messages of the user";
                return Err(ApiError::param("messages", message));
            }
        }
    }
    let mut message = Map::new();
    message.insert("role".into(), "assistant".into());
    message.insert("content".into(), texts.join("\n").into());
    if !thinking.is_empty() {
        message.insert("reasoning_content".into(), thinking.join("\n").into());
    }
    if !calls.is_empty() {
        message.insert("tool_calls".into(), calls.into());
    }
    Ok(Value::Object(message))
}

fn stop_reason(reason: &Reason) -> (&'static str, Option<String>) {
    match reason {
        Reason::End | Reason::StopToken(_) => ("end_turn", None),
        Reason::StopText(text) => ("stop_sequence", Some(text.clone())),
        Reason::Length => ("max_tokens", None),
        Reason::ToolCalls => ("tool_use", None),
    }
}

fn usage(answer: &Answer) -> MessagesUsage {
    let usage = answer.usage();
    let cached = usage.prompt_tokens_details.cached_tokens;
    MessagesUsage {
        input_tokens: usage.prompt_tokens - cached,
        cache_creation_input_tokens: 0,
        cache_read_input_tokens: cached,
        output_tokens: usage.completion_tokens,
    }
}

/// A call's arguments; text that is no JSON object (an answer that was cut) becomes an empty one.
fn arguments(text: &str) -> Value {
    serde_json::from_str::<Map<String, Value>>(text).unwrap_or_default().into()
}

async fn whole(id: String, answer: &mut Answer) -> Result<Response<Body>, ApiError> {
    let whole = answer.whole().await?.into_iter().next().unwrap_or_default();
    let (stop_reason, stop_sequence) = stop_reason(&whole.end().reason);
    let mut content = Vec::new();
    let mut calls = 0;
    for part in whole.parts {
        content.push(match part {
            Part::Thinking(thinking) => {
                AnswerBlock::Thinking { thinking, signature: String::new() }
            }
            Part::Text(text) => AnswerBlock::Text { text },
            Part::Call { name, arguments: text } => {
                calls += 1;
                let input = arguments(&text);
                AnswerBlock::ToolUse { id: tool_id(&id, calls - 1), name, input }
            }
        });
    }
    Ok(ok(&MessagesResponse {
        id,
        kind: "message",
        role: "assistant",
        model: answer.model().name.clone(),
        content,
        stop_reason: Some(stop_reason),
        stop_sequence,
        usage: usage(answer),
    }))
}

fn tool_id(answer: &str, call: usize) -> String {
    call_id(&answer.replace('_', "-"), 0, call).replace("call_", "toolu_")
}

fn stream(service: &Arc<Service>, id: String, mut answer: Answer) -> Response<Body> {
    sse::stream(&service.limits, Dialect::Anthropic, |events| async move {
        let start = MessagesResponse {
            id: id.clone(),
            kind: "message",
            role: "assistant",
            model: answer.model().name.clone(),
            content: Vec::new(),
            stop_reason: None,
            stop_sequence: None,
            usage: usage(&answer),
        };
        send(&events, "message_start", value!({"message": start})).await?;
        send(&events, "ping", value!({})).await?;
        let mut blocks = Blocks { events: &events, open: None, next: 0 };
        while let Some(piece) = answer.next().await? {
            for delta in piece.deltas {
                blocks.add(&id, delta).await?;
            }
            if let Some(end) = piece.end {
                blocks.close().await?;
                let (stop_reason, stop_sequence) = stop_reason(&end.reason);
                let delta = value!({"stop_reason": stop_reason, "stop_sequence": stop_sequence});
                let usage = usage(&answer);
                send(&events, "message_delta", value!({"delta": delta, "usage": usage})).await?;
            }
        }
        Ok::<_, StreamError>(send(&events, "message_stop", value!({})).await?)
    })
}

/// Sends an event whose data begins with its type.
async fn send(events: &Events, kind: &str, mut data: Value) -> Result<(), sse::Gone> {
    let mut typed = Map::from_iter([("type".to_owned(), Value::from(kind))]);
    if let Value::Object(fields) = &mut data {
        typed.append(fields);
    }
    events.send_named(kind, &typed).await
}

/// The blocks of a streamed answer; one is open at a time.
struct Blocks<'a> {
    events: &'a Events,
    open: Option<Kind>,
    next: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    Call,
}

impl Blocks<'_> {
    async fn add(&mut self, answer: &str, delta: Delta) -> Result<(), sse::Gone> {
        match delta {
            Delta::Thinking(text) => {
                let block = value!({"type": "thinking", "thinking": "", "signature": ""});
                self.open(Kind::Thinking, block).await?;
                self.delta(value!({"type": "thinking_delta", "thinking": text})).await
            }
            Delta::Text(text) => {
                self.open(Kind::Text, value!({"type": "text", "text": ""})).await?;
                self.delta(value!({"type": "text_delta", "text": text})).await
            }
            Delta::CallStart { call, name } => {
                self.close().await?;
                let id = tool_id(answer, call);
                let block = value!({"type": "tool_use", "id": id, "name": name, "input": {}});
                self.open(Kind::Call, block).await
            }
            Delta::CallArguments { text, .. } => {
                self.delta(value!({"type": "input_json_delta", "partial_json": text})).await
            }
        }
    }

    /// Opens a block, unless one of its kind is open.
    async fn open(&mut self, kind: Kind, block: Value) -> Result<(), sse::Gone> {
        if self.open == Some(kind) {
            return Ok(());
        }
        self.close().await?;
        self.open = Some(kind);
        let data = value!({"index": self.next, "content_block": block});
        send(self.events, "content_block_start", data).await
    }

    async fn delta(&mut self, delta: Value) -> Result<(), sse::Gone> {
        send(self.events, "content_block_delta", value!({"index": self.next, "delta": delta})).await
    }

    async fn close(&mut self) -> Result<(), sse::Gone> {
        if self.open.take().is_none() {
            return Ok(());
        }
        self.next += 1;
        send(self.events, "content_block_stop", value!({"index": self.next - 1})).await
    }
}
