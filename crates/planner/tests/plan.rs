//! The plan: memory and traffic as stated, imbalance, and recommendations that make sense.

use std::path::Path;
use std::sync::Arc;

use planner::{Imbalance, LinkFigures, Machine, Plan, PlanInput, plan};
use qwen3_model::ModelSource;
use qwen3_model::comm::{Communicator as _, ThreadComm, WireFormat};
use qwen3_model::formats::WeightFormats;
use qwen3_model::names::{TensorRole, TensorSpec, tensor_specs};
use qwen3_model::options::{Division, ExpertSplit, KvFormat, MlpSchedule};
use qwen3_model::presets::Preset;
use qwen3_model::shape::ModelShape;
use qwen3_model::synth::{SynthOptions, synthesize};
use qwen3_model::tensor::WeightFormat;
use qwen3_model::{Config, Isa, LogitRows, Model, ModelOptions, ParallelStrategy, Sequence};
use serde_json::json;

const FUSED: Division = Division {
    strategy: ParallelStrategy::Heads,
    schedule: MlpSchedule::Fused,
    experts: ExpertSplit::Inside,
};

fn preset(preset: Preset) -> (Config, WeightFormats) {
    let config = Config::from_json(Path::new("config.json"), &preset.config(None)).unwrap();
    let formats = WeightFormats::uniform(&config, WeightFormat::Bf16, WeightFormat::Bf16);
    (config, formats)
}

fn run(
    config: &Config,
    weights: &WeightFormats,
    machine: &Machine,
    change: impl FnOnce(&mut PlanInput<'_>),
) -> Plan {
    let base = PlanInput::new(config, weights, machine);
    let mut input = PlanInput { prompt: 64, generate: 64, all_schedules: true, ..base };
    change(&mut input);
    plan(&input)
}

#[test]
fn two_ranks_have_the_matrices_once_and_the_routers_twice() {
    for (config, weights) in [Preset::Tiny, Preset::TinyMoe].map(preset) {
        let layers = |role: TensorRole| {
            let specs = tensor_specs(&config).filter(|spec| spec.name.starts_with("model.layers."));
            specs.filter(move |spec| spec.role == role)
        };
        // Every share of a matrix is whole panels here, in bf16.
        let matrices: usize = layers(TensorRole::Matrix).map(|spec| 2 * spec.elements()).sum();
        let head = 2 * config.head_parameters() as usize;
        let packed =
            |spec: TensorSpec| WeightFormat::Bf16.packed_bytes(spec.shape[0], spec.shape[1]);
        let routers: usize = layers(TensorRole::Router).map(packed).sum();
        for (ranks, experts) in
            [(1, ExpertSplit::Inside), (2, ExpertSplit::Inside), (2, ExpertSplit::Ranks)]
        {
            let division = Division { experts, ..FUSED };
            let shape = |rank| ModelShape::new(&config, &weights, division, ranks, rank);
            let held: usize = (0..ranks).map(|rank| shape(rank).weight_bytes()).sum();
            assert_eq!(held, matrices + head + ranks * routers, "{ranks} ranks, experts {experts}");
        }
    }
}

#[test]
fn bytes_of_chunks_on_a_shorter_wire_are_those_of_the_ledger() {
    let (config, weights) = preset(Preset::Tiny);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    synthesize(&dir, &SynthOptions { preset: Preset::Tiny, layers: None, seed: 1 }, &mut |_| ())
        .unwrap();
    let (prompt, chunk) = (64, 12);
    for ranks in 2..=4 {
        let machine = Machine::typical(ranks, 1, 1);
        let change = |input: &mut PlanInput<'_>| {
            (input.wire, input.prompt, input.chunk) = (WireFormat::Bf16, prompt, chunk)
        };
        for way in run(&config, &weights, &machine, change).ways {
            let options = ModelOptions {
                strategy: way.strategy,
                mlp: Some(way.schedule),
                kv: KvFormat::F16,
                ..ModelOptions::new(Isa::detect())
            };
            let counted = |comm: ThreadComm| {
                comm.set_wire(WireFormat::Bf16);
                let model = Model::load(
                    &ModelSource::open(&dir).expect("a model"),
                    Arc::new(comm),
                    &options,
                    &|_| (),
                )
                .unwrap();
                let mut cache = Sequence::new(&model, prompt).expect("memory");
                let ledger = model.comm().ledger();
                ledger.reset();
                let passes: Vec<_> = [3; 64].chunks(model.pass_tokens(chunk)).collect();
                for (i, tokens) in passes.iter().enumerate() {
                    let rows =
                        if i + 1 == passes.len() { LogitRows::Last } else { LogitRows::None };
                    cache.forward(&model, tokens, rows).unwrap();
                }
                let entries = ledger.entries();
                entries.iter().fold((0, 0), |(calls, bytes), entry| {
                    (calls + entry.calls, bytes + entry.payload_bytes)
                })
            };
            let (calls, bytes) = std::thread::scope(|scope| {
                let ranks: Vec<_> = ThreadComm::group(ranks)
                    .into_iter()
                    .map(|comm| scope.spawn(|| counted(comm)))
                    .collect();
                let counted = ranks.into_iter().map(|rank| rank.join().unwrap());
                counted.fold((0, 0), |most, (calls, bytes)| (most.0.max(calls), most.1.max(bytes)))
            });
            // The candidates for the next token come on top.
            let candidates = 8 * ranks as u64;
            let label = format!("{ranks} ranks, {} {}", way.strategy, way.schedule);
            assert_eq!(
                (way.prompt.calls, way.prompt.bytes),
                (calls + 1, bytes + candidates),
                "{label}"
            );
        }
    }
}

#[test]
fn chunks_beyond_any_prompt_take_it_in_one_pass() {
    let (config, weights) = preset(Preset::Tiny);
    // A multiple of such a chunk overflows; passes of 0 tokens would never end.
    let machine = Machine::typical(4, 1, 1);
    let calls = |chunk| {
        let ways = run(&config, &weights, &machine, |input| input.chunk = chunk).ways;
        ways.iter().map(|way| way.prompt.calls).collect::<Vec<_>>()
    };
    for chunk in [1 << 62, 1 << 63, usize::MAX] {
        assert_eq!(calls(chunk), calls(64), "{chunk}");
    }
}

#[test]
fn recommendations_follow_the_machine() {
    let (config, weights) = preset(Preset::Tiny);
    let mut machine = Machine::typical(4, 4, 1);
    let best = |plan: Plan| plan.ways[plan.best].clone();
    // Two collectives a layer of 2 * 40 us take longer than reading a few hundred kilobytes: one
    // collective a layer is better.
    machine.between = LinkFigures { alpha_us: 40.0, beta_gb_s: 0.117 };
    assert_eq!(best(run(&config, &weights, &machine, |_| ())).strategy, ParallelStrategy::Sequence);
    // Memory that slow makes the split of the weights worth any collective.
    machine.rates[0].read_gb_s = 1e-4;
    let slow = best(run(&config, &weights, &machine, |_| ()));
    assert_eq!((slow.strategy, slow.schedule), (ParallelStrategy::Heads, MlpSchedule::Fused));
    // A given schedule is the only one listed.
    for schedule in [MlpSchedule::Local, MlpSchedule::Naive] {
        let plan = run(&config, &weights, &machine, |input| input.schedule = Some(schedule));
        assert!(plan.ways.iter().all(|way| way.schedule == schedule));
    }
    // A shorter wire costs less on such a link, and one rank nothing.
    let seconds = |wire| {
        best(run(&config, &weights, &machine, |input| input.wire = wire)).token.collective_seconds
    };
    assert!(seconds(WireFormat::Bf16) < seconds(WireFormat::F32));
    let alone = run(&config, &weights, &Machine::typical(1, 1, 2), |_| ());
    assert_eq!(best(alone).token.collective_seconds, 0.0);
}

#[test]
fn sums_of_a_prompt_in_halves_travel_behind_work() {
    let (config, weights) = preset(Preset::Tiny);
    let mut machine = Machine::typical(2, 2, 1);
    // Each sum takes 1 ms.
    machine.between = LinkFigures { alpha_us: 1e3, beta_gb_s: 1e6 };
    let prompt = |machine: &Machine| {
        run(&config, &weights, machine, |input| input.prompt = 256).ways[0].prompt
    };
    let near = |found: f64, expected: f64| {
        assert!((found / expected - 1.0).abs() < 0.01, "{found}, not {expected}")
    };
    // Two halves with two sums a layer. Long work hides all but the last; the choice of the token
    // is one more message. Short work hides as many as it lasts for.
    let sums = 4.0 * config.num_hidden_layers as f64 * 1e-3;
    machine.rates[0].gflops = 1e-3;
    near(prompt(&machine).collective_seconds, 2e-3);
    machine.rates[0] = Machine::typical(2, 2, 1).rates[0].clone();
    let short = prompt(&machine);
    near(short.collective_seconds, sums - short.work_seconds + 1e-3);
}

#[test]
fn keys_that_go_round_travel_behind_attention() {
    let (config, weights) = preset(Preset::Tiny);
    let mut machine = Machine::typical(2, 2, 1);
    machine.between = LinkFigures { alpha_us: 1e3, beta_gb_s: 1e6 };
    let waited = |machine: &Machine| {
        let ways = run(&config, &weights, machine, |input| input.prompt = 1024).ways;
        let way = ways.into_iter().find(|way| way.strategy == ParallelStrategy::Sequence);
        way.expect("it is listed").prompt.collective_seconds
    };
    // One block of keys a layer. Slow attention hides all of them, fast attention none.
    machine.attention[0].gflops = 1e-3;
    let hidden = waited(&machine);
    machine.attention[0] = Machine::typical(2, 2, 1 << 30).attention[0].clone();
    let found = waited(&machine) - hidden;
    let expected = config.num_hidden_layers as f64 * 1e-3;
    assert!((found / expected - 1.0).abs() < 0.01, "{found}, not {expected}");
}

#[test]
fn whole_experts_cost_tokens_and_not_prompts() {
    let (config, weights) = preset(Preset::TinyMoe);
    // Memory so slow that a token is reading, and arithmetic so slow that a prompt is that.
    let mut machine = Machine::typical(4, 1, 1);
    machine.rates[0].read_gb_s = 0.01;
    machine.rates[0].gflops = 0.1;
    machine.rates[0].start_us = 0.0;
    let plan = run(&config, &weights, &machine, |input| input.prompt = 512);
    let way = |experts| {
        let division = Division { experts, ..FUSED };
        plan.ways.iter().find(|way| way.division() == division).expect("it is listed")
    };
    let (inside, whole) = (way(ExpertSplit::Inside), way(ExpertSplit::Ranks));
    // 8 experts of 64 columns: 4 ranks have 16 columns of each or 2 of them, and a token visits 2.
    // Of the 28 sets of 2 experts 4 are on one rank: 2 · 4/28 + 1 · 24/28 experts of 64 columns
    // instead of 2 of 16.
    assert_eq!(inside.weight_bytes, whole.weight_bytes);
    let (own, share) = (whole.token.work_seconds, inside.token.work_seconds);
    assert!(own > 1.1 * share && own < 2.3 * share, "{own} against {share} seconds");
    let (own, share) = (whole.prompt.work_seconds, inside.prompt.work_seconds);
    assert!((own / share - 1.0).abs() < 1e-6, "{own} against {share} seconds");
    assert_eq!((whole.token.calls, whole.token.bytes), (inside.token.calls, inside.token.bytes));
    // Given, nothing else is listed; under a schedule without such a form it is not.
    let given = run(&config, &weights, &machine, |input| input.experts = Some(ExpertSplit::Ranks));
    assert!(given.ways.iter().all(|way| way.experts == ExpertSplit::Ranks));
    let naive = run(&config, &weights, &machine, |input| input.schedule = Some(MlpSchedule::Naive));
    assert!(naive.ways.iter().all(|way| way.experts == ExpertSplit::Inside));
}

fn imbalance(config: &Config, division: Division, ranks: usize, granularity: usize) -> Imbalance {
    let format = if granularity == 32 { WeightFormat::Q8 } else { WeightFormat::F32 };
    let formats = WeightFormats::uniform(config, format, WeightFormat::F32);
    let shape = |rank| ModelShape::new(config, &formats, division, ranks, rank);
    Imbalance::new(config, division, &(0..ranks).map(shape).collect::<Vec<_>>())
}

#[test]
fn whole_experts_on_ranks() {
    let value = json!({
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 100, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4
    });
    let config = Config::from_json(Path::new("config.json"), &value).unwrap();
    let split = |experts| imbalance(&config, Division { experts, ..FUSED }, 2, 32).columns;
    // 40 columns are a group of 32 and a short one; 5 experts are 3 and 2.
    assert_eq!(
        (
            split(ExpertSplit::Inside).most,
            split(ExpertSplit::Inside).least,
            split(ExpertSplit::Inside).total
        ),
        (5 * 32, 5 * 8, 5 * 40)
    );
    assert_eq!((split(ExpertSplit::Ranks).most, split(ExpertSplit::Ranks).least), (3 * 40, 2 * 40));
}

#[test]
fn imbalance_is_the_largest_share_over_an_equal_one() {
    let value = json!({
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 200,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 16, "vocab_size": 331, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4
    });
    let config = Config::from_json(Path::new("config.json"), &value).unwrap();
    let even = imbalance(&config, FUSED, 4, 1);
    assert_eq!(
        (even.query_heads.imbalance(), even.kv_heads.imbalance(), even.columns.imbalance()),
        (1.0, 1.0, 1.0)
    );
    assert_eq!((even.vocabulary.most, even.vocabulary.least), (83, 82));
    let uneven = imbalance(&config, FUSED, 12, 32);
    assert_eq!((uneven.query_heads.most, uneven.query_heads.least), (2, 1));
    assert_eq!(uneven.query_heads.imbalance(), 1.5);
    // 16 heads on 12 ranks: 8 of the ranks share their KV head with a neighbour.
    assert_eq!((uneven.kv_heads.sum, uneven.kv_heads.total), (12, 8));
    // 7 granules of 32 columns: one each for 7 ranks, none for 5.
    assert_eq!((uneven.columns.most, uneven.columns.least), (32, 0));

    // Ranks that split positions divide the feed-forward blocks as well, or each computes whole
    // blocks for its positions. Ranks that split only heads compute whole blocks for the same
    // positions.
    let columns = |strategy, schedule| {
        let columns = imbalance(&config, Division { strategy, schedule, ..FUSED }, 4, 32).columns;
        (columns.most, columns.least, columns.sum, columns.imbalance())
    };
    let (sequence, grid) = (ParallelStrategy::Sequence, ParallelStrategy::Grid { tp: 2, sp: 2 });
    assert_eq!(columns(sequence, MlpSchedule::Fused), (64, 8, 200, 64.0 * 4.0 / 200.0));
    assert_eq!(columns(sequence, MlpSchedule::Local), (200, 200, 200, 1.0));
    assert_eq!(columns(grid, MlpSchedule::Fused), (128, 72, 200, 1.28));
    assert_eq!(columns(ParallelStrategy::Heads, MlpSchedule::Local), (200, 200, 800, 4.0));
}
