//! A loaded model with what rank 0 read for it in the meantime.

use std::io::{self, IsTerminal as _};
use std::panic;
use std::thread;
use std::time::Duration;

use qwen3_model::{LoadProgress, Model, ModelError, ParallelStrategy};

use crate::failure::{CliError, Failure};
use crate::options::EngineOptions;
use crate::plan::Workload;
use crate::progress;
use crate::rank::Rank;

/// A model on all ranks.
pub struct Loaded {
    /// This rank's share.
    pub model: Model,
    /// Why it is split as it is, where the plan said so.
    pub reason: Option<String>,
}

/// Loads the model on all ranks while `read` runs on a thread of rank 0, which has its value
/// afterwards. `work` is what the command is going to do. A model that cannot be loaded is an error
/// at once, though a person may still be typing what is read.
pub fn load_with<T: Send + 'static>(
    rank: &Rank,
    engine: &EngineOptions,
    work: Workload,
    read: impl FnOnce() -> Result<T, CliError> + Send + 'static,
) -> Result<(Loaded, Option<T>), Failure> {
    let reading = rank.speaks().then(|| thread::spawn(read));
    let loaded = load(rank, engine, work)?;
    let value =
        reading.map(|thread| thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload)));
    Ok((loaded, rank.agree_after(|| value.transpose())?))
}

/// Loads the model on all ranks, with a progress bar where rank 0 writes to a terminal.
pub fn load(rank: &Rank, engine: &EngineOptions, work: Workload) -> Result<Loaded, Failure> {
    let (options, reason) = engine.model_options(rank, work)?;
    if let Some(reason) = reason.as_ref().filter(|_| options.strategy != ParallelStrategy::Heads)
        && rank.speaks()
        && io::stderr().is_terminal()
    {
        eprintln!("split: {reason}");
    }
    let bar = progress::counting(rank, "layers");
    let progress = |progress: LoadProgress| {
        // A bar that is gone at once only flickers.
        if bar.elapsed() > Duration::from_millis(300) {
            bar.set_length(progress.of as u64);
            bar.set_position(progress.layers as u64);
        }
    };
    let loaded = Model::load(&engine.model, rank.comm().clone(), &options, &progress);
    bar.finish_and_clear();
    let loaded = match loaded {
        Ok(model) => Ok(Some(model)),
        // The rank that failed knows why.
        Err(ModelError::PeerLoad { .. }) => Ok(None),
        Err(error @ ModelError::Comm(_)) => return Err(error.into()),
        Err(error) => Err(error.into()),
    };
    let model = rank.agree(loaded)?;
    let model = model.expect(
        "without a model on this rank there is a failure on another, and then none gets here",
    );
    Ok(Loaded { model, reason })
}
