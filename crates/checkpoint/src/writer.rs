//! Writes a safetensors file as a stream, for checkpoints larger than memory.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use tensor::{EncodeError, WeightFormat, encode_rows};

use crate::checkpoint::{MARK, mark};

/// Values encoded at once.
const PIECE: usize = 1 << 18;

/// A tensor of the file to be written.
#[derive(Clone, PartialEq, Debug)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// How it is stored. Q8 and Q4 are for matrices only.
    pub format: WeightFormat,
    /// Its shape; of a quantized tensor the shape of its weights.
    pub shape: Vec<usize>,
}

/// Why a checkpoint cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The file cannot be created or written.
    #[error("cannot write {}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Two tensors of one name.
    #[error("tensor {tensor} is to be written twice to {}", file.display())]
    Repeated {
        /// The file.
        file: PathBuf,
        /// The name.
        tensor: String,
    },
    /// A tensor whose size overflows, or a quantized one that is no matrix.
    #[error("tensor {tensor} for {}: shape {shape:?} cannot be stored as {format}", file.display())]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its format.
        format: WeightFormat,
    },
    /// Values of another tensor than the one whose turn it is, or more values than it has.
    #[error("{bytes} bytes for tensor {found} in {}, but {expected}", file.display())]
    Order {
        /// The file.
        file: PathBuf,
        /// The tensor that was to be written.
        found: String,
        /// How many bytes of it: as stored when it is its turn, else as they were given.
        bytes: u64,
        /// Which tensor's turn it is, and how many bytes it still wants.
        expected: String,
    },
    /// The file was finished too early.
    #[error("{} lacks {missing} bytes of tensor {tensor}", file.display())]
    Unfinished {
        /// The file.
        file: PathBuf,
        /// The first tensor that is not complete.
        tensor: String,
        /// Bytes that it still wants.
        missing: u64,
    },
    /// A weight that its format cannot express.
    #[error("tensor {tensor} for {}: {source}", file.display())]
    Encode {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The weight; rows count from the start of the tensor.
        source: EncodeError,
    },
}

/// A safetensors file that is being written, tensor by tensor, each in as many pieces as the caller
/// likes.
///
/// Quantized tensors are stored as U8 `[rows, bytes of a row]`, groups of 32 weights one after the
/// other: an f16 scale and 32 signed bytes (Q8), or a word of scale and zero point
/// ([`PackedMatrix::data`](tensor::PackedMatrix::data)) and 16 bytes of which byte i holds codes i
/// (low nibble) and i + 16 (Q4). The file's metadata has `group32.NAME` = `q8 ROWSxCOLS` for each,
/// from which [`Checkpoint`](crate::Checkpoint) knows them.
#[derive(Debug)]
pub struct CheckpointWriter {
    path: PathBuf,
    file: File,
    tensors: Vec<Pending>,
    /// The tensor whose turn it is, and how many of its bytes are written.
    current: usize,
    written: u64,
    encoded: Vec<u8>,
}

#[derive(Debug)]
struct Pending {
    name: String,
    format: WeightFormat,
    cols: usize,
    row_bytes: u64,
    bytes: u64,
}

impl CheckpointWriter {
    /// Creates (or replaces) `path` and writes its header. `metadata` goes into the header beside
    /// the marks of quantized tensors.
    ///
    /// # Errors
    ///
    /// If the file cannot be created, a name occurs twice or a shape does not suit its format.
    pub fn create(
        path: impl AsRef<Path>,
        tensors: &[TensorSpec],
        metadata: &[(String, String)],
    ) -> Result<Self, WriteError> {
        let path = path.as_ref().to_owned();
        let pending =
            tensors.iter().map(|spec| Pending::new(&path, spec)).collect::<Result<Vec<_>, _>>()?;
        let header = header(&path, tensors, &pending, metadata)?;
        let io_error = |source| WriteError::Io { file: path.clone(), source };
        let mut file = File::create(&path).map_err(io_error)?;
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io_error)?;
        file.write_all(&header).map_err(io_error)?;
        let mut writer =
            Self { path, file, tensors: pending, current: 0, written: 0, encoded: Vec::new() };
        writer.skip_complete();
        Ok(writer)
    }

    /// Writes the next `values` of `tensor`, in the order of its elements, converted to its format.
    /// Tensors come in the order given at creation; a tensor without elements needs no call.
    ///
    /// # Errors
    ///
    /// If it is another tensor's turn, there are too many values, one cannot be expressed, or the
    /// file cannot be written.
    ///
    /// # Panics
    ///
    /// If the tensor is quantized and `values` are no whole number of rows.
    pub fn write(&mut self, tensor: &str, values: &[f32]) -> Result<(), WriteError> {
        let Some(pending) = self.tensors.get(self.current).filter(|pending| pending.name == tensor)
        else {
            return self.check_turn(tensor, size_of_val(values) as u64);
        };
        let (format, cols, row_bytes) = (pending.format, pending.cols, pending.row_bytes);
        // An unquantized tensor may be cut inside its rows, so its elements count as rows of one.
        let cols = if format.is_quantized() { cols } else { 1 };
        assert!(
            values.len().is_multiple_of(cols.max(1)),
            "{} values are no rows of {cols} of {tensor}",
            values.len()
        );
        let mut encoded = std::mem::take(&mut self.encoded);
        for part in values.chunks((PIECE / cols.max(1)).max(1) * cols.max(1)) {
            encoded.clear();
            encode_rows(format, cols, part, &mut encoded).map_err(|mut source| {
                let bytes_before = self.written
                    + source.row as u64 * format.stored_row_bytes(cols).unwrap_or(1) as u64;
                source.row = bytes_before.checked_div(row_bytes).unwrap_or(0) as usize;
                WriteError::Encode { file: self.path.clone(), tensor: tensor.to_owned(), source }
            })?;
            self.write_encoded(tensor, &encoded)?;
        }
        self.encoded = encoded;
        Ok(())
    }

    /// Writes the next bytes of `tensor`, which are already in its stored form ([`encode_rows`]).
    ///
    /// # Errors
    ///
    /// If it is another tensor's turn, there are too many bytes, or the file cannot be written.
    pub fn write_encoded(&mut self, tensor: &str, bytes: &[u8]) -> Result<(), WriteError> {
        self.check_turn(tensor, bytes.len() as u64)?;
        self.file
            .write_all(bytes)
            .map_err(|source| WriteError::Io { file: self.path.clone(), source })?;
        self.written += bytes.len() as u64;
        self.skip_complete();
        Ok(())
    }

    /// Checks that every tensor is complete, and hands the file to the system's care.
    ///
    /// # Errors
    ///
    /// If a tensor lacks bytes or the file cannot be flushed.
    pub fn finish(mut self) -> Result<(), WriteError> {
        if let Some(pending) = self.tensors.get(self.current) {
            let (tensor, missing) = (pending.name.clone(), pending.bytes - self.written);
            return Err(WriteError::Unfinished { file: self.path, tensor, missing });
        }
        self.file.flush().map_err(|source| WriteError::Io { file: self.path, source })
    }

    fn check_turn(&self, tensor: &str, bytes: u64) -> Result<(), WriteError> {
        let expected = match self.tensors.get(self.current) {
            Some(pending) if pending.name == tensor && bytes <= pending.bytes - self.written => {
                return Ok(());
            }
            _ if bytes == 0 => return Ok(()),
            Some(pending) => {
                format!(
                    "it is {}'s turn, of which {} are missing",
                    pending.name,
                    pending.bytes - self.written
                )
            }
            None => "all tensors are complete".to_owned(),
        };
        Err(WriteError::Order {
            file: self.path.clone(),
            found: tensor.to_owned(),
            bytes,
            expected,
        })
    }

    fn skip_complete(&mut self) {
        while self.tensors.get(self.current).is_some_and(|pending| pending.bytes == self.written) {
            self.current += 1;
            self.written = 0;
        }
    }
}

impl Pending {
    fn new(path: &Path, spec: &TensorSpec) -> Result<Self, WriteError> {
        let wrong = || WriteError::Shape {
            file: path.to_owned(),
            tensor: spec.name.clone(),
            shape: spec.shape.clone(),
            format: spec.format,
        };
        if spec.format.is_quantized() && spec.shape.len() != 2 {
            return Err(wrong());
        }
        let cols = spec.shape.last().copied().unwrap_or(1);
        let row_bytes = spec.format.stored_row_bytes(cols).ok_or_else(wrong)? as u64;
        let outer = spec.shape.split_last().map_or(&[][..], |(_, outer)| outer);
        let bytes = outer
            .iter()
            .try_fold(row_bytes, |product, &size| product.checked_mul(size as u64))
            .ok_or_else(wrong)?;
        Ok(Self { name: spec.name.clone(), format: spec.format, cols, row_bytes, bytes })
    }
}

/// The header's JSON, padded with spaces so that the data begins at a multiple of 8.
fn header(
    path: &Path,
    tensors: &[TensorSpec],
    pending: &[Pending],
    metadata: &[(String, String)],
) -> Result<Vec<u8>, WriteError> {
    let mut notes: Map<String, Value> =
        metadata.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    let mut entries = Map::new();
    let mut offset = 0_u64;
    for (spec, pending) in tensors.iter().zip(pending) {
        let (dtype, shape) = match spec.format {
            WeightFormat::F32 => ("F32", spec.shape.clone()),
            WeightFormat::Bf16 => ("BF16", spec.shape.clone()),
            WeightFormat::F16 => ("F16", spec.shape.clone()),
            WeightFormat::Q8 | WeightFormat::Q4 => {
                let [rows, cols] = [spec.shape[0], spec.shape[1]];
                notes.insert(format!("{MARK}{}", spec.name), json!(mark(spec.format, rows, cols)));
                ("U8", vec![rows, pending.row_bytes as usize])
            }
        };
        let overflow = || WriteError::Shape {
            file: path.to_owned(),
            tensor: spec.name.clone(),
            shape: spec.shape.clone(),
            format: spec.format,
        };
        let end = offset.checked_add(pending.bytes).ok_or_else(overflow)?;
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [offset, end] });
        if entries.insert(spec.name.clone(), entry).is_some() {
            return Err(WriteError::Repeated { file: path.to_owned(), tensor: spec.name.clone() });
        }
        offset = end;
    }
    let mut all = Map::new();
    all.insert("__metadata__".to_owned(), Value::Object(notes));
    all.extend(entries);
    let mut header = Value::Object(all).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}
