//! What each operation and each thread did, when and for how long; off unless asked for.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cost::Work;

/// A stretch of time.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// The operation.
    pub name: &'static str,
    /// The thread of the team; `None` is the operation as a whole, as the rank's own thread saw it.
    pub thread: Option<usize>,
    /// From the profile's start to the span's.
    pub start: Duration,
    /// How long it took.
    pub length: Duration,
    /// What it had to do; zero for the spans of threads.
    pub work: Work,
}

/// A recorder of spans. While it is off, an operation costs it one relaxed load.
pub struct Profile {
    on: AtomicBool,
    epoch: Instant,
    current: Mutex<&'static str>,
    spans: Mutex<Vec<Span>>,
}

impl Profile {
    /// A recorder that is off and counts from `epoch`: ranks of one process share theirs.
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

    /// Whether spans are recorded.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Where `instant` lies on the clock of the spans.
    pub fn since_start(&self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.epoch)
    }

    /// The spans so far, which are forgotten.
    pub fn take(&self) -> Vec<Span> {
        std::mem::take(&mut *lock(&self.spans))
    }

    /// Records `name` until the guard is dropped, and names the threads' spans meanwhile.
    pub fn operation(&self, name: &'static str, work: Work) -> Operation<'_> {
        let start = self.is_on().then(Instant::now);
        if start.is_some() {
            *lock(&self.current) = name;
        }
        Operation { profile: self, name, work, start }
    }

    /// Runs a thread's part of the current operation.
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
    // What a panicking thread left behind is still a list of spans.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
