//! Activations in bf16: how far they are from those in f32, and that all ranks agree on them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use comm::{Communicator, SoloComm, ThreadComm};
use qwen3_model::options::ActivationFormat;
use qwen3_model::perplexity::perplexity;
use qwen3_model::{
    Isa, LogitRows, Model, ModelError, ModelOptions, ModelSource, ParallelStrategy, Sequence,
};
use serde_json::Value;

/// The bundled model, whose weights are bf16.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen")
}

fn load(comm: Arc<dyn Communicator>, options: &ModelOptions) -> Result<Model, ModelError> {
    Model::load(&ModelSource::open(folder()).expect("a model"), comm, options, &|_| ())
}

/// All tokens of the recorded prompts and answers, one after the other.
fn tokens() -> Vec<u32> {
    let text = std::fs::read_to_string(folder().join("expected.json")).expect("expected.json");
    let cases: Value = serde_json::from_str(&text).expect("JSON");
    let ids = |case: &Value, field: &str| case[field].as_array().expect(field).clone();
    let cases = cases.as_array().expect("a list of cases");
    let all = cases.iter().flat_map(|case| [ids(case, "prompt_ids"), ids(case, "greedy_ids")]);
    all.flatten().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn in_bf16() -> Option<ModelOptions> {
    let options =
        ModelOptions { activations: ActivationFormat::Bf16, ..ModelOptions::new(Isa::avx512()?) };
    options.isa.has_bf16_dot().then_some(options)
}

#[test]
fn activations_in_bf16_change_logits_little() {
    let Some(options) = in_bf16() else {
        return eprintln!("not tested: this CPU has no AVX512-BF16");
    };
    let tokens = tokens();
    let run = |options: &ModelOptions, ranks: usize| {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = ThreadComm::group(ranks)
                .into_iter()
                .map(|comm| {
                    scope.spawn(|| {
                        let model = load(Arc::new(comm), options).expect("the bundled model");
                        let mut sequence = Sequence::new(&model, tokens.len()).expect("memory");
                        let logits =
                            sequence.forward(&model, &tokens, LogitRows::All).expect("a pass");
                        let logits = model.gather_logits(&logits).expect("logits");
                        let score = perplexity(&model, &tokens, tokens.len(), 64, &mut |_| ())
                            .expect("a score");
                        (logits, score.mean_nll)
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().expect("no panic")).next().expect("a rank")
        })
    };
    let (exact, exact_nll) = run(&ModelOptions::new(options.isa), 1);
    let largest = exact.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    for (ranks, strategy) in [
        (1, ParallelStrategy::Heads),
        (2, ParallelStrategy::Heads),
        (2, ParallelStrategy::Sequence),
        (3, ParallelStrategy::Heads),
    ] {
        let (rounded, nll) = run(&ModelOptions { strategy, ..options }, ranks);
        let distance =
            rounded.iter().zip(&exact).fold(0.0_f32, |d, (a, b)| d.max((a - b).abs())) / largest;
        println!("{ranks} ranks, {strategy}: {distance:.1e}, nll {nll} instead of {exact_nll}");
        assert!(
            (1e-4..2e-2).contains(&distance),
            "{ranks} ranks, {strategy}: logits are {distance} of the largest from those of f32"
        );
        // A few hundred tokens: a thousandth of the perplexity on average over many more.
        assert!((nll - exact_nll).abs() < 4e-3, "{ranks} ranks, {strategy}: {nll}, {exact_nll}");
    }
}

#[test]
fn a_rank_without_dot_products_of_bf16_is_named() {
    let options =
        ModelOptions { activations: ActivationFormat::Bf16, ..ModelOptions::new(Isa::scalar()) };
    let error = load(Arc::new(SoloComm::new()), &options).err().expect("scalar kernels have none");
    assert!(matches!(error, ModelError::NoBf16Dot { rank: 0 }), "{error}");
    let Some(able) = in_bf16() else {
        return eprintln!("not tested with several ranks: this CPU has no AVX512-BF16");
    };
    let unable = ModelOptions { isa: Isa::avx2().expect("AVX2 beside AVX-512"), ..able };
    std::thread::scope(|scope| {
        for comm in ThreadComm::group(3) {
            scope.spawn(move || {
                let options = if comm.rank() == 2 { unable } else { able };
                let error = load(Arc::new(comm), &options).err().expect("rank 2 is not able");
                assert_eq!(
                    error.to_string(),
                    "rank 2 computes without AVX512-BF16, expected it on all ranks for \
                     activations in bf16"
                );
            });
        }
    });
}

#[test]
fn a_rank_with_other_activations_is_named() {
    let bf16 =
        ModelOptions { activations: ActivationFormat::Bf16, ..ModelOptions::new(Isa::scalar()) };
    std::thread::scope(|scope| {
        for comm in ThreadComm::group(2) {
            scope.spawn(move || {
                let options = if comm.rank() == 1 { bf16 } else { ModelOptions::new(bf16.isa) };
                let error = load(Arc::new(comm), &options).err().expect("the ranks differ");
                assert!(matches!(error, ModelError::OtherActivations { rank: 1 }), "{error}");
            });
        }
    });
}
