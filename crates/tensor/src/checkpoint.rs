//! A checkpoint folder: one safetensors file, or several with an index.

use std::{
    collections::HashMap,
    io,
    path::{Component, Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use safetensors::Dtype;
use serde_json::Value;

use crate::{
    CheckpointError, Matrix, WeightFormat,
    header::{Entry, Fields, excerpt, read_header},
    matrix::Stored,
    source::Source,
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Prefix of the metadata keys that mark quantized tensors: `group32.NAME` = `q8 ROWSxCOLS`.
pub(crate) const MARK: &str = "group32.";

/// The quantized formats as marks name them. (`q4` were groups without a zero point.)
const MARKED: [(&str, WeightFormat); 2] = [("q8", WeightFormat::Q8), ("q4z", WeightFormat::Q4)];

/// The mark of a quantized tensor `[rows, cols]`.
pub(crate) fn mark(format: WeightFormat, rows: usize, cols: usize) -> String {
    let (name, _) = MARKED.iter().find(|(_, other)| *other == format).expect("a quantized format");
    format!("{name} {rows}x{cols}")
}

/// The weights of a model on disk. Opening reads and checks the headers of all files; weights are
/// read when asked for, and only those asked for. Cheap to share between threads.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    tensors: HashMap<String, Tensor>,
    bytes_read: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Tensor {
    source: Arc<Source>,
    entry: Entry,
    /// Set for quantized tensors: the format, rows and columns behind the stored bytes.
    mark: Option<(WeightFormat, [usize; 2])>,
}

impl Checkpoint {
    /// Opens `folder`, which holds `model.safetensors`, or `model.safetensors.index.json` with the
    /// files it names.
    ///
    /// # Errors
    ///
    /// Anything wrong with the folder, the index or a header; see [`CheckpointError`].
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let folder = folder.as_ref();
        if !folder.is_dir() {
            return Err(CheckpointError::NoFolder { folder: folder.to_owned() });
        }
        let mut checkpoint =
            Self { folder: folder.to_owned(), tensors: HashMap::new(), bytes_read: Arc::default() };
        // A folder with both is read as Hugging Face's transformers does: the single file counts.
        if folder.join(SINGLE).exists() {
            checkpoint.add_file(folder.join(SINGLE))?;
        } else if folder.join(INDEX).exists() {
            checkpoint.open_index(&folder.join(INDEX))?;
        } else {
            return Err(CheckpointError::NoWeights { folder: folder.to_owned() });
        }
        Ok(checkpoint)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Whether a tensor of this name exists.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Shape of a tensor; of a quantized one the shape of the weights, not of the stored bytes.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(Tensor::shape)
    }

    /// The format in which a tensor is stored.
    ///
    /// # Errors
    ///
    /// If the tensor is absent or its dtype is none of the weight formats.
    pub fn stored_format(&self, name: &str) -> Result<WeightFormat, CheckpointError> {
        self.tensor(name)?.format(name)
    }

    /// The file that holds a tensor.
    pub fn file(&self, name: &str) -> Option<&Path> {
        self.tensors.get(name).map(|tensor| tensor.source.path())
    }

    /// Bytes read from the files so far, headers included, by this checkpoint and all matrices it
    /// gave out.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Reads a vector of `len` elements, stored in any float format.
    ///
    /// # Errors
    ///
    /// If it is absent, has another shape or dtype, or cannot be read.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let tensor = self.tensor(name)?;
        tensor.expect_shape(name, &[len])?;
        let format = tensor.format(name)?;
        let mut out = vec![0.0; len];
        tensor.matrix(name, format, 1, len).read_row(0, &mut out)?;
        Ok(out)
    }

    /// A handle to a matrix of shape `[rows, cols]`. Nothing is read yet.
    ///
    /// # Errors
    ///
    /// If it is absent or has another shape, or a dtype that cannot be weights.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, CheckpointError> {
        let tensor = self.tensor(name)?;
        tensor.expect_shape(name, &[rows, cols])?;
        Ok(tensor.matrix(name, tensor.format(name)?, rows, cols))
    }

    /// Checks that a tensor is there and has this shape.
    ///
    /// # Errors
    ///
    /// If it is absent or has another shape.
    pub fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<(), CheckpointError> {
        self.tensor(name)?.expect_shape(name, shape)
    }

    fn tensor(&self, name: &str) -> Result<&Tensor, CheckpointError> {
        self.tensors.get(name).ok_or_else(|| CheckpointError::NoTensor {
            folder: self.folder.clone(),
            tensor: name.to_owned(),
        })
    }

    fn open_index(&mut self, index: &Path) -> Result<(), CheckpointError> {
        let weight_map = read_weight_map(index, &self.bytes_read)?;
        // One tensor for each file, for the message if the file is missing; in the order of the
        // names.
        let mut files: Vec<(&str, &str)> = Vec::new();
        for (tensor, file) in &weight_map {
            if !files.iter().any(|(_, known)| known == file) {
                files.push((tensor, file));
            }
        }
        for (tensor, file) in files {
            let path = self.folder.join(file);
            self.add_file(path.clone()).map_err(|error| match error {
                CheckpointError::Open { source, .. }
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    CheckpointError::IndexFile {
                        file: index.to_owned(),
                        tensor: tensor.to_owned(),
                        missing: path,
                    }
                }
                other => other,
            })?;
        }
        for (name, file) in weight_map {
            let shard = self.folder.join(file);
            if self.file(&name) != Some(&shard) {
                return Err(CheckpointError::IndexTensor {
                    file: index.to_owned(),
                    tensor: name,
                    shard,
                });
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let source = Arc::new(Source::open(path, Arc::clone(&self.bytes_read))?);
        let header = read_header(&source)?;
        self.tensors.reserve(header.tensors.len());
        for (name, entry) in header.tensors {
            let mark = match header.metadata.get(&format!("{MARK}{name}")) {
                Some(mark) => Some(parse_mark(source.path(), &name, mark, &entry)?),
                None => None,
            };
            if let Some(other) = self.tensors.get(&name) {
                return Err(CheckpointError::DuplicateTensor {
                    tensor: name,
                    file: other.source.path().to_owned(),
                    other: source.path().to_owned(),
                });
            }
            self.tensors.insert(name, Tensor { source: Arc::clone(&source), entry, mark });
        }
        Ok(())
    }
}

impl Tensor {
    fn shape(&self) -> &[usize] {
        match &self.mark {
            Some((_, shape)) => shape,
            None => &self.entry.shape,
        }
    }

    fn expect_shape(&self, name: &str, expected: &[usize]) -> Result<(), CheckpointError> {
        if self.shape() == expected {
            return Ok(());
        }
        Err(CheckpointError::Shape {
            file: self.source.path().to_owned(),
            tensor: name.to_owned(),
            found: self.shape().to_vec(),
            expected: expected.to_vec(),
        })
    }

    fn format(&self, name: &str) -> Result<WeightFormat, CheckpointError> {
        match (self.mark, self.entry.dtype) {
            (Some((format, _)), _) => Ok(format),
            (None, Dtype::F32) => Ok(WeightFormat::F32),
            (None, Dtype::BF16) => Ok(WeightFormat::Bf16),
            (None, Dtype::F16) => Ok(WeightFormat::F16),
            (None, other) => Err(CheckpointError::Dtype {
                file: self.source.path().to_owned(),
                tensor: name.to_owned(),
                found: other.to_string(),
                expected: "F32, BF16, F16, or U8 marked as group32 in the file's metadata",
            }),
        }
    }

    fn matrix(&self, name: &str, format: WeightFormat, rows: usize, cols: usize) -> Matrix {
        Matrix::new(Stored::new(
            Arc::clone(&self.source),
            name,
            format,
            self.entry.offset,
            rows,
            cols,
        ))
    }
}

/// The index's `weight_map`: tensor and file name, sorted.
fn read_weight_map(
    index: &Path,
    bytes_read: &Arc<AtomicU64>,
) -> Result<Vec<(String, String)>, CheckpointError> {
    let text = std::fs::read(index)
        .map_err(|source| CheckpointError::Open { file: index.to_owned(), source })?;
    bytes_read.fetch_add(text.len() as u64, Ordering::Relaxed);
    let Fields(fields) = serde_json::from_slice(&text).map_err(|error| {
        CheckpointError::IndexJson { file: index.to_owned(), reason: error.to_string() }
    })?;
    let field =
        |field: &str, found: Option<&Value>, expected: &'static str| CheckpointError::IndexField {
            file: index.to_owned(),
            field: field.to_owned(),
            found: excerpt(found),
            expected,
        };
    let map = fields.iter().find(|(key, _)| key == "weight_map").map(|(_, value)| value);
    let object = map
        .and_then(Value::as_object)
        .filter(|object| !object.is_empty())
        .ok_or_else(|| field("weight_map", map, "an object that maps tensors to files"))?;
    let mut weight_map = Vec::with_capacity(object.len());
    for (tensor, file) in object {
        let name = file.as_str().filter(|name| stays_in_folder(name)).ok_or_else(|| {
            field(&format!("weight_map[{tensor:?}]"), Some(file), "a file name inside the folder")
        })?;
        weight_map.push((tensor.clone(), name.to_owned()));
    }
    weight_map.sort_unstable();
    Ok(weight_map)
}

/// An index from elsewhere must not make us open other files of the machine.
fn stays_in_folder(name: &str) -> bool {
    let mut parts = Path::new(name).components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// Reads a mark such as `q8 1024x3072` and holds it against the stored bytes.
fn parse_mark(
    file: &Path,
    tensor: &str,
    mark: &str,
    entry: &Entry,
) -> Result<(WeightFormat, [usize; 2]), CheckpointError> {
    let wrong = |expected: String| CheckpointError::QuantizationMark {
        file: file.to_owned(),
        tensor: tensor.to_owned(),
        found: mark.to_owned(),
        expected,
    };
    let parsed = mark.split_once(' ').and_then(|(name, shape)| {
        let (_, format) = *MARKED.iter().find(|(other, _)| *other == name)?;
        let (rows, cols) = shape.split_once('x')?;
        Some((format, [rows.parse().ok()?, cols.parse().ok()?]))
    });
    if mark.starts_with("q4 ") {
        return Err(wrong(
            "q4z: q4 without zero points is of an earlier version, `qwen3 quantize` makes it anew"
                .to_owned(),
        ));
    }
    let Some((format, [rows, cols])) = parsed else {
        return Err(wrong("q8 or q4z (q4 with zero points), a space, and ROWSxCOLS".to_owned()));
    };
    let row_bytes = format.stored_row_bytes(cols);
    if entry.dtype != Dtype::U8
        || row_bytes.is_none_or(|row_bytes| entry.shape != [rows, row_bytes])
    {
        return Err(wrong(format!(
            "a mark that fits the stored {} {:?}",
            entry.dtype, entry.shape
        )));
    }
    Ok((format, [rows, cols]))
}
