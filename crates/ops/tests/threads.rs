//! The operations on ranks that are threads of this process.

mod suite;

use std::sync::Arc;

use comm::{Communicator, SoloComm, ThreadComm};
use ops::Isa;

fn isas() -> Vec<Isa> {
    [Some(Isa::scalar()), Isa::avx2()].into_iter().flatten().collect()
}

fn checkpoint() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    suite::write_checkpoint(dir.path());
    dir
}

fn run_all(comm: Arc<dyn Communicator>, isa: Isa, threads: usize, dir: &std::path::Path) {
    let rank = suite::Rank::new(comm, isa, threads, dir);
    for (name, check) in suite::CHECKS {
        eprintln!("{name}: rank {} of {}, {}, {threads} threads", rank.ctx.rank(), rank.ctx.ranks(), isa.name());
        check(&rank);
    }
}

#[test]
fn one_rank() {
    let dir = checkpoint();
    for isa in isas() {
        for threads in [1, 2, 3, 16] {
            run_all(Arc::new(SoloComm::new()), isa, threads, dir.path());
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
                    scope.spawn(|| run_all(Arc::new(comm), isa, 1 + ranks % 2, dir.path()));
                }
            });
        }
    }
}
