//! `qwen3 bench --batch`: decode of several sequences together.

use std::time::Instant;

use qwen3_model::comm::{CommunicatorExt as _, Phase};
use qwen3_model::ops::kernels::InputKind;
use qwen3_model::options::KvFormat;
use qwen3_model::sampling::SampleRow;
use qwen3_model::{
    Arena, Batch, Config, LogitRows, Logits, Model, PAGE_POSITIONS, PageId, ParallelStrategy,
    Sampler, SamplingParams, Span, Wanted, Workspace,
};
use ranks::{Failure, Rank};

use crate::bench::{Memory, made_up};
use crate::bench_limits::{Limits, median};
use crate::bench_report::Measured;
use crate::failure::CliError;

/// Tokens at the end of each prompt that no other sequence has. Sequences share the tokens before
/// them, in pages of their own, so that filling the cache does not take longer than measuring.
const OWN_TOKENS: usize = 16;
/// The largest distance of a logit from that of a sequence alone, relative to the largest one,
/// where the bits may differ (positions split over ranks, a q8 cache).
const TOLERANCE: f32 = 2e-4;

/// Passes over prompt rows in a repetition, at most.
const PROMPT_PASSES: usize = 16;

/// Sequences of equal length, each with pages of its own.
pub struct BatchBench<'a> {
    rank: &'a Rank,
    model: &'a Model,
    arena: Arena,
    workspace: Workspace,
    sampler: Sampler,
    depth: usize,
    /// Tokens to decode per sequence.
    steps: usize,
    /// Pages of a sequence on each rank that splits positions.
    local_pages: usize,
    sequences: usize,
}

impl<'a> BatchBench<'a> {
    /// Fills the caches of `sequences` sequences with `depth` tokens each, in passes of `chunk`
    /// tokens. All ranks call it.
    pub fn new(
        rank: &'a Rank,
        model: &'a Model,
        chunk: usize,
        (sequences, depth, steps): (usize, usize, usize),
    ) -> Result<Self, Failure> {
        let pages = (depth + steps).div_ceil(PAGE_POSITIONS);
        let local_pages = pages.div_ceil(model.context().positions.size());
        let vocab_size = model.config().vocab_size;
        let mut bench = Self {
            rank,
            model,
            arena: model.new_arena(local_pages * sequences, 2 * sequences)?,
            workspace: model.new_workspace(),
            sampler: Sampler::new(vocab_size, rank.comm().clone(), model.options().isa),
            depth,
            steps,
            local_pages,
            sequences,
        };
        let shared = depth.saturating_sub(OWN_TOKENS);
        for start in (0..shared).step_by(chunk) {
            let tokens = (start..shared.min(start + chunk)).map(|at| made_up(at, vocab_size));
            bench.pass(&[0], start, &tokens.collect::<Vec<_>>(), CHUNK)?;
        }
        for sequence in 1..sequences {
            for page in 0..local_pages {
                let (from, to) = (page as u32, (sequence * local_pages + page) as u32);
                bench.arena.pages.copy_page(PageId(from), PageId(to));
            }
            bench.copy_states(0, sequence);
        }
        for sequence in 0..sequences {
            let first = shared + sequence * OWN_TOKENS;
            let own = (0..depth - shared).map(|at| made_up(first + at, vocab_size));
            bench.pass(&[sequence], shared, &own.collect::<Vec<_>>(), CHUNK)?;
            bench.copy_states(sequence, sequences + sequence);
        }
        Ok(bench)
    }

    /// Copies recurrent states from slot to slot, where the model has such. A repetition begins
    /// with those at `depth`, which are kept in the slots after the sequences' own.
    fn copy_states(&mut self, from: usize, to: usize) {
        if self.arena.states.slots() > 0 {
            self.arena.states.copy(from, to);
        }
    }

    /// Computes tokens of `sequences`, as many of each, from position `start` on. Where
    /// `kind` wants logits, there is one row of them per sequence.
    fn pass(
        &mut self,
        sequences: &[usize],
        start: usize,
        tokens: &[u32],
        kind: PassKind,
    ) -> Result<Logits, Failure> {
        if start == self.depth {
            for sequence in sequences {
                self.copy_states(self.sequences + sequence, *sequence);
            }
        }
        let ranks = self.model.context().positions.size();
        let each = tokens.len() / sequences.len();
        let span = |(index, sequence): (usize, &usize)| Span {
            sequence: *sequence as u64,
            start,
            tokens: index * each..(index + 1) * each,
            pages: (0..(start + each).div_ceil(PAGE_POSITIONS))
                .map(|page| PageId((sequence * self.local_pages + page / ranks) as u32))
                .collect(),
            slot: *sequence,
            first_rank: 0,
            generated: kind.generated,
            wanted: if kind.logits { vec![(each - 1, Wanted::Logits)] } else { Vec::new() },
        };
        let spans = sequences.iter().enumerate().map(span).collect();
        let batch = Batch { tokens: tokens.to_vec(), spans };
        let output = self.model.forward(&mut self.arena, &batch, &mut self.workspace);
        Ok(output.map_err(Failure::agreed)?.logits)
    }

    /// Decodes `steps` tokens of each of `sequences`. Returns the logits of the first step and the
    /// tokens, `[steps, sequences]`.
    fn decode(
        &mut self,
        sequences: &[usize],
        steps: usize,
    ) -> Result<(Option<Logits>, Vec<u32>), Failure> {
        let greedy = SamplingParams::default();
        let vocab_size = self.model.config().vocab_size;
        let first = |sequence: &usize| made_up(self.depth + 7 * sequence, vocab_size);
        let mut tokens: Vec<u32> = sequences.iter().map(first).collect();
        let (mut first_logits, mut chosen) = (None, Vec::new());
        for step in 0..steps {
            let logits = self.pass(sequences, self.depth + step, &tokens, STEP)?;
            let row = |row| SampleRow::new(row, &greedy, step as u64);
            let rows: Vec<_> = (0..sequences.len()).map(row).collect();
            let samples = self.sampler.sample_rows(&logits, &rows)?;
            first_logits.get_or_insert(logits);
            tokens.clear();
            for sample in samples {
                tokens.push(sample.map_err(Failure::agreed)?.id);
            }
            chosen.extend(&tokens);
        }
        Ok((first_logits, chosen))
    }

    /// Checks that the first and the last of `count` sequences get the answer that they get alone:
    /// the same bits under `heads` with an f32 or f16 cache, and otherwise logits that are close.
    fn check(&mut self, count: usize) -> Result<(), Failure> {
        let options = self.model.options();
        let exact = options.strategy == ParallelStrategy::Heads && options.kv != KvFormat::Q8;
        let together: Vec<_> = (0..count).collect();
        let steps = self.steps.min(4);
        let (logits, tokens) = self.decode(&together, steps)?;
        for sequence in [0, count - 1] {
            let (alone, expected) = self.decode(&[sequence], steps)?;
            let (Some(logits), Some(alone)) = (&logits, alone) else { continue };
            let (found, alone) = (logits.values.row(sequence), alone.values.row(0));
            let largest = alone.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let distance = found.iter().zip(alone).map(|(a, b)| (a - b).abs());
            let distance = distance.fold(0.0f32, f32::max);
            let found = tokens.iter().skip(sequence).step_by(count);
            let equal = distance == 0.0 && found.eq(&expected);
            let right = equal || !exact && distance <= TOLERANCE * largest;
            let wrong = CliError::Batch { sequence, count, distance, largest };
            self.rank.agree(if right { Ok(()) } else { Err(wrong) })?;
        }
        Ok(())
    }

    /// Measures `count` of the sequences together, after a check of their answers.
    pub fn measure(
        &mut self,
        count: usize,
        reps: usize,
        memory: &Memory,
        limits: &mut Limits<'_>,
    ) -> Result<Measured, Failure> {
        assert!((1..=self.sequences).contains(&count), "{count} of {} sequences", self.sequences);
        self.check(count)?;
        let (comm, steps) = (self.rank.comm(), self.steps);
        let sequences: Vec<_> = (0..count).collect();
        let (mut seconds, mut reads) = (Vec::new(), Vec::new());
        let (mut products, mut floats) = (Vec::new(), Vec::new());
        let mut passes = Vec::new();
        let vocab_size = self.model.config().vocab_size;
        let first = |sequence: &usize| made_up(self.depth + 7 * sequence, vocab_size);
        let rows: Vec<u32> = sequences.iter().map(first).collect();
        let input = self.model.product_input();
        for rep in 0..=reps {
            comm.barrier()?;
            comm.ledger().reset();
            comm.ledger().set_phase(Phase::Decode);
            let start = Instant::now();
            self.decode(&sequences, steps)?;
            comm.ledger().set_phase(Phase::Other);
            // The slowest rank's time is the step's.
            comm.barrier()?;
            let decode = start.elapsed().as_secs_f64();
            let (start, runs) = (Instant::now(), steps.min(PROMPT_PASSES));
            for _ in 0..runs {
                self.pass(&sequences, self.depth, &rows, PROMPT_ROWS)?;
            }
            comm.barrier()?;
            if rep > 0 {
                seconds.push(decode);
                passes.push(start.elapsed().as_secs_f64() / runs as f64);
            }
            reads.push(limits.look(Phase::Decode)?);
            floats.push(limits.operations_per_s(InputKind::Float)?);
            products.push(match input {
                InputKind::Float => floats[rep],
                _ => limits.operations_per_s(input)?,
            });
        }
        let config = self.model.config();
        let work = Work::of(config, count, self.depth, steps);
        let page_bytes = comm.all_gather_one(self.model.page_bytes() as u64)?;
        let per_position = page_bytes.iter().sum::<u64>() as f64
            / self.model.context().positions.size() as f64
            / PAGE_POSITIONS as f64;
        let bytes = steps as f64 * memory.pass(config, count) + per_position * work.positions;
        let arithmetic =
            work.product_flops / median(&products) + work.attention_flops / median(&floats);
        Ok(Measured {
            phase: Phase::Decode,
            batch: Some(count),
            tokens: count * steps,
            flops: work.product_flops + work.attention_flops,
            bytes,
            depth: self.depth,
            prompt_rows_ratio: Some(median(&passes) * steps as f64 / median(&seconds)),
            seconds,
            limit_seconds: (bytes / median(&reads)).max(arithmetic),
            allocations: None,
        })
    }
}

/// The two properties in which the passes of this benchmark differ.
#[derive(Clone, Copy)]
struct PassKind {
    /// Whether the model has generated the tokens, which decides how attention rounds.
    generated: bool,
    /// Whether the logits of the last token of each sequence are wanted.
    logits: bool,
}

/// Tokens of a prompt that only fill the cache.
const CHUNK: PassKind = PassKind { generated: false, logits: false };
/// A prompt token of each sequence, with logits for all.
const PROMPT_ROWS: PassKind = PassKind { generated: false, logits: true };
/// A decode step.
const STEP: PassKind = PassKind { generated: true, logits: true };

/// What the steps of a measurement have to do on all ranks together.
struct Work {
    product_flops: f64,
    attention_flops: f64,
    /// Positions of caches that are read.
    positions: f64,
}

impl Work {
    fn of(config: &Config, count: usize, depth: usize, steps: usize) -> Self {
        let products = config.forward_flops(1, 0, LogitRows::Last);
        let whole = |step| config.forward_flops(1, depth + step, LogitRows::Last);
        let attention: f64 = (0..steps).map(|step| whole(step) - products).sum();
        let positions: usize = (0..steps).map(|step| depth + step + 1).sum();
        Self {
            product_flops: (count * steps) as f64 * products,
            attention_flops: count as f64 * attention,
            positions: (count * positions) as f64,
        }
    }
}
