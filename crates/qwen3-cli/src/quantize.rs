//! `qwen3 quantize`: a smaller copy of a checkpoint.

use std::path::PathBuf;

use clap::Args;
use qwen3_model::options::WeightFormat;
use qwen3_model::quantize::quantize;
use ranks::Rank;

use crate::failure::CliError;
use crate::model_path::ModelPath;
use crate::options::choice;
use crate::progress::{Progress, Unit};

/// Write a copy of a checkpoint with its matrices quantized in groups of 32; it loads without the
/// original
#[derive(Args, Clone, Debug)]
pub struct QuantizeArgs {
    /// The model: a folder as published on Hugging Face, a GGUF file, or the name of a model in the
    /// local cache
    #[arg(long, value_name = "MODEL")]
    model: ModelPath,

    /// The new format: q8 takes 8.5 bits a weight, q4 takes 4.5
    #[arg(long, value_parser = choice::<WeightFormat>(&["q8", "q4"]))]
    weights: WeightFormat,

    /// The folder to write; it must not hold a checkpoint yet
    #[arg(value_name = "OUT")]
    out: PathBuf,
}

impl QuantizeArgs {
    /// Runs the command on rank 0.
    pub fn run(&self, rank: &Rank) -> Result<(), CliError> {
        let progress = Progress::new(rank, "writing", Unit::Bytes);
        quantize(&*self.model.open()?, &self.out, self.weights, &mut |shown| {
            progress.update(shown.written, shown.total)
        })?;
        drop(progress);
        Ok(rank.print(&format!(
            "{}: {} in {}\n",
            self.out.display(),
            self.model.display(),
            self.weights
        ))?)
    }
}
