//! The ways to split a model over ranks, what each of them costs, and which one is best.
//!
//! The cost of a pass is that of its slowest rank: work at the rates of the [`Machine`], and the
//! collectives that the operations state, by the α–β model of
//! [`comm::Link`](qwen3_model::comm::Link).

use qwen3_model::comm::{Cluster, Collective, WireFormat, node_of};
use qwen3_model::formats::WeightFormats;
use qwen3_model::ops::cost::{Call, Group, Operand};
use qwen3_model::ops::schedule::MlpSchedule;
use qwen3_model::ops::{KvFormat, LogitRows};
use qwen3_model::options::{Division, ExpertSplit, OVERLAP_TOKENS, pass_tokens};
use qwen3_model::shape::{ModelShape, PassShape};
use qwen3_model::{Config, ParallelStrategy};

use crate::imbalance::Imbalance;
use crate::machine::Machine;

/// How much faster than the first way another has to be to be recommended instead: the error of
/// predictions. The first way needs least memory.
const MARGIN: f64 = 0.2;

/// Bytes that the kernels of a thread keep for sums, widened weights and tiles of attention.
const THREAD_BYTES: usize = 512 << 10;

/// What is planned for.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// The model.
    pub config: &'a Config,
    /// Its weights in memory.
    pub weights: &'a WeightFormats,
    /// The format of cached keys and values.
    pub kv: KvFormat,
    /// The format of sums between ranks.
    pub wire: WireFormat,
    /// The ranks, on their machines in contiguous blocks, and their speed.
    pub machine: &'a Machine,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens to generate.
    pub generate: usize,
    /// Prompt tokens of a pass for each rank of those that split positions.
    pub chunk: usize,
    /// The feed-forward schedule; `None` tries the strategy's own.
    pub schedule: Option<MlpSchedule>,
    /// How a mixture of experts lies on the ranks; `None` tries both.
    pub experts: Option<ExpertSplit>,
    /// Bytes that a rank may use; ways that need more are not recommended if others fit.
    pub memory: Option<usize>,
    /// Whether schedules that exchange more than necessary are listed too.
    pub all_schedules: bool,
}

impl<'a> PlanInput<'a> {
    /// A prompt of 512 tokens in one pass and an answer of 256, a cache in f16 and sums in f32,
    /// any schedule and place of experts, and no limit on memory.
    pub fn new(config: &'a Config, weights: &'a WeightFormats, machine: &'a Machine) -> Self {
        Self {
            config,
            weights,
            kv: KvFormat::F16,
            wire: WireFormat::F32,
            machine,
            prompt: 512,
            generate: 256,
            chunk: 512,
            schedule: None,
            experts: None,
            memory: None,
            all_schedules: false,
        }
    }
}

/// Passes over the prompt, or one pass for a token; choosing the next token is part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassCost {
    /// Collectives of the rank that makes most.
    pub calls: u64,
    /// Payload bytes on the wire of the rank that has most.
    pub bytes: u64,
    /// Seconds of work of the slowest rank.
    pub work_seconds: f64,
    /// Seconds of collectives that no work hides.
    pub collective_seconds: f64,
}

impl PassCost {
    /// Seconds of work and collectives.
    pub fn seconds(&self) -> f64 {
        self.work_seconds + self.collective_seconds
    }
}

/// One way to split the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// What the ranks divide.
    pub strategy: ParallelStrategy,
    /// How they divide the feed-forward blocks.
    pub schedule: MlpSchedule,
    /// How a mixture of experts lies on them.
    pub experts: ExpertSplit,
    /// Bytes of weights of each rank.
    pub weight_bytes: Vec<usize>,
    /// Bytes of keys and values of each rank when prompt and answer are cached.
    pub kv_bytes: Vec<usize>,
    /// Bytes of buffers of each rank in the longest pass of the prompt.
    pub activation_bytes: Vec<usize>,
    /// How evenly heads and columns lie on the ranks that divide them, and the vocabulary on all.
    pub imbalance: Imbalance,
    /// The whole prompt, in chunks.
    pub prompt: PassCost,
    /// One token in the middle of the answer.
    pub token: PassCost,
}

impl Prediction {
    /// How the ranks divide the model.
    pub fn division(&self) -> Division {
        Division { strategy: self.strategy, schedule: self.schedule, experts: self.experts }
    }

    /// Bytes of the rank that needs most.
    pub fn memory(&self) -> usize {
        let Self { weight_bytes, kv_bytes, activation_bytes, .. } = self;
        let all = weight_bytes.iter().zip(kv_bytes).zip(activation_bytes);
        all.map(|((weights, kv), activations)| weights + kv + activations).max().unwrap_or(0)
    }

    /// Seconds of the prompt and the answer.
    pub fn seconds(&self, generate: usize) -> f64 {
        self.prompt.seconds() + generate as f64 * self.token.seconds()
    }
}

/// All ways, and the recommended one.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The ways; `Heads` first.
    pub ways: Vec<Prediction>,
    /// Index of the recommended one.
    pub best: usize,
}

/// Predicts every way of splitting the model and recommends one.
///
/// # Panics
/// If there are no ranks or nodes, more nodes than ranks, or the chunk is 0; if whole experts are
/// given and no way can have them.
pub fn plan(input: &PlanInput<'_>) -> Plan {
    let PlanInput { machine: &Machine { ranks, nodes, .. }, chunk, .. } = *input;
    assert!(
        (1..=ranks).contains(&nodes) && chunk > 0,
        "{ranks} ranks on {nodes} nodes, chunks of {chunk} tokens"
    );
    let inner = (2..ranks).filter(|tp| ranks.is_multiple_of(*tp));
    let grids = inner.map(|tp| ParallelStrategy::Grid { tp, sp: ranks / tp });
    let sequence = (ranks > 1).then_some(ParallelStrategy::Sequence);
    // Recurrent states go from token to token, so that hybrid models split heads only.
    let others = sequence.into_iter().chain(grids).filter(|_| input.config.hybrid.is_none());
    let mut ways = Vec::new();
    for strategy in [ParallelStrategy::Heads].into_iter().chain(others) {
        let own = if strategy == ParallelStrategy::Sequence {
            MlpSchedule::Local
        } else {
            MlpSchedule::Fused
        };
        let slow =
            [MlpSchedule::Naive, MlpSchedule::Gathered].into_iter().filter(|_| input.all_schedules);
        let schedules: Vec<_> =
            input.schedule.map_or_else(|| [own].into_iter().chain(slow).collect(), |one| vec![one]);
        for schedule in schedules {
            let whole = input.config.moe.is_some() && schedule == MlpSchedule::Fused && ranks > 1;
            let splits =
                [ExpertSplit::Inside].into_iter().chain(whole.then_some(ExpertSplit::Ranks));
            let splits = splits.filter(|split| input.experts.is_none_or(|given| given == *split));
            ways.extend(
                splits.map(|experts| predict(input, Division { strategy, schedule, experts })),
            );
        }
    }
    assert!(
        !ways.is_empty(),
        "whole experts on {ranks} ranks, with {:?} feed-forward",
        input.schedule
    );
    let fits = |way: &Prediction| input.memory.is_none_or(|most| way.memory() <= most);
    let any_fits = ways.iter().any(fits);
    // A way that does not fit is never the fastest, unless none fits.
    let seconds = |way: &Prediction| {
        if any_fits && !fits(way) { f64::INFINITY } else { way.seconds(input.generate) }
    };
    let seconds: Vec<f64> = ways.iter().map(seconds).collect();
    let fastest = (0..ways.len()).min_by(|a, b| seconds[*a].total_cmp(&seconds[*b])).unwrap_or(0);
    let best = if seconds[fastest] < seconds[0] * (1.0 - MARGIN) { fastest } else { 0 };
    Plan { ways, best }
}

fn predict(input: &PlanInput<'_>, division: Division) -> Prediction {
    let PlanInput { config, weights, machine, prompt, generate, chunk, kv, .. } = *input;
    let Machine { ranks, threads, .. } = *machine;
    let Division { strategy, schedule, experts } = division;
    let shape = |rank| ModelShape::new(config, weights, division, ranks, rank);
    let shapes: Vec<_> = (0..ranks).map(shape).collect();
    let (tp, sp) = strategy.grid(ranks);
    let way = Way { input, shapes: &shapes, tp, sp, cluster: machine.cluster() };

    let mut passes = PassCost::default();
    let (longest, mut past) = (pass_tokens(chunk, sp).min(prompt), 0);
    while past < prompt {
        let tokens = longest.min(prompt - past);
        let rows = if past + tokens == prompt { LogitRows::Last } else { LogitRows::None };
        let pass = way.pass(tokens, past, rows);
        passes.calls += pass.calls;
        passes.bytes += pass.bytes;
        passes.work_seconds += pass.work_seconds;
        passes.collective_seconds += pass.collective_seconds;
        past += tokens;
    }
    // A prompt of several passes meets earlier keys.
    let last = way.shape_of_pass(longest, prompt - longest, LogitRows::Last);
    Prediction {
        strategy,
        schedule,
        experts,
        weight_bytes: shapes.iter().map(ModelShape::weight_bytes).collect(),
        kv_bytes: shapes.iter().map(|shape| shape.cache_bytes(kv, prompt + generate)).collect(),
        activation_bytes: shapes
            .iter()
            .map(|shape| shape.pass(&last).scratch + threads * THREAD_BYTES)
            .collect(),
        imbalance: Imbalance::new(config, division, &shapes),
        prompt: passes,
        token: way.pass(1, prompt + generate / 2, LogitRows::Last),
    }
}

/// A way to split the model.
struct Way<'a> {
    input: &'a PlanInput<'a>,
    shapes: &'a [ModelShape<'a>],
    tp: usize,
    sp: usize,
    cluster: Cluster,
}

impl Way<'_> {
    fn shape_of_pass(&self, tokens: usize, past: usize, rows: LogitRows) -> PassShape {
        let PlanInput { kv, machine, .. } = *self.input;
        PassShape { tokens, past, rows, kv, nodes: machine.nodes, overlap: OVERLAP_TOKENS }
    }

    /// The machines of the ranks that `rank` meets in a collective of this group.
    fn nodes(&self, rank: usize, group: Group) -> Vec<usize> {
        let Self { tp, sp, .. } = *self;
        let node = |rank| node_of(rank, tp * sp, self.input.machine.nodes);
        match group {
            Group::Heads => (0..tp).map(|i| node(rank / tp * tp + i)).collect(),
            Group::Positions => (0..sp).map(|i| node(rank % tp + i * tp)).collect(),
        }
    }

    fn pass(&self, tokens: usize, past: usize, rows: LogitRows) -> PassCost {
        let PlanInput { machine, wire, weights, kv, .. } = *self.input;
        let pass = self.shape_of_pass(tokens, past, rows);
        let mut slowest = PassCost::default();
        for (rank, shape) in self.shapes.iter().enumerate() {
            let forward = shape.pass(&pass);
            let [row, column] =
                [Group::Heads, Group::Positions].map(|group| self.nodes(rank, group));
            let starts = shape.layers.iter().map(|(count, layer)| {
                let heads = layer.key_heads() as f64;
                let each = machine.attention_rate(kv).start_us * heads;
                *count as f64 * (machine.rate(weights.main()).start_us + each) * 1e-6
            });
            let (mut work, mut attention) = (starts.sum::<f64>(), 0.0);
            // Collectives that are waited for; sums that travel behind work in a pass in halves;
            // keys that travel behind attention.
            let (mut calls, mut bytes) = (0, 0);
            let (mut waited, mut sums, mut keys) = (0.0, 0.0, 0.0);
            for (count, cost) in forward.iter() {
                let times = count as f64;
                for (operand, part) in &cost.work {
                    match operand {
                        Operand::Weights(format) => {
                            work += times * machine.rate(*format).seconds(*part)
                        }
                        Operand::Cache(format) => {
                            attention += times * machine.attention_rate(*format).seconds(*part);
                        }
                    }
                }
                for call in &cost.calls {
                    let Call { group, collective, .. } = *call;
                    let payload = call.bytes(wire);
                    calls += count as u64;
                    bytes += count as u64 * payload;
                    let nodes = if group == Group::Heads { &row } else { &column };
                    let seconds = times * self.cluster.seconds(collective, nodes, payload as f64);
                    match collective {
                        Collective::Allreduce if forward.halves => sums += seconds,
                        // In a ring a rank receives at the same time.
                        Collective::Send => {}
                        Collective::Recv => keys += seconds,
                        _ => waited += seconds,
                    }
                }
            }
            work += attention;
            if forward.halves {
                // The last sum has nothing to hide behind.
                waited += (sums - work).max(sums / calls as f64);
            }
            // Behind the last of the blocks nothing travels.
            let behind = attention * (self.sp - 1) as f64 / self.sp as f64;
            waited += (keys - behind).max(0.0);
            slowest = PassCost {
                calls: slowest.calls.max(calls),
                bytes: slowest.bytes.max(bytes),
                work_seconds: slowest.work_seconds.max(work),
                collective_seconds: slowest.collective_seconds.max(waited),
            };
        }
        if machine.ranks > 1 && rows != LogitRows::None {
            // Ranks exchange candidates of eight bytes to choose the next token.
            let candidates = 8 * machine.ranks as u64;
            let nodes: Vec<_> = (0..machine.ranks)
                .map(|rank| node_of(rank, machine.ranks, machine.nodes))
                .collect();
            slowest.calls += 1;
            slowest.bytes += candidates;
            slowest.collective_seconds +=
                self.cluster.seconds(Collective::Allgather, &nodes, candidates as f64);
        }
        slowest
    }
}
