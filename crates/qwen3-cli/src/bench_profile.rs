//! Where the time of a repetition went: a table of operations and collectives.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use qwen3_model::Model;
use qwen3_model::comm::{Phase, TracedCall};
use qwen3_model::ops::profile::Span;
use serde_json::{Value, json};

/// A collective, and when it began on the clock of the spans.
pub type Call = (Duration, TracedCall);

/// One repetition on this rank, span by span.
pub struct Recording {
    /// Prefill or decode.
    pub phase: Phase,
    /// Tokens of the repetition.
    pub tokens: usize,
    /// Tokens that were in the cache before.
    pub depth: usize,
    /// The time of the repetition.
    pub length: Duration,
    /// Operations, as a whole and for each thread; they start at the repetition's start.
    pub spans: Vec<Span>,
    /// Collectives, ditto.
    pub calls: Vec<Call>,
}

impl Recording {
    /// Records `work` on this rank. The ranks should start together.
    pub fn of<E>(
        model: &Model,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<(Duration, Vec<Span>, Vec<Call>), E> {
        let (profile, ledger) = (model.profile(), model.comm().ledger());
        drop((profile.take(), ledger.take_traced()));
        profile.record(true);
        ledger.trace(true);
        let start = Instant::now();
        let result = work();
        let length = start.elapsed();
        profile.record(false);
        ledger.trace(false);
        result?;
        let zero = profile.since_start(start);
        let mut spans = profile.take();
        spans.iter_mut().for_each(|span| span.start = span.start.saturating_sub(zero));
        let call = |call: TracedCall| (call.start.saturating_duration_since(start), call);
        Ok((length, spans, ledger.take_traced().into_iter().map(call).collect()))
    }

    /// The rows of the table: operations by time, then collectives, then what is neither. They add
    /// up to the length: collectives in the background are left out, since their time is that of
    /// other operations, too.
    pub fn rows(&self) -> Vec<Row> {
        let mut calls: Vec<Call> =
            self.calls.iter().filter(|(_, call)| !call.background).copied().collect();
        calls.sort_by_key(|(start, _)| *start);
        let mut rows: Vec<Row> = Vec::new();
        for span in self.spans.iter().filter(|span| span.thread.is_none()) {
            let first = calls.partition_point(|(start, _)| *start < span.start);
            let inside =
                calls[first..].iter().take_while(|(start, _)| *start < span.start + span.length);
            let elsewhere: Duration = inside.map(|(_, call)| call.length).sum();
            let row = row_of(&mut rows, span.name);
            row.calls += 1;
            row.seconds += span.length.saturating_sub(elsewhere).as_secs_f64();
            row.flops += span.work.flops;
            row.bytes += span.work.bytes;
        }
        rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        let mut exchanged: Vec<Row> = Vec::new();
        for (_, call) in &calls {
            let row = row_of(&mut exchanged, call.collective.name());
            row.calls += 1;
            row.seconds += call.length.as_secs_f64();
            row.bytes += call.payload_bytes as f64;
        }
        rows.extend(exchanged);
        let known: f64 = rows.iter().map(|row| row.seconds).sum();
        let rest = (self.length.as_secs_f64() - known).max(0.0);
        rows.push(Row { operation: "rest", seconds: rest, ..Row::default() });
        rows
    }

    /// What stands above the rows: the phase and how much of it.
    pub fn title(&self) -> String {
        match self.depth {
            0 => format!("{} of {} tokens", self.phase, self.tokens),
            depth => format!("{} of {} tokens after {depth}", self.phase, self.tokens),
        }
    }

    /// The rows as a table.
    pub fn table(&self) -> String {
        let total = self.length.as_secs_f64();
        let mut out = format!("\n{}: where rank 0 spent {:.3} ms\n", self.title(), total * 1e3);
        out.push_str("operation           calls         ms   share      GB/s    GFLOP/s\n");
        for row in self.rows() {
            let rate = |amount: f64| match amount / row.seconds * 1e-9 {
                rate if rate > 0.0 && rate.is_finite() => format!("{rate:.1}"),
                _ => "-".to_owned(),
            };
            let _ = writeln!(
                out,
                "{:<16} {:>8} {:>10.3} {:>6.1}% {:>9} {:>10}",
                row.operation,
                row.calls,
                row.seconds * 1e3,
                row.seconds / total * 100.0,
                rate(row.bytes),
                rate(row.flops),
            );
        }
        out
    }

    /// The rows as JSON objects.
    pub fn json(&self) -> Vec<Value> {
        let total = self.length.as_secs_f64();
        let value = |row: Row| {
            let rate =
                |amount: f64| if row.seconds > 0.0 { amount / row.seconds * 1e-9 } else { 0.0 };
            json!({
                "phase": self.phase.name(),
                "tokens": self.tokens,
                "depth": self.depth,
                "operation": row.operation,
                "calls": row.calls,
                "ms": row.seconds * 1e3,
                "share": row.seconds / total,
                "gb_per_s": rate(row.bytes),
                "gflops": rate(row.flops),
            })
        };
        self.rows().into_iter().map(value).collect()
    }
}

/// All calls of one operation or collective.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Row {
    /// The operation or collective.
    pub operation: &'static str,
    /// How often it was called.
    pub calls: u64,
    /// Its time, without that of collectives inside it.
    pub seconds: f64,
    /// What it had to compute.
    pub flops: f64,
    /// What it had to read, or exchanged.
    pub bytes: f64,
}

fn row_of<'a>(rows: &'a mut Vec<Row>, operation: &'static str) -> &'a mut Row {
    let index = rows.iter().position(|row| row.operation == operation).unwrap_or_else(|| {
        rows.push(Row { operation, ..Row::default() });
        rows.len() - 1
    });
    &mut rows[index]
}

#[cfg(test)]
pub mod tests {
    use qwen3_model::comm::Collective;
    use qwen3_model::ops::cost::Work;

    use super::*;

    /// 100 us: a product of 30 us, one of 40 us with 10 us of Allreduce in it, 5 us of Broadcast
    /// after it.
    pub fn recording() -> Recording {
        let us = Duration::from_micros;
        let work = Work { flops: 3e6, bytes: 1.5e6 };
        let span = |name, thread: Option<usize>, start, length| {
            let work = if thread.is_none() { work } else { Work::default() };
            Span { name, thread, start: us(start), length: us(length), work }
        };
        let (zero, waited) = (Instant::now(), us(1));
        let call = |collective, start, length, payload_bytes| {
            let (background, length) = (length == 50, us(length));
            (
                us(start),
                TracedCall { collective, start: zero, length, waited, payload_bytes, background },
            )
        };
        Recording {
            phase: Phase::Decode,
            tokens: 1,
            depth: 7,
            length: us(100),
            spans: vec![
                span("down_proj", None, 0, 30),
                span("down_proj", Some(0), 1, 29),
                span("down_proj", Some(1), 1, 20),
                span("o_proj", None, 40, 40),
            ],
            calls: vec![
                call(Collective::Broadcast, 85, 5, 4),
                call(Collective::Allreduce, 65, 10, 4096),
                call(Collective::Allreduce, 20, 50, 1),
            ],
        }
    }

    #[test]
    fn rows_add_up_and_count_no_time_twice() {
        let rows = recording().rows();
        let found: Vec<_> = rows
            .iter()
            .map(|row| (row.operation, row.calls, (row.seconds * 1e6).round()))
            .collect();
        let expected = [
            ("down_proj", 1, 30.0),
            ("o_proj", 1, 30.0),
            ("Allreduce", 1, 10.0),
            ("Broadcast", 1, 5.0),
            ("rest", 0, 25.0),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn the_table_and_the_json_have_rates_and_shares() {
        let recording = recording();
        let table = recording.table();
        assert!(
            table.contains("decode of 1 tokens after 7: where rank 0 spent 0.100 ms"),
            "{table}"
        );
        let line = table.lines().find(|line| line.starts_with("down_proj")).expect("a line for it");
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(words, ["down_proj", "1", "0.030", "30.0%", "50.0", "100.0"]);
        let json = recording.json();
        assert_eq!(json.len(), 5);
        let shares: f64 = json.iter().map(|row| row["share"].as_f64().expect("a number")).sum();
        assert!((shares - 1.0).abs() < 1e-9, "{shares}");
        assert_eq!(json[0]["operation"], "down_proj");
    }
}
