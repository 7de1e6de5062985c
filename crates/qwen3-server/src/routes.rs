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
    let anthropic = Router::new()
        .route("/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count));
    let mut router = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/responses", post(responses::create))
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
    let router = guarded(router, Dialect::OpenAi).merge(guarded(anthropic, Dialect::Anthropic));
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
        .layer(middleware::from_fn_with_state(Arc::clone(service), gate))
        // A page that may use the server can read the gate's errors, too.
        .layer(cors)
        .with_state(Arc::clone(service))
}

/// The routes, with an error in the form of `dialect` for a request whose handler panics.
fn guarded(router: Router<Arc<Service>>, dialect: Dialect) -> Router<Arc<Service>> {
    router.layer(CatchPanicLayer::custom(move |_: Box<dyn std::any::Any + Send>| {
        tracing::error!("a request handler panicked");
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        ApiError::new(status, "the request handler failed").response(dialect)
    }))
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

/// [`respond`] for a route whose prompt is in the field `prompt`, which the error names if the
/// prompt is too long.
fn respond_to_prompt(
    dialect: Dialect,
    prompt: &str,
    result: Result<Response<Body>, ApiError>,
) -> Response<Body> {
    respond(dialect, result.map_err(|error| error.about_prompt(prompt)))
}

/// The caller that the gate has let in.
type From = axum::Extension<Caller>;

#[cfg(test)]
mod tests {
    use tower::ServiceExt as _;

    use super::*;
    use crate::access::{Keys, Sites};
    use crate::config::Limits;

    #[tokio::test]
    async fn a_panic_is_an_error_in_the_form_of_the_route_s_api() {
        let panics =
            || Router::new().route("/", get(async || -> Response<Body> { panic!("here") }));
        let sites = Sites::default();
        let service =
            Service::new(Keys::default(), sites, Arc::new(Limits::default()), true, false);
        let service = Arc::new(service);
        for (dialect, pointer, kind) in [
            (Dialect::OpenAi, "/error/type", "server_error"),
            (Dialect::Anthropic, "/error/type", "api_error"),
        ] {
            let router = guarded(panics(), dialect).with_state(Arc::clone(&service));
            let response = router.oneshot(Request::new(Body::empty())).await.unwrap();
            assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
            let body = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body.pointer(pointer).and_then(|kind| kind.as_str()), Some(kind));
            assert_eq!(body["type"] == "error", dialect == Dialect::Anthropic);
        }
    }
}
