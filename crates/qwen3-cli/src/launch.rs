//! Starting the ranks of a command, and ending them all with one line when one fails.

use std::any::Any;
use std::io::{self, Write as _};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
#[cfg(feature = "mpi")]
use std::sync::Weak;
#[cfg(feature = "mpi")]
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use qwen3_model::comm::{CommError, Communicator, EmulatedComm, SoloComm, ThreadComm};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::failure::{CliError, Failure, one_line};
#[cfg(feature = "mpi")]
use crate::interrupt;
use crate::options::{LaunchOptions, misfit};
use crate::rank::Rank;
use crate::world::World;

/// What `--version` says, and each rank of itself: the version, and the digest of the sources
/// (`build.rs`).
pub const VERSION: &str =
    concat!(env!("CARGO_PKG_VERSION"), " (sources ", env!("QWEN3_SOURCES"), ")");

/// A command as every rank runs it.
pub trait Command: Fn(&Rank) -> Result<(), Failure> + Send + Sync {}

impl<F: Fn(&Rank) -> Result<(), Failure> + Send + Sync> Command for F {}

/// How long a failed rank leaves rank 0 to say why, before its own end makes a launcher end them
/// all.
const GRACE: Duration = Duration::from_secs(2);

/// How long a rank that is told to end has to come to a collective.
#[cfg(feature = "mpi")]
const PATIENCE: Duration = Duration::from_millis(700);

/// Whether the command has ended on this rank, which then says itself why.
#[cfg(feature = "mpi")]
static OVER: AtomicBool = AtomicBool::new(false);

/// Runs `command` on every rank: on the processes of an MPI launcher, or on threads of this one.
pub fn launch(options: &LaunchOptions, command: impl Command) -> ExitCode {
    panic::set_hook(Box::new(keep_panic));
    match World::detect() {
        Some(world) if world.is_many() && options.ranks > 1 => {
            let found =
                format!("{} in each process that {} started", options.ranks, world.launcher);
            let expected = "1, since under a launcher each process is a rank";
            refuse(&world, &misfit("--ranks", found, expected))
        }
        Some(world) if options.ranks == 1 && (world.is_many() || cfg!(feature = "mpi")) => {
            run_processes(&world, options, command)
        }
        _ => match run_threads(options, command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => report(&error),
        },
    }
}

/// Every rank of a process has all files of a checkpoint open: as many as may be, not as few as is
/// usual (1024).
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    // Where it stays as it is, a file that cannot be opened says so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Says on the first process why there are no ranks; the others wait until it has. One that is
/// still there afterwards is alone with its error, and the first process waits for it.
pub fn refuse(world: &World, error: &CliError) -> ExitCode {
    if world.rank == 0 {
        return report(error);
    }
    thread::sleep(GRACE);
    say(&format!("rank {}: {}", world.rank, error.line()));
    ExitCode::FAILURE
}

fn report(error: &CliError) -> ExitCode {
    say(&error.line());
    ExitCode::FAILURE
}

/// Says why all ends, at once: `eprintln` writes word by word, between which come those of
/// launchers and other ranks.
fn say(line: &str) {
    // There is no better place to complain.
    let _ = io::stderr().write_all(format!("error: {line}\n").as_bytes());
}

/// Runs the command on ranks of this process; the error is the one to tell.
fn run_threads(options: &LaunchOptions, command: impl Command) -> Result<(), Box<CliError>> {
    // In the order in which ranks fail: what follows the first is mostly its echo.
    let failures = Mutex::new(Vec::new());
    let run = |comm: Arc<dyn Communicator>| {
        if let Err(failure) = run_rank(&comm, options, &command) {
            let unknown_to_others = (!failure.agreed).then(|| failure.error.line());
            lock(&failures).push((comm.rank(), failure));
            if let Some(reason) = unknown_to_others {
                comm.abort(&reason);
            }
        }
    };
    if options.ranks == 1 {
        run(Arc::new(SoloComm::new()));
    } else {
        allow_many_files();
        let group = panic::catch_unwind(|| ThreadComm::group(usize::from(options.ranks)));
        let group = group.map_err(|payload| {
            // What many ranks share grows with the square of their number.
            let reason = words(&*payload);
            let problem =
                format!("cannot connect {} ranks in one process: {reason}", options.ranks);
            Box::new(CliError::Launch { problem })
        })?;
        thread::scope(|scope| {
            for comm in group {
                let comm: Arc<dyn Communicator> = Arc::new(comm);
                let rank = comm.rank();
                let thread = thread::Builder::new().name(format!("rank {rank}"));
                if let Err(source) = thread.spawn_scoped(scope, || run(comm)) {
                    let problem = format!("cannot start a thread for rank {rank}: {source}");
                    // Before what the other ranks say of this one's absence. Those behind it are
                    // not started.
                    lock(&failures).insert(0, (rank, CliError::Launch { problem }.into()));
                    break;
                }
            }
        });
    }
    let mut failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    if failures.is_empty() {
        return Ok(());
    }
    // While a panic unwinds, what it drops may end the other ranks before it is told.
    let panic =
        failures.iter().position(|(_, failure)| matches!(*failure.error, CliError::Panic { .. }));
    let agreed = failures.iter().position(|(rank, failure)| *rank == 0 && failure.agreed);
    let (_, failure) = failures.swap_remove(panic.or(agreed).unwrap_or(0));
    Err(failure.error)
}

#[cfg(not(feature = "mpi"))]
fn run_processes(world: &World, _options: &LaunchOptions, _command: impl Command) -> ExitCode {
    let problem = format!(
        "started by a launcher of several processes ({}), but built without MPI; build with --features mpi, or use --ranks",
        world.launcher
    );
    refuse(world, &CliError::Launch { problem })
}

#[cfg(feature = "mpi")]
fn run_processes(world: &World, options: &LaunchOptions, command: impl Command) -> ExitCode {
    use qwen3_model::comm::{MpiComm, MpiOptions};

    let started = MpiOptions::from_env().and_then(|mut options| {
        options.program = format!("qwen3 {VERSION}");
        Ok((MpiComm::init_with(&options)?, options.shared_memory))
    });
    let (comm, shared_memory) = match started {
        Ok(started) => started,
        Err(error) => return refuse(world, &error.into()),
    };
    if let Some(size) = world.size
        && size != comm.size()
    {
        let problem = format!(
            "{} started {size} processes, but MPI knows of {}; is the launcher of another MPI? (with srun: --mpi=pmix)",
            world.launcher,
            comm.size()
        );
        return refuse(world, &CliError::Launch { problem });
    }
    if comm.rank() == 0
        && shared_memory
        && comm.machines() < comm.size()
        && comm.path() == "messages"
    {
        eprintln!(
            "warning: some ranks of one machine cannot map each other's memory (/proc/PID/fd, which containers may close to each other); \
             all collectives go by MPI's messages, which is slower"
        );
    }
    let comm: Arc<dyn Communicator> = Arc::new(comm);
    // A launcher that loses one rank tells the others to end, at once and often with no word about
    // it.
    let to_end = Arc::downgrade(&comm);
    let end = move |signal| end_on(signal, &to_end);
    if let Err(error) = interrupt::before_end(end) {
        comm.abort(&error.line());
        return refuse(world, &error);
    }
    // What a panic drops may end this rank before its words are known elsewhere.
    let to_tell = Arc::downgrade(&comm);
    panic::set_hook(Box::new(move |info| {
        keep_panic(info);
        let message = lock(&PANIC).clone();
        if let (Some(comm), Some(message)) = (to_tell.upgrade(), message) {
            comm.abort(&CliError::Panic { rank: comm.rank(), message }.line());
        }
    }));
    let command = |rank: &Rank| {
        same_arguments(rank)?;
        command(rank)
    };
    let result = run_rank(&comm, options, &command);
    OVER.store(true, Ordering::Release);
    let Err(failure) = result else {
        return ExitCode::SUCCESS;
    };
    let speaks = speaks_for_all(&failure.error, comm.rank());
    if failure.agreed {
        let status = if speaks { report(&failure.error) } else { ExitCode::FAILURE };
        // Nobody leaves before rank 0 has spoken. If this fails there is nothing left to say.
        let _ = comm.barrier();
        return status;
    }
    comm.abort(&failure.error.line());
    if !speaks {
        // Rank 0 hears of it in its next collective. When it is gone or busy for longer, this rank
        // speaks.
        thread::sleep(GRACE);
    }
    report(&failure.error);
    // MPI cannot be finalized together with ranks that may be gone.
    std::process::exit(1);
}

/// Ends every rank where one was started with other arguments than rank 0: what does not show in
/// the collectives, such as another format of the weights, would otherwise only show in the
/// answers.
#[cfg(feature = "mpi")]
fn same_arguments(rank: &Rank) -> Result<(), Failure> {
    let own = shared_arguments(
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()),
    );
    let of_rank_0 = rank.share(|| Ok(own.clone()))?;
    let same = if own == of_rank_0 {
        Ok(())
    } else {
        let expected =
            format!("those of rank 0, {of_rank_0:?} (only {} may differ)", OWN.join(", "));
        Err(CliError::Option { option: "arguments", found: format!("{own:?}"), expected })
    };
    rank.agree(same)
}

/// Options that a rank may have to itself, as on nodes of different kinds.
#[cfg_attr(not(feature = "mpi"), allow(dead_code))]
const OWN: [&str; 3] = ["--model", "--threads", "--isa"];

/// The arguments without those that may differ, in one line.
#[cfg_attr(not(feature = "mpi"), allow(dead_code))]
fn shared_arguments(arguments: impl Iterator<Item = String>) -> String {
    let mut kept = Vec::new();
    let mut skip = false;
    for argument in arguments {
        let own = OWN.iter().find_map(|option| argument.strip_prefix(option));
        match own {
            _ if skip => skip = false,
            Some("") => skip = true,
            Some(value) if value.starts_with('=') => {}
            _ => kept.push(argument),
        }
    }
    kept.join(" ")
}

/// Whether this rank says why the job ends: rank 0, or the first of those that wait for it when
/// they are told to end.
#[cfg_attr(not(feature = "mpi"), allow(dead_code))]
fn speaks_for_all(error: &CliError, rank: usize) -> bool {
    let missing = match error.collective() {
        Some(CommError::PeerFailed { missing, .. }) => &missing[..],
        _ => &[],
    };
    (0..rank).all(|other| missing.contains(&other))
}

/// A signal wants this process to end. Its rank fails in its next collective, or in the one where
/// it waits, and says so; one that computes for long says less, before the launcher loses its
/// patience (Open MPI after a second).
#[cfg(feature = "mpi")]
fn end_on(signal: &str, comm: &Weak<dyn Communicator>) {
    let reason = format!("it was told to end ({signal})");
    let over = || OVER.load(Ordering::Acquire);
    let mut speaks = false;
    if let Some(comm) = comm.upgrade().filter(|_| !over()) {
        comm.abort(&reason);
        speaks = comm.rank() == 0;
    }
    thread::sleep(PATIENCE);
    if speaks && !over() {
        say(&format!("rank 0 failed: {reason}"));
    }
    std::process::exit(1);
}

/// Runs the command on this rank; a panic is a failure like any other.
fn run_rank(
    comm: &Arc<dyn Communicator>,
    options: &LaunchOptions,
    command: &impl Command,
) -> Result<(), Failure> {
    comm.set_timeout(options.timeout());
    let comm = &match options.emulate_link {
        Some(link) => {
            let nodes = usize::from(options.emulate_nodes);
            if nodes > comm.size() {
                let expected = format!("at most {}, the number of ranks", comm.size());
                return Err(Failure::agreed(misfit("--emulate-nodes", nodes, expected)));
            }
            Arc::new(EmulatedComm::new(Arc::clone(comm), link, nodes)?) as Arc<dyn Communicator>
        }
        None => Arc::clone(comm),
    };
    comm.set_wire(options.wire.on(comm.machines()));
    let rank = Rank::new(Arc::clone(comm), options.emulate_link);
    let work = AssertUnwindSafe(|| {
        command(&rank)?;
        // A rank that is done stays until all are, so that a late failure still ends every rank
        // with an error.
        rank.comm().barrier()?;
        Ok(())
    });
    panic::catch_unwind(work).unwrap_or_else(|payload| {
        let message = lock(&PANIC).take().unwrap_or_else(|| words(&*payload));
        let rank = comm.rank();
        Err(CliError::Panic { rank, message }.into())
    })
}

/// The first panic, in words. It may have happened on a worker thread whose payload says less.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

fn keep_panic(info: &panic::PanicHookInfo<'_>) {
    let mut message = words(info.payload());
    if let Some(place) = info.location() {
        message = format!("{message} ({}:{})", place.file(), place.line());
    }
    lock(&PANIC).get_or_insert(one_line(&message));
}

fn words(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

/// A lock that a panic elsewhere does not spoil: what it guards is valid after each statement.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use qwen3_model::comm::{Collective, Phase, Place};

    use super::*;

    /// The line that a command on three ranks ends with.
    fn line(command: impl Command) -> String {
        let options = LaunchOptions { ranks: 3, comm_timeout: 30.0, ..LaunchOptions::alone() };
        run_threads(&options, command).expect_err("the command fails").line()
    }

    fn local(problem: &str) -> CliError {
        CliError::Launch { problem: problem.to_owned() }
    }

    #[test]
    fn a_failure_that_others_do_not_know_of_ends_them_and_is_the_one_told() {
        let told = line(|rank| {
            if rank.comm().rank() == 1 {
                return Err(local("no more disk").into());
            }
            rank.comm().barrier()?;
            unreachable!("rank 1 never comes")
        });
        assert_eq!(told, "no more disk");
    }

    #[test]
    fn a_panic_is_a_line_and_ends_the_others() {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(keep_panic));
        let told = line(|rank| {
            assert!(rank.comm().rank() != 2, "two is\ntoo many");
            rank.comm().barrier()?;
            Ok(())
        });
        assert!(told.starts_with("internal error on rank 2: two is too many (crates"), "{told}");
        let told = line(|rank| {
            let _model = Model(rank);
            rank.comm().barrier()?;
            assert!(rank.comm().rank() != 1, "no such row");
            rank.comm().barrier()?;
            Ok(())
        });
        panic::set_hook(usual);
        assert!(told.starts_with("internal error on rank 1: no such row (crates"), "{told}");
    }

    /// Ends the other ranks, as a loaded model does when a panic drops it, and lets them be the
    /// first to say so.
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
    fn ranks_may_differ_in_model_threads_and_isa_only() {
        let shared = |line: &str| shared_arguments(line.split(' ').map(str::to_owned));
        let line = shared("chat --model /a --threads=4 --wire bf16 --isa avx2 --modelling");
        assert_eq!(line, "chat --wire bf16 --modelling");
        assert_eq!(line, shared("chat --threads 2 --wire bf16 --model=/b --modelling"));
        assert_ne!(line, shared("chat --wire f32 --modelling"));
    }

    #[test]
    fn the_first_rank_that_is_left_speaks() {
        let place =
            Place { collective: Collective::Allreduce, phase: Phase::Decode, layer: Some(3) };
        let failed = |missing: &[usize]| {
            CliError::from(CommError::PeerFailed {
                place,
                rank: 1,
                reason: "x".into(),
                missing: missing.to_vec(),
            })
        };
        assert!(speaks_for_all(&failed(&[]), 0) && speaks_for_all(&local("anything"), 0));
        assert!(speaks_for_all(&failed(&[0]), 1) && speaks_for_all(&failed(&[0, 1]), 2));
        assert!(!speaks_for_all(&failed(&[0]), 2) && !speaks_for_all(&failed(&[2]), 1));
        assert!(!speaks_for_all(&local("anything"), 1));
    }

    #[test]
    fn ranks_agree_on_the_lowest_failing_ranks_error() {
        let told = line(|rank| {
            let result = if rank.comm().rank() == 0 { Ok(()) } else { Err(local("broken")) };
            rank.agree(result)
        });
        assert_eq!(told, "rank 1: broken");
        let told = line(|rank| rank.share(|| Err::<u32, _>(local("unreadable"))).map(|_| ()));
        assert_eq!(told, "unreadable");
    }

    #[test]
    fn what_rank_0_reads_reaches_all() {
        let options = LaunchOptions { ranks: 3, ..LaunchOptions::alone() };
        let sum = Mutex::new(0);
        let done = run_threads(&options, |rank| {
            let words: Vec<u32> = rank.share(|| Ok(vec![7, 8]))?;
            *lock(&sum) += words.iter().sum::<u32>();
            Ok(())
        });
        assert!(done.is_ok());
        assert_eq!(*lock(&sum), 45);
    }
}
