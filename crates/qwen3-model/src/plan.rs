//! How a model could be split over ranks, what each way costs, and which one is best.

use ops::{ExpertSplit, MlpSchedule};

use crate::heads::Imbalance;
use crate::options::{Division, ParallelStrategy};
use crate::plan_input::PlanInput;
use crate::plan_machine::Machine;
use crate::plan_memory::activation_bytes;
use crate::plan_pass::{PassCost, Way};

/// How much faster than the first way another has to be to be recommended instead. It is the error
/// of predictions: on 2 ranks of a machine that nobody else used they lie within this of measured
/// speeds (the section "Plan and measurement" of docs/performance-sapphire-rapids.md), and the
/// first needs least memory.
const MARGIN: f64 = 0.2;

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
    /// Bytes that each rank works with in the longest pass of the prompt: activations, and keys and
    /// values on their way.
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
    /// The ways, weights first.
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
    let mut ways = Vec::new();
    for strategy in [ParallelStrategy::Heads].into_iter().chain(sequence).chain(grids) {
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
    // What does not fit takes for ever, unless nothing fits.
    let seconds = |way: &Prediction| {
        if any_fits && !fits(way) { f64::INFINITY } else { way.seconds(input.generate) }
    };
    let seconds: Vec<f64> = ways.iter().map(seconds).collect();
    let fastest = (0..ways.len()).min_by(|a, b| seconds[*a].total_cmp(&seconds[*b])).unwrap_or(0);
    let best = if seconds[fastest] < seconds[0] * (1.0 - MARGIN) { fastest } else { 0 };
    Plan { ways, best }
}

fn predict(input: &PlanInput<'_>, division: Division) -> Prediction {
    let PlanInput { config, weights, machine: &Machine { ranks, .. }, prompt, generate, .. } =
        *input;
    let Division { strategy, schedule, experts } = division;
    let way = Way::new(input, division);
    Prediction {
        strategy,
        schedule,
        experts,
        weight_bytes: way.shares.iter().map(|share| share.bytes).collect(),
        kv_bytes: (0..ranks).map(|rank| way.kv_bytes(rank, prompt + generate)).collect(),
        activation_bytes: (0..ranks).map(|rank| activation_bytes(input, division, rank)).collect(),
        imbalance: Imbalance::new(config, division, ranks, weights.granularity()),
        prompt: way.prompt(),
        token: way.token(),
    }
}
