//! How a model could be split over ranks, what each way costs, and which one is best.
//!
//! A pass takes the time of the slowest rank's work, which is the longer of reading (weights and cached keys and values over the rank's
//! read rate) and arithmetic (matrices at the rank's rate, attention at a part of it), and that of the collectives of
//! [`TrafficModel`], by the α–β model of [`comm::Link`].

use comm::{Cluster, Collective, WireFormat, node_of};
use ops::{ExpertSplit, KvFormat, LogitRows, MlpSchedule, TokenLayout};
use tensor::WeightFormat;

use crate::config::Config;
use crate::heads::{HeadPlan, Imbalance};
use crate::options::{Division, ParallelStrategy};
use crate::plan_machine::Machine;
use crate::plan_weights::{ByFormat, RankWeights, WeightFormats};
use crate::traffic::TrafficModel;

/// The parts of a machine's limits that the kernels of matrix products reach.
const READ_RATE: f64 = 0.9;
const MATRIX_RATE: f64 = 0.85;
/// The part of the rate of matrix products that attention reaches: its tiles are small and its exponentials count for nothing.
const ATTENTION_RATE: f64 = 0.5;
/// How much better than an earlier one a way has to be to be recommended instead; predictions are no better than that.
const MARGIN: f64 = 0.02;

/// What is planned for.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// The model.
    pub config: &'a Config,
    /// Its weights in memory.
    pub weights: &'a WeightFormats,
    /// The format of cached keys and values.
    pub kv: KvFormat,
    /// How sums travel.
    pub wire: WireFormat,
    /// What ranks and links can do.
    pub machine: &'a Machine,
    /// Ranks that share the model.
    pub ranks: usize,
    /// Machines on which they lie, in contiguous blocks.
    pub nodes: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens to generate.
    pub generate: usize,
    /// Prompt tokens of a pass.
    pub chunk: usize,
    /// The feed-forward schedule, where it is given.
    pub schedule: Option<MlpSchedule>,
    /// Whether schedules that exchange more than they have to are listed too.
    pub all_schedules: bool,
}

/// Passes over the prompt, or one pass for a token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassCost {
    /// Collectives of the rank that makes most, and their payload on the wire.
    pub calls: u64,
    /// Payload bytes of the rank that has most.
    pub bytes: u64,
    /// Seconds of work of the slowest rank.
    pub work_seconds: f64,
    /// Seconds of collectives.
    pub collective_seconds: f64,
}

impl PassCost {
    /// Work and collectives.
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
    /// Bytes of weights of each rank.
    pub weight_bytes: Vec<usize>,
    /// Bytes of keys and values of each rank when prompt and answer are cached.
    pub kv_bytes: Vec<usize>,
    /// How evenly heads and columns lie on the ranks that divide them, and the vocabulary on all.
    pub imbalance: Imbalance,
    /// The whole prompt, in chunks.
    pub prompt: PassCost,
    /// One token in the middle of the answer.
    pub token: PassCost,
}

impl Prediction {
    /// Seconds of the prompt and the answer.
    pub fn seconds(&self, generate: usize) -> f64 {
        self.prompt.seconds() + generate as f64 * self.token.seconds()
    }
}

/// All ways, and the recommended one.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The ways, weights first.
    pub ways: Vec<Prediction>,
    /// Index of the recommended one.
    pub best: usize,
}

/// Predicts every way of splitting the model and recommends one.
///
/// # Panics
/// If there are no ranks or nodes, more nodes than ranks, or the chunk is 0.
pub fn plan(input: &PlanInput<'_>) -> Plan {
    let PlanInput { ranks, nodes, chunk, .. } = *input;
    assert!((1..=ranks).contains(&nodes) && chunk > 0, "{ranks} ranks on {nodes} nodes, chunks of {chunk} tokens");
    let inner = (2..ranks).filter(|tp| ranks.is_multiple_of(*tp));
    let grids = inner.map(|tp| ParallelStrategy::Grid { tp, sp: ranks / tp });
    let sequence = (ranks > 1).then_some(ParallelStrategy::Sequence);
    let mut ways = Vec::new();
    for strategy in [ParallelStrategy::Heads].into_iter().chain(sequence).chain(grids) {
        let own = if strategy == ParallelStrategy::Sequence { MlpSchedule::Local } else { MlpSchedule::Fused };
        let slow = [MlpSchedule::Naive, MlpSchedule::Gathered].into_iter().filter(|_| input.all_schedules);
        let schedules: Vec<_> = input.schedule.map_or_else(|| [own].into_iter().chain(slow).collect(), |one| vec![one]);
        ways.extend(schedules.into_iter().map(|schedule| Way::new(input, strategy, schedule).predict()));
    }
    let seconds: Vec<f64> = ways.iter().map(|way| way.seconds(input.generate)).collect();
    let best =
        (1..ways.len()).fold(0, |best, way| if seconds[way] < seconds[best] * (1.0 - MARGIN) { way } else { best });
    Plan { ways, best }
}

/// Bytes of the key and the value of one position of a head.
fn kv_position_bytes(format: KvFormat, head_dim: usize) -> usize {
    2 * match format {
        KvFormat::F32 => 4 * head_dim,
        KvFormat::F16 => 2 * head_dim,
        KvFormat::Q8 => head_dim + 2 * head_dim.div_ceil(32),
    }
}

struct Way<'a> {
    input: &'a PlanInput<'a>,
    strategy: ParallelStrategy,
    schedule: MlpSchedule,
    tp: usize,
    sp: usize,
    shares: Vec<RankWeights>,
    cluster: Cluster,
}

impl<'a> Way<'a> {
    fn new(input: &'a PlanInput<'a>, strategy: ParallelStrategy, schedule: MlpSchedule) -> Self {
        let (tp, sp) = strategy.grid(input.ranks);
        let division = Division { strategy, schedule, experts: ExpertSplit::Inside };
        let share = |rank| input.weights.of_rank(input.config, division, input.ranks, rank);
        let shares = (0..input.ranks).map(share).collect();
        Self { input, strategy, schedule, tp, sp, shares, cluster: input.machine.cluster() }
    }

    fn predict(&self) -> Prediction {
        let PlanInput { config, ranks, prompt, generate, chunk, .. } = *self.input;
        let mut whole = PassCost::default();
        let mut past = 0;
        while past < prompt {
            let tokens = chunk.min(prompt - past);
            let rows = if past + tokens == prompt { LogitRows::Last } else { LogitRows::None };
            let pass = self.pass(tokens, past, rows);
            whole.calls += pass.calls;
            whole.bytes += pass.bytes;
            whole.work_seconds += pass.work_seconds;
            whole.collective_seconds += pass.collective_seconds;
            past += tokens;
        }
        let granularity = self.input.weights.granularity();
        let of = |ranks| Imbalance::new(config, ranks, granularity, ExpertSplit::Inside);
        let imbalance = Imbalance { vocabulary: of(ranks).vocabulary, ..of(self.tp) };
        Prediction {
            strategy: self.strategy,
            schedule: self.schedule,
            weight_bytes: self.shares.iter().map(|share| share.bytes).collect(),
            kv_bytes: (0..ranks).map(|rank| self.kv_bytes(rank, prompt + generate) as usize).collect(),
            imbalance,
            prompt: whole,
            token: self.pass(1, prompt + generate / 2, LogitRows::Last),
        }
    }

    /// Bytes of keys and values of `rank` for `positions` positions of the sequence.
    fn kv_bytes(&self, rank: usize, positions: usize) -> f64 {
        let config = self.input.config;
        let heads = HeadPlan::new(config, self.tp, rank % self.tp).kv_heads.len();
        let position = heads * kv_position_bytes(self.input.kv, config.head_dim) * config.num_hidden_layers;
        (position * positions.div_ceil(self.sp)) as f64
    }

    fn pass(&self, tokens: usize, past: usize, rows: LogitRows) -> PassCost {
        let mut cost = PassCost::default();
        for rank in 0..self.input.ranks {
            let (calls, bytes, seconds) = self.collectives(rank, tokens, past, rows);
            cost.calls = cost.calls.max(calls);
            cost.bytes = cost.bytes.max(bytes);
            cost.collective_seconds = cost.collective_seconds.max(seconds);
            cost.work_seconds = cost.work_seconds.max(self.work(rank, tokens, past, rows));
        }
        cost
    }

    /// Seconds that a rank computes.
    fn work(&self, rank: usize, tokens: usize, past: usize, rows: LogitRows) -> f64 {
        let PlanInput { config, machine, .. } = *self.input;
        let share = &self.shares[rank];
        let layout = TokenLayout::balanced(tokens, self.sp);
        let own = layout.count(rank / self.tp) as f64;
        // Ranks that only split positions bring their tokens together for feed-forward blocks that they split.
        let together = self.tp == 1 && self.schedule != MlpSchedule::Local;
        let mlp_tokens = if together { tokens as f64 } else { own };
        let visited = config.moe.as_ref().map_or(1.0, |moe| {
            let missed = 1.0 - moe.num_experts_per_tok as f64 / moe.num_experts as f64;
            1.0 - missed.max(0.0).powf(mlp_tokens)
        });
        let head = if rows == LogitRows::None { 0.0 } else { 1.0 };
        let amount = |values: &ByFormat, index: usize| values[index];
        let (mut reading, mut arithmetic) = (0.0, 0.0);
        for (index, format) in WeightFormat::ALL.into_iter().enumerate() {
            let elements = amount(&share.attention_elements, index) * own
                + amount(&share.mlp_elements, index) * mlp_tokens
                + amount(&share.head_elements, index) * head;
            let bytes = amount(&share.always, index) + amount(&share.experts, index) * visited;
            if bytes > 0.0 {
                let rate = machine.rate(format);
                reading += bytes / (rate.read_gb_s * READ_RATE * 1e9);
                arithmetic += 2.0 * elements / (rate.gflops * MATRIX_RATE * 1e9);
            }
        }
        let main = machine.rate(WeightFormat::Bf16);
        reading += self.kv_bytes(rank, past + tokens) / (main.read_gb_s * READ_RATE * 1e9);
        let heads = HeadPlan::new(config, self.tp, rank % self.tp).query_heads.len() as f64;
        let attention = config.attention_flops(tokens, past) as f64 * heads / config.num_attention_heads as f64;
        arithmetic += attention / self.sp as f64 / (main.gflops * MATRIX_RATE * ATTENTION_RATE * 1e9);
        if tokens == 1 { reading } else { reading.max(arithmetic) }
    }

    /// Calls, payload on the wire and seconds of a rank's collectives; the choice of the next token is one of them.
    fn collectives(&self, rank: usize, tokens: usize, past: usize, rows: LogitRows) -> (u64, u64, f64) {
        let PlanInput { config, ranks, nodes, wire, .. } = *self.input;
        let (strategy, schedule) = (self.strategy, self.schedule);
        let granularity = self.input.weights.granularity();
        let model = TrafficModel { config, ranks, rank, strategy, schedule, granularity };
        let node = |rank| node_of(rank, ranks, nodes);
        let row: Vec<usize> = (0..self.tp).map(|i| node(rank / self.tp * self.tp + i)).collect();
        let column: Vec<usize> = (0..self.sp).map(|i| node(rank % self.tp + i * self.tp)).collect();
        let everyone: Vec<usize> = (0..ranks).map(node).collect();
        let (mut calls, mut bytes, mut seconds) = (0, 0, 0.0);
        for entry in model.forward(tokens, past, rows) {
            let sums = matches!(entry.collective, Collective::Allreduce | Collective::ReduceScatter);
            let payload = entry.payload_bytes;
            let payload = if sums { wire.encoded_bytes(payload as usize / 4) as u64 } else { payload };
            let each = payload as f64 / entry.calls as f64;
            // In a grid, sums are those of a row of ranks that split weights, all else is exchanged along columns.
            let group = match (self.tp, self.sp) {
                (1, _) | (_, 1) => &everyone,
                _ if entry.collective == Collective::Allreduce
                    || matches!(schedule, MlpSchedule::Naive | MlpSchedule::Gathered) =>
                {
                    &row
                }
                _ => &column,
            };
            calls += entry.calls;
            bytes += payload;
            seconds += entry.calls as f64 * self.cluster.seconds(entry.collective, group, each);
        }
        if ranks > 1 && rows != LogitRows::None {
            let candidates = 8 * ranks as u64;
            calls += 1;
            bytes += candidates;
            seconds += self.cluster.seconds(Collective::Allgather, &everyone, candidates as f64);
        }
        (calls, bytes, seconds)
    }
}
