//! Why the work of a rank ends early, and whether every rank knows.

use std::error::Error;
use std::fmt;
use std::io;

use comm::CommError;

use crate::terminal::one_line;

/// An error of any type that can pass between threads.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// What can go wrong in a job of ranks itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RankError {
    /// Another rank has an error, on which the ranks have agreed.
    #[error("rank {rank}: {message}")]
    Peer {
        /// The lowest rank with an error.
        rank: usize,
        /// Its message.
        message: String,
    },
    /// A rank panicked: a bug.
    #[error("internal error on rank {rank}: {message}")]
    Panic {
        /// The rank.
        rank: usize,
        /// The panic's message and its place in the source.
        message: String,
    },
    /// Several ranks in each of several processes.
    #[error(
        "{ranks} ranks in each process that {launcher} started; \
         expected --ranks 1, because under a launcher each process is a rank"
    )]
    RanksUnderLauncher {
        /// Ranks that were asked for in this process.
        ranks: usize,
        /// The launcher of the process.
        launcher: &'static str,
    },
    /// An MPI launcher started a program without MPI.
    #[error(
        "started by a launcher of several processes ({launcher}), but built without MPI; \
         build with --features mpi, or use --ranks"
    )]
    NoMpi {
        /// The launcher of the process.
        launcher: &'static str,
    },
    /// The launcher belongs to another MPI library than the program.
    #[error(
        "{launcher} started {started} processes, but MPI knows of {found}; \
         is the launcher of another MPI? (with srun: --mpi=pmix)"
    )]
    OtherMpi {
        /// The launcher of the process.
        launcher: &'static str,
        /// Processes that the launcher started.
        started: usize,
        /// Processes that MPI sees.
        found: usize,
    },
    /// More emulated nodes than ranks.
    #[error("--emulate-nodes: {nodes}; expected at most {ranks}, the number of ranks")]
    EmulatedNodes {
        /// Nodes that were asked for.
        nodes: usize,
        /// Ranks of the job.
        ranks: usize,
    },
    /// The ranks of a process cannot be connected.
    #[error("cannot connect {ranks} ranks in one process: {reason}")]
    Connect {
        /// Ranks that were asked for.
        ranks: usize,
        /// What failed.
        reason: String,
    },
    /// The operating system refused a thread for a rank.
    #[error("cannot start a thread for rank {rank}: {source}")]
    Thread {
        /// The rank.
        rank: usize,
        /// What the system says.
        source: io::Error,
    },
    /// Signals cannot be handled.
    #[error("cannot handle signals: {source}")]
    Signals {
        /// What the system says.
        source: io::Error,
    },
    /// Standard output cannot be written.
    #[error("standard output: {source}")]
    Output {
        /// What the system says.
        source: io::Error,
    },
    /// A value does not survive its way between ranks, for example a number that is not finite.
    #[error("cannot broadcast a value: {source}")]
    Value {
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// The early end of the work of one rank. Its message is one line without control characters.
pub struct Failure {
    error: BoxError,
    agreed: bool,
}

impl Failure {
    /// An error that every rank meets at the same place: ranks that compute the same thing from
    /// the same input find the same mistake. A failed collective is never agreed.
    pub fn agreed(error: impl Into<BoxError>) -> Self {
        let error = error.into();
        let agreed = find::<CommError>(&*error).is_none();
        Self { error, agreed }
    }

    /// An error on which the ranks have agreed.
    pub(crate) fn known_to_all(error: BoxError) -> Self {
        Self { error, agreed: true }
    }

    /// True if every rank ends here. Otherwise the others may be waiting for this one.
    pub fn is_agreed(&self) -> bool {
        self.agreed
    }

    /// The first error of type `T` among this error and its sources.
    pub fn find<T: Error + 'static>(&self) -> Option<&T> {
        find(&*self.error)
    }

    /// True if the reader of standard output has closed it, as `head` does: the job then ends, but
    /// has not failed.
    pub(crate) fn is_closed_output(&self) -> bool {
        is_closed_output(&*self.error)
    }
}

/// See [`Failure::is_closed_output`].
pub(crate) fn is_closed_output(error: &(dyn Error + 'static)) -> bool {
    let output = find::<RankError>(error);
    matches!(output, Some(RankError::Output { source })
        if source.kind() == io::ErrorKind::BrokenPipe)
}

fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    std::iter::successors(Some(error), |&error| error.source())
        .find_map(|error| error.downcast_ref::<T>())
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    /// An error that this rank alone may have.
    fn from(error: E) -> Self {
        Self { error: Box::new(error), agreed: false }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&one_line(&self.error.to_string()))
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failure").field("error", &self.error).field("agreed", &self.agreed).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_collective_is_never_agreed() {
        #[derive(Debug, thiserror::Error)]
        #[error("{0}")]
        struct Outer(#[source] CommError);
        let comm = CommError::Setup { transport: "mpi", reason: "no".into() };
        let failure = Failure::agreed(Outer(comm.clone()));
        assert!(!failure.is_agreed());
        assert_eq!(failure.find::<CommError>(), Some(&comm));
        assert!(Failure::agreed(io::Error::other("x")).is_agreed());
        assert!(!Failure::from(io::Error::other("x")).is_agreed());
    }
}
