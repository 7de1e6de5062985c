//! Errors that a client receives, in the forms of OpenAI and Anthropic.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use engine::{RequestError, SubmitError};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

/// A failed request: the status, and what the body says.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// What failed, what was found and what was expected.
    pub message: String,
    /// The request field that caused the error.
    pub param: Option<String>,
    /// A word for programs, for example `context_length_exceeded`.
    pub code: Option<&'static str>,
    /// When the client may try again.
    pub retry_after: Option<Duration>,
}

/// The body of an error, as OpenAI's clients read it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What failed.
    pub error: ErrorDetail,
}

/// What failed, in OpenAI's form.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// A sentence for people.
    pub message: String,
    /// The class of the error.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The request field that caused the error.
    #[schema(required = true)]
    pub param: Option<String>,
    /// A word for programs.
    #[schema(required = true)]
    pub code: Option<&'static str>,
}

/// The body of an error, as Anthropic's clients read it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MessagesErrorBody {
    /// Always `error`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// What failed.
    pub error: MessagesErrorDetail,
}

/// What failed, in Anthropic's form.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MessagesErrorDetail {
    /// The class of the error.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// A sentence for people.
    pub message: String,
}

impl ApiError {
    /// An error without a field.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// A request field with a value that is not accepted.
    pub fn param(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, message);
        error.param = Some(param.into());
        error.code = Some("invalid_value");
        error
    }

    /// A request field that this server does not implement and that changes the answer.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::param(param, message);
        error.code = Some("unsupported_parameter");
        error
    }

    /// A prompt for which the context or the cache has no room. [`Self::about_prompt`] adds the
    /// field.
    pub fn too_long(message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, message);
        error.code = Some("context_length_exceeded");
        error
    }

    /// Names `field` as the one that holds the prompt, if the prompt is too long.
    pub fn about_prompt(mut self, field: &str) -> Self {
        if self.code == Some("context_length_exceeded") && self.param.is_none() {
            self.param = Some(field.to_owned());
        }
        self
    }

    /// The server cannot answer now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, message);
        error.retry_after = Some(Duration::from_secs(5));
        error
    }

    /// The client sent too much.
    pub fn too_many(message: impl Into<String>, retry_after: Duration) -> Self {
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, message);
        error.code = Some("rate_limit_exceeded");
        error.retry_after = Some(retry_after);
        error
    }

    /// The class of the error, in OpenAI's words.
    fn openai_kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// The class of the error, in Anthropic's words.
    fn anthropic_kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "api_error",
        }
    }

    /// The body in the form of `dialect`.
    pub fn body(&self, dialect: Dialect) -> Value {
        match dialect {
            Dialect::OpenAi => json!(ErrorBody {
                error: ErrorDetail {
                    message: self.message.clone(),
                    kind: self.openai_kind(),
                    param: self.param.clone(),
                    code: self.code,
                },
            }),
            Dialect::Anthropic => json!(MessagesErrorBody {
                kind: "error",
                error: MessagesErrorDetail {
                    kind: self.anthropic_kind(),
                    message: match &self.param {
                        Some(param) => format!("{param}: {}", self.message),
                        None => self.message.clone(),
                    },
                },
            }),
        }
    }

    /// The response in the form of `dialect`.
    pub fn response(&self, dialect: Dialect) -> Response<Body> {
        let mut response = (self.status, axum::Json(self.body(dialect))).into_response();
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs().max(1);
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Whose form an error has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error": {"message", "type", "param", "code"}}`.
    OpenAi,
    /// `{"type": "error", "error": {"type", "message"}}`.
    Anthropic,
}

impl Dialect {
    /// The form that clients of `path` expect.
    pub fn of_path(path: &str) -> Self {
        if path == "/v1/messages" || path.starts_with("/v1/messages/") {
            Self::Anthropic
        } else {
            Self::OpenAi
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::ShuttingDown => Self::unavailable(message),
            SubmitError::QueueFull { .. } | SubmitError::QueueTokens { .. } => {
                Self::too_many(message, Duration::from_secs(1))
            }
            SubmitError::PromptTooLong { .. } | SubmitError::NeverFits { .. } => {
                Self::too_long(message)
            }
            SubmitError::NoHead => Self::new(
                StatusCode::BAD_REQUEST,
                "the model generates no text; use /v1/embeddings, /v1/rerank or /v1/score",
            ),
            SubmitError::Sequences { .. } => Self::param("n", message),
            SubmitError::Logprobs { .. } => Self::param("logprobs", message),
            _ => Self::new(StatusCode::BAD_REQUEST, message),
        }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let status = match error {
            RequestError::Engine { .. } => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_the_form_of_the_client_s_api() {
        let error = ApiError::param("temperature", "found -1, expected a number from 0 to 2");
        assert_eq!(
            error.body(Dialect::of_path("/v1/chat/completions")),
            json!({"error": {
                "message": "found -1, expected a number from 0 to 2",
                "type": "invalid_request_error",
                "param": "temperature",
                "code": "invalid_value",
            }})
        );
        assert_eq!(
            error.body(Dialect::of_path("/v1/messages/count_tokens")),
            json!({"type": "error", "error": {
                "type": "invalid_request_error",
                "message": "temperature: found -1, expected a number from 0 to 2",
            }})
        );
    }

    #[test]
    fn a_full_queue_is_429_and_says_when_to_try_again() {
        let error = ApiError::from(SubmitError::QueueFull { waiting: 8, limit: 8 });
        let response = error.response(Dialect::OpenAi);
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
    }

    #[test]
    fn a_prompt_beyond_the_context_is_the_client_s_error() {
        let error = ApiError::from(SubmitError::PromptTooLong { tokens: 9, limit: 8 });
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
        assert_eq!(error.code, Some("context_length_exceeded"));
        let lost = RequestError::Engine { reason: "rank 1 was lost".to_owned() };
        assert_eq!(ApiError::from(lost).status, StatusCode::SERVICE_UNAVAILABLE);
    }
}
