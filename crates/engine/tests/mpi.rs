//! The engine on ranks that are MPI processes: run by `cargo xtask mpi-test`.

mod suite;

use std::sync::Arc;

use engine::qwen3_model::ParallelStrategy;
use engine::qwen3_model::comm::{Communicator, MpiComm};

/// A test that runs on the ranks of a communicator.
type Check = fn(Arc<dyn Communicator>, ParallelStrategy);

fn main() {
    let comm: Arc<dyn Communicator> = Arc::new(MpiComm::init().expect("MPI starts"));
    let ranks = comm.size();
    // A failed check ends the other ranks too: dropped in a panic, this end fails them all.
    let checks: [(&str, Check); 2] = [
        ("concurrent", suite::concurrent_requests_get_the_answers_that_they_get_alone),
        ("log-probabilities", suite::log_probabilities_are_those_of_one_pass),
    ];
    let mut passed = 0;
    for (name, check) in checks {
        check(comm.clone(), suite::HEADS);
        passed += 1;
        if comm.rank() == 0 {
            println!("ok {name}, {ranks} processes");
        }
    }
    suite::log_probabilities_are_those_of_one_pass(comm.clone(), suite::SEQUENCE);
    passed += 1;
    comm.barrier().expect("all ranks finish");
    if comm.rank() == 0 {
        println!("{passed} passed, 0 failed");
    }
}
