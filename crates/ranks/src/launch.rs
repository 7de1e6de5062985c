//! Running a job from `main`: on the processes of a launcher or on threads of this one, with one
//! line on standard error if it fails.

use std::io::{self, Write as _};
use std::panic;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use crate::error::{BoxError, Failure, RankError};
use crate::job::{JobOptions, keep_panic, run_in_threads};
use crate::launcher::LaunchedProcess;
use crate::rank::Rank;
use crate::terminal::one_line;

/// How long a failed rank waits for rank 0 to report the error: the end of this rank may make a
/// launcher end all ranks.
pub(crate) const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs `work` on every rank: on the processes of an MPI launcher, or on threads of this process.
///
/// A failure of the job is printed once, as one line on standard error. The exit code is then 1 on
/// every rank. A job whose reader closes standard output ends without a message and with code 0.
pub fn launch(
    options: &JobOptions,
    work: impl Fn(&Rank) -> Result<(), Failure> + Send + Sync,
) -> ExitCode {
    panic::set_hook(Box::new(keep_panic));
    match LaunchedProcess::detect() {
        Some(process) if process.has_peers() && options.ranks > 1 => {
            let (ranks, launcher) = (options.ranks, process.launcher);
            refuse_start(RankError::RanksUnderLauncher { ranks, launcher }, 1)
        }
        Some(process) if options.ranks == 1 && (process.has_peers() || cfg!(feature = "mpi")) => {
            run_processes(&process, options, work)
        }
        _ => match run_in_threads(options, work) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => report(&failure),
        },
    }
}

/// Reports on process 0 of a launcher why no job starts, and returns the exit code `status`. The
/// other processes give process 0 time to report before they do the same: one that is still there
/// is alone with its error.
pub fn refuse_start(error: impl Into<BoxError>, status: u8) -> ExitCode {
    let mut line = one_line(&error.into().to_string());
    if let Some(process) = LaunchedProcess::detect().filter(|process| process.rank > 0) {
        thread::sleep(REPORT_TIMEOUT);
        line = format!("rank {}: {line}", process.rank);
    }
    print_error(&line);
    ExitCode::from(status)
}

/// Prints the failure of a job, and returns its exit code.
pub(crate) fn report(failure: &Failure) -> ExitCode {
    if failure.is_closed_output() {
        return ExitCode::SUCCESS;
    }
    print_error(&failure.to_string());
    ExitCode::FAILURE
}

/// Writes the line in one piece: `eprintln` writes it in several, between which a launcher may
/// write the lines of other ranks.
pub(crate) fn print_error(line: &str) {
    // If standard error cannot be written, the exit code is all that is left.
    let _ = io::stderr().write_all(format!("error: {line}\n").as_bytes());
}

#[cfg(feature = "mpi")]
use crate::processes::run_processes;

#[cfg(not(feature = "mpi"))]
fn run_processes(
    process: &LaunchedProcess,
    _options: &JobOptions,
    _work: impl Fn(&Rank) -> Result<(), Failure>,
) -> ExitCode {
    refuse_start(RankError::NoMpi { launcher: process.launcher }, 1)
}
