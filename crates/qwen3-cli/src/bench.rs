//! `qwen3 bench`: tokens a second of prefill and decode, and what the ranks exchange meanwhile.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use qwen3_model::comm::{CommunicatorExt as _, Entry, Phase};
use qwen3_model::options::{KvFormat, MlpSchedule};
use qwen3_model::sampling::SampleRow;
use qwen3_model::{Config, LogitRows, Model, Sampler, SamplingParams, Sequence};
use ranks::{Failure, Rank};

use crate::ahead;
use crate::allocations::{self, Allocations};
use crate::bench_batch::BatchBench;
use crate::bench_limits::{Limits, median};
use crate::bench_profile::Recording;
use crate::bench_report::{Measured, Report};
use crate::bench_trace;
use crate::failure::CliError;
use crate::options::{EngineOptions, LaunchOptions, positive};
use crate::output_file::OutputFile;
use crate::plan::Workload;
use crate::session::{self, Loaded};

/// Measure prefill and decode on token ids made up for the purpose: median and spread, arithmetic,
/// memory, traffic
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    #[command(flatten)]
    engine: EngineOptions,

    /// Lengths of the prompts, separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "128,512", value_parser = positive)]
    prompt_len: Vec<usize>,

    /// Tokens to decode after the first prompt; 0 for none
    #[arg(long, value_name = "N", default_value_t = 64)]
    gen_len: usize,

    /// Decode after this many tokens, one measurement for each [default: after the first prompt]
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = positive)]
    depth: Vec<usize>,

    /// Decode so many sequences together, one measurement for each number and depth; prompts are
    /// not measured then, but passes over one prompt token of each ("prompt_rows_ratio" in JSON)
    #[arg(long, value_name = "B", value_delimiter = ',', value_parser = positive, conflicts_with_all = ["profile", "trace"])]
    batch: Vec<usize>,

    /// Print a table of operations and collectives for each phase: calls, time, share, GB/s,
    /// GFLOP/s
    #[arg(long)]
    profile: bool,

    /// Write a trace for ui.perfetto.dev or chrome://tracing: a row for each rank and thread,
    /// compute and collectives
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// Measured repetitions, after one that only warms up
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    reps: usize,

    /// Print one JSON object:
    /// {"model","weights","ranks","threads","comm","strategy","attention","mlp",
    /// "results","traffic","limits","kv","isa","experts","wire","plan",
    /// "weight_bytes"}; the plan says why the strategy was chosen if it
    /// was, the traffic is rank 0's in one repetition of everything
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

impl BenchArgs {
    fn workload(&self) -> Workload {
        let prompt = self.prompt_len.iter().copied().max().unwrap_or(1);
        Workload { kv: KvFormat::F16, prompt, generate: self.gen_len }
    }

    /// Runs the command on this rank.
    pub fn run(&self, rank: &Rank) -> Result<(), Failure> {
        if self.gen_len == 0 && !(self.depth.is_empty() && self.batch.is_empty()) {
            let option = if self.depth.is_empty() { "--batch" } else { "--depth" };
            return Err(Failure::agreed(CliError::option(
                option,
                "nothing is generated there",
                "a --gen-len above 0",
            )));
        }
        let depths = if self.depth.is_empty() { &self.prompt_len[..1] } else { &self.depth };
        let needed = ahead::look(rank, &self.engine, |config| {
            self.trace.as_deref().map_or(Ok(()), OutputFile::check)?;
            self.check(config.context_length(), depths)
        })?;
        let Loaded { model, reason } = session::load(rank, &self.engine, self.workload())?;
        // A file that cannot be written is found before the measurements, not after.
        let create = || self.trace.as_deref().map(OutputFile::create).transpose();
        let trace = rank.on_root(|| Ok(create()?))?.flatten();
        let mut bench = Bench {
            rank,
            model: &model,
            chunk: model.pass_tokens(self.engine.chunk),
            cache: Sequence::new(&model, needed)?,
            sampler: Sampler::new(
                model.config().vocab_size,
                rank.comm().clone(),
                model.options().isa,
            ),
            memory: Memory::of(&model)?,
            limits: Limits::new(&model)?,
            entries: Vec::new(),
            recordings: (self.profile || self.trace.is_some()).then(Vec::new),
        };
        let mut results = Vec::new();
        if !self.batch.is_empty() {
            let most = self.batch.iter().copied().max().unwrap_or(1);
            for &depth in depths {
                let sizes = (most, depth, self.gen_len);
                let mut sequences = BatchBench::new(rank, &model, bench.chunk, sizes)?;
                for &count in &self.batch {
                    let (memory, limits) = (&bench.memory, &mut bench.limits);
                    results.push(sequences.measure(count, self.reps, memory, limits)?);
                }
            }
        }
        for &tokens in self.prompt_len.iter().filter(|_| self.batch.is_empty()) {
            results.push(bench.prefill(tokens, self.reps)?);
        }
        if self.gen_len > 0 && self.batch.is_empty() {
            for &depth in depths {
                results.push(bench.decode(depth, self.gen_len, self.reps)?);
            }
        }
        let limits = bench.limits.medians()?;
        let mut recordings = bench.recordings.take().unwrap_or_default();
        let mut spans = Vec::new();
        if self.trace.is_some() {
            let own = bench_trace::events(rank.comm().rank(), model.options().threads, &recordings);
            spans = bench_trace::gather(&**rank.comm(), &own)?;
        }
        if !self.profile {
            recordings.clear();
        }
        let name = self.engine.model.display().to_string();
        let weight_bytes = bench.memory.held;
        let report = Report {
            name,
            model: &model,
            reason,
            weight_bytes,
            results,
            entries: bench.entries,
            limits,
            recordings,
        };
        let text = if self.json { report.json() } else { report.table() };
        rank.agree_after(|| {
            // The figures are printed first, whether or not the file can be written, and the file
            // is written whether or not the figures can be printed.
            let printed = rank.print(&text);
            if let Some(mut file) = trace {
                file.write_all(bench_trace::file(&spans).as_bytes())?;
                file.finish()?;
            }
            Ok(printed?)
        })
    }

    /// The positions that the cache has to hold, if the model has as many.
    fn check(&self, context: usize, depths: &[usize]) -> Result<usize, CliError> {
        let longest = self.prompt_len.iter().copied().max().unwrap_or(0);
        let deepest = depths.iter().copied().max().unwrap_or(0).saturating_add(self.gen_len);
        let needed = longest.max(deepest);
        if needed <= context {
            return Ok(needed);
        }
        let option =
            if longest <= context && !self.depth.is_empty() { "--depth" } else { "--prompt-len" };
        let found = format!("{needed} tokens with what is generated");
        Err(CliError::option(option, found, format!("at most {context}, the model's context")))
    }
}

/// Bytes of weights on all ranks together.
pub struct Memory {
    /// Bytes of weights that each rank holds.
    held: Vec<u64>,
    /// Parameters of them. A tied head is read as the head; the embedding itself costs a row a
    /// token.
    parameters: u64,
    /// Into so many parts ranks divide the tokens of a feed-forward block; a rank sees those of its
    /// part.
    parts: usize,
}

impl Memory {
    fn of(model: &Model) -> Result<Self, Failure> {
        let config = model.config();
        let held = model.comm().all_gather_one(model.weight_bytes() as u64)?;
        let tables = if config.tie_word_embeddings { 1 } else { 2 };
        let parameters = config.parameters() - (tables - 1) * config.head_parameters();
        // Ranks that only split positions bring their tokens together for feed-forward blocks that
        // they split.
        let (tp, sp) = model.options().strategy.grid(held.len());
        let together = tp == 1 && model.options().schedule() != MlpSchedule::Local;
        Ok(Self { held, parameters, parts: if together { 1 } else { sp } })
    }

    /// Bytes that a pass of `tokens` tokens reads: all of a dense model, of a mixture those of the
    /// experts that the tokens visit.
    pub fn pass(&self, config: &Config, tokens: usize) -> f64 {
        let visited = config.visited_matrix_elements(tokens.div_ceil(self.parts))
            + config.head_parameters() as f64;
        self.held.iter().sum::<u64>() as f64 * (visited / self.parameters as f64).min(1.0)
    }
}

struct Bench<'a> {
    rank: &'a Rank,
    model: &'a Model,
    /// Prompt tokens of a pass.
    chunk: usize,
    cache: Sequence,
    sampler: Sampler,
    memory: Memory,
    limits: Limits<'a>,
    /// The ledger of the last repetition of each measurement.
    entries: Vec<Entry>,
    /// A further repetition of each, span by span; `None` where nobody asked for it.
    recordings: Option<Vec<Recording>>,
}

/// What is repeated.
#[derive(Clone, Copy)]
struct Measurement {
    phase: Phase,
    /// Tokens of a repetition.
    tokens: usize,
    /// Tokens in the cache before it.
    depth: usize,
    reps: usize,
}

/// What came of it.
struct Repeated {
    seconds: Vec<f64>,
    limit: f64,
    /// Of this process in the last repetition.
    allocations: Option<Allocations>,
}

impl Bench<'_> {
    fn prefill(&mut self, tokens: usize, reps: usize) -> Result<Measured, Failure> {
        self.cache.truncate(0);
        let what = Measurement { phase: Phase::Prefill, tokens, depth: 0, reps };
        let Repeated { seconds, limit, allocations } =
            self.repeat(what, |bench| bench.fill(tokens))?;
        let config = self.model.config();
        let flops = config.forward_flops(tokens, 0, LogitRows::Last);
        let pass = |tokens| self.memory.pass(config, tokens);
        let last = tokens % self.chunk;
        let bytes = (tokens / self.chunk) as f64 * pass(self.chunk)
            + if last > 0 { pass(last) } else { 0.0 };
        Ok(Measured {
            phase: what.phase,
            batch: None,
            prompt_rows_ratio: None,
            tokens,
            flops,
            bytes,
            depth: 0,
            seconds,
            limit_seconds: flops / limit,
            allocations,
        })
    }

    fn decode(&mut self, depth: usize, tokens: usize, reps: usize) -> Result<Measured, Failure> {
        self.cache.truncate(0);
        self.fill(depth)?;
        let what = Measurement { phase: Phase::Decode, tokens, depth, reps };
        let Repeated { seconds, limit, allocations } =
            self.repeat(what, |bench| bench.generate(tokens))?;
        let config = self.model.config();
        let flops =
            (0..tokens).map(|step| config.forward_flops(1, depth + step, LogitRows::Last)).sum();
        let per_position = self.cache_bytes()? / self.cache.len() as f64;
        let positions = (0..tokens).map(|step| (depth + step + 1) as f64).sum::<f64>();
        let bytes = tokens as f64 * self.memory.pass(config, 1) + per_position * positions;
        Ok(Measured {
            phase: what.phase,
            batch: None,
            prompt_rows_ratio: None,
            tokens,
            flops,
            bytes,
            depth,
            seconds,
            limit_seconds: bytes / limit,
            allocations,
        })
    }

    /// Times `work` after one repetition that does not count, each from the same state of the
    /// cache, and looks at the machine's limit before, between and after the repetitions: what
    /// slows the machine down lowers both.
    fn repeat(
        &mut self,
        what: Measurement,
        work: impl Fn(&mut Self) -> Result<(), Failure>,
    ) -> Result<Repeated, Failure> {
        let comm = self.rank.comm();
        let (mut seconds, mut looks) = (Vec::new(), Vec::new());
        let mut allocations = None;
        self.cache.keep();
        for rep in 0..=what.reps {
            self.cache.truncate(what.depth);
            comm.barrier()?;
            comm.ledger().reset();
            comm.ledger().set_phase(what.phase);
            let (before, start) = (allocations::now(), Instant::now());
            work(self)?;
            comm.ledger().set_phase(Phase::Other);
            // The slowest rank's time is the pass's.
            comm.barrier()?;
            allocations = allocations::now().zip(before).map(|(now, before)| now.since(before));
            if rep > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
            looks.push(self.limits.look(what.phase)?);
        }
        self.entries
            .extend(comm.ledger().entries().into_iter().filter(|entry| entry.phase == what.phase));
        if let Some(mut recordings) = self.recordings.take() {
            self.cache.truncate(what.depth);
            let model = self.model;
            comm.barrier()?;
            comm.ledger().set_phase(what.phase);
            let (length, spans, calls) = Recording::of(model, || work(self))?;
            comm.ledger().set_phase(Phase::Other);
            let Measurement { phase, tokens, depth, .. } = what;
            recordings.push(Recording { phase, tokens, depth, length, spans, calls });
            self.recordings = Some(recordings);
        }
        Ok(Repeated { seconds, limit: median(&looks), allocations })
    }

    /// A prompt of `tokens` tokens, in chunks; logits for the last one only.
    fn fill(&mut self, tokens: usize) -> Result<(), Failure> {
        let vocab_size = self.model.config().vocab_size;
        let ids: Vec<u32> = (0..tokens).map(|i| made_up(i, vocab_size)).collect();
        let last = tokens.div_ceil(self.chunk) - 1;
        for (index, chunk) in ids.chunks(self.chunk).enumerate() {
            let rows = if index == last { LogitRows::Last } else { LogitRows::None };
            self.cache.forward(self.model, chunk, rows).map_err(Failure::agreed)?;
        }
        Ok(())
    }

    /// `tokens` passes of one token, each chosen from the logits of the one before.
    fn generate(&mut self, tokens: usize) -> Result<(), Failure> {
        let greedy = SamplingParams::default();
        let mut id = made_up(self.cache.len(), self.model.config().vocab_size);
        for step in 0..tokens {
            let logits = self.cache.decode(self.model, id).map_err(Failure::agreed)?;
            let row = SampleRow::new(0, &greedy, step as u64);
            let mut samples = self.sampler.sample_rows(&logits, &[row])?;
            id = samples.pop().expect("one row was sampled").map_err(Failure::agreed)?.id;
        }
        Ok(())
    }

    /// Bytes of keys and values on all ranks.
    fn cache_bytes(&self) -> Result<f64, Failure> {
        Ok(self.rank.comm().all_gather_one(self.cache.bytes() as u64)?.iter().sum::<u64>() as f64)
    }
}

/// Ids spread over the vocabulary, so that every expert and many rows of the embedding are visited.
pub fn made_up(index: usize, vocab_size: usize) -> u32 {
    ((index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) as u32 % vocab_size as u32
}
