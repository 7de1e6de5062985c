//! How a model could be split over ranks, what each way costs, and which one is best.
//!
//! A pass takes the time of the slowest rank's work and that of the collectives of [`TrafficModel`], by the α–β model of
//! [`comm::Link`]. Work is that of the layers' products, of attention and of the head, at the rates of [`Machine`], after a constant for
//! each layer and KV head.

use comm::{Cluster, Collective, WireFormat, node_of};
use ops::{ExpertSplit, KvFormat, LogitRows, MlpSchedule, TokenLayout};
use tensor::{WeightFormat, split_range};

use crate::config::{Config, MoeConfig};
use crate::heads::{HeadPlan, Imbalance};
use crate::options::{Division, OVERLAP_TOKENS, ParallelStrategy, pass_tokens};
use crate::overlap::Overlap;
use crate::plan_experts::expected_most;
use crate::plan_machine::Machine;
use crate::plan_weights::{Matrices, RankWeights, WeightFormats};
use crate::traffic::TrafficModel;

/// How much faster than the first way another has to be to be recommended instead. It is the error of predictions: on 2 ranks they lie
/// within this of measured speeds (the section "Plan and measurement" of docs/performance.md), and the first needs least memory.
const MARGIN: f64 = 0.2;

/// Passes over the row of a visit to an expert: it is gathered, prepared, written and added up.
const ROW_PASSES: f64 = 5.0;
/// How many more visits than an equal share the fullest rank with whole experts has in a prompt. Routers are trained to spread the visits
/// of many texts, those of one are less even: 1.1 was measured on 2 ranks with random weights.
const SKEW: f64 = 1.1;

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
    /// Prompt tokens of a pass for each rank of those that split positions.
    pub chunk: usize,
    /// The feed-forward schedule, where it is given.
    pub schedule: Option<MlpSchedule>,
    /// How a mixture of experts lies on the ranks, where it is given.
    pub experts: Option<ExpertSplit>,
    /// Bytes that weights and cache of a rank may take, where it is known: ways that need more are not recommended if there are others.
    pub memory: Option<usize>,
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
    /// Seconds of collectives that no work hides.
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
    /// How a mixture of experts lies on them.
    pub experts: ExpertSplit,
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
    /// How the ranks divide the model.
    pub fn division(&self) -> Division {
        Division { strategy: self.strategy, schedule: self.schedule, experts: self.experts }
    }

    /// Bytes of weights and cache of the rank that has most.
    pub fn memory(&self) -> usize {
        self.weight_bytes.iter().zip(&self.kv_bytes).map(|(weights, kv)| weights + kv).max().unwrap_or(0)
    }

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
/// If there are no ranks or nodes, more nodes than ranks, or the chunk is 0; if whole experts are given and no way can have them.
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
        for schedule in schedules {
            let whole = input.config.moe.is_some() && schedule == MlpSchedule::Fused && ranks > 1;
            let splits = [ExpertSplit::Inside].into_iter().chain(whole.then_some(ExpertSplit::Ranks));
            let splits = splits.filter(|split| input.experts.is_none_or(|given| given == *split));
            ways.extend(splits.map(|experts| Way::new(input, Division { strategy, schedule, experts }).predict()));
        }
    }
    assert!(!ways.is_empty(), "whole experts on {ranks} ranks, with {:?} feed-forward", input.schedule);
    let fits = |way: &Prediction| input.memory.is_none_or(|most| way.memory() <= most);
    let any_fits = ways.iter().any(fits);
    // What does not fit takes for ever, unless nothing fits.
    let seconds = |way: &Prediction| {
        if any_fits && !fits(way) { f64::INFINITY } else { way.seconds(input.generate) }
    };
    let seconds: Vec<f64> = ways.iter().map(seconds).collect();
    let fastest = (0..ways.len()).min_by(|a, b| seconds[*a].total_cmp(&seconds[*b])).unwrap_or(0);
    let best = if seconds[fastest] < seconds[0] * (1.0 - MARGIN) { fastest } else { 0 };
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

/// What a rank exchanges in a pass.
#[derive(Clone, Copy, Default)]
struct Exchange {
    calls: u64,
    /// Payload on the wire.
    bytes: u64,
    /// Of what is waited for.
    seconds: f64,
    /// Keys and values that go round, behind attention.
    ring: Behind,
    /// Sums of passes in halves, behind all work.
    sums: Behind,
}

/// Seconds of messages that have work to travel behind.
#[derive(Clone, Copy, Default)]
struct Behind {
    /// If they are waited for all the same.
    waited: f64,
    /// If there is work all the while, and what they take from it: cores that compute move the packets, too.
    travel: f64,
    taken: f64,
}

impl Behind {
    /// What they take from `work` seconds of work, and how long the rest of them is waited for: as many travel behind the work, slowed
    /// down by them, as it lasts for.
    fn work(self, work: f64) -> (f64, f64) {
        let Self { waited, travel, taken } = self;
        let hidden = if travel > taken { (work / (travel - taken)).min(1.0) } else { 1.0 };
        (hidden * taken, (1.0 - hidden) * waited)
    }

    fn and(self, other: Self, by: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            waited: by(self.waited, other.waited),
            travel: by(self.travel, other.travel),
            taken: by(self.taken, other.taken),
        }
    }
}

struct Way<'a> {
    input: &'a PlanInput<'a>,
    division: Division,
    tp: usize,
    sp: usize,
    shares: Vec<RankWeights>,
    cluster: Cluster,
    hidden: [Cluster; 2],
}

impl<'a> Way<'a> {
    fn new(input: &'a PlanInput<'a>, division: Division) -> Self {
        let (tp, sp) = division.strategy.grid(input.ranks);
        let share = |rank| input.weights.of_rank(input.config, division, input.ranks, rank);
        let shares = (0..input.ranks).map(share).collect();
        Self { input, division, tp, sp, shares, cluster: input.machine.cluster(), hidden: input.machine.hidden() }
    }

    fn predict(&self) -> Prediction {
        let PlanInput { config, ranks, prompt, generate, chunk, .. } = *self.input;
        let mut whole = PassCost::default();
        let mut past = 0;
        while past < prompt {
            let tokens = pass_tokens(chunk, self.sp).min(prompt - past);
            let rows = if past + tokens == prompt { LogitRows::Last } else { LogitRows::None };
            let pass = self.pass(tokens, past, rows);
            whole.calls += pass.calls;
            whole.bytes += pass.bytes;
            whole.work_seconds += pass.work_seconds;
            whole.collective_seconds += pass.collective_seconds;
            past += tokens;
        }
        let granularity = self.input.weights.granularity();
        let Division { strategy, schedule, experts } = self.division;
        let of = |ranks| Imbalance::new(config, ranks, granularity, experts);
        let imbalance = Imbalance { vocabulary: of(ranks).vocabulary, ..of(self.tp) };
        Prediction {
            strategy,
            schedule,
            experts,
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
        let halves = self.overlap().parts(self.input.config, self.sp, self.division.schedule, tokens).len() > 1;
        let mut most = Behind::default();
        for rank in 0..self.input.ranks {
            let Exchange { calls, bytes, seconds, ring, sums } = self.collectives(rank, tokens, past, rows, halves);
            let attention = self.attention(rank, tokens, past);
            // Blocks of keys travel while a rank attends to those that it has; behind the last one nothing travels.
            let (taken, waited) = ring.work(attention * (self.sp - 1) as f64 / self.sp as f64);
            cost.calls = cost.calls.max(calls);
            cost.bytes = cost.bytes.max(bytes);
            cost.collective_seconds = cost.collective_seconds.max(seconds + waited);
            cost.work_seconds = cost.work_seconds.max(self.products(rank, tokens, rows) + attention + taken);
            most = most.and(sums, f64::max);
        }
        if halves {
            // Each half's sum travels while the other half computes; the last one has nothing to hide behind.
            let (taken, waited) = most.work(cost.work_seconds);
            cost.work_seconds += taken;
            cost.collective_seconds += waited + most.travel / cost.calls as f64;
        }
        cost
    }

    /// Only ranks that split weights alone go in halves, and then all of them share all machines.
    fn overlap(&self) -> Overlap {
        Overlap { machines: self.input.nodes, tokens: OVERLAP_TOKENS }
    }

    /// Seconds of a rank's products with weights.
    fn products(&self, rank: usize, tokens: usize, rows: LogitRows) -> f64 {
        let PlanInput { config, machine, .. } = *self.input;
        let share = &self.shares[rank];
        let layout = TokenLayout::balanced(tokens, self.sp);
        let own = layout.count(rank / self.tp) as f64;
        // Ranks that only split positions bring their tokens together for feed-forward blocks that they split.
        let together = self.tp == 1 && self.division.schedule != MlpSchedule::Local;
        let mlp_tokens = if together { tokens as f64 } else { own };
        let skew = if self.division.experts == ExpertSplit::Ranks && tokens > 1 { SKEW } else { 1.0 };
        let (visited, rows_each) = config.moe.as_ref().map_or((0.0, 0.0), |moe| self.visited(moe, mlp_tokens));
        let layers = config.num_hidden_layers as f64;
        let mut seconds = layers * machine.rate(self.input.weights.main()).start_us * 1e-6;
        for (index, format) in WeightFormat::ALL.into_iter().enumerate() {
            let rate = machine.rate(format);
            let heads = if rows == LogitRows::None { 0.0 } else { 1.0 };
            let visits = [
                (&share.attention, 1.0, own),
                (&share.mlp, 1.0, mlp_tokens),
                (&share.experts, visited, rows_each * skew),
                (&share.head, heads, 1.0),
            ];
            for (Matrices { bytes, elements }, part, rows) in visits {
                seconds += rate.seconds(bytes[index] * part, elements[index] * part, rows);
            }
        }
        let row_bytes = 4.0 * share.expert_rows * mlp_tokens * skew * ROW_PASSES;
        seconds + row_bytes / machine.rate(self.input.weights.main()).read_gb_s * 1e-9
    }

    /// Seconds of a rank's attention.
    fn attention(&self, rank: usize, tokens: usize, past: usize) -> f64 {
        let PlanInput { config, machine, .. } = *self.input;
        let heads = HeadPlan::new(config, self.tp, rank % self.tp);
        let share = heads.query_heads.len() as f64 / config.num_attention_heads as f64;
        let flops = config.attention_flops(tokens, past) as f64 * share;
        let rate = machine.attention_rate(self.input.kv);
        let flops = if tokens == 1 { 0.0 } else { flops / self.sp as f64 };
        let starts = (config.num_hidden_layers * heads.kv_heads.len()) as f64;
        let work = (self.kv_bytes(rank, past + tokens) / rate.read_gb_s).max(flops / rate.gflops);
        starts * rate.start_us * 1e-6 + work * 1e-9
    }

    /// The part of its experts that the rank with most visits has visited in a pass, and the rows of each of these.
    fn visited(&self, moe: &MoeConfig, tokens: f64) -> (f64, f64) {
        let (experts, visits) = (moe.num_experts as f64, moe.num_experts_per_tok as f64);
        let different = experts * (1.0 - (1.0 - visits / experts).powf(tokens));
        let rows = tokens * visits / different.max(1.0);
        if self.division.experts == ExpertSplit::Inside {
            return (different / experts, rows);
        }
        // Where no ranks split weights, those that split positions divide the experts.
        let ranks = if self.tp > 1 { self.tp } else { self.sp };
        let shares: Vec<_> = (0..ranks).map(|rank| split_range(moe.num_experts, ranks, rank).len()).collect();
        (expected_most(&shares, different.round() as usize) / shares[0] as f64, rows)
    }

    /// A rank's collectives; the choice of the next token is one of them.
    fn collectives(&self, rank: usize, tokens: usize, past: usize, rows: LogitRows, halves: bool) -> Exchange {
        let PlanInput { config, ranks, nodes, wire, kv, .. } = *self.input;
        let Division { strategy, schedule, .. } = self.division;
        let granularity = self.input.weights.granularity();
        let overlap = OVERLAP_TOKENS;
        let model = TrafficModel { config, ranks, nodes, rank, strategy, schedule, granularity, kv, overlap };
        let node = |rank| node_of(rank, ranks, nodes);
        let row: Vec<usize> = (0..self.tp).map(|i| node(rank / self.tp * self.tp + i)).collect();
        let column: Vec<usize> = (0..self.sp).map(|i| node(rank % self.tp + i * self.tp)).collect();
        let everyone: Vec<usize> = (0..ranks).map(node).collect();
        let mut all = Exchange::default();
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
            all.calls += entry.calls;
            all.bytes += payload;
            let on = |cluster: &Cluster| entry.calls as f64 * cluster.seconds(entry.collective, group, each);
            let [link, taken] = &self.hidden;
            let behind = Behind { waited: on(&self.cluster), travel: on(link), taken: on(taken) };
            match entry.collective {
                Collective::Allreduce if halves => all.sums = all.sums.and(behind, |a, b| a + b),
                // In a ring a rank receives at the same time.
                Collective::Send => {}
                Collective::Recv => all.ring = all.ring.and(behind, |a, b| a + b),
                _ => all.seconds += behind.waited,
            }
        }
        if ranks > 1 && rows != LogitRows::None {
            let candidates = 8 * ranks as u64;
            all.calls += 1;
            all.bytes += candidates;
            all.seconds += self.cluster.seconds(Collective::Allgather, &everyone, candidates as f64);
        }
        all
    }
}
