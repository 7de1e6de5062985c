//! More ranks than a model divides into: on 3 to 16 ranks every split gives the answer of one rank,
//! and its shares are those planned.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use checkpoint::{CheckpointWriter, TensorSpec};
use comm::{Communicator, CommunicatorExt, EmulatedComm, Link, SoloComm, ThreadComm};
use qwen3_model::ModelSource;
use qwen3_model::checkpoint::Checkpoint;
use qwen3_model::formats::WeightFormats;
use qwen3_model::heads::HeadPlan;
use qwen3_model::names::{TensorRole, tensor_specs};
use qwen3_model::options::{AttentionAlgorithm, ExpertSplit, MlpSchedule, WeightFormat};
use qwen3_model::quantize::quantize;
use qwen3_model::sampling::SampleRow;
use qwen3_model::shape::ModelShape;
use qwen3_model::{
    Config, Isa, LogitRows, Model, ModelOptions, ParallelStrategy, Sampler, SamplingParams,
    Sequence,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tensor::split_range;

/// The numeric contract, relative to the largest logit.
const TOLERANCE: f32 = 2e-4;
/// Of weights in groups: their products take inputs in steps of 1/127 of a group's largest, and a
/// sum in another order may land on the next step.
const QUANTIZED: f32 = 3e-2;
const RANKS: [usize; 6] = [3, 5, 6, 7, 12, 16];
/// Long enough that 16 ranks split it.
const PROMPT: usize = 41;
const DECODED: usize = 4;

fn config(heads: usize, kv_heads: usize, columns: usize, vocabulary: usize) -> Value {
    json!({
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": columns, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 32, "vocab_size": vocabulary,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e4
    })
}

/// Experts that no rank count divides, in the first two of three layers.
fn sparse(experts: usize, columns: usize) -> Value {
    let mut value = config(6, 3, 40, 50);
    let more = json!({
        "model_type": "qwen3_moe", "num_hidden_layers": 3, "num_experts": experts, "num_experts_per_tok": 2,
        "moe_intermediate_size": columns, "mlp_only_layers": [2], "norm_topk_prob": true
    });
    value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    value
}

/// A checkpoint, and what one rank makes of it with scalar kernels.
struct Case {
    _folder: tempfile::TempDir,
    dir: PathBuf,
    config: Config,
    weights: Option<WeightFormat>,
    prompt: Vec<u32>,
    /// [PROMPT + DECODED, vocabulary], the last rows for the tokens in `greedy`.
    logits: Vec<f32>,
    greedy: Vec<u32>,
    /// Of a KV head on which one position is kept, over all layers.
    head_bytes: usize,
}

impl Case {
    /// A checkpoint in f32, loaded as `weights`.
    fn new(value: &Value, weights: Option<WeightFormat>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), value, &[WeightFormat::F32]);
        let dir = folder.path().to_owned();
        Self::of(folder, dir, weights)
    }

    /// A checkpoint that was quantized before.
    fn quantized(value: &Value, format: WeightFormat) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), value, &[WeightFormat::F32]);
        let dir = folder.path().join("quantized");
        quantize(&ModelSource::open(folder.path()).unwrap(), &dir, format, &mut |_| ()).unwrap();
        Self::of(folder, dir, None)
    }

    fn of(folder: tempfile::TempDir, dir: PathBuf, weights: Option<WeightFormat>) -> Self {
        let config = Config::read(&ModelSource::open(&dir).expect("a model")).unwrap();
        let mut rng = StdRng::seed_from_u64(7);
        let prompt = (0..PROMPT).map(|_| rng.random_range(0..config.vocab_size as u32)).collect();
        let mut case = Self {
            _folder: folder,
            dir,
            config,
            weights,
            prompt,
            logits: Vec::new(),
            greedy: Vec::new(),
            head_bytes: 0,
        };
        let model = case.load(weights);
        (case.logits, case.greedy) = run(&model, &case.prompt, &[usize::MAX]);
        let mut cache = Sequence::new(&model, 1).expect("memory");
        cache.forward(&model, &[1], LogitRows::None).unwrap();
        case.head_bytes = cache.bytes() / case.config.num_key_value_heads;
        case
    }

    /// One rank, with scalar kernels.
    fn load(&self, weights: Option<WeightFormat>) -> Model {
        let options =
            ModelOptions { weights, ..self.options(ParallelStrategy::Heads, Isa::scalar()) };
        Model::load(
            &ModelSource::open(&self.dir).expect("a model"),
            Arc::new(SoloComm::new()),
            &options,
            &|_| (),
        )
        .unwrap()
    }

    fn options(&self, strategy: ParallelStrategy, isa: Isa) -> ModelOptions {
        ModelOptions { strategy, weights: self.weights, ..ModelOptions::new(isa) }
    }

    /// Every rank count, with heads, positions, and the narrowest and widest grid of each that is
    /// composite (the widest splits heads over more ranks than there are); split feed-forward
    /// blocks on all.
    fn check(&self) {
        use MlpSchedule::{Fused, Gathered, Local, Naive};
        for ranks in RANKS {
            let grid = |tp| (ParallelStrategy::Grid { tp, sp: ranks / tp }, Fused);
            let least = (2..ranks).find(|divisor| ranks.is_multiple_of(*divisor));
            let grids = least.into_iter().flat_map(|least| [least, ranks / least]).map(grid);
            let heads =
                [Fused, Naive, Gathered].map(|schedule| (ParallelStrategy::Heads, schedule));
            let sequence = [Local, Fused].map(|schedule| (ParallelStrategy::Sequence, schedule));
            for (strategy, schedule) in heads.into_iter().chain(sequence).chain(grids) {
                for experts in [ExpertSplit::Inside, ExpertSplit::Ranks] {
                    if experts == ExpertSplit::Ranks
                        && (self.config.moe.is_none() || schedule != Fused)
                    {
                        continue;
                    }
                    let options = self.options(strategy, Isa::avx2().unwrap_or(Isa::scalar()));
                    let options = ModelOptions { mlp: Some(schedule), experts, ..options };
                    std::thread::scope(|scope| {
                        for comm in ThreadComm::group(ranks) {
                            scope.spawn(move || self.check_rank(Arc::new(comm), &options));
                        }
                    });
                }
            }
        }
    }

    fn check_rank(&self, comm: Arc<dyn Communicator>, options: &ModelOptions) {
        let label = format!(
            "{}/{} heads, {:?} weights, rank {} of {}, {} {}, experts {}",
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.weights,
            comm.rank(),
            comm.size(),
            options.strategy,
            options.schedule(),
            options.experts
        );
        let model =
            Model::load(&ModelSource::open(&self.dir).expect("a model"), comm, options, &|_| ())
                .unwrap_or_else(|e| panic!("{label}: {e}"));
        self.check_shares(&model, &label);
        let tolerance = if model.weight_format().is_quantized() { QUANTIZED } else { TOLERANCE };
        for pieces in [&[usize::MAX][..], &[1, 14, 2, usize::MAX]] {
            let (logits, greedy) = run(&model, &self.prompt, pieces);
            assert_eq!(
                greedy, self.greedy,
                "{label}, in pieces of {pieces:?}: greedy continuation"
            );
            assert_eq!(logits.len(), self.logits.len(), "{label}");
            let largest = self.logits.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            let off =
                logits.iter().zip(&self.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(
                off <= tolerance * largest,
                "{label}, in pieces of {pieces:?}: off by {off} of {largest}"
            );
            assert!(logits.iter().all(|logit| logit.is_finite()), "{label}");
        }
    }

    /// Weights, heads and vocabulary are those planned.
    fn check_shares(&self, model: &Model, label: &str) {
        let (comm, options, config) = (model.comm(), model.options(), &self.config);
        let (rank, ranks) = (comm.rank(), comm.size());
        let formats =
            WeightFormats::read(config, &Checkpoint::open(&self.dir).unwrap(), self.weights)
                .unwrap();
        let shape = ModelShape::new(config, &formats, options.division(), ranks, rank);
        assert_eq!(model.weight_bytes(), shape.weight_bytes(), "{label}: bytes of weights");

        let (tp, _) = options.strategy.grid(ranks);
        let heads = HeadPlan::new(config, tp, rank % tp);
        let mut cache = Sequence::new(model, 1).expect("memory");
        let logits = cache.forward(model, &[1], LogitRows::Last).unwrap();
        assert_eq!(
            logits.vocab,
            split_range(config.vocab_size, ranks, rank),
            "{label}: vocabulary"
        );

        // Position 0 is kept by the first row of the grid; its KV heads are those that `plan`
        // states for all.
        let kept = cache.bytes() / self.head_bytes;
        assert_eq!(kept, if rank < tp { heads.kv_heads.len() } else { 0 }, "{label}: KV heads");
        let all = comm.all_gather_one(kept).unwrap();
        let stated = (0..tp).map(|rank| HeadPlan::new(config, tp, rank).kv_heads.len());
        assert_eq!(all[..tp], stated.collect::<Vec<_>>(), "{label}: KV heads of all ranks");
    }
}

/// The logits of the prompt, run in pieces of the given sizes, and of the greedy tokens after it;
/// and these.
fn run(model: &Model, prompt: &[u32], pieces: &[usize]) -> (Vec<f32>, Vec<u32>) {
    let mut cache = Sequence::new(model, prompt.len() + DECODED).expect("memory");
    let vocab_size = model.config().vocab_size;
    let mut sampler = Sampler::new(vocab_size, model.comm().clone(), model.options().isa);
    let greedy = SamplingParams::default();
    let (mut logits, mut sequence, mut rest) = (Vec::new(), prompt.to_vec(), prompt);
    let mut pass = |tokens: &[u32]| {
        let own = cache.forward(model, tokens, LogitRows::All).unwrap();
        logits.extend_from_slice(model.gather_logits(&own).unwrap().as_slice().unwrap());
        own
    };
    let mut last = None;
    for size in pieces {
        let (piece, tail) = rest.split_at((*size).min(rest.len()));
        last = Some(pass(piece));
        rest = tail;
    }
    for step in 0..DECODED {
        let own = last.expect("the prompt is not empty");
        let row = SampleRow {
            row: own.values.nrows() - 1,
            params: &greedy,
            prompt,
            generated: &sequence[prompt.len()..],
            step: step as u64,
            mask: None,
            forced: None,
        };
        let next = sampler.sample_rows(&own, &[row]).unwrap()[0].as_ref().unwrap().id;
        sequence.push(next);
        last = Some(pass(&[next]));
    }
    (logits, sequence.split_off(prompt.len()))
}

/// Random weights that let a layer change what passes through it by about as much as there is, in
/// the given formats by turns.
fn write_checkpoint(dir: &Path, value: &Value, formats: &[WeightFormat]) {
    std::fs::write(dir.join("config.json"), value.to_string()).unwrap();
    let config = Config::read(&ModelSource::open(dir).expect("a model")).unwrap();
    let specs: Vec<_> = tensor_specs(&config).collect();
    let stored = specs.iter().zip(formats.iter().cycle()).map(|(spec, format)| TensorSpec {
        name: spec.name.clone(),
        format: *format,
        shape: spec.shape.clone(),
    });
    let mut file =
        CheckpointWriter::create(dir.join("model.safetensors"), &stored.collect::<Vec<_>>(), &[])
            .unwrap();
    let mut rng = StdRng::seed_from_u64(11);
    for spec in &specs {
        let inputs = spec.shape[spec.shape.len() - 1] as f32;
        let values: Vec<f32> = match spec.role {
            TensorRole::Norm => (0..spec.elements()).map(|_| rng.random_range(0.5..1.5)).collect(),
            _ => {
                (0..spec.elements()).map(|_| rng.random_range(-1.7..1.7) / inputs.sqrt()).collect()
            }
        };
        file.write(&spec.name, &values).unwrap();
    }
    file.finish().unwrap();
}

#[test]
fn kv_heads_2() {
    // Fewer query heads than 7 ranks; fewer columns and vocabulary rows than 16.
    Case::new(&config(6, 2, 11, 13), None).check();
}

#[test]
fn kv_heads_3() {
    Case::new(&config(9, 3, 40, 50), None).check();
}

#[test]
fn kv_heads_8() {
    Case::new(&config(16, 8, 40, 50), None).check();
}

#[test]
fn kv_heads_16() {
    Case::new(&config(16, 16, 40, 50), None).check();
}

#[test]
fn experts() {
    Case::new(&sparse(5, 11), None).check();
}

/// 7 groups of columns, the last one short: none for some of 12 and 16 ranks.
#[test]
fn quantized() {
    for format in [WeightFormat::Q8, WeightFormat::Q4] {
        Case::new(&config(8, 2, 6 * 32 + 8, 50), Some(format)).check();
        Case::new(&sparse(5, 3 * 32), Some(format)).check();
    }
    Case::quantized(&sparse(6, 2 * 32), WeightFormat::Q8).check();
}

/// Tensors that are packed or multiplied together may be stored in different formats; none may lose
/// anything.
#[test]
fn mixed_formats() {
    use WeightFormat::{Bf16, F16, F32};
    for value in [config(6, 3, 40, 50), sparse(5, 11)] {
        for formats in [&[F16, F32][..], &[Bf16, F16, F32], &[F16, F16, F16, Bf16]] {
            let folder = tempfile::tempdir().unwrap();
            write_checkpoint(folder.path(), &value, formats);
            let dir = folder.path().to_owned();
            let mut case = Case::of(folder, dir, None);
            case.check();
            let stored = std::mem::take(&mut case.logits);
            let whole = case.load(Some(F32));
            assert_eq!(
                stored,
                run(&whole, &case.prompt, &[usize::MAX]).0,
                "{formats:?} against f32"
            );
        }
    }
}

/// Between machines keys and values of long passes go round the ranks; here also after earlier
/// passes, and in uneven blocks.
#[test]
fn long_prompts_on_several_machines() {
    let mut case = Case::new(&config(4, 2, 40, 50), None);
    case.prompt = (0..1637).map(|index| (index * index + 3 * index) % 50).collect();
    let model = Model::load(
        &ModelSource::open(&case.dir).expect("a model"),
        Arc::new(SoloComm::new()),
        &case.options(ParallelStrategy::Heads, Isa::scalar()),
        &|_| (),
    );
    (case.logits, case.greedy) = run(&model.unwrap(), &case.prompt, &[usize::MAX]);
    let link = Link { latency: 0.0, bandwidth: f64::INFINITY };
    let grid = ParallelStrategy::Grid { tp: 2, sp: 2 };
    let sequence = ParallelStrategy::Sequence;
    for (ranks, machines, strategy) in
        [(2, 2, sequence), (3, 2, sequence), (3, 3, sequence), (4, 2, grid)]
    {
        for attention in [AttentionAlgorithm::Streaming, AttentionAlgorithm::Materialized] {
            let options = case.options(strategy, Isa::avx2().unwrap_or(Isa::scalar()));
            let options = ModelOptions { attention, threads: 1 + ranks % 2, ..options };
            std::thread::scope(|scope| {
                for comm in ThreadComm::group(ranks) {
                    let comm = EmulatedComm::new(Arc::new(comm), link, machines).unwrap();
                    let case = &case;
                    scope.spawn(move || case.check_rank(Arc::new(comm), &options));
                }
            });
        }
    }
}

#[test]
fn whole_experts_are_refused_where_they_have_no_meaning() {
    let (dense, mixture) =
        (Case::new(&config(6, 2, 11, 13), None), Case::new(&sparse(5, 11), None));
    let error = |case: &Case, mlp| {
        let options =
            ModelOptions { experts: ExpertSplit::Ranks, mlp, ..ModelOptions::new(Isa::scalar()) };
        let loaded = Model::load(
            &ModelSource::open(&case.dir).expect("a model"),
            Arc::new(SoloComm::new()),
            &options,
            &|_| (),
        );
        loaded.err().expect("no such model").to_string()
    };
    let found = error(&dense, None);
    assert!(
        found.contains("config.json: found a dense model, expected a mixture of experts"),
        "{found}"
    );
    for schedule in [MlpSchedule::Naive, MlpSchedule::Gathered, MlpSchedule::Local] {
        let found = error(&mixture, Some(schedule));
        assert_eq!(
            found,
            format!(
                "whole experts on ranks need the feed-forward schedule fused, found {schedule}"
            )
        );
    }
}
