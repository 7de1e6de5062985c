//! The sampler: the same tokens on any number of ranks, the right distribution, each filter against
//! a naive reference.

use std::sync::Arc;

use comm::{CommError, Communicator, SoloComm, ThreadComm};
use qwen3_model::{GenerationConfig, Isa, Sample, Sampler, SamplingError, SamplingParams};
use tensor::split_range;

fn params(temperature: f32) -> SamplingParams {
    SamplingParams { temperature, seed: 11, ..SamplingParams::default() }
}

/// Reproducible logits with a spread like a language model's.
fn logits(count: usize, seed: u32) -> Vec<f32> {
    let mut state = u64::from(seed) * 2 + 1;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (uniform() + uniform() + uniform() - 1.5) * 8.0).collect()
}

/// Runs `job` on each of `ranks` threads and returns what each rank returned.
fn on_ranks<T: Send>(ranks: usize, job: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let group = ThreadComm::group(ranks).into_iter();
        let threads: Vec<_> = group.map(|comm| scope.spawn(|| job(Arc::new(comm)))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// Samples on a rank that owns its part of the vocabulary.
fn sample_part(
    sampler: &mut Sampler,
    comm: &dyn Communicator,
    logits: &[f32],
    step: u64,
    history: &[u32],
    stop: bool,
) -> Result<Sample, SamplingError> {
    let vocab = split_range(logits.len(), comm.size(), comm.rank());
    sampler.sample(vocab.clone(), &logits[vocab], step, history, stop)
}

/// Samples `steps` times on one rank.
fn tokens(params: SamplingParams, logits: &[f32], steps: u64, history: &[u32]) -> Vec<u32> {
    let mut sampler = Sampler::new(params, logits.len(), Arc::new(SoloComm::new()), Isa::detect())
        .expect("valid parameters");
    let all = 0..logits.len();
    (0..steps)
        .map(|step| sampler.sample(all.clone(), logits, step, history, false).expect("a token").id)
        .collect()
}

/// The tokens that the filters keep and their probabilities, computed naively in f64.
fn reference(params: &SamplingParams, logits: &[f32], history: &[u32]) -> Vec<(u32, f64)> {
    let mut scores: Vec<(u32, f64)> =
        (0..).zip(logits.iter().map(|&logit| f64::from(logit))).collect();
    for (id, score) in &mut scores {
        if history.contains(id) {
            let penalty = f64::from(params.repetition_penalty);
            *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
        }
        *score /= f64::from(params.temperature);
    }
    scores.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let softmax = |scores: &[(u32, f64)]| -> Vec<(u32, f64)> {
        let sum: f64 = scores.iter().map(|(_, score)| (score - scores[0].1).exp()).sum();
        scores.iter().map(|&(id, score)| (id, (score - scores[0].1).exp() / sum)).collect()
    };
    if params.top_k > 0 {
        scores.truncate(params.top_k);
    }
    if params.top_p < 1.0 {
        let (mut before, mut kept) = (0.0, 0);
        for (_, probability) in softmax(&scores) {
            if before >= f64::from(params.top_p) {
                break;
            }
            (before, kept) = (before + probability, kept + 1);
        }
        scores.truncate(kept.max(1));
    }
    if params.min_p > 0.0 {
        let probabilities = softmax(&scores);
        let least = f64::from(params.min_p) * probabilities[0].1;
        scores.truncate(probabilities.iter().take_while(|(_, p)| *p >= least).count().max(1));
    }
    softmax(&scores)
}

/// Pearson's statistic against its 99.99 % quantile (Wilson & Hilferty's approximation); rare
/// tokens are pooled.
fn assert_distribution(label: &str, drawn: &[u32], expected: &[(u32, f64)]) {
    for id in drawn {
        assert!(
            expected.iter().any(|(kept, _)| kept == id),
            "{label}: token {id} should have been filtered"
        );
    }
    let total = drawn.len() as f64;
    let (mut statistic, mut cells) = (0.0, 0);
    let (mut rare_found, mut rare_expected) = (0.0, 0.0);
    let mut cell = |found: f64, expected: f64| {
        statistic += (found - expected).powi(2) / expected;
        cells += 1;
    };
    for (id, probability) in expected {
        let found = drawn.iter().filter(|drawn| *drawn == id).count() as f64;
        if probability * total < 8.0 {
            (rare_found, rare_expected) = (rare_found + found, rare_expected + probability * total);
        } else {
            cell(found, probability * total);
        }
    }
    if rare_expected >= 8.0 {
        cell(rare_found, rare_expected);
    }
    if cells < 2 {
        return;
    }
    let freedom = f64::from(cells - 1);
    let spread = 2.0 / (9.0 * freedom);
    let limit = freedom * (1.0 - spread + 3.719 * spread.sqrt()).powi(3);
    assert!(
        statistic < limit,
        "{label}: chi-square {statistic:.1}, expected below {limit:.1} for {freedom} degrees"
    );
}

#[test]
fn draws_follow_the_filtered_distribution() {
    let history = [3, 3, 17, 200];
    let base = params(0.9);
    let cases = [
        ("plain", base),
        ("hot", params(2.5)),
        ("top-k", SamplingParams { top_k: 7, ..base }),
        ("top-k of one", SamplingParams { top_k: 1, ..base }),
        ("top-k beyond the vocabulary", SamplingParams { top_k: 5000, ..base }),
        ("top-p", SamplingParams { top_p: 0.8, ..base }),
        ("top-p, many kept", SamplingParams { top_p: 0.995, temperature: 5.0, ..base }),
        ("top-p, one kept", SamplingParams { top_p: 1e-6, ..base }),
        ("min-p", SamplingParams { min_p: 0.05, ..base }),
        ("min-p of one", SamplingParams { min_p: 1.0, ..base }),
        ("penalty", SamplingParams { repetition_penalty: 1.8, ..base }),
        ("penalty below one", SamplingParams { repetition_penalty: 0.6, ..base }),
        ("top-k and top-p", SamplingParams { top_k: 20, top_p: 0.9, ..base }),
        ("top-p and min-p", SamplingParams { top_p: 0.95, min_p: 0.1, ..base }),
        (
            "all",
            SamplingParams { top_k: 30, top_p: 0.95, min_p: 0.02, repetition_penalty: 1.3, ..base },
        ),
    ];
    for (index, (label, params)) in cases.into_iter().enumerate() {
        let logits = logits(300, index as u32);
        let expected = reference(&params, &logits, &history);
        let drawn = tokens(params, &logits, 20_000, &history);
        assert_distribution(label, &drawn, &expected);
        // Where only a few are kept, all of them turn up: the filter keeps no fewer than the
        // reference.
        for (id, probability) in expected.iter().filter(|(_, probability)| *probability > 1e-3) {
            assert!(
                drawn.contains(id),
                "{label}: token {id} of probability {probability} was never drawn"
            );
        }
    }
}

#[test]
fn different_seeds_and_steps_draw_independently() {
    let logits = vec![0.0; 16];
    let uniform: Vec<_> = (0..16).map(|id| (id, 1.0 / 16.0)).collect();
    // One step under many seeds is as random as many steps under one seed.
    let drawn: Vec<_> = (0..8000)
        .map(|seed| tokens(SamplingParams { seed, ..params(1.0) }, &logits, 1, &[])[0])
        .collect();
    assert_distribution("seeds", &drawn, &uniform);
    // Pairs of consecutive draws, as one token of 256.
    let drawn = tokens(params(1.0), &logits, 40_000, &[]);
    let pairs: Vec<_> = drawn.windows(2).step_by(2).map(|pair| pair[0] * 16 + pair[1]).collect();
    let expected: Vec<_> = (0..256).map(|pair| (pair, 1.0 / 256.0)).collect();
    assert_distribution("pairs", &pairs, &expected);
}

#[test]
fn the_same_tokens_on_every_number_of_ranks() {
    let variants = [
        params(0.0),
        params(1.1),
        SamplingParams { top_k: 40, ..params(1.5) },
        SamplingParams { top_p: 0.9, ..params(1.0) },
        // Flat enough that the first round of candidates does not hold the mass.
        SamplingParams { top_p: 0.98, ..params(20.0) },
        SamplingParams { top_p: 0.999, min_p: 0.01, ..params(9.0) },
        SamplingParams { min_p: 0.02, ..params(1.4) },
        SamplingParams {
            top_k: 20,
            top_p: 0.95,
            min_p: 0.01,
            repetition_penalty: 1.2,
            ..params(0.8)
        },
    ];
    let logits: Vec<_> = (0..12).map(|step| logits(2003, 100 + step)).collect();
    for params in variants {
        let run = |ranks| {
            on_ranks(ranks, |comm| {
                let mut sampler = Sampler::new(params, 2003, comm.clone(), Isa::detect())
                    .expect("valid parameters");
                let mut history = vec![5];
                for (step, logits) in logits.iter().enumerate() {
                    let found =
                        sample_part(&mut sampler, &*comm, logits, step as u64, &history, false);
                    history.push(found.expect("a token").id);
                }
                history
            })
        };
        let expected = run(1).remove(0);
        for ranks in [2, 3, 5] {
            for (rank, found) in run(ranks).iter().enumerate() {
                assert_eq!(found, &expected, "rank {rank} of {ranks}, {params:?}");
            }
        }
    }
}

#[test]
fn greedy_takes_the_lowest_of_equal_ids() {
    let mut logits = vec![0.0; 40];
    for id in [31, 12, 25] {
        logits[id] = 2.5;
    }
    for ranks in [1, 2, 3, 5, 50] {
        let found = on_ranks(ranks, |comm| {
            let mut sampler = Sampler::new(params(0.0), 40, comm.clone(), Isa::detect())
                .expect("valid parameters");
            sample_part(&mut sampler, &*comm, &logits, 0, &[], false).expect("a token").id
        });
        assert_eq!(found, vec![12; ranks]);
    }
    // The penalty applies to greedy decoding too, once for each token: 12 and 25 lose, 31 wins.
    let penalized = SamplingParams { repetition_penalty: 1.1, ..params(0.0) };
    assert_eq!(tokens(penalized, &logits, 1, &[25, 12, 12, 12]), [31]);
    // Twice the penalty would put 12 behind 25.
    logits[31] = 0.0;
    assert_eq!(tokens(penalized, &logits, 1, &[25, 12, 12]), [12]);
}

#[test]
fn candidates_are_all_that_travels() {
    let vocabulary = 50_000;
    let logits = logits(vocabulary, 4);
    for (params, ranks, limit) in [
        (params(0.0), 2, 16),
        (params(1.0), 2, 16),
        (SamplingParams { top_k: 20, top_p: 0.95, ..params(0.6) }, 2, 320),
        (SamplingParams { min_p: 0.1, ..params(1.0) }, 4, 64),
        // One round of candidates and the masses; with a flatter distribution a second round.
        (SamplingParams { top_p: 0.9, ..params(0.2) }, 2, 2 * 8 * (128 + 1)),
        (SamplingParams { top_p: 0.9, ..params(0.5) }, 2, 2 * 8 * (512 + 1)),
    ] {
        let bytes = on_ranks(ranks, |comm| {
            let mut sampler = Sampler::new(params, vocabulary, comm.clone(), Isa::detect())
                .expect("valid parameters");
            sample_part(&mut sampler, &*comm, &logits, 3, &[], false).expect("a token");
            comm.ledger().entries().iter().map(|entry| entry.payload_bytes).sum::<u64>()
        });
        assert_eq!(bytes, vec![limit; ranks], "{params:?}");
    }
}

#[test]
fn one_rank_stops_all_in_the_same_step() {
    let logits = logits(100, 1);
    for params in [
        params(0.0),
        SamplingParams { top_k: 5, ..params(1.0) },
        SamplingParams { top_p: 0.9, ..params(1.0) },
    ] {
        let found = on_ranks(3, |comm| {
            let mut sampler =
                Sampler::new(params, 100, comm.clone(), Isa::detect()).expect("valid parameters");
            let stops = |step| step == 2 && comm.rank() == 0;
            let mut sample = |step| {
                sample_part(&mut sampler, &*comm, &logits, step, &[], stops(step))
                    .expect("a token")
                    .stop
            };
            [sample(1), sample(2), sample(3)]
        });
        assert_eq!(found, vec![[false, true, false]; 3]);
    }
}

#[test]
fn invalid_logits_fail_on_every_rank() {
    for (index, bad) in [(37, f32::NAN), (70, f32::INFINITY)] {
        let mut logits = logits(100, 2);
        logits[index] = bad;
        for params in [
            params(0.0),
            params(1.0),
            SamplingParams { top_k: 5, ..params(1.0) },
            SamplingParams { top_p: 0.9, ..params(1.0) },
        ] {
            let found = on_ranks(3, |comm| {
                let mut sampler = Sampler::new(params, 100, comm.clone(), Isa::detect())
                    .expect("valid parameters");
                sample_part(&mut sampler, &*comm, &logits, 8, &[], false)
            });
            for result in found {
                let error = result.expect_err("a logit is invalid");
                let expected = index / 34;
                assert!(
                    matches!(error, SamplingError::NotFinite { rank, step: 8 } if rank == expected),
                    "{params:?}: {error}"
                );
            }
        }
    }
}

#[test]
fn excluded_tokens() {
    let mut logits = vec![f32::NEG_INFINITY; 30];
    for params in [
        params(0.0),
        params(1.0),
        SamplingParams { top_k: 5, ..params(1.0) },
        SamplingParams { top_p: 0.9, ..params(1.0) },
        SamplingParams { min_p: 0.5, ..params(1.0) },
    ] {
        let mut sampler = Sampler::new(params, 30, Arc::new(SoloComm::new()), Isa::detect())
            .expect("valid parameters");
        let error = sampler.sample(0..30, &logits, 5, &[], false).expect_err("nothing is possible");
        assert!(matches!(error, SamplingError::NoCandidate { step: 5 }), "{params:?}: {error}");
        logits[21] = -3.0;
        assert_eq!(
            sampler.sample(0..30, &logits, 5, &[21], false).expect("one is").id,
            21,
            "{params:?}"
        );
        logits[21] = f32::NEG_INFINITY;
    }
}

#[test]
fn a_lost_rank_is_an_error() {
    let mut group = ThreadComm::group(2);
    let (second, first) = (group.remove(1), group.remove(0));
    second.abort("gone");
    let mut sampler =
        Sampler::new(params(0.0), 4, Arc::new(first), Isa::detect()).expect("valid parameters");
    let error = sampler.sample(0..4, &[1.0; 4], 0, &[], false).expect_err("the other rank is gone");
    assert!(matches!(error, SamplingError::Comm(CommError::PeerFailed { .. })), "{error}");
}

#[test]
fn parameters_are_checked() {
    let base = params(1.0);
    for (name, params) in [
        ("temperature", SamplingParams { temperature: -0.1, ..base }),
        ("temperature", SamplingParams { temperature: f32::NAN, ..base }),
        ("temperature", SamplingParams { temperature: f32::INFINITY, ..base }),
        ("top_p", SamplingParams { top_p: 0.0, ..base }),
        ("top_p", SamplingParams { top_p: 1.01, ..base }),
        ("top_p", SamplingParams { top_p: f32::NAN, ..base }),
        ("min_p", SamplingParams { min_p: -0.1, ..base }),
        ("min_p", SamplingParams { min_p: 1.1, ..base }),
        ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..base }),
        ("repetition_penalty", SamplingParams { repetition_penalty: f32::INFINITY, ..base }),
    ] {
        let error = Sampler::new(params, 10, Arc::new(SoloComm::new()), Isa::detect())
            .err()
            .expect("out of range");
        assert!(
            matches!(&error, SamplingError::Parameter { name: found, .. } if *found == name),
            "{error}"
        );
        assert!(
            error.to_string().starts_with(&format!("sampling parameter {name} is ")),
            "{error}"
        );
    }
}

#[test]
fn recommended_parameters() {
    let config = GenerationConfig {
        do_sample: Some(true),
        temperature: Some(0.6),
        top_k: Some(20),
        top_p: Some(0.95),
        ..GenerationConfig::default()
    };
    let found = SamplingParams::recommended(&config, None, 9);
    assert_eq!((found.temperature, found.top_k, found.top_p, found.seed), (0.6, 20, 0.95, 9));
    // Hugging Face's default; of its own accord nobody samples.
    assert_eq!(
        SamplingParams::recommended(&GenerationConfig { top_k: None, ..config.clone() }, None, 9)
            .top_k,
        50
    );
    let greedy = GenerationConfig { do_sample: Some(false), top_k: None, ..config };
    assert_eq!(SamplingParams::recommended(&greedy, None, 0).temperature, 0.0);
    let nothing = GenerationConfig::default();
    assert_eq!(SamplingParams::recommended(&nothing, None, 0), SamplingParams::default());
    // Whoever has it sample all the same samples as it does.
    for config in [&greedy, &nothing] {
        let found = SamplingParams::recommended(config, Some(0.8), 9);
        assert_eq!((found.temperature, found.top_k), (0.8, 50));
    }
    assert_eq!(SamplingParams::recommended(&nothing, Some(0.0), 0), SamplingParams::default());
}
