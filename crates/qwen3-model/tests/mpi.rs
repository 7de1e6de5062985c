//! The reference cases on ranks that are MPI processes: run by `cargo xtask mpi-test`.

mod cases;
mod suite;
mod traffic;

use std::sync::Arc;

use qwen3_model::comm::{Communicator, MpiComm, MpiOptions};

fn main() {
    let world = MpiComm::init().expect("MPI starts");
    let mut options = MpiOptions::default();
    options.nodes = Some(2);
    let machines: Arc<dyn Communicator> =
        Arc::new(world.with_options(&options).expect("the same ranks, far apart"));
    let comm: Arc<dyn Communicator> = Arc::new(world);
    // A failed check ends the other ranks too: dropped in a panic, this end fails them all.
    let mut passed = 0;
    for case in cases::CASES.into_iter().chain([suite::HYBRIDS[0]]) {
        let reference = suite::Reference::read(case);
        for isa in suite::isas() {
            for what in suite::combinations(&reference, comm.size(), isa, None, 1) {
                reference.check(comm.clone(), &what);
                passed += 1;
                if what.goes_in_halves() {
                    assert_eq!(machines.machines(), comm.size().min(2));
                    reference.check(machines.clone(), &what);
                    passed += 1;
                }
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
