//! The engine with a made-up hybrid model: recurrent states in batches, forks, preemption and
//! prefixes that go on from snapshots.

mod suite;

use std::path::Path;
use std::sync::Arc;

use engine::qwen3_model::comm::ThreadComm;
use engine::qwen3_model::presets::Preset;
use engine::qwen3_model::synth::{SynthOptions, synthesize};
use engine::qwen3_model::{Isa, Model, ModelOptions, ModelSource, SamplingParams};
use engine::{Engine, EngineConfig, EngineHandle, Request};
use suite::{ask, ask_all, config, idle};

/// Runs an engine with the model of `folder` on `ranks` threads, with `client` on rank 0.
fn on_ranks<T: Send>(
    folder: &Path,
    ranks: usize,
    config: &EngineConfig,
    client: impl Fn(EngineHandle) -> T + Send + Sync,
) -> T {
    let serve = |comm: ThreadComm| {
        let source = ModelSource::open(folder).expect("a model");
        let options = ModelOptions::new(Isa::detect());
        let model = Model::load(&source, Arc::new(comm), &options, &|_| ()).expect("it loads");
        let engine = Engine::new(model, config).expect("the engine starts");
        engine.serve(|handle| client(handle.clone())).expect("no rank is lost").1
    };
    std::thread::scope(|scope| {
        let group = ThreadComm::group(ranks).into_iter();
        let threads: Vec<_> = group.map(|comm| scope.spawn(|| serve(comm))).collect();
        let results = threads.into_iter().map(|thread| thread.join().expect("no rank panics"));
        results.flatten().next().expect("rank 0 has a client")
    })
}

fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let options = SynthOptions { preset: Preset::TinyHybrid, layers: None, seed: 7 };
    synthesize(folder.path(), &options, &mut |_| ()).expect("written");
    folder
}

/// A prompt whose first `shared` tokens are those of all prompts of its family.
fn prompt(family: usize, shared: usize, tokens: usize, own: usize) -> Vec<u32> {
    let token = |at: usize| {
        let seed = if at < shared { family } else { 1000 + own };
        ((at * 131 + seed * 57 + at * at % 19) % 500) as u32
    };
    (0..tokens).map(token).collect()
}

fn request(index: usize) -> Request {
    let lengths = [3, 129, 40, 128, 260, 300];
    let prompt = prompt(index % 3, 128, lengths[index % 6], index);
    let seed = index as u64;
    let temperature = if index.is_multiple_of(2) { 0.0 } else { 1.0 };
    Request {
        n: 1 + index % 3 / 2,
        sampling: SamplingParams { temperature, seed, ..SamplingParams::default() },
        ignore_eos: true,
        ..Request::new(prompt, 20 + index)
    }
}

#[test]
fn concurrent_requests_get_the_answers_that_they_get_alone() {
    let folder = model();
    let mut expected = None;
    for ranks in [1, 2, 3] {
        let alone: Vec<_> = on_ranks(folder.path(), ranks, &config(64), |handle| {
            (0..12).map(|index| ask(&handle, request(index)).tokens).collect()
        });
        for (pages, snapshots, preempts) in [(64, 32, false), (6, 32, true), (6, 1, true)] {
            let config = EngineConfig { state_snapshots: snapshots, ..config(pages) };
            on_ranks(folder.path(), ranks, &config, |handle| {
                for _ in 0..2 {
                    let answers = ask_all(&handle, (0..12).map(request).collect());
                    for (index, (answer, alone)) in answers.iter().zip(&alone).enumerate() {
                        assert_eq!(answer.failed, None);
                        assert_eq!(&answer.tokens, alone, "{index}, {ranks} ranks, {pages} pages");
                    }
                }
                let stats = idle(&handle);
                assert_eq!(stats.preemptions > 0, preempts, "{} preemptions", stats.preemptions);
            });
        }
        assert_eq!(*expected.get_or_insert_with(|| alone.clone()), alone, "{ranks} ranks");
    }
}

/// A later prompt goes on where a snapshot was taken: at the last page boundary of an earlier
/// prompt, and at 2,048 tokens.
#[test]
fn prefixes_go_on_from_snapshots() {
    let folder = model();
    for ranks in [1, 3] {
        on_ranks(folder.path(), ranks, &config(64), |handle| {
            let cached = |prompt: Vec<u32>| {
                let answer = ask(&handle, Request::new(prompt, 4));
                (answer.cached_tokens.expect("it starts"), answer.tokens)
            };
            let first = cached(prompt(1, 300, 300, 0));
            assert_eq!((first.0, cached(prompt(1, 300, 300, 0))), (0, (256, first.1)));
            // The same 260 tokens, and others: also from the boundary at 256.
            assert_eq!(cached(prompt(1, 260, 400, 1)).0, 256);
            // Pages of the first 128 tokens are known, but there is no snapshot after them.
            assert_eq!(cached(prompt(1, 200, 400, 2)).0, 0);
            assert_eq!(cached(prompt(2, 2300, 2300, 0)).0, 0);
            assert_eq!(cached(prompt(2, 2100, 2200, 1)).0, 2048);
            assert_eq!(cached(prompt(2, 2300, 2310, 1)).0, 2176);
            idle(&handle);
        });
    }
    let none = EngineConfig { state_snapshots: 0, ..config(64) };
    on_ranks(folder.path(), 1, &none, |handle| {
        for _ in 0..2 {
            let answer = ask(&handle, Request::new(prompt(1, 300, 300, 0), 4));
            assert_eq!(answer.cached_tokens, Some(0));
        }
    });
}
