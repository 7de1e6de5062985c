//! What a pass over tokens costs: the work of the slowest rank and what the ranks exchange.
//!
//! Collectives are those of [`TrafficModel`], by the α–β model of [`comm::Link`]. Work is that of
//! the layers' products, of attention and of the head, at the rates of [`Machine`], after a
//! constant for each layer and KV head.

use comm::{Cluster, Collective, node_of};
use ops::{ExpertSplit, LayerCache, LogitRows, MlpSchedule, TokenLayout};
use tensor::{WeightFormat, split_range};

use crate::config::MoeConfig;
use crate::heads::HeadPlan;
use crate::options::{Division, OVERLAP_TOKENS, pass_tokens};
use crate::overlap::Overlap;
use crate::plan_experts::expected_most;
use crate::plan_input::PlanInput;
use crate::plan_machine::Machine;
use crate::plan_weights::{Matrices, RankWeights};
use crate::traffic::TrafficModel;

/// Passes over the row of a visit to an expert: it is gathered, prepared, written and added up.
const ROW_PASSES: f64 = 5.0;
/// How many more visits than an equal share the fullest rank with whole experts has in a prompt.
/// Routers are trained to spread the visits of many texts, those of one are less even: 1.1 was
/// measured on 2 ranks with random weights.
const SKEW: f64 = 1.1;

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
    /// If there is work all the while, and what they take from it: cores that compute move the
    /// packets, too.
    travel: f64,
    taken: f64,
}

impl Behind {
    /// What they take from `work` seconds of work, and how long the rest of them is waited for: as
    /// many travel behind the work, slowed down by them, as it lasts for.
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

/// A way to split the model.
pub(crate) struct Way<'a> {
    input: &'a PlanInput<'a>,
    division: Division,
    tp: usize,
    sp: usize,
    /// The weights of each rank.
    pub shares: Vec<RankWeights>,
    cluster: Cluster,
    hidden: [Cluster; 2],
}

impl<'a> Way<'a> {
    pub fn new(input: &'a PlanInput<'a>, division: Division) -> Self {
        let PlanInput { config, weights, machine, .. } = *input;
        let (tp, sp) = division.strategy.grid(machine.ranks);
        let share = |rank| weights.of_rank(config, division, machine.ranks, rank);
        let shares = (0..machine.ranks).map(share).collect();
        Self {
            input,
            division,
            tp,
            sp,
            shares,
            cluster: machine.cluster(),
            hidden: machine.hidden(),
        }
    }

    /// The whole prompt, in chunks.
    pub fn prompt(&self) -> PassCost {
        let PlanInput { prompt, chunk, .. } = *self.input;
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
        whole
    }

    /// A token in the middle of the answer.
    pub fn token(&self) -> PassCost {
        self.pass(1, self.input.prompt + self.input.generate / 2, LogitRows::Last)
    }

    /// Bytes of keys and values of `rank` for `positions` positions of the sequence.
    pub fn kv_bytes(&self, rank: usize, positions: usize) -> usize {
        let config = self.input.config;
        let heads = HeadPlan::new(config, self.tp, rank % self.tp).kv_heads.len();
        let position = LayerCache::position_bytes(self.input.kv, heads, config.head_dim)
            * config.num_hidden_layers;
        position * positions.div_ceil(self.sp)
    }

    fn pass(&self, tokens: usize, past: usize, rows: LogitRows) -> PassCost {
        let mut cost = PassCost::default();
        let halves =
            self.overlap().parts(self.input.config, self.sp, self.division.schedule, tokens).len()
                > 1;
        let mut most = Behind::default();
        for rank in 0..self.input.machine.ranks {
            let Exchange { calls, bytes, seconds, ring, sums } =
                self.collectives(rank, tokens, past, rows, halves);
            let attention = self.attention(rank, tokens, past);
            // Blocks of keys travel while a rank attends to those that it has; behind the last one
            // nothing travels.
            let (taken, waited) = ring.work(attention * (self.sp - 1) as f64 / self.sp as f64);
            cost.calls = cost.calls.max(calls);
            cost.bytes = cost.bytes.max(bytes);
            cost.collective_seconds = cost.collective_seconds.max(seconds + waited);
            cost.work_seconds =
                cost.work_seconds.max(self.products(rank, tokens, rows) + attention + taken);
            most = most.and(sums, f64::max);
        }
        if halves {
            // Each half's sum travels while the other half computes; the last one has nothing to
            // hide behind.
            let (taken, waited) = most.work(cost.work_seconds);
            cost.work_seconds += taken;
            cost.collective_seconds += waited + most.travel / cost.calls as f64;
        }
        cost
    }

    /// Only ranks that split weights alone go in halves, and then all of them share all machines.
    fn overlap(&self) -> Overlap {
        Overlap { machines: self.input.machine.nodes, tokens: OVERLAP_TOKENS }
    }

    /// Seconds of a rank's products with weights.
    fn products(&self, rank: usize, tokens: usize, rows: LogitRows) -> f64 {
        let PlanInput { config, machine, .. } = *self.input;
        let share = &self.shares[rank];
        let layout = TokenLayout::balanced(tokens, self.sp);
        let own = layout.count(rank / self.tp) as f64;
        // Ranks that only split positions bring their tokens together for feed-forward blocks that
        // they split.
        let together = self.tp == 1 && self.division.schedule != MlpSchedule::Local;
        let mlp_tokens = if together { tokens as f64 } else { own };
        let skew =
            if self.division.experts == ExpertSplit::Ranks && tokens > 1 { SKEW } else { 1.0 };
        let (visited, rows_each) =
            config.moe.as_ref().map_or((0.0, 0.0), |moe| self.visited(moe, mlp_tokens));
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
        let work =
            (self.kv_bytes(rank, past + tokens) as f64 / rate.read_gb_s).max(flops / rate.gflops);
        starts * rate.start_us * 1e-6 + work * 1e-9
    }

    /// The part of its experts that the rank with most visits has visited in a pass, and the rows
    /// of each of these.
    fn visited(&self, moe: &MoeConfig, tokens: f64) -> (f64, f64) {
        let (experts, visits) = (moe.num_experts as f64, moe.num_experts_per_tok as f64);
        let different = moe.visited_experts(tokens);
        let rows = tokens * visits / different.max(1.0);
        if self.division.experts == ExpertSplit::Inside {
            return (different / experts, rows);
        }
        let ranks = self.division.block_ranks(self.input.machine.ranks);
        let shares: Vec<_> =
            (0..ranks).map(|rank| split_range(moe.num_experts, ranks, rank).len()).collect();
        (expected_most(&shares, different.round() as usize) / shares[0] as f64, rows)
    }

    /// A rank's collectives; the choice of the next token is one of them.
    fn collectives(
        &self,
        rank: usize,
        tokens: usize,
        past: usize,
        rows: LogitRows,
        halves: bool,
    ) -> Exchange {
        let PlanInput { config, machine: &Machine { ranks, nodes, .. }, wire, kv, .. } =
            *self.input;
        let Division { strategy, schedule, .. } = self.division;
        let granularity = self.input.weights.granularity();
        let overlap = OVERLAP_TOKENS;
        let model = TrafficModel {
            config,
            ranks,
            nodes,
            rank,
            strategy,
            schedule,
            granularity,
            kv,
            overlap,
        };
        let node = |rank| node_of(rank, ranks, nodes);
        let row: Vec<usize> = (0..self.tp).map(|i| node(rank / self.tp * self.tp + i)).collect();
        let column: Vec<usize> = (0..self.sp).map(|i| node(rank % self.tp + i * self.tp)).collect();
        let everyone: Vec<usize> = (0..ranks).map(node).collect();
        let mut all = Exchange::default();
        let exact = model.exact(tokens, past);
        let mut entries = model.forward(tokens, past, rows);
        if let Some(sums) = entries.iter_mut().find(|entry| entry.collective == exact.collective) {
            sums.calls -= exact.calls;
            sums.payload_bytes -= exact.payload_bytes;
        }
        let entries = entries.into_iter().map(|entry| (entry, false)).chain([(exact, true)]);
        for (entry, exact) in entries.filter(|(entry, _)| entry.calls > 0) {
            let sums = !exact
                && matches!(entry.collective, Collective::Allreduce | Collective::ReduceScatter);
            let payload = entry.payload_bytes;
            let payload =
                if sums { wire.encoded_bytes(payload as usize / 4) as u64 } else { payload };
            let each = payload as f64 / entry.calls as f64;
            // In a grid, sums are those of a row of ranks that split weights, all else is exchanged
            // along columns.
            let group = match (self.tp, self.sp) {
                (1, _) | (_, 1) => &everyone,
                _ if sums && entry.collective == Collective::Allreduce
                    || matches!(schedule, MlpSchedule::Naive | MlpSchedule::Gathered) && !exact =>
                {
                    &row
                }
                _ => &column,
            };
            all.calls += entry.calls;
            all.bytes += payload;
            let on = |cluster: &Cluster| {
                entry.calls as f64 * cluster.seconds(entry.collective, group, each)
            };
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
            all.seconds +=
                self.cluster.seconds(Collective::Allgather, &everyone, candidates as f64);
        }
        all
    }
}
