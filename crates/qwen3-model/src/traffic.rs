//! What a forward pass communicates, predicted from shapes alone.
//!
//! The formulas are those of `docs/parallelism.md`; a test holds them equal to what the ledger
//! counts. All figures are those of one rank's ledger: calls, and payload bytes as the ledger
//! defines them (the whole buffer of an Allreduce, Reduce-scatter or Broadcast, the whole gathered
//! result of an Allgather), with f32 on the wire.

use comm::{Collective, node_of};
use ops::{KvFormat, LogitRows, MlpSchedule, TokenLayout};
use tensor::split_granular;

use crate::config::Config;
use crate::heads::HeadPlan;
use crate::options::ParallelStrategy;
use crate::overlap::Overlap;

/// Bytes of an f32.
const F32: usize = 4;

/// What is predicted for: a model on some ranks.
#[derive(Clone, Copy, Debug)]
pub struct TrafficModel<'a> {
    /// The model.
    pub config: &'a Config,
    /// Ranks that share it.
    pub ranks: usize,
    /// Machines on which they lie, in equal contiguous blocks.
    pub nodes: usize,
    /// The rank whose ledger is predicted; all agree unless the ranks form a grid or heads are
    /// split unevenly.
    pub rank: usize,
    /// What they divide.
    pub strategy: ParallelStrategy,
    /// How they divide the feed-forward blocks.
    pub schedule: MlpSchedule,
    /// Feed-forward columns that are never cut apart: 1, or the group of a quantized format.
    pub granularity: usize,
    /// How keys and values are cached: between machines they travel as f16 where they are going to
    /// be kept so.
    pub kv: KvFormat,
    /// The least tokens of a pass that goes in halves, whose sums are calls of their own:
    /// [`ModelOptions::overlap`](crate::ModelOptions::overlap).
    pub overlap: usize,
}

/// Calls of one collective and the bytes that they carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// The collective.
    pub collective: Collective,
    /// How often it is called.
    pub calls: u64,
    /// Payload of all calls together.
    pub payload_bytes: u64,
}

/// Calls and bytes by collective, in the ledger's order.
#[derive(Default)]
struct Sum {
    entries: Vec<Traffic>,
}

impl Sum {
    /// `calls` calls of `elements` f32 each.
    fn add(&mut self, collective: Collective, calls: usize, elements: usize) {
        if calls == 0 {
            return;
        }
        let (calls, bytes) = (calls as u64, (calls * elements * F32) as u64);
        match self.entries.iter_mut().find(|entry| entry.collective == collective) {
            Some(entry) => {
                entry.calls += calls;
                entry.payload_bytes += bytes;
            }
            None => self.entries.push(Traffic { collective, calls, payload_bytes: bytes }),
        }
    }

    fn sorted(mut self) -> Vec<Traffic> {
        let order = |entry: &Traffic| {
            Collective::ALL.iter().position(|collective| *collective == entry.collective)
        };
        self.entries.sort_by_key(order);
        self.entries
    }
}

/// One forward pass as one rank sees it.
struct Pass {
    /// Tokens of the pass, and those of this rank among them.
    tokens: usize,
    own: usize,
    /// Tokens whose sums are made together.
    parts: Vec<usize>,
    /// Tokens cached before it.
    past: usize,
    /// Whether each token is on one rank of those that split positions.
    split: bool,
    /// Ranks that split weights, and ranks that split positions.
    tp: usize,
    sp: usize,
}

impl TrafficModel<'_> {
    /// The collectives of a forward pass of `tokens` tokens after `past` others, with the logits of
    /// `rows`. Collectives that are never called are left out; so is the choice of the next token,
    /// which [`Sampler`](crate::Sampler) describes.
    pub fn forward(&self, tokens: usize, past: usize, rows: LogitRows) -> Vec<Traffic> {
        let (tp, sp) = self.strategy.grid(self.ranks);
        let layout = TokenLayout::balanced(tokens, sp);
        let own = layout.count(self.rank / tp);
        // Only where all ranks split heads does a pass go in halves, and then these lie on all
        // machines.
        let overlap = Overlap { machines: self.nodes, tokens: self.overlap };
        let parts = overlap.parts(self.config, sp, self.schedule, own);
        let parts = parts.iter().map(ExactSizeIterator::len).collect();
        let pass = Pass { tokens, own, parts, past, split: layout.is_split(), tp, sp };
        let mut sum = Sum::default();
        for layer in 0..self.config.num_hidden_layers {
            self.attention(&pass, &mut sum);
            self.feed_forward(&pass, layer, &mut sum);
        }
        if pass.split {
            match rows {
                LogitRows::None => {}
                LogitRows::Last => sum.add(Collective::Broadcast, 1, self.config.hidden_size),
                LogitRows::All => {
                    sum.add(Collective::Allgatherv, 1, tokens * self.config.hidden_size)
                }
            }
        }
        sum.sorted()
    }

    /// Of the Allreduces of [`TrafficModel::forward`] those that travel as f32 on any wire: maxima
    /// and sums of the softmax of queries that went to all ranks of a column.
    pub fn exact(&self, tokens: usize, past: usize) -> Traffic {
        let (tp, sp) = self.strategy.grid(self.ranks);
        let gathered = TokenLayout::balanced(tokens, sp).is_split() && past > 0;
        let calls = if gathered { 2 * self.config.num_hidden_layers as u64 } else { 0 };
        let heads = HeadPlan::new(self.config, tp, self.rank % tp).query_heads.len();
        Traffic {
            collective: Collective::Allreduce,
            calls,
            payload_bytes: calls * (tokens * heads * F32) as u64,
        }
    }

    fn attention(&self, pass: &Pass, sum: &mut Sum) {
        let Pass { tokens, past, split, tp, sp, .. } = *pass;
        let plan = HeadPlan::new(self.config, tp, self.rank % tp);
        let heads = plan.query_heads.len();
        let (queries, keys) =
            (heads * self.config.head_dim, plan.kv_heads.len() * self.config.head_dim);
        if sp > 1 && !split {
            // The softmax states of all ranks: maximum and sum of each head, accumulators of each
            // element.
            sum.add(Collective::Allgather, 1, sp * tokens * (2 * heads + queries));
        }
        let (layout, machines) =
            (TokenLayout::balanced(tokens, sp), column_machines(tp, sp, self.rank, self.nodes));
        // Keys and values of a token, in the places of f32 that they take.
        let width = if self.kv == KvFormat::F16 && machines > 1 { keys } else { 2 * keys };
        if layout.goes_round(machines) {
            // Every block but the next rank's leaves, every block but this rank's own arrives.
            let block = |number: usize| width * layout.count((self.rank / tp + sp - number) % sp);
            (1..sp).for_each(|number| {
                sum.add(Collective::Send, 1, block(number - 1));
                sum.add(Collective::Recv, 1, block(number));
            });
        } else if split {
            sum.add(Collective::Allgatherv, 1, tokens * width);
        }
        if split && past > 0 {
            sum.add(Collective::Allgatherv, 1, tokens * queries);
            sum.add(Collective::Allreduce, 2, tokens * heads);
            sum.add(Collective::ReduceScatter, 1, tokens * queries);
        }
        if tp > 1 {
            pass.parts
                .iter()
                .for_each(|part| sum.add(Collective::Allreduce, 1, part * self.config.hidden_size));
        }
    }

    fn feed_forward(&self, pass: &Pass, layer: usize, sum: &mut Sum) {
        let Pass { tokens, own, split, tp, sp, .. } = *pass;
        // Ranks that split weights hold the same tokens; where none do, those that split positions
        // gather theirs.
        let (ranks, split, tokens) = if tp > 1 { (tp, false, own) } else { (sp, split, tokens) };
        let hidden = tokens * self.config.hidden_size;
        // A sparse block exchanges a row for each visit to an expert before the experts' results
        // are combined, and a row for each token afterwards.
        let (visits, columns) = match self.config.moe_of(layer) {
            Some(moe) => (tokens * moe.num_experts_per_tok, moe.moe_intermediate_size),
            None => (tokens, self.config.intermediate_size),
        };
        let inner = visits * columns;
        if split && self.schedule != MlpSchedule::Local {
            sum.add(Collective::Allgatherv, 1, hidden);
        }
        let reduce = if split { Collective::ReduceScatter } else { Collective::Allreduce };
        let reductions = usize::from(ranks > 1);
        match self.schedule {
            MlpSchedule::Local => {}
            MlpSchedule::Fused if split => sum.add(reduce, reductions, hidden),
            MlpSchedule::Fused => {
                pass.parts
                    .iter()
                    .for_each(|part| sum.add(reduce, reductions, part * self.config.hidden_size));
            }
            MlpSchedule::Naive => {
                sum.add(Collective::Allgatherv, 2, inner);
                sum.add(reduce, reductions, hidden);
            }
            MlpSchedule::Gathered => {
                sum.add(gather(columns, self.granularity, ranks), 3, inner);
                sum.add(gather(self.config.hidden_size, 1, ranks), reductions, hidden);
            }
        }
    }
}

/// Machines on which the ranks lie that hold the same heads as `rank`, where `tp · sp` ranks lie on
/// `nodes` machines.
pub(crate) fn column_machines(tp: usize, sp: usize, rank: usize, nodes: usize) -> usize {
    let mut machines: Vec<_> =
        (0..sp).map(|row| node_of(row * tp + rank % tp, tp * sp, nodes)).collect();
    machines.dedup();
    machines.len()
}

/// Allgather where each of `ranks` has equally many of `size` columns.
fn gather(size: usize, granularity: usize, ranks: usize) -> Collective {
    let share = |rank| split_granular(size, granularity, ranks, rank).len();
    let equal = (1..ranks).all(|rank| share(rank) == share(0));
    if equal { Collective::Allgather } else { Collective::Allgatherv }
}
