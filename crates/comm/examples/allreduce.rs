//! Measures Allreduce: `allreduce [RANKS]` on threads of this process, or under `mpirun` (built
//! with the feature `mpi`) on its processes, there also by messages and as MPI itself does it.
//! Prints the median time of a call for each size, after checking the answers.

use std::thread;
use std::time::Instant;

use comm::{Communicator, CommunicatorExt, ReduceOp, ThreadComm, WireFormat};

/// Times of one call on this rank, in microseconds, sorted.
fn times(elements: usize, call: impl Fn(&mut Vec<f32>)) -> Vec<f64> {
    let calls = (40_000_000 / (elements + 4_000)).clamp(200, 5_000);
    let mut buf = vec![1.0; elements];
    let mut times = Vec::with_capacity(calls);
    for index in 0..calls + calls / 10 {
        buf.fill(1.0);
        let start = Instant::now();
        call(&mut buf);
        if index >= calls / 10 {
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    times.sort_by(f64::total_cmp);
    times
}

/// Sums of small whole numbers are exact in any order; in steps of 127ths of the largest they are
/// off by one such step at most.
fn check(comm: &dyn Communicator, elements: usize, way: &Way<'_>) {
    let (rank, size) = (comm.rank(), comm.size());
    let mut buf: Vec<f32> = (0..elements).map(|i| (i % 9 * (rank + 1)) as f32).collect();
    (way.call)(&mut buf);
    let factor = (size * (size + 1) / 2) as f32;
    let slack = if way.exact { 0.0 } else { factor * 8.0 / 127.0 };
    let wrong = (0..elements).find(|&i| (buf[i] - (i % 9) as f32 * factor).abs() > slack);
    assert_eq!(wrong, None, "{}: the sum of {elements} elements is wrong there", way.name);
}

type Call<'a> = dyn Fn(&mut Vec<f32>) + 'a;

/// A way to add.
struct Way<'a> {
    name: String,
    exact: bool,
    call: Box<Call<'a>>,
}

/// In each format of the wire.
fn ways<'a>(name: &str, comm: &'a dyn Communicator) -> Vec<Way<'a>> {
    let plain = |wire: WireFormat| -> Way<'a> {
        let call = move |buf: &mut Vec<f32>| {
            comm.set_wire(wire);
            comm.all_reduce(buf, ReduceOp::Sum).expect("all_reduce");
        };
        Way { name: format!("{name} {wire}"), exact: wire != WireFormat::Q8, call: Box::new(call) }
    };
    WireFormat::ALL.map(plain).into()
}

/// Prints a row for each size with the median of each way, as the slowest rank sees it.
fn measure(comm: &dyn Communicator, ways: &[Way<'_>]) {
    let speaks = comm.rank() == 0;
    if speaks {
        println!("{} ranks, median us of an Allreduce", comm.size());
        println!(
            "{:>10}{}",
            "bytes",
            ways.iter().map(|way| format!("{:>15}", way.name)).collect::<String>()
        );
    }
    for kib in [1, 4, 16, 64, 256, 512, 2048, 8192] {
        let elements = kib * 256;
        let mut line = format!("{:>10}", kib * 1024);
        for way in ways {
            check(comm, elements, way);
            let times = times(elements, &way.call);
            let medians = comm.all_gather_one(times[times.len() / 2]).expect("all_gather");
            line += &format!("{:>15.2}", medians.into_iter().fold(0.0, f64::max));
        }
        if speaks {
            println!("{line}");
        }
    }
}

#[cfg(feature = "mpi")]
fn processes() {
    use mpi::collective::{CommunicatorCollectives, SystemOperation};

    let comm = comm::MpiComm::init().expect("MPI");
    let mut options = comm::MpiOptions::from_env().expect("the environment makes sense");
    options.shared_memory = false;
    let messages = comm.with_options(&options).expect("the same ranks");
    let world = mpi::topology::SimpleCommunicator::world();
    let result = std::cell::RefCell::new(Vec::new());
    let own = |buf: &mut Vec<f32>| {
        let mut result = result.borrow_mut();
        result.resize(buf.len(), 0.0);
        world.all_reduce_into(&buf[..], &mut result[..], SystemOperation::sum());
        std::mem::swap(buf, &mut result);
    };
    let mut all = ways(if comm.path() == "messages" { "default" } else { "memory" }, &comm);
    all.extend(ways("messages", &messages));
    all.push(Way { name: "MPI_Allreduce".to_owned(), exact: true, call: Box::new(own) });
    measure(&comm, &all);
}

fn main() {
    #[cfg(feature = "mpi")]
    if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() || std::env::var_os("PMI_SIZE").is_some()
    {
        return processes();
    }
    let ranks = std::env::args().nth(1).map_or(2, |text| text.parse().expect("RANKS is a number"));
    thread::scope(|scope| {
        let cores = core_affinity::get_core_ids().filter(|cores| cores.len() >= ranks);
        for comm in ThreadComm::group(ranks) {
            let core = cores.as_ref().map(|cores| cores[comm.rank()]);
            scope.spawn(move || {
                // Two ranks on one core would measure the scheduler.
                core.map(core_affinity::set_for_current);
                measure(&comm, &ways("threads", &comm));
            });
        }
    });
}
