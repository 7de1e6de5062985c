//! Generation and perplexity with the bundled model, on one and on several ranks.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use comm::{Communicator, Phase, SoloComm, ThreadComm};
use qwen3_model::ModelSource;
use qwen3_model::generation::{GenerateError, Generated, Progress, StopReason};
use qwen3_model::perplexity::{PerplexityError, perplexity};
use qwen3_model::{
    GenerateParams, Isa, LogitRows, Model, ModelError, ModelOptions, ParallelStrategy,
    SamplingParams, Sequence, generate,
};
use serde_json::Value;

const STRATEGIES: [ParallelStrategy; 2] = [ParallelStrategy::Heads, ParallelStrategy::Sequence];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen")
}

fn load(comm: Arc<dyn Communicator>, strategy: ParallelStrategy) -> Model {
    let options = ModelOptions { strategy, ..ModelOptions::new(Isa::scalar()) };
    Model::load(&ModelSource::open(folder()).expect("a model"), comm, &options, &|_| ())
        .expect("the bundled model loads")
}

fn solo() -> Model {
    load(Arc::new(SoloComm::new()), ParallelStrategy::Heads)
}

/// Runs `job` with the model, split by heads, on each of `ranks` threads and returns what each rank
/// returned.
fn on_ranks<T: Send>(ranks: usize, job: impl Fn(&Model) -> T + Sync) -> Vec<T> {
    on_split(ranks, ParallelStrategy::Heads, job)
}

fn on_split<T: Send>(
    ranks: usize,
    strategy: ParallelStrategy,
    job: impl Fn(&Model) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let group = ThreadComm::group(ranks).into_iter();
        let threads: Vec<_> =
            group.map(|comm| scope.spawn(|| job(&load(Arc::new(comm), strategy)))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// The prompts and greedy continuations of the reference implementation.
fn expected() -> Vec<(Vec<u32>, Vec<u32>)> {
    let text = std::fs::read_to_string(folder().join("expected.json")).expect("expected.json");
    let cases: Value = serde_json::from_str(&text).expect("JSON");
    let ids = |case: &Value, field: &str| -> Vec<u32> {
        case[field]
            .as_array()
            .expect(field)
            .iter()
            .map(|id| id.as_u64().expect("an id") as u32)
            .collect()
    };
    cases
        .as_array()
        .expect("cases")
        .iter()
        .map(|case| (ids(case, "prompt_ids"), ids(case, "greedy_ids")))
        .collect()
}

fn greedy(max_new_tokens: usize) -> GenerateParams {
    GenerateParams { max_new_tokens, eos_token_ids: vec![4089, 4087], ..GenerateParams::default() }
}

fn run(model: &Model, prompt: &[u32], params: &GenerateParams) -> Generated {
    let mut cache = Sequence::new(model, 256).expect("memory");
    let mut seen = Vec::new();
    let result = generate(model, &mut cache, prompt, params, &mut |progress| {
        if let Progress::Token(id) = progress {
            seen.push(id);
        }
        ControlFlow::Continue(())
    });
    let result = result.expect("a continuation");
    assert_eq!(seen, result.ids, "the callback sees every token once");
    assert_eq!(
        cache.len(),
        prompt.len() + result.ids.len().saturating_sub(1),
        "all but the last token are cached"
    );
    result
}

#[test]
fn the_reference_implementation_continues_alike() {
    let model = solo();
    for (prompt, ids) in expected() {
        let result = run(&model, &prompt, &greedy(48));
        assert_eq!(result.ids, ids);
        let ends = ids.last().is_some_and(|id| [4089, 4087].contains(id));
        assert_eq!(
            result.stop,
            if ends { StopReason::EndOfSequence } else { StopReason::MaxNewTokens }
        );
        assert_eq!((result.prefill.tokens, result.decode.tokens), (prompt.len(), ids.len() - 1));
        assert!(result.prefill.tokens_per_s() > 0.0 && result.decode.tokens_per_s() > 0.0);
    }
}

#[test]
fn ranks_and_chunks_do_not_change_the_tokens() {
    let (prompt, ids) = expected().swap_remove(0);
    for ranks in [2, 3] {
        for prefill_chunk in [1, 5, 512] {
            let params = GenerateParams { prefill_chunk, ..greedy(48) };
            for result in on_ranks(ranks, |model| run(model, &prompt, &params)) {
                assert_eq!(result.ids, ids, "{ranks} ranks, chunks of {prefill_chunk}");
            }
        }
    }
    let sampling =
        SamplingParams { temperature: 1.0, top_k: 20, seed: 3, ..SamplingParams::default() };
    let params = GenerateParams { sampling: sampling.clone(), ignore_eos: true, ..greedy(20) };
    let alone = run(&solo(), &prompt, &params).ids;
    assert_eq!(alone.len(), 20);
    for result in on_ranks(3, |model| run(model, &prompt, &params)) {
        assert_eq!(result.ids, alone);
    }
    let other = GenerateParams { sampling: SamplingParams { seed: 4, ..sampling }, ..params };
    assert_ne!(run(&solo(), &prompt, &other).ids, alone);
}

#[test]
fn a_conversation_goes_on_in_its_cache() {
    let model = solo();
    let (prompt, ids) = expected().swap_remove(1);
    let mut cache = Sequence::new(&model, 256).expect("memory");
    let first =
        generate(&model, &mut cache, &prompt, &greedy(4), &mut |_| ControlFlow::Continue(()));
    let mut sequence = prompt.clone();
    sequence.extend(first.expect("four tokens").ids);
    let rest =
        generate(&model, &mut cache, &sequence, &greedy(48), &mut |_| ControlFlow::Continue(()))
            .expect("the rest");
    // Only the fourth token had not been run yet.
    assert_eq!(rest.prefill.tokens, 1);
    sequence.extend(rest.ids);
    assert_eq!(sequence[prompt.len()..], ids);
}

#[test]
fn reasons_to_stop() {
    let model = solo();
    let (prompt, ids) = expected().swap_remove(0);
    let none = run(&model, &prompt, &greedy(0));
    assert_eq!((none.ids.len(), none.stop, none.decode.tokens), (0, StopReason::MaxNewTokens, 0));

    let past = run(&model, &prompt, &GenerateParams { ignore_eos: true, ..greedy(ids.len() + 3) });
    assert_eq!((past.ids.len(), past.stop), (ids.len() + 3, StopReason::MaxNewTokens));
    assert_eq!(past.ids[..ids.len()], ids);

    // A cache with room for two more tokens: the third is chosen but cannot be run.
    let mut cache = Sequence::new(&model, prompt.len() + 2).expect("memory");
    let full =
        generate(&model, &mut cache, &prompt, &greedy(48), &mut |_| ControlFlow::Continue(()))
            .expect("some tokens");
    assert_eq!((full.ids.len(), full.stop), (3, StopReason::ContextFull));
    assert_eq!(full.ids, ids[..3]);
}

#[test]
fn a_callback_stops_all_ranks() {
    let (prompt, ids) = expected().swap_remove(0);
    for (ranks, strategy) in
        [1, 2, 3].into_iter().flat_map(|ranks| STRATEGIES.map(|strategy| (ranks, strategy)))
    {
        on_split(ranks, strategy, |model| {
            let mut cache = Sequence::new(model, 256).expect("memory");
            // One stop after the other, so that of split positions the last one is on another rank
            // each time.
            for (so_far, stop) in [(0, 4), (4, 5), (5, 7)] {
                let mut count = so_far;
                let longer = [&prompt[..], &ids[..so_far]].concat();
                let some = generate(model, &mut cache, &longer, &greedy(48), &mut |progress| {
                    count += usize::from(progress != Progress::Prompt);
                    let stops = count == stop && model.comm().rank() == 0;
                    if stops { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                });
                let some = some.expect("some tokens");
                assert_eq!(
                    (&some.ids[..], some.stop),
                    (&ids[so_far..stop], StopReason::Callback),
                    "{ranks} {strategy}"
                );
                assert_eq!(cache.len(), prompt.len() + stop - 1, "{ranks} {strategy}");
            }
            let longer = [&prompt[..], &ids[..7]].concat();
            let rest = generate(model, &mut cache, &longer, &greedy(48 - 7), &mut |_| {
                ControlFlow::Continue(())
            });
            assert_eq!(rest.expect("the rest").ids, ids[7..], "{ranks} {strategy}");
        });
    }
}

#[test]
fn a_callback_stops_all_ranks_within_the_prompt() {
    let (prompt, ids) = expected().swap_remove(0);
    let params = GenerateParams { prefill_chunk: 4, ..greedy(48) };
    for ranks in [1, 2, 3] {
        on_ranks(ranks, |model| {
            let mut asked = 0;
            let mut cache = Sequence::new(model, 256).expect("memory");
            // Only the last rank wants it, when the third chunk is to begin.
            let stopped = generate(model, &mut cache, &prompt, &params, &mut |_| {
                asked += 1;
                if asked == 3 && model.comm().rank() + 1 == ranks {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
            let stopped = stopped.expect("no error");
            assert_eq!(
                (stopped.ids.len(), stopped.stop, stopped.prefill.tokens),
                (0, StopReason::Callback, 8)
            );
            assert_eq!((asked, cache.len()), (3, 8));
            let rest =
                generate(model, &mut cache, &prompt, &params, &mut |_| ControlFlow::Continue(()));
            assert_eq!(rest.expect("the rest").ids, ids, "{ranks} ranks");
        });
    }
}

#[test]
fn the_ledger_tells_phases_apart() {
    let (prompt, _) = expected().swap_remove(0);
    for entries in on_ranks(2, |model| {
        model.comm().ledger().reset();
        run(model, &prompt, &greedy(3));
        assert_eq!(model.comm().ledger().phase(), Phase::Other);
        model.comm().ledger().entries()
    }) {
        let calls = |phase| {
            entries
                .iter()
                .filter(|entry| entry.phase == phase)
                .map(|entry| entry.calls)
                .sum::<u64>()
        };
        // 4 layers of two Allreduce and the exchange of candidates, for one prefill and two decoded
        // tokens. Before each token, and once in the prompt, an Allreduce of the wish to stop.
        assert_eq!(
            (calls(Phase::Prefill), calls(Phase::Decode), calls(Phase::Other)),
            (11, 20, 0),
            "{entries:?}"
        );
    }
}

#[test]
fn prompts_are_checked() {
    let model = solo();
    let fails = |prompt: &[u32], capacity: usize, cached: &[u32]| {
        let mut cache = Sequence::new(&model, capacity).expect("memory");
        if !cached.is_empty() {
            cache.forward(&model, cached, LogitRows::None).expect("room");
        }
        generate(&model, &mut cache, prompt, &greedy(1), &mut |_| ControlFlow::Continue(()))
            .expect_err("a bad prompt")
    };
    assert!(matches!(fails(&[], 8, &[]), GenerateError::EmptyPrompt));
    let error = fails(&[1, 2, 4096], 8, &[]);
    assert!(
        matches!(
            error,
            GenerateError::Model(ModelError::TokenOutOfRange {
                index: 2,
                id: 4096,
                vocab_size: 4096
            })
        ),
        "{error}"
    );
    let error = fails(&[1; 9], 8, &[]);
    assert!(matches!(error, GenerateError::PromptTooLong { tokens: 9, capacity: 8 }), "{error}");
    let error = fails(&[1, 2], 8, &[1, 2]);
    assert!(matches!(error, GenerateError::NothingNew { tokens: 2, cached: 2 }), "{error}");
    let hot = GenerateParams {
        sampling: SamplingParams { temperature: -1.0, ..SamplingParams::default() },
        ..greedy(1)
    };
    let mut cache = Sequence::new(&model, 8).expect("memory");
    let error = generate(&model, &mut cache, &[1], &hot, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(error, Err(GenerateError::Sampling(_))));
}

#[test]
fn perplexity_is_the_mean_over_windows() {
    let model = solo();
    let tokens: Vec<u32> =
        expected().into_iter().flat_map(|(prompt, ids)| [prompt, ids].concat()).take(131).collect();
    let mut done = Vec::new();
    let found =
        perplexity(&model, &tokens, 50, 512, &mut |tokens| done.push(tokens)).expect("a score");
    // 50, 50 and 31 tokens.
    assert_eq!((found.tokens, found.scored), (131, 49 + 49 + 30));
    assert_eq!(done.last(), Some(&131));

    let (mut sum, mut scored) = (0.0, 0);
    for window in tokens.chunks(50) {
        let mut cache = Sequence::new(&model, 50).expect("memory");
        let logits = cache.forward(&model, window, LogitRows::All).expect("logits");
        for (row, &target) in logits.values.outer_iter().zip(&window[1..]) {
            let all: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            sum += all.ln() - f64::from(row[target as usize]);
            scored += 1;
        }
    }
    let expected = (sum / f64::from(scored)).exp();
    assert!(
        (found.perplexity / expected - 1.0).abs() < 1e-5,
        "{} against {expected}",
        found.perplexity
    );
    assert!((found.mean_nll.exp() - found.perplexity).abs() < 1e-9);

    for ranks in [2, 3] {
        for result in on_ranks(ranks, |model| {
            perplexity(model, &tokens, 50, 512, &mut |_| ()).expect("a score")
        }) {
            assert_eq!(result.scored, found.scored);
            assert!(
                (result.perplexity / found.perplexity - 1.0).abs() < 1e-4,
                "{ranks} ranks: {}",
                result.perplexity
            );
        }
    }
    // Shorter passes say the same of the same text, and there are more of them.
    let passes = done.len();
    done.clear();
    let again =
        perplexity(&model, &tokens, 50, 7, &mut |tokens| done.push(tokens)).expect("a score");
    assert!(
        (again.perplexity / found.perplexity - 1.0).abs() < 1e-4 && done.len() > passes,
        "{again:?} {done:?}"
    );
    // A last window of one token scores nothing.
    let short = perplexity(&model, &tokens[..51], 50, 512, &mut |_| ()).expect("a score");
    assert_eq!((short.tokens, short.scored), (51, 49));
}

#[test]
fn texts_and_windows_are_checked() {
    let model = solo();
    let fails = |tokens: &[u32], context| {
        perplexity(&model, tokens, context, 512, &mut |_| ()).expect_err("unusable")
    };
    assert!(matches!(
        fails(&[1, 2, 3], 1),
        PerplexityError::Context { found: 1, context_length: 4096 }
    ));
    assert!(matches!(fails(&[1, 2, 3], 4097), PerplexityError::Context { found: 4097, .. }));
    assert!(matches!(fails(&[1], 16), PerplexityError::TooShort { found: 1 }));
    assert!(matches!(fails(&[1, 9999, 1], 16), PerplexityError::Model(_)));
    // What is only predicted counts, too.
    assert!(matches!(fails(&[1, 1, 9999], 16), PerplexityError::Model(_)));
}
