//! Measures Allreduce: `allreduce [RANKS]` on threads of this process, or under `mpirun` (built with the feature
//! `mpi`) on its processes. Prints the median time of a call for each size, after checking the answers.

use std::thread;
use std::time::Instant;

use comm::{Communicator, CommunicatorExt, ReduceOp, ThreadComm};

/// Times of one call on this rank, in microseconds, sorted.
fn times(comm: &dyn Communicator, elements: usize, fused: bool) -> Vec<f64> {
    let calls = (40_000_000 / (elements + 4_000)).clamp(200, 5_000);
    let partial = vec![1.0; elements];
    let mut buf = vec![1.0; elements];
    let mut times = Vec::with_capacity(calls);
    for call in 0..calls + calls / 10 {
        buf.fill(1.0);
        let start = Instant::now();
        if fused {
            comm.all_reduce_add(&partial, &mut buf).expect("all_reduce_add");
        } else {
            comm.all_reduce(&mut buf, ReduceOp::Sum).expect("all_reduce");
        }
        if call >= calls / 10 {
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    times.sort_by(f64::total_cmp);
    times
}

/// Sums of small whole numbers are exact in any order.
fn check(comm: &dyn Communicator, elements: usize) {
    let (rank, size) = (comm.rank(), comm.size());
    let mut buf: Vec<f32> = (0..elements).map(|i| (i % 1000 * (rank + 1)) as f32).collect();
    comm.all_reduce(&mut buf, ReduceOp::Sum).expect("all_reduce");
    let factor = size * (size + 1) / 2;
    let wrong = (0..elements).find(|&i| buf[i] != (i % 1000 * factor) as f32);
    assert_eq!(wrong, None, "the sum of {elements} elements is wrong there");
}

fn measure(comm: &dyn Communicator) {
    let mut slowest = vec![0.0; comm.size()];
    if comm.rank() == 0 {
        println!("{} ranks, {}", comm.size(), comm.transport());
        println!("{:>10} {:>12} {:>12} {:>12} {:>14}", "bytes", "median us", "p10 us", "p90 us", "with += us");
    }
    for kib in [1, 4, 16, 64, 256, 512, 2048, 8192] {
        let elements = kib * 256;
        check(comm, elements);
        let plain = times(comm, elements, false);
        let fused = times(comm, elements, true);
        let at = |times: &[f64], share: f64| times[(times.len() as f64 * share) as usize];
        let mut row = vec![0.0; 4 * comm.size()];
        let own = [at(&plain, 0.5), at(&plain, 0.1), at(&plain, 0.9), at(&fused, 0.5)];
        comm.all_gather(&own, &mut row).expect("all_gather");
        let worst = |i: usize| row.iter().skip(i).step_by(4).fold(0.0, |a: f64, b| a.max(*b));
        slowest.fill(worst(0));
        if comm.rank() == 0 {
            let bytes = kib * 1024;
            println!("{bytes:>10} {:>12.2} {:>12.2} {:>12.2} {:>14.2}", worst(0), worst(1), worst(2), worst(3));
        }
    }
}

fn main() {
    #[cfg(feature = "mpi")]
    if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() || std::env::var_os("PMI_SIZE").is_some() {
        let comm = comm::MpiComm::init().expect("MPI");
        return measure(&comm);
    }
    let ranks = std::env::args().nth(1).map_or(2, |text| text.parse().expect("RANKS is a number"));
    thread::scope(|scope| {
        let cores = core_affinity::get_core_ids().filter(|cores| cores.len() >= ranks);
        for comm in ThreadComm::group(ranks) {
            let core = cores.as_ref().map(|cores| cores[comm.rank()]);
            scope.spawn(move || {
                // Two ranks on one core would measure the scheduler.
                core.map(core_affinity::set_for_current);
                measure(&comm)
            });
        }
    });
}
