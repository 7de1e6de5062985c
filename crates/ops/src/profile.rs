//! Records when each operation and each thread worked, and for how long. It is off by default.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cost::Work;

/// A recorded period of time.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// The operation.
    pub name: &'static str,
    /// The thread of the team, or `None` for the whole operation as measured by the calling thread.
    pub thread: Option<usize>,
    /// Time from the profile's epoch to the start of the span.
    pub start: Duration,
    /// Duration of the span.
    pub length: Duration,
    /// The work of the operation; zero for spans of threads.
    pub work: Work,
}

/// A recorder of spans. While it is off, it costs one relaxed load per operation.
pub struct Profile {
    on: AtomicBool,
    epoch: Instant,
    current: Mutex<&'static str>,
    spans: Mutex<Vec<Span>>,
}

impl Profile {
    /// A recorder that is off. Times count from `epoch`, which ranks of one process share.
    pub fn new(epoch: Instant) -> Self {
        Self {
            on: AtomicBool::new(false),
            epoch,
            current: Mutex::new("other"),
            spans: Mutex::default(),
        }
    }

    /// Starts or stops recording.
    pub fn record(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
    }

    /// Returns true if spans are recorded.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Time from the epoch to `instant`.
    pub fn since_start(&self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.epoch)
    }

    /// Removes and returns the spans recorded so far.
    pub fn take(&self) -> Vec<Span> {
        std::mem::take(&mut *lock(&self.spans))
    }

    /// Records an operation until the returned guard is dropped. Spans of threads get its name
    /// meanwhile.
    pub fn operation(&self, name: &'static str, work: Work) -> Operation<'_> {
        let start = self.is_on().then(Instant::now);
        if start.is_some() {
            *lock(&self.current) = name;
        }
        Operation { profile: self, name, work, start }
    }

    /// Runs and records a thread's part of the current operation.
    pub(crate) fn thread<R>(&self, thread: usize, job: impl FnOnce() -> R) -> R {
        if !self.is_on() {
            return job();
        }
        let start = Instant::now();
        let result = job();
        let name = *lock(&self.current);
        self.push(name, Some(thread), start, Work::default());
        result
    }

    fn push(&self, name: &'static str, thread: Option<usize>, start: Instant, work: Work) {
        let length = start.elapsed();
        let start = self.since_start(start);
        lock(&self.spans).push(Span { name, thread, start, length, work });
    }
}

/// An operation that is being recorded.
#[must_use = "the operation ends when this is dropped"]
pub struct Operation<'a> {
    profile: &'a Profile,
    name: &'static str,
    work: Work,
    start: Option<Instant>,
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        if let Some(start) = self.start {
            self.profile.push(self.name, None, start, self.work);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic while the lock was held leaves a valid list of spans.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
