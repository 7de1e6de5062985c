//! `qwen3 synth`: a random checkpoint of a published shape.

use std::path::PathBuf;

use clap::Args;
use qwen3_model::presets::Preset;
use qwen3_model::synth::{SynthOptions, synthesize};
use ranks::Rank;

use crate::failure::CliError;
use crate::options::choice;
use crate::progress::{Progress, Unit};

/// Write a random checkpoint with the shape of a published model, to measure speed without its
/// weights
#[derive(Args, Clone, Debug)]
pub struct SynthArgs {
    /// The published model; those named tiny are small ones for tests
    #[arg(long, value_parser = choice::<Preset>(Preset::ALL.map(Preset::name)))]
    preset: Preset,

    /// The folder to write; it must not hold a checkpoint yet
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Seed of the random weights: the same seed gives the same bytes
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Another number of layers than the published one
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    layers: Option<u16>,
}

impl SynthArgs {
    /// Runs the command on rank 0.
    pub fn run(&self, rank: &Rank) -> Result<(), CliError> {
        let options = SynthOptions {
            preset: self.preset,
            layers: self.layers.map(usize::from),
            seed: self.seed,
        };
        let progress = Progress::new(rank, "writing", Unit::Bytes);
        synthesize(&self.dir, &options, &mut |shown| progress.update(shown.written, shown.total))?;
        drop(progress);
        Ok(rank.print(&format!(
            "{}: a random checkpoint with the shape of {}\n",
            self.dir.display(),
            self.preset.name()
        ))?)
    }
}
