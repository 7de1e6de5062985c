//! A loaded model with what rank 0 read for it in the meantime.

use std::io::{self, IsTerminal as _};
use std::panic;
use std::thread;

use qwen3_model::formats::WeightFormats;
use qwen3_model::load::LoadProgress;
use qwen3_model::names::unused_parts;
use qwen3_model::options::Placement;
use qwen3_model::shape::{ModelShape, PassShape};
use qwen3_model::{
    Config, Isa, LogitRows, Model, ModelError, ModelOptions, ModelSource, ParallelStrategy,
};
use ranks::{Failure, Neighbours, Rank, available_cores, one_line};

use crate::failure::CliError;
use crate::memory::{self, Needed};
use crate::options::{Auto, EngineOptions};
use crate::plan::{Workload, choose};
use crate::progress::{Progress, Unit};

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
    let start = || thread::Builder::new().name("input".to_owned()).spawn(read);
    let reading = rank.agree_after(|| {
        let reading = rank.is_root().then(start).transpose();
        Ok(reading.map_err(|source| CliError::Thread { work: "the input", source })?)
    })?;
    let loaded = load(rank, engine, work)?;
    let value =
        reading.map(|thread| thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload)));
    Ok((loaded, rank.agree_after(|| Ok(value.transpose()?))?))
}

/// Loads the model on all ranks, and shows the progress.
pub fn load(rank: &Rank, engine: &EngineOptions, work: Workload) -> Result<Loaded, Failure> {
    // Loading may bind this thread to one core.
    let cores = available_cores();
    let (options, reason) = model_options(rank, engine, work)?;
    if let Some(reason) = reason.as_ref().filter(|_| options.strategy != ParallelStrategy::Heads)
        && rank.is_root()
        && io::stderr().is_terminal()
    {
        eprintln!("split: {}", one_line(reason));
    }
    let source = rank.agree(engine.model.open())?;
    let here = Neighbours::find(rank)?.count;
    let needed = needed(rank, &source, &options, work, engine.chunk);
    rank.agree(needed.map_or(Ok(()), |needed| memory::check(needed, here)))?;
    let shown = Progress::new(rank, "loading", Unit::Count("layers")).with_lines(rank);
    let progress = |LoadProgress { layers, of }| shown.update(layers as u64, of as u64);
    let loaded = Model::load(&source, rank.comm().clone(), &options, &progress);
    drop(shown);
    let loaded = match loaded {
        Ok(model) => Ok(Some(model)),
        // The rank that failed knows why.
        Err(ModelError::PeerLoad { .. }) => Ok(None),
        Err(error @ ModelError::Comm(_)) => return Err(error.into()),
        Err(error) => Err(error),
    };
    let model = rank.agree(loaded)?;
    let model = model.expect(
        "without a model on this rank there is a failure on another, and then none gets here",
    );
    let threads = model.options().threads;
    if threads > cores && rank.is_root() {
        eprintln!("warning: {threads} threads share the {cores} cores that this process may use");
    }
    if rank.is_root()
        && let Ok(weights) = source.weights()
    {
        for (part, tensors) in unused_parts(weights) {
            eprintln!("weights: {tensors} tensors of the {part} are not used");
        }
    }
    if rank.is_root()
        && let Some(line) = rounding_line(&model, engine.weights.0.is_none())
    {
        eprintln!("{line}");
    }
    Ok(Loaded { model, reason })
}

/// What this rank's share of the model and `work` need; `None` where the files do not say, which
/// loading reports.
fn needed(
    rank: &Rank,
    source: &ModelSource,
    options: &ModelOptions,
    work: Workload,
    chunk: usize,
) -> Option<Needed> {
    let config = Config::read(source).ok()?;
    let formats = WeightFormats::read(&config, source.weights().ok()?, options.weights).ok()?;
    let (ranks, own) = (rank.comm().size(), rank.comm().rank());
    let (tp, sp) = options.strategy.grid(ranks);
    if tp.checked_mul(sp) != Some(ranks) {
        return None;
    }
    let shape = ModelShape::new(&config, &formats, options.division(), ranks, own);
    let pass = PassShape {
        tokens: work.prompt.min(chunk).max(1),
        past: 0,
        rows: LogitRows::Last,
        kv: options.kv,
        nodes: 1,
        overlap: options.overlap,
    };
    Some(Needed {
        weights: shape.weight_bytes(),
        cache: shape.cache_bytes(options.kv, work.prompt + work.generate),
        activations: shape.pass(&pass).scratch,
    })
}

/// What the user has to know of weights that loading rounded: the error if no format was chosen,
/// and groups that became zero always.
fn rounding_line(model: &Model, chosen_by_program: bool) -> Option<String> {
    let (rounding, mb) = (model.rounding(), model.weight_bytes() as f64 / 1e6);
    let mut line = String::new();
    if chosen_by_program && rounding.norm > 0.0 {
        let percent = 100.0 * rounding.relative();
        line = format!(
            "weights: no packed format represents the stored ones exactly; rounded with an RMS \
             error of {percent:.2} %, {mb:.0} MB in memory on rank 0 (--weights selects a format)"
        );
    }
    if rounding.vanished > 0 {
        let separator = if line.is_empty() { "weights: " } else { "; " };
        let groups = rounding.vanished;
        line += &format!("{separator}{groups} groups of 32 tiny weights became zero on rank 0");
    }
    Some(line).filter(|line| !line.is_empty())
}

/// The options with which the model is loaded for `work`, and the reason for its split if the plan
/// chose it. All ranks call this together.
fn model_options(
    rank: &Rank,
    engine: &EngineOptions,
    work: Workload,
) -> Result<(ModelOptions, Option<String>), Failure> {
    let ranks = rank.comm().size();
    if let Some(ParallelStrategy::Grid { tp, sp }) = engine.grid
        && tp.checked_mul(sp) != Some(ranks)
    {
        let found = ParallelStrategy::Grid { tp, sp };
        let expected = format!("a product of {ranks}, the number of ranks");
        return Err(Failure::agreed(CliError::option("--grid", found, expected)));
    }
    let isa = isa(rank, engine.isa)?;
    let neighbours = Neighbours::find(rank)?;
    let threads = neighbours.threads(rank, engine.threads.map(usize::from));
    let kv = engine.kv.unwrap_or(work.kv);
    let experts = engine.experts.0;
    let (strategy, experts, reason) = match engine.grid.or(engine.strategy.0) {
        Some(strategy) => (strategy, experts.unwrap_or_default(), None),
        None if ranks == 1 => (ParallelStrategy::Heads, experts.unwrap_or_default(), None),
        None => {
            let (strategy, experts, reason) =
                choose(rank, engine, threads, Workload { kv, ..work })?;
            (strategy, experts, Some(reason))
        }
    };
    let options = ModelOptions {
        strategy,
        attention: engine.attention,
        mlp: engine.mlp,
        experts,
        weights: engine.weights.0,
        kv,
        activations: engine.activations,
        threads,
        placement: Placement::for_rank(neighbours.index, neighbours.count, threads),
        ..ModelOptions::new(isa)
    };
    Ok((options, reason))
}

/// The instruction set of this rank. The environment decides only if the command line does not.
pub fn isa(rank: &Rank, chosen: Auto<Isa>) -> Result<Isa, Failure> {
    let isa = chosen.0.map_or_else(Isa::from_env, Ok);
    let expected = "one that this CPU has, or nothing";
    rank.agree(isa.map_err(|error| CliError::option("SIMD_KERNELS_ISA", error, expected)))
}
