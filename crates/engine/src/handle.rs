//! The client's side of the engine: submitting requests and reading their events.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use qwen3_model::ModelError;

use crate::pages::pages_for;
use crate::request::{Event, Pooling, Request, SubmitError};
use crate::stats::Stats;

/// Largest number of log-probabilities per token.
const MAX_LOGPROBS: usize = 100;

/// Sizes that bound requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Whether the model generates tokens. Without a head it only takes pooling requests.
    pub has_head: bool,
    /// Tokens that a prompt and its answer may have together.
    pub context_length: usize,
    /// Pages that one sequence may take, on all ranks that split positions.
    pub pages: usize,
    /// Positions of a page.
    pub page_positions: usize,
    /// Bytes of a page on rank 0.
    pub page_bytes: usize,
    /// Sequences that run together.
    pub sequences: usize,
    /// Requests that may wait.
    pub queue: usize,
    /// Prompt tokens of all requests that may wait.
    pub queued_tokens: usize,
}

/// State that handles and the engine's thread share.
pub(crate) struct Shared {
    pub limits: Limits,
    /// Requests that were submitted and have not started.
    pub waiting: AtomicUsize,
    /// Prompt tokens of these.
    pub waiting_tokens: AtomicUsize,
    /// No further requests are accepted.
    pub closed: AtomicBool,
    /// Open requests fail.
    pub aborted: AtomicBool,
    pub stats: Mutex<Stats>,
}

impl Shared {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: AtomicUsize::new(0),
            waiting_tokens: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            aborted: AtomicBool::new(false),
            stats: Mutex::default(),
        }
    }

    /// Takes a request with a prompt of `tokens` tokens out of the queue's counts.
    pub fn dequeue(&self, tokens: usize) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.waiting_tokens.fetch_sub(tokens, Ordering::Relaxed);
    }
}

/// A request on its way to the engine's thread.
pub(crate) struct Submission {
    pub request: Request,
    pub events: async_channel::Sender<Event>,
    pub time: Instant,
}

/// Submits requests to an engine. Handles are cheap to clone and can be used from any thread.
///
/// When the last handle is dropped, the engine finishes its requests and ends.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    submissions: mpsc::Sender<Submission>,
}

impl EngineHandle {
    pub(crate) fn new(shared: Arc<Shared>, submissions: mpsc::Sender<Submission>) -> Self {
        Self { shared, submissions }
    }

    /// Submits a request.
    ///
    /// # Errors
    ///
    /// When the request is invalid, can never fit, or the engine takes no further requests. A
    /// request that was accepted reports everything else as events.
    pub fn submit(&self, request: Request) -> Result<Stream, SubmitError> {
        self.check(&request)?;
        let limits = &self.shared.limits;
        let tokens = request.prompt.len();
        if self.shared.closed.load(Ordering::Relaxed) {
            return Err(SubmitError::ShuttingDown);
        }
        let waiting = self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        let waiting_tokens = self.shared.waiting_tokens.fetch_add(tokens, Ordering::Relaxed);
        if waiting >= limits.queue {
            self.shared.dequeue(tokens);
            return Err(SubmitError::QueueFull { waiting, limit: limits.queue });
        }
        // A single prompt may exceed the limit.
        if waiting > 0 && waiting_tokens + tokens > limits.queued_tokens {
            self.shared.dequeue(tokens);
            let limit = limits.queued_tokens;
            return Err(SubmitError::QueueTokens { waiting_tokens, tokens, limit });
        }
        let (sender, events) = async_channel::unbounded();
        let submission = Submission { request, events: sender, time: Instant::now() };
        if self.submissions.send(submission).is_err() {
            self.shared.dequeue(tokens);
            return Err(SubmitError::ShuttingDown);
        }
        Ok(Stream { events })
    }

    /// Sizes that bound requests.
    pub fn limits(&self) -> Limits {
        self.shared.limits
    }

    /// The counters after the latest step.
    pub fn stats(&self) -> Stats {
        self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Accepts no further requests. The engine ends when all requests are finished.
    pub fn drain(&self) {
        self.shared.closed.store(true, Ordering::Relaxed);
    }

    /// Accepts no further requests and ends the engine after the current step. Open requests fail.
    pub fn shutdown(&self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        self.shared.aborted.store(true, Ordering::Relaxed);
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        let limits = &self.shared.limits;
        let Request { prompt, sampling, max_tokens, n, constraints, .. } = request;
        let (tokens, max_tokens, n) = (prompt.len(), *max_tokens, *n);
        if prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if let Err(ModelError::TokenOutOfRange { index, id, vocab_size }) =
            ModelError::check_tokens(prompt, limits.vocab_size)
        {
            return Err(SubmitError::TokenOutOfRange { index, id, vocab_size });
        }
        sampling.validate(limits.vocab_size)?;
        if !(1..=limits.sequences).contains(&n) {
            return Err(SubmitError::Sequences { found: n, limit: limits.sequences });
        }
        if !constraints.is_empty() && constraints.len() != n {
            return Err(SubmitError::Constraints { found: constraints.len(), n });
        }
        if request.pooling == Some(Pooling::LastToken) && (max_tokens, n) != (0, 1) {
            return Err(SubmitError::Pooling { max_tokens, n });
        }
        if !limits.has_head && (request.pooling.is_none() || request.prompt_logprobs.is_some()) {
            return Err(SubmitError::NoHead);
        }
        let logprobs = sampling.logprobs.max(request.prompt_logprobs).unwrap_or(0);
        if logprobs > MAX_LOGPROBS {
            return Err(SubmitError::Logprobs { found: logprobs, limit: MAX_LOGPROBS });
        }
        let context = limits.context_length;
        if tokens > context {
            return Err(SubmitError::PromptTooLong { tokens, limit: context });
        }
        // The last token of an answer is not computed.
        let positions = tokens.saturating_add(max_tokens.saturating_sub(1)).min(context);
        let pages = pages_for(positions);
        if pages > limits.pages {
            return Err(SubmitError::NeverFits { pages, available: limits.pages });
        }
        Ok(())
    }
}

/// There was no event in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no event within the time given")]
pub struct TimedOut;

/// Wakes the thread that waits for an event.
struct Unpark(thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The events of one request. Dropping it cancels the request between two steps.
pub struct Stream {
    events: async_channel::Receiver<Event>,
}

impl Stream {
    /// The next event; `None` after the last one. Blocks the thread until there is one.
    pub fn recv_blocking(&self) -> Option<Event> {
        self.events.recv_blocking().ok()
    }

    /// The next event; `None` after the last one. Works with any executor.
    pub async fn recv(&self) -> Option<Event> {
        self.events.recv().await.ok()
    }

    /// The next event, as [`recv_blocking`](Self::recv_blocking), or an error if there is none
    /// within `timeout`.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Option<Event>, TimedOut> {
        let end = Instant::now() + timeout;
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut event = pin!(self.recv());
        loop {
            if let Poll::Ready(event) = event.as_mut().poll(&mut Context::from_waker(&waker)) {
                return Ok(event);
            }
            let rest = end.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(TimedOut);
            }
            thread::park_timeout(rest);
        }
    }
}

/// The time since `start`, zero before it.
pub(crate) fn since(start: Instant, time: Instant) -> Duration {
    time.saturating_duration_since(start)
}
