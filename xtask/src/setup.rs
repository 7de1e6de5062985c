//! `cargo xtask setup`: makes MPI usable on this machine, or says exactly what would.

use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::mpi::{Bind, Mpi, Parts};
use crate::packages::{self, Manager, Right};
use crate::process::{self, Output};

/// Two ranks add up a megabyte and rank 0 says so: shows that wrapper, library and launcher belong
/// together (a launcher of another MPI starts two worlds of one rank each) and that messages of a
/// real size get through.
const PROBE: &str = r#"
#include <mpi.h>
#include <stdio.h>
static double sent[1 << 17], received[1 << 17];
int main(int argc, char **argv) {
    int rank, size, right = 0;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    for (int i = 0; i < 1 << 17; i++) sent[i] = rank + i;
    MPI_Allreduce(sent, received, 1 << 17, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    for (int i = 0; i < 1 << 17; i++) right += received[i] == 1 + 2.0 * i;
    if (rank == 0) printf("ranks=%d right=%d\n", size, right);
    MPI_Finalize();
    return 0;
}
"#;
const PROBE_ANSWER: &str = "ranks=2 right=131072";

/// Why there is no MPI.
#[derive(Debug)]
pub enum Missing {
    /// Parts are not installed and this user may not install them, or asked for nothing to be
    /// installed.
    NotInstalled {
        /// The parts.
        parts: Vec<&'static str>,
        /// What a person has to do.
        advice: String,
    },
    /// The package manager was asked and failed.
    InstallFailed {
        /// What it said.
        reason: String,
    },
    /// All parts are there, and a program of two ranks does not run.
    DoesNotRun {
        /// What was seen.
        reason: String,
    },
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Missing::NotInstalled { parts, advice } => {
                write!(f, "MPI is not installed (missing: {}). {advice}", parts.join(", "))
            }
            Missing::InstallFailed { reason } => write!(f, "MPI could not be installed: {reason}"),
            Missing::DoesNotRun { reason } => {
                write!(f, "MPI is installed, but does not work: {reason}")
            }
        }
    }
}

impl std::error::Error for Missing {}

impl Missing {
    /// The exit status of `setup`, as its help text lists them.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Missing::NotInstalled { .. } => 3,
            Missing::InstallFailed { .. } => 4,
            Missing::DoesNotRun { .. } => 5,
        })
    }
}

/// The MPI of this machine, installed first where it is missing and this user may.
pub fn ensure(install: bool) -> Result<Mpi, Missing> {
    let mut parts = Parts::find();
    if missing(&parts).is_empty() {
        return verified(&parts);
    }
    let Some(manager) = Manager::detect() else {
        return Err(Missing::NotInstalled {
            parts: missing(&parts),
            advice: "Install an MPI with its compiler wrapper (Open MPI or MPICH), libclang and a C compiler, \
                     or put them on PATH (often: module load openmpi; LIBCLANG_PATH names libclang's folder)."
                .to_owned(),
        });
    };
    let right = Right::detect();
    let commands = manager.commands(&manager.packages(&parts), manager.lists_missing());
    let never = std::env::var_os("XTASK_INSTALL").is_some_and(|value| value == "never");
    if !install || never || right == Right::Missing {
        let advice = format!("Run: {}", packages::shell_line(&commands, right));
        return Err(Missing::NotInstalled { parts: missing(&parts), advice });
    }
    eprintln!("setup: missing: {}", missing(&parts).join(", "));
    let installed = packages::install(&commands, right).or_else(|error| {
        // Old package lists name versions that the mirrors no longer have.
        if commands.len() > 1 {
            return Err(error);
        }
        eprintln!("setup: {error}; trying once more with fresh package lists");
        packages::install(&manager.commands(&manager.packages(&parts), true), right)
    });
    if let Err(error) = installed {
        let line = packages::shell_line(&commands, right);
        return Err(Missing::InstallFailed { reason: format!("{error}. To try again: {line}") });
    }
    parts = Parts::find();
    if !missing(&parts).is_empty() {
        let reason = format!(
            "the packages are installed, but there is still no {}",
            missing(&parts).join(", ")
        );
        return Err(Missing::InstallFailed { reason });
    }
    verified(&parts)
}

/// `cargo xtask setup`.
pub fn command(check: bool) -> ExitCode {
    let outcome = ensure(!check);
    for (name, path) in Parts::find().named() {
        println!(
            "{name:<11} {}",
            path.map_or("missing".to_owned(), |path| path.display().to_string())
        );
    }
    match outcome {
        Ok(mpi) => {
            println!("{:<11} {}: a program of two ranks compiles and runs", "MPI", mpi.version);
            println!("setup: ready");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            println!("setup: {reason}");
            reason.exit_code()
        }
    }
}

fn missing(parts: &Parts) -> Vec<&'static str> {
    parts.named().into_iter().filter(|(_, path)| path.is_none()).map(|(name, _)| name).collect()
}

fn verified(parts: &Parts) -> Result<Mpi, Missing> {
    let probed = || -> Result<Mpi> {
        let mpi = Mpi::from_parts(parts)?;
        probe(&mpi)?;
        Ok(mpi)
    };
    probed().map_err(|error| Missing::DoesNotRun { reason: format!("{error:#}") })
}

fn probe(mpi: &Mpi) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a folder for the probe program")?;
    let (source, program) = (folder.path().join("probe.c"), folder.path().join("probe"));
    std::fs::write(&source, PROBE).context("cannot write the probe program")?;
    let mut compile = Command::new(&mpi.mpicc);
    compile.arg(&source).arg("-o").arg(&program);
    mpi.prepare(&mut compile, Bind::None, true);
    let output =
        compile.output().with_context(|| format!("cannot start {}", mpi.mpicc.display()))?;
    if !output.status.success() {
        let first =
            String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned();
        bail!("{} does not compile a small program: {first}", mpi.mpicc.display());
    }
    let mut launch = mpi.launcher(2, None, Bind::None, program.as_os_str());
    let finished = process::run(&mut launch, Duration::from_secs(60), Output::Silent)?;
    let answers: Vec<&str> =
        finished.stdout.lines().filter(|line| line.starts_with("ranks=")).collect();
    if answers == [PROBE_ANSWER] && finished.ok() {
        return Ok(());
    }
    let line = format!("{} -n 2", mpi.mpirun.display());
    match answers[..] {
        [] => bail!("{line} of a small program: {}", finished.reason()),
        [PROBE_ANSWER] => {
            bail!("{line} of a small program gave the right answer, then: {}", finished.reason())
        }
        [first, ..] if first.starts_with("ranks=1 ") => {
            bail!(
                "{line} started separate worlds of one rank: {} and {} belong to different MPIs",
                mpi.mpirun.display(),
                mpi.mpicc.display()
            )
        }
        [other, ..] => {
            bail!("{line} of a small program answered {other:?} instead of {PROBE_ANSWER:?}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mpi::Implementation;

    /// A launcher and a wrapper that are shell scripts, so that each way of being broken can be had
    /// anywhere.
    fn fake(wrapper: &str, launcher: &str) -> (tempfile::TempDir, Mpi) {
        let folder = tempfile::tempdir().unwrap();
        let script = |name: &str, body: &str| {
            let path = folder.path().join(name);
            // Another process writes the file: were it open for writing here, a child that another
            // test's thread starts at that moment would hold it open too, and the script could not
            // be executed ("text file busy").
            let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod +x "$0""#;
            let status =
                Command::new("sh").arg("-c").arg(write).arg(&path).arg(body).status().unwrap();
            assert!(status.success());
            path
        };
        let mpi = Mpi {
            mpicc: script("mpicc", wrapper),
            mpirun: script("mpirun", launcher),
            implementation: Implementation::Other,
            version: "fake".to_owned(),
        };
        (folder, mpi)
    }

    #[test]
    fn every_way_of_not_working_is_told() {
        let outcome = |wrapper: &str, launcher: &str| {
            let (_folder, mpi) = fake(wrapper, launcher);
            probe(&mpi).map_err(|error| error.to_string())
        };
        outcome("exit 0", "echo ranks=2 right=131072").unwrap();
        let error = outcome("echo mpi.h: no such file >&2; exit 1", "exit 0").unwrap_err();
        assert!(error.contains("mpi.h: no such file"), "{error}");
        let error = outcome("exit 0", "echo ranks=1 right=0; echo ranks=1 right=0").unwrap_err();
        assert!(error.contains("belong to different MPIs"), "{error}");
        let error = outcome("exit 0", "echo ranks=2 right=7").unwrap_err();
        assert!(error.contains("right=7"), "{error}");
        let error = outcome("exit 0", "exit 9").unwrap_err();
        assert!(error.contains("exit status: 9"), "{error}");
        let error = outcome("exit 0", "echo ranks=2 right=131072; exit 3").unwrap_err();
        assert!(error.contains("right answer, then: exit status: 3"), "{error}");
    }

    #[test]
    fn each_reason_has_its_exit_status() {
        let codes = [
            Missing::NotInstalled { parts: vec!["mpicc"], advice: "Run: x".into() },
            Missing::InstallFailed { reason: "no network".into() },
            Missing::DoesNotRun { reason: "hung".into() },
        ]
        .map(|missing| format!("{:?}", missing.exit_code()));
        assert_eq!(codes, [3, 4, 5].map(|code| format!("{:?}", ExitCode::from(code))));
    }
}
