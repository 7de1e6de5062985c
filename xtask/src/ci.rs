//! `cargo xtask ci`: every check a change must pass, and a summary of them.

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::mpi::Bind;
use crate::{setup, suite, tidy, workspace};

/// Runs every step, also after a failed one, so that one run shows everything there is to mend.
pub fn command(no_test: bool) -> Result<ExitCode> {
    let mut steps = Steps::default();
    let mpi = setup::ensure(true);
    if let Err(missing) = &mpi {
        eprintln!("ci: {missing}");
    }

    steps.run("format", || cargo(&["fmt", "--all", "--check"]));
    steps.run("tidy", || Ok(tidy::command()? == ExitCode::SUCCESS));
    let clippy = ["clippy", "--workspace", "--all-targets"];
    let deny = ["--", "-D", "warnings"];
    steps.run("clippy", || cargo(&[&clippy[..], &deny].concat()));
    let features = workspace::mpi_features(&workspace::packages(&workspace::root())?);
    if let (Ok(mpi), Some(features)) = (&mpi, &features) {
        steps.run("clippy with MPI", || {
            let mut command = workspace::cargo();
            command.args(clippy).args(["--features", features]).args(deny);
            mpi.prepare(&mut command, Bind::None, true);
            succeeds(&mut command)
        });
    } else {
        steps.skip("clippy with MPI");
    }
    steps.run("documentation", || {
        succeeds(
            workspace::cargo()
                .args(["doc", "--workspace", "--no-deps"])
                .env("RUSTDOCFLAGS", "-D warnings"),
        )
    });
    if !no_test {
        steps.run("test", || Ok(suite::command()? == ExitCode::SUCCESS));
    }
    Ok(steps.close())
}

fn cargo(args: &[&str]) -> Result<bool> {
    succeeds(workspace::cargo().args(args))
}

fn succeeds(command: &mut Command) -> Result<bool> {
    Ok(command.status().context("cannot start cargo")?.success())
}

/// What ran, and how it went.
#[derive(Default)]
struct Steps {
    rows: Vec<String>,
    failed: usize,
}

impl Steps {
    fn run(&mut self, name: &str, step: impl FnOnce() -> Result<bool>) {
        println!("\nci: {name}");
        let started = Instant::now();
        let ok = step().unwrap_or_else(|error| {
            eprintln!("ci: {name}: {error:#}");
            false
        });
        self.failed += usize::from(!ok);
        let seconds = started.elapsed().as_secs_f64();
        self.rows
            .push(format!("{name:<16} {seconds:>7.1} s  {}", if ok { "passed" } else { "FAILED" }));
    }

    fn skip(&mut self, name: &str) {
        self.rows.push(format!("{name:<16} {:>7} -  SKIPPED: no MPI", ""));
    }

    fn close(&self) -> ExitCode {
        println!("\n{}", self.rows.join("\n"));
        println!(
            "ci: {}",
            if self.failed == 0 {
                "passed".to_owned()
            } else {
                format!("{} checks FAILED", self.failed)
            }
        );
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failed_step_fails_the_whole_and_stops_nothing() {
        let mut steps = Steps::default();
        let mut ran = Vec::new();
        for (name, result) in [
            ("a", Ok(true)),
            ("b", Ok(false)),
            ("c", Err(anyhow::anyhow!("it broke"))),
            ("d", Ok(true)),
        ] {
            steps.run(name, || {
                ran.push(name);
                result
            });
        }
        assert_eq!(ran, ["a", "b", "c", "d"]);
        assert_eq!(steps.failed, 2);
        assert_eq!(format!("{:?}", steps.close()), format!("{:?}", ExitCode::FAILURE));
        assert_eq!(format!("{:?}", Steps::default().close()), format!("{:?}", ExitCode::SUCCESS));
    }
}
