//! Quantizing a checkpoint once, so that it need not be done at each load and a quarter of the
//! bytes are read.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use checkpoint::{
    Checkpoint, DocumentError, Matrix, ModelSource, TensorSpec as StoredSpec, WriteError,
};
use serde_json::json;
use tensor::{EncodeError, WeightFormat, encode_rows};

use crate::config::Config;
use crate::fields::parse_json;
use crate::names::{
    EMBEDDING, LM_HEAD, TensorRole, TensorSpec, head_spec, open_weights, tensor_specs,
};
use crate::shards::{ExportError, ExportProgress, SHARD_BYTES, ShardWriter, create_folder};

/// Weights that one thread converts at once.
const PIECE: usize = 1 << 20;

/// Files that a checkpoint may have beside its weights and that do not depend on them.
const COMPANIONS: [&str; 9] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "LICENSE",
];
/// The folder of more such files.
const TEMPLATES: &str = "additional_chat_templates";

/// Writes the model `source` into the folder `target` with its matrices
/// quantized to `format`, `Q8` or `Q4`. Norms and routers keep their stored precision. The
/// tokenizer's files are copied, and `config.json` gains `"quantization_config": {"quant_method":
/// "group32", "bits": 8 or 4}`. `target` is created and must not hold a checkpoint.
pub fn quantize(
    source: &ModelSource,
    target: &Path,
    format: WeightFormat,
    progress: &mut dyn FnMut(ExportProgress),
) -> Result<(), ExportError> {
    let bits = match format {
        WeightFormat::Q8 => 8,
        WeightFormat::Q4 => 4,
        found => return Err(ExportError::Format { found }),
    };
    let document = source.config()?;
    let mut value = parse_json(document)?;
    let config = Config::from_json(&document.file, &value)?;
    if let Some(bits) = config.quantization_bits {
        return Err(ExportError::AlreadyQuantized { dir: source.folder().to_owned(), bits });
    }
    let checkpoint = open_weights::<ExportError>(source, &config)?;
    let own_head = has_own_head(checkpoint, &config)?;
    let tensors = tensor_specs(&config)
        .chain(own_head.then(|| head_spec(&config)))
        .map(|spec| {
            let format = match spec.role {
                TensorRole::Matrix => format,
                TensorRole::Norm | TensorRole::Router => checkpoint.stored_format(&spec.name)?,
            };
            Ok((spec, format))
        })
        .collect::<Result<Vec<_>, ExportError>>()?;

    let folder = create_folder(target)?;
    let stored = |(spec, format): &(TensorSpec, WeightFormat)| StoredSpec {
        name: spec.name.clone(),
        format: *format,
        shape: spec.shape.clone(),
    };
    let mut writer = ShardWriter::new(folder, tensors.iter().map(stored).collect(), SHARD_BYTES);
    let mut done = ExportProgress { written: 0, total: writer.total() };
    for (spec, format) in &tensors {
        writer.begin()?;
        let mut write = |bytes: &[u8]| {
            writer.write(&spec.name, bytes)?;
            done.written += bytes.len() as u64;
            progress(done);
            Ok::<(), ExportError>(())
        };
        match spec.shape[..] {
            [rows, cols] => {
                let matrix = checkpoint.matrix(&spec.name, rows, cols)?;
                convert(&matrix, *format, target, &mut write)?;
            }
            _ => {
                let values = checkpoint.values(&spec.name, &spec.shape)?;
                write(&encode(&spec.name, *format, 1, &values, 0, target)?)?;
            }
        }
    }
    copy_companions(source.folder(), target)?;
    value["quantization_config"] = json!({"quant_method": "group32", "bits": bits});
    writer.finish(&value)
}

/// The folder that a companion file may lie in: that of the checkpoint, or the whole
/// `models--ORGANIZATION--NAME` folder where the checkpoint is a snapshot of a Hugging Face cache,
/// whose files are links to `blobs`.
fn companions_root(source: &Path) -> PathBuf {
    let is_cache = |folder: &&Path| {
        folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("models--"))
    };
    let above = source.ancestors().skip(1).take(2).find(is_cache);
    above.unwrap_or(source).to_owned()
}

/// Copies the files beside the weights, as far as they are there. Links are followed only inside
/// [`companions_root`].
fn copy_companions(source: &Path, target: &Path) -> Result<(), ExportError> {
    let read_error = |file: &Path| {
        let file = file.to_owned();
        move |source| DocumentError::Read { file, source: Arc::new(source) }
    };
    let source = &source.canonicalize().map_err(read_error(source))?;
    let root = companions_root(source);
    let mut names: Vec<PathBuf> = COMPANIONS.map(PathBuf::from).into();
    let templates = source.join(TEMPLATES);
    if templates.is_dir() {
        let folder = target.join(TEMPLATES);
        std::fs::create_dir_all(&folder)
            .map_err(|source| ExportError::Io { file: folder, source })?;
        for entry in std::fs::read_dir(&templates).map_err(read_error(&templates))? {
            names.push(
                Path::new(TEMPLATES).join(entry.map_err(read_error(&templates))?.file_name()),
            );
        }
    }
    for name in names {
        let (from, file) = (source.join(&name), target.join(&name));
        if from.is_file() {
            let found = from.canonicalize().map_err(read_error(&from))?;
            if !found.starts_with(&root) {
                return Err(ExportError::ForeignLink { file: from, found });
            }
            let bytes = std::fs::read(&from).map_err(read_error(&from))?;
            std::fs::write(&file, bytes).map_err(|source| ExportError::Io { file, source })?;
        }
    }
    Ok(())
}

/// Whether a tied model has another head than its embedding.
fn has_own_head(checkpoint: &Checkpoint, config: &Config) -> Result<bool, ExportError> {
    if !config.has_head || !config.tie_word_embeddings || !checkpoint.contains(LM_HEAD) {
        return Ok(false);
    }
    let (rows, cols) = (config.vocab_size, config.hidden_size);
    let both = [checkpoint.matrix(EMBEDDING, rows, cols)?, checkpoint.matrix(LM_HEAD, rows, cols)?];
    let step = (PIECE / cols).max(1);
    let mut values = [vec![0.0; step * cols], vec![0.0; step * cols]];
    for first in (0..rows).step_by(step) {
        let some = first..(first + step).min(rows);
        for (matrix, values) in both.iter().zip(&mut values) {
            values.truncate(some.len() * cols);
            matrix.read_rows(some.clone(), values)?;
        }
        if values[0] != values[1] {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Converts a matrix some rows at a time, on all processors, and hands the bytes on in their order.
fn convert(
    matrix: &Matrix,
    format: WeightFormat,
    target: &Path,
    write: &mut dyn FnMut(&[u8]) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let rows = (PIECE / matrix.cols()).max(1);
    let piece = |first: usize| -> Result<Vec<u8>, ExportError> {
        let rows = first..(first + rows).min(matrix.rows());
        let mut values = vec![0.0; rows.len() * matrix.cols()];
        matrix.read_rows(rows, &mut values)?;
        encode(matrix.name(), format, matrix.cols(), &values, first, target)
    };
    let starts: Vec<usize> = (0..matrix.rows()).step_by(rows).collect();
    for starts in starts.chunks(threads) {
        let pieces: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> =
                starts.iter().map(|&first| scope.spawn(move || piece(first))).collect();
            running
                .into_iter()
                .map(|thread| thread.join().expect("a conversion does not panic"))
                .collect()
        });
        for piece in pieces {
            write(&piece?)?;
        }
    }
    Ok(())
}

/// The stored form of some rows, of which `first` is the first one's number.
fn encode(
    tensor: &str,
    format: WeightFormat,
    cols: usize,
    values: &[f32],
    first: usize,
    target: &Path,
) -> Result<Vec<u8>, ExportError> {
    let mut bytes = Vec::new();
    encode_rows(format, cols, values, &mut bytes).map_err(|source| {
        let source = EncodeError { row: first + source.row, ..source };
        WriteError::Encode { file: target.to_owned(), tensor: tensor.to_owned(), source }
    })?;
    Ok(bytes)
}
