//! The reference cases on ranks that are MPI processes: run by `cargo xtask mpi-test`.

mod suite;

use std::sync::Arc;

use qwen3_model::comm::{Communicator, MpiComm};

const CASES: [&str; 6] =
    ["dense-tied-bf16", "dense-untied-f32", "dense-uneven-bf16", "dense-sharded-f16", "dense-yarn-bf16", "moe-bf16"];

fn main() {
    let comm: Arc<dyn Communicator> = Arc::new(MpiComm::init().expect("MPI starts"));
    // A failed check ends the other ranks too: dropped in a panic, this end fails them all.
    let mut passed = 0;
    for case in CASES {
        let reference = suite::Reference::read(case);
        for isa in suite::isas() {
            for what in suite::combinations(reference.mixture, comm.size(), isa, None, 1) {
                reference.check(comm.clone(), &what);
                passed += 1;
            }
        }
        if comm.rank() == 0 {
            println!("ok {case}, {} processes", comm.size());
        }
    }
    comm.barrier().expect("all ranks finish");
    if comm.rank() == 0 {
        println!("{passed} passed, 0 failed");
    }
}
