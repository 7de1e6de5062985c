//! A job: its options, and its ranks as threads of this process.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use comm::{Communicator, EmulatedComm, Link, SoloComm, ThreadComm, WireFormat};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Failure, RankError};
use crate::rank::Rank;
use crate::signals;
use crate::terminal::one_line;

/// How a job of ranks runs.
#[derive(Clone, Debug)]
pub struct JobOptions {
    /// Ranks in this process, each a thread. Has to be 1 under an MPI launcher.
    pub ranks: usize,
    /// How long a rank waits in a collective for a late one.
    pub timeout: Duration,
    /// How sums travel between ranks; `None` for [`default_wire`].
    pub wire: Option<WireFormat>,
    /// A slow link that is emulated between blocks of the ranks.
    pub emulation: Option<Emulation>,
    /// The program and its build. Processes that differ in it are refused.
    pub program: String,
}

/// An emulated link, and the machines that it connects.
#[derive(Clone, Copy, Debug)]
pub struct Emulation {
    /// The link.
    pub link: Link,
    /// Machines into which the ranks are divided, in contiguous blocks.
    pub nodes: usize,
}

impl Default for JobOptions {
    fn default() -> Self {
        Self {
            ranks: 1,
            timeout: Duration::from_secs(60),
            wire: None,
            emulation: None,
            program: String::new(),
        }
    }
}

/// The wire format of ranks on so many machines. Within the memory of a machine a shorter format
/// costs more than it saves; between machines bf16 keeps logits within 1e-2 of the largest
/// (docs/parallelism.md).
pub fn default_wire(machines: usize) -> WireFormat {
    if machines > 1 { WireFormat::Bf16 } else { WireFormat::F32 }
}

/// Runs `work` on `options.ranks` ranks of this process, each a thread, and waits for all of them.
///
/// # Errors
/// The failure that ended the job: a panic if there was one; otherwise the error on which the ranks
/// agreed, or the first one on which they did not.
pub fn run_in_threads(
    options: &JobOptions,
    work: impl Fn(&Rank) -> Result<(), Failure> + Send + Sync,
) -> Result<(), Failure> {
    // In the order in which ranks fail: what follows the first is mostly its consequence.
    let failures: Mutex<Vec<(usize, Failure)>> = Mutex::default();
    let run = |comm: Arc<dyn Communicator>| {
        if let Err(failure) = run_rank(&comm, options, &work) {
            let unknown_to_others = (!failure.is_agreed()).then(|| failure.to_string());
            lock(&failures).push((comm.rank(), failure));
            if let Some(reason) = unknown_to_others {
                comm.abort(&reason);
            }
        }
    };
    if options.ranks <= 1 {
        run(Arc::new(SoloComm::new()));
    } else {
        allow_many_files();
        // What many ranks share grows with the square of their number.
        let group =
            panic::catch_unwind(|| ThreadComm::group(options.ranks)).map_err(|payload| {
                RankError::Connect { ranks: options.ranks, reason: panic_message(&*payload) }
            })?;
        thread::scope(|scope| {
            for comm in group {
                let comm: Arc<dyn Communicator> = Arc::new(comm);
                let rank = comm.rank();
                let thread = thread::Builder::new().name(format!("rank {rank}"));
                if let Err(source) = thread.spawn_scoped(scope, || run(comm)) {
                    // Before the errors of the other ranks, which miss this one. The ranks after
                    // this one are not started.
                    lock(&failures).insert(0, (rank, RankError::Thread { rank, source }.into()));
                    break;
                }
            }
        });
    }
    signals::clear_handler();
    let mut failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    if failures.is_empty() {
        return Ok(());
    }
    // What a panic drops while it unwinds may end the other ranks before the panic is recorded.
    let is_panic =
        |failure: &Failure| matches!(failure.find::<RankError>(), Some(RankError::Panic { .. }));
    let panic = failures.iter().position(|(_, failure)| is_panic(failure));
    let agreed = failures.iter().position(|(rank, failure)| *rank == 0 && failure.is_agreed());
    Err(failures.swap_remove(panic.or(agreed).unwrap_or(0)).1)
}

/// Every rank of a process has all files of a checkpoint open: allows as many as the hard limit,
/// instead of the usual 1024.
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    // If the limit stays as it is, opening one file too many reports the error.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Runs `work` on this rank; a panic becomes a failure.
pub(crate) fn run_rank(
    comm: &Arc<dyn Communicator>,
    options: &JobOptions,
    work: &impl Fn(&Rank) -> Result<(), Failure>,
) -> Result<(), Failure> {
    comm.set_timeout(options.timeout);
    let comm = match options.emulation {
        Some(Emulation { nodes, .. }) if nodes > comm.size() => {
            return Err(Failure::agreed(RankError::EmulatedNodes { nodes, ranks: comm.size() }));
        }
        Some(Emulation { link, nodes }) => {
            Arc::new(EmulatedComm::new(Arc::clone(comm), link, nodes)?) as Arc<dyn Communicator>
        }
        None => Arc::clone(comm),
    };
    comm.set_wire(options.wire.unwrap_or_else(|| default_wire(comm.machines())));
    let rank = Rank::new(comm, options.emulation.map(|emulation| emulation.link));
    let work = AssertUnwindSafe(|| {
        work(&rank)?;
        // A rank that is done stays until all are, so that a late failure still ends every rank
        // with an error.
        Ok(rank.comm().barrier()?)
    });
    panic::catch_unwind(work).unwrap_or_else(|payload| {
        let message = lock(&PANIC).take().unwrap_or_else(|| panic_message(&*payload));
        Err(RankError::Panic { rank: rank.comm().rank(), message }.into())
    })
}

/// The first panic's message. It may have happened on a worker thread whose payload is lost.
pub(crate) static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// A panic hook that prints nothing and keeps the message of the first panic.
pub(crate) fn keep_panic(info: &panic::PanicHookInfo<'_>) {
    let mut message = panic_message(info.payload());
    if let Some(place) = info.location() {
        message = format!("{message} ({}:{})", place.file(), place.line());
    }
    lock(&PANIC).get_or_insert(one_line(&message));
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

/// Locks `mutex` also after a panic elsewhere: what these guard is valid after each statement.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// The message with which a job of three ranks ends.
    fn message(work: impl Fn(&Rank) -> Result<(), Failure> + Send + Sync) -> String {
        run_in_threads(&three(), work).expect_err("the work fails").to_string()
    }

    fn three() -> JobOptions {
        JobOptions { ranks: 3, timeout: Duration::from_secs(30), ..JobOptions::default() }
    }

    #[test]
    fn an_error_of_one_rank_ends_the_others_and_is_the_one_returned() {
        let found = message(|rank| {
            if rank.comm().rank() == 1 {
                return Err(io::Error::other("no more disk").into());
            }
            rank.comm().barrier()?;
            unreachable!("rank 1 never comes")
        });
        assert_eq!(found, "no more disk");
    }

    #[test]
    fn a_panic_is_a_line_and_ends_the_others() {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(keep_panic));
        let first = message(|rank| {
            assert!(rank.comm().rank() != 2, "two is\ntoo many");
            Ok(rank.comm().barrier()?)
        });
        let second = message(|rank| {
            let _model = Model(rank);
            rank.comm().barrier()?;
            assert!(rank.comm().rank() != 1, "no such row");
            Ok(rank.comm().barrier()?)
        });
        panic::set_hook(usual);
        assert!(first.starts_with("internal error on rank 2: two is too many (crates"), "{first}");
        assert!(second.starts_with("internal error on rank 1: no such row (crates"), "{second}");
    }

    /// Ends the other ranks, as a loaded model does when a panic drops it, and lets them fail
    /// before this rank does.
    struct Model<'a>(&'a Rank);

    impl Drop for Model<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.comm().abort("it panicked (thread 'main')");
                thread::sleep(Duration::from_millis(200));
            }
        }
    }

    #[test]
    fn ranks_agree_on_the_error_of_the_lowest_rank() {
        let failed = || Err::<(), _>(io::Error::other("broken"));
        let found =
            message(|rank| rank.agree(if rank.comm().rank() == 0 { Ok(()) } else { failed() }));
        assert_eq!(found, "rank 1: broken");
        assert_eq!(message(|rank| rank.broadcast(|| Ok(failed()?))), "broken");
        assert_eq!(message(|rank| rank.agree_after(|| Ok(failed()?))), "broken");
    }

    #[test]
    fn what_rank_0_reads_reaches_all() {
        let sum = Mutex::new(0);
        run_in_threads(&three(), |rank| {
            let values: Vec<u32> = rank.broadcast(|| Ok(vec![7, 8]))?;
            *lock(&sum) += values.iter().sum::<u32>();
            Ok(())
        })
        .unwrap();
        assert_eq!(*lock(&sum), 45);
    }

    #[test]
    fn a_value_that_changes_on_its_way_is_an_error() {
        let found = message(|rank| rank.broadcast(|| Ok(f32::NAN)).map(drop));
        assert!(found.contains("cannot broadcast a value: invalid type: null"), "{found}");
    }

    #[test]
    fn a_closed_output_is_the_same_error_on_every_rank() {
        let closed = Mutex::new(0);
        let failed = run_in_threads(&three(), |rank| {
            let local = if rank.is_root() {
                Err(RankError::Output { source: io::ErrorKind::BrokenPipe.into() })
            } else {
                Ok(())
            };
            rank.agree(local).inspect_err(|failure| {
                *lock(&closed) += i32::from(failure.is_closed_output() && failure.is_agreed());
            })
        });
        assert!(failed.is_err());
        assert_eq!(*lock(&closed), 3);
    }

    #[test]
    fn more_emulated_nodes_than_ranks() {
        let emulation = Some(Emulation { link: "40,0.117".parse().unwrap(), nodes: 4 });
        let options = JobOptions { emulation, ..three() };
        let failure = run_in_threads(&options, |_| Ok(())).unwrap_err();
        assert_eq!(
            failure.to_string(),
            "--emulate-nodes: 4; expected at most 3, the number of ranks"
        );
    }
}
