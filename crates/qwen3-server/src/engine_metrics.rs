//! What the engine counts, as metrics.

use std::sync::atomic::{AtomicI64, AtomicU64};
use std::sync::{Mutex, PoisonError};

use engine::Stats;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::service::Expected;

type Seconds = Counter<f64, AtomicU64>;

/// A kind of collective.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CollectiveLabel {
    collective: String,
}

/// What pages hold.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

/// A part of a step.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PartLabel {
    part: &'static str,
}

/// A part of a rank's time.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RankLabel {
    rank: usize,
    part: &'static str,
}

/// The labels of a metric that has none.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct NoLabel {}

/// The engine's counters. The engine counts from its start; each update adds what is new.
#[derive(Debug, Default)]
pub struct EngineMetrics {
    running: Gauge<i64, AtomicI64>,
    waiting: Gauge<i64, AtomicI64>,
    kv_cache_usage: Gauge<f64, AtomicU64>,
    pages: Family<StateLabel, Gauge<i64, AtomicI64>>,
    evicted: Counter,
    preemptions: Counter,
    cancelled: Counter,
    queries: Counter,
    hits: Counter,
    steps: Counter,
    rows: Counter,
    step_seconds: Family<PartLabel, Seconds>,
    calls: Family<CollectiveLabel, Counter>,
    bytes: Family<CollectiveLabel, Counter>,
    seconds: Family<CollectiveLabel, Seconds>,
    wait_seconds: Family<CollectiveLabel, Seconds>,
    shares: Family<RankLabel, Gauge<f64, AtomicU64>>,
    /// Metrics that are absent where their value is not known.
    expected_bytes: Family<NoLabel, Gauge<i64, AtomicI64>>,
    step_limit: Family<NoLabel, Gauge<f64, AtomicU64>>,
    last: Mutex<Stats>,
}

impl EngineMetrics {
    /// Adds the metrics to a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("num_requests_running", "Running sequences", self.running.clone());
        registry.register("num_requests_waiting", "Waiting sequences", self.waiting.clone());
        let usage = self.kv_cache_usage.clone();
        registry.register("kv_cache_usage_perc", "Share of KV pages in use, from 0 to 1", usage);
        registry.register("kv_pages", "KV pages in all, in use and kept", self.pages.clone());
        for (name, help, counter) in [
            ("kv_pages_evicted", "Kept pages that were given to others", &self.evicted),
            ("num_preemptions", "Sequences that lost their pages for a time", &self.preemptions),
            ("requests_cancelled", "Requests whose client went away", &self.cancelled),
            ("prefix_cache_queries", "Prompt tokens looked up in kept pages", &self.queries),
            ("prefix_cache_hits", "Prompt tokens found in kept pages", &self.hits),
            ("steps", "Steps", &self.steps),
            ("step_rows", "Tokens that steps computed", &self.rows),
        ] {
            registry.register(name, help, counter.clone());
        }
        let parts = self.step_seconds.clone();
        registry.register_with_unit("step", "Time of steps, by part", Unit::Seconds, parts);
        registry.register("collective_calls", "Calls of collectives on rank 0", self.calls.clone());
        registry.register("collective_bytes", "Payload of collectives", self.bytes.clone());
        let seconds = self.seconds.clone();
        let help = "Time in collectives on rank 0";
        registry.register_with_unit("collective", help, Unit::Seconds, seconds);
        let help = "Time that rank 0 waited for other ranks in collectives";
        let wait = self.wait_seconds.clone();
        registry.register_with_unit("collective_wait", help, Unit::Seconds, wait);
        let shares = self.shares.clone();
        registry.register("rank_time_share", "Where each rank's time goes, from 0 to 1", shares);
        let help = "Payload bytes per token by the formula, of the rank that has most";
        registry.register("expected_bytes_per_token", help, self.expected_bytes.clone());
        let help = "Steps per second that the calibrated speed of the ranks allows";
        registry.register("limit_steps_per_second", help, self.step_limit.clone());
    }

    /// Takes what a step is expected to take.
    pub fn expect(&self, expected: Expected) {
        if let Some(bytes) = expected.bytes_per_token {
            self.expected_bytes.get_or_create(&NoLabel {}).set(bytes as i64);
        }
        if let Some(steps) = expected.steps_per_second {
            self.step_limit.get_or_create(&NoLabel {}).set(steps);
        }
    }

    /// Takes the engine's counters of now.
    pub fn update(&self, now: &Stats) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        self.running.set(now.running as i64);
        self.waiting.set(now.waiting as i64);
        self.kv_cache_usage.set(now.pages_used as f64 / now.pages.max(1) as f64);
        for (state, pages) in
            [("total", now.pages), ("used", now.pages_used), ("cached", now.pages_cached)]
        {
            self.pages.get_or_create(&StateLabel { state }).set(pages as i64);
        }
        for (counter, now, last) in [
            (&self.evicted, now.pages_evicted, last.pages_evicted),
            (&self.preemptions, now.preemptions, last.preemptions),
            (&self.cancelled, now.cancelled_requests, last.cancelled_requests),
            (&self.queries, now.prompt_tokens, last.prompt_tokens),
            (&self.hits, now.prefix_hit_tokens, last.prefix_hit_tokens),
            (&self.steps, now.steps, last.steps),
            (&self.rows, now.rows, last.rows),
        ] {
            counter.inc_by(now.saturating_sub(last));
        }
        for (part, now, last) in [
            ("planning", now.time.planning, last.time.planning),
            ("forward", now.time.forward, last.time.forward),
            ("sampling", now.time.sampling, last.time.sampling),
            ("delivery", now.time.delivery, last.time.delivery),
        ] {
            let seconds = now.saturating_sub(last).as_secs_f64();
            self.step_seconds.get_or_create(&PartLabel { part }).inc_by(seconds);
        }
        for line in &now.collectives {
            let before = last.collectives.iter().find(|old| old.collective == line.collective);
            let of = |part: fn(&engine::CollectiveStats) -> u64| {
                part(line).saturating_sub(before.map_or(0, part))
            };
            let seconds = |part: fn(&engine::CollectiveStats) -> f64| {
                (part(line) - before.map_or(0.0, part)).max(0.0)
            };
            let label = CollectiveLabel { collective: line.collective.to_string() };
            self.calls.get_or_create(&label).inc_by(of(|line| line.calls));
            self.bytes.get_or_create(&label).inc_by(of(|line| line.bytes));
            self.seconds.get_or_create(&label).inc_by(seconds(|line| line.seconds));
            self.wait_seconds.get_or_create(&label).inc_by(seconds(|line| line.wait_seconds));
        }
        for (rank, share) in now.ranks.iter().enumerate() {
            for (part, value) in [
                ("computing", share.computing),
                ("waiting", share.waiting),
                ("transferring", share.transferring),
            ] {
                self.shares.get_or_create(&RankLabel { rank, part }).set(value);
            }
        }
        *last = now.clone();
    }
}
