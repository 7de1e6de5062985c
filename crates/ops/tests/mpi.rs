//! The operations on ranks that are MPI processes: run by `cargo xtask mpi-test`.

mod suite;

use std::sync::Arc;

use comm::{Communicator, MpiComm};
use ops::Isa;

fn main() {
    let comm: Arc<dyn Communicator> = Arc::new(MpiComm::init().expect("MPI starts"));
    // A failed check ends the other ranks too: dropped in a panic, this end fails them all.
    let dir = tempfile::tempdir().expect("a temporary folder");
    suite::write_checkpoint(dir.path());
    let mut passed = 0;
    for isa in Isa::all() {
        passed += suite::run(&comm, isa, 1, dir.path());
    }
    comm.barrier().expect("all ranks finish");
    if comm.rank() == 0 {
        println!("{passed} passed, 0 failed");
    }
}
