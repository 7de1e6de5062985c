//! Server-sent events: pieces of an answer, comments while nothing happens, an event for errors.

use std::convert::Infallible;
use std::future::Future;

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::config::Limits;
use crate::error::{ApiError, Dialect};

/// Events between the answer and the connection. While the client takes none, the answer waits
/// here, and behind it in the engine's stream, which ends when it is full.
const CAPACITY: usize = 16;

/// The client has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// Sends the events of one answer.
#[derive(Clone, Debug)]
pub struct Events {
    sender: mpsc::Sender<Result<Event, Infallible>>,
}

impl Events {
    /// Sends an event without a name.
    pub async fn send(&self, data: &impl Serialize) -> Result<(), Gone> {
        self.event(Event::default().data(json(data))).await
    }

    /// Sends an event with a name.
    pub async fn send_named(&self, name: &str, data: &impl Serialize) -> Result<(), Gone> {
        self.event(Event::default().event(name).data(json(data))).await
    }

    /// Sends the mark after the last event of OpenAI's streams.
    pub async fn done(&self) -> Result<(), Gone> {
        self.event(Event::default().data("[DONE]")).await
    }

    /// Sends an error; no event follows.
    pub async fn fail(&self, error: &ApiError, dialect: Dialect) -> Result<(), Gone> {
        let body = error.body(dialect);
        match dialect {
            Dialect::OpenAi => self.send(&body).await,
            Dialect::Anthropic => self.send_named("error", &body).await,
        }
    }

    async fn event(&self, event: Event) -> Result<(), Gone> {
        self.sender.send(Ok(event)).await.map_err(|_| Gone)
    }
}

fn json(data: &impl Serialize) -> String {
    // The types of this crate have no maps with keys that are no texts.
    serde_json::to_string(data).unwrap_or_default()
}

/// A response whose events `produce` sends. When the client goes away, `produce` is dropped at
/// once, and with it whatever it holds. An error that it returns becomes the last event.
pub fn stream<F>(
    limits: &Limits,
    dialect: Dialect,
    produce: impl FnOnce(Events) -> F,
) -> Response<Body>
where
    F: Future<Output = Result<(), StreamError>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(CAPACITY);
    let events = Events { sender };
    let work = produce(events.clone());
    tokio::spawn(async move {
        tokio::select! {
            biased;
            () = events.sender.closed() => {}
            result = work => if let Err(StreamError::Failed(error)) = result {
                tracing::warn!(error = error.message, "a streamed answer failed");
                let _ = events.fail(&error, dialect).await;
            },
        }
    });
    let pings = KeepAlive::new().interval(limits.ping).text("ping");
    let mut response = Sse::new(ReceiverStream::new(receiver)).keep_alive(pings).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Reverse proxies collect pieces otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Why a stream ends early.
#[derive(Debug, PartialEq)]
pub enum StreamError {
    /// The client has gone.
    Gone,
    /// The answer failed.
    Failed(ApiError),
}

impl From<Gone> for StreamError {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<ApiError> for StreamError {
    fn from(error: ApiError) -> Self {
        Self::Failed(error)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::BodyExt as _;
    use serde_json::json;

    use super::*;

    async fn text(response: Response<Body>) -> String {
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn events_an_error_and_the_end_have_the_client_s_form() {
        let limits = Limits::default();
        let whole = stream(&limits, Dialect::OpenAi, |events| async move {
            events.send(&json!({"a": 1})).await?;
            events.send_named("n", &json!(2)).await?;
            Ok(events.done().await?)
        });
        assert_eq!(whole.headers()[header::CONTENT_TYPE], "text/event-stream");
        let expected = "data: {\"a\":1}\n\nevent: n\ndata: 2\n\ndata: [DONE]\n\n";
        assert_eq!(text(whole).await, expected);
        for (dialect, start) in
            [(Dialect::OpenAi, "data: {\"error\":"), (Dialect::Anthropic, "event: error\ndata: {")]
        {
            let failing = stream(&limits, dialect, |_| async {
                Err(ApiError::unavailable("rank 1 was lost").into())
            });
            let text = text(failing).await;
            assert!(text.starts_with(start) && text.contains("rank 1 was lost"), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn comments_are_sent_while_nothing_happens() {
        let limits = Limits { ping: Duration::from_secs(5), ..Limits::default() };
        let slow = stream(&limits, Dialect::OpenAi, |events| async move {
            tokio::time::sleep(Duration::from_secs(12)).await;
            Ok(events.done().await?)
        });
        assert_eq!(text(slow).await, ": ping\n\n: ping\n\ndata: [DONE]\n\n");
    }

    #[tokio::test]
    async fn what_an_answer_holds_is_dropped_when_the_client_goes() {
        let (held, mut watch) = tokio::sync::oneshot::channel::<()>();
        let response = stream(&Limits::default(), Dialect::OpenAi, |_| async move {
            let _held = held;
            std::future::pending().await
        });
        tokio::task::yield_now().await;
        assert!(watch.try_recv().is_err_and(|error| error.to_string().contains("empty")));
        drop(response);
        assert!(watch.await.is_err());
    }
}
