//! The engine with the bundled model on ranks that are threads.

mod suite;

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::qwen3_model::comm::{Communicator, ThreadComm};
use engine::qwen3_model::sampling::SamplingError;
use engine::qwen3_model::{Batch, PageId, ParallelStrategy, SamplingParams, Span, Wanted};
use engine::{
    ConstraintError, Engine, EngineConfig, EngineError, Event, FinishReason, KvMemory, Next,
    Pooling, Request, SubmitError, ThinkingBudget, TokenConstraint,
};
use suite::*;

/// Runs a check on each of `ranks` threads.
fn check_on(
    ranks: usize,
    strategy: ParallelStrategy,
    check: fn(Arc<dyn Communicator>, ParallelStrategy),
) {
    std::thread::scope(|scope| {
        for comm in ThreadComm::group(ranks) {
            scope.spawn(move || check(Arc::new(comm), strategy));
        }
    });
}

#[test]
fn concurrent_requests_on_one_rank() {
    check_on(1, HEADS, concurrent_requests_get_the_answers_that_they_get_alone);
}

#[test]
fn concurrent_requests_on_two_and_three_ranks() {
    check_on(2, HEADS, concurrent_requests_get_the_answers_that_they_get_alone);
    check_on(3, HEADS, concurrent_requests_get_the_answers_that_they_get_alone);
}

#[test]
fn greedy_answers_are_the_references_under_every_strategy() {
    let grid = |tp, sp| ParallelStrategy::Grid { tp, sp };
    for (ranks, strategy) in [
        (2, SEQUENCE),
        (3, SEQUENCE),
        (4, grid(2, 2)),
        (6, grid(2, 3)),
        (6, grid(3, 2)),
        (5, HEADS),
    ] {
        on_ranks(ranks, strategy, &config(16), |handle| {
            let requests =
                expected().iter().map(|(prompt, ids)| greedy(prompt, ids.len())).collect();
            for (answer, (_, ids)) in ask_all(&handle, requests).iter().zip(expected()) {
                assert_eq!(answer.tokens[0], ids, "{ranks} ranks, {strategy}");
            }
            idle(&handle);
        });
    }
}

#[test]
fn log_probabilities() {
    for (ranks, strategy) in [(1, HEADS), (2, HEADS), (3, HEADS), (2, SEQUENCE)] {
        check_on(ranks, strategy, log_probabilities_are_those_of_one_pass);
    }
}

#[test]
fn a_prefix_that_was_computed_is_found_again_within_its_salt() {
    for (ranks, strategy) in [(1, HEADS), (2, HEADS), (3, SEQUENCE)] {
        on_ranks(ranks, strategy, &config(24), |handle| {
            let prompt = long_prompt(9, 300);
            let salted =
                |salt: &str| Request { cache_salt: salt.as_bytes().to_vec(), ..greedy(&prompt, 8) };
            let first = ask(&handle, salted("a"));
            let again = ask(&handle, salted("a"));
            assert_eq!((first.cached_tokens, again.cached_tokens), (Some(0), Some(256)));
            assert_eq!(first.tokens, again.tokens);
            let usage = again.finished[0].expect("an end").1;
            assert_eq!((usage.prompt_tokens, usage.cached_tokens), (300, 256));
            assert_eq!(ask(&handle, salted("b")).cached_tokens, Some(0));
            let stats = idle(&handle);
            assert_eq!((stats.prefix_hit_tokens, stats.prompt_tokens), (256, 900));
            // Two full pages of each salt are kept.
            assert_eq!((stats.pages_cached, stats.pages_used), (4, 0));
        });
    }
}

#[test]
fn samples_of_one_prompt_are_those_of_separate_seeds_and_any_number_of_ranks() {
    let sampling = SamplingParams { temperature: 1.0, seed: 5, ..SamplingParams::default() };
    let request = |n| Request {
        n,
        sampling: SamplingParams { logprobs: Some(1), ..sampling.clone() },
        ignore_eos: true,
        ..greedy(&long_prompt(3, 140), 30)
    };
    let of = |ranks, pages| {
        on_ranks(ranks, HEADS, &config(pages), |handle| {
            let alone = ask(&handle, request(1));
            let together = ask(&handle, request(4));
            assert_eq!(together.tokens[0], alone.tokens[0]);
            let stats = idle(&handle);
            (together.tokens, stats.preemptions)
        })
    };
    let (tokens, preemptions) = of(1, 32);
    assert_eq!(preemptions, 0);
    for index in 1..4 {
        assert!(tokens[..index].iter().all(|other| *other != tokens[index]), "{tokens:?}");
    }
    assert_eq!(of(2, 32).0, tokens);
    // Two pages hold one of the sequences: the others wait and are computed again.
    assert_eq!(of(3, 2).0, tokens);
}

/// Follows a script: one decision per token.
struct Script(Vec<Result<Decision, ConstraintError>>, Vec<u32>);

#[derive(Clone)]
enum Decision {
    Any,
    Only(Vec<u32>),
    Force(u32),
    Stop,
}

impl TokenConstraint for Script {
    fn next(&mut self) -> Result<Next<'_>, ConstraintError> {
        Ok(match self.0.remove(0)? {
            Decision::Any => Next::Any,
            Decision::Only(ids) => {
                self.1 = vec![0; 128];
                ids.iter().for_each(|id| self.1[*id as usize / 32] |= 1 << (id % 32));
                Next::Mask(&self.1)
            }
            Decision::Force(id) => Next::Forced(id),
            Decision::Stop => Next::Stop,
        })
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        let reason = "it dislikes this token".to_owned();
        if token == 666 { Err(ConstraintError { token: Some(token), reason }) } else { Ok(()) }
    }
}

#[test]
fn constraints_decide_beside_unconstrained_requests() {
    for ranks in [1, 2, 3] {
        on_ranks(ranks, HEADS, &config(32), |handle| {
            let (prompt, ids) = expected().swap_remove(0);
            let script = |decisions: Vec<_>| -> Request {
                let script: Box<dyn TokenConstraint> = Box::new(Script(decisions, Vec::new()));
                Request { constraints: vec![script], ..greedy(&prompt, 6) }
            };
            let broken = ConstraintError { token: Some(1), reason: "lost".to_owned() };
            let only = Decision::Only;
            let requests = vec![
                greedy(&prompt, ids.len()),
                script(vec![
                    Ok(Decision::Force(17)),
                    Ok(only(vec![4000])),
                    Ok(only(vec![1, 3500])),
                    Ok(Decision::Any),
                    Ok(Decision::Stop),
                ]),
                script(vec![Ok(Decision::Any), Err(broken)]),
                script(vec![Ok(Decision::Force(666))]),
                script(vec![Ok(Decision::Any), Ok(only(vec![]))]),
            ];
            let answers = ask_all(&handle, requests);
            assert_eq!(answers[0].tokens[0], ids);
            assert_eq!(answers[1].tokens[0][..2], [17, 4000]);
            assert!([1, 3500].contains(&answers[1].tokens[0][2]));
            assert_eq!(
                (answers[1].tokens[0].len(), answers[1].reason(0)),
                (4, FinishReason::Constraint)
            );
            for (answer, message) in answers[2..].iter().zip([
                "sequence 0: the constraint failed after token Some(1): lost",
                "sequence 0: the constraint failed after token Some(666): it dislikes this token",
                "sequence 0: no token is possible at step ",
            ]) {
                let failed = answer.failed.as_deref().expect("a failure");
                assert!(failed.starts_with(message), "{failed}");
            }
            // A budget for thinking of three tokens.
            let budget = ThinkingBudget::new(3, vec![70, 71], None);
            let request = Request { constraints: vec![Box::new(budget)], ..greedy(&prompt, 6) };
            let answer = ask(&handle, request);
            assert_eq!(answer.tokens[0][..3], ids[..3]);
            assert_eq!(answer.tokens[0][3..5], [70, 71]);
            idle(&handle);
        });
    }
}

#[test]
fn reasons_to_end() {
    on_ranks(2, HEADS, &config(40), |handle| {
        let (prompt, ids) = expected().swap_remove(0);
        let with = |sampling: SamplingParams| Request { sampling, ..greedy(&prompt, 20) };
        let answer = ask(&handle, greedy(&prompt, 3));
        assert_eq!((&answer.tokens[0][..], answer.reason(0)), (&ids[..3], FinishReason::Length));
        let stop = SamplingParams { stop_token_ids: vec![9, ids[2]], ..SamplingParams::default() };
        let answer = ask(&handle, with(stop.clone()));
        let first = ids.iter().position(|id| *id == ids[2]).expect("it is there") + 1;
        assert_eq!(
            (&answer.tokens[0][..], answer.reason(0)),
            (&ids[..first], FinishReason::StopToken(ids[2]))
        );
        // Before `min_tokens` the stop token is not chosen.
        let answer = ask(&handle, with(SamplingParams { min_tokens: 5, ..stop }));
        assert!(!answer.tokens[0][..5].contains(&ids[2]) && answer.tokens[0].len() > 5);
        let ended = Request { eos_token_ids: vec![ids[1]], ..greedy(&prompt, 20) };
        let first = ids.iter().position(|id| *id == ids[1]).expect("it is there") + 1;
        let answer = ask(&handle, ended);
        assert_eq!(
            (answer.tokens[0].len(), answer.reason(0)),
            (first, FinishReason::EndOfSequence)
        );
        let past = Request { eos_token_ids: vec![ids[1]], ignore_eos: true, ..greedy(&prompt, 20) };
        assert_eq!(ask(&handle, past).tokens[0].len(), 20);
        let late = Request { deadline: Some(Duration::ZERO), n: 2, ..greedy(&prompt, 20) };
        let answer = ask(&handle, late);
        assert_eq!([answer.reason(0), answer.reason(1)], [FinishReason::Deadline; 2]);
        // The context is full: the last token is not computed.
        let context = handle.limits().context_length;
        let full = Request { ignore_eos: true, ..greedy(&long_prompt(1, context - 1), 20) };
        let answer = ask(&handle, full);
        assert_eq!((answer.tokens[0].len(), answer.reason(0)), (2, FinishReason::Context));
        idle(&handle);
    });
}

#[test]
fn a_hidden_state_is_that_of_a_pass() {
    for (ranks, strategy) in [(1, HEADS), (3, HEADS), (2, SEQUENCE)] {
        let prompt = long_prompt(4, 150);
        let expected = std::thread::scope(|scope| {
            let ranks = ThreadComm::group(ranks).into_iter().map(|comm| {
                let prompt = &prompt;
                scope.spawn(move || {
                    let model = load(Arc::new(comm), strategy);
                    let mut arena = model.new_arena(2, 1).expect("memory");
                    let ranks = model.context().positions.size() as u32;
                    let span = Span {
                        sequence: 0,
                        start: 0,
                        tokens: 0..prompt.len(),
                        pages: vec![PageId(0), PageId(1 / ranks)],
                        slot: 0,
                        first_rank: 0,
                        generated: false,
                        wanted: vec![(prompt.len() - 1, Wanted::Hidden)],
                    };
                    let batch = Batch { tokens: prompt.clone(), spans: vec![span] };
                    let output = model.forward(&mut arena, &batch, &mut model.new_workspace());
                    output.expect("a pass").hidden.row(0).to_vec()
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).next_back()
        });
        on_ranks(ranks, strategy, &config(8), |handle| {
            let request = Request { pooling: Some(Pooling::LastToken), ..greedy(&prompt, 0) };
            let answer = ask(&handle, request);
            let (found, expected) = (answer.hidden.as_ref(), expected.as_ref());
            let (found, expected) = (found.expect("a state"), expected.expect("a state"));
            let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() <= 2e-4 * largest);
            }
            assert_eq!(answer.reason(0), FinishReason::Length);
        });
    }
}

#[test]
fn an_idle_engine_outlives_the_timeout_of_collectives() {
    let timeout = Duration::from_secs(2);
    let (prompt, ids) = expected().swap_remove(0);
    std::thread::scope(|scope| {
        for comm in ThreadComm::group(3) {
            let (prompt, ids) = (&prompt, &ids);
            scope.spawn(move || {
                comm.set_timeout(timeout);
                serve(Arc::new(comm), HEADS, &config(8), |handle| {
                    let idle = Instant::now();
                    while idle.elapsed() < timeout * 2 {
                        std::thread::park_timeout((timeout * 2).saturating_sub(idle.elapsed()));
                    }
                    assert_eq!(ask(&handle, greedy(prompt, ids.len())).tokens[0], *ids);
                })
            });
        }
    });
}

#[test]
fn a_dropped_stream_frees_its_pages_within_a_step() {
    on_ranks(2, HEADS, &config(16), |handle| {
        let endless =
            |first| Request { ignore_eos: true, ..greedy(&long_prompt(first, 200), 1500) };
        let stream = handle.submit(endless(1)).expect("the request is accepted");
        let waiting = handle.submit(endless(2)).expect("the request is accepted");
        while !matches!(stream.recv_blocking(), Some(Event::Token { .. })) {}
        drop((stream, waiting));
        // The first token may arrive before the statistics of its step.
        let stats = loop {
            let stats = idle(&handle);
            if stats.finished_requests == 2 {
                break stats;
            }
        };
        assert_eq!((stats.cancelled_requests, stats.finished_requests), (2, 2));
        assert!(stats.generated_tokens < 1500, "{} tokens", stats.generated_tokens);
        // The engine goes on.
        let (prompt, ids) = expected().swap_remove(1);
        assert_eq!(ask(&handle, greedy(&prompt, ids.len())).tokens[0], ids);
    });
}

#[test]
fn a_slow_reader_fails_and_disturbs_nobody() {
    let config = EngineConfig { stream_limit: 10, ..config(16) };
    on_ranks(1, HEADS, &config, |handle| {
        let (prompt, ids) = expected().swap_remove(0);
        let slow = Request { ignore_eos: true, ..greedy(&prompt, 1000) };
        let slow = handle.submit(slow).expect("the request is accepted");
        // An event after the other; a reader that keeps up is never behind.
        assert_eq!(ask(&handle, greedy(&prompt, ids.len())).tokens[0], ids);
        while handle.stats().finished_requests < 2 {
            std::thread::yield_now();
        }
        let answer = Answer::read(&slow, 1);
        let failed = answer.failed.expect("a failure");
        assert!(failed.ends_with("expected at most 10: the reader is too slow"), "{failed}");
        assert!(answer.tokens[0].len() < 15);
    });
}

#[test]
fn requests_that_cannot_be_served_are_refused() {
    let config = EngineConfig { max_queue: 2, max_sequences: 3, ..config(3) };
    on_ranks(1, HEADS, &config, |handle| {
        let refused = |request: Request| handle.submit(request).err().expect("a refusal");
        let prompt = [1, 2, 3];
        assert!(matches!(refused(greedy(&[], 1)), SubmitError::EmptyPrompt));
        assert!(matches!(
            refused(greedy(&[1, 4096], 1)),
            SubmitError::TokenOutOfRange { index: 1, id: 4096, vocab_size: 4096 }
        ));
        assert!(matches!(
            refused(greedy(&vec![1; 4097], 1)),
            SubmitError::PromptTooLong { tokens: 4097, limit: 4096 }
        ));
        assert!(matches!(
            refused(greedy(&[1; 380], 6)),
            SubmitError::NeverFits { pages: 4, available: 3 }
        ));
        assert_eq!(ask(&handle, greedy(&[1; 380], 5)).tokens.len(), 1);
        for n in [0, 4] {
            let request = Request { n, ..greedy(&prompt, 1) };
            assert!(matches!(refused(request), SubmitError::Sequences { limit: 3, .. }));
        }
        let rule: Box<dyn TokenConstraint> = Box::new(ThinkingBudget::new(1, vec![1], None));
        let request = Request { n: 2, constraints: vec![rule], ..greedy(&prompt, 1) };
        assert!(matches!(refused(request), SubmitError::Constraints { found: 1, n: 2 }));
        let request = Request { prompt_logprobs: Some(101), ..greedy(&prompt, 1) };
        assert!(matches!(refused(request), SubmitError::Logprobs { found: 101, limit: 100 }));
        let request = Request { pooling: Some(Pooling::LastToken), ..greedy(&prompt, 1) };
        assert!(matches!(refused(request), SubmitError::Pooling { max_tokens: 1, n: 1 }));
        let sampling = SamplingParams { top_p: 2.0, ..SamplingParams::default() };
        let error = refused(Request { sampling, ..greedy(&prompt, 1) });
        assert!(matches!(error, SubmitError::Sampling(SamplingError::Parameter { .. })));
        // Two requests run at most, as each needs two of the three pages; others wait.
        let busy = |_| Request { ignore_eos: true, ..greedy(&[1; 200], 150) };
        let mut streams = Vec::new();
        let full = loop {
            match handle.submit(busy(())) {
                Ok(stream) => streams.push(stream),
                Err(error) => break error,
            }
            assert!(streams.len() < 10, "the queue has no limit");
        };
        assert!(matches!(full, SubmitError::QueueFull { waiting: 2, limit: 2 }), "{full}");
        handle.drain();
        assert!(matches!(refused(greedy(&prompt, 1)), SubmitError::ShuttingDown));
        for stream in &streams {
            assert_eq!(Answer::read(stream, 1).tokens[0].len(), 150);
        }
    });
}

#[test]
fn the_queue_is_bounded_in_tokens() {
    let config = EngineConfig { max_queued_tokens: 300, max_sequences: 1, ..config(16) };
    on_ranks(1, HEADS, &config, |handle| {
        let endless = |tokens| Request { ignore_eos: true, ..greedy(&vec![1; tokens], 1000) };
        let running = handle.submit(endless(400)).expect("a single prompt may be longer");
        while !matches!(running.recv_blocking(), Some(Event::Started { .. })) {}
        let waiting = handle.submit(endless(200)).expect("the request is accepted");
        let error = handle.submit(endless(101)).err().expect("a refusal");
        assert!(
            matches!(
                error,
                SubmitError::QueueTokens { waiting_tokens: 200, tokens: 101, limit: 300 }
            ),
            "{error}"
        );
        handle.submit(endless(100)).expect("the request is accepted");
        drop((running, waiting));
    });
}

#[test]
fn a_shutdown_fails_open_requests() {
    on_ranks(2, HEADS, &config(16), |handle| {
        let request = Request { ignore_eos: true, ..greedy(&[1, 2, 3], 1500) };
        let stream = handle.submit(request).expect("the request is accepted");
        while !matches!(stream.recv_blocking(), Some(Event::Token { .. })) {}
        handle.shutdown();
        let last = std::iter::from_fn(|| stream.recv_blocking()).last();
        let Some(Event::Failed(error)) = last else { panic!("{last:?}") };
        assert_eq!(error.to_string(), "the engine ended: it was shut down");
    });
}

#[test]
fn a_lost_rank_fails_every_request_and_leaves_the_latest_steps() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = EngineConfig { steps_file: Some(folder.path().join("steps")), ..config(16) };
    for idle in [false, true] {
        let (ready, lost) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let mut group = ThreadComm::group(3);
            let third: Arc<dyn Communicator> = Arc::new(group.pop().expect("three ranks"));
            for comm in group {
                let (config, ready) = (&config, ready.clone());
                scope.spawn(move || {
                    let engine = Engine::new(load(Arc::new(comm), HEADS), config);
                    let engine = engine.expect("the engine starts");
                    let handle = engine.handle();
                    let client = handle.map(|handle| {
                        scope.spawn(move || {
                            let request = Request { ignore_eos: true, ..greedy(&[1, 2, 3], 1500) };
                            let stream = (!idle).then(|| handle.submit(request).expect("accepted"));
                            if let Some(stream) = &stream {
                                while !matches!(stream.recv_blocking(), Some(Event::Token { .. })) {
                                }
                            }
                            ready.send(()).expect("the third rank waits");
                            let last = stream
                                .map(|stream| std::iter::from_fn(|| stream.recv_blocking()).last());
                            if let Some(last) = last {
                                let Some(Event::Failed(error)) = last else { panic!("{last:?}") };
                                assert!(error.to_string().contains("out of memory"), "{error}");
                            }
                            // The handle lives until the engine ends by itself.
                            while !matches!(
                                handle.submit(greedy(&[1], 1)),
                                Err(SubmitError::ShuttingDown)
                            ) {
                                std::thread::yield_now();
                            }
                        })
                    });
                    let error = engine.run().err().expect("a rank is lost");
                    assert!(
                        matches!(error, EngineError::Comm(_) | EngineError::Model(_)),
                        "{error}"
                    );
                    assert!(error.to_string().contains("out of memory"), "{error}");
                    assert!(error.collective().is_some());
                    if let Some(client) = client {
                        client.join().expect("the client's checks pass");
                    }
                });
            }
            let aborting = third.clone();
            scope.spawn(move || {
                lost.recv().expect("rank 0 is ready");
                aborting.abort("out of memory");
            });
            let config = &config;
            scope.spawn(move || {
                let engine = Engine::new(load(third, HEADS), config).expect("the engine starts");
                engine.run().err().expect("this rank is lost");
            });
        });
        let text = std::fs::read_to_string(folder.path().join("steps.rank0")).expect("the file");
        assert!(text.contains("out of memory"), "{text}");
        assert_eq!(text.contains("0x1 of 3 tokens"), !idle, "{text}");
    }
}

#[test]
fn a_cache_without_a_page_is_refused() {
    let model = load(Arc::new(engine::qwen3_model::comm::SoloComm::new()), HEADS);
    let config = EngineConfig { kv_memory: KvMemory::Bytes(1000), ..EngineConfig::default() };
    let error = Engine::new(model, &config).err().expect("a refusal");
    assert!(matches!(error, EngineError::NoPages { rank: 0, pages: 0, .. }), "{error}");
}
