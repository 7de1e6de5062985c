//! `cargo xtask mpirun`: builds the program with MPI and becomes its launcher.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::mpi::{Bind, Mpi};
use crate::{setup, workspace};

const PROGRAM: [&str; 4] = ["--package", "qwen3-cli", "--bin", "qwen3"];

/// The release build of the program `qwen3`, with the MPI backend where an MPI is given.
pub fn build_program(mpi: Option<&Mpi>) -> Result<PathBuf> {
    build_with(mpi, &mut workspace::cargo(), &[])
}

/// The same by a given cargo, with further arguments.
pub fn build_with(mpi: Option<&Mpi>, cargo: &mut Command, args: &[&str]) -> Result<PathBuf> {
    build(mpi, cargo.args(["build", "--release"]).args(args), PROGRAM)
}

/// The release build of a crate's example, with the crate's feature `mpi` where an MPI is given.
pub fn build_example(mpi: Option<&Mpi>, package: &str, name: &str) -> Result<PathBuf> {
    build(
        mpi,
        workspace::cargo().args(["build", "--release"]),
        ["--package", package, "--example", name],
    )
}

/// The program with the MPI backend, built as the tests are, with which it shares most of the work.
pub fn build_for_tests(mpi: &Mpi) -> Result<PathBuf> {
    build(Some(mpi), workspace::cargo().arg("build"), PROGRAM)
}

/// The program without MPI, built as the tests are.
pub fn build_program_for_tests() -> Result<PathBuf> {
    build(None, workspace::cargo().arg("build"), PROGRAM)
}

fn build(mpi: Option<&Mpi>, command: &mut Command, what: [&str; 4]) -> Result<PathBuf> {
    let [.., name] = what;
    eprintln!(
        "building {name} and the crates it uses: two to four minutes the first time on two cores, \
         seconds later"
    );
    command.args(what);
    if let Some(mpi) = mpi {
        command.args(["--features", "mpi"]);
        mpi.prepare(command, Bind::None, true);
    }
    let built = workspace::build(command)?;
    let program = built.into_iter().find(|executable| executable.target == name);
    Ok(program.with_context(|| format!("the build made no program {name}"))?.path)
}

/// Replaces this process by `mpirun … qwen3 args`: signals go straight to it and its exit status is
/// this one's.
pub fn command(
    ranks: usize,
    hostfile: Option<PathBuf>,
    bind: Bind,
    args: &[OsString],
) -> Result<ExitCode> {
    if ranks == 0 {
        bail!("-n 0: at least one rank is needed");
    }
    if let Some(file) = hostfile.as_ref().filter(|file| !file.is_file()) {
        bail!("--hostfile {}: there is no such file", file.display());
    }
    let mpi = setup::ensure(true)?;
    let program = build_program(Some(&mpi))?;
    let error =
        mpi.launcher(ranks, hostfile.as_deref(), bind, program.as_os_str()).args(args).exec();
    Err(error).with_context(|| format!("cannot start {}", mpi.mpirun.display()))
}
