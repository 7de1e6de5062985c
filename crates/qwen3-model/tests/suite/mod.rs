//! The reference answers of `tests/data` on any group of ranks: run by threads and by MPI
//! processes.

use std::path::PathBuf;
use std::sync::Arc;

use qwen3_model::ModelSource;
use qwen3_model::comm::Communicator;
use qwen3_model::options::{AttentionAlgorithm, ExpertSplit, MlpSchedule, WeightFormat};
use qwen3_model::{Isa, LogitRows, Model, ModelOptions, ParallelStrategy, Sequence};
use safetensors::SafeTensors;

use crate::cases::folder;
use crate::traffic::{Statement, Traffic};

/// Hybrid models. Only the first is in `tests/data`; the others lie beside the workspace, where the
/// reference data is there.
pub const HYBRIDS: [&str; 4] = ["qwen3next", "qwen35-dense", "qwen35-long", "qwen35-moe"];

/// The largest distance of a logit, relative to the largest reference logit (the numeric contract).
const TOLERANCE: f32 = 2e-4;

/// One combination of values.
#[derive(Clone, Copy, Debug)]
pub struct Combination {
    pub strategy: ParallelStrategy,
    pub attention: AttentionAlgorithm,
    pub mlp: MlpSchedule,
    pub experts: ExpertSplit,
    pub isa: Isa,
    pub weights: Option<WeightFormat>,
    pub threads: usize,
}

/// All combinations of strategy (every grid of the ranks among them; a hybrid model only splits
/// heads), attention, schedule and, in a mixture, places of experts.
pub fn combinations(
    reference: &Reference,
    ranks: usize,
    isa: Isa,
    weights: Option<WeightFormat>,
    threads: usize,
) -> Vec<Combination> {
    let mut all = Vec::new();
    let inner = (2..ranks).filter(|tp| ranks.is_multiple_of(*tp));
    let grids = inner.map(|tp| ParallelStrategy::Grid { tp, sp: ranks / tp });
    let mut strategies = vec![ParallelStrategy::Heads];
    if !reference.hybrid {
        strategies.push(ParallelStrategy::Sequence);
        strategies.extend(grids);
    }
    for strategy in strategies {
        for attention in [AttentionAlgorithm::Materialized, AttentionAlgorithm::Streaming] {
            for mlp in
                [MlpSchedule::Fused, MlpSchedule::Naive, MlpSchedule::Gathered, MlpSchedule::Local]
            {
                let one = Combination {
                    strategy,
                    attention,
                    mlp,
                    experts: ExpertSplit::Inside,
                    isa,
                    weights,
                    threads,
                };
                all.push(one);
                if reference.mixture && mlp == MlpSchedule::Fused {
                    all.push(Combination { experts: ExpertSplit::Ranks, ..one });
                }
            }
        }
    }
    all
}

impl Combination {
    /// Whether a pass goes in halves where the ranks lie on several machines: the sums of one half
    /// travel while the other computes.
    pub fn goes_in_halves(&self) -> bool {
        self.strategy == ParallelStrategy::Heads && self.mlp == MlpSchedule::Fused
    }
}

/// The instruction sets of this machine, the fast one first.
pub fn isas() -> Vec<Isa> {
    let mut all: Vec<_> = Isa::all().collect();
    all.reverse();
    all
}

/// The answers of the reference implementation.
pub struct Reference {
    pub folder: PathBuf,
    /// Whether the model is a mixture of experts.
    pub mixture: bool,
    /// Whether some layers have a gated delta rule.
    pub hybrid: bool,
    pub input_ids: Vec<u32>,
    pub logits: Vec<f32>,
    pub greedy_ids: Vec<u32>,
}

/// The ledger counts what the operations state: a first pass, one that follows others, and a
/// decoded token.
fn check_traffic(model: &Model, prompt: &[u32], label: &str) {
    let (comm, options) = (model.comm(), model.options());
    let statement = Statement {
        config: model.config(),
        ranks: comm.size(),
        nodes: comm.machines(),
        rank: comm.rank(),
        division: options.division(),
        weights: WeightFormat::F32,
        kv: options.kv,
        overlap: options.overlap,
    };
    let mut cache = Sequence::new(model, prompt.len()).expect("memory");
    let middle = prompt.len() - 12;
    for (range, rows) in [
        (0..middle, LogitRows::All),
        (middle..prompt.len() - 1, LogitRows::Last),
        (prompt.len() - 1..prompt.len(), LogitRows::Last),
    ] {
        comm.ledger().reset();
        let tokens = &prompt[range.clone()];
        cache.forward(model, tokens, rows).unwrap();
        let counted: Vec<_> = comm
            .ledger()
            .entries()
            .into_iter()
            .map(|entry| Traffic {
                collective: entry.collective,
                calls: entry.calls,
                payload_bytes: entry.payload_bytes,
            })
            .collect();
        let predicted = statement.forward(tokens.len(), range.start, rows);
        assert_eq!(counted, predicted, "{label}: traffic of tokens {range:?}, {rows:?}");
    }
}

impl Reference {
    pub fn read(case: &str) -> Self {
        let folder = folder(case);
        let bytes =
            std::fs::read(folder.join("expected.safetensors")).expect("the case has its answers");
        let file = SafeTensors::deserialize(&bytes).expect("the answers are a safetensors file");
        let data = |name| file.tensor(name).expect(name).data().to_vec();
        let ids = |name| {
            data(name)
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32)
                .collect()
        };
        let logits = data("logits")
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        Self {
            folder,
            mixture: ["moe-bf16", "qwen35-moe", "qwen3next"].contains(&case),
            hybrid: HYBRIDS.contains(&case),
            input_ids: ids("input_ids"),
            logits,
            greedy_ids: ids("greedy_ids"),
        }
    }

    /// Compares this rank's view with the reference: prefill in one chunk and in pieces, then
    /// greedy decoding.
    pub fn check(&self, comm: Arc<dyn Communicator>, what: &Combination) {
        let (rank, ranks) = (comm.rank(), comm.size());
        let label = format!("{}: rank {rank} of {ranks}, {what:?}", self.folder.display());
        let options = ModelOptions {
            strategy: what.strategy,
            attention: what.attention,
            mlp: Some(what.mlp),
            experts: what.experts,
            weights: what.weights,
            threads: what.threads,
            // The reference's prompts are short.
            overlap: 2,
            ..ModelOptions::new(what.isa)
        };
        let model = Model::load(
            &ModelSource::open(&self.folder).expect("a model"),
            comm,
            &options,
            &|_| (),
        )
        .unwrap_or_else(|error| panic!("{label}: {error}"));
        let prompt = &self.input_ids;
        check_traffic(&model, prompt, &label);

        let mut cache =
            Sequence::new(&model, prompt.len() + self.greedy_ids.len()).expect("memory");
        let whole = cache.forward(&model, prompt, LogitRows::All).unwrap();
        let whole = model.gather_logits(&whole).unwrap();
        self.assert_close(&label, "one chunk", whole.as_slice().unwrap());

        cache.truncate(0);
        let mut pieces = Vec::new();
        let mut rest = &prompt[..];
        for size in [1, 13, 2, 5, usize::MAX] {
            let (piece, tail) = rest.split_at(size.min(rest.len()));
            let logits = cache.forward(&model, piece, LogitRows::All).unwrap();
            pieces.extend_from_slice(model.gather_logits(&logits).unwrap().as_slice().unwrap());
            rest = tail;
        }
        self.assert_close(&label, "in pieces", &pieces);

        let best = |logits: &[f32]| {
            let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
            best.0 as u32
        };
        let mut greedy = vec![best(&pieces[pieces.len() - model.config().vocab_size..])];
        while greedy.len() < self.greedy_ids.len() {
            let last = &greedy[greedy.len() - 1..];
            let logits = cache.forward(&model, last, LogitRows::Last).unwrap();
            let logits = model.gather_logits(&logits).unwrap();
            greedy.push(best(logits.as_slice().unwrap()));
        }
        assert_eq!(greedy, self.greedy_ids, "{label}: greedy continuation");
    }

    fn assert_close(&self, label: &str, how: &str, found: &[f32]) {
        assert_eq!(found.len(), self.logits.len(), "{label}: {how}: number of logits");
        let off = self.distance(found);
        assert!(off <= TOLERANCE, "{label}: {how}: off by {off} of the largest reference logit");
    }

    /// The largest distance of a logit, relative to the largest reference logit; NaN where a logit
    /// is.
    pub fn distance(&self, found: &[f32]) -> f32 {
        assert_eq!(found.len(), self.logits.len(), "logits");
        let largest = self.logits.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let apart = found.iter().zip(&self.logits).map(|(a, b)| (a - b).abs());
        apart.fold(0.0f32, |max, apart| if apart <= max { max } else { apart }) / largest
    }
}
