//! What one request was and took, for its line in the log.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Facts about a request, filled in while it is answered.
#[derive(Debug)]
pub struct Record {
    id: String,
    method: String,
    path: String,
    key: Mutex<Option<String>>,
    start: Instant,
    status: AtomicUsize,
    prompt_tokens: AtomicUsize,
    generated_tokens: AtomicUsize,
    reason: Mutex<Option<&'static str>>,
}

impl Record {
    /// A request that begins now.
    pub fn new(id: String, method: String, path: String) -> Self {
        Self {
            id,
            method,
            path,
            key: Mutex::new(None),
            start: Instant::now(),
            status: AtomicUsize::new(0),
            prompt_tokens: AtomicUsize::new(0),
            generated_tokens: AtomicUsize::new(0),
            reason: Mutex::new(None),
        }
    }

    /// The request's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The name of the key that the request showed.
    pub fn set_key(&self, name: &str) {
        *self.key.lock().unwrap_or_else(PoisonError::into_inner) = Some(name.to_owned());
    }

    /// The response's status.
    pub fn set_status(&self, status: u16) {
        self.status.store(status.into(), Ordering::Relaxed);
    }

    /// Counts prompt tokens.
    pub fn prompt(&self, tokens: usize) {
        self.prompt_tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    /// Counts a generated token.
    pub fn token(&self) {
        self.generated_tokens.fetch_add(1, Ordering::Relaxed);
    }

    /// Why the answer ended. An abort or error is not overwritten.
    pub fn finish(&self, reason: &'static str) {
        let mut known = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(*known, Some("abort" | "error")) {
            *known = Some(reason);
        }
    }
}

impl Drop for Record {
    /// Writes the line, when the answer is sent or the client has gone.
    fn drop(&mut self) {
        let key = self.key.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let reason = *self.reason.get_mut().unwrap_or_else(PoisonError::into_inner);
        tracing::info!(
            request_id = self.id,
            method = self.method,
            path = self.path,
            key = key.as_deref(),
            status = *self.status.get_mut(),
            prompt_tokens = *self.prompt_tokens.get_mut(),
            generated_tokens = *self.generated_tokens.get_mut(),
            finish = reason,
            seconds = self.start.elapsed().as_secs_f64(),
            "request"
        );
    }
}
