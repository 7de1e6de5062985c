//! One rank of a job: what rank 0 reads reaches the others, and an error of one ends all.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use comm::{Communicator, CommunicatorExt as _, Link};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{BoxError, Failure, RankError, is_closed_output};
use crate::signals::{self, Response, Signal};
use crate::terminal::{one_line, printable};

/// Writes to standard output at once; to a terminal without control characters.
pub fn print(text: &str) -> Result<(), RankError> {
    if text.is_empty() {
        return Ok(());
    }
    let mut out = io::stdout().lock();
    let text = if out.is_terminal() { printable(text) } else { text.to_owned() };
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|source| RankError::Output { source })
}

/// One rank of a job. All ranks make the same calls of methods that return a [`Failure`], in the
/// same order.
pub struct Rank {
    comm: Arc<dyn Communicator>,
    link: Option<Link>,
}

// How a rank has ended its part of a work, as `agree` exchanges it.
const DONE: u32 = 0;
const FAILED: u32 = 1;
const CLOSED_OUTPUT: u32 = 2;

impl Rank {
    /// The rank at one end of `comm`. `link` is the link between machines, if it is emulated.
    pub fn new(comm: Arc<dyn Communicator>, link: Option<Link>) -> Self {
        Self { comm, link }
    }

    /// The connection to the other ranks.
    pub fn comm(&self) -> &Arc<dyn Communicator> {
        &self.comm
    }

    /// The link between machines, if it is emulated.
    pub fn emulated_link(&self) -> Option<Link> {
        self.link
    }

    /// True on rank 0, which reads the input and writes the output.
    pub fn is_root(&self) -> bool {
        self.comm.rank() == 0
    }

    /// Writes to standard output on rank 0; the others go on at once.
    pub fn print(&self, text: &str) -> Result<(), RankError> {
        if self.is_root() { print(text) } else { Ok(()) }
    }

    /// Writes to standard output on rank 0. All ranks wait until the text is written, however long
    /// that takes, and end together if it cannot be written.
    pub fn print_and_agree(&self, text: &str) -> Result<(), Failure> {
        self.agree_after(|| Ok(self.print(text)?))
    }

    /// Calls `work` without a deadline for late ranks: for collectives in which a rank may wait for
    /// a person or a slow reader. The loss of a rank is still noticed.
    pub fn without_deadline<R>(&self, work: impl FnOnce() -> R) -> R {
        let timeout = self.comm.timeout();
        self.comm.set_timeout(Duration::MAX);
        let result = work();
        self.comm.set_timeout(timeout);
        result
    }

    /// Calls `work` on every rank and [agrees](Self::agree) on its result, without a deadline.
    pub fn agree_after<T>(&self, work: impl FnOnce() -> Result<T, BoxError>) -> Result<T, Failure> {
        self.without_deadline(|| self.agree(work()))
    }

    /// Calls `work` on rank 0, which alone has its value. Its error ends the job on every rank.
    pub fn on_root<T>(
        &self,
        work: impl FnOnce() -> Result<T, BoxError>,
    ) -> Result<Option<T>, Failure> {
        self.agree(if self.is_root() { work().map(Some) } else { Ok(None) })
    }

    /// Calls `work` on rank 0 and broadcasts its value. Its error ends the job on every rank.
    pub fn broadcast<T: Serialize + DeserializeOwned>(
        &self,
        work: impl FnOnce() -> Result<T, BoxError>,
    ) -> Result<T, Failure> {
        let value = self.on_root(|| {
            let value = work()?;
            let bytes = serde_json::to_vec(&value).map_err(|source| RankError::Value { source })?;
            Ok((value, bytes))
        })?;
        let (value, bytes) = value.unzip();
        let bytes = self.broadcast_bytes(0, bytes.unwrap_or_default())?;
        match value {
            Some(value) => Ok(value),
            None => {
                Ok(serde_json::from_slice(&bytes).map_err(|source| RankError::Value { source })?)
            }
        }
    }

    /// Ends the job on every rank if `local` is an error on one of them. The lowest such rank keeps
    /// its error; the others get its message as [`RankError::Peer`].
    pub fn agree<T, E: Into<BoxError>>(&self, local: Result<T, E>) -> Result<T, Failure> {
        let local = local.map_err(Into::into);
        let own = match &local {
            Ok(_) => DONE,
            Err(error) if is_closed_output(&**error) => CLOSED_OUTPUT,
            Err(_) => FAILED,
        };
        let states = self.comm.all_gather_one(own)?;
        let Some(first) = states.iter().position(|&state| state != DONE) else {
            return Ok(local.unwrap_or_else(|_| unreachable!("this rank sent DONE")));
        };
        let own_error = local.err().filter(|_| first == self.comm.rank());
        let message =
            own_error.as_ref().map_or(String::new(), |error| one_line(&error.to_string()));
        let message = self.broadcast_bytes(first, message.into_bytes())?;
        let error = own_error.unwrap_or_else(|| {
            Box::new(if states[first] == CLOSED_OUTPUT {
                RankError::Output { source: io::ErrorKind::BrokenPipe.into() }
            } else {
                let message = String::from_utf8_lossy(&message).into_owned();
                RankError::Peer { rank: first, message }
            })
        });
        Err(Failure::known_to_all(error))
    }

    /// The bytes that rank `root` has; what the others pass does not matter.
    fn broadcast_bytes(&self, root: usize, mut bytes: Vec<u8>) -> Result<Vec<u8>, Failure> {
        let mut len = [bytes.len() as u64];
        self.comm.broadcast(root, &mut len)?;
        bytes.resize(usize::try_from(len[0]).expect("rank 0 holds as many bytes"), 0);
        self.comm.broadcast(root, bytes.as_mut_slice())?;
        Ok(bytes)
    }

    /// From now on, until the end of the job, `handler` is called for SIGINT, SIGTERM, SIGHUP and
    /// SIGUSR1 in this process, on a thread of its own, and decides what the signal does.
    ///
    /// Ranks that are threads share a process, in which the handler of rank 0 counts; the call has
    /// no effect on the others. Most launchers send a signal to every process of a job, and only
    /// one handler has to act on it: the other ranks return [`Response::Continue`].
    ///
    /// # Errors
    /// If the system refuses the handlers or their thread.
    pub fn on_signals(
        &self,
        handler: impl FnMut(Signal) -> Response + Send + 'static,
    ) -> Result<(), RankError> {
        if self.comm.transport() == "threads" && !self.is_root() {
            return Ok(());
        }
        signals::set_handler(handler)
    }
}
