//! `cargo xtask mpi-test`: the tests that need real MPI processes, on several rank counts.
//!
//! Such a test is a program (`tests/mpi.rs` with `harness = false`) that runs its checks on
//! whatever world it finds; rank 0 ends with a line "N passed, M failed", and a failure anywhere
//! gives a non-zero status. Tests of what becomes of a whole job start their jobs themselves.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::mpi::{Bind, Mpi};
use crate::process::{self, Finished, Output};
use crate::setup;
use crate::workspace::{self, Executable};

/// The packages that have such tests, lowest first.
const PACKAGES: [&str; 4] = ["comm", "ops", "qwen3-model", "engine"];

/// Tests that no launcher starts: the package, and the test's name. Some start their own jobs; the
/// package's own name stands for the tests in its sources, of which `cargo test` sees only those
/// that do without MPI.
const ALONE: [(&str, &str); 3] =
    [("comm", "comm"), ("comm", "mpi_failures"), ("qwen3-cli", "mpirun")];

/// Default deadline of one run.
pub const DEADLINE_SECONDS: u64 = 300;

/// What all runs together gave.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Runs in which every check passed.
    pub passed: usize,
    /// The others.
    pub failed: usize,
}

impl Tally {
    /// Whether something ran and nothing failed.
    pub fn ok(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }
}

/// The command of its own: MPI must be there.
pub fn command(ranks: &[usize], package: Option<&str>, deadline: u64) -> Result<ExitCode> {
    let mpi = setup::ensure(true)?;
    let tally = run(&mpi, ranks, package, Duration::from_secs(deadline))?;
    Ok(if tally.ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds and runs the tests, shows their output, and prints a table and the closing line.
pub fn run(mpi: &Mpi, ranks: &[usize], package: Option<&str>, deadline: Duration) -> Result<Tally> {
    if ranks.is_empty() || ranks.contains(&0) {
        bail!("-n {ranks:?}: rank counts start at 1");
    }
    let launched = select(package)?;
    let mut rows = Vec::new();
    let mut tally = Tally::default();
    let mut judge_run = |name: &str, count: &str, finished: &Finished| {
        let outcome = judge(finished);
        println!(
            "mpi-test: {name} on {count}: {} ({:.1} s)",
            text(&outcome),
            finished.elapsed.as_secs_f64()
        );
        *if outcome.is_ok() { &mut tally.passed } else { &mut tally.failed } += 1;
        rows.push(format!(
            "{name:<12} {count:>5} {:>8.1}  {}",
            finished.elapsed.as_secs_f64(),
            text(&outcome)
        ));
    };
    for (name, executable) in build(mpi, &launched)? {
        for &count in ranks {
            println!("\nmpi-test: {name} on {count} {}", if count == 1 { "rank" } else { "ranks" });
            let mut command = mpi.launcher(count, None, Bind::None, executable.path.as_os_str());
            judge_run(
                name,
                &count.to_string(),
                &run_in_package(&mut command, &executable, deadline)?,
            );
        }
    }
    let alone: Vec<_> =
        ALONE.into_iter().filter(|(name, _)| package.is_none_or(|only| only == *name)).collect();
    for (name, executable) in build(mpi, &alone)? {
        println!("\nmpi-test: {name}, {}", executable.target);
        let mut command = Command::new(&executable.path);
        mpi.prepare(&mut command, Bind::None, true);
        judge_run(name, "alone", &run_in_package(&mut command, &executable, deadline)?);
    }
    println!(
        "\n{:<12} {:>5} {:>8}  result ({})\n{}",
        "package",
        "ranks",
        "seconds",
        mpi.version,
        rows.join("\n")
    );
    println!("mpi-test: {} passed, {} failed", tally.passed, tally.failed);
    Ok(tally)
}

/// The tests to launch on ranks: all, or those of one package. A package whose tests all start
/// alone has none.
fn select(only: Option<&str>) -> Result<Vec<(&'static str, &'static str)>> {
    let all = || PACKAGES.into_iter().chain(["qwen3-cli"]);
    if let Some(name) = only.filter(|&name| all().all(|known| known != name)) {
        bail!("-p {name}: MPI tests belong to {}", all().collect::<Vec<_>>().join(", "));
    }
    Ok(PACKAGES
        .into_iter()
        .filter(|&name| only.is_none_or(|only| only == name))
        .map(|name| (name, "mpi"))
        .collect())
}

/// The executables of some tests, in their order.
fn build<'a>(mpi: &Mpi, tests: &[(&'a str, &str)]) -> Result<Vec<(&'a str, Executable)>> {
    if tests.is_empty() {
        return Ok(Vec::new());
    }
    let started = Instant::now();
    let mut command = workspace::cargo();
    command.args(["test", "--no-run"]);
    for (package, test) in tests {
        match test == package {
            true => command.arg("--lib"),
            false => command.args(["--test", test]),
        };
        command.args(["--package", package, "--features", &format!("{package}/mpi")]);
    }
    mpi.prepare(&mut command, Bind::None, true);
    let mut built = workspace::build(&mut command)?;
    let mut found = Vec::new();
    for &(package, test) in tests {
        let folder = workspace::root().join("crates").join(package);
        let place = built.iter().position(|made| made.package == folder && made.target == test);
        let place = place.with_context(|| format!("cargo built no test {test} of {package}"))?;
        found.push((package, built.swap_remove(place)));
    }
    println!(
        "mpi-test: built {} programs in {:.1} s",
        found.len(),
        started.elapsed().as_secs_f64()
    );
    Ok(found)
}

/// Runs a test as `cargo test` does.
fn run_in_package(
    command: &mut Command,
    executable: &Executable,
    deadline: Duration,
) -> Result<Finished> {
    command.current_dir(&executable.package).env("CARGO_MANIFEST_DIR", &executable.package);
    process::run(command, deadline, Output::Shown)
}

/// How many checks passed, or why the run counts as failed.
fn judge(finished: &Finished) -> Result<usize, String> {
    if !finished.ok() {
        return Err(finished.reason());
    }
    let counts: Vec<(usize, usize)> = finished.stdout.lines().filter_map(counts).collect();
    match counts[..] {
        [(0, 0)] => Err("status 0, but no check was run".to_owned()),
        [(passed, 0)] => Ok(passed),
        [(_, failed)] => Err(format!("status 0, but {failed} checks failed")),
        [] => Err("status 0, but no line \"N passed, M failed\"".to_owned()),
        _ => Err(format!(
            "{} ranks took themselves for rank 0: program and launcher belong to different MPIs",
            counts.len()
        )),
    }
}

/// The numbers of a line that contains "N passed, M failed", or with a semicolon as cargo's harness
/// writes it.
fn counts(line: &str) -> Option<(usize, usize)> {
    let (before, after) = line.split_once(" passed, ").or_else(|| line.split_once(" passed; "))?;
    let passed = before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    let failed = after.split_once(" failed")?.0.parse().ok()?;
    Some((passed, failed))
}

fn text(outcome: &Result<usize, String>) -> String {
    match outcome {
        Ok(passed) => format!("{passed} checks passed"),
        Err(reason) => format!("FAILED: {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(script: &str) -> Finished {
        let mut command = Command::new("sh");
        process::run(command.args(["-c", script]), Duration::from_secs(20), Output::Silent).unwrap()
    }

    #[test]
    fn a_run_passes_only_when_one_rank_says_so() {
        assert_eq!(judge(&ended("echo comm on 3 ranks: 41 passed, 0 failed")), Ok(41));
        assert_eq!(judge(&ended("echo 'test result: ok. 3 passed; 0 failed; 0 ignored'")), Ok(3));
        let reason = |script: &str| judge(&ended(script)).unwrap_err();
        assert!(reason("echo 41 passed, 0 failed; exit 1").contains("exit status: 1"));
        assert!(reason("echo 40 passed, 1 failed").contains("1 checks failed"));
        assert!(reason("echo 0 passed, 0 failed").contains("no check"));
        assert!(reason("echo fine").contains("no line"));
        assert!(
            reason("echo 4 passed, 0 failed; echo 4 passed, 0 failed").contains("different MPIs")
        );
    }

    #[test]
    fn nothing_run_is_not_a_pass() {
        assert!(!Tally::default().ok());
        assert!(Tally { passed: 1, failed: 0 }.ok());
        assert!(!Tally { passed: 9, failed: 1 }.ok());
    }

    #[test]
    fn a_package_without_such_tests_is_refused() {
        assert!(select(Some("tensor")).unwrap_err().to_string().contains("tensor"));
    }
}
