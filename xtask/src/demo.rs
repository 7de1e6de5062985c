//! `cargo xtask demo`: from a fresh clone to a model that answers, on two ranks.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::mpi::{Bind, Mpi};
use crate::{launch, setup, workspace};

/// Builds the program and has it show itself; without MPI on ranks that are threads of one process.
pub fn command(model: Option<PathBuf>, ranks: usize) -> Result<ExitCode> {
    if ranks == 0 {
        bail!("-n 0: at least one rank is needed");
    }
    let model = model.unwrap_or_else(|| workspace::root().join("models/austen"));
    let (program, mpi) = prepare()?;
    let mut command = match &mpi {
        Some(mpi) => mpi.launcher(ranks, None, Bind::None, program.as_os_str()),
        None => Command::new(&program),
    };
    let shown = model.strip_prefix(workspace::root()).unwrap_or(&model);
    match &mpi {
        Some(mpi) => eprintln!("demo: {}, {ranks} MPI ranks ({})", shown.display(), mpi.version),
        None => {
            eprintln!("demo: {}, {ranks} ranks inside one process, without MPI", shown.display())
        }
    }
    command.arg("demo").arg("--model").arg(&model);
    if mpi.is_none() {
        command.arg("--ranks").arg(ranks.to_string());
    }
    let status = command.status().context("cannot start the program")?;
    if !status.success() {
        eprintln!("demo: failed ({status})");
        return Ok(ExitCode::FAILURE);
    }
    let here = std::env::current_dir().unwrap_or_default();
    print!("{}", next_steps(mpi.is_some(), program.strip_prefix(here).unwrap_or(&program), ranks));
    Ok(ExitCode::SUCCESS)
}

/// The built program, and the MPI that it was built with, if any.
fn prepare() -> Result<(PathBuf, Option<Mpi>)> {
    let mpi = setup::ensure(true).map_err(|missing| eprintln!("demo: {missing}")).ok();
    if let Some(mpi) = mpi {
        match launch::build_program(Some(&mpi)) {
            Ok(program) => {
                return Ok((program, Some(mpi)));
            }
            Err(error) => eprintln!("demo: building with {}: {error:#}", mpi.version),
        }
    }
    eprintln!(
        "demo: going on without MPI; the ranks are threads of one process and pass messages through memory"
    );
    Ok((launch::build_program(None)?, None))
}

fn next_steps(mpi: bool, program: &Path, ranks: usize) -> String {
    let run = if mpi {
        format!("cargo xtask mpirun -n {ranks} -- chat --model ~/models/Qwen3-0.6B")
    } else {
        format!("{} chat --model ~/models/Qwen3-0.6B --ranks {ranks}", program.display())
    };
    format!(
        "\nNext, with a model of your own:\n  \
         hf download Qwen/Qwen3-0.6B --local-dir ~/models/Qwen3-0.6B   (hf: pip install huggingface_hub)\n  \
         {run}\n\
         On a cluster: README.md, \"On a cluster\".\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_steps_fit_what_is_there() {
        assert!(
            next_steps(true, Path::new("target/release/qwen3"), 2)
                .contains("cargo xtask mpirun -n 2 -- chat")
        );
        let without = next_steps(false, Path::new("target/release/qwen3"), 3);
        assert!(
            without.contains("target/release/qwen3 chat")
                && without.contains("--ranks 3")
                && !without.contains("mpirun"),
            "{without}"
        );
    }
}
