//! What can be wrong with the files of a model, and how each case is told to its user.

use std::{io, path::PathBuf, sync::Arc};

use tensor::WeightFormat;

/// Why a path is not a model.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is nothing at the path.
    #[error("{} does not exist; expected the folder of a model", path.display())]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// A `~` that the shell left as it is.
    #[error("{} does not exist: the shell replaces ~ only outside of quotes; write $HOME instead", path.display())]
    Tilde {
        /// The path.
        path: PathBuf,
    },
    /// The path is a link to nothing.
    #[error("{} is a link to {}, which does not exist", path.display(), target.display())]
    DanglingLink {
        /// The path.
        path: PathBuf,
        /// Where the link leads.
        target: PathBuf,
    },
    /// The name of a model on the hub that was not downloaded.
    #[error("{name} is neither a folder nor in the local cache {}; download it with `hf download {name}`, or give its folder", cache.display())]
    HubName {
        /// The name.
        name: String,
        /// The cache of Hugging Face's programs.
        cache: PathBuf,
    },
    /// The path is one file of a model that is a folder.
    #[error("{} is one file of a model; expected the folder that holds all of its files: {}", path.display(), folder.display())]
    FileOfModel {
        /// The path.
        path: PathBuf,
        /// The file's folder.
        folder: PathBuf,
    },
    /// A folder with GGUF files of several models.
    #[error("{} holds several GGUF files; expected one of them: {}", path.display(), found.join(" or "))]
    SeveralGguf {
        /// The folder.
        path: PathBuf,
        /// The names of some.
        found: Vec<String>,
    },
    /// A later part of a split GGUF file.
    #[error("{} is a later part of a split model; expected its first part, {}", path.display(), first.display())]
    LaterPart {
        /// The path.
        path: PathBuf,
        /// The first part.
        first: PathBuf,
    },
    /// The path is a pipe, a socket or a device.
    #[error("{} is neither a folder nor a regular file; expected the folder of a model", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
    },
    /// The path is a file of another kind.
    #[error("{} is not a file of a model; expected the folder of a model", path.display())]
    NotModel {
        /// The path.
        path: PathBuf,
    },
    /// The path is the cache of Hugging Face's programs, or the folder above it.
    #[error("{} is a cache of many models; expected one of them, such as {}", path.display(), models.iter().map(|model| model.display().to_string()).collect::<Vec<_>>().join(" or "))]
    CacheRoot {
        /// The path.
        path: PathBuf,
        /// Some models in it.
        models: Vec<PathBuf>,
    },
    /// A model in the cache whose snapshots leave open which one is meant.
    #[error("{} has the snapshots {found:?}, of which refs/main names none; expected the path of one of them", path.display())]
    Snapshots {
        /// The folder `models--…`.
        path: PathBuf,
        /// The names of its snapshots.
        found: Vec<String>,
    },
    /// The path cannot be looked at.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: Arc<io::Error>,
    },
}

/// Why a small file of a model cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// A folder without `config.json`.
    #[error("{} has no config.json; expected the folder of a model, with config.json and *.safetensors", folder.display())]
    NoConfig {
        /// The folder.
        folder: PathBuf,
    },
    /// A model without `tokenizer.json`.
    #[error("{}: no such file; expected the model's tokenizer", file.display())]
    NoTokenizer {
        /// Where it should be.
        file: PathBuf,
    },
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: Arc<io::Error>,
    },
    /// The file is larger than any of its kind.
    #[error("{} has {found} bytes or more, expected at most {limit}", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its size, as far as it was read.
        found: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The file is not text.
    #[error("{}: the byte at offset {offset} is not UTF-8", file.display())]
    Encoding {
        /// The file.
        file: PathBuf,
        /// The first such byte.
        offset: usize,
    },
    /// The metadata of a GGUF file does not describe a model.
    #[error("{}: {key} is {found}, expected {expected}", file.display())]
    Metadata {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// Its value, shortened.
        found: String,
        /// What would do.
        expected: String,
    },
    /// A file of the model names a file elsewhere.
    #[error("{name:?} leads out of {}, expected a file of the model's folder", folder.display())]
    Outside {
        /// The model's folder.
        folder: PathBuf,
        /// The name.
        name: String,
    },
    /// The header of a GGUF file cannot be read.
    #[error(transparent)]
    Header(Arc<CheckpointError>),
    /// A folder holds too many files.
    #[error("{} holds {found} files, expected at most {limit}", folder.display())]
    TooMany {
        /// The folder.
        folder: PathBuf,
        /// How many.
        found: usize,
        /// The limit.
        limit: usize,
    },
}

/// Why a checkpoint cannot be opened or read. Every variant names the file, and the tensor where
/// there is one, with what was found and what was expected.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The folder holds no weights under the names that Hugging Face uses.
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json", folder.display())]
    NoWeights {
        /// The checkpoint folder.
        folder: PathBuf,
    },
    /// A file could not be opened or its size not be found.
    #[error("cannot open {}: {source}", file.display())]
    Open {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: Arc<io::Error>,
    },
    /// A file could not be read.
    #[error("cannot read {bytes} bytes at offset {offset} of {} for {what}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The tensor, or the part of the file.
        what: String,
        /// Where in the file.
        offset: u64,
        /// How many bytes were wanted.
        bytes: usize,
        /// The system's reason; `UnexpectedEof` if the file became shorter after it was opened.
        source: Arc<io::Error>,
    },
    /// A file is too short for the length of its header.
    #[error("{} has {found} bytes, a safetensors file has at least 8", file.display())]
    NoHeader {
        /// The file.
        file: PathBuf,
        /// Its size.
        found: u64,
    },
    /// The header's stated length goes beyond the file, or beyond any sane header.
    #[error("the header of {} claims {found} bytes, at most {max} are possible", file.display())]
    HeaderLength {
        /// The file.
        file: PathBuf,
        /// Length stated by the first 8 bytes.
        found: u64,
        /// What the file's size and the format's limit (100 MB) allow.
        max: u64,
    },
    /// The file is what git keeps in place of a large file.
    #[error("{} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`, or download the model again", file.display())]
    LfsPointer {
        /// The file.
        file: PathBuf,
    },
    /// The header is not a JSON object.
    #[error("the header of {} is not a JSON object: {reason}", file.display())]
    HeaderJson {
        /// The file.
        file: PathBuf,
        /// Where and why the parser stopped.
        reason: String,
    },
    /// A field of a tensor's header entry is absent or of the wrong kind.
    #[error("tensor {tensor} in {}: field {field:?} is {found}, expected {expected}", file.display())]
    HeaderField {
        /// The file.
        file: PathBuf,
        /// The tensor (`__metadata__` for the metadata).
        tensor: String,
        /// The field.
        field: &'static str,
        /// Its value as JSON, or `absent`.
        found: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// The dtype is none of the format's.
    #[error("tensor {tensor} in {}: unknown dtype {found:?}, expected F32, BF16, F16 or another safetensors dtype", file.display())]
    UnknownDtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The dtype as written.
        found: String,
    },
    /// The size computed from shape and dtype does not fit in 64 bits.
    #[error("tensor {tensor} in {}: the size of {dtype} {shape:?} overflows", file.display())]
    SizeOverflow {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The file ends before the data that its header describes.
    #[error("{} is shorter than its header says: it has {found} bytes, expected {expected}; download it again", file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The size that the header describes.
        expected: u64,
    },
    /// More tensors than any model has.
    #[error("the header of {} has more than {limit} entries", file.display())]
    TooManyTensors {
        /// The file.
        file: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// A tensor of a quantized matrix contradicts the matrix or `config.json`.
    #[error("tensor {tensor} in {}: found {found}, expected {expected}", file.display())]
    Quantization {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What was found.
        found: String,
        /// What would fit.
        expected: String,
    },
    /// A part of a GGUF file's header is wrong.
    #[error("{}: {what} is {found}, expected {expected}", file.display())]
    Gguf {
        /// The file.
        file: PathBuf,
        /// The key, the tensor or the part of the header.
        what: String,
        /// What was found.
        found: String,
        /// What would do.
        expected: String,
    },
    /// A part of a split GGUF model is absent.
    #[error("{} is part 1 of {count}, and {} does not exist", file.display(), missing.display())]
    GgufPart {
        /// The first part.
        file: PathBuf,
        /// The number of parts.
        count: usize,
        /// The first part that is missing.
        missing: PathBuf,
    },
    /// An index that is larger than any model's.
    #[error(transparent)]
    Index(#[from] DocumentError),
    /// The data offsets run backwards, or overflow.
    #[error("tensor {tensor} in {}: data offsets {start}..{end} are not a range of bytes", file.display())]
    OutOfRange {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// First byte, counted from the end of the header.
        start: u64,
        /// Byte after the last.
        end: u64,
    },
    /// The data offsets do not span the size that shape and dtype ask for.
    #[error("tensor {tensor} in {}: its offsets span {found} bytes, {dtype} {shape:?} needs {expected}", file.display())]
    SizeMismatch {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes between the offsets.
        found: u64,
        /// Bytes by shape and dtype.
        expected: u64,
    },
    /// Two tensors share bytes.
    #[error("tensor {tensor} in {} starts at byte {start}, inside tensor {other}, which ends at {end}", file.display())]
    Overlap {
        /// The file.
        file: PathBuf,
        /// The tensor that starts too early.
        tensor: String,
        /// The tensor before it.
        other: String,
        /// Where it starts.
        start: u64,
        /// Where the other ends.
        end: u64,
    },
    /// Bytes that belong to no tensor.
    #[error("{} has {} bytes of data that belong to no tensor, {start}..{end}", file.display(), end - start)]
    Hole {
        /// The file.
        file: PathBuf,
        /// First byte, counted from the end of the header.
        start: u64,
        /// Byte after the last.
        end: u64,
    },
    /// One name twice in one header.
    #[error("tensor {tensor} occurs twice in the header of {}", file.display())]
    RepeatedTensor {
        /// The file.
        file: PathBuf,
        /// The name.
        tensor: String,
    },
    /// One name in two files.
    #[error("tensor {tensor} occurs in {} and in {}", file.display(), other.display())]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// The first file.
        file: PathBuf,
        /// The second file.
        other: PathBuf,
    },
    /// The index file is not a JSON object.
    #[error("the index {} is not a JSON object: {reason}", file.display())]
    IndexJson {
        /// The index.
        file: PathBuf,
        /// Where and why the parser stopped.
        reason: String,
    },
    /// The index has no usable `weight_map`.
    #[error("the index {}: {field} is {found}, expected {expected}", file.display())]
    IndexField {
        /// The index.
        file: PathBuf,
        /// `weight_map` or an entry of it.
        field: String,
        /// Its value as JSON, or `absent`.
        found: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// The index names a file that is not there.
    #[error("the index {} puts tensor {tensor} into {}, which does not exist", file.display(), missing.display())]
    IndexFile {
        /// The index.
        file: PathBuf,
        /// A tensor that should be in the file.
        tensor: String,
        /// The file that is missing.
        missing: PathBuf,
    },
    /// The index names a tensor that its file lacks.
    #[error("the index {} puts tensor {tensor} into {}, which does not hold it", file.display(), shard.display())]
    IndexTensor {
        /// The index.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file that should hold it.
        shard: PathBuf,
    },
    /// A tensor that was asked for is not in the checkpoint.
    #[error("{} has no tensor {tensor}", folder.display())]
    NoTensor {
        /// The checkpoint folder.
        folder: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has another shape than the model asks for.
    #[error("tensor {tensor} in {} has shape {found:?}, expected {expected:?}", file.display())]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that was asked for.
        expected: Vec<usize>,
    },
    /// A tensor's dtype cannot serve as weights.
    #[error("tensor {tensor} in {} has dtype {found}, expected {expected}", file.display())]
    Dtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Dtype in the file.
        found: String,
        /// What would do.
        expected: &'static str,
    },
    /// The metadata that marks a quantized tensor is wrong or contradicts the tensor.
    #[error("tensor {tensor} in {} is marked as quantized by {found:?}, expected {expected}", file.display())]
    QuantizationMark {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The mark.
        found: String,
        /// What it should look like.
        expected: String,
    },
    /// A weight is NaN or infinite, or a scale of quantized ones is.
    #[error("tensor {tensor} in {}, row {row}: a weight or scale is {found}, expected finite numbers", file.display())]
    NotFinite {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row in the stored tensor.
        row: usize,
        /// The weight or scale.
        found: f32,
    },
    /// A weight cannot be expressed in the format it is converted to.
    #[error("tensor {tensor} in {}, row {row}: {found} cannot be stored as {format}", file.display())]
    NotRepresentable {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row in the stored tensor.
        row: usize,
        /// The weight.
        found: f32,
        /// The format of the packed matrix.
        format: WeightFormat,
    },
}
