//! `qwen3 bench`: tokens a second of prefill and decode, and what the ranks exchange meanwhile.

use std::time::Instant;

use clap::Args;
use qwen3_model::comm::{CommunicatorExt as _, Entry, Phase};
use qwen3_model::{KvCache, KvFormat, LogitRows, Model, Sampler, SamplingParams};

use crate::bench_report::{Measured, Report};
use crate::failure::{CliError, Failure};
use crate::options::{EngineOptions, LaunchOptions, misfit, positive};
use crate::rank::Rank;
use crate::session;

/// Measure prefill and decode on token ids made up for the purpose: median and spread, arithmetic, memory, traffic
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

    /// Measured repetitions, after one that only warms up
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    reps: usize,

    /// Print one JSON object: {"model","weights","ranks","threads","comm","strategy","attention","mlp","results","traffic"};
    /// the traffic is rank 0's in one repetition of everything
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

impl BenchArgs {
    /// Runs the command on this rank.
    pub fn run(&self, rank: &Rank) -> Result<(), Failure> {
        let model = session::load(rank, &self.engine, KvFormat::F16)?;
        let longest = self.prompt_len.iter().copied().max().unwrap_or(0);
        let context = model.config().context_length();
        let needed = longest.max(self.prompt_len[0].saturating_add(self.gen_len));
        if needed > context {
            let found = format!("{needed} tokens with what is generated");
            let error = misfit("--prompt-len", found, format!("at most {context}, the model's context"));
            return Err(Failure::agreed(error));
        }
        let mut bench = Bench {
            rank,
            model: &model,
            chunk: self.engine.chunk,
            cache: model.new_cache(needed),
            sampler: Sampler::new(SamplingParams::default(), model.config().vocab_size, rank.comm().clone())?,
            memory: Memory::of(&model)?,
            entries: Vec::new(),
        };
        let mut results = Vec::new();
        for &tokens in &self.prompt_len {
            results.push(bench.prefill(tokens, self.reps)?);
        }
        if self.gen_len > 0 {
            results.push(bench.decode(self.prompt_len[0], self.gen_len, self.reps)?);
        }
        let name = self.engine.model.display().to_string();
        let report = Report { name, model: &model, results, entries: bench.entries };
        let text = if self.json { report.json() } else { report.table() };
        rank.agree(rank.say(&text))
    }
}

/// Bytes that all ranks together read for one pass.
struct Memory {
    /// Weights that a token visits, all of them in a dense model.
    weights: f64,
}

impl Memory {
    fn of(model: &Model) -> Result<Self, CliError> {
        let config = model.config();
        let mut all = vec![0_u64; model.comm().size()];
        model.comm().all_gather(&[model.weight_bytes() as u64], &mut all)?;
        // A tied head is read as the head; the embedding itself costs a row a token.
        let tables = if config.tie_word_embeddings { 1 } else { 2 };
        let head = config.head_parameters();
        let held = config.parameters() - (tables - 1) * head;
        let visited = config.active_matrix_elements() + head;
        let share = (visited as f64 / held as f64).min(1.0);
        Ok(Self { weights: all.iter().sum::<u64>() as f64 * share })
    }
}

struct Bench<'a> {
    rank: &'a Rank,
    model: &'a Model,
    chunk: usize,
    cache: KvCache,
    sampler: Sampler,
    memory: Memory,
    /// The ledger of the last repetition of each measurement.
    entries: Vec<Entry>,
}

impl Bench<'_> {
    fn prefill(&mut self, tokens: usize, reps: usize) -> Result<Measured, Failure> {
        let seconds = self.repeat(reps, Phase::Prefill, |bench| bench.fill(tokens), |bench| bench.cache.truncate(0))?;
        let passes = tokens.div_ceil(self.chunk) as f64;
        Ok(Measured {
            phase: Phase::Prefill,
            tokens,
            flops: self.model.config().forward_flops(tokens, 0, 1) as f64,
            bytes: passes * self.memory.weights,
            seconds,
        })
    }

    fn decode(&mut self, prompt: usize, tokens: usize, reps: usize) -> Result<Measured, Failure> {
        self.cache.truncate(0);
        self.fill(prompt)?;
        let work = |bench: &mut Self| bench.generate(tokens);
        let seconds = self.repeat(reps, Phase::Decode, work, |bench| bench.cache.truncate(prompt))?;
        let config = self.model.config();
        let flops = (0..tokens).map(|step| config.forward_flops(1, prompt + step, 1) as f64).sum();
        let per_position = self.cache_bytes()? / self.cache.len() as f64;
        let positions = (0..tokens).map(|step| (prompt + step + 1) as f64).sum::<f64>();
        let bytes = tokens as f64 * self.memory.weights + per_position * positions;
        Ok(Measured { phase: Phase::Decode, tokens, flops, bytes, seconds })
    }

    /// Times `work` after one repetition that does not count; `reset` makes each start alike.
    fn repeat(
        &mut self,
        reps: usize,
        phase: Phase,
        work: impl Fn(&mut Self) -> Result<(), Failure>,
        reset: impl Fn(&mut Self),
    ) -> Result<Vec<f64>, Failure> {
        let comm = self.rank.comm();
        let mut seconds = Vec::with_capacity(reps);
        for rep in 0..=reps {
            reset(self);
            comm.barrier()?;
            comm.ledger().reset();
            comm.ledger().set_phase(phase);
            let start = Instant::now();
            work(self)?;
            comm.ledger().set_phase(Phase::Other);
            // The slowest rank's time is the pass's.
            comm.barrier()?;
            if rep > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        self.entries.extend(comm.ledger().entries().into_iter().filter(|entry| entry.phase == phase));
        Ok(seconds)
    }

    /// A prompt of `tokens` tokens, in chunks; logits for the last one only.
    fn fill(&mut self, tokens: usize) -> Result<(), Failure> {
        let vocab_size = self.model.config().vocab_size;
        let ids: Vec<u32> = (0..tokens).map(|i| made_up(i, vocab_size)).collect();
        let last = tokens.div_ceil(self.chunk) - 1;
        for (index, chunk) in ids.chunks(self.chunk).enumerate() {
            let rows = if index == last { LogitRows::Last } else { LogitRows::None };
            self.model.forward(&mut self.cache, chunk, rows)?;
        }
        Ok(())
    }

    /// `tokens` passes of one token, each chosen from the logits of the one before.
    fn generate(&mut self, tokens: usize) -> Result<(), Failure> {
        let mut id = made_up(self.cache.len(), self.model.config().vocab_size);
        for step in 0..tokens {
            let logits = self.model.forward(&mut self.cache, &[id], LogitRows::Last)?;
            let row = logits.values.as_slice().expect("rows are contiguous");
            id = self.sampler.sample(logits.vocab.clone(), row, step as u64, &[], false)?.id;
        }
        Ok(())
    }

    /// Bytes of keys and values on all ranks.
    fn cache_bytes(&self) -> Result<f64, Failure> {
        let mut all = vec![0_u64; self.rank.comm().size()];
        self.rank.comm().all_gather(&[self.cache.bytes() as u64], &mut all)?;
        Ok(all.iter().sum::<u64>() as f64)
    }
}

/// Ids spread over the vocabulary, so that every expert and many rows of the embedding are visited.
fn made_up(index: usize, vocab_size: usize) -> u32 {
    ((index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) as u32 % vocab_size as u32
}
