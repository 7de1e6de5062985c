//! Metrics in Prometheus' text format, with vLLM's names behind the prefix `qwen3_`.

use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::engine_metrics::EngineMetrics;

/// The type of the text format.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why answers ended.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct FinishLabels {
    /// `stop`, `length`, `tool_calls` or `abort`.
    pub finished_reason: String,
}

/// Responses by path and status.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ResponseLabels {
    /// The route.
    pub path: String,
    /// The HTTP status.
    pub status: u16,
}

/// The metrics of a server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// What the engine counts.
    pub engine: EngineMetrics,
    /// Prompt tokens.
    pub prompt_tokens: Counter,
    /// Generated tokens.
    pub generation_tokens: Counter,
    /// Answers that ended, by reason.
    pub request_success: Family<FinishLabels, Counter>,
    /// HTTP responses.
    pub responses: Family<ResponseLabels, Counter>,
    /// From the request to the first token.
    pub time_to_first_token: Histogram,
    /// Between two tokens of a sequence.
    pub inter_token_latency: Histogram,
    /// From the request to the end of the answer.
    pub e2e_request_latency: Histogram,
    /// From the request to its first step.
    pub request_queue_time: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Metrics that count nothing yet.
    pub fn new() -> Self {
        let seconds = |bounds: &[f64]| Histogram::new(bounds.iter().copied());
        let long = &[
            0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0,
        ];
        let short =
            &[0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5];
        let mut metrics = Self {
            registry: Registry::with_prefix("qwen3"),
            engine: EngineMetrics::default(),
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            request_success: Family::default(),
            responses: Family::default(),
            time_to_first_token: seconds(long),
            inter_token_latency: seconds(short),
            e2e_request_latency: seconds(long),
            request_queue_time: seconds(long),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        self.engine.register(registry);
        for (name, help, counter) in [
            ("prompt_tokens", "Prompt tokens", &self.prompt_tokens),
            ("generation_tokens", "Generated tokens", &self.generation_tokens),
        ] {
            registry.register(name, help, counter.clone());
        }
        let success = self.request_success.clone();
        registry.register("request_success", "Answers that ended, by reason", success);
        registry.register("http_responses", "HTTP responses", self.responses.clone());
        for (name, help, histogram) in [
            (
                "time_to_first_token_seconds",
                "From the request to the first token",
                &self.time_to_first_token,
            ),
            (
                "inter_token_latency_seconds",
                "Between two tokens of a sequence",
                &self.inter_token_latency,
            ),
            (
                "e2e_request_latency_seconds",
                "From the request to the end of the answer",
                &self.e2e_request_latency,
            ),
            (
                "request_queue_time_seconds",
                "From the request to its first step",
                &self.request_queue_time,
            ),
        ] {
            registry.register(name, help, histogram.clone());
        }
    }

    /// Counts an answer that ended.
    pub fn finished(&self, reason: &str, elapsed: Duration) {
        let labels = FinishLabels { finished_reason: reason.to_owned() };
        self.request_success.get_or_create(&labels).inc();
        self.e2e_request_latency.observe(elapsed.as_secs_f64());
    }

    /// All metrics as text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = text::encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use engine::Stats;

    use super::*;

    #[test]
    fn the_names_are_those_of_vllm_behind_our_prefix() {
        let metrics = Metrics::new();
        metrics.prompt_tokens.inc_by(7);
        metrics.finished("stop", Duration::from_millis(30));
        let stats =
            Stats { pages: 8, pages_used: 2, waiting: 3, prefix_hit_tokens: 5, ..Stats::default() };
        // What was counted before is not counted again.
        metrics.engine.update(&stats);
        metrics.engine.update(&stats);
        let text = metrics.text();
        for line in [
            "qwen3_num_requests_running 0",
            "qwen3_num_requests_waiting 3",
            "qwen3_kv_cache_usage_perc 0.25",
            "qwen3_prefix_cache_queries_total 0",
            "qwen3_prefix_cache_hits_total 5",
            "qwen3_kv_pages{state=\"used\"} 2",
            "qwen3_step_seconds_total{part=\"forward\"} 0.0",
            "qwen3_prompt_tokens_total 7",
            "qwen3_generation_tokens_total 0",
            "qwen3_request_success_total{finished_reason=\"stop\"} 1",
            "qwen3_time_to_first_token_seconds_count 0",
            "qwen3_inter_token_latency_seconds_count 0",
            "qwen3_e2e_request_latency_seconds_count 1",
            "qwen3_e2e_request_latency_seconds_bucket{le=\"0.05\"} 1",
            "qwen3_request_queue_time_seconds_count 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
