//! Perplexity with the bundled model, on one and on several ranks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use comm::{Communicator, SoloComm, ThreadComm};
use qwen3_model::perplexity::{PerplexityError, perplexity};
use qwen3_model::{Isa, LogitRows, Model, ModelOptions, ModelSource, Sequence};
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen")
}

fn load(comm: Arc<dyn Communicator>) -> Model {
    let source = ModelSource::open(folder()).expect("a model");
    let options = ModelOptions::new(Isa::scalar());
    Model::load(&source, comm, &options, &|_| ()).expect("the bundled model loads")
}

fn solo() -> Model {
    load(Arc::new(SoloComm::new()))
}

/// Runs `job` with the model, split by heads, on each of `ranks` threads and returns what each rank
/// returned.
fn on_ranks<T: Send>(ranks: usize, job: impl Fn(&Model) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let group = ThreadComm::group(ranks).into_iter();
        let threads: Vec<_> =
            group.map(|comm| scope.spawn(|| job(&load(Arc::new(comm))))).collect();
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
