//! What a bench found, for people and for programs.

use std::fmt::Write as _;

use qwen3_model::Model;
use qwen3_model::comm::{Collective, Entry, Phase};
use serde_json::{Value, json};

use crate::allocations::Allocations;
use crate::bench_limits::{Medians, median};
use crate::bench_profile::Recording;

/// One phase at one length.
pub struct Measured {
    /// Prefill or decode.
    pub phase: Phase,
    /// With `--batch`, the number of sequences that are computed together.
    pub batch: Option<usize>,
    /// Tokens of a repetition, of all sequences.
    pub tokens: usize,
    /// Floating-point operations of a repetition, on all ranks together.
    pub flops: f64,
    /// Bytes of weights and cache that a repetition reads, on all ranks together.
    pub bytes: f64,
    /// Tokens in the cache before the repetition.
    pub depth: usize,
    /// With `--batch`, the time of a pass over one prompt token of each sequence, with logits for
    /// all, divided by the time of a decode step, which chooses tokens besides.
    pub prompt_rows_ratio: Option<f64>,
    /// The time of each repetition.
    pub seconds: Vec<f64>,
    /// The shortest time that the machine's limits allow for a repetition, measured around the
    /// repetitions.
    pub limit_seconds: f64,
    /// What rank 0's process allocated in a repetition, where it is counted.
    pub allocations: Option<Allocations>,
}

impl Measured {
    fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// The share of the limit that the median repetition reaches.
    fn limit_share(&self) -> f64 {
        self.limit_seconds / self.median()
    }

    /// Fastest and slowest repetition, in tokens a second.
    fn spread(&self) -> (f64, f64) {
        let rates = self.seconds.iter().map(|seconds| self.tokens as f64 / seconds);
        rates.fold((f64::INFINITY, 0.0), |(low, high), rate| (low.min(rate), f64::max(high, rate)))
    }
}

/// All results of a bench.
pub struct Report<'a> {
    /// The checkpoint, as the user named it.
    pub name: String,
    /// The model, with its options and ranks.
    pub model: &'a Model,
    /// Why the model is split as it is, where the plan said so.
    pub reason: Option<String>,
    /// Bytes of weights of each rank.
    pub weight_bytes: Vec<u64>,
    /// Results in the order in which they were measured.
    pub results: Vec<Measured>,
    /// Rank 0's ledger of one repetition of each.
    pub entries: Vec<Entry>,
    /// The machine's best on these ranks and threads.
    pub limits: Medians,
    /// Where this rank's time went, if it was asked for.
    pub recordings: Vec<Recording>,
}

impl Report<'_> {
    /// One JSON object on one line.
    pub fn json(&self) -> String {
        let (comm, options) = (self.model.comm(), self.model.options());
        let results: Vec<Value> = self
            .results
            .iter()
            .map(|result| {
                let seconds = result.median();
                let mut object = json!({
                    "phase": result.phase.name(),
                    "tokens": result.tokens,
                    "tokens_per_s": result.tokens as f64 / seconds,
                    "ms": seconds * 1e3,
                    "gflops": result.flops / seconds * 1e-9,
                    "gb_per_s": result.bytes / seconds * 1e-9,
                    "limit_share": result.limit_share(),
                    "depth": result.depth,
                });
                if let Some(ratio) = result.prompt_rows_ratio {
                    object["prompt_rows_ratio"] = ratio.into();
                }
                if let Some(batch) = result.batch {
                    object["batch"] = batch.into();
                }
                if let Some(Allocations { count, bytes }) = result.allocations {
                    (object["allocations"], object["allocated_bytes"]) =
                        (count.into(), bytes.into());
                }
                object
            })
            .collect();
        let traffic: Vec<Value> = self
            .traffic()
            .iter()
            .map(|entry| {
                json!({
                    "phase": entry.phase.name(),
                    "collective": entry.collective.name(),
                    "calls": entry.calls,
                    "payload_bytes": entry.payload_bytes,
                    "seconds": entry.seconds,
                    "wait_seconds": entry.wait_seconds,
                })
            })
            .collect();
        let mut report = json!({
            "model": self.name,
            "weights": self.model.weight_format().name(),
            "ranks": comm.size(),
            "threads": options.threads,
            "comm": comm.transport(),
            "strategy": options.strategy.to_string(),
            "attention": options.attention.to_string(),
            "mlp": options.schedule().to_string(),
            "results": results,
            "traffic": traffic,
            "limits": {"fma_gflops": self.limits.flops * 1e-9, "read_gb_per_s": self.limits.bytes * 1e-9},
            "kv": options.kv.to_string(),
            "isa": options.isa.name(),
            "experts": options.experts.to_string(),
            "wire": comm.wire().name(),
            "plan": self.reason,
            "weight_bytes": self.weight_bytes,
        });
        if let Some(flops) = self.limits.wide_flops {
            report["limits"]["fma_avx512_gflops"] = (flops * 1e-9).into();
        }
        if !self.recordings.is_empty() {
            report["profile"] = self.recordings.iter().flat_map(Recording::json).collect();
        }
        format!("{report}\n")
    }

    /// A table of results and one of the traffic.
    pub fn table(&self) -> String {
        let (comm, options) = (self.model.comm(), self.model.options());
        let mut out = String::new();
        let line = format!(
            "{}: weights {}, cache {}, {}; ranks {} ({}, wire {}), threads {}; {}; attention {}\n\n",
            self.name,
            self.model.weight_format(),
            options.kv,
            options.isa.name(),
            comm.size(),
            comm.transport(),
            comm.wire().name(),
            options.threads,
            options.division(),
            options.attention,
        );
        out.push_str(&line);
        if let Some(reason) = &self.reason {
            let _ = writeln!(out, "plan: {reason}\n");
        }
        let batches = self.results.iter().any(|result| result.batch.is_some());
        out.push_str(if batches { "phase    sequences  " } else { "phase    " });
        out.push_str(
            "tokens  after  tokens/s (slowest..fastest)       ms     GFLOP/s    GB/s  of limit\n",
        );
        for result in &self.results {
            let seconds = result.median();
            let (slowest, fastest) = result.spread();
            let spread = format!("({slowest:.1}..{fastest:.1})");
            let _ = write!(out, "{:<8} ", result.phase.name());
            if let Some(batch) = result.batch {
                let _ = write!(out, "{batch:>9}  ");
            }
            let _ = writeln!(
                out,
                "{:>6} {:>6} {:>9.1} {spread:<20} {:>9.2} {:>9.1} {:>8.2} {:>8.1}%",
                result.tokens,
                result.depth,
                result.tokens as f64 / seconds,
                seconds * 1e3,
                result.flops / seconds * 1e-9,
                result.bytes / seconds * 1e-9,
                result.limit_share() * 100.0,
            );
        }
        let _ = writeln!(
            out,
            "limits measured in this run: {:.1} GFLOP/s of f32 multiply-adds (prefill), {:.2} GB/s read (decode)",
            self.limits.flops * 1e-9,
            self.limits.bytes * 1e-9,
        );
        if let Some(flops) = self.limits.wide_flops {
            let gflops = flops * 1e-9;
            let _ = writeln!(
                out,
                "these are multiply-adds of AVX2, the yardstick of all machines; with AVX-512 {gflops:.1} GFLOP/s"
            );
        }
        self.recordings.iter().for_each(|recording| out.push_str(&recording.table()));
        let traffic = self.traffic();
        if traffic.is_empty() {
            return out;
        }
        out.push_str("\nwhat rank 0 communicated in one repetition of each\n");
        out.push_str(
            "phase    collective          calls      payload bytes         ms   waiting ms\n",
        );
        for entry in traffic {
            let _ = writeln!(
                out,
                "{:<8} {:<15} {:>9} {:>18} {:>10.3} {:>12.3}",
                entry.phase.name(),
                entry.collective.name(),
                entry.calls,
                entry.payload_bytes,
                entry.seconds * 1e3,
                entry.wait_seconds * 1e3,
            );
        }
        out
    }

    /// The entries with those of one phase and collective added up: prompts of several lengths
    /// share a line.
    fn traffic(&self) -> Vec<Entry> {
        let kinds = Phase::ALL
            .into_iter()
            .flat_map(|phase| Collective::ALL.map(|collective| (phase, collective)));
        kinds
            .filter_map(|(phase, collective)| {
                let of_kind =
                    |entry: &&Entry| entry.phase == phase && entry.collective == collective;
                self.entries.iter().filter(of_kind).copied().reduce(|sum, entry| Entry {
                    calls: sum.calls + entry.calls,
                    payload_bytes: sum.payload_bytes + entry.payload_bytes,
                    seconds: sum.seconds + entry.seconds,
                    wait_seconds: sum.wait_seconds + entry.wait_seconds,
                    ..sum
                })
            })
            .collect()
    }
}
