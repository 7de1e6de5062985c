//! The description of the API in OpenAPI's form.

use utoipa::OpenApi;

use crate::protocol::chat::ChatChunk;
use crate::routes::{chat, completions, messages, plain, pooling, responses};

/// The description.
#[derive(OpenApi)]
#[openapi(
    components(schemas(ChatChunk)),
    info(title = "qwen3 serve", description = "Qwen3 models on clusters of CPUs"),
    paths(
        chat::create,
        completions::create,
        responses::create,
        messages::create,
        messages::count,
        pooling::embeddings,
        pooling::rerank,
        pooling::score,
        plain::models,
        plain::model,
        plain::tokenize,
        plain::detokenize,
        plain::apply_template,
        plain::drain,
        plain::health,
        plain::version,
        plain::metrics,
        plain::openapi,
    )
)]
struct Description;

/// The description as a value.
pub fn document() -> utoipa::openapi::OpenApi {
    Description::openapi()
}
