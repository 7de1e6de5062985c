//! `cargo xtask slurm-test`: the program under a SLURM of two emulated nodes on this machine.
//!
//! A folder of its own holds a munge key, a configuration and the spool folders; munged, slurmctld
//! and one slurmd per node run from it and end with the command. Nothing else of the machine's
//! SLURM, if there is one, is read or changed.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::mpi::{Implementation, Mpi};
use crate::packages::{self, Manager, Right};
use crate::process::{self, Job};
use crate::{launch, setup, workspace};

/// The programs that the test starts.
const PROGRAMS: [&str; 6] = ["munged", "slurmctld", "slurmd", "srun", "salloc", "sbatch"];
/// Debian's packages of these programs.
const DEBIAN_PACKAGES: [&str; 5] =
    ["munge", "slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins"];
/// How long the daemons may take until both nodes are idle.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long one job may take.
const JOB_TIMEOUT: Duration = Duration::from_secs(120);
/// The page whose batch script is tested.
const PAGE: &str = "docs/clusters.md";

/// Runs the test, or says what is missing; then nothing was tested and the exit status is 3.
pub fn command() -> Result<ExitCode> {
    if let Err(reason) = programs() {
        println!("slurm-test: SKIPPED, nothing was tested under SLURM: {reason}");
        return Ok(ExitCode::from(3));
    }
    let mpi = setup::ensure(true)?;
    run(&mpi)?;
    println!("slurm-test: passed");
    Ok(ExitCode::SUCCESS)
}

/// The test as a part of `cargo xtask test`, which installs no SLURM: whether nothing failed, and a
/// line about it.
pub fn as_part_of_all_tests(mpi: &Mpi) -> (bool, String) {
    if let Some(missing) = PROGRAMS.into_iter().find(|name| find(name).is_none()) {
        return (true, format!("slurm-test: SKIPPED, {missing} is not installed"));
    }
    match run(mpi) {
        Ok(()) => (true, "slurm-test: passed".to_owned()),
        Err(error) => (false, format!("slurm-test: FAILED: {error:#}")),
    }
}

/// Installs what is missing where that is possible; the error says what a person has to do.
fn programs() -> Result<()> {
    let missing = || PROGRAMS.into_iter().filter(|name| find(name).is_none()).collect::<Vec<_>>();
    if missing().is_empty() {
        return Ok(());
    }
    let Some(manager @ Manager::Apt) = Manager::detect() else {
        bail!("not installed: {}; install munge and SLURM", missing().join(", "));
    };
    let right = Right::detect();
    let commands = manager.commands(&DEBIAN_PACKAGES, manager.lists_missing());
    let never = std::env::var_os("XTASK_INSTALL").is_some_and(|value| value == "never");
    if never || right == Right::Missing {
        bail!(
            "not installed: {}; run: {}",
            missing().join(", "),
            packages::shell_line(&commands, right)
        );
    }
    packages::install(&commands, right)?;
    ensure!(
        missing().is_empty(),
        "still not there after the installation: {}",
        missing().join(", ")
    );
    Ok(())
}

fn find(program: &str) -> Option<PathBuf> {
    process::find_program(program, &["/usr/sbin".into(), "/sbin".into()])
}

/// Starts the emulated cluster and runs the same generation by every way that the page documents.
fn run(mpi: &Mpi) -> Result<()> {
    let program = launch::build_for_tests(mpi)?;
    let model = workspace::root().join("models/austen");
    let cluster = Cluster::start()?;
    let arguments = |command: &mut Command| {
        command.args(["generate", "--prompt", "It is a truth", "--max-new-tokens", "12", "--json"]);
        command.arg("--model").arg(&model);
    };
    let mut alone = Command::new(&program);
    arguments(&mut alone);
    let expected =
        ids(&process::answer(&mut alone, "one rank", &cluster.folder(), JOB_TIMEOUT)?.stdout)?;

    let plugin = match mpi.implementation {
        Implementation::OpenMpi => "pmix",
        Implementation::Hydra | Implementation::Other => "pmi2",
    };
    let mut srun = cluster.client("srun");
    srun.args(["-N2", "-n2", &format!("--mpi={plugin}")]).arg(&program);
    arguments(&mut srun);
    let mut salloc = cluster.client("salloc");
    salloc.args(["-N2", "-n2"]).arg(&mpi.mpirun).args(["-n", "2"]).arg(&program);
    arguments(&mut salloc);
    // Open MPI refuses to run as root, which tests in containers do.
    salloc.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    for (name, mut command) in
        [(format!("srun --mpi={plugin}"), srun), ("mpirun in salloc".to_owned(), salloc)]
    {
        let finished = process::answer(&mut command, &name, &cluster.folder(), JOB_TIMEOUT)?;
        let found = ids(&finished.stdout)?;
        ensure!(
            found == expected,
            "{name}: ids {found:?}, expected those of one rank, {expected:?}"
        );
        println!("slurm-test: {name}: passed");
    }

    let found = ids(&cluster.batch(&program, &model, plugin)?)?;
    ensure!(!found.is_empty(), "sbatch: no token was generated");
    println!("slurm-test: the batch script of {PAGE}: passed");
    Ok(())
}

/// The generated ids of the one JSON object that `generate --json` prints.
fn ids(output: &str) -> Result<Vec<u64>> {
    let line = output.lines().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("no JSON object in {output:?}"))?;
    let answer: Value = serde_json::from_str(line).with_context(|| format!("{line:?}"))?;
    let ids = answer["ids"].as_array().with_context(|| format!("no ids in {line}"))?;
    Ok(ids.iter().filter_map(Value::as_u64).collect())
}

/// The daemons of an emulated cluster; they end when this value is dropped.
struct Cluster {
    folder: tempfile::TempDir,
    /// The nodes first, the controller and munged last.
    _daemons: Vec<Job>,
}

impl Cluster {
    fn start() -> Result<Cluster> {
        let folder = tempfile::Builder::new().prefix("slurm").tempdir()?;
        let root = folder.path();
        for name in ["munge", "state", "spool-node1", "spool-node2", "tmp-node1", "tmp-node2"] {
            fs::create_dir(root.join(name))?;
        }
        // munged refuses a folder that others may write to.
        fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
        let munge = root.join("munge");
        fs::set_permissions(&munge, fs::Permissions::from_mode(0o755))?;
        let mut key = fs::File::open("/dev/urandom").context("cannot open /dev/urandom")?;
        let mut bytes = [0; 128];
        std::io::Read::read_exact(&mut key, &mut bytes)?;
        fs::write(munge.join("key"), bytes)?;
        fs::set_permissions(munge.join("key"), fs::Permissions::from_mode(0o400))?;
        fs::write(root.join("slurm.conf"), configuration(root)?)?;

        let mut munged = daemon("munged")?;
        munged.args(["--foreground", "--force"]);
        for (option, file) in
            [("key", "key"), ("socket", "socket"), ("pid", "pid"), ("seed", "seed"), ("log", "log")]
        {
            let option =
                if option == "socket" { "--socket".to_owned() } else { format!("--{option}-file") };
            munged.arg(option).arg(munge.join(file));
        }
        let mut daemons = vec![Job::start(&mut munged)?];
        let start = |program: &str, args: &[&str]| -> Result<Job> {
            let mut command = daemon(program)?;
            command.env("SLURM_CONF", root.join("slurm.conf")).arg("-D").args(args);
            Job::start(&mut command)
        };
        daemons.insert(0, start("slurmctld", &[])?);
        for node in ["node1", "node2"] {
            daemons.insert(0, start("slurmd", &["-N", node])?);
        }
        let cluster = Cluster { folder, _daemons: daemons };
        cluster.wait_for_nodes()?;
        Ok(cluster)
    }

    fn folder(&self) -> PathBuf {
        self.folder.path().to_path_buf()
    }

    /// A client program that talks to this cluster.
    fn client(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("SLURM_CONF", self.folder.path().join("slurm.conf"));
        command
    }

    fn wait_for_nodes(&self) -> Result<()> {
        let until = Instant::now() + START_TIMEOUT;
        loop {
            let output = self.client("sinfo").args(["-h", "-N", "-o", "%T"]).output()?;
            let states = String::from_utf8_lossy(&output.stdout).into_owned();
            if states.split_whitespace().collect::<Vec<_>>() == ["idle", "idle"] {
                return Ok(());
            }
            if Instant::now() > until {
                let log = fs::read_to_string(self.folder.path().join("slurmctld.log"));
                bail!(
                    "the nodes are not idle within {START_TIMEOUT:?}, but {states:?}\n{}",
                    log.unwrap_or_default()
                );
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Submits the batch script of the page, for this cluster's size, and returns its output.
    fn batch(&self, program: &Path, model: &Path, plugin: &str) -> Result<String> {
        let page = fs::read_to_string(workspace::root().join(PAGE))?;
        let prompt = self.folder.path().join("prompt.txt");
        fs::write(&prompt, "It is a truth")?;
        let path = |path: &Path| path.display().to_string();
        let script = script(&page)?
            .replace("--nodes=4", "--nodes=2")
            .replace("--ntasks-per-node=2", "--ntasks-per-node=1")
            .replace("--cpus-per-task=16", "--cpus-per-task=1")
            .replace("--mpi=pmix", &format!("--mpi={plugin}"))
            .replace("target/release/qwen3", &path(program))
            .replace("/data/Qwen3-8B", &path(model))
            .replace("prompt.txt", &path(&prompt));
        let file = self.folder.path().join("job.sh");
        fs::write(&file, script)?;
        let output = self.folder.path().join("job.out");
        let mut sbatch = self.client("sbatch");
        sbatch.args(["--wait", "--output"]).arg(&output).arg(&file);
        let finished = process::answer(&mut sbatch, "sbatch", self.folder.path(), JOB_TIMEOUT);
        let text = fs::read_to_string(&output).unwrap_or_default();
        finished.with_context(|| format!("the job printed {text:?}"))?;
        Ok(text)
    }
}

fn daemon(program: &str) -> Result<Command> {
    let path = find(program).with_context(|| format!("{program} is not installed"))?;
    let mut command = Command::new(path);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command)
}

/// The first batch script of the page.
fn script(page: &str) -> Result<&str> {
    let start = page.find("#!/bin/bash").with_context(|| format!("no batch script in {PAGE}"))?;
    let length = page[start..].find("```").with_context(|| format!("{PAGE}: an open fence"))?;
    Ok(&page[start..start + length])
}

/// Two nodes with one address, told apart by their ports, spool folders and folders for temporary
/// files.
fn configuration(root: &Path) -> Result<String> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let host = host.split('.').next().unwrap_or("localhost").to_owned();
    // Held together, so that they differ.
    let listeners: Vec<TcpListener> =
        (0..3).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    let ports: Vec<u16> =
        listeners.iter().map(|l| Ok(l.local_addr()?.port())).collect::<Result<_>>()?;
    let [controller, node1, node2] = ports[..] else { bail!("three ports were asked for") };
    let user = if rustix::process::getuid().is_root() { "root" } else { "nobody" };
    ensure!(user == "root", "the emulated nodes start jobs as their user and need root");
    let root = root.display();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    Ok(format!(
        "ClusterName=emulated
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
SlurmctldPort={controller}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
TmpFS={root}/tmp-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1} CPUs={cores}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2} CPUs={cores}
PartitionName=all Nodes=node1,node2 Default=YES State=UP
"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_of_the_page_passes_its_options_to_the_right_program() {
        let page = fs::read_to_string(workspace::root().join(PAGE)).unwrap();
        let script = script(&page).unwrap();
        let directives = script.lines().filter(|line| line.starts_with("#SBATCH"));
        // sbatch refuses this option, which belongs to srun.
        assert!(
            directives.into_iter().all(|line| !line.contains("--kill-on-bad-exit")),
            "{script}"
        );
        assert!(
            script.contains("srun --mpi=") && script.contains("--kill-on-bad-exit=1"),
            "{script}"
        );
    }

    #[test]
    fn ids_are_read_from_the_json_line() {
        assert_eq!(ids("srun: ready\n{\"ids\":[3,5],\"stop\":\"limit\"}\n").unwrap(), [3, 5]);
        assert!(ids("nothing").is_err());
    }
}
