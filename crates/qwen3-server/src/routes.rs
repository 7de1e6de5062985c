//! The routes of the server.

pub mod chat;
pub mod completions;
pub mod messages;
mod page;
pub mod plain;
pub mod pooling;
pub mod responses;

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderValue, Method, Response, StatusCode};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Router, middleware};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::body::{self, Accepted};
use crate::error::{ApiError, Dialect};
use crate::gate::{Caller, gate};
use crate::request_id::REQUEST_ID;
use crate::service::Service;

/// All routes, behind the gate.
pub fn router(service: &Arc<Service>) -> Router {
    let mut router = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/responses", post(responses::create))
        .route("/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count))
        .route("/v1/embeddings", post(pooling::embeddings))
        .route("/v1/rerank", post(pooling::rerank))
        .route("/v1/score", post(pooling::score))
        .route("/v1/models", get(plain::models))
        .route("/v1/models/{id}", get(plain::model))
        .route("/tokenize", post(plain::tokenize))
        .route("/detokenize", post(plain::detokenize))
        .route("/apply-template", post(plain::apply_template))
        .route("/drain", post(plain::drain))
        .route("/health", get(plain::health))
        .route("/version", get(plain::version))
        .route("/metrics", get(plain::metrics))
        .route("/openapi.json", get(plain::openapi));
    if service.page {
        router = router.route("/", get(page::page));
    }
    let origins = service.sites.origins.iter().filter_map(|origin| origin.parse().ok());
    let cors = CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins.collect::<Vec<HeaderValue>>()))
        .allow_methods([Method::GET, Method::POST])
        // Clients of several languages send headers of their own, such as `x-stainless-lang`.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([REQUEST_ID]);
    router
        .fallback(async |request: Request| {
            let path = request.uri().path();
            let dialect = Dialect::of_path(path);
            let message = format!("there is no route {} {path:?}", request.method());
            ApiError::new(StatusCode::NOT_FOUND, message).response(dialect)
        })
        .method_not_allowed_fallback(async |request: Request| {
            let dialect = Dialect::of_path(request.uri().path());
            let message = format!("{} is not allowed here", request.method());
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).response(dialect)
        })
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(Arc::clone(service), gate))
        // A page that may use the server can read the gate's errors, too.
        .layer(cors)
        .with_state(Arc::clone(service))
}

/// A handler's panic is an error of that request alone.
fn panicked(_: Box<dyn std::any::Any + Send>) -> Response<Body> {
    tracing::error!("a request handler panicked");
    let error = ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the request handler failed");
    error.response(Dialect::OpenAi)
}

/// Reads and parses a request's body.
async fn json<T: DeserializeOwned>(
    service: &Service,
    request: Request,
    accepted: &[Accepted],
) -> Result<T, ApiError> {
    // Before the model is there, or after it has gone, no body is worth reading.
    service.model()?;
    let limits = &service.limits.body;
    let bytes = body::read(request, limits).await?;
    body::parse(&bytes, limits, accepted)
}

/// A successful answer.
fn ok(body: &impl Serialize) -> Response<Body> {
    axum::Json(body).into_response()
}

/// The response, or the error in the form of `dialect`.
fn respond(dialect: Dialect, result: Result<Response<Body>, ApiError>) -> Response<Body> {
    result.unwrap_or_else(|error| error.response(dialect))
}

/// The caller that the gate has let in.
type From = axum::Extension<Caller>;
