//! The collectives that operations state, against figures worked out by hand and against what the
//! ledger counts.

mod traffic;

use std::path::Path;
use std::sync::Arc;

use comm::{Collective, EmulatedComm, Link, ThreadComm};
use qwen3_model::ModelSource;
use qwen3_model::options::{Division, ExpertSplit, KvFormat, MlpSchedule, WeightFormat};
use qwen3_model::presets::Preset;
use qwen3_model::synth::{SynthOptions, synthesize};
use qwen3_model::{Config, Isa, LogitRows, Model, ModelOptions, ParallelStrategy, Sequence};
use serde_json::json;
use traffic::{Statement, Traffic};

fn config(hidden: usize, columns: usize, layers: usize) -> Config {
    let value = json!({
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": columns, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 1000,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 1e4
    });
    Config::from_json(Path::new("config.json"), &value).expect("a valid configuration")
}

fn sparse() -> Config {
    let value = json!({
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100, "num_experts": 5,
        "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [1],
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4
    });
    Config::from_json(Path::new("config.json"), &value).expect("a valid configuration")
}

fn model(
    config: &Config,
    ranks: usize,
    strategy: ParallelStrategy,
    schedule: MlpSchedule,
) -> Statement<'_> {
    Statement {
        config,
        ranks,
        nodes: 1,
        rank: 0,
        division: Division { strategy, schedule, experts: ExpertSplit::Inside },
        weights: WeightFormat::F32,
        kv: KvFormat::F32,
        overlap: 0,
    }
}

fn entry(collective: Collective, calls: u64, payload_bytes: u64) -> Traffic {
    Traffic { collective, calls, payload_bytes }
}

#[test]
fn heads() {
    use Collective::{Allgather, Allgatherv, Allreduce};
    let config = config(1024, 2048, 28);
    let forward = |ranks, schedule| {
        model(&config, ranks, ParallelStrategy::Heads, schedule).forward(128, 9, LogitRows::All)
    };
    let (hidden, inner) = (128 * 1024 * 4, 128 * 2048 * 4);
    assert_eq!(forward(2, MlpSchedule::Fused), [entry(Allreduce, 56, 56 * hidden)]);
    assert_eq!(forward(2, MlpSchedule::Local), [entry(Allreduce, 28, 28 * hidden)]);
    let naive = [entry(Allreduce, 56, 56 * hidden), entry(Allgatherv, 56, 56 * inner)];
    assert_eq!(forward(2, MlpSchedule::Naive), naive);
    let gathered =
        [entry(Allreduce, 28, 28 * hidden), entry(Allgather, 112, 28 * (3 * inner + hidden))];
    assert_eq!(forward(2, MlpSchedule::Gathered), gathered);
    // 2048 and 1024 columns do not divide by 3.
    let uneven =
        [entry(Allreduce, 28, 28 * hidden), entry(Allgatherv, 112, 28 * (3 * inner + hidden))];
    assert_eq!(forward(3, MlpSchedule::Gathered), uneven);
    assert_eq!(forward(1, MlpSchedule::Fused), []);
}

#[test]
fn halves() {
    use Collective::{Allgatherv, Allreduce};
    let config = config(1024, 3072, 28);
    let traffic = |schedule, tokens| {
        let base = model(&config, 3, ParallelStrategy::Heads, schedule);
        Statement { nodes: 2, overlap: 128, ..base }.forward(tokens, 0, LogitRows::Last)
    };
    // Two calls for one, and the same bytes, also of an odd number of tokens.
    assert_eq!(traffic(MlpSchedule::Fused, 129), [entry(Allreduce, 112, 56 * 129 * 4096)]);
    assert_eq!(traffic(MlpSchedule::Fused, 127), [entry(Allreduce, 56, 56 * 127 * 4096)]);
    assert_eq!(traffic(MlpSchedule::Fused, 1), [entry(Allreduce, 56, 56 * 4096)]);
    let naive = [entry(Allreduce, 56, 56 * 512 * 4096), entry(Allgatherv, 56, 56 * 512 * 3072 * 4)];
    assert_eq!(traffic(MlpSchedule::Naive, 512), naive);
    // Two of five experts a token: 320 tokens are 128 to an expert.
    let sparse = sparse();
    let calls = |tokens| {
        let base = model(&sparse, 2, ParallelStrategy::Heads, MlpSchedule::Fused);
        Statement { nodes: 2, overlap: 128, ..base }.forward(tokens, 0, LogitRows::None)[0].calls
    };
    assert_eq!((calls(319), calls(320)), (6, 12));
    let grid = model(&config, 4, ParallelStrategy::Grid { tp: 2, sp: 2 }, MlpSchedule::Fused);
    let halved = Statement { nodes: 2, overlap: 128, ..grid }.forward(512, 0, LogitRows::Last);
    assert_eq!(halved, grid.forward(512, 0, LogitRows::Last));
}

#[test]
fn one_decoded_token_of_the_smallest_published_model() {
    let config = config(1024, 3072, 28);
    let found = model(&config, 2, ParallelStrategy::Heads, MlpSchedule::Fused).forward(
        1,
        500,
        LogitRows::Last,
    );
    assert_eq!(found, [entry(Collective::Allreduce, 56, 2 * 28 * 4096)]);
}

#[test]
fn groups_are_not_cut() {
    use Collective::{Allgather, Allgatherv, Allreduce};
    // 96 columns divide by 2, 3 groups of 32 do not; the hidden columns are not grouped.
    let config = config(64, 96, 1);
    let base = model(&config, 2, ParallelStrategy::Heads, MlpSchedule::Gathered);
    let found = Statement { weights: WeightFormat::Q8, ..base }.forward(1, 0, LogitRows::Last);
    let expected =
        [entry(Allreduce, 1, 256), entry(Allgather, 1, 256), entry(Allgatherv, 3, 3 * 96 * 4)];
    assert_eq!(found, expected);
}

#[test]
fn a_row_for_each_visit_to_an_expert() {
    use Collective::{Allgather, Allgatherv, Allreduce};
    let config = sparse();
    let forward = |schedule| {
        model(&config, 2, ParallelStrategy::Heads, schedule).forward(7, 0, LogitRows::None)
    };
    let hidden = 7 * 64 * 4;
    // Two sparse layers, each token in 2 experts of 40 columns; one dense layer of 96 columns.
    let inner = (2 * 7 * 2 * 40 + 7 * 96) * 4;
    assert_eq!(forward(MlpSchedule::Fused), [entry(Allreduce, 6, 6 * hidden)]);
    let naive = [entry(Allreduce, 6, 6 * hidden), entry(Allgatherv, 6, 2 * inner)];
    assert_eq!(forward(MlpSchedule::Naive), naive);
    let gathered = [entry(Allreduce, 3, 3 * hidden), entry(Allgather, 12, 3 * inner + 3 * hidden)];
    assert_eq!(forward(MlpSchedule::Gathered), gathered);
}

#[test]
fn sequence() {
    use Collective::{Allgather, Allgatherv, Allreduce, Broadcast, ReduceScatter};
    let config = config(1024, 3072, 2);
    let base = model(&config, 4, ParallelStrategy::Sequence, MlpSchedule::Local);
    // Prefill from the start: keys and values of the pass, and the last token's row for the head.
    let found = base.forward(64, 0, LogitRows::Last);
    assert_eq!(found, [entry(Allgatherv, 2, 2 * 64 * 2048 * 4), entry(Broadcast, 1, 4096)]);
    // A later chunk meets the cache: queries out, maxima, sums and accumulators back.
    let found = base.forward(64, 64, LogitRows::None);
    let expected = [
        entry(Allreduce, 4, 2 * 64 * 2 * 16 * 4),
        entry(Allgatherv, 4, 2 * 64 * (2048 + 2048) * 4),
        entry(ReduceScatter, 2, 2 * 64 * 2048 * 4),
    ];
    assert_eq!(found, expected);
    // Between machines keys and values of a long pass go round: 3 of 4 blocks leave a rank, and 3
    // arrive.
    use Collective::{Recv, Send};
    let apart = Statement { nodes: 2, ..base };
    let bytes = |tokens: u64| 2 * tokens * 2048 * 4;
    let three = bytes(3 * 512);
    assert_eq!(
        apart.forward(2048, 0, LogitRows::None),
        [entry(Send, 6, three), entry(Recv, 6, three)]
    );
    assert_eq!(apart.forward(2047, 0, LogitRows::None), [entry(Allgatherv, 2, bytes(2047))]);
    // 2049 tokens are 8 chunks, of which rank 0's first is one longer: that one does not come to
    // rank 0 and does not leave rank 3.
    let of = |rank| Statement { rank, ..apart }.forward(2049, 0, LogitRows::None);
    assert_eq!(of(0), [entry(Send, 6, three + bytes(1)), entry(Recv, 6, three)]);
    assert_eq!(of(3), [entry(Send, 6, three), entry(Recv, 6, three + bytes(1))]);
    // A cache in half precision: half the bytes, but not within a machine.
    let halves = |nodes, tokens| {
        Statement { kv: KvFormat::F16, nodes, ..base }.forward(tokens, 0, LogitRows::None)
    };
    assert_eq!(halves(2, 2048), [entry(Send, 6, three / 2), entry(Recv, 6, three / 2)]);
    assert_eq!(halves(2, 2047), [entry(Allgatherv, 2, bytes(2047) / 2)]);
    assert_eq!(halves(1, 2047), [entry(Allgatherv, 2, bytes(2047))]);
    // Decode: every rank has the token and its own keys.
    assert_eq!(
        base.forward(1, 64, LogitRows::Last),
        [entry(Allgather, 2, 2 * 4 * (32 + 2048) * 4)]
    );
    // Split weights: tokens are gathered, results scattered.
    let found = {
        let division = Division { schedule: MlpSchedule::Fused, ..base.division };
        Statement { division, ..base }.forward(64, 0, LogitRows::All)
    };
    let (hidden, keys) = (64 * 1024 * 4, 64 * 2048 * 4);
    assert_eq!(
        found,
        [entry(Allgatherv, 5, 2 * keys + 3 * hidden), entry(ReduceScatter, 2, 2 * hidden)]
    );
}

/// What each rank makes of its part of the model.
fn on_ranks<T: Send>(
    dir: &Path,
    (ranks, nodes): (usize, usize),
    options: ModelOptions,
    work: impl Fn(&Model) -> T + Sync,
) -> Vec<T> {
    // A link that costs nothing, but is one between machines.
    let link = Link { latency: 0.0, bandwidth: f64::INFINITY };
    let run = |comm: ThreadComm| {
        let comm =
            EmulatedComm::new(Arc::new(comm), link, nodes).expect("no more nodes than ranks");
        work(
            &Model::load(
                &ModelSource::open(dir).expect("a model"),
                Arc::new(comm),
                &options,
                &|_| (),
            )
            .expect("the model loads"),
        )
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            ThreadComm::group(ranks).into_iter().map(|comm| scope.spawn(|| run(comm))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// What the ledger of each rank counts for each of the passes, one after the other on one cache.
fn counted(
    dir: &Path,
    layout: (usize, usize),
    options: ModelOptions,
    passes: &[(usize, LogitRows)],
) -> Vec<Vec<Vec<Traffic>>> {
    on_ranks(dir, layout, options, |model| {
        let mut cache =
            Sequence::new(model, passes.iter().map(|(tokens, _)| tokens).sum()).expect("memory");
        let count = |&(tokens, rows): &(usize, LogitRows)| {
            model.comm().ledger().reset();
            cache.forward(model, &vec![3; tokens], rows).expect("a pass");
            let entries = model.comm().ledger().entries();
            let entries = entries.iter().filter(|entry| entry.calls > 0);
            entries
                .map(|entry| self::entry(entry.collective, entry.calls, entry.payload_bytes))
                .collect()
        };
        passes.iter().map(count).collect()
    })
}

/// Half precision on the way between machines is what the cache would have made of the numbers
/// anyway.
#[test]
fn keys_travel_as_they_are_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("tiny");
    synthesize(&dir, &SynthOptions { preset: Preset::Tiny, layers: Some(2), seed: 1 }, &mut |_| ())
        .expect("written");
    for isa in Isa::all() {
        let options = ModelOptions {
            strategy: ParallelStrategy::Sequence,
            kv: KvFormat::F16,
            ..ModelOptions::new(isa)
        };
        let logits = |nodes| {
            on_ranks(&dir, (3, nodes), options, |model| {
                let mut cache = Sequence::new(model, 50).expect("memory");
                let tokens: Vec<u32> = (0..50).collect();
                let [first, second] = [&tokens[..31], &tokens[31..]].map(|tokens| {
                    cache.forward(model, tokens, LogitRows::All).expect("a pass").values
                });
                (
                    first,
                    second,
                    model
                        .comm()
                        .ledger()
                        .entries()
                        .iter()
                        .map(|entry| entry.payload_bytes)
                        .sum::<u64>(),
                )
            })
        };
        for (here, apart) in logits(1).into_iter().zip(logits(3)) {
            assert_eq!((here.0, here.1), (apart.0, apart.1), "{isa}");
            assert!(
                apart.2 < here.2,
                "{isa}: {} bytes between machines, {} within one",
                apart.2,
                here.2
            );
        }
    }
}

/// The reference cases are not quantized; here the columns come in groups of 32.
#[test]
fn the_ledger_counts_what_was_predicted_for_quantized_weights() {
    use LogitRows::{All, Last, None};
    let folder = tempfile::tempdir().expect("a folder");
    let passes = [(11, None), (6, All), (1, Last), (2, Last), (17, Last)];
    let schedules =
        [MlpSchedule::Fused, MlpSchedule::Naive, MlpSchedule::Gathered, MlpSchedule::Local];
    for preset in [Preset::Tiny, Preset::TinyMoe] {
        let dir = folder.path().join(preset.name());
        synthesize(&dir, &SynthOptions { preset, layers: Some(2), seed: 1 }, &mut |_| ())
            .expect("written");
        let config = Config::read(&ModelSource::open(&dir).expect("a model")).expect("valid");
        for strategy in [ParallelStrategy::Heads, ParallelStrategy::Sequence] {
            for (schedule, ranks) in
                schedules.into_iter().flat_map(|schedule| [(schedule, 2), (schedule, 3)])
            {
                let (mlp, weights) = (Some(schedule), Some(WeightFormat::Q8));
                let options =
                    ModelOptions { strategy, mlp, weights, ..ModelOptions::new(Isa::scalar()) };
                for (rank, counted) in
                    counted(&dir, (ranks, 1), options, &passes).into_iter().enumerate()
                {
                    let base = model(&config, ranks, strategy, schedule);
                    let model = Statement { rank, weights: WeightFormat::Q8, ..base };
                    let mut past = 0;
                    for (counted, (tokens, rows)) in counted.into_iter().zip(passes) {
                        let predicted = model.forward(tokens, past, rows);
                        let label = format!(
                            "rank {rank} of {ranks}, {strategy} {schedule}, {tokens} after {past}"
                        );
                        assert_eq!(counted, predicted, "{preset}, {label}");
                        past += tokens;
                    }
                }
            }
        }
    }
}

#[test]
fn the_ledger_counts_keys_that_go_round() {
    use LogitRows::{All, Last, None};
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("tiny");
    synthesize(&dir, &SynthOptions { preset: Preset::Tiny, layers: Some(2), seed: 1 }, &mut |_| ())
        .expect("written");
    let config = Config::read(&ModelSource::open(&dir).expect("a model")).expect("valid");
    let passes = [(1541, None), (1600, All), (100, Last), (1, Last)];
    let grid = ParallelStrategy::Grid { tp: 2, sp: 2 };
    let sequence = ParallelStrategy::Sequence;
    let (full, half) = (KvFormat::F32, KvFormat::F16);
    for (ranks, nodes, strategy, kv) in [
        (2, 2, sequence, full),
        (3, 2, sequence, half),
        (3, 3, sequence, full),
        (4, 2, grid, half),
        (4, 4, grid, full),
    ] {
        let options = ModelOptions { strategy, kv, ..ModelOptions::new(Isa::detect()) };
        let schedule = options.schedule();
        for (rank, counted) in
            counted(&dir, (ranks, nodes), options, &passes).into_iter().enumerate()
        {
            let base = model(&config, ranks, strategy, schedule);
            let model = Statement { nodes, rank, kv, ..base };
            assert!(
                counted[0].iter().any(|entry| entry.collective == Collective::Send),
                "{strategy} {ranks} {nodes}"
            );
            let mut past = 0;
            for (counted, (tokens, rows)) in counted.into_iter().zip(passes) {
                let label =
                    format!("rank {rank} of {ranks} on {nodes}, {strategy}, {tokens} after {past}");
                assert_eq!(counted, model.forward(tokens, past, rows), "{label}");
                past += tokens;
            }
        }
    }
}
