//! Measures the hardware limits of this rank's threads: operations per second and bytes read per
//! second.

use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use simd_kernels::{
    DOT_BF16_OPS, InputKind, Isa, MULTIPLY_ADD_FLOPS, PANEL, dot_bf16, dot_int8, dot_int8_ops,
    multiply_add, read,
};
use tensor::{PackedData, PackedMatrix, WeightFormat};

use crate::context::Context;

/// Number of f32 read between two readings of the clock: 1 MiB, tens of microseconds.
const STRIDE: usize = 1 << 18;
/// Rounds of multiply-adds between two readings of the clock, for about the same time.
const ROUNDS: usize = 1 << 10;
/// Columns of the matrix that provides the memory: a panel is 1 MiB.
const COLS: usize = STRIDE / PANEL;

/// Memory to read from. It is allocated like weights: on huge pages, and each thread touches its
/// part first.
pub struct LimitsProbe {
    memory: PackedMatrix,
    parts: Vec<Range<usize>>,
}

impl LimitsProbe {
    /// A probe that reads `bytes` bytes, rounded to MiB and at least 1 MiB per thread. Choose a
    /// multiple of the size of the caches.
    pub fn new(ctx: &Context, bytes: usize) -> Self {
        let panels = (bytes / (STRIDE * size_of::<f32>())).max(ctx.team.threads());
        let mut memory = PackedMatrix::allocate(WeightFormat::F32, panels * PANEL, COLS);
        let parts = ctx.team.panel_ranges(panels * PANEL);
        // All pages that were never written map to one page of zeros, which would stay in the
        // cache.
        ctx.team.each(memory.split_panels(&parts), |chunk| chunk.fill(0x3c));
        Self { memory, parts }
    }

    /// Bytes per second that this rank's threads read together, measured for `time`.
    pub fn read_bytes_per_s(&self, ctx: &Context, time: Duration) -> f64 {
        let PackedData::F32(floats) = self.memory.data() else {
            unreachable!("the memory was allocated as f32")
        };
        rate(ctx, self.parts.clone(), time, |part, step| {
            let panel = part.start + step % part.len();
            // The result depends on every byte read; `black_box` keeps the compiler from removing
            // the reads.
            std::hint::black_box(read(ctx.isa, &floats[panel * STRIDE..][..STRIDE]));
            (STRIDE * size_of::<f32>()) as f64
        })
    }

    /// Floating-point operations per second that this rank's threads do together with the
    /// multiply-adds of `isa`, measured for `time`.
    pub fn flops_per_s(&self, ctx: &Context, isa: Isa, time: Duration) -> f64 {
        // Without AVX2 the loop is about ten times slower.
        let rounds = if isa.has_avx2() { ROUNDS } else { ROUNDS / 8 };
        rate(ctx, self.parts.clone(), time, |_, _| {
            std::hint::black_box(multiply_add(isa, std::hint::black_box(rounds)));
            (rounds * MULTIPLY_ADD_FLOPS) as f64
        })
    }

    /// Operations per second (two per multiply-add) that this rank's threads do together with the
    /// instruction for activations of this kind, measured for `time`. The rate of int16 products is
    /// taken to be half that of int8 products, as for `vpdpwssd` and `vpdpbusd`.
    pub fn operations_per_s(&self, ctx: &Context, input: InputKind, time: Duration) -> f64 {
        let bytes = |_: &Range<usize>, _| {
            std::hint::black_box(dot_int8(ctx.isa, std::hint::black_box(ROUNDS)));
            (ROUNDS * dot_int8_ops(ctx.isa)) as f64
        };
        match input {
            InputKind::Int8 => rate(ctx, self.parts.clone(), time, bytes),
            InputKind::Int16 => rate(ctx, self.parts.clone(), time, bytes) / 2.0,
            InputKind::Bf16 => rate(ctx, self.parts.clone(), time, |_, _| {
                std::hint::black_box(dot_bf16(ctx.isa, std::hint::black_box(ROUNDS)));
                (ROUNDS * DOT_BF16_OPS) as f64
            }),
            InputKind::Float => self.flops_per_s(ctx, ctx.isa, time),
        }
    }
}

/// The sum of the threads' rates. Each thread repeats `step(part, count)` for `time`; a step
/// returns the amount of work it did.
fn rate(
    ctx: &Context,
    parts: Vec<Range<usize>>,
    time: Duration,
    step: impl Fn(&Range<usize>, usize) -> f64 + Sync,
) -> f64 {
    let total = Mutex::new(0.0);
    ctx.team.each(parts, |part| {
        let (start, mut done, mut steps) = (Instant::now(), 0.0, 0);
        while steps == 0 || start.elapsed() < time {
            done += step(&part, steps);
            steps += 1;
        }
        let own = done / start.elapsed().as_secs_f64();
        *total.lock().expect("no step panics while it holds the lock") += own;
    });
    total.into_inner().expect("all threads have returned")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::team::Placement;
    use comm::SoloComm;

    #[test]
    fn rates_are_those_of_a_computer_and_count_all_threads() {
        for threads in [1, 3] {
            let ctx =
                Context::new(Isa::detect(), Arc::new(SoloComm::new()), 1, threads, Placement::Free)
                    .unwrap();
            let probe = LimitsProbe::new(&ctx, 8 << 20);
            assert_eq!(probe.parts.len(), threads);
            let time = Duration::from_millis(5);
            let (read, flops) =
                (probe.read_bytes_per_s(&ctx, time), probe.flops_per_s(&ctx, ctx.isa, time));
            assert!((1e8..1e13).contains(&read), "{read} bytes/s on {threads} threads");
            assert!((1e8..1e13).contains(&flops), "{flops} flop/s on {threads} threads");
        }
    }
}
