//! Open files: regular ones only, and never more of them in memory than their kind may need.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{CheckpointError, DocumentError};

/// A small file of a model, read as a whole: JSON or a template.
#[derive(Clone, PartialEq, Eq)]
pub struct Document {
    /// The file, or the GGUF file whose metadata the document was made from; for messages.
    pub file: PathBuf,
    /// The contents.
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for Document {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Document({}, {} bytes)", self.file.display(), self.bytes.len())
    }
}

impl Document {
    /// The contents as text.
    ///
    /// # Errors
    ///
    /// If they are not UTF-8.
    pub fn text(&self) -> Result<&str, DocumentError> {
        std::str::from_utf8(&self.bytes).map_err(|error| DocumentError::Encoding {
            file: self.file.clone(),
            offset: error.valid_up_to(),
        })
    }

    /// Reads a regular file of at most `limit` bytes; `None` if there is none of this name.
    ///
    /// # Errors
    ///
    /// If the file is not regular, larger than `limit`, or cannot be read.
    pub(crate) fn read(file: &Path, limit: u64) -> Result<Option<Self>, DocumentError> {
        let Some((opened, len)) = open_bounded(file, limit)? else { return Ok(None) };
        let mut bytes = Vec::with_capacity(len as usize);
        // A file of /proc states no size, and others may grow.
        opened.take(limit + 1).read_to_end(&mut bytes).map_err(|source| DocumentError::Read {
            file: file.to_owned(),
            source: Arc::new(source),
        })?;
        let found = bytes.len() as u64;
        if found > limit {
            return Err(DocumentError::TooLarge { file: file.to_owned(), found, limit });
        }
        Ok(Some(Self { file: file.to_owned(), bytes }))
    }

    /// Whether the file exists; it can be opened then, and is not too large.
    pub(crate) fn check(file: &Path, limit: u64) -> Result<bool, DocumentError> {
        Ok(open_bounded(file, limit)?.is_some())
    }
}

/// Opens a regular file of at most `limit` bytes and returns its size; `None` if there is none.
fn open_bounded(file: &Path, limit: u64) -> Result<Option<(File, u64)>, DocumentError> {
    match open_regular(file) {
        Ok((_, found)) if found > limit => {
            Err(DocumentError::TooLarge { file: file.to_owned(), found, limit })
        }
        Ok(opened) => Ok(Some(opened)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !is_link(file) => Ok(None),
        Err(source) => Err(DocumentError::Read { file: file.to_owned(), source: Arc::new(source) }),
    }
}

/// Opens a regular file and returns its size.
fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    // Asked before it is opened: a pipe would make that wait for a writer.
    let metadata = fs::metadata(path).map_err(|error| match fs::read_link(path) {
        Ok(target) if error.kind() == io::ErrorKind::NotFound => io::Error::new(
            error.kind(),
            format!("a link to {}, which does not exist", target.display()),
        ),
        _ => error,
    })?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    Ok((file, len))
}

fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink())
}

/// A file of weights. Reads are positioned, so that any thread may read at any time; the file is
/// never mapped, because a file that is cut short while mapped kills the process instead of giving
/// an error.
#[derive(Debug)]
pub(crate) struct WeightFile {
    path: PathBuf,
    file: File,
    len: u64,
    bytes_read: Arc<AtomicU64>,
}

impl WeightFile {
    pub(crate) fn open(path: PathBuf, bytes_read: Arc<AtomicU64>) -> Result<Self, CheckpointError> {
        match open_regular(&path) {
            Ok((file, len)) => Ok(Self { path, file, len, bytes_read }),
            Err(source) => Err(CheckpointError::Open { file: path, source: Arc::new(source) }),
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
            source: Arc::new(source),
        })?;
        self.bytes_read.fetch_add(out.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}
