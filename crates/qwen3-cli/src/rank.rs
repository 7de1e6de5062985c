//! One rank of a command: what rank 0 reads reaches the others, and a failure of one ends all.

use std::io::{self, Write as _};
use std::sync::Arc;
use std::time::Duration;

use qwen3_model::comm::{Communicator, CommunicatorExt as _, Link};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::failure::{CliError, Failure};

/// Writes to standard output at once. A reader that has gone away is an error like any other.
pub fn print(text: &str) -> Result<(), CliError> {
    if !text.is_empty() {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()?;
    }
    Ok(())
}

/// A rank and its way to the others.
pub struct Rank {
    comm: Arc<dyn Communicator>,
    link: Option<Link>,
}

impl Rank {
    /// The rank at one end of `comm`, whose machines are connected by `link` where that is
    /// emulated.
    pub fn new(comm: Arc<dyn Communicator>, link: Option<Link>) -> Self {
        Self { comm, link }
    }

    /// The emulated link between machines, if it is emulated.
    pub fn emulated_link(&self) -> Option<Link> {
        self.link
    }

    /// The way to the other ranks.
    pub fn comm(&self) -> &Arc<dyn Communicator> {
        &self.comm
    }

    /// Whether this rank reads the user's input and writes the answers.
    pub fn speaks(&self) -> bool {
        self.comm.rank() == 0
    }

    /// Writes to standard output on rank 0, while the others go on.
    pub fn say(&self, text: &str) -> Result<(), CliError> {
        if self.speaks() { print(text) } else { Ok(()) }
    }

    /// Writes to standard output on rank 0. All ranks wait until it is read, and then know whether
    /// it was.
    pub fn tell(&self, text: &str) -> Result<(), Failure> {
        self.agree_after(|| self.say(text))
    }

    /// Waits in `work` for other ranks as long as it takes: for what a person types, or a text of
    /// any length that is read.
    pub fn patiently<R>(&self, work: impl FnOnce() -> R) -> R {
        let timeout = self.comm.timeout();
        self.comm.set_timeout(Duration::MAX);
        let result = work();
        self.comm.set_timeout(timeout);
        result
    }

    /// Does `work` and agrees on how it ended, however long it takes: what rank 0 writes is read by
    /// somebody who may take any time.
    pub fn agree_after<T>(&self, work: impl FnOnce() -> Result<T, CliError>) -> Result<T, Failure> {
        self.patiently(|| self.agree(work()))
    }

    /// Does `work` on rank 0 alone, which has its value. Its error ends the command on every rank.
    pub fn first<T>(
        &self,
        work: impl FnOnce() -> Result<T, CliError>,
    ) -> Result<Option<T>, Failure> {
        self.agree(if self.speaks() { work().map(Some) } else { Ok(None) })
    }

    /// Does `work` on rank 0 and gives its value to every rank. Its error ends the command on every
    /// rank.
    pub fn share<T, F>(&self, work: F) -> Result<T, Failure>
    where
        T: Serialize + DeserializeOwned,
        F: FnOnce() -> Result<T, CliError>,
    {
        let value = self.first(work)?;
        let mut bytes = match &value {
            Some(value) => serde_json::to_vec(value)
                .expect("a command's input has string keys and no exotic numbers"),
            None => Vec::new(),
        };
        self.broadcast(0, &mut bytes)?;
        match value {
            Some(value) => Ok(value),
            None => Ok(serde_json::from_slice(&bytes).expect("rank 0 runs the same program")),
        }
    }

    /// Ends the command on every rank if `local` is an error on one; each then has the lowest
    /// failing rank's message.
    pub fn agree<T>(&self, local: Result<T, CliError>) -> Result<T, Failure> {
        let failed = self.comm.all_gather_one(u32::from(local.is_err()))?;
        let Some(first) = failed.iter().position(|&failed| failed != 0) else {
            return Ok(
                local.unwrap_or_else(|_| unreachable!("this rank said that it had no error"))
            );
        };
        let mut message = match &local {
            Err(error) if first == self.comm.rank() => error.line().into_bytes(),
            _ => Vec::new(),
        };
        self.broadcast(first, &mut message)?;
        let error = match local {
            Err(error) if first == self.comm.rank() => error,
            _ => CliError::Peer {
                rank: first,
                message: String::from_utf8_lossy(&message).into_owned(),
            },
        };
        Err(Failure::agreed(error))
    }

    /// Gives `bytes` of rank `root` to every rank.
    fn broadcast(&self, root: usize, bytes: &mut Vec<u8>) -> Result<(), CliError> {
        let mut len = [bytes.len() as u64];
        self.comm.broadcast(root, &mut len)?;
        let len = usize::try_from(len[0]).expect("rank 0 holds as many bytes");
        bytes.resize(len, 0);
        Ok(self.comm.broadcast(root, bytes.as_mut_slice())?)
    }
}
