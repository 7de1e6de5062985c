//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Response;

use super::{From, json, ok, respond_to_prompt};
use crate::answer::{Answer, Delta, Piece, Whole};
use crate::conversation::{self, Continuation};
use crate::error::{ApiError, Dialect, ErrorBody};
use crate::prompt::{self, Chat};
use crate::protocol::answer::{ServerSentEvent, Timings};
use crate::protocol::chat::{
    ACCEPTED, AnswerMessage, CalledFunction, ChatChoice, ChatChunk, ChatCompletion, ChatLogprobs,
    ChatRequest, ChunkChoice, Delta as ChunkDelta, FunctionDelta, ResponseFormat, TokenLogprob,
    ToolCall, ToolCallDelta, ToolChoice, ToolMode, TopLogprob,
};
use crate::request_id;
use crate::service::{FINGERPRINT, ServedModel, Service, now};
use crate::sse::{self, StreamError};
use crate::structure::Structure;

/// Continues a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", request_body = ChatRequest,
    responses((status = 200, content(
        (ChatCompletion = "application/json"), (ServerSentEvent = "text/event-stream"))),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
pub async fn create(
    State(service): State<Arc<Service>>,
    caller: From,
    request: Request,
) -> Response<Body> {
    let answer = async {
        let body: ChatRequest = json(&service, request, ACCEPTED).await?;
        service.model_named(body.model.as_deref())?;
        let format = Format::of(&body)?;
        let stream = body.stream.unwrap_or(false);
        let continuation = continuation(body)?;
        let (mut answer, prompt) = continuation.submit(&service, &caller).await?;
        if stream {
            return Ok(self::stream(&service, format, answer, prompt));
        }
        let all = answer.whole().await?;
        Ok(ok(&format.whole(&answer, all, prompt)))
    };
    respond_to_prompt(Dialect::OpenAi, "messages", answer.await)
}

/// What the request asks for.
fn continuation(body: ChatRequest) -> Result<Continuation, ApiError> {
    let mut sampling = body.sampling();
    sampling.max_tokens = body.max_completion_tokens.or(body.max_tokens);
    sampling.logprobs = match (body.logprobs, body.top_logprobs) {
        (Some(true), top) => Some(top.unwrap_or(0)),
        (_, Some(top)) if top > 0 => {
            return Err(ApiError::param("top_logprobs", "top_logprobs needs logprobs: true"));
        }
        _ => None,
    };
    let tools = body.tools.unwrap_or_default().into_iter().map(|tool| tool.function).collect();
    let mut chat = Chat::new(prompt::messages(&body.messages)?, tools);
    chat.set_variables(body.chat_template_kwargs.unwrap_or_default())?;
    chat.continue_final_message = body.continue_final_message.unwrap_or(false);
    chat.add_generation_prompt = body.add_generation_prompt.unwrap_or(!chat.continue_final_message);
    if chat.add_generation_prompt && chat.continue_final_message {
        let message = "continue_final_message and add_generation_prompt exclude each other";
        return Err(ApiError::param("continue_final_message", message));
    }
    let effort = body.reasoning_effort;
    let structured = body.structured_outputs.map(Structure::of).transpose()?;
    let structure = match body.response_format {
        None | Some(ResponseFormat::Text) => structured.map(|found| ("structured_outputs", found)),
        Some(_) if structured.is_some() => {
            let message = "response_format and structured_outputs exclude each other";
            return Err(ApiError::param("response_format", message));
        }
        Some(ResponseFormat::JsonObject) => Some(("response_format", Structure::JsonObject)),
        Some(ResponseFormat::JsonSchema { json_schema }) => match json_schema.schema {
            Some(schema) => Some(("response_format", Structure::JsonSchema(schema))),
            None => {
                let message = "response_format.json_schema has no schema";
                return Err(ApiError::param("response_format.json_schema.schema", message));
            }
        },
    };
    Ok(Continuation {
        chat,
        sampling,
        thinking: effort.map(|effort| effort.budget() != Some(0)),
        thinking_budget: body.thinking_token_budget.or(effort.and_then(|effort| effort.budget())),
        tool_choice: match body.tool_choice {
            None | Some(ToolChoice::Mode(ToolMode::Auto)) => conversation::ToolChoice::Auto,
            Some(ToolChoice::Mode(ToolMode::None)) => conversation::ToolChoice::None,
            Some(ToolChoice::Mode(ToolMode::Required)) => conversation::ToolChoice::Required,
            Some(ToolChoice::Named { function, .. }) => {
                conversation::ToolChoice::Named(function.name)
            }
        },
        one_call: body.parallel_tool_calls == Some(false),
        structure,
    })
}

/// How the answer is written.
struct Format {
    id: String,
    created: u64,
    logprobs: bool,
    token_ids: bool,
    include_usage: bool,
    continuous_usage: bool,
}

impl Format {
    fn of(body: &ChatRequest) -> Result<Self, ApiError> {
        let options = body.stream_options.unwrap_or_default();
        if body.stream_options.is_some() && body.stream != Some(true) {
            return Err(ApiError::param("stream_options", "stream_options needs stream: true"));
        }
        Ok(Self {
            id: request_id::new("chatcmpl-"),
            created: now(),
            logprobs: body.logprobs.unwrap_or(false),
            token_ids: body.return_token_ids.unwrap_or(false),
            include_usage: options.include_usage.unwrap_or(false),
            continuous_usage: options.continuous_usage_stats.unwrap_or(false),
        })
    }

    fn whole(&self, answer: &Answer, all: Vec<Whole>, prompt: Vec<u32>) -> ChatCompletion {
        let model = answer.model();
        let timings = all.first().map(|whole| Timings::of(&whole.end().usage));
        let choices = all.into_iter().enumerate().map(|(index, whole)| {
            let end = whole.end();
            ChatChoice {
                index,
                message: message(&self.id, index, &whole),
                logprobs: self.logprobs.then(|| logprobs(model, &whole.logprobs)),
                finish_reason: end.reason.openai(),
                stop_reason: end.reason.stop(),
                token_ids: self.token_ids.then_some(whole.ids),
            }
        });
        ChatCompletion {
            id: self.id.clone(),
            object: "chat.completion",
            created: self.created,
            model: model.name.clone(),
            system_fingerprint: FINGERPRINT,
            choices: choices.collect(),
            usage: answer.usage(),
            timings: timings.unwrap_or_default(),
            prompt_token_ids: self.token_ids.then_some(prompt),
        }
    }

    fn chunk(&self, model: &ServedModel, choices: Vec<ChunkChoice>) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: model.name.clone(),
            system_fingerprint: FINGERPRINT,
            choices,
            usage: None,
            timings: None,
            prompt_token_ids: None,
        }
    }

    /// The chunks of a piece: one per delta, and one for the end.
    fn chunks(&self, model: &ServedModel, piece: Piece) -> Vec<ChatChunk> {
        let mut deltas: Vec<ChunkDelta> = Vec::new();
        for delta in piece.deltas {
            let call = |call, id, name, arguments| ToolCallDelta {
                index: call,
                kind: Option::is_some(&id).then_some("function"),
                id,
                function: FunctionDelta { name, arguments },
            };
            deltas.push(match delta {
                Delta::Thinking(text) => {
                    ChunkDelta { reasoning_content: Some(text), ..ChunkDelta::default() }
                }
                Delta::Text(text) => ChunkDelta { content: Some(text), ..ChunkDelta::default() },
                Delta::CallStart { call: index, name } => {
                    let id = call_id(&self.id, piece.index, index);
                    let calls = vec![call(index, Some(id), Some(name), String::new())];
                    ChunkDelta { tool_calls: Some(calls), ..ChunkDelta::default() }
                }
                Delta::CallArguments { call: index, text } => {
                    let calls = vec![call(index, None, None, text)];
                    ChunkDelta { tool_calls: Some(calls), ..ChunkDelta::default() }
                }
            });
        }
        if deltas.is_empty() || piece.end.is_some() {
            deltas.push(ChunkDelta::default());
        }
        let mut chunks: Vec<ChatChunk> = deltas
            .into_iter()
            .map(|delta| {
                let choice = ChunkChoice { index: piece.index, delta, ..ChunkChoice::default() };
                self.chunk(model, vec![choice])
            })
            .collect();
        if let Some(choice) = chunks.first_mut().and_then(|chunk| chunk.choices.first_mut()) {
            choice.logprobs = (self.logprobs && !piece.logprobs.is_empty())
                .then(|| logprobs(model, &piece.logprobs));
            choice.token_ids = self.token_ids.then_some(piece.ids);
        }
        if let (Some(chunk), Some(end)) = (chunks.last_mut(), piece.end) {
            chunk.timings = Some(Timings::of(&end.usage));
            if let Some(choice) = chunk.choices.first_mut() {
                choice.finish_reason = Some(end.reason.openai());
                choice.stop_reason = end.reason.stop();
            }
        }
        chunks
    }
}

fn stream(
    service: &Arc<Service>,
    format: Format,
    mut answer: Answer,
    prompt: Vec<u32>,
) -> Response<Body> {
    sse::stream(&service.limits, Dialect::OpenAi, |events| async move {
        let model = &Arc::clone(answer.model());
        // The roles come at once, before the prompt is computed.
        for index in 0..answer.sequences() {
            let delta = ChunkDelta {
                role: Some("assistant"),
                content: Some(String::new()),
                ..ChunkDelta::default()
            };
            let choice = ChunkChoice { index, delta, ..ChunkChoice::default() };
            let mut chunk = format.chunk(model, vec![choice]);
            chunk.prompt_token_ids = (format.token_ids && index == 0).then(|| prompt.clone());
            events.send(&chunk).await?;
        }
        while let Some(piece) = answer.next().await? {
            for mut chunk in format.chunks(model, piece) {
                chunk.usage = format.continuous_usage.then(|| answer.usage());
                events.send(&chunk).await?;
            }
        }
        if format.include_usage {
            let mut last = format.chunk(model, Vec::new());
            last.usage = Some(answer.usage());
            events.send(&last).await?;
        }
        Ok::<_, StreamError>(events.done().await?)
    })
}

/// The message of a whole answer.
fn message(answer: &str, index: usize, whole: &Whole) -> AnswerMessage {
    let calls = whole.calls().enumerate().map(|(call, (name, arguments))| ToolCall {
        id: call_id(answer, index, call),
        kind: "function",
        function: CalledFunction { name: name.to_owned(), arguments: arguments.to_owned() },
    });
    let calls: Vec<ToolCall> = calls.collect();
    let (text, thinking) = (whole.text(), whole.thinking());
    AnswerMessage {
        content: (calls.is_empty() || !text.is_empty()).then_some(text),
        reasoning_content: (!thinking.is_empty()).then_some(thinking),
        tool_calls: calls,
        ..AnswerMessage::default()
    }
}

/// The name of a call, which follows from the answer's.
pub fn call_id(answer: &str, sequence: usize, call: usize) -> String {
    let random = answer.rsplit('-').next().unwrap_or_default();
    format!("call_{}{sequence:02}{call:02}", &random[..random.len().min(20)])
}

fn logprobs(model: &ServedModel, tokens: &[engine::TokenLogprobs]) -> ChatLogprobs {
    let content = tokens.iter().map(|token| {
        let top = token.top.iter().map(|(id, logprob)| TopLogprob {
            token: model.token_text(*id),
            logprob: finite(*logprob),
            bytes: model.tokenizer.token_bytes(*id).to_vec(),
        });
        TokenLogprob {
            token: model.token_text(token.id),
            logprob: finite(token.logprob),
            bytes: model.tokenizer.token_bytes(token.id).to_vec(),
            top_logprobs: top.collect(),
        }
    });
    ChatLogprobs { content: content.collect(), refusal: None }
}

/// JSON has no infinities; −9999 stands for the logarithm of zero, as in OpenAI's API.
pub fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}
