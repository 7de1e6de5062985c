//! What can go wrong between ranks.

use std::fmt;
use std::time::Duration;

use crate::ledger::{Collective, Phase};

/// Where a rank stood when a call failed: the collective, the phase and the decoder layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The kind of call.
    pub collective: Collective,
    /// The phase set in the ledger.
    pub phase: Phase,
    /// The decoder layer set in the ledger.
    pub layer: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.collective, self.phase)?;
        match self.layer {
            Some(layer) => write!(f, ", layer {layer})"),
            None => write!(f, ")"),
        }
    }
}

/// A failed call. Ranks are numbered as in the whole job, also in communicators that were split
/// from it.
///
/// After any of these the rank counts as failed: its further calls and those of the others fail
/// too.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// Some ranks had not come when the deadline passed.
    #[error("{place}: rank {rank} waited {waited:.1?} for {}", Ranks(missing))]
    Timeout {
        /// The call that waited.
        place: Place,
        /// The rank that waited.
        rank: usize,
        /// The ranks that did not arrive.
        missing: Vec<usize>,
        /// How long it waited.
        waited: Duration,
    },
    /// Two ranks met in different calls: another collective, another size, another root or
    /// operation.
    #[error("{place}: calls do not match: rank {rank} calls {here}, rank {peer} calls {there}")]
    Mismatch {
        /// The call of this rank.
        place: Place,
        /// This rank.
        rank: usize,
        /// What this rank calls.
        here: String,
        /// The rank whose call differs.
        peer: usize,
        /// What that rank calls.
        there: String,
    },
    /// Another rank (or this one, by `abort` or an error of MPI) gave up, panicked, left or died.
    #[error("{place}: rank {rank} failed: {reason}{}", WhileWaiting(missing))]
    PeerFailed {
        /// The call that cannot finish.
        place: Place,
        /// The rank that failed first.
        rank: usize,
        /// Its reason, in its own words.
        reason: String,
        /// Where this rank itself was to give up while it waited: the ranks that had not come.
        missing: Vec<usize>,
    },
    /// An argument does not fit the communicator or the other arguments.
    #[error("{place}: {what} is {found}, expected {expected}")]
    Argument {
        /// The call.
        place: Place,
        /// The argument, for example `recv.len()`.
        what: &'static str,
        /// Its value.
        found: usize,
        /// What it has to be.
        expected: String,
    },
    /// The communicator could not be set up.
    #[error("cannot set up the {transport} transport: {reason}")]
    Setup {
        /// The transport: `"mpi"` or `"emulated"`.
        transport: &'static str,
        /// What failed.
        reason: String,
    },
    /// The operating system refused a thread.
    #[error("cannot start {thread}: {reason}")]
    Thread {
        /// The thread: its number, or what it is for.
        thread: String,
        /// What the system says.
        reason: String,
    },
    /// MPI returned an error code while the ranks were being connected; later it is a
    /// [`PeerFailed`](CommError::PeerFailed) of the rank that had it.
    #[error("{function} failed with MPI error {code}: {message}")]
    Mpi {
        /// The MPI function.
        function: &'static str,
        /// Its return code.
        code: i32,
        /// MPI's own words.
        message: String,
    },
}

/// "rank 3", "ranks 1 and 2", "ranks 1, 2 and 5".
pub(crate) struct Ranks<'a>(pub &'a [usize]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("no rank"),
            [one] => write!(f, "rank {one}"),
            [first, middle @ .., last] => {
                write!(f, "ranks {first}")?;
                for rank in middle {
                    write!(f, ", {rank}")?;
                }
                write!(f, " and {last}")
            }
        }
    }
}

/// " while it waited for rank 3", or nothing.
struct WhileWaiting<'a>(&'a [usize]);

impl fmt::Display for WhileWaiting<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, " while it waited for {}", Ranks(self.0)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_collective_phase_layer_and_ranks() {
        let place =
            Place { collective: Collective::Allreduce, phase: Phase::Decode, layer: Some(7) };
        let waited = Duration::from_millis(1500);
        let error = CommError::Timeout { place, rank: 0, missing: vec![1, 2, 5], waited };
        assert_eq!(
            error.to_string(),
            "Allreduce (decode, layer 7): rank 0 waited 1.5s for ranks 1, 2 and 5"
        );
        let place = Place { layer: None, ..place };
        let failed = |reason: &str, missing| CommError::PeerFailed {
            place,
            rank: 3,
            reason: reason.into(),
            missing,
        };
        assert_eq!(
            failed("out of memory", vec![]).to_string(),
            "Allreduce (decode): rank 3 failed: out of memory"
        );
        let told = failed("it was told to end", vec![1]).to_string();
        assert_eq!(
            told,
            "Allreduce (decode): rank 3 failed: it was told to end while it waited for rank 1"
        );
    }
}
