//! What the machine allows, measured next to the repetitions: on all ranks at once, with the
//! model's own threads.

use std::time::Duration;

use qwen3_model::Model;
use qwen3_model::comm::{CommError, CommunicatorExt as _, Phase};
use qwen3_model::ops::kernels::InputKind;
use qwen3_model::ops::limits::LimitsProbe;

/// How long one window of a look takes. A bench takes a look before, between and after the
/// repetitions of each measurement.
const WINDOW: Duration = Duration::from_millis(30);
/// Windows of a look; the best one counts. On a machine shared with others one alone was now and
/// then a sixth of the limit.
const WINDOWS: usize = 3;
/// Bytes that all ranks read in turn: many times any last-level cache, which would otherwise serve
/// a part of the reads.
const BYTES: usize = 512 << 20;
/// The least that a thread reads, on machines with so many that their share would fit in their
/// caches.
const THREAD_BYTES: usize = 32 << 20;

/// The limits of the machine as they were seen during a bench.
pub struct Limits<'a> {
    model: &'a Model,
    probe: LimitsProbe,
    /// Whether some rank computes with AVX-512.
    wide: bool,
    /// Floating-point operations a second of all ranks, one for each look.
    flops: Vec<f64>,
    /// The same with AVX-512, where some rank uses it.
    wide_flops: Vec<f64>,
    /// Bytes read a second by all ranks, one for each look.
    bytes: Vec<f64>,
}

impl<'a> Limits<'a> {
    /// Nothing seen yet. All ranks call it together.
    pub fn new(model: &'a Model) -> Result<Self, CommError> {
        let bytes = (BYTES / model.comm().size()).max(THREAD_BYTES * model.options().threads);
        let probe = LimitsProbe::new(model.context(), bytes);
        let isa = model.context().isa;
        let wide =
            model.comm().all_gather_one(u64::from(isa != isa.without_avx512()))?.contains(&1);
        Ok(Self {
            model,
            probe,
            wide,
            flops: Vec::new(),
            wide_flops: Vec::new(),
            bytes: Vec::new(),
        })
    }

    /// Looks at the limit of `phase`: arithmetic for prefill, reading for the others. All ranks
    /// call it together.
    ///
    /// The arithmetic is that of AVX2 also where there is AVX-512: the shares of two machines, or
    /// of one with either, are then shares of the same, and what is faster has the larger share.
    /// The limit of AVX-512 is looked at besides.
    pub fn look(&mut self, phase: Phase) -> Result<f64, CommError> {
        let ctx = self.model.context();
        if phase != Phase::Prefill {
            let best = self.best(|probe| probe.read_bytes_per_s(ctx, WINDOW))?;
            self.bytes.push(best);
            return Ok(best);
        }
        let narrow = ctx.isa.without_avx512();
        let best = self.best(|probe| probe.flops_per_s(ctx, narrow, WINDOW))?;
        self.flops.push(best);
        if self.wide {
            let wide = self.best(|probe| probe.flops_per_s(ctx, ctx.isa, WINDOW))?;
            self.wide_flops.push(wide);
        }
        Ok(best)
    }

    /// Operations that all ranks do in a second with the instruction that multiplies activations of
    /// this kind. All ranks call it together.
    pub fn operations_per_s(&self, input: InputKind) -> Result<f64, CommError> {
        let ctx = self.model.context();
        self.best(|probe| probe.operations_per_s(ctx, input, WINDOW))
    }

    /// The best window of all ranks together.
    fn best(&self, rate: impl Fn(&LimitsProbe) -> f64) -> Result<f64, CommError> {
        let comm = self.model.comm();
        let mut best = 0.0_f64;
        for _ in 0..WINDOWS {
            // Ranks that share a machine share its memory too: they have to measure at the same
            // time.
            comm.barrier()?;
            best = best.max(comm.all_gather_one(rate(&self.probe))?.iter().sum());
        }
        Ok(best)
    }

    /// The medians of all looks; what was never looked at is looked at now.
    pub fn medians(&mut self) -> Result<Medians, CommError> {
        if self.flops.is_empty() {
            self.look(Phase::Prefill)?;
        }
        if self.bytes.is_empty() {
            self.look(Phase::Decode)?;
        }
        let wide_flops = (!self.wide_flops.is_empty()).then(|| median(&self.wide_flops));
        Ok(Medians { flops: median(&self.flops), wide_flops, bytes: median(&self.bytes) })
    }
}

/// What all ranks do in a second at best.
pub struct Medians {
    /// f32 multiply-adds of AVX2 (or plain ones, where the model uses those), two operations each.
    pub flops: f64,
    /// The same with AVX-512, where some rank uses it.
    pub wide_flops: Option<f64>,
    /// Bytes read from memory.
    pub bytes: f64,
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
