//! `cargo xtask netbench`: one rank on each machine of an emulated cluster, real TCP between them, measured and predicted.
//!
//! The cluster is made of Linux network namespaces on this machine. It runs below a process of its own that is root of
//! its own namespaces, so that nothing of it is seen outside: no address, bridge or route of this machine changes,
//! no packet leaves, and when that process ends, however it ends, the kernel takes processes and network away with it.

mod cluster;
mod launcher;
mod results;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::mpi::{Implementation, Mpi, Parts};
use crate::process::{self, Output};
use crate::report::Lab;
use crate::{launch, setup};
use cluster::{Cluster, Net};
use results::{Network, Run};

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
/// No single run of the program takes longer.
const DEADLINE: Duration = Duration::from_secs(180);
/// Nor do all together.
const ALL: Duration = Duration::from_secs(3600);
/// The exit status of a skipped command, as of one that misses MPI.
const SKIPPED: u8 = 3;
const STRATEGIES: [&str; 2] = ["heads", "sequence"];
const WIRES: [&str; 3] = ["f32", "bf16", "q8"];

/// What to measure.
#[derive(clap::Args, Clone, Debug)]
pub struct NetbenchArgs {
    /// Few layers, short prompts, one repetition: to see that it works
    #[arg(long)]
    pub quick: bool,
    /// Write the results to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Numbers of ranks, each on a machine of its own; machines share the cores of this one
    #[arg(short = 'n', long, value_delimiter = ',', default_value = "2,4", value_name = "N,..", value_parser = clap::value_parser!(u16).range(2..=64))]
    pub ranks: Vec<u16>,
    /// Speeds of the links in Gbit/s
    #[arg(long, value_delimiter = ',', default_value = "1,10,25", value_name = "G,..", value_parser = gbit)]
    pub gbit: Vec<f64>,
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

/// Prompt, generated tokens and repetitions of a bench.
fn extent(quick: bool) -> [usize; 3] {
    if quick { [64, 8, 1] } else { [256, 32, 3] }
}

/// The command, outside and inside of the namespaces.
pub fn command(args: &NetbenchArgs) -> Result<ExitCode> {
    if let Some([program, model]) = args.inside.as_deref() {
        die_with_parent();
        cluster::own_folder(&files_of(program))?;
        inside(args, program, model)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(reason) = obstacle() {
        println!("netbench: SKIPPED: {reason}");
        return Ok(ExitCode::from(SKIPPED));
    }
    let mpi = match setup::ensure(true) {
        Ok(mpi) => mpi,
        Err(missing) => {
            println!("netbench: SKIPPED: {missing}");
            return Ok(missing.exit_code());
        }
    };
    if mpi.implementation == Implementation::Other {
        println!("netbench: SKIPPED: {}: only Open MPI and MPICH are known to start ranks in namespaces", mpi.version);
        return Ok(ExitCode::from(SKIPPED));
    }
    let program = launch::build_program(Some(&mpi))?;
    let files = files_of(&program);
    std::fs::create_dir_all(&files).with_context(|| format!("cannot make {}", files.display()))?;
    let model = Lab::with(program.clone(), args.quick)?.synth("0.6b", args.quick.then_some(4))?;
    outside(args, &program, &model)
}

/// The folder for files of the run, which stays empty outside of the namespaces.
fn files_of(program: &Path) -> PathBuf {
    program.with_file_name("netbench")
}

/// Runs this program once more, inside of new namespaces, and stays as the hand that holds it.
fn outside(args: &NetbenchArgs, program: &Path, model: &Path) -> Result<ExitCode> {
    let list = |values: &[String]| values.join(",");
    let mut command = namespaces();
    command.arg(std::env::current_exe().context("this program has no path")?).arg("netbench");
    command.args(["--ranks", &list(&args.ranks.iter().map(u16::to_string).collect::<Vec<_>>())]);
    command.args(["--gbit", &list(&args.gbit.iter().map(f64::to_string).collect::<Vec<_>>())]);
    command.args(["--delay-us", &args.delay_us.to_string()]);
    command.args(args.quick.then_some("--quick"));
    if let Some(file) = &args.json {
        command.arg("--json").arg(file);
    }
    command.arg("--inside").arg(program).arg(model);
    // Its input stays open as long as this process lives.
    let mut child = command.stdin(Stdio::piped()).spawn().context("cannot start unshare")?;
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        if started.elapsed() > ALL {
            child.kill().ok();
            child.wait()?;
            bail!("netbench took longer than {} s", ALL.as_secs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Ends this process, the first of its namespaces, when the process that holds its input ends: Ctrl-C reaches that one,
/// while the first process of a namespace is spared such signals.
fn die_with_parent() {
    std::thread::spawn(|| {
        let mut rest = Vec::new();
        std::io::stdin().read_to_end(&mut rest).ok();
        std::process::exit(130);
    });
}

/// `unshare` with the namespaces of the cluster, to which a program is added: root there, also for a user who is not root here.
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
    // What the cluster needs, done once: the right to make namespaces, and a kernel that has bridges, pairs and tbf.
    let script = "ip link add try0 type bridge && ip link add try1 type veth peer name try2 && \
                  ip link set try1 master try0 && tc qdisc add dev try2 root tbf rate 1gbit burst 4000 latency 10ms";
    let tried = namespaces().args(["sh", "-c", script]).env("PATH", search_path()).stdin(Stdio::null()).output();
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

/// Inside of the namespaces: measures every network and shows and writes what came of it.
fn inside(args: &NetbenchArgs, program: &Path, model: &Path) -> Result<()> {
    let mpi = Mpi::from_parts(&Parts::find())?;
    let files = files_of(program);
    let cores = cluster::cores();
    let delay_us = cluster::can_delay().then_some(args.delay_us);
    if delay_us.is_none() {
        println!("netbench: this kernel has no netem: links have their speed and no delay of their own");
    }
    let [prompt, generated, reps] = extent(args.quick);
    let (prompt, generated, reps) = (prompt.to_string(), generated.to_string(), reps.to_string());
    let bench = |more: &[&str]| -> Vec<String> {
        let common = ["bench", "--json", "--threads", "1", "--prompt-len", &prompt, "--gen-len", &generated];
        let model = model.to_string_lossy();
        [&common[..], &["--reps", &reps, "--model", &model], more].concat().iter().map(|&a| a.to_owned()).collect()
    };
    let mut networks = Vec::new();
    for &ranks in &args.ranks {
        for &gbit in &args.gbit {
            let cluster = Cluster::build(usize::from(ranks), &cores, Net { gbit, delay_us }, files.clone())?;
            let calibration = files.join("calibration.json");
            std::fs::remove_file(&calibration).ok();
            let file = calibration.to_string_lossy().into_owned();
            let on_cluster = |args: &[String]| -> Result<Value> {
                let before = cluster.traffic()?;
                let mut command = launcher::command(&mpi, &cluster, program);
                let value = answer(command.args(args), args, &files)?;
                Ok(json!({ "answer": value, "network_bytes": cluster.traffic()? - before }))
            };
            let words = |args: &[&str]| args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>();
            let calibrated = on_cluster(&words(&["calibrate", "--json", "--threads", "1", "--output", &file]))?;
            let mut network = Network::of(&calibrated["answer"]["machine"], gbit, usize::from(ranks))?;
            for wire in WIRES {
                let (count, model) = (ranks.to_string(), model.to_string_lossy());
                let plan = words(&[
                    "plan",
                    "--json",
                    "--model",
                    &model,
                    "--ranks",
                    &count,
                    "--nodes",
                    &count,
                    "--threads",
                    "1",
                    "--calibration",
                    &file,
                    "--prompt",
                    &prompt,
                    "--generate",
                    &generated,
                    "--wire",
                    wire,
                ]);
                let plan = answer(Command::new(program).args(&plan), &plan, &files)?;
                for strategy in STRATEGIES {
                    let measured = on_cluster(&bench(&["--strategy", strategy, "--wire", wire]))?;
                    network.runs.push(Run::of(&measured, &plan, strategy, wire)?);
                }
            }
            println!("{}", network.table());
            networks.push(network.json());
        }
    }
    if let Some(file) = &args.json {
        let alone = answer(Command::new(program).args(bench(&[])), &bench(&[]), &files)?;
        let all = json!({
            "mpi": mpi.version, "cores": cores.len(), "quick": args.quick, "delay_us": delay_us,
            "model": model.file_name().map(|name| name.to_string_lossy()), "prompt": prompt, "generated": generated,
            "one_rank": alone["results"], "networks": networks,
        });
        std::fs::write(file, format!("{all:#}\n")).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// The JSON that a run of the program prints. What it and its launcher say beside is shown where the run fails.
fn answer(command: &mut Command, args: &[String], files: &Path) -> Result<Value> {
    let said = files.join("stderr");
    let log = std::fs::File::create(&said).with_context(|| format!("cannot write {}", said.display()))?;
    let finished = process::run(command.stderr(log), DEADLINE, Output::Collected)?;
    if !finished.ok() {
        let text = std::fs::read_to_string(&said).unwrap_or_default();
        // MPICH's launcher complains on standard output.
        bail!("qwen3 {}: {}\n{}{}", args.join(" "), finished.reason(), finished.stdout, text.trim_end());
    }
    serde_json::from_str(&finished.stdout).with_context(|| format!("qwen3 {} printed no JSON", args.join(" ")))
}
