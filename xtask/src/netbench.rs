//! `cargo xtask netbench`: one rank on each machine of an emulated cluster, real TCP between them:
//! how fast it is beside what was predicted, and what becomes of it when a machine fails.
//!
//! The cluster is made of Linux network namespaces on this machine. It runs below a process of its
//! own that is root of its own namespaces, so that nothing of it is seen outside: no address,
//! bridge or route of this machine changes, no packet leaves, and when that process ends, however
//! it ends, the kernel takes processes and network away with it.

mod cluster;
mod launcher;
mod results;
mod speeds;
mod failures;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::mpi::{Implementation, Mpi, Parts};
use crate::report::Lab;
use crate::{launch, process, setup, workspace};

/// Programs that make namespaces, links and their limits, with what brings them.
const TOOLS: [(&str, &str); 8] = [
    ("unshare", "util-linux"),
    ("nsenter", "util-linux"),
    ("taskset", "util-linux"),
    ("mount", "util-linux"),
    ("hostname", "hostname"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("sh", "a shell"),
];
/// All runs together take no longer.
const ALL: Duration = Duration::from_secs(3600);
/// The exit status of a skipped command, as of one that misses MPI.
const SKIPPED: u8 = 3;

/// What to measure.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct NetbenchArgs {
    /// Measure nothing: kill ranks, end them, cut their links, and see that all ends soon and says
    /// why
    #[arg(long)]
    pub failures: bool,
    /// Few layers, short prompts, one repetition: to see that it works
    #[arg(long)]
    pub quick: bool,
    /// Write the results to this file, after each network those so far
    #[arg(long, value_name = "FILE", conflicts_with = "failures")]
    pub json: Option<PathBuf>,
    /// Numbers of ranks, each on a machine of its own; machines share the cores of this one
    #[arg(short = 'n', long, value_delimiter = ',', default_value = "2,4", value_name = "N,..", value_parser = clap::value_parser!(u16).range(2..=64))]
    pub ranks: Vec<u16>,
    /// Speeds of the links in Gbit/s
    #[arg(long, value_delimiter = ',', default_value = "1,10,25", value_name = "G,..", value_parser = gbit)]
    pub gbit: Vec<f64>,
    /// Tokens of the prompt; keys and values of long ones go round the ranks that split positions
    /// [default: 256, quick 64]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=16_384))]
    pub prompt: Option<u16>,
    /// Delay of the links in microseconds, where the kernel can delay packets
    #[arg(long, default_value_t = 20, value_name = "US")]
    pub delay_us: u32,
    /// Set for the process inside the namespaces: the built program and the checkpoint
    #[arg(long, hide = true, num_args = 2)]
    pub inside: Option<Vec<PathBuf>>,
}

fn gbit(text: &str) -> Result<f64, String> {
    let fits = |gbit: &f64| (0.01..=400.0).contains(gbit);
    text.parse().ok().filter(fits).ok_or_else(|| "expected Gbit/s from 0.01 to 400".to_owned())
}

/// How a measurement ended.
#[derive(Clone, PartialEq, Debug)]
pub enum Outcome {
    /// All was measured.
    Done,
    /// Something is missing on this machine, and nothing was measured: the reason.
    Skipped(String),
    /// What was there did not work; standard output and standard error have the reason.
    Failed(ExitCode),
}

/// The command, outside and inside of the namespaces.
pub fn command(args: &NetbenchArgs) -> Result<ExitCode> {
    if let Some([program, model]) = args.inside.as_deref() {
        return inside(args, program, model);
    }
    Ok(match run(args)? {
        Outcome::Done => ExitCode::SUCCESS,
        Outcome::Skipped(_) => ExitCode::from(SKIPPED),
        Outcome::Failed(status) => status,
    })
}

/// The command outside of the namespaces.
pub fn run(args: &NetbenchArgs) -> Result<Outcome> {
    let mpi = match ready() {
        Ok(mpi) => mpi,
        Err((reason, status)) => return Ok(not_ready(reason, status)),
    };
    let done = if args.failures {
        failures(&mpi)?
    } else {
        let program = launch::build_program(Some(&mpi))?;
        let model =
            Lab::with(program.clone(), args.quick)?.synth("0.6b", args.quick.then_some(4))?;
        outside(args, &program, &model)?
    };
    Ok(if done { Outcome::Done } else { Outcome::Failed(ExitCode::FAILURE) })
}

/// An MPI that cannot be installed, or that does not run, is not one that is merely missing.
fn not_ready(reason: String, status: ExitCode) -> Outcome {
    if status == ExitCode::from(SKIPPED) {
        println!("netbench: SKIPPED: {reason}");
        return Outcome::Skipped(reason);
    }
    println!("netbench: FAILED: {reason}");
    Outcome::Failed(status)
}

/// The MPI to use, or what is missing for clusters on this machine and the exit status that says
/// so.
pub fn ready() -> Result<Mpi, (String, ExitCode)> {
    let skipped = |reason| Err((reason, ExitCode::from(SKIPPED)));
    if let Some(reason) = obstacle() {
        return skipped(reason);
    }
    match setup::ensure(true) {
        Err(missing) => Err((missing.to_string(), missing.exit_code())),
        Ok(mpi) if mpi.implementation == Implementation::Other => skipped(format!(
            "{}: only Open MPI and MPICH are known to start ranks in namespaces",
            mpi.version
        )),
        Ok(mpi) => Ok(mpi),
    }
}

/// Whether all ends as it should where a machine fails; how it ended is printed.
pub fn failures(mpi: &Mpi) -> Result<bool> {
    let program = launch::build_for_tests(mpi)?;
    let args = NetbenchArgs { failures: true, ..NetbenchArgs::default() };
    outside(&args, &program, &workspace::root().join("models/austen"))
}

/// The folder for files of the run, which stays empty outside of the namespaces.
fn files_of(program: &Path) -> PathBuf {
    program.with_file_name("netbench")
}

/// Runs this program once more, inside of new namespaces, and stays as the hand that holds it;
/// whether it succeeds.
fn outside(args: &NetbenchArgs, program: &Path, model: &Path) -> Result<bool> {
    let files = files_of(program);
    std::fs::create_dir_all(&files).with_context(|| format!("cannot make {}", files.display()))?;
    let mut command = namespaces();
    command.arg(std::env::current_exe().context("this program has no path")?).arg("netbench");
    command.args(args.quick.then_some("--quick")).args(args.failures.then_some("--failures"));
    for ranks in &args.ranks {
        command.args(["--ranks", &ranks.to_string()]);
    }
    for gbit in &args.gbit {
        command.args(["--gbit", &gbit.to_string()]);
    }
    if let Some(prompt) = args.prompt {
        command.args(["--prompt", &prompt.to_string()]);
    }
    command.args(["--delay-us", &args.delay_us.to_string()]);
    if let Some(file) = &args.json {
        command.arg("--json").arg(file);
    }
    command.arg("--inside").arg(program).arg(model);
    // Its input stays open as long as this process lives.
    let mut child = command.stdin(Stdio::piped()).spawn().context("cannot start unshare")?;
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if started.elapsed() > ALL {
            child.kill().ok();
            child.wait()?;
            bail!("netbench took longer than {} s", ALL.as_secs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What runs inside of the namespaces.
fn inside(args: &NetbenchArgs, program: &Path, model: &Path) -> Result<ExitCode> {
    die_with_parent();
    let files = files_of(program);
    cluster::own_folder(&files)?;
    let mpi = Mpi::from_parts(&Parts::find())?;
    if args.failures {
        let failed = failures::check(&mpi, program, model, &files)?;
        return Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    speeds::measure(args, &mpi, program, model, &files)?;
    Ok(ExitCode::SUCCESS)
}

/// Ends this process, the first of its namespaces, when the process that holds its input ends:
/// Ctrl-C reaches that one, while the first process of a namespace is spared such signals.
fn die_with_parent() {
    std::thread::spawn(|| {
        let mut rest = Vec::new();
        std::io::stdin().read_to_end(&mut rest).ok();
        std::process::exit(130);
    });
}

/// `unshare` with the namespaces of the cluster, to which a program is added: root there, also for
/// a user who is not root here.
fn namespaces() -> Command {
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--net", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "--"]);
    command
}

/// What is missing on this machine, if something is.
fn obstacle() -> Option<String> {
    let missing: Vec<String> = TOOLS
        .iter()
        .filter(|(tool, _)| process::find_program(tool, &sbin()).is_none())
        .map(|(tool, package)| format!("{tool} ({package})"))
        .collect();
    if !missing.is_empty() {
        return Some(format!("not installed: {}", missing.join(", ")));
    }
    // What the cluster needs, done once: the right to make namespaces, and a kernel that has
    // bridges, pairs and tbf.
    let script = "ip link add try0 type bridge && ip link add try1 type veth peer name try2 && \
                  ip link set try1 master try0 && tc qdisc add dev try2 root tbf rate 1gbit burst 4000 latency 10ms";
    let tried = namespaces()
        .args(["sh", "-c", script])
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Some(format!(
                "this user or kernel cannot make network namespaces, bridges and limits: {} (as root, or with user \
                 namespaces, it works)",
                said.trim().lines().last().unwrap_or("no reason was given")
            ))
        }
        Err(error) => Some(format!("cannot start unshare: {error}")),
    }
}

/// Where `ip` and `tc` lie for users whose `PATH` has no folder of the administrator's.
fn sbin() -> Vec<PathBuf> {
    ["/usr/sbin", "/sbin"].map(PathBuf::from).to_vec()
}

fn search_path() -> std::ffi::OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(sbin());
    std::env::join_paths(folders).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: NetbenchArgs,
    }

    #[test]
    fn results_are_written_where_there_are_some() {
        let parse = |words: &[&str]| {
            Cli::try_parse_from([&["netbench"], words].concat()).map(|cli| cli.args)
        };
        assert_eq!(parse(&["--json", "x"]).unwrap().json, Some("x".into()));
        assert!(parse(&["--failures"]).unwrap().failures);
        assert!(parse(&["--failures", "--json", "x"]).is_err());
    }

    #[test]
    fn only_what_is_missing_is_skipped() {
        let outcome = |status: u8| not_ready("no MPI".to_owned(), ExitCode::from(status));
        assert_eq!(outcome(3), Outcome::Skipped("no MPI".to_owned()));
        assert_eq!(outcome(4), Outcome::Failed(ExitCode::from(4)));
    }
}
