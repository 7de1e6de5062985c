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
    gguf::GgufTensor,
    gguf_model::{further_layers, tensor_name, tensor_shape},
    header::{Entry, Fields, excerpt, read_header},
    matrix::Stored,
    names::Renaming,
    quantization::{self, Quantization},
    region::Region,
    stored::{Float, Ggml, GgmlType, Group32},
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
    quantization: Quantization,
    bytes_read: Arc<AtomicU64>,
}

/// A tensor of a file.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) file: Arc<WeightFile>,
    /// The name in the file.
    pub(crate) name: Arc<str>,
    /// The shape; of a quantized tensor the shape of its weights.
    pub(crate) shape: Vec<usize>,
    /// From the start of the file.
    offset: u64,
    encoding: Encoding,
}

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Encoding {
    Plain(Dtype),
    /// Groups of 32, by a mark in the file's metadata.
    Marked(WeightFormat),
    Ggml(GgmlType),
}

impl Checkpoint {
    /// Opens `folder`, which holds `model.safetensors`, or `model.safetensors.index.json` with the
    /// files it names.
    ///
    /// # Errors
    ///
    /// Anything wrong with the folder, the index or a header; see [`CheckpointError`].
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        Self::open_folder(folder.as_ref(), Quantization::default())
    }

    pub(crate) fn open_folder(
        folder: &Path,
        quantization: Quantization,
    ) -> Result<Self, CheckpointError> {
        let mut checkpoint = Self {
            folder: folder.to_owned(),
            tensors: HashMap::new(),
            quantization,
            bytes_read: Arc::default(),
        };
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

    /// The tensors of GGUF files, the parts of one model.
    pub(crate) fn of_gguf(
        path: &Path,
        parts: &[(Arc<WeightFile>, Vec<GgufTensor>)],
        bytes_read: Arc<AtomicU64>,
    ) -> Result<Self, CheckpointError> {
        let mut checkpoint = Self {
            folder: path.to_owned(),
            tensors: HashMap::new(),
            quantization: Quantization::default(),
            bytes_read,
        };
        let names = parts.iter().flat_map(|(_, tensors)| tensors).map(|tensor| &*tensor.name);
        let further = further_layers(names);
        for (file, tensors) in parts {
            for tensor in tensors {
                let layer = tensor.name.split('.').nth(1).unwrap_or_default();
                let known = match further.contains(&layer) {
                    true => format!("mtp.{}", tensor.name),
                    false => tensor_name(&tensor.name).unwrap_or_else(|| tensor.name.clone()),
                };
                let tensor = Tensor {
                    file: Arc::clone(file),
                    name: tensor.name.as_str().into(),
                    shape: tensor_shape(&known, &tensor.shape),
                    offset: tensor.offset,
                    encoding: Encoding::Ggml(tensor.kind),
                };
                checkpoint.insert(known, tensor)?;
            }
        }
        Ok(checkpoint)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Whether a tensor of this name exists, or a matrix that is stored as several tensors.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name) || quantization::is_coded(self, name)
    }

    /// Shape of a tensor; of a quantized one the shape of the weights, not of the stored bytes.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|tensor| &*tensor.shape)
    }

    /// The packed format in which a tensor is kept unless the user chooses one; see
    /// [`Matrix::format`].
    ///
    /// # Errors
    ///
    /// If the tensor is absent or cannot be weights.
    pub fn stored_format(&self, name: &str) -> Result<WeightFormat, CheckpointError> {
        if let Some(format) = quantization::format_of_parts(self, name) {
            return Ok(format);
        }
        match self.stacked(name) {
            Some((tensor, _)) => tensor.format(),
            None => self.tensor(name)?.format(),
        }
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
        self.values(name, &[len])
    }

    /// Reads all values of a small tensor of the given shape, row-major, stored in any float
    /// format.
    ///
    /// # Errors
    ///
    /// If it is absent, has another shape or dtype, or cannot be read.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        let tensor = self.tensor(name)?;
        tensor.expect_shape(shape)?;
        let mut out = vec![0.0; shape.iter().product()];
        Matrix::new(tensor.stored(0, 1, out.len())?).read_row(0, &mut out)?;
        Ok(out)
    }

    /// A handle to a matrix of shape `[rows, cols]`, however it is stored: as one tensor, as codes
    /// with scales, or as a slice of stacked experts. No weights are read yet.
    ///
    /// # Errors
    ///
    /// If it is absent or has another shape, or a dtype that cannot be weights.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, CheckpointError> {
        if let Some(coded) = quantization::open(self, name, [rows, cols]) {
            return Ok(Matrix::new(Arc::new(coded?)));
        }
        if let Some((tensor, first)) = self.stacked(name) {
            let [experts, stored, width] = tensor.shape[..] else {
                return Err(tensor.wrong_shape(&[0, rows, cols]));
            };
            // Gate and up may lie one below the other.
            if width != cols || stored != first.of * rows || first.expert >= experts {
                return Err(tensor.wrong_shape(&[first.expert + 1, first.of * rows, cols]));
            }
            let start = first.expert * stored + first.part * rows;
            return Ok(Matrix::new(tensor.stored(start, rows, cols)?));
        }
        let tensor = self.tensor(name)?;
        tensor.expect_shape(&[rows, cols])?;
        Ok(Matrix::new(tensor.stored(0, rows, cols)?))
    }

    /// Checks that a tensor is there and has this shape.
    ///
    /// # Errors
    ///
    /// If it is absent or has another shape.
    pub fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<(), CheckpointError> {
        match *shape {
            [rows, cols] if !self.tensors.contains_key(name) => {
                self.matrix(name, rows, cols).map(drop)
            }
            _ => self.tensor(name)?.expect_shape(shape),
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    pub(crate) fn quantization(&self) -> &Quantization {
        &self.quantization
    }

    pub(crate) fn no_tensor(&self, name: &str) -> CheckpointError {
        CheckpointError::NoTensor { folder: self.folder.clone(), tensor: name.to_owned() }
    }

    fn tensor(&self, name: &str) -> Result<&Tensor, CheckpointError> {
        self.tensors.get(name).ok_or_else(|| self.no_tensor(name))
    }

    /// The tensor of all experts of a layer that holds the matrix `name` of one, and where.
    fn stacked(&self, name: &str) -> Option<(&Tensor, Place)> {
        if self.tensors.contains_key(name) {
            return None;
        }
        let (layer, rest) = name.split_once(".experts.")?;
        let (expert, matrix) = rest.split_once('.')?;
        let expert = expert.parse().ok()?;
        let matrix = matrix.strip_suffix(".weight")?;
        let stack = |name: &str| {
            let base = format!("{layer}.experts.{name}");
            self.tensors.get(&format!("{base}.weight")).or_else(|| self.tensors.get(&base))
        };
        if let Some(tensor) = stack(matrix) {
            return Some((tensor, Place { expert, part: 0, of: 1 }));
        }
        let part = ["gate_proj", "up_proj"].iter().position(|name| *name == matrix)?;
        Some((stack("gate_up_proj")?, Place { expert, part, of: 2 }))
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
            let (shape, encoding) = match mark {
                Some((format, shape)) => (shape.to_vec(), Encoding::Marked(format)),
                None => (entry.shape, Encoding::Plain(entry.dtype)),
            };
            let (file, stored) = (Arc::clone(&file), name.as_str().into());
            let offset = entry.offset;
            self.insert(name, Tensor { file, name: stored, shape, offset, encoding })?;
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

/// A matrix in a stack of experts: the expert, and which of the parts that lie one below the other.
#[derive(Clone, Copy)]
struct Place {
    expert: usize,
    part: usize,
    of: usize,
}

impl Tensor {
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The dtype of a safetensors tensor that is not quantized in groups of 32.
    pub(crate) fn dtype(&self) -> Option<Dtype> {
        match self.encoding {
            Encoding::Plain(dtype) => Some(dtype),
            Encoding::Marked(_) | Encoding::Ggml(_) => None,
        }
    }

    pub(crate) fn expect_shape(&self, expected: &[usize]) -> Result<(), CheckpointError> {
        if self.shape == expected { Ok(()) } else { Err(self.wrong_shape(expected)) }
    }

    fn wrong_shape(&self, expected: &[usize]) -> CheckpointError {
        CheckpointError::Shape {
            file: self.file.path().to_owned(),
            tensor: self.name.to_string(),
            found: self.shape.clone(),
            expected: expected.to_vec(),
        }
    }

    /// The bytes of the tensor as rows of `row_bytes`; the shape was checked.
    pub(crate) fn region(&self, rows: usize, row_bytes: usize) -> Region {
        Region {
            file: Arc::clone(&self.file),
            name: Arc::clone(&self.name),
            offset: self.offset,
            rows,
            row_bytes,
        }
    }

    fn format(&self) -> Result<WeightFormat, CheckpointError> {
        match self.encoding {
            Encoding::Marked(format) => Ok(format),
            Encoding::Ggml(kind) => Ok(kind.same_as().unwrap_or(WeightFormat::Q8)),
            Encoding::Plain(Dtype::F32) => Ok(WeightFormat::F32),
            Encoding::Plain(Dtype::BF16) => Ok(WeightFormat::Bf16),
            Encoding::Plain(Dtype::F16) => Ok(WeightFormat::F16),
            Encoding::Plain(other) => {
                quantization::format_of(self).ok_or_else(|| CheckpointError::Dtype {
                    file: self.file.path().to_owned(),
                    tensor: self.name.to_string(),
                    found: other.to_string(),
                    expected: "F32, BF16, F16, or U8 marked as group32 in the file's metadata",
                })
            }
        }
    }

    /// `rows` rows of `cols` columns, from row `first` of all rows of the tensor on.
    fn stored(
        &self,
        first: usize,
        rows: usize,
        cols: usize,
    ) -> Result<Arc<dyn Stored>, CheckpointError> {
        let row_bytes =
            |format: WeightFormat| format.stored_row_bytes(cols).expect("checked with the header");
        let region = |row_bytes: usize| {
            let mut region = self.region(rows, row_bytes);
            region.offset += (first * row_bytes) as u64;
            region
        };
        let format = match self.encoding {
            Encoding::Ggml(kind) => match kind.same_as() {
                Some(format) => format,
                None => {
                    let (weights, bytes) = kind.block();
                    let region = region(cols / weights * bytes);
                    return Ok(Arc::new(Ggml::new(region, kind, cols)));
                }
            },
            Encoding::Plain(Dtype::F32 | Dtype::BF16 | Dtype::F16) | Encoding::Marked(_) => {
                self.format()?
            }
            Encoding::Plain(other) => {
                return Err(CheckpointError::Dtype {
                    file: self.file.path().to_owned(),
                    tensor: self.name.to_string(),
                    found: other.to_string(),
                    expected: "F32, BF16, F16, or U8 marked as group32 in the file's metadata",
                });
            }
        };
        let region = region(row_bytes(format));
        Ok(if format.is_quantized() {
            Arc::new(Group32::new(region, format, cols))
        } else {
            Arc::new(Float::new(region, format, cols))
        })
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
