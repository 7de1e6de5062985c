//! The operations on ranks that are MPI processes: run by `cargo xtask mpi-test`.

mod suite;

use std::sync::Arc;

use comm::{Communicator, MpiComm};
use ops::Isa;

fn main() {
    let comm: Arc<dyn Communicator> = Arc::new(MpiComm::init().expect("MPI starts"));
    // A failed check must end the other ranks too: they would wait for this one.
    let hook = std::panic::take_hook();
    let ranks = comm.clone();
    std::panic::set_hook(Box::new(move |panic| {
        hook(panic);
        ranks.abort(&panic.to_string());
        std::process::exit(1);
    }));
    let dir = tempfile::tempdir().expect("a temporary folder");
    suite::write_checkpoint(dir.path());
    let mut passed = 0;
    for isa in [Some(Isa::scalar()), Isa::avx2()].into_iter().flatten() {
        passed += suite::run(&comm, isa, 1, dir.path());
    }
    comm.barrier().expect("all ranks finish");
    if comm.rank() == 0 {
        println!("{passed} passed, 0 failed");
    }
}
