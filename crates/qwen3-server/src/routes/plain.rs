//! Tokenization, models, health, metrics.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{Response, StatusCode, header};
use axum::response::IntoResponse;

use super::{json, ok, respond};
use crate::error::{ApiError, Dialect, ErrorBody};
use crate::metrics;
use crate::openapi;
use crate::prompt::{self, Chat, encoded};
use crate::protocol::plain::{
    DetokenizeRequest, DetokenizeResponse, Health, ModelEntry, ModelList, TemplateRequest,
    TemplateResponse, TokenizeRequest, TokenizeResponse, Version,
};
use crate::service::{Phase, ServedModel, Service};

type Shared = State<Arc<Service>>;

/// Encodes a text or a conversation.
#[utoipa::path(post, path = "/tokenize", request_body = TokenizeRequest,
    responses((status = 200, body = TokenizeResponse), (status = "4XX", body = ErrorBody),
        (status = 503, body = ErrorBody)))]
pub async fn tokenize(State(service): Shared, request: Request) -> Response<Body> {
    let answer = async {
        let body: TokenizeRequest = json(&service, request, &[]).await?;
        service.model_named(body.model.as_deref())?;
        let answer = service.encode(move |model| tokens(model, body)).await?;
        Ok(ok(&answer))
    };
    respond(Dialect::OpenAi, answer.await)
}

fn tokens(model: &ServedModel, body: TokenizeRequest) -> Result<TokenizeResponse, ApiError> {
    let tokens = match (body.prompt, body.messages) {
        (Some(text), None) => encoded(model.tokenizer.encode(&text))?,
        (None, Some(messages)) => {
            let tools = body.tools.unwrap_or_default();
            let mut chat = Chat::new(
                prompt::messages(&messages)?,
                tools.into_iter().map(|tool| tool.function).collect(),
            );
            chat.set_variables(body.chat_template_kwargs.unwrap_or_default())?;
            chat.add_generation_prompt = body.add_generation_prompt.unwrap_or(true);
            chat.prompt(model)?.tokens
        }
        _ => {
            return Err(ApiError::param("prompt", "expected either prompt or messages"));
        }
    };
    let token_strs = match body.return_token_strs {
        Some(true) => Some(tokens.iter().map(|id| model.token_text(*id)).collect()),
        _ => None,
    };
    Ok(TokenizeResponse {
        count: tokens.len(),
        max_model_len: model.limits().context_length,
        tokens,
        token_strs,
    })
}

/// Decodes token ids.
#[utoipa::path(post, path = "/detokenize", request_body = DetokenizeRequest,
    responses((status = 200, body = DetokenizeResponse), (status = "4XX", body = ErrorBody),
        (status = 503, body = ErrorBody)))]
pub async fn detokenize(State(service): Shared, request: Request) -> Response<Body> {
    let answer = async {
        let body: DetokenizeRequest = json(&service, request, &[]).await?;
        service.model_named(body.model.as_deref())?;
        let text = service.encode(move |model| {
            let size = model.limits().vocab_size;
            if let Some(id) = body.tokens.iter().find(|id| **id as usize >= size) {
                let message = format!("found id {id}, expected an id below {size}");
                return Err(ApiError::param("tokens", message));
            }
            Ok(model.tokenizer.decode(&body.tokens))
        });
        Ok(ok(&DetokenizeResponse { prompt: text.await? }))
    };
    respond(Dialect::OpenAi, answer.await)
}

/// Writes a conversation with the chat template.
#[utoipa::path(post, path = "/apply-template", request_body = TemplateRequest,
    responses((status = 200, body = TemplateResponse), (status = "4XX", body = ErrorBody),
        (status = 503, body = ErrorBody)))]
pub async fn apply_template(State(service): Shared, request: Request) -> Response<Body> {
    let answer = async {
        let body: TemplateRequest = json(&service, request, &[]).await?;
        service.model_named(body.model.as_deref())?;
        let tools = body.tools.unwrap_or_default();
        let mut chat = Chat::new(
            prompt::messages(&body.messages)?,
            tools.into_iter().map(|tool| tool.function).collect(),
        );
        chat.set_variables(body.chat_template_kwargs.unwrap_or_default())?;
        chat.add_generation_prompt = body.add_generation_prompt.unwrap_or(true);
        let prompt = service.encode(move |model| chat.prompt(model)).await?;
        Ok(ok(&TemplateResponse { prompt: prompt.text }))
    };
    respond(Dialect::OpenAi, answer.await)
}

/// Lists the one model.
#[utoipa::path(get, path = "/v1/models",
    responses((status = 200, body = ModelList), (status = "4XX", body = ErrorBody),
        (status = 503, body = ErrorBody)))]
pub async fn models(State(service): Shared) -> Response<Body> {
    let list = |model: &Arc<ServedModel>| {
        ok(&ModelList { object: "list", data: vec![entry(&service, model)] })
    };
    respond(Dialect::OpenAi, service.model().map(list))
}

/// Describes a model.
#[utoipa::path(get, path = "/v1/models/{id}", params(("id" = String, Path, description = "Name")),
    responses((status = 200, body = ModelEntry), (status = "4XX", body = ErrorBody),
        (status = 503, body = ErrorBody)))]
pub async fn model(State(service): Shared, Path(id): Path<String>) -> Response<Body> {
    let found = service.model_named(Some(&id)).map(|model| ok(&entry(&service, model)));
    respond(Dialect::OpenAi, found)
}

fn entry(service: &Service, model: &ServedModel) -> ModelEntry {
    ModelEntry {
        id: model.name.clone(),
        object: "model",
        created: service.started,
        owned_by: "qwen3-mpi",
        max_model_len: model.limits().context_length,
    }
}

/// Ends the server after its open answers.
#[utoipa::path(post, path = "/drain", responses((status = 202, body = Health),
    (status = "4XX", body = ErrorBody)))]
pub async fn drain(State(service): Shared) -> Response<Body> {
    tracing::info!("a client asks the server to drain");
    service.drain();
    (StatusCode::ACCEPTED, ok(&Health { status: "draining" })).into_response()
}

/// Says whether the server answers requests.
#[utoipa::path(get, path = "/health", responses((status = 200, body = Health),
    (status = 503, body = Health)))]
pub async fn health(State(service): Shared) -> Response<Body> {
    let (code, status) = match service.phase() {
        Phase::Ready => (StatusCode::OK, "ok"),
        Phase::Loading => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
        Phase::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        Phase::Failed(_) => (StatusCode::SERVICE_UNAVAILABLE, "failed"),
    };
    (code, ok(&Health { status })).into_response()
}

/// Says the server's version.
#[utoipa::path(get, path = "/version", responses((status = 200, body = Version),
    (status = "4XX", body = ErrorBody)))]
pub async fn version() -> Response<Body> {
    ok(&Version { version: env!("CARGO_PKG_VERSION").to_owned() })
}

/// Metrics in Prometheus' text format.
#[utoipa::path(get, path = "/metrics",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"),
        (status = "4XX", body = ErrorBody)))]
pub async fn metrics(State(service): Shared) -> Response<Body> {
    let text = service.metrics_text();
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object),
    (status = "4XX", body = ErrorBody)))]
pub async fn openapi() -> Response<Body> {
    ok(&openapi::document())
}
