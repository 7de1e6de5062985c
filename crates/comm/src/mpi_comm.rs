//! The communicator of a process that `mpirun` (or another launcher of MPI programs) started.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;
use std::{env, io, thread};

use crate::alarm::{Alarm, Ending, Membership};
use crate::cost::node_of;
use crate::endpoint::{End, Endpoint};
use crate::error::{CommError, Ranks};
use crate::mpi_job::{Job, Lookout, clocks, process_space, share};
use crate::mpi_sys::{self, CORE_WORDS, Process, World};
use crate::nodes::Nodes;
use crate::segment::Segment;
use crate::transport::Transport;

/// One rank of an MPI job.
///
/// Ranks of one machine use its memory, others exchange messages, and where there are several
/// machines with several ranks each, collectives go up to one rank of each machine, across and
/// down. A process that dies, or calls [`abort`](crate::Communicator::abort), fails the calls of
/// all others within a moment; a job that has not ended by itself some seconds after a failure is
/// ended by MPI.
pub struct MpiComm {
    end: Endpoint,
    parts: Parts,
    path: &'static str,
}

/// What a communicator of all ranks is made of, whatever its options.
#[derive(Clone)]
struct Parts {
    world: Arc<World>,
    clocks: Arc<[i64]>,
    membership: Arc<Membership>,
    /// For each rank, the first rank of its machine.
    physical: Vec<usize>,
    spin: bool,
}

/// What is not found out: who runs, and ways to run that are mostly for tests and measurements.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct MpiOptions {
    /// Whether ranks of one machine use its memory. Off: all data goes through MPI.
    pub shared_memory: bool,
    /// Takes ranks, in equal runs, for those of this many machines.
    pub nodes: Option<usize>,
    /// How long the start may take, until all ranks are connected; then the process says so and
    /// ends. Ranks may differ.
    pub start_timeout: Duration,
    /// The program and its build, a commit or a digest of its sources: what ranks of one machine
    /// share in memory, and how they round, changes between builds. Ranks on which it or another
    /// option differs are refused at the start.
    pub program: String,
}

impl Default for MpiOptions {
    fn default() -> Self {
        let start_timeout = Duration::from_secs(120);
        MpiOptions { shared_memory: true, nodes: None, start_timeout, program: String::new() }
    }
}

fn setup(reason: String) -> CommError {
    CommError::Setup { transport: "mpi", reason }
}

impl MpiOptions {
    /// The options in the environment: `COMM_SHARED_MEMORY` (`on` or `off`), `COMM_NODES` (a
    /// number), `COMM_START_TIMEOUT` (seconds). A value that does not parse is an error.
    pub fn from_env() -> Result<MpiOptions, CommError> {
        let mut options = MpiOptions::default();
        let read = |name: &str| env::var(name).ok();
        if let Some(text) = read("COMM_SHARED_MEMORY") {
            options.shared_memory = match &text[..] {
                "on" => true,
                "off" => false,
                _ => {
                    return Err(setup(format!(
                        "COMM_SHARED_MEMORY is '{text}', expected on or off"
                    )));
                }
            };
        }
        if let Some(text) = read("COMM_NODES") {
            let nodes = text.parse().ok().filter(|&nodes: &usize| nodes > 0);
            let expected = || setup(format!("COMM_NODES is '{text}', expected a number above 0"));
            options.nodes = Some(nodes.ok_or_else(expected)?);
        }
        if let Some(text) = read("COMM_START_TIMEOUT") {
            let seconds =
                text.parse().ok().filter(|seconds: &f64| *seconds > 0.0 && *seconds <= 1e6);
            let expected = || {
                setup(format!(
                    "COMM_START_TIMEOUT is '{text}', expected seconds above 0, at most 1e6"
                ))
            };
            options.start_timeout = Duration::from_secs_f64(seconds.ok_or_else(expected)?);
        }
        Ok(options)
    }
}

/// Ends this process, with a word, unless what is returned is dropped within `limit`. MPI itself
/// waits for ever for a rank that does not come, or that cannot be reached.
fn connect_within(limit: Duration) -> Result<mpsc::Sender<()>, CommError> {
    let (connecting, end) = mpsc::channel();
    let line = format!(
        "error: the ranks have not all been connected by MPI within {limit:?} of the start of this one (COMM_START_TIMEOUT); \
         are all started, and may their hosts reach each other on any port?\n"
    );
    let watch = move || {
        if end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            // At once, and whether or not anybody can read it.
            let _ = io::stderr().write_all(line.as_bytes());
            std::process::exit(1);
        }
    };
    let started = thread::Builder::new().name("start of MPI".into()).spawn(watch);
    let thread = "the thread that watches the start of MPI".to_owned();
    started.map_err(|error| CommError::Thread { thread, reason: error.to_string() })?;
    Ok(connecting)
}

/// Bytes of what a rank says of itself at the start; the same in all versions, since it is
/// exchanged before anything else.
const INTRODUCTION: usize = 256;

/// What this rank runs, and how it is to communicate, in as many words as every rank sends.
fn introduce(options: &MpiOptions) -> [u64; INTRODUCTION / 8] {
    let MpiOptions { shared_memory, nodes, program, .. } = options;
    let library = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));
    let mut text =
        if program.is_empty() { library.to_owned() } else { format!("{program} ({library})") };
    if !shared_memory {
        text += ", shared memory off";
    }
    if let Some(nodes) = nodes {
        text += &format!(", taken for {nodes} machines");
    }
    let mut bytes = [0; INTRODUCTION];
    bytes.iter_mut().zip(text.bytes()).for_each(|(byte, letter)| *byte = letter);
    bytemuck::cast(bytes)
}

/// Fails where ranks run different programs or versions, or have other options, with the words of
/// each: they cannot work together.
fn compare(introductions: &[u64]) -> Result<(), CommError> {
    let mut programs: Vec<(&[u64], Vec<usize>)> = Vec::new();
    for (rank, text) in introductions.chunks_exact(INTRODUCTION / 8).enumerate() {
        match programs.iter_mut().find(|(other, _)| *other == text) {
            Some((_, ranks)) => ranks.push(rank),
            None => programs.push((text, vec![rank])),
        }
    }
    if programs.len() <= 1 {
        return Ok(());
    }
    let words = |(text, ranks): &(&[u64], Vec<usize>)| {
        let text = String::from_utf8_lossy(bytemuck::cast_slice(text)).into_owned();
        format!("{} with '{}'", Ranks(ranks), text.trim_end_matches('\0'))
    };
    let found = programs.iter().map(words).collect::<Vec<_>>().join(", ");
    Err(setup(format!(
        "found {found}; expected the same program, version and options on all ranks"
    )))
}

/// The name and version of the MPI library in use, for example `Open MPI v4.1.6`. MPI need not be
/// started.
pub fn mpi_library() -> String {
    let text = mpi::environment::library_version().unwrap_or_default();
    // Open MPI writes one line with commas, MPICH a table.
    let line = text.lines().next().unwrap_or_default().split([',', '\0']).next();
    line.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

impl MpiComm {
    /// Starts MPI, once per process, with the options of the environment.
    pub fn init() -> Result<MpiComm, CommError> {
        MpiComm::init_with(&MpiOptions::from_env()?)
    }

    /// Starts MPI, once per process. The options are the same on all ranks.
    pub fn init_with(options: &MpiOptions) -> Result<MpiComm, CommError> {
        let _connecting = connect_within(options.start_timeout)?;
        let world = Arc::new(World::start()?);
        let (rank, size) = (world.rank(), world.size());
        // All ranks come to the same result.
        compare(&world.all_gather(&introduce(options))?)
            .inspect_err(|_| world.set_ending(Ending::Early))?;
        let physical = world.machines()?;
        let clocks = clocks(&world)?;
        let mut gather = |words: &[u64]| world.all_gather(words);

        // The board of the ranks of a machine, and a watch over all that it does not show.
        let machine = machines(options, &physical);
        let together = |other: &usize| options.shared_memory && machine[*other] == machine[rank];
        let local: Vec<usize> = (0..size).filter(together).collect();
        let local = if local.len() > 1 { local } else { vec![] };
        let words = Alarm::board_bytes(size);
        let board = share(&local, rank, words, 0, &mut gather)?;
        let sees_board = |other: usize| board.is_some() && local.contains(&other);
        let far = (0..size).filter(|&other| other != rank && !sees_board(other)).collect();
        let processes = gather(&[std::process::id() as u64, process_space()])?;
        let near = (0..size).filter(|&other| {
            let visible = processes[2 * other + 1] != 0
                && processes[2 * other + 1] == processes[2 * rank + 1];
            other != rank && physical[other] == physical[rank] && visible
        });
        let near = near
            .filter_map(|other| Some((other, Process::new(processes[2 * other] as u32)?)))
            .collect();
        let spin = enough_cores(&gather(&mpi_sys::cores())?, &physical, rank);

        // From here on the watch sees to it.
        world.set_ending(Ending::Early);
        let board = board.unwrap_or_else(|| Arc::new(Segment::private(words, 0)));
        let alarm = Alarm::new(board, Some(Box::new(Lookout::new(world.clone(), far, near))));
        let membership = Arc::new(Membership { alarm, rank, size });
        let parts = Parts { world, clocks, membership: membership.clone(), physical, spin };
        MpiComm::connect(parts, options).inspect_err(|error| membership.fail(&error.to_string()))
    }

    /// Another communicator of all ranks, with other options and a ledger of its own: to compare
    /// ways to communicate within one job. Collective, and the options are the same on all ranks.
    pub fn with_options(&self, options: &MpiOptions) -> Result<MpiComm, CommError> {
        MpiComm::connect(self.parts.clone(), options)
    }

    fn connect(parts: Parts, options: &MpiOptions) -> Result<MpiComm, CommError> {
        let Parts { world, clocks, membership, physical, spin } = parts.clone();
        let (rank, size) = (world.rank(), world.size());
        let machine: Arc<[usize]> = machines(options, &physical).into();
        let job = Arc::new(Job {
            world: world.clone(),
            clocks,
            machine: machine.clone(),
            shared: options.shared_memory,
        });
        let ranks: Vec<usize> = (0..size).collect();
        let mut gather = |words: &[u64]| world.all_gather(words);
        let nodes = Nodes::connect(&job, &ranks, std::slice::from_ref(&ranks), rank, &mut gather)?;
        let path = nodes.path;
        let transport = (size > 1).then(|| Box::new(nodes) as Box<dyn Transport>);
        let end = Endpoint::new("mpi", machine, membership, transport, spin);
        Ok(MpiComm { end, parts, path })
    }

    /// What carries the data of this rank's collectives: `"shared memory"` where all ranks are on
    /// one machine, `"messages"` where each is alone on its own, or `"shared memory and messages"`.
    pub fn path(&self) -> &'static str {
        self.path
    }
}

/// For each rank, a number that it shares with the ranks of its machine, real or made up by the
/// options.
fn machines(options: &MpiOptions, physical: &[usize]) -> Vec<usize> {
    let size = physical.len();
    match options.nodes {
        Some(nodes) => (0..size).map(|rank| node_of(rank, size, nodes.min(size))).collect(),
        None => physical.to_vec(),
    }
}

/// Whether the ranks of this machine have a core each.
fn enough_cores(cores: &[u64], machine: &[usize], rank: usize) -> bool {
    let local = (0..machine.len()).filter(|&other| machine[other] == machine[rank]);
    let mut all = [0; CORE_WORDS];
    let mut ranks = 0;
    for other in local {
        ranks += 1;
        for (word, more) in all.iter_mut().zip(&cores[CORE_WORDS * other..]) {
            *word |= more;
        }
    }
    all.iter().map(|word| word.count_ones() as usize).sum::<usize>() >= ranks
}

impl End for MpiComm {
    fn end(&self) -> &Endpoint {
        &self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_programs_are_named_with_their_ranks() {
        let of = |program: &&str| {
            introduce(&MpiOptions { program: (*program).to_owned(), ..MpiOptions::default() })
        };
        let words = |programs: &[&str]| programs.iter().flat_map(of).collect::<Vec<_>>();
        assert_eq!(compare(&words(&["a 1", "a 1", "a 1"])), Ok(()));
        assert_eq!(compare(&words(&[&"long ".repeat(100), &"long ".repeat(100)])), Ok(()));
        let error = compare(&words(&["a 1", "", "a 2", "a 1", "a 2"])).unwrap_err().to_string();
        let library = concat!("comm ", env!("CARGO_PKG_VERSION"));
        let found = format!(
            "ranks 0 and 3 with 'a 1 ({library})', rank 1 with '{library}', ranks 2 and 4 with 'a 2 ({library})'"
        );
        let expected = "expected the same program, version and options on all ranks";
        assert_eq!(error, format!("cannot set up the mpi transport: found {found}; {expected}"));
    }

    #[test]
    fn cores_are_counted_once_and_per_machine() {
        let mut cores = [0; 3 * CORE_WORDS];
        cores[0] = 0b11;
        cores[CORE_WORDS] = 0b10;
        cores[2 * CORE_WORDS] = 0b1;
        assert!(enough_cores(&cores, &[0, 0, 2], 0));
        assert!(enough_cores(&cores, &[0, 0, 2], 2));
        assert!(!enough_cores(&cores, &[0, 0, 0], 1));
    }
}
