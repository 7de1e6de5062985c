//! Writing a checkpoint folder: weights in one file or in several with an index, and the small
//! files beside them.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use checkpoint::{
    CheckpointError, CheckpointWriter, DocumentError, TensorSpec as StoredSpec, WriteError,
};
use serde_json::{Map, Value, json};

use crate::fields::ConfigError;

/// Bytes of weights that one file holds at most, as Hugging Face splits them.
pub(crate) const SHARD_BYTES: u64 = 5_000_000_000;

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";

/// Why a checkpoint cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A file or folder cannot be created, copied or written.
    #[error("{}: cannot be written: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system reported.
        source: io::Error,
    },
    /// The folder holds a checkpoint already, which would be mixed up with the new one.
    #[error("{} exists already, expected a folder without a checkpoint", file.display())]
    Exists {
        /// The first such file.
        file: PathBuf,
    },
    /// Another program is writing a checkpoint into the folder.
    #[error("{}: a checkpoint is being written there, expected a folder that is not in use", dir.display())]
    Busy {
        /// The folder.
        dir: PathBuf,
    },
    /// The checkpoint to convert is quantized already.
    #[error("{} is quantized to {bits} bits already, expected f32, bf16 or f16 weights", dir.display())]
    AlreadyQuantized {
        /// The checkpoint.
        dir: PathBuf,
        /// Its bits.
        bits: u32,
    },
    /// A format that checkpoints are not converted to.
    #[error("weights cannot be quantized to {found}, expected q8 or q4")]
    Format {
        /// The format.
        found: tensor::WeightFormat,
    },
    /// A file beside the weights is a link to a file elsewhere, whose content nobody asked to copy.
    #[error(
        "{} is a link to {}, expected a file of the model's folder or of its Hugging Face cache",
        file.display(), found.display()
    )]
    ForeignLink {
        /// The link.
        file: PathBuf,
        /// The file that it leads to.
        found: PathBuf,
    },
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file of the source cannot be read.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The source's weights cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The weights cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// How far the writing of a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportProgress {
    /// Bytes of weights written.
    pub written: u64,
    /// Bytes of weights in all.
    pub total: u64,
}

/// A folder in which nobody else writes a checkpoint.
pub(crate) struct Folder {
    path: PathBuf,
    /// Locked as long as it is open; the system opens it when a program is ended.
    _lock: File,
}

/// Creates `dir`, which must not hold a checkpoint, nor one that is being written.
pub(crate) fn create_folder(dir: &Path) -> Result<Folder, ExportError> {
    let io_error = |source| ExportError::Io { file: dir.to_owned(), source };
    if dir.exists() && !dir.is_dir() {
        return Err(ExportError::Exists { file: dir.to_owned() });
    }
    std::fs::create_dir_all(dir).map_err(io_error)?;
    let lock = File::open(dir).map_err(io_error)?;
    // Some network's file systems have no locks.
    if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) {
        return Err(ExportError::Busy { dir: dir.to_owned() });
    }
    for entry in std::fs::read_dir(dir).map_err(io_error)? {
        let file = entry.map_err(io_error)?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if name == CONFIG
            || name.ends_with(".safetensors")
            || name.ends_with(".safetensors.index.json")
        {
            return Err(ExportError::Exists { file });
        }
    }
    Ok(Folder { path: dir.to_owned(), _lock: lock })
}

/// Writes `value` with the indentation of the published files.
pub(crate) fn write_json(file: &Path, value: &Value) -> Result<(), ExportError> {
    let text = serde_json::to_string_pretty(value).expect("a JSON value has a text");
    std::fs::write(file, text + "\n")
        .map_err(|source| ExportError::Io { file: file.to_owned(), source })
}

/// A checkpoint, its weights written tensor by tensor. Files of one that is not finished are
/// removed, as on a disk that is full. Those of a program that was ended cannot be: so weights have
/// names that end in `.part` until all are written, which neither look like a checkpoint nor stand
/// in the way of the next try, which overwrites those of the same names.
pub(crate) struct ShardWriter {
    folder: Folder,
    /// The tensors of each file.
    shards: Vec<Vec<StoredSpec>>,
    /// The file being written, and how many tensors it still wants.
    current: Option<(CheckpointWriter, usize)>,
    next: usize,
    total: u64,
    finished: bool,
}

impl ShardWriter {
    /// A writer of `tensors` into files of at most `limit` bytes of weights (a larger tensor has a
    /// file of its own).
    pub fn new(folder: Folder, tensors: Vec<StoredSpec>, limit: u64) -> Self {
        let mut shards: Vec<Vec<StoredSpec>> = Vec::new();
        let (mut filled, mut total) = (0, 0);
        for spec in tensors {
            let bytes = stored_bytes(&spec);
            if shards.is_empty() || filled + bytes > limit {
                shards.push(Vec::new());
                filled = 0;
            }
            shards.last_mut().expect("one was just added").push(spec);
            (filled, total) = (filled + bytes, total + bytes);
        }
        Self { folder, shards, current: None, next: 0, total, finished: false }
    }

    /// Bytes of weights in all.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Begins the next tensor, in a new file where the last one is complete.
    pub fn begin(&mut self) -> Result<(), ExportError> {
        if self.current.as_ref().is_none_or(|(_, left)| *left == 0) {
            self.close()?;
            let index = self.next;
            self.next += 1;
            let shard = &self.shards[index];
            let metadata = [("format".to_owned(), "pt".to_owned())];
            // A file of this name was left by a program that was ended, or is a link that somebody
            // else made; a link is removed and never followed.
            match std::fs::remove_file(self.part(index)) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(ExportError::Io { file: self.part(index), source });
                }
                _ => {}
            }
            let writer = CheckpointWriter::create(self.part(index), shard, &metadata)?;
            self.current = Some((writer, shard.len()));
        }
        if let Some((_, left)) = &mut self.current {
            *left -= 1;
        }
        Ok(())
    }

    /// Writes some of the current tensor, in its stored form.
    pub fn write(&mut self, tensor: &str, encoded: &[u8]) -> Result<(), ExportError> {
        if encoded.is_empty() {
            return Ok(());
        }
        let (writer, _) = self.current.as_mut().expect("begin comes before write");
        Ok(writer.write_encoded(tensor, encoded)?)
    }

    /// Completes the last file, gives all their names, writes the index where there are several,
    /// and `config.json`: last, so that a folder whose writing was interrupted is not taken for a
    /// checkpoint.
    pub fn finish(mut self, config: &Value) -> Result<(), ExportError> {
        self.close()?;
        for index in 0..self.next {
            let file = self.file(index);
            std::fs::rename(self.part(index), &file)
                .map_err(|source| ExportError::Io { file, source })?;
        }
        if self.shards.len() > 1 {
            self.write_index()?;
        }
        write_json(&self.folder.path.join(CONFIG), config)?;
        self.finished = true;
        Ok(())
    }

    fn write_index(&self) -> Result<(), ExportError> {
        let mut map = Map::new();
        for (index, shard) in self.shards.iter().enumerate() {
            for spec in shard {
                map.insert(spec.name.clone(), json!(self.file_name(index)));
            }
        }
        let index = json!({"metadata": {"total_size": self.total}, "weight_map": map});
        write_json(&self.folder.path.join(INDEX), &index)
    }

    fn close(&mut self) -> Result<(), ExportError> {
        match self.current.take() {
            Some((writer, _)) => Ok(writer.finish()?),
            None => Ok(()),
        }
    }

    /// What a file is called while it is written.
    fn part(&self, index: usize) -> PathBuf {
        self.folder.path.join(self.file_name(index) + ".part")
    }

    /// What it is called afterwards.
    fn file(&self, index: usize) -> PathBuf {
        self.folder.path.join(self.file_name(index))
    }

    fn file_name(&self, index: usize) -> String {
        match self.shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        }
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        if self.finished || self.next == 0 {
            return;
        }
        let begun = (0..self.next).flat_map(|index| [self.part(index), self.file(index)]);
        for file in begun.chain([INDEX, CONFIG].map(|name| self.folder.path.join(name))) {
            // None of them was there before, but for parts that were overwritten, and nobody else
            // writes here. Whoever hears of the failure has more use for the space than for a part
            // of a checkpoint.
            std::fs::remove_file(file).ok();
        }
    }
}

/// Bytes of a tensor in its stored form.
pub(crate) fn stored_bytes(spec: &StoredSpec) -> u64 {
    let cols = spec.shape.last().copied().unwrap_or(1);
    let rows: usize = spec.shape.iter().rev().skip(1).product();
    let row = spec.format.stored_row_bytes(cols).expect("a valid configuration's rows have a size");
    rows as u64 * row as u64
}
