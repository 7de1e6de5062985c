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
use serde_json::{Value, value::RawValue};
use tensor::WeightFormat;

use crate::{
    CheckpointError, Document, DocumentError, Matrix,
    file::WeightFile,
    header::{Entry, Fields, excerpt, read_header},
    matrix::Stored,
    names::Renaming,
    region::Region,
    stored::{Float, Group32},
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Bytes of an index, several times those of the largest published models.
const MAX_INDEX: u64 = 64 << 20;

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
///
/// Tensors have the names that causal language models of transformers give them, such as
/// `model.layers.0.mlp.up_proj.weight`, whatever prefix the files use.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    tensors: HashMap<String, Tensor>,
    bytes_read: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Tensor {
    file: Arc<WeightFile>,
    /// The name in the file.
    name: Arc<str>,
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
        let mut checkpoint =
            Self { folder: folder.to_owned(), tensors: HashMap::new(), bytes_read: Arc::default() };
        let present = |name: &str| folder.join(name).symlink_metadata().is_ok();
        // A folder with both is read as Hugging Face's transformers does: the single file counts.
        if present(SINGLE) {
            checkpoint.add_file(folder.join(SINGLE))?;
        } else if present(INDEX) {
            checkpoint.open_index(&folder.join(INDEX))?;
        } else {
            return Err(CheckpointError::NoWeights { folder: folder.to_owned() });
        }
        let renaming = Renaming::new(|name| checkpoint.tensors.contains_key(name));
        for (name, tensor) in std::mem::take(&mut checkpoint.tensors) {
            checkpoint.insert(renaming.apply(name), tensor)?;
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

    /// The packed format in which a tensor is kept unless the user chooses one; see
    /// [`Matrix::format`].
    ///
    /// # Errors
    ///
    /// If the tensor is absent or cannot be weights.
    pub fn stored_format(&self, name: &str) -> Result<WeightFormat, CheckpointError> {
        self.tensor(name)?.format()
    }

    /// The file that holds a tensor.
    pub fn file(&self, name: &str) -> Option<&Path> {
        self.tensors.get(name).map(|tensor| tensor.file.path())
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
        tensor.expect_shape(&[len])?;
        let mut out = vec![0.0; len];
        tensor.matrix(1, len)?.read_row(0, &mut out)?;
        Ok(out)
    }

    /// A handle to a matrix of shape `[rows, cols]`. Nothing is read yet.
    ///
    /// # Errors
    ///
    /// If it is absent or has another shape, or a dtype that cannot be weights.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, CheckpointError> {
        let tensor = self.tensor(name)?;
        tensor.expect_shape(&[rows, cols])?;
        tensor.matrix(rows, cols)
    }

    /// Checks that a tensor is there and has this shape.
    ///
    /// # Errors
    ///
    /// If it is absent or has another shape.
    pub fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<(), CheckpointError> {
        self.tensor(name)?.expect_shape(shape)
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
        let file = Arc::new(WeightFile::open(path, Arc::clone(&self.bytes_read))?);
        let header = read_header(&file)?;
        self.tensors.reserve(header.tensors.len());
        for (name, entry) in header.tensors {
            let mark = match header.metadata.get(&format!("{MARK}{name}")) {
                Some(mark) => Some(parse_mark(file.path(), &name, mark, &entry)?),
                None => None,
            };
            let tensor =
                Tensor { file: Arc::clone(&file), name: name.as_str().into(), entry, mark };
            self.insert(name, tensor)?;
        }
        Ok(())
    }

    fn insert(&mut self, name: String, tensor: Tensor) -> Result<(), CheckpointError> {
        let file = tensor.file.path().to_owned();
        match self.tensors.insert(name.clone(), tensor) {
            None => Ok(()),
            Some(other) => Err(CheckpointError::DuplicateTensor {
                tensor: name,
                file: other.file.path().to_owned(),
                other: file,
            }),
        }
    }
}

impl Tensor {
    fn shape(&self) -> &[usize] {
        match &self.mark {
            Some((_, shape)) => shape,
            None => &self.entry.shape,
        }
    }

    fn expect_shape(&self, expected: &[usize]) -> Result<(), CheckpointError> {
        if self.shape() == expected {
            return Ok(());
        }
        Err(CheckpointError::Shape {
            file: self.file.path().to_owned(),
            tensor: self.name.to_string(),
            found: self.shape().to_vec(),
            expected: expected.to_vec(),
        })
    }

    fn format(&self) -> Result<WeightFormat, CheckpointError> {
        match (self.mark, self.entry.dtype) {
            (Some((format, _)), _) => Ok(format),
            (None, Dtype::F32) => Ok(WeightFormat::F32),
            (None, Dtype::BF16) => Ok(WeightFormat::Bf16),
            (None, Dtype::F16) => Ok(WeightFormat::F16),
            (None, other) => Err(CheckpointError::Dtype {
                file: self.file.path().to_owned(),
                tensor: self.name.to_string(),
                found: other.to_string(),
                expected: "F32, BF16, F16, or U8 marked as group32 in the file's metadata",
            }),
        }
    }

    /// The tensor as `[rows, cols]`, which its shape was checked to be, or to flatten to.
    fn matrix(&self, rows: usize, cols: usize) -> Result<Matrix, CheckpointError> {
        let format = self.format()?;
        let region = Region {
            file: Arc::clone(&self.file),
            name: Arc::clone(&self.name),
            offset: self.entry.offset,
            rows,
            row_bytes: format.stored_row_bytes(cols).expect("checked with the header"),
        };
        let stored: Arc<dyn Stored> = if format.is_quantized() {
            Arc::new(Group32::new(region, format, cols))
        } else {
            Arc::new(Float::new(region, format, cols))
        };
        Ok(Matrix::new(stored))
    }
}

/// The index's `weight_map`: tensor and file name, sorted.
fn read_weight_map(
    index: &Path,
    bytes_read: &Arc<AtomicU64>,
) -> Result<Vec<(String, String)>, CheckpointError> {
    let Some(Document { bytes: text, .. }) = Document::read(index, MAX_INDEX)? else {
        let source = Arc::new(io::ErrorKind::NotFound.into());
        return Err(DocumentError::Read { file: index.to_owned(), source }.into());
    };
    bytes_read.fetch_add(text.len() as u64, Ordering::Relaxed);
    let wrong = |error: serde_json::Error| CheckpointError::IndexJson {
        file: index.to_owned(),
        reason: error.to_string(),
    };
    let top: Fields<&RawValue> = serde_json::from_slice(&text).map_err(wrong)?;
    let field =
        |field: &str, found: Option<&Value>, expected: &'static str| CheckpointError::IndexField {
            file: index.to_owned(),
            field: field.to_owned(),
            found: excerpt(found),
            expected,
        };
    let map = top.fields.iter().find(|(key, _)| key == "weight_map").map(|(_, text)| *text);
    let Some(map) = map.filter(|map| map.get().starts_with('{')) else {
        let found = map.map(|map| serde_json::from_str(map.get())).transpose().map_err(wrong)?;
        return Err(field("weight_map", found.as_ref(), "an object that maps tensors to files"));
    };
    let Fields { fields, complete } = serde_json::from_str(map.get()).map_err(wrong)?;
    if !complete {
        let (file, limit) = (index.to_owned(), fields.len());
        return Err(CheckpointError::TooManyTensors { file, limit });
    }
    if fields.is_empty() {
        return Err(field(
            "weight_map",
            Some(&Value::Object(Default::default())),
            "an object that maps tensors to files",
        ));
    }
    let mut weight_map = Vec::with_capacity(fields.len());
    for (tensor, text) in fields {
        let text: &RawValue = text;
        let file: Value = serde_json::from_str(text.get()).map_err(wrong)?;
        let name = file.as_str().and_then(inside_folder).ok_or_else(|| {
            field(&format!("weight_map[{tensor:?}]"), Some(&file), "a file name inside the folder")
        })?;
        weight_map.push((tensor, name));
    }
    weight_map.sort_unstable();
    Ok(weight_map)
}

/// A file name of an index, without `./`. An index from elsewhere must not make this program open
/// other files of the machine.
fn inside_folder(name: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in Path::new(name).components() {
        match part {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir => {}
            _ => return None,
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
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
