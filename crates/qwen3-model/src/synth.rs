//! Random checkpoints of published shapes: for measurements, where only the shape matters, and for
//! tests.

use std::path::Path;
use std::thread;

use checkpoint::TensorSpec as StoredSpec;
use tensor::{WeightFormat, encode_rows};

use crate::config::Config;
use crate::deterministic::mix;
use crate::names::{TensorRole, TensorSpec, tensor_specs};
use crate::presets::Preset;
use crate::shards::{
    ExportError, ExportProgress, SHARD_BYTES, ShardWriter, create_folder, write_json,
};

/// Standard deviation of the matrices, the `initializer_range` of the published configurations.
const DEVIATION: f64 = 0.02;
/// Values that one thread makes at once; also what a random stream is for, so that the number of
/// threads changes nothing.
const PIECE: usize = 1 << 20;
/// Entries of the table of quantiles.
const QUANTILES: usize = 1 << 16;

/// A checkpoint to be made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynthOptions {
    /// Its shape.
    pub preset: Preset,
    /// Another number of layers than the published one.
    pub layers: Option<usize>,
    /// Of the random weights.
    pub seed: u64,
}

/// Writes `config.json`, `generation_config.json` and bf16 weights into the folder `dir`, which is
/// created and must not hold a checkpoint. Matrices are normally distributed with a standard
/// deviation of 0.02, norms are 1. The same options give the same bytes everywhere. Weights above 5
/// GB are written as several files with an index.
pub fn synthesize(
    dir: &Path,
    options: &SynthOptions,
    progress: &mut dyn FnMut(ExportProgress),
) -> Result<(), ExportError> {
    write_checkpoint(dir, options, SHARD_BYTES, progress)
}

fn write_checkpoint(
    dir: &Path,
    options: &SynthOptions,
    shard_bytes: u64,
    progress: &mut dyn FnMut(ExportProgress),
) -> Result<(), ExportError> {
    let value = options.preset.config(options.layers);
    let config = Config::from_json(&dir.join("config.json"), &value)?;
    let folder = create_folder(dir)?;

    let hybrid = config.hybrid.is_some();
    let specs: Vec<TensorSpec> = tensor_specs(&config).collect();
    let stored = |spec: &TensorSpec| StoredSpec {
        name: spec.name.clone(),
        format: WeightFormat::Bf16,
        shape: spec.shape.clone(),
    };
    let mut writer = ShardWriter::new(folder, specs.iter().map(stored).collect(), shard_bytes);
    let quantiles = quantile_table();
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut pieces = vec![Vec::new(); threads];
    let mut done = ExportProgress { written: 0, total: writer.total() };
    for (index, spec) in specs.iter().enumerate() {
        writer.begin()?;
        let key = mix(mix(options.seed) ^ index as u64);
        for start in (0..spec.elements()).step_by(threads * PIECE) {
            thread::scope(|scope| {
                for (thread, piece) in pieces.iter_mut().enumerate() {
                    let first = (start + thread * PIECE).min(spec.elements());
                    let count = PIECE.min(spec.elements() - first);
                    let quantiles = &quantiles;
                    scope.spawn(move || match spec.role {
                        // Hybrid models store all norms but that of the delta rule less one.
                        TensorRole::Norm => {
                            let less_one = hybrid && !spec.name.contains(".linear_attn.");
                            fill_constant(if less_one { 0.0 } else { 1.0 }, count, piece);
                        }
                        TensorRole::Matrix | TensorRole::Router => {
                            fill_random(mix(key ^ (first / PIECE) as u64), quantiles, count, piece);
                        }
                    });
                }
            });
            for piece in &pieces {
                writer.write(&spec.name, piece)?;
                done.written += piece.len() as u64;
            }
            progress(done);
        }
    }
    write_json(&dir.join("generation_config.json"), &options.preset.generation_config())?;
    writer.finish(&value)
}

fn fill_constant(value: f32, count: usize, out: &mut Vec<u8>) {
    out.clear();
    let bits = (value.to_bits() >> 16) as u16;
    out.extend(std::iter::repeat_n(bits.to_le_bytes(), count).flatten());
}

/// Each 64 random bits choose four quantiles of the normal distribution: a few nanoseconds a
/// weight, where Box and Muller's logarithm and cosine would make a large checkpoint take minutes.
fn fill_random(mut state: u64, quantiles: &[u16; QUANTILES], count: usize, out: &mut Vec<u8>) {
    out.clear();
    out.resize(count.next_multiple_of(4) * 2, 0);
    for four in out.chunks_exact_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = mix(state);
        for value in four.chunks_exact_mut(2) {
            value.copy_from_slice(&quantiles[bits as usize % QUANTILES].to_le_bytes());
            bits >>= 16;
        }
    }
    out.truncate(count * 2);
}

/// The bf16 bits of the quantiles of 0.02 · N(0, 1) at the middles of equal parts.
fn quantile_table() -> Box<[u16; QUANTILES]> {
    let middle = |index: usize| (index as f64 + 0.5) / QUANTILES as f64;
    let values: Vec<f32> =
        (0..QUANTILES).map(|index| (DEVIATION * normal_quantile(middle(index))) as f32).collect();
    let mut bytes = Vec::with_capacity(2 * QUANTILES);
    encode_rows(WeightFormat::Bf16, 1, &values, &mut bytes).expect("finite values have bf16 forms");
    let bits: Vec<u16> =
        bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    bits.try_into().expect("one entry for each quantile")
}

/// The inverse of the standard normal distribution function for 0 < p < 1, to within 4.5e-4
/// (Abramowitz & Stegun 26.2.23).
fn normal_quantile(p: f64) -> f64 {
    let tail = p.min(1.0 - p);
    let t = (-2.0 * tail.ln()).sqrt();
    let upper = t
        - (2.515_517 + t * (0.802_853 + t * 0.010_328))
            / (1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308)));
    if p < 0.5 { -upper } else { upper }
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::Checkpoint;

    #[test]
    fn the_table_has_the_moments_of_the_distribution() {
        let values = quantile_table()
            .map(|bits| f64::from(f32::from_bits(u32::from(bits) << 16)) / DEVIATION);
        let moment =
            |power| values.iter().map(|value| value.powi(power)).sum::<f64>() / QUANTILES as f64;
        assert!(moment(1).abs() < 1e-6, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 2e-3, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 2e-2, "kurtosis {}", moment(4));
        assert!((normal_quantile(0.975) - 1.959_964).abs() < 4.5e-4);
    }

    #[test]
    fn several_files_hold_what_one_would() {
        let folder = tempfile::tempdir().expect("a folder");
        let options = SynthOptions { preset: Preset::TinyMoe, layers: None, seed: 3 };
        let (one, many) = (folder.path().join("one"), folder.path().join("many"));
        write_checkpoint(&one, &options, u64::MAX, &mut |_| ()).expect("one file");
        write_checkpoint(&many, &options, 200_000, &mut |_| ()).expect("many files");
        assert!(
            one.join("model.safetensors").exists()
                && !one.join("model.safetensors.index.json").exists()
        );
        assert!(
            many.join("model.safetensors.index.json").exists()
                && !many.join("model.safetensors").exists()
        );

        let (one, many) =
            (Checkpoint::open(&one).expect("valid"), Checkpoint::open(&many).expect("valid"));
        let mut names = [one.names(), many.names()];
        names.iter_mut().for_each(|names| names.sort_unstable());
        assert_eq!(names[0], names[1]);
        let files: std::collections::BTreeSet<_> =
            names[0].iter().map(|name| many.file(name)).collect();
        assert!(files.len() > 3, "{files:?}");
        for name in
            names[0].iter().filter(|name| one.shape(name).is_some_and(|shape| shape.len() == 2))
        {
            let shape = one.shape(name).expect("present").to_vec();
            let read = |checkpoint: &Checkpoint| {
                let mut values = vec![0.0; shape[0] * shape[1]];
                let matrix = checkpoint.matrix(name, shape[0], shape[1]).expect("a matrix");
                matrix.read_rows(0..shape[0], &mut values).expect("readable");
                values
            };
            assert_eq!(read(&one), read(&many), "{name}");
        }
    }

    #[test]
    fn pieces_of_any_length() {
        let table = quantile_table();
        let mut whole = Vec::new();
        fill_random(5, &table, 1003, &mut whole);
        for count in [0, 1, 2, 3, 4, 5, 1002] {
            let mut part = Vec::new();
            fill_random(5, &table, count, &mut part);
            assert_eq!(part, whole[..2 * count]);
        }
    }
}
