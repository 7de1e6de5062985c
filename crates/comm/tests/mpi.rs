//! The conformance suite on the processes of an MPI job: by memory of the machine, by messages, and
//! by both.
//!
//! Started by `mpirun -n N`; alone, it runs on one rank. A check that fails ends the job with a
//! panic's status.

mod conformance;

use std::thread;
use std::time::Duration;

use comm::{Communicator, CommunicatorExt, MpiComm, MpiOptions};

fn options(change: impl FnOnce(&mut MpiOptions)) -> MpiOptions {
    let mut options = MpiOptions::default();
    change(&mut options);
    options
}

/// Over messages, waiting ends when the last rank has sent; each rank has another clock. Nothing
/// here depends on how fast the machine is, but for delays of the scheduler of half of what the
/// late rank sleeps, in one of some tries at least.
fn waiting_is_not_travel(comm: &MpiComm) {
    const LATE: Duration = Duration::from_millis(400);
    let shares = |elements: usize| {
        comm.barrier().expect("all ranks are there");
        comm.ledger().reset();
        if comm.rank() == comm.size() - 1 {
            thread::sleep(LATE);
        }
        comm.all_gather(&vec![1.0f32; elements], &mut vec![0.0; elements * comm.size()])
            .expect("all ranks call");
        let entry = comm.ledger().entries()[0];
        (entry.wait_seconds, entry.seconds - entry.wait_seconds)
    };
    let half = LATE.as_secs_f64() / 2.0;
    for elements in [100, 1 << 20] {
        let tries: Vec<(f64, f64)> = (0..3).map(|_| shares(elements)).collect();
        // A rank that comes last finds that the others have sent, so that it waits for none,
        // however long the way of what they sent is; for the others the way begins when it has
        // sent.
        let right = |(waited, travelled): &(f64, f64)| match comm.rank() == comm.size() - 1 {
            true => *waited == 0.0,
            false => *waited > half && *travelled < half,
        };
        assert!(
            tries.iter().any(right),
            "rank {}, {elements} elements: waited, travelled {tries:?}",
            comm.rank()
        );
    }
}

fn main() {
    let world = MpiComm::init().expect("MPI starts");
    world.set_timeout(Duration::from_secs(30));
    let ways = [
        ("as in the environment", None),
        ("shared memory", Some(options(|_| ()))),
        ("messages", Some(options(|o| o.shared_memory = false))),
        ("two machines", Some(options(|o| o.nodes = Some(2)))),
        ("three machines", Some(options(|o| o.nodes = Some(3)))),
    ];
    let mut passed = 0;
    for (name, way) in ways {
        let other =
            way.map(|options| world.with_options(&options).expect("the same ranks, another way"));
        // No way may be skipped because something is missing on this machine. (One rank needs no
        // way.)
        let expected = match name {
            _ if world.size() == 1 => "messages",
            "shared memory" => "shared memory",
            "two machines" if world.size() > 2 => "shared memory and messages",
            "three machines" if world.size() > 3 => "shared memory and messages",
            _ => "messages",
        };
        if let Some(other) = &other {
            assert_eq!(other.path(), expected, "on {} ranks, for '{name}'", world.size());
            let nodes = match name {
                "two machines" => 2,
                "three machines" => 3,
                _ => 1,
            };
            assert_eq!(
                other.machines(),
                nodes.min(world.size()),
                "on {} ranks, for '{name}'",
                world.size()
            );
        }
        let comm: &dyn Communicator = other.as_ref().map_or(&world, |comm| comm);
        for check in conformance::checks() {
            if world.rank() == 0 {
                println!("{name}: {}", check.0);
            }
            conformance::run(check, comm);
            passed += 1;
        }
    }
    if world.size() > 1 {
        waiting_is_not_travel(
            &world.with_options(&options(|o| o.shared_memory = false)).expect("the same ranks"),
        );
        passed += 1;
    }
    world.barrier().expect("all ranks came through");
    if world.rank() == 0 {
        println!("{passed} passed, 0 failed on {} ranks", world.size());
    }
}
