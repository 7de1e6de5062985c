//! What the machine allows, measured next to the repetitions: on all ranks at once, with the model's own threads.

use std::time::Duration;

use qwen3_model::comm::{CommError, CommunicatorExt as _, Phase};
use qwen3_model::{LimitsProbe, Model};

/// How long one window of a look takes. A bench takes a look before, between and after the repetitions of each measurement.
const WINDOW: Duration = Duration::from_millis(30);
/// Windows of a look; the best one counts. On a machine shared with others one alone was now and then a sixth of the limit.
const WINDOWS: usize = 3;
/// Bytes that all ranks read in turn: many times any last-level cache, which would otherwise serve a part of the reads.
const BYTES: usize = 512 << 20;
/// The least that a thread reads, on machines with so many that their share would fit in their caches.
const THREAD_BYTES: usize = 32 << 20;

/// The limits of the machine as they were seen during a bench.
pub struct Limits<'a> {
    model: &'a Model,
    probe: LimitsProbe,
    /// Floating-point operations a second of all ranks, one for each look.
    flops: Vec<f64>,
    /// Bytes read a second by all ranks, one for each look.
    bytes: Vec<f64>,
}

impl<'a> Limits<'a> {
    /// Nothing seen yet.
    pub fn new(model: &'a Model) -> Self {
        let bytes = (BYTES / model.comm().size()).max(THREAD_BYTES * model.options().threads);
        let probe = LimitsProbe::new(model.context(), bytes);
        Self { model, probe, flops: Vec::new(), bytes: Vec::new() }
    }

    /// Looks at the limit of `phase`: arithmetic for prefill, reading for the others. All ranks call it together.
    pub fn look(&mut self, phase: Phase) -> Result<f64, CommError> {
        let (comm, ctx) = (self.model.comm(), self.model.context());
        let arithmetic = phase == Phase::Prefill;
        let mut best = 0.0_f64;
        for _ in 0..WINDOWS {
            // Ranks that share a machine share its memory too: they have to measure at the same time.
            comm.barrier()?;
            let probe = &self.probe;
            let own = if arithmetic { probe.flops_per_s(ctx, WINDOW) } else { probe.read_bytes_per_s(ctx, WINDOW) };
            let mut all = vec![0.0_f64; comm.size()];
            comm.all_gather(&[own], &mut all)?;
            best = best.max(all.iter().sum());
        }
        if arithmetic { &mut self.flops } else { &mut self.bytes }.push(best);
        Ok(best)
    }

    /// The medians of floating-point operations and of bytes read a second; what was never looked at is looked at now.
    pub fn medians(&mut self) -> Result<(f64, f64), CommError> {
        if self.flops.is_empty() {
            self.look(Phase::Prefill)?;
        }
        if self.bytes.is_empty() {
            self.look(Phase::Decode)?;
        }
        Ok((median(&self.flops), median(&self.bytes)))
    }
}

/// The middle value, or the mean of the two in the middle; there has to be one.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[5.0, 1.0, 9.0]), 5.0);
        assert_eq!(median(&[8.0, 1.0, 9.0, 2.0]), 5.0);
        assert_eq!(median(&[4.0]), 4.0);
    }
}
