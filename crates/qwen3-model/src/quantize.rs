//! Quantizing a checkpoint once, so that it need not be done at each load and a quarter of the bytes are read.

use std::path::Path;
use std::thread;

use serde_json::json;
use tensor::{EncodeError, Matrix, TensorSpec as StoredSpec, WeightFormat, WriteError, encode_rows};

use crate::config::Config;
use crate::fields::read_json;
use crate::names::{TensorRole, TensorSpec, open_weights, tensor_specs};
use crate::shards::{ExportError, ExportProgress, SHARD_BYTES, ShardWriter, create_folder, write_json};

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

/// Writes the checkpoint in the folder `source` into the folder `target` with its matrices quantized to `format`, `Q8` or `Q4`.
/// Norms and routers keep their stored precision. The tokenizer's files are copied, and `config.json` gains
/// `"quantization_config": {"quant_method": "group32", "bits": 8 or 4}`. `target` is created and must not hold a checkpoint.
pub fn quantize(
    source: &Path,
    target: &Path,
    format: WeightFormat,
    progress: &mut dyn FnMut(ExportProgress),
) -> Result<(), ExportError> {
    let bits = match format {
        WeightFormat::Q8 => 8,
        WeightFormat::Q4 => 4,
        found => return Err(ExportError::Format { found }),
    };
    let config_file = source.join("config.json");
    let mut value = read_json(&config_file)?;
    let config = Config::from_json(&config_file, &value)?;
    if let Some(bits) = config.quantization_bits {
        return Err(ExportError::AlreadyQuantized { dir: source.to_owned(), bits });
    }
    let checkpoint = open_weights::<ExportError>(source, &config)?;
    let tensors = tensor_specs(&config)
        .map(|spec| {
            let format = match spec.role {
                TensorRole::Matrix => format,
                TensorRole::Norm | TensorRole::Router => checkpoint.stored_format(&spec.name)?,
            };
            Ok((spec, format))
        })
        .collect::<Result<Vec<_>, ExportError>>()?;

    create_folder(target)?;
    let stored = |(spec, format): &(TensorSpec, WeightFormat)| StoredSpec {
        name: spec.name.clone(),
        format: *format,
        shape: spec.shape.clone(),
    };
    let mut writer = ShardWriter::new(target, tensors.iter().map(stored).collect(), SHARD_BYTES);
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
                let values = checkpoint.vector(&spec.name, spec.elements())?;
                write(&encode(&spec.name, *format, 1, &values, 0, target)?)?;
            }
        }
    }
    writer.finish()?;
    for name in COMPANIONS {
        let (from, file) = (source.join(name), target.join(name));
        if from.exists() {
            std::fs::copy(from, &file).map_err(|source| ExportError::Io { file, source })?;
        }
    }
    value["quantization_config"] = json!({"quant_method": "group32", "bits": bits});
    // Last, so that a folder whose writing was interrupted is not taken for a checkpoint.
    write_json(&target.join("config.json"), &value)
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
            let running: Vec<_> = starts.iter().map(|&first| scope.spawn(move || piece(first))).collect();
            running.into_iter().map(|thread| thread.join().expect("a conversion does not panic")).collect()
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
