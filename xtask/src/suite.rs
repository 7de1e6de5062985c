//! `cargo xtask test`: everything that can be tested on this machine.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::client_test::{self, Outcome};
use crate::process::{self, Output};
use crate::{mpi_test, netbench, setup, slurm, workspace};

/// A suite whose tests take longer than this hangs.
const DEADLINE: Duration = Duration::from_secs(40 * 60);
/// What the whole suite is meant to take at most, on two cores.
const BUDGET: Duration = Duration::from_secs(20 * 60);

/// Runs `cargo test` over the workspace, doc tests included, then the MPI tests, then those on
/// emulated machines; says at the end what ran.
pub fn command() -> Result<ExitCode> {
    let started = Instant::now();
    let mpi = setup::ensure(true);
    if let Err(missing) = &mpi {
        eprintln!("test: {missing}");
    }

    // Built first and outside the watched job: a compiler cache's server may outlive it.
    let built = workspace::cargo().args(["test", "--workspace", "--no-run"]).status()?;
    if !built.success() {
        println!("test: FAILED: the tests do not build");
        return Ok(ExitCode::FAILURE);
    }
    let mut command = workspace::cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    // Tests that mutate inputs run for a minute in all instead of a few seconds.
    command.env("QWEN3_FUZZ_SECONDS", "20");
    let finished = process::run(&mut command, DEADLINE, Output::Shown)?;
    let results = Results::of(&finished.stdout);
    let cargo_ok = finished.ok() && results.failed == 0 && results.passed > 0;
    let cargo_line = format!(
        "cargo test: {} passed, {} failed, {} ignored in {} programs ({:.0} s){}",
        results.passed,
        results.failed,
        results.ignored,
        results.programs,
        finished.elapsed.as_secs_f64(),
        if finished.ok() { String::new() } else { format!(": {}", finished.reason()) },
    );

    let in_ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false");
    let (mpi_ok, mpi_line) = match &mpi {
        Ok(mpi) => {
            let deadline = Duration::from_secs(mpi_test::DEADLINE_SECONDS);
            let tally = mpi_test::run(mpi, &[1, 2, 3, 4], None, deadline)?;
            (tally.ok(), format!("mpi-test: {} passed, {} failed", tally.passed, tally.failed))
        }
        Err(_) if in_ci => (false, "mpi-test: FAILED: no MPI, and CI must test it".to_owned()),
        Err(missing) => {
            (true, format!("mpi-test: SKIPPED, nothing was tested on MPI processes: {missing}"))
        }
    };

    let (failing_ok, failing_line) = match netbench::ready() {
        Ok(mpi) => {
            println!("\ntest: machines that fail");
            let ok = netbench::failures(&mpi)?;
            (ok, format!("netbench --failures: {}", if ok { "passed" } else { "FAILED" }))
        }
        Err((reason, _)) => {
            (true, format!("netbench --failures: SKIPPED, no machine failed over TCP: {reason}"))
        }
    };

    let (slurm_ok, slurm_line) = match &mpi {
        Ok(mpi) => slurm::as_part_of_all_tests(mpi),
        Err(_) => (true, "slurm-test: SKIPPED: no MPI".to_owned()),
    };

    println!("\ntest: independent clients");
    let (clients_ok, clients_line) = match client_test::run()? {
        Outcome::Ran { passed, line } => (passed, format!("client-test: {line}")),
        Outcome::Skipped(reason) => {
            (true, format!("client-test: SKIPPED, no independent client was tried: {reason}"))
        }
    };

    println!("\n{cargo_line}\n{mpi_line}\n{failing_line}\n{slurm_line}\n{clients_line}");
    let ok = cargo_ok && mpi_ok && failing_ok && slurm_ok && clients_ok;
    let took = started.elapsed();
    if took > BUDGET {
        println!(
            "test: took {:.0} s, more than the {:.0} s meant for two cores",
            took.as_secs_f64(),
            BUDGET.as_secs_f64()
        );
    }
    println!("test: {} in {:.0} s", if ok { "passed" } else { "FAILED" }, took.as_secs_f64());
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The sums of cargo's lines "test result: ok. 5 passed; 0 failed; 0 ignored; …".
#[derive(Debug, Default, PartialEq, Eq)]
struct Results {
    programs: usize,
    passed: usize,
    failed: usize,
    ignored: usize,
}

impl Results {
    fn of(output: &str) -> Results {
        let mut sum = Results::default();
        for line in output.lines().filter_map(|line| line.trim().strip_prefix("test result: ")) {
            // "ok. 5 passed", "0 failed", …: the number stands before its word.
            let count = |word: &str| {
                let part = line.split(';').find(|part| part.trim_end().ends_with(word));
                part.and_then(|part| part.split_whitespace().rev().nth(1))
                    .and_then(|n| n.parse().ok())
                    .unwrap_or(0)
            };
            sum.programs += 1;
            sum.passed += count(" passed");
            sum.failed += count(" failed");
            sum.ignored += count(" ignored");
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_s_result_lines_are_summed() {
        let output = "running 5 tests\n\
            test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\
            noise: 3 passed; 9 failed\n\
            test result: FAILED. 11 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s\n";
        assert_eq!(Results::of(output), Results { programs: 2, passed: 16, failed: 2, ignored: 1 });
        assert_eq!(Results::of(""), Results::default());
    }
}
