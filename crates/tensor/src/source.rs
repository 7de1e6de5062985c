//! One open weight file: positioned reads, counted.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::CheckpointError;

/// A weight file. Reads are positioned, so that any thread may read at any time; the file is never
/// mapped, because a file that is cut short while mapped kills the process instead of giving an
/// error.
#[derive(Debug)]
pub(crate) struct Source {
    path: PathBuf,
    file: File,
    len: u64,
    bytes_read: Arc<AtomicU64>,
}

impl Source {
    pub(crate) fn open(path: PathBuf, bytes_read: Arc<AtomicU64>) -> Result<Self, CheckpointError> {
        // Asked before it is opened: a pipe would make that wait for a writer.
        let opened = fs::metadata(&path).and_then(|metadata| {
            if !metadata.is_file() {
                return Err(io::Error::other("not a regular file"));
            }
            let file = File::open(&path)?;
            let len = file.metadata()?.len();
            Ok((file, len))
        });
        match opened {
            Ok((file, len)) => Ok(Self { path, file, len, bytes_read }),
            Err(source) => Err(CheckpointError::Open { file: path, source }),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file when it was opened.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `out` from `offset`; `what` is for the message if that fails.
    pub(crate) fn read_at(
        &self,
        what: &str,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        self.file.read_exact_at(out, offset).map_err(|source| CheckpointError::Read {
            file: self.path.clone(),
            what: what.to_owned(),
            offset,
            bytes: out.len(),
            source,
        })?;
        self.bytes_read.fetch_add(out.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}
