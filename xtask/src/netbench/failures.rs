//! What becomes of a job over TCP when a rank is killed or told to end, or a machine loses its
//! network: all ranks are gone within seconds, and one message says where and whom they missed.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::cluster::{self, Cluster, Net};
use super::launcher;
use crate::mpi::{Implementation, Mpi};
use crate::process::{Job, Signal, signal};

const RANKS: usize = 3;
/// The rank to which it happens.
const VICTIM: usize = RANKS - 1;
/// So slow that a prompt takes a second and an answer of the small model half a minute: no scenario
/// comes too late.
const NET: Net = Net { gbit: 0.01, delay_us: None };
/// `--comm-timeout` where the network fails, and what ranks have beyond it.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Where a process fails, everything is gone after this.
const SOON: Duration = Duration::from_secs(5);
/// Starting the ranks takes no longer.
const START: Duration = Duration::from_secs(30);

/// What happens to the victim.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Event {
    Signal(Signal),
    CutLink,
}

/// When it happens.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Moment {
    Load,
    Prefill,
    Decode,
}

struct Scenario {
    name: &'static str,
    event: Event,
    moment: Moment,
    /// Words of one line, for Open MPI and for MPICH.
    open_mpi: &'static [&'static str],
    mpich: &'static [&'static str],
}

/// MPICH's launcher kills all ranks at once when one is gone, and says so itself.
const SCENARIOS: [Scenario; 5] = [
    Scenario {
        name: "kill -9 in load",
        event: Event::Signal(Signal::KILL),
        moment: Moment::Load,
        // The small model is loaded within milliseconds, so the rank may be gone a little earlier
        // or later than its load; the message names it in any case.
        open_mpi: &["error: ", "rank 2"],
        mpich: &["BAD TERMINATION"],
    },
    Scenario {
        name: "kill -9 in prefill",
        event: Event::Signal(Signal::KILL),
        moment: Moment::Prefill,
        open_mpi: &["error: ", "(prefill, layer ", "rank 2"],
        mpich: &["BAD TERMINATION"],
    },
    Scenario {
        name: "kill -9 in decode",
        event: Event::Signal(Signal::KILL),
        moment: Moment::Decode,
        open_mpi: &["error: ", "(decode", "rank 2"],
        mpich: &["BAD TERMINATION"],
    },
    Scenario {
        name: "SIGTERM in decode",
        event: Event::Signal(Signal::TERM),
        moment: Moment::Decode,
        open_mpi: &["error: ", "(decode", "rank 2 failed: it was told to end (SIGTERM)"],
        mpich: &["error: ", "(decode", "rank 2 failed: it was told to end (SIGTERM)"],
    },
    // A message that reached one rank only leaves the other a call behind: then it is missed, too.
    Scenario {
        name: "a link that goes down in decode",
        event: Event::CutLink,
        moment: Moment::Decode,
        open_mpi: &["error: ", "(decode", " waited 2.", "s for rank", " 2"],
        mpich: &["error: ", "(decode", " waited 2.", "s for rank", " 2"],
    },
];

/// Plays every scenario; returns how many ended otherwise than they should.
pub fn check(mpi: &Mpi, program: &Path, model: &Path, files: &Path) -> Result<usize> {
    let mut failed = 0;
    for scenario in &SCENARIOS {
        let once = || {
            // A cluster of its own: what one scenario leaves of the network is no good for the
            // next.
            let cluster = Cluster::build(RANKS, &cluster::cores(), NET, files.to_path_buf())?;
            play(scenario, mpi, &cluster, program, model)
        };
        let ending = once();
        match ending {
            Ok(message) => println!("failures: {}: {message}", scenario.name),
            Err(error) => {
                failed += 1;
                println!("failures: {}: FAILED: {error:#}", scenario.name);
            }
        }
    }
    println!(
        "failures: {} passed, {failed} failed ({} over TCP, {RANKS} ranks)",
        SCENARIOS.len() - failed,
        mpi.version
    );
    Ok(failed)
}

/// How the scenario ended, in one line.
fn play(
    scenario: &Scenario,
    mpi: &Mpi,
    cluster: &Cluster,
    program: &Path,
    model: &Path,
) -> Result<String> {
    let [answer, said] = ["answer", "said"].map(|name| cluster.folder().join(name));
    let file = |path: &Path| {
        fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))
    };
    let (timeout, limit) = match scenario.event {
        Event::CutLink => (TIMEOUT, TIMEOUT + SOON),
        Event::Signal(_) => (START, SOON),
    };
    let prompt = vec!["7"; if scenario.moment == Moment::Prefill { 1024 } else { 4 }].join(",");
    let mut command = launcher::command(mpi, cluster, program);
    command.args(["generate", "--tokens", &prompt, "--max-new-tokens", "3000", "--ignore-eos"]);
    command.args(["--threads", "1", "--strategy", "heads", "--wire", "f32", "--model"]).arg(model);
    command.args(["--comm-timeout", &timeout.as_secs().to_string()]);
    let before = cluster.traffic()?;
    // Launchers differ in which of their outputs has the ranks' errors and their own.
    let mut job = Job::start(command.stdout(file(&answer)?).stderr(file(&said)?))?;
    let text = || {
        let text = [&said, &answer]
            .map(|path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned());
        text.concat()
    };

    let come = |job: &Job| -> Result<bool> {
        Ok(match scenario.moment {
            Moment::Load => {
                ranks(job).into_iter().any(|(rank, process)| rank == VICTIM && loads(process))
            }
            // More than the start of a job sends, less than the sums of the prompt.
            Moment::Prefill => cluster.traffic()? - before > 500_000,
            Moment::Decode => fs::metadata(&answer)?.len() > 0,
        })
    };
    let started = Instant::now();
    while !come(&job)? {
        let pause = if scenario.moment == Moment::Load { 1 } else { 20 };
        if let Some(status) = job.wait(Duration::from_millis(pause))? {
            bail!("the job ended by itself ({status})\n{}", text());
        }
        if started.elapsed() > START {
            bail!("the job does not start\n{}", text());
        }
    }
    let ranks = ranks(&job);
    let victim = ranks.iter().find(|(rank, _)| *rank == VICTIM);
    let &(_, victim) =
        victim.with_context(|| format!("no rank {VICTIM} among {ranks:?}\n{}", text()))?;
    match scenario.event {
        Event::Signal(kind) => signal(victim, kind),
        Event::CutLink => cluster.cut(VICTIM)?,
    }
    let happened = Instant::now();
    while !self::ranks(&job).is_empty() {
        if happened.elapsed() > limit {
            bail!(
                "{} ranks still run after {} s\n{}",
                self::ranks(&job).len(),
                limit.as_secs(),
                text()
            );
        }
        thread::sleep(Duration::from_millis(20));
    }
    let gone = happened.elapsed();
    // A launcher waits for its daemon behind a dead link for as long as TCP does. It is killed with
    // the job.
    let status =
        if scenario.event == Event::CutLink { None } else { job.wait(limit.saturating_sub(gone))? };
    match status {
        Some(status) if status.success() => bail!("the job ended with status 0\n{}", text()),
        None if scenario.event != Event::CutLink => {
            bail!("the launcher still runs after {} s\n{}", limit.as_secs(), text())
        }
        _ => {}
    }
    let expected = if mpi.implementation == Implementation::Hydra {
        scenario.mpich
    } else {
        scenario.open_mpi
    };
    let text = text();
    // A rank may wait for others beside the lost one: `ranks 0 and 2`.
    let says = |line: &str, words: &str| {
        let several = words.strip_prefix("rank ").map(|rank| format!(" and {rank}"));
        line.contains(words) || several.is_some_and(|several| line.contains(&several))
    };
    let line = text.lines().find(|line| expected.iter().all(|words| says(line, words)));
    let line = line.with_context(|| format!("no line with {expected:?}\n{text}"))?;
    if text.contains("panicked") {
        bail!("a rank panicked\n{text}");
    }
    Ok(format!("ranks gone after {:.1} s: {}", gone.as_secs_f64(), line.trim()))
}

/// Whether a process reads its share of the weights: it has read more than everything else that it
/// reads takes.
fn loads(process: u32) -> bool {
    let counters = fs::read_to_string(format!("/proc/{process}/io")).unwrap_or_default();
    let read = counters.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse().ok());
    read.is_some_and(|bytes: u64| bytes > 2_000_000)
}

/// The ranks of a job that run: number and process.
fn ranks(job: &Job) -> Vec<(usize, u32)> {
    let rank = |process: u32| {
        let name = fs::read_to_string(format!("/proc/{process}/comm")).ok()?;
        let environment = fs::read(format!("/proc/{process}/environ")).ok()?;
        let number = |variable: &[u8]| {
            let text = std::str::from_utf8(variable).ok()?;
            let (name, value) = text.split_once('=')?;
            if matches!(name, "OMPI_COMM_WORLD_RANK" | "PMI_RANK") {
                value.parse().ok()
            } else {
                None
            }
        };
        let rank = environment.split(|&byte| byte == 0).find_map(number)?;
        (name.trim_end() == "qwen3").then_some((rank, process))
    };
    job.processes().into_iter().filter_map(rank).collect()
}
