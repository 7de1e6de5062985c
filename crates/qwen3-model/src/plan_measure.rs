//! Measuring what ranks can do: rates of the weights' products and the times of sums, with all ranks at work at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use comm::{CommError, Communicator, CommunicatorExt, Link, ReduceOp};
use ops::{Context, Isa, LimitsProbe, Placement};
use tensor::WeightFormat;

use crate::plan_machine::Rate;

/// Payloads of the sums that are timed, in f32: 256 B to 4 MiB.
const SIZES: [usize; 8] = [64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1 << 20];

/// Bytes that each thread reads: several times its share of any cache.
const READ_BYTES: usize = 64 << 20;

/// Times Allreduces of several sizes and fits the link between the ranks of `comm`; `None` where there is one rank. All ranks call it
/// and get the same figures: the medians of the slowest rank.
///
/// # Errors
/// When a rank is lost.
pub fn measure_link(comm: &dyn Communicator) -> Result<Option<Link>, CommError> {
    if comm.size() < 2 {
        return Ok(None);
    }
    let mut measured = Vec::new();
    for len in SIZES {
        let mut buf = vec![0.0f32; len];
        let rounds = (1 << 21 >> len.ilog2()).clamp(7, 201);
        let mut times = Vec::with_capacity(rounds);
        comm.barrier()?;
        for _ in 0..rounds {
            let start = Instant::now();
            comm.all_reduce(&mut buf, ReduceOp::Sum)?;
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let mut slowest = [times[rounds / 2] as f32];
        comm.all_reduce(&mut slowest, ReduceOp::Max)?;
        measured.push((comm.wire().encoded_bytes(len) as f64, f64::from(slowest[0])));
    }
    Ok(Link::fit(comm.size(), &measured))
}

/// Measures reading and multiply-adds on all ranks at once and returns the slowest rank's rates. All ranks call it.
///
/// # Errors
/// When a rank is lost.
pub fn measure_rate(
    comm: &Arc<dyn Communicator>,
    isa: Isa,
    threads: usize,
    placement: Placement,
) -> Result<Rate, CommError> {
    let ctx = Context::new(isa, comm.clone(), comm.size(), threads, placement)?;
    let probe = LimitsProbe::new(&ctx, READ_BYTES * threads);
    let look = Duration::from_millis(200);
    comm.barrier()?;
    let read = probe.read_bytes_per_s(&ctx, look) * 1e-9;
    comm.barrier()?;
    let flops = probe.flops_per_s(&ctx, look) * 1e-9;
    let mut all = vec![[0.0f64; 2]; comm.size()];
    comm.all_gather(&[[read, flops]], &mut all)?;
    let least = |index: usize| all.iter().map(|rank| rank[index]).fold(f64::INFINITY, f64::min);
    Ok(Rate { format: WeightFormat::Bf16.name().to_owned(), read_gb_s: least(0), gflops: least(1) })
}
