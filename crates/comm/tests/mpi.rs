//! The conformance suite on the processes of an MPI job: by memory of the machine, by messages, and by both.
//!
//! Started by `mpirun -n N`; alone, it runs on one rank. A check that fails ends the job with a panic's status.

mod conformance;

use std::thread;
use std::time::Duration;

use comm::{Communicator, MpiComm, MpiOptions, ReduceOp};

fn options(change: impl FnOnce(&mut MpiOptions)) -> MpiOptions {
    let mut options = MpiOptions::default();
    change(&mut options);
    options
}

/// Over messages, waiting ends when the last rank has sent; each rank has another clock.
fn waiting_is_not_travel(comm: &MpiComm) {
    let shares = |late: Duration, elements: usize| {
        comm.barrier().expect("all ranks are there");
        comm.ledger().reset();
        if comm.rank() == comm.size() - 1 {
            thread::sleep(late);
        }
        comm.all_reduce(&mut vec![1.0; elements], ReduceOp::Sum).expect("all ranks call");
        let entry = comm.ledger().entries()[0];
        (entry.wait_seconds, entry.seconds - entry.wait_seconds)
    };
    // Of several tries the one in which nothing else ran meanwhile.
    let best = |late, elements, value: fn((f64, f64)) -> f64| {
        (0..5).map(|_| value(shares(late, elements))).fold(f64::INFINITY, f64::min)
    };
    let late = Duration::from_millis(100);
    let (waited, travelled) = (best(late, 100, |(wait, _)| wait), best(late, 100, |(_, travel)| travel));
    if comm.rank() == comm.size() - 1 {
        assert!(waited < 0.01, "the late rank waited {waited} s");
    } else {
        assert!(waited > 0.09 && travelled < 0.01, "the others waited {waited} s, travel took {travelled} s");
    }
    let share = best(Duration::ZERO, 1 << 20, |(wait, travel)| wait / (wait + travel));
    assert!(share < 0.3, "of a large sum {share} was waiting");
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
        let other = way.map(|options| world.with_options(&options).expect("the same ranks, another way"));
        // No way may be skipped because something is missing on this machine. (One rank needs no way.)
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
            assert_eq!(other.machines(), nodes.min(world.size()), "on {} ranks, for '{name}'", world.size());
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
        waiting_is_not_travel(&world.with_options(&options(|o| o.shared_memory = false)).expect("the same ranks"));
        passed += 1;
    }
    world.barrier().expect("all ranks came through");
    if world.rank() == 0 {
        println!("{passed} passed, 0 failed on {} ranks", world.size());
    }
}
