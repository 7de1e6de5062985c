//! What becomes of an MPI job when a rank fails: every scenario runs as a job of its own, which has
//! to end soon, with a status that is not zero, and with a message that names the rank and the
//! reason.

use std::env;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use comm::{CommError, Communicator, CommunicatorExt, MpiComm, MpiOptions, Phase, ReduceOp};

/// A rank that fails, and what its peers have to say. `{last}` is the last rank, `{others}` are all
/// but the first.
struct Scenario {
    name: &'static str,
    /// Runs on every rank; what it returns in the end is the error of a call.
    rank: fn(&MpiComm) -> Result<(), CommError>,
    expected: &'static [&'static str],
}

/// The scenario in which every rank says that it runs another program.
const MIXED: &str = "mixed versions";

/// The scenario in which rank 1 does not start MPI.
const ABSENT: &str = "absent";

/// The scenario in which rank 1 has other options.
const MIXED_OPTIONS: &str = "mixed options";

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "late",
        rank: |comm| {
            comm.set_timeout(Duration::from_millis(500));
            comm.ledger().set_phase(Phase::Decode);
            comm.ledger().set_layer(Some(3));
            if comm.rank() == 1 {
                thread::sleep(Duration::from_secs(60));
            }
            comm.all_reduce(&mut [1.0; 100], ReduceOp::Sum)
        },
        // Whichever rank's patience ends first.
        expected: &["Allreduce (decode, layer 3): rank ", " waited ", "s for rank 1"],
    },
    Scenario {
        name: "all others late",
        rank: |comm| {
            comm.set_timeout(Duration::from_millis(500));
            if comm.rank() > 0 {
                thread::sleep(Duration::from_secs(60));
            }
            comm.all_reduce(&mut [1.0; 100], ReduceOp::Sum)
        },
        expected: &["Allreduce (other): rank 0 waited ", "s for {others}"],
    },
    Scenario {
        name: "late root",
        rank: |comm| {
            comm.set_timeout(Duration::from_millis(500));
            if comm.rank() == comm.size() - 1 {
                thread::sleep(Duration::from_secs(60));
            }
            comm.broadcast(comm.size() - 1, &mut [0u8; 4])
        },
        // Alone or through its leader, a rank has to find the right one.
        expected: &["Broadcast (other): rank", "waited", "for rank {last}"],
    },
    Scenario {
        name: "abort",
        rank: |comm| {
            if comm.rank() == 1 {
                thread::sleep(Duration::from_millis(300));
                comm.abort("tensor 'norm.weight' is missing");
                return Ok(());
            }
            comm.barrier()
        },
        expected: &["rank 1 failed: tensor 'norm.weight' is missing"],
    },
    Scenario {
        name: "abort while a peer computes",
        rank: |comm| {
            if comm.rank() == 1 {
                comm.abort("enough");
                // Keeps its process alive: the last resort has to end the other.
                thread::sleep(Duration::from_secs(60));
            }
            thread::sleep(Duration::from_secs(60));
            Ok(())
        },
        expected: &[],
    },
    Scenario {
        name: "panic",
        rank: |comm| {
            assert_ne!(comm.rank(), 1, "as the test wants it");
            comm.recv(1, &mut [0.0f32; 1000])
        },
        expected: &["rank 1 failed: it panicked"],
    },
    Scenario {
        name: "kill",
        rank: |comm| {
            if comm.rank() == 1 {
                let own = std::process::id().to_string();
                Command::new("kill").args(["-9", &own]).status().expect("kill runs");
            }
            comm.all_gather(&[0u8; 10], &mut vec![0; 10 * comm.size()])
        },
        // The launcher may end the job before the others look.
        expected: &[],
    },
    Scenario {
        name: "mismatch",
        rank: |comm| match comm.rank() {
            1 => comm.broadcast(0, &mut [0u8; 8]),
            _ => comm.all_reduce(&mut [1.0; 8], ReduceOp::Sum),
        },
        expected: &[
            "calls do not match",
            "Allreduce (sum) of 8 elements as f32",
            "Broadcast of 8 bytes from root 0",
        ],
    },
    Scenario {
        name: MIXED,
        rank: |_| unreachable!("ranks of different versions have started"),
        expected: &[
            "rank 0 with 'test of rank 0 (comm ",
            "rank 1 with 'test of rank 1 (comm ",
            "expected the same program",
        ],
    },
    Scenario {
        name: ABSENT,
        rank: |_| unreachable!("all ranks but one have started"),
        expected: &["the ranks have not all been connected by MPI within 1s"],
    },
    Scenario {
        name: MIXED_OPTIONS,
        rank: |_| unreachable!("ranks with different options have started"),
        expected: &["rank 1 with 'test (comm ", "), shared memory off, taken for 7 machines'"],
    },
    Scenario {
        name: "leave",
        rank: |comm| if comm.rank() == 1 { Ok(()) } else { comm.recv(1, &mut [0u8; 8]) },
        expected: &["rank 1 failed: it left"],
    },
];

/// The ways of `tests/mpi.rs`, as the environment says them.
const WAYS: &[&[(&str, &str)]] = &[&[], &[("COMM_SHARED_MEMORY", "off")], &[("COMM_NODES", "2")]];

fn launch(scenario: &Scenario, ranks: usize, way: &[(&str, &str)]) -> Result<(), String> {
    let start = Instant::now();
    // `cargo xtask mpi-test` names another launcher where there are several; each ignores the
    // settings of the others.
    let mut child = Command::new(env::var_os("MPIRUN").unwrap_or_else(|| "mpirun".into()))
        .args(["-n", &ranks.to_string()])
        .arg(env::current_exe().expect("a path"))
        .args(["--scenario", scenario.name])
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
        .envs([
            ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
            ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
        ])
        .envs(way.iter().copied())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("mpirun does not start: {error}"))?;
    while child.try_wait().map_err(|error| error.to_string())?.is_none() {
        if start.elapsed() > Duration::from_secs(20) {
            let _ = child.kill();
            return Err("the job hangs".into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stderr);
    let limit = Duration::from_secs(8);
    if output.status.success() {
        return Err(format!("the job succeeds\n{text}"));
    }
    if start.elapsed() > limit {
        return Err(format!("the job took {:?}\n{text}", start.elapsed()));
    }
    // A leader that waits for its own machine does not know yet who is late on others.
    let leads = ranks == 3 && way.iter().any(|(name, _)| *name == "COMM_NODES");
    let others = if ranks == 2 || leads { "rank 1" } else { "ranks 1 and 2" };
    let fill =
        |part: &&str| part.replace("{last}", &(ranks - 1).to_string()).replace("{others}", others);
    let parts = scenario.expected.iter().map(fill);
    match parts.into_iter().find(|part| !text.contains(part)) {
        Some(part) => Err(format!("no message has '{part}'\n{text}")),
        None => Ok(()),
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().collect();
    if let [_, flag, name] = &arguments[..]
        && flag == "--scenario"
    {
        let scenario = SCENARIOS.iter().find(|scenario| scenario.name == name).expect("a scenario");
        let mut options = MpiOptions::from_env().expect("the environment makes sense");
        let rank = ["OMPI_COMM_WORLD_RANK", "PMI_RANK"].iter().find_map(|name| env::var(name).ok());
        let rank = rank.expect("the launcher tells the rank");
        options.program = "test".into();
        if name == MIXED {
            options.program = format!("test of rank {rank}");
        }
        if name == ABSENT {
            options.start_timeout = Duration::from_secs(1);
            if rank == "1" {
                thread::sleep(Duration::from_secs(60));
            }
        }
        if name == MIXED_OPTIONS && rank == "1" {
            (options.shared_memory, options.nodes) = (false, Some(7));
        }
        let comm = match MpiComm::init_with(&options) {
            Ok(comm) => comm,
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::FAILURE;
            }
        };
        comm.barrier().expect("all ranks are there");
        return match (scenario.rank)(&comm) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error on rank {}: {error}", comm.rank());
                ExitCode::FAILURE
            }
        };
    }
    if env::var_os("OMPI_COMM_WORLD_SIZE").is_some() || env::var_os("PMI_SIZE").is_some() {
        println!("0 passed, 0 failed: these tests start their own jobs, run them without mpirun");
        return ExitCode::SUCCESS;
    }
    let of_way =
        |way| SCENARIOS.iter().flat_map(move |scenario| [2, 3].map(|ranks| (scenario, ranks, way)));
    let jobs = Mutex::new(WAYS.iter().flat_map(of_way));
    let next = || jobs.lock().expect("no worker panics").next();
    let (passed, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // Jobs mostly wait: two at a time take little longer than one.
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((scenario, ranks, way)) = next() {
                    match launch(scenario, ranks, way) {
                        Ok(()) => _ = passed.fetch_add(1, Relaxed),
                        Err(error) => {
                            failed.fetch_add(1, Relaxed);
                            println!("'{}' on {ranks} ranks {way:?}: {error}", scenario.name);
                        }
                    }
                }
            });
        }
    });
    let (passed, failed) = (passed.into_inner(), failed.into_inner());
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
