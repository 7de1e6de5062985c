//! Checks of the engine that run on thread ranks and on MPI processes.

// Each test program uses a part of this module.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::qwen3_model::comm::{Communicator, ThreadComm};
use engine::qwen3_model::{
    Isa, Model, ModelOptions, ModelSource, ParallelStrategy, SamplingParams,
};
use engine::{
    Engine, EngineConfig, EngineHandle, Event, FinishReason, KvMemory, Request, Stats, Stream,
    TokenLogprobs, Usage,
};
use serde_json::Value;

pub const HEADS: ParallelStrategy = ParallelStrategy::Heads;
pub const SEQUENCE: ParallelStrategy = ParallelStrategy::Sequence;
/// Ids that end an answer of the bundled model.
pub const EOS: [u32; 2] = [4089, 4087];

pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen")
}

pub fn load(comm: Arc<dyn Communicator>, strategy: ParallelStrategy) -> Model {
    let options = ModelOptions { strategy, ..ModelOptions::new(Isa::detect()) };
    let source = ModelSource::open(folder()).expect("the bundled model");
    Model::load(&source, comm, &options, &|_| ()).expect("the bundled model loads")
}

/// A configuration with so many pages.
pub fn config(pages: usize) -> EngineConfig {
    EngineConfig { kv_memory: KvMemory::Positions(128 * pages), ..EngineConfig::default() }
}

/// Runs an engine on the ranks of `comm`, with `client` on a thread of rank 0, which gets its
/// result.
pub fn serve<T: Send>(
    comm: Arc<dyn Communicator>,
    strategy: ParallelStrategy,
    config: &EngineConfig,
    client: impl FnOnce(EngineHandle) -> T + Send,
) -> Option<T> {
    let engine = Engine::new(load(comm, strategy), config).expect("the engine starts");
    engine.serve(|handle| client(handle.clone())).expect("no rank is lost").1
}

/// Runs an engine on `ranks` threads.
pub fn on_ranks<T: Send>(
    ranks: usize,
    strategy: ParallelStrategy,
    config: &EngineConfig,
    client: impl Fn(EngineHandle) -> T + Send + Sync,
) -> T {
    std::thread::scope(|scope| {
        let client = &client;
        let threads: Vec<_> = ThreadComm::group(ranks)
            .into_iter()
            .map(|comm| scope.spawn(move || serve(Arc::new(comm), strategy, config, client)))
            .collect();
        let results = threads.into_iter().map(|thread| thread.join().expect("no rank panics"));
        results.flatten().next().expect("rank 0 has a client")
    })
}

/// The prompts and greedy continuations of the reference implementation.
pub fn expected() -> Vec<(Vec<u32>, Vec<u32>)> {
    let text = std::fs::read_to_string(folder().join("expected.json")).expect("expected.json");
    let cases: Value = serde_json::from_str(&text).expect("JSON");
    let ids = |case: &Value, field: &str| -> Vec<u32> {
        serde_json::from_value(case[field].clone()).expect(field)
    };
    let cases = cases.as_array().expect("cases");
    cases.iter().map(|case| (ids(case, "prompt_ids"), ids(case, "greedy_ids"))).collect()
}

/// A greedy request that ends where the reference does.
pub fn greedy(prompt: &[u32], max_tokens: usize) -> Request {
    Request { eos_token_ids: EOS.to_vec(), ..Request::new(prompt.to_vec(), max_tokens) }
}

/// A long prompt: the reference's prompts one after the other, with a first token of its own.
pub fn long_prompt(first: u32, tokens: usize) -> Vec<u32> {
    let text: Vec<u32> =
        expected().into_iter().flat_map(|(prompt, ids)| [prompt, ids].concat()).collect();
    std::iter::once(first).chain(text.into_iter().cycle()).take(tokens).collect()
}

/// The log-probability of a token, and the most probable ones.
pub type Logprobs = (Option<f32>, Vec<(u32, f32)>);

/// All that a request delivered.
#[derive(Debug, Default)]
pub struct Answer {
    pub cached_tokens: Option<usize>,
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Tokens of each sequence, with their log-probabilities.
    pub tokens: Vec<Vec<u32>>,
    pub logprobs: Vec<Vec<Logprobs>>,
    pub hidden: Option<Vec<f32>>,
    pub finished: Vec<Option<(FinishReason, Usage)>>,
    pub failed: Option<String>,
}

impl Answer {
    /// Reads a stream to its end, and checks the order of its events.
    pub fn read(stream: &Stream, n: usize) -> Self {
        let mut answer = Self {
            tokens: vec![Vec::new(); n],
            logprobs: vec![Vec::new(); n],
            finished: vec![None; n],
            ..Self::default()
        };
        while let Some(event) = stream.recv_blocking() {
            assert!(answer.failed.is_none(), "an event after the failure");
            match event {
                Event::Started { cached_tokens, .. } => {
                    assert_eq!(answer.cached_tokens.replace(cached_tokens), None, "one start");
                }
                Event::PromptLogprobs(more) => {
                    assert!(answer.tokens.iter().all(Vec::is_empty), "the prompt comes first");
                    answer.prompt_logprobs.extend(more);
                }
                Event::Token { index, id, logprob, top } => {
                    assert!(answer.cached_tokens.is_some() && answer.finished[index].is_none());
                    answer.tokens[index].push(id);
                    answer.logprobs[index].push((logprob, top));
                }
                Event::Hidden(row) => answer.hidden = Some(row),
                Event::Finished { index, reason, usage } => {
                    assert_eq!(usage.generated_tokens, answer.tokens[index].len());
                    assert!(answer.finished[index].replace((reason, usage)).is_none());
                }
                Event::Failed(error) => answer.failed = Some(error.to_string()),
            }
        }
        let finished = answer.finished.iter().all(Option::is_some);
        assert!(finished || answer.failed.is_some(), "the stream ends without an end: {answer:?}");
        answer
    }

    /// Why sequence `index` ended.
    pub fn reason(&self, index: usize) -> FinishReason {
        assert_eq!(self.failed, None);
        self.finished[index].expect("the sequence has ended").0
    }
}

/// Submits a request with `n` sequences and reads its answer.
pub fn ask(handle: &EngineHandle, request: Request) -> Answer {
    let n = request.n;
    Answer::read(&handle.submit(request).expect("the request is accepted"), n)
}

/// Submits requests together and reads their answers.
pub fn ask_all(handle: &EngineHandle, requests: Vec<Request>) -> Vec<Answer> {
    let streams: Vec<_> = requests
        .into_iter()
        .map(|request| (request.n, handle.submit(request).expect("the request is accepted")))
        .collect();
    streams.iter().map(|(n, stream)| Answer::read(stream, *n)).collect()
}

/// The statistics after the engine has nothing left to do: all pages are released.
pub fn idle(handle: &EngineHandle) -> Stats {
    loop {
        let stats = handle.stats();
        if (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0) {
            return stats;
        }
        std::thread::yield_now();
    }
}

/// A request of each kind, and its number: prompts of different lengths, greedy and sampled.
pub fn mixed(index: usize) -> Request {
    let cases = expected();
    let (prompt, _) = &cases[index % cases.len()];
    let seed = index as u64;
    let sampling = match index % 4 {
        0 => SamplingParams::default(),
        1 => SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() },
        2 => SamplingParams { temperature: 0.8, top_k: 20, seed, ..SamplingParams::default() },
        _ => SamplingParams {
            temperature: 1.2,
            top_p: 0.9,
            seed,
            presence_penalty: 0.5,
            ..SamplingParams::default()
        },
    };
    let prompt = match index % 3 {
        0 => prompt.clone(),
        // These need one more page soon.
        1 => long_prompt(5, 245 + index % 10),
        _ => long_prompt(5 + index as u32, 120),
    };
    Request { sampling, ignore_eos: true, ..greedy(&prompt, 20 + index) }
}

/// 16 concurrent requests get the answers that they get alone, with enough pages and with too few.
pub fn concurrent_requests_get_the_answers_that_they_get_alone(
    comm: Arc<dyn Communicator>,
    strategy: ParallelStrategy,
) {
    let alone = serve(comm.clone(), strategy, &config(64), |handle| {
        let alone: Vec<_> = (0..16).map(|index| ask(&handle, mixed(index)).tokens).collect();
        for ((prompt, ids), answer) in expected()
            .iter()
            .zip(expected().iter().map(|(prompt, ids)| ask(&handle, greedy(prompt, ids.len()))))
        {
            assert_eq!(&answer.tokens[0], ids, "the reference's answer to {prompt:?}");
        }
        alone
    });
    for (pages, preempts) in [(64, false), (8, true)] {
        let alone = &alone;
        serve(comm.clone(), strategy, &config(pages), move |handle| {
            let alone = alone.as_ref().expect("this is rank 0");
            for _ in 0..2 {
                let answers = ask_all(&handle, (0..16).map(mixed).collect());
                for (index, (answer, alone)) in answers.iter().zip(alone).enumerate() {
                    assert_eq!(answer.reason(0), FinishReason::Length);
                    assert_eq!(&answer.tokens, alone, "request {index} with {pages} pages");
                }
            }
            let stats = idle(&handle);
            assert_eq!(stats.preemptions > 0, preempts, "{} preemptions", stats.preemptions);
            assert_eq!(stats.generated_tokens, 2 * (0..16).map(|index| 20 + index).sum::<u64>());
        });
    }
}

/// Log-probabilities of prompts and answers are those of the logits of a single pass.
pub fn log_probabilities_are_those_of_one_pass(
    comm: Arc<dyn Communicator>,
    strategy: ParallelStrategy,
) {
    use engine::qwen3_model::{LogitRows, Sequence};
    let prompt = long_prompt(7, 200);
    let model = load(comm.clone(), strategy);
    let mut sequence = Sequence::new(&model, 256).expect("memory");
    let own = sequence.forward(&model, &prompt, LogitRows::All).expect("a pass");
    let logits = model.gather_logits(&own).expect("all logits");
    drop(model);
    let exact: Vec<Vec<f64>> = logits
        .outer_iter()
        .map(|row| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
            row.iter().map(|x| f64::from(x - max) - sum.ln()).collect()
        })
        .collect();
    let config = EngineConfig { step_rows: 48, ..config(8) };
    serve(comm, strategy, &config, |handle| {
        for scored in [0, 3] {
            let answer = ask(
                &handle,
                Request {
                    prompt_logprobs: Some(scored),
                    sampling: SamplingParams { logprobs: Some(2), ..SamplingParams::default() },
                    ..greedy(&prompt, 2)
                },
            );
            assert_eq!((answer.cached_tokens, answer.tokens[0].len()), (Some(0), 2));
            assert_eq!(answer.prompt_logprobs.len(), prompt.len() - 1);
            let close = |found: f32, row: usize, id: u32| {
                let distance = (f64::from(found) - exact[row][id as usize]).abs();
                assert!(distance < 2e-3, "token {id} after row {row}: {distance:e}");
            };
            for (row, found) in answer.prompt_logprobs.iter().enumerate() {
                assert_eq!((found.id, found.top.len()), (prompt[row + 1], scored));
                close(found.logprob, row, found.id);
                found.top.iter().for_each(|(id, logprob)| close(*logprob, row, *id));
                assert!(found.top.is_sorted_by(|a, b| a.1 >= b.1));
            }
            let (logprob, top) = &answer.logprobs[0][0];
            assert_eq!((top.len(), top[0].0), (2, answer.tokens[0][0]));
            close(logprob.expect("asked for"), prompt.len() - 1, answer.tokens[0][0]);
        }
        // With nothing but the prompt to compute, the request ends without a token.
        let only = Request { prompt_logprobs: Some(0), ..greedy(&prompt, 0) };
        let answer = ask(&handle, only);
        assert_eq!(answer.prompt_logprobs.len(), prompt.len() - 1);
        assert_eq!((answer.reason(0), answer.tokens[0].len()), (FinishReason::Length, 0));
        idle(&handle);
    });
}
