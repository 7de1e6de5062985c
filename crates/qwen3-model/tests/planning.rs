//! The plan: memory as loaded, traffic as counted, and recommendations that make sense.

mod cases;

use std::sync::Arc;

use qwen3_model::comm::{Communicator as _, ThreadComm, WireFormat};
use qwen3_model::{
    Checkpoint, Config, Division, ExpertSplit, HiddenSums, Isa, KvFormat, LinkFigures, LogitRows,
    Machine, MlpSchedule, Model, ModelOptions, ParallelStrategy, Plan, PlanInput, Preset, Rate,
    SynthOptions, TensorRole, TensorSpec, TrafficModel, WeightFormat, WeightFormats, plan,
    synthesize, tensor_specs,
};

#[test]
fn memory_is_what_loading_takes() {
    for case in cases::CASES {
        let dir = cases::folder(case);
        let config = Config::read(&dir).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        for (weights, ranks) in
            [None, Some(WeightFormat::Q8)].into_iter().flat_map(|w| (1..=5).map(move |r| (w, r)))
        {
            let formats = WeightFormats::read(&config, &checkpoint, weights).unwrap();
            let grids = (2..ranks)
                .filter(|tp| ranks % tp == 0)
                .map(|tp| ParallelStrategy::Grid { tp, sp: ranks / tp });
            for strategy in
                [ParallelStrategy::Heads, ParallelStrategy::Sequence].into_iter().chain(grids)
            {
                let whole =
                    config.moe.is_some().then_some((MlpSchedule::Fused, ExpertSplit::Ranks));
                let inside = [
                    MlpSchedule::Fused,
                    MlpSchedule::Naive,
                    MlpSchedule::Gathered,
                    MlpSchedule::Local,
                ]
                .map(|mlp| (mlp, ExpertSplit::Inside));
                for (mlp, experts) in inside.into_iter().chain(whole) {
                    let options = ModelOptions {
                        strategy,
                        mlp: Some(mlp),
                        experts,
                        weights,
                        ..ModelOptions::new(Isa::scalar())
                    };
                    std::thread::scope(|scope| {
                        for (rank, comm) in ThreadComm::group(ranks).into_iter().enumerate() {
                            let (dir, formats, config) = (&dir, &formats, &config);
                            scope.spawn(move || {
                                let model = Model::load(dir, Arc::new(comm), &options, &|_| ()).unwrap();
                                let planned = formats.bytes(config, options.division(), ranks, rank);
                                let label =
                                    format!("{case}, {weights:?}, rank {rank} of {ranks}, {strategy} {mlp} {experts}");
                                assert_eq!(planned, model.weight_bytes(), "{label}");
                            });
                        }
                    });
                }
            }
        }
    }
}

/// The shape of Qwen3-0.6B with two layers.
fn shape() -> (tempfile::TempDir, Config, WeightFormats) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    synthesize(&path, &SynthOptions { preset: Preset::Tiny, layers: None, seed: 1 }, &mut |_| ())
        .unwrap();
    let tiny = Config::read(&path).unwrap();
    let formats = WeightFormats::read(&tiny, &Checkpoint::open(&path).unwrap(), None).unwrap();
    (dir, tiny, formats)
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
    for (_dir, config, weights) in [shape(), mixture()] {
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
            let division = Division {
                strategy: ParallelStrategy::Heads,
                schedule: MlpSchedule::Fused,
                experts,
            };
            let held: usize =
                (0..ranks).map(|rank| weights.bytes(&config, division, ranks, rank)).sum();
            assert_eq!(held, matrices + head + ranks * routers, "{ranks} ranks, experts {experts}");
        }
    }
}

#[test]
fn calls_and_bytes_are_those_of_the_traffic_model() {
    let (_dir, config, weights) = shape();
    for ranks in 1..=6 {
        let machine = Machine::typical(ranks, 1, 1);
        for way in run(&config, &weights, &machine, |_| ()).ways {
            let of = |tokens, past| {
                let (mut calls, mut bytes) = (0, 0);
                for rank in 0..ranks {
                    let model = TrafficModel {
                        config: &config,
                        ranks,
                        nodes: 1,
                        rank,
                        strategy: way.strategy,
                        schedule: way.schedule,
                        granularity: 1,
                        kv: KvFormat::F16,
                        overlap: 0,
                    };
                    let traffic = model.forward(tokens, past, LogitRows::Last);
                    calls = calls.max(traffic.iter().map(|entry| entry.calls).sum());
                    bytes = bytes.max(traffic.iter().map(|entry| entry.payload_bytes).sum());
                }
                // The candidates for the next token.
                if ranks > 1 { (calls + 1, bytes + 8 * ranks as u64) } else { (calls, bytes) }
            };
            let label = format!("{ranks} ranks, {} {}", way.strategy, way.schedule);
            assert_eq!((way.prompt.calls, way.prompt.bytes), of(64, 0), "{label}");
            assert_eq!((way.token.calls, way.token.bytes), of(1, 96), "{label}");
            assert_eq!((way.weight_bytes.len(), way.kv_bytes.len()), (ranks, ranks), "{label}");
        }
    }
}

#[test]
fn bytes_of_chunks_on_a_shorter_wire_are_those_of_the_ledger() {
    let (dir, config, weights) = shape();
    let dir = dir.path().join("model");
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
                let model = Model::load(&dir, Arc::new(comm), &options, &|_| ()).unwrap();
                let mut cache = model.new_cache(prompt);
                let ledger = model.comm().ledger();
                ledger.reset();
                let passes: Vec<_> = [3; 64].chunks(model.pass_tokens(chunk)).collect();
                for (i, tokens) in passes.iter().enumerate() {
                    let rows =
                        if i + 1 == passes.len() { LogitRows::Last } else { LogitRows::None };
                    model.forward(&mut cache, tokens, rows).unwrap();
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
    let (_dir, config, weights) = shape();
    // Twice or four times as many are 0 to whoever multiplies without care, and of passes of
    // nothing there is no end.
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
    let (_dir, config, weights) = shape();
    let mut machine = Machine::typical(4, 4, 1);
    let best = |plan: Plan| plan.ways[plan.best].clone();
    // Reading a few hundred kilobytes is nothing against 2 collectives a layer of 2 * 40 us: one a
    // layer is better.
    machine.between = LinkFigures { alpha_us: 40.0, beta_gb_s: 0.117 };
    assert_eq!(best(run(&config, &weights, &machine, |_| ())).strategy, ParallelStrategy::Sequence);
    // Memory that slow makes the split of the weights worth any collective.
    machine.rates[0].read_gb_s = 1e-4;
    let slow = best(run(&config, &weights, &machine, |_| ()));
    assert_eq!((slow.strategy, slow.schedule), (ParallelStrategy::Heads, MlpSchedule::Fused));
    // What the user fixed stays.
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
fn sums_behind_work_take_from_it_and_the_rest_is_waited_for() {
    let (_dir, config, weights) = shape();
    let link = |ms: f64| LinkFigures { alpha_us: ms * 1e3, beta_gb_s: 1e6 };
    // A prompt of 256 goes in halves: each layer has 4 sums of one message each way, of any size 1,
    // 2 and 0.5 ms.
    let mut machine = Machine::typical(2, 2, 1);
    machine.between = link(1.0);
    machine.hidden = HiddenSums { link: link(2.0), taken: link(0.5) };
    let prompt = |machine: &Machine| {
        run(&config, &weights, machine, |input| input.prompt = 256).ways[0].prompt
    };
    let sums = 4.0 * config.num_hidden_layers as f64 * 1e-3;
    let near = |found: f64, expected: f64| {
        assert!((found / expected - 1.0).abs() < 1e-3, "{found}, not {expected}")
    };
    // Work without end hides all of them but the last.
    machine.rates[0].gflops = 1e-3;
    let long = prompt(&machine);
    let last = 2.0 * sums / long.calls as f64 + 1e-3;
    near(long.collective_seconds, last);
    machine.hidden.taken = link(1.0);
    near(prompt(&machine).work_seconds - long.work_seconds, 0.5 * sums);
    // Work of half of what they take behind it, less what they take from it, hides half of them.
    machine.hidden.taken = link(1e-6);
    let alone = prompt(&machine).work_seconds;
    let share = 0.5 * 2.0 * sums / alone;
    machine.rates[0] = scaled(&machine.rates[0], 1.0 / share);
    machine.attention[0].start_us = 0.0;
    machine.attention[0].gflops = 1e9;
    machine.attention[0].read_gb_s = 1e9;
    let half = prompt(&machine);
    let hidden = half.work_seconds / (2.0 * sums);
    assert!((0.45..0.55).contains(&hidden), "{hidden}");
    near(half.collective_seconds, (1.0 - hidden) * sums + last);
}

#[test]
fn keys_that_go_round_take_from_attention_and_the_rest_is_waited_for() {
    let (_dir, config, weights) = shape();
    let link = |ms: f64| LinkFigures { alpha_us: ms * 1e3, beta_gb_s: 1e6 };
    // A prompt of 1024 in one pass: in each layer one block of keys goes round.
    let mut machine = Machine::typical(2, 2, 1);
    machine.between = link(1.0);
    machine.hidden = HiddenSums { link: link(2.0), taken: link(1e-6) };
    let prompt = |machine: &Machine| {
        let ways = run(&config, &weights, machine, |input| input.prompt = 1024).ways;
        ways.into_iter()
            .find(|way| way.strategy == ParallelStrategy::Sequence)
            .expect("it is listed")
            .prompt
    };
    let blocks = config.num_hidden_layers as f64 * 1e-3;
    // Attention without end hides them all: they cost what they take from it, and nothing is waited
    // for but the last row and the token.
    machine.attention[0].gflops = 1e-3;
    let long = prompt(&machine);
    machine.hidden.taken = link(0.5);
    let more = prompt(&machine);
    let near = |found: f64, expected: f64| {
        assert!((found / expected - 1.0).abs() < 1e-3, "{found}, not {expected}")
    };
    near(more.work_seconds - long.work_seconds, 0.5 * blocks);
    assert_eq!(more.collective_seconds, long.collective_seconds);
    // Attention in no time hides none.
    machine.attention[0].start_us = 0.0;
    machine.attention[0].gflops = 1e12;
    machine.attention[0].read_gb_s = 1e12;
    near(prompt(&machine).collective_seconds - more.collective_seconds, blocks);
}

/// A rate with so many times the speed.
fn scaled(rate: &Rate, times: f64) -> Rate {
    let Rate { format, start_us, read_gb_s, few_gb_s, gflops } = rate.clone();
    Rate {
        format,
        start_us: start_us / times,
        read_gb_s: read_gb_s * times,
        few_gb_s: few_gb_s * times,
        gflops: gflops * times,
    }
}

/// A small mixture.
fn mixture() -> (tempfile::TempDir, Config, WeightFormats) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    synthesize(
        &path,
        &SynthOptions { preset: Preset::TinyMoe, layers: None, seed: 1 },
        &mut |_| (),
    )
    .unwrap();
    let config = Config::read(&path).unwrap();
    let formats = WeightFormats::read(&config, &Checkpoint::open(&path).unwrap(), None).unwrap();
    (dir, config, formats)
}

#[test]
fn whole_experts_cost_tokens_and_save_prompts() {
    let (_dir, config, weights) = mixture();
    // Memory so slow that a token is reading, and arithmetic so slow that a prompt is that.
    let mut machine = Machine::typical(4, 1, 1);
    machine.rates[0].read_gb_s = 0.01;
    machine.rates[0].gflops = 0.1;
    machine.rates[0].start_us = 0.0;
    let plan = run(&config, &weights, &machine, |input| input.prompt = 512);
    let way = |experts| {
        let division =
            Division { strategy: ParallelStrategy::Heads, schedule: MlpSchedule::Fused, experts };
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
    assert!(own < 0.9 * share, "{own} against {share} seconds");
    assert_eq!((whole.token.calls, whole.token.bytes), (inside.token.calls, inside.token.bytes));
    // Given, nothing else is listed; under a schedule without such a form it is not.
    let given = run(&config, &weights, &machine, |input| input.experts = Some(ExpertSplit::Ranks));
    assert!(given.ways.iter().all(|way| way.experts == ExpertSplit::Ranks));
    let naive = run(&config, &weights, &machine, |input| input.schedule = Some(MlpSchedule::Naive));
    assert!(naive.ways.iter().all(|way| way.experts == ExpertSplit::Inside));
}
