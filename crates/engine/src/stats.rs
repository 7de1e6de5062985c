//! Counters of the engine.

use std::time::Duration;

use qwen3_model::comm::{Collective, Entry};

/// What the engine has done and is doing. Counters start with the engine and only grow, unless
/// they are said to be of the moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Time since the engine's start.
    pub uptime: Duration,
    /// Running sequences, at the moment.
    pub running: usize,
    /// Waiting sequences, at the moment; preempted ones among them.
    pub waiting: usize,
    /// How often a sequence lost its pages and was computed again.
    pub preemptions: u64,
    /// Requests that ended, by any reason.
    pub finished_requests: u64,
    /// Requests whose reader went away before their end.
    pub cancelled_requests: u64,
    /// Pages of all ranks that split positions.
    pub pages: usize,
    /// Pages that sequences refer to, at the moment.
    pub pages_used: usize,
    /// Pages that may be found again, at the moment.
    pub pages_cached: usize,
    /// Cached pages whose memory was given to others.
    pub pages_evicted: u64,
    /// Tokens of admitted prompts.
    pub prompt_tokens: u64,
    /// Tokens of admitted prompts that were found in cached pages.
    pub prefix_hit_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// Generated tokens per second over the last second or more in which steps ran, at the moment.
    pub tokens_per_s: f64,
    /// Steps.
    pub steps: u64,
    /// Rows of all steps.
    pub rows: u64,
    /// Rows of the latest step.
    pub latest_rows: usize,
    /// Time of all steps, by part.
    pub time: StepTime,
    /// Calls, bytes and seconds of rank 0's collectives.
    pub collectives: Vec<CollectiveStats>,
    /// Where each rank's time went during the last second or more in which steps ran.
    pub ranks: Vec<RankShare>,
}

/// Time of steps on rank 0, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTime {
    /// Planning, and the broadcast of the record.
    pub planning: Duration,
    /// The forward pass, with its collectives.
    pub forward: Duration,
    /// Choosing tokens, with their exchange.
    pub sampling: Duration,
    /// Delivering events.
    pub delivery: Duration,
}

/// One kind of collective on rank 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CollectiveStats {
    /// The kind.
    pub collective: Collective,
    /// Calls.
    pub calls: u64,
    /// Bytes of payload.
    pub bytes: u64,
    /// Time inside the calls.
    pub seconds: f64,
    /// The part of `seconds` that was spent waiting for other ranks.
    pub wait_seconds: f64,
}

/// Shares of a rank's time, between 0 and 1; together at most 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankShare {
    /// Computing.
    pub computing: f64,
    /// Waiting for other ranks.
    pub waiting: f64,
    /// Transferring data.
    pub transferring: f64,
}

/// The ledger's lines by kind, over all phases.
pub(crate) fn by_collective(entries: &[Entry]) -> Vec<CollectiveStats> {
    let mut all: Vec<CollectiveStats> = Vec::new();
    for entry in entries {
        let index = all.iter().position(|line| line.collective == entry.collective);
        let index = index.unwrap_or_else(|| {
            let collective = entry.collective;
            let (calls, bytes, seconds, wait_seconds) = Default::default();
            all.push(CollectiveStats { collective, calls, bytes, seconds, wait_seconds });
            all.len() - 1
        });
        let line = &mut all[index];
        line.calls += entry.calls;
        line.bytes += entry.payload_bytes;
        line.seconds += entry.seconds;
        line.wait_seconds += entry.wait_seconds;
    }
    all
}

/// Measures a rank's shares between two reports.
#[derive(Default)]
pub(crate) struct ShareMeter {
    /// Time of steps since the last report.
    steps: Duration,
    /// Seconds in collectives, and waiting there, at the last report.
    seconds: f64,
    wait_seconds: f64,
}

impl ShareMeter {
    /// Adds the time of a step.
    pub fn add(&mut self, step: Duration) {
        self.steps += step;
    }

    /// The shares since the last call.
    pub fn take(&mut self, entries: &[Entry]) -> RankShare {
        let seconds: f64 = entries.iter().map(|entry| entry.seconds).sum();
        let waiting: f64 = entries.iter().map(|entry| entry.wait_seconds).sum();
        let total = self.steps.as_secs_f64().max(1e-9);
        let share = |seconds: f64| (seconds / total).clamp(0.0, 1.0);
        let waited = share(waiting - self.wait_seconds);
        let transferring = share(seconds - self.seconds - (waiting - self.wait_seconds));
        (self.steps, self.seconds, self.wait_seconds) = (Duration::ZERO, seconds, waiting);
        let transferring = transferring.min(1.0 - waited);
        RankShare { computing: 1.0 - waited - transferring, waiting: waited, transferring }
    }
}

#[cfg(test)]
mod tests {
    use qwen3_model::comm::Phase;

    use super::*;

    fn entry(phase: Phase, seconds: f64, wait_seconds: f64) -> Entry {
        let collective = Collective::Allreduce;
        Entry { collective, phase, calls: 2, payload_bytes: 10, seconds, wait_seconds }
    }

    #[test]
    fn phases_are_added_and_shares_are_of_the_time_since_the_last_report() {
        let entries = [entry(Phase::Decode, 1.0, 0.25), entry(Phase::Prefill, 2.0, 0.75)];
        let lines = by_collective(&entries);
        assert_eq!((lines.len(), lines[0].calls, lines[0].bytes), (1, 4, 20));
        assert_eq!((lines[0].seconds, lines[0].wait_seconds), (3.0, 1.0));
        let mut meter = ShareMeter::default();
        meter.add(Duration::from_secs(4));
        let share = meter.take(&entries);
        assert_eq!((share.computing, share.waiting, share.transferring), (0.25, 0.25, 0.5));
        meter.add(Duration::from_secs(2));
        let share = meter.take(&[entry(Phase::Decode, 4.0, 1.5)]);
        assert_eq!((share.computing, share.waiting, share.transferring), (0.5, 0.25, 0.25));
    }
}
