//! The conformance suite on emulated links, and the time that calls take there.

mod conformance;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use comm::{
    Collective, CommError, Communicator, CommunicatorExt, EmulatedComm, Link, ReduceOp, ThreadComm,
    WireFormat,
};

/// Runs `work` on each rank of `ranks` on `nodes` nodes and returns what the ranks found.
fn on_ranks<T: Send>(
    ranks: usize,
    nodes: usize,
    link: Link,
    work: impl Fn(&EmulatedComm) -> T + Sync,
) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = ThreadComm::group(ranks)
            .into_iter()
            .map(|comm| {
                let work = &work;
                scope.spawn(move || work(&EmulatedComm::new(Arc::new(comm), link, nodes).unwrap()))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn every_result_is_that_of_the_communicator_inside() {
    for (ranks, nodes) in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3)] {
        let link = Link::from_us_gb_s(3.0, 20.0);
        for check in conformance::checks() {
            on_ranks(ranks, nodes, link, |comm| conformance::run(check, comm));
        }
    }
}

#[test]
fn machines_are_those_of_the_ranks_of_a_group() {
    let found = on_ranks(5, 3, Link::from_us_gb_s(1.0, 10.0), |comm| {
        // Ranks 0 and 1, 2 and 3, and 4 share a node.
        let inside = comm.split(comm.machine(), 0).unwrap();
        let across = comm.split(comm.rank() % 2, 0).unwrap();
        let ends = comm.split(usize::from(comm.rank() < 2), 0).unwrap();
        [comm as &dyn Communicator, &*inside, &*across, &*ends].map(|comm| comm.machines())
    });
    assert_eq!(found, [[3, 1, 3, 1], [3, 1, 2, 1], [3, 1, 3, 2], [3, 1, 2, 2], [3, 1, 3, 2]]);
}

/// The least seconds of a few calls, as the slowest rank saw it, and the ledger's seconds of all of
/// them.
fn measure(
    ranks: usize,
    nodes: usize,
    link: Link,
    call: impl Fn(&dyn Communicator) + Sync,
) -> (f64, f64) {
    let found = on_ranks(ranks, nodes, link, |comm| {
        let mut least = f64::INFINITY;
        for _ in 0..5 {
            comm.barrier().unwrap();
            comm.ledger().reset();
            let start = Instant::now();
            call(comm);
            least = least.min(start.elapsed().as_secs_f64());
        }
        (least, comm.ledger().entries().iter().map(|entry| entry.seconds).sum::<f64>())
    });
    found.into_iter().fold((0.0, 0.0), |a, b| (f64::max(a.0, b.0), f64::max(a.1, b.1)))
}

#[test]
fn calls_between_nodes_take_the_links_time_and_the_ledger_knows() {
    let link = Link::from_us_gb_s(2000.0, 0.01);
    for (ranks, nodes) in [(2, 2), (3, 3), (4, 2)] {
        let (took, counted) = measure(ranks, nodes, link, |comm| {
            comm.all_reduce(&mut vec![1.0; 10_000], ReduceOp::Sum).unwrap();
        });
        let model = link.seconds(Collective::Allreduce, nodes, 40_000.0);
        assert!(
            took >= model && counted >= model,
            "{ranks} ranks: {took} s, ledger {counted} s, model {model} s"
        );
        let (took, counted) = measure(ranks, nodes, link, |comm| {
            comm.all_gather(&[0u8; 1000], &mut vec![0; 1000 * ranks]).unwrap();
        });
        let model = link.seconds(Collective::Allgather, nodes, 1000.0 * ranks as f64);
        assert!(
            took >= model && counted >= model,
            "{ranks} ranks: {took} s, ledger {counted} s, model {model} s"
        );
    }
}

#[test]
fn calls_within_a_node_cost_nothing_extra() {
    let link = Link::from_us_gb_s(500_000.0, 0.01);
    let start = Instant::now();
    on_ranks(4, 2, link, |comm| {
        let inside = comm.split(comm.machine(), 0).unwrap();
        let start = Instant::now();
        for _ in 0..10 {
            inside.all_reduce(&mut [1.0; 1000], ReduceOp::Sum).unwrap();
        }
        // On the link they would take ten times half a second.
        assert!(
            start.elapsed().as_secs_f64() < 4.0,
            "ten calls within a node: {:?}",
            start.elapsed()
        );
        let peer = comm.rank() ^ 1;
        comm.send_recv(peer, &[1u8], peer, &mut [0]).unwrap();
    });
    // The split itself crosses.
    assert!(start.elapsed().as_secs_f64() >= 0.5);
}

#[test]
fn a_shorter_wire_halves_the_time_of_long_messages() {
    let link = Link::from_us_gb_s(10.0, 0.001);
    let time = |wire| {
        measure(2, 2, link, |comm| {
            comm.set_wire(wire);
            comm.all_reduce(&mut vec![1.0; 100_000], ReduceOp::Sum).unwrap();
        })
        .0
    };
    let (f32, bf16) = (time(WireFormat::F32), time(WireFormat::Bf16));
    // 400 ms and 200 ms on the link; a busy machine adds less than the difference to one of five
    // calls.
    assert!(f32 >= 0.4 && (0.2..0.4).contains(&bf16), "f32 {f32} s, bf16 {bf16} s");
}

#[test]
fn a_late_rank_is_not_charged_to_the_link() {
    let link = Link::from_us_gb_s(300_000.0, 1.0);
    let times = on_ranks(2, 2, link, |comm| {
        comm.barrier().unwrap();
        if comm.rank() == 1 {
            thread::sleep(Duration::from_millis(400));
        }
        let came = Instant::now();
        comm.barrier().unwrap();
        (came, Instant::now())
    });
    // Both leave 300 ms after the late one came, but for what a busy machine takes from a rank
    // before it waits: rank 0 does not leave at once because it waited long.
    let came = times.iter().map(|time| time.0).max().unwrap();
    assert!(times.iter().all(|time| time.1 - came >= Duration::from_millis(150)), "{times:?}");
}

#[test]
fn more_nodes_than_ranks_is_an_error() {
    for nodes in [0, 3] {
        let comm = ThreadComm::group(2).swap_remove(0);
        let error = EmulatedComm::new(Arc::new(comm), Link::from_us_gb_s(1.0, 1.0), nodes).err();
        assert!(matches!(error, Some(CommError::Setup { .. })), "{error:?}");
    }
}
