//! A job whose ranks are the processes of an MPI launcher.

use std::panic;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use comm::{CommError, Communicator, MpiComm, MpiOptions};

use crate::error::{Failure, RankError};
use crate::job::{JobOptions, PANIC, keep_panic, lock, run_rank};
use crate::launch::{REPORT_TIMEOUT, print_error, refuse_start, report};
use crate::launcher::LaunchedProcess;
use crate::rank::Rank;
use crate::signals::{self, Signal};

/// How long a rank that a signal ends may take to reach its next collective. Open MPI kills a
/// process one second after SIGTERM.
const SIGNAL_TIMEOUT: Duration = Duration::from_millis(700);

/// The work has ended on this rank, which now reports the result itself.
static ENDED: AtomicBool = AtomicBool::new(false);

/// Runs `work` on this process's rank of an MPI job.
pub(crate) fn run_processes(
    process: &LaunchedProcess,
    options: &JobOptions,
    work: impl Fn(&Rank) -> Result<(), Failure> + Send + Sync,
) -> ExitCode {
    let started = MpiOptions::from_env().and_then(|mut mpi| {
        mpi.program.clone_from(&options.program);
        Ok((MpiComm::init_with(&mpi)?, mpi.shared_memory))
    });
    let (comm, shared_memory) = match started {
        Ok(started) => started,
        Err(error) => return refuse_start(error, 1),
    };
    if let Some(started) = process.size
        && started != comm.size()
    {
        let launcher = process.launcher;
        return refuse_start(RankError::OtherMpi { launcher, started, found: comm.size() }, 1);
    }
    if comm.rank() == 0
        && shared_memory
        && comm.machines() < comm.size()
        && comm.path() == "messages"
    {
        eprintln!(
            "warning: some ranks of one machine cannot map each other's memory (/proc/PID/fd, \
             which containers may close to each other); all collectives use MPI messages, which \
             is slower"
        );
    }
    let comm: Arc<dyn Communicator> = Arc::new(comm);
    // A launcher that loses one rank sends the others a signal, at once and often without a
    // message.
    let weak = Arc::downgrade(&comm);
    if let Err(error) = signals::set_end(move |signal| end_by_signal(signal, &weak)) {
        comm.abort(&error.to_string());
        return refuse_start(error, 1);
    }
    // What a panic drops may end this rank before the others know its message.
    let weak = Arc::downgrade(&comm);
    panic::set_hook(Box::new(move |info| {
        keep_panic(info);
        let message = lock(&PANIC).clone();
        if let (Some(comm), Some(message)) = (weak.upgrade(), message) {
            comm.abort(&RankError::Panic { rank: comm.rank(), message }.to_string());
        }
    }));
    let result = run_rank(&comm, options, &work);
    ENDED.store(true, Ordering::Release);
    let Err(failure) = result else {
        return ExitCode::SUCCESS;
    };
    let reports = reports_for_all(&failure, comm.rank());
    if failure.is_agreed() {
        let status = if reports || failure.is_closed_output() {
            report(&failure)
        } else {
            ExitCode::FAILURE
        };
        // No rank leaves before rank 0 has reported. If this fails, nothing is left to report.
        let _ = comm.barrier();
        return status;
    }
    comm.abort(&failure.to_string());
    if !reports {
        // Rank 0 learns the error in its next collective. If it is gone or computes for longer,
        // this rank reports.
        thread::sleep(REPORT_TIMEOUT);
    }
    report(&failure);
    // MPI cannot be finalized together with ranks that may be gone.
    std::process::exit(1);
}

/// True if this rank reports why the job ends: rank 0, or the first rank that still waits for it
/// when a signal ends them.
fn reports_for_all(failure: &Failure, rank: usize) -> bool {
    let missing = match failure.find::<CommError>() {
        Some(CommError::PeerFailed { missing, .. }) => &missing[..],
        _ => &[],
    };
    (0..rank).all(|other| missing.contains(&other))
}

/// Ends this process because of a signal. Its rank fails in its next collective, or in the one in
/// which it waits, and reports that. A rank that computes for longer reports here, before the
/// launcher kills the process.
fn end_by_signal(signal: Signal, comm: &Weak<dyn Communicator>) {
    let reason = format!("it was told to end ({})", signal.name());
    let ended = || ENDED.load(Ordering::Acquire);
    let mut reports = false;
    if let Some(comm) = comm.upgrade().filter(|_| !ended()) {
        comm.abort(&reason);
        reports = comm.rank() == 0;
    }
    thread::sleep(SIGNAL_TIMEOUT);
    if reports && !ended() {
        print_error(&format!("rank 0 failed: {reason}"));
    }
    std::process::exit(1);
}

#[cfg(test)]
mod tests {
    use comm::{Collective, Phase, Place};

    use super::*;

    #[test]
    fn the_first_rank_that_is_left_reports() {
        let place =
            Place { collective: Collective::Allreduce, phase: Phase::Decode, layer: Some(3) };
        let failed = |missing: &[usize]| {
            let (reason, missing) = ("x".into(), missing.to_vec());
            Failure::from(CommError::PeerFailed { place, rank: 1, reason, missing })
        };
        let other = || Failure::from(std::io::Error::other("anything"));
        assert!(reports_for_all(&failed(&[]), 0) && reports_for_all(&other(), 0));
        assert!(reports_for_all(&failed(&[0]), 1) && reports_for_all(&failed(&[0, 1]), 2));
        assert!(!reports_for_all(&failed(&[0]), 2) && !reports_for_all(&failed(&[2]), 1));
        assert!(!reports_for_all(&other(), 1));
    }
}
