//! The operations on ranks that are threads of this process.

mod suite;

use std::sync::Arc;

use comm::{Communicator, SoloComm, ThreadComm};
use ops::Isa;

fn isas() -> Vec<Isa> {
    Isa::all().collect()
}

fn checkpoint() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    suite::write_checkpoint(dir.path());
    dir
}

fn solo() -> Arc<dyn Communicator> {
    Arc::new(SoloComm::new())
}

#[test]
fn one_rank() {
    let dir = checkpoint();
    for isa in isas() {
        for threads in [1, 2, 3, 16] {
            suite::run(&solo(), isa, threads, dir.path());
        }
    }
}

#[test]
fn several_ranks() {
    let dir = checkpoint();
    for isa in isas() {
        for ranks in [1, 2, 3, 4, 5, 7] {
            std::thread::scope(|scope| {
                for comm in ThreadComm::group(ranks) {
                    let comm: Arc<dyn Communicator> = Arc::new(comm);
                    scope.spawn(|| suite::run(&{ comm }, isa, 1 + ranks % 2, dir.path()));
                }
            });
        }
    }
}
