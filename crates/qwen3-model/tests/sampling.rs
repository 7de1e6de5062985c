//! The sampler: the same tokens on any number of ranks and in any batch, the right distribution,
//! each filter and penalty against a naive reference.

use std::sync::Arc;

use comm::{CommError, Communicator, SoloComm, ThreadComm};
use qwen3_model::sampling::{SampleRow, SampledToken, SamplingError};
use qwen3_model::{Isa, Logits, Sampler, SamplingParams};
use tensor::{Activations, split_range};

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

/// This rank's part of the logits `[rows, vocabulary]`.
fn part(comm: &dyn Communicator, rows: &[Vec<f32>]) -> Logits {
    let vocab = split_range(rows[0].len(), comm.size(), comm.rank());
    let values = rows.iter().flat_map(|row| row[vocab.clone()].to_vec()).collect();
    let values = Activations::from_shape_vec((rows.len(), vocab.len()), values);
    Logits { vocab, values: values.expect("rows of equal width") }
}

/// The first row of the logits, with nothing before it but a prompt.
fn row<'a>(params: &'a SamplingParams, prompt: &'a [u32], step: u64) -> SampleRow<'a> {
    SampleRow { row: 0, params, prompt, generated: &[], step, mask: None, forced: None }
}

/// The part of `allowed` that belongs to the slice of a rank, as bits.
fn mask(comm: &dyn Communicator, vocab_size: usize, allowed: &[u32]) -> Vec<u32> {
    let vocab = split_range(vocab_size, comm.size(), comm.rank());
    let mut words = vec![0; vocab.len().div_ceil(32)];
    for &id in allowed.iter().filter(|id| vocab.contains(&(**id as usize))) {
        let index = id as usize - vocab.start;
        words[index / 32] |= 1 << (index % 32);
    }
    words
}

/// Samples one row on each rank; all ranks have to agree.
fn sample_on(
    ranks: usize,
    logits: &[f32],
    row: SampleRow<'_>,
) -> Result<SampledToken, SamplingError> {
    let rows = [logits.to_vec()];
    let mut found = on_ranks(ranks, |comm| {
        let mut sampler = Sampler::new(logits.len(), comm.clone(), Isa::detect());
        sampler.sample_rows(&part(&*comm, &rows), &[row]).expect("no rank is lost").remove(0)
    });
    let first = found.remove(0);
    assert!(found.iter().all(|other| *other == first), "{first:?}, other ranks {found:?}");
    first
}

/// Samples `steps` times on one rank.
fn tokens(params: &SamplingParams, logits: &[f32], steps: u64, history: &[u32]) -> Vec<u32> {
    draws(row(params, history, 0), logits, steps)
}

/// Samples `row` `steps` times on one rank.
fn draws(row: SampleRow<'_>, logits: &[f32], steps: u64) -> Vec<u32> {
    let comm: Arc<dyn Communicator> = Arc::new(SoloComm::new());
    let mut sampler = Sampler::new(logits.len(), comm.clone(), Isa::detect());
    let all = part(&*comm, &[logits.to_vec()]);
    let mut draw = |step| sampler.sample_rows(&all, &[SampleRow { step, ..row }]);
    (0..steps).map(|step| draw(step).expect("one rank")[0].as_ref().expect("a token").id).collect()
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
        ("plain", base.clone()),
        ("hot", params(2.5)),
        ("top-k", SamplingParams { top_k: 7, ..base.clone() }),
        ("top-k of one", SamplingParams { top_k: 1, ..base.clone() }),
        ("top-k beyond the vocabulary", SamplingParams { top_k: 5000, ..base.clone() }),
        ("top-p", SamplingParams { top_p: 0.8, ..base.clone() }),
        ("top-p, many kept", SamplingParams { top_p: 0.995, temperature: 5.0, ..base.clone() }),
        ("top-p, one kept", SamplingParams { top_p: 1e-6, ..base.clone() }),
        ("min-p", SamplingParams { min_p: 0.05, ..base.clone() }),
        ("min-p of one", SamplingParams { min_p: 1.0, ..base.clone() }),
        ("penalty", SamplingParams { repetition_penalty: 1.8, ..base.clone() }),
        ("penalty below one", SamplingParams { repetition_penalty: 0.6, ..base.clone() }),
        ("top-k and top-p", SamplingParams { top_k: 20, top_p: 0.9, ..base.clone() }),
        ("top-p and min-p", SamplingParams { top_p: 0.95, min_p: 0.1, ..base.clone() }),
        (
            "all",
            SamplingParams {
                top_k: 30,
                top_p: 0.95,
                min_p: 0.02,
                repetition_penalty: 1.3,
                ..base.clone()
            },
        ),
    ];
    for (index, (label, params)) in cases.into_iter().enumerate() {
        let logits = logits(300, index as u32);
        let expected = reference(&params, &logits, &history);
        let drawn = tokens(&params, &logits, 20_000, &history);
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
        .map(|seed| tokens(&SamplingParams { seed, ..params(1.0) }, &logits, 1, &[])[0])
        .collect();
    assert_distribution("seeds", &drawn, &uniform);
    // Pairs of consecutive draws, as one token of 256.
    let drawn = tokens(&params(1.0), &logits, 40_000, &[]);
    let pairs: Vec<_> = drawn.windows(2).step_by(2).map(|pair| pair[0] * 16 + pair[1]).collect();
    let expected: Vec<_> = (0..256).map(|pair| (pair, 1.0 / 256.0)).collect();
    assert_distribution("pairs", &pairs, &expected);
}

/// One variant of every kind of row.
fn variants() -> Vec<SamplingParams> {
    vec![
        params(0.0),
        params(1.1),
        SamplingParams { top_k: 40, ..params(1.5) },
        SamplingParams { top_p: 0.9, ..params(1.0) },
        // Flat enough that the first exchange of candidates does not hold the mass.
        SamplingParams { top_p: 0.98, ..params(20.0) },
        SamplingParams { top_p: 0.999, min_p: 0.01, ..params(9.0) },
        SamplingParams { min_p: 0.02, ..params(1.4) },
        SamplingParams { logprobs: Some(5), ..params(0.0) },
        SamplingParams { logprobs: Some(0), top_p: 0.97, ..params(3.0) },
        SamplingParams {
            top_k: 20,
            top_p: 0.95,
            min_p: 0.01,
            repetition_penalty: 1.2,
            presence_penalty: 0.4,
            frequency_penalty: -0.2,
            logit_bias: vec![(3, 2.0), (1999, 1.5)],
            bad_words: vec![vec![7], vec![5, 11]],
            logprobs: Some(3),
            ..params(0.8)
        },
    ]
}

#[test]
fn the_same_tokens_on_every_number_of_ranks_and_in_any_batch() {
    let steps: Vec<_> = (0..12).map(|step| logits(2003, 100 + step)).collect();
    let variants = variants();
    let allowed: Vec<u32> = (0..2003).filter(|id| id % 3 != 0).collect();
    // Each variant alone on one rank, then all together on several ranks. Every other row has a
    // mask, and the rows take the logits in another order.
    let run = |ranks: usize, members: &[usize]| {
        on_ranks(ranks, |comm| {
            let mut sampler = Sampler::new(2003, comm.clone(), Isa::detect());
            let mask = mask(&*comm, 2003, &allowed);
            let mut answers = vec![Vec::new(); members.len()];
            let mut logprobs = Vec::new();
            for step in 0..steps.len() {
                let order: Vec<_> = (0..members.len()).rev().collect();
                let values: Vec<_> = order
                    .iter()
                    .map(|index| steps[(step + members[*index]) % steps.len()].clone())
                    .collect();
                let rows: Vec<_> = (0..members.len())
                    .map(|index| SampleRow {
                        row: members.len() - 1 - index,
                        params: &variants[members[index]],
                        prompt: &[5],
                        generated: &answers[index],
                        step: step as u64,
                        mask: (members[index] % 2 == 1).then_some(&mask[..]),
                        forced: (step == 7 && members[index] == 8).then_some(900),
                    })
                    .collect();
                let found = sampler.sample_rows(&part(&*comm, &values), &rows).expect("no loss");
                for (answer, found) in answers.iter_mut().zip(found) {
                    let found = found.expect("a token");
                    answer.push(found.id);
                    logprobs.push(found.logprob);
                }
            }
            (answers, logprobs)
        })
    };
    let expected: Vec<_> =
        (0..variants.len()).map(|index| run(1, &[index]).remove(0).0.remove(0)).collect();
    assert_eq!(expected[8][7], 900);
    let all: Vec<_> = (0..variants.len()).collect();
    for ranks in [1, 2, 3, 5] {
        let found = run(ranks, &all);
        for (rank, (answers, logprobs)) in found.iter().enumerate() {
            assert_eq!(answers, &expected, "rank {rank} of {ranks}");
            assert_eq!(logprobs, &found[0].1, "rank {rank} of {ranks}");
        }
    }
}

#[test]
fn penalties_bias_and_exclusions_follow_their_formulas() {
    let base = params(0.7);
    let (prompt, generated) = ([4, 4, 9], [9, 30, 30, 30, 12]);
    let logits = logits(200, 77);
    let allowed: Vec<u32> = (0..200).filter(|id| id % 2 == 0 || *id == 31).collect();
    let word = vec![30, 12, 40];
    let cases = [
        ("presence", SamplingParams { presence_penalty: 1.5, ..base.clone() }),
        ("frequency", SamplingParams { frequency_penalty: 0.6, ..base.clone() }),
        ("negative", SamplingParams { frequency_penalty: -0.5, ..base.clone() }),
        ("bias", SamplingParams { logit_bias: vec![(7, 4.0), (30, -6.0)], ..base.clone() }),
        (
            "too early",
            SamplingParams { min_tokens: 6, stop_token_ids: vec![40, 2], ..base.clone() },
        ),
        ("late", SamplingParams { min_tokens: 5, stop_token_ids: vec![40, 2], ..base.clone() }),
        (
            "bad words",
            SamplingParams { bad_words: vec![word, vec![9, 5], vec![8]], ..base.clone() },
        ),
        (
            "all",
            SamplingParams {
                presence_penalty: 0.3,
                frequency_penalty: 0.2,
                repetition_penalty: 1.3,
                logit_bias: vec![(12, 3.0), (50, 1.0)],
                bad_words: vec![vec![50]],
                ..base.clone()
            },
        ),
    ];
    let slice = mask(&SoloComm::new(), 200, &allowed);
    for (label, params) in cases {
        for mask in [None, Some(&slice[..])] {
            let mut scores: Vec<f32> = logits.clone();
            for (id, score) in (0..).zip(scores.iter_mut()) {
                let count = generated.iter().filter(|other| **other == id).count();
                if count > 0 || prompt.contains(&id) {
                    let penalty = params.repetition_penalty;
                    *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
                }
                if count > 0 {
                    *score -= params.presence_penalty;
                    *score -= params.frequency_penalty * count as f32;
                }
                *score += params
                    .logit_bias
                    .iter()
                    .filter(|(other, _)| *other == id)
                    .map(|b| b.1)
                    .sum::<f32>();
                let early = params.min_tokens > 5 && params.stop_token_ids.contains(&id);
                // The answer ends with 30, 12: of the words, [30, 12, 40] and the single tokens
                // apply, and [9, 5] does not.
                let bad = match label {
                    "bad words" => id == 40 || id == 8,
                    "all" => id == 50,
                    _ => false,
                };
                if early || bad || (mask.is_some() && !allowed.contains(&id)) {
                    *score = f32::NEG_INFINITY;
                }
            }
            let plain =
                SamplingParams { temperature: params.temperature, ..SamplingParams::default() };
            let expected = reference(&plain, &scores, &[]);
            let expected: Vec<_> = expected.into_iter().filter(|(_, p)| *p > 0.0).collect();
            let row = SampleRow { generated: &generated, mask, ..row(&params, &prompt, 0) };
            assert_distribution(label, &draws(row, &logits, 20_000), &expected);
            // The greedy choice, on ranks.
            let greedy = SamplingParams { temperature: 0.0, ..params.clone() };
            for ranks in [1, 3] {
                let found = on_ranks(ranks, |comm| {
                    let slice = self::mask(&*comm, 200, &allowed);
                    let row = SampleRow { params: &greedy, mask: mask.map(|_| &slice[..]), ..row };
                    let mut sampler = Sampler::new(200, comm.clone(), Isa::detect());
                    let found =
                        sampler.sample_rows(&part(&*comm, std::slice::from_ref(&logits)), &[row]);
                    found.expect("no loss").remove(0).expect("a token").id
                });
                assert_eq!(found, vec![expected[0].0; ranks], "{label}");
            }
        }
    }
}

#[test]
fn log_probabilities_are_exact_over_the_split_vocabulary() {
    for (vocab_size, ranks) in [(777, 1), (777, 2), (777, 3), (777, 5), (12, 20)] {
        check_logprobs(vocab_size, ranks);
    }
}

fn check_logprobs(vocab_size: u32, ranks: usize) {
    let logits = logits(vocab_size as usize, 5);
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    let exact: Vec<f64> = logits.iter().map(|logit| f64::from(logit - max) - sum.ln()).collect();
    let mut order: Vec<u32> = (0..vocab_size).collect();
    order.sort_by(|a, b| exact[*b as usize].total_cmp(&exact[*a as usize]).then(a.cmp(b)));
    // Nothing that changes the choice changes the log-probabilities.
    let changed = SamplingParams {
        logprobs: Some(6),
        logit_bias: vec![(order[0], -50.0)],
        repetition_penalty: 1.5,
        ..params(0.3)
    };
    let none = SamplingParams { logprobs: Some(0), ..params(0.0) };
    for (params, forced) in [(&changed, None), (&changed, Some(vocab_size / 2)), (&none, None)] {
        let row = SampleRow { forced, ..row(params, &order[1..2], 3) };
        let found = sample_on(ranks, &logits, row).expect("a token");
        if let Some(forced) = forced {
            assert_eq!(found.id, forced);
        }
        let wanted = params.logprobs.expect("set above");
        let ids: Vec<_> = found.top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, order[..wanted]);
        let chosen = (found.id, found.logprob.expect("asked for"));
        for (id, logprob) in found.top.into_iter().chain([chosen]) {
            // Two ulp of an exponential and one rounding to f32 of values up to 32.
            let distance = (f64::from(logprob) - exact[id as usize]).abs();
            assert!(distance < 4.0 * 16.0 * f64::from(f32::EPSILON), "{id}: {distance:e}");
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
        assert_eq!(sample_on(ranks, &logits, row(&params(0.0), &[], 0)).expect("a token").id, 12);
    }
    // The penalty applies to greedy decoding too, once for each token: 12 and 25 lose, 31 wins.
    let penalized = SamplingParams { repetition_penalty: 1.1, ..params(0.0) };
    assert_eq!(tokens(&penalized, &logits, 1, &[25, 12, 12, 12]), [31]);
    // Twice the penalty would put 12 behind 25.
    logits[31] = 0.0;
    assert_eq!(tokens(&penalized, &logits, 1, &[25, 12, 12]), [12]);
}

#[test]
fn candidates_are_all_that_travels() {
    let vocabulary = 50_000;
    let rows = [logits(vocabulary, 4)];
    let cases = [
        (params(0.0), 2, 16),
        (params(1.0), 2, 16),
        (SamplingParams { top_k: 20, top_p: 0.95, ..params(0.6) }, 2, 320),
        (SamplingParams { min_p: 0.1, ..params(1.0) }, 4, 64),
        // One exchange of candidates and the masses; with a flatter distribution a second one.
        (SamplingParams { top_p: 0.9, ..params(0.2) }, 2, 2 * 8 * (128 + 1)),
        (SamplingParams { top_p: 0.9, ..params(0.5) }, 2, 2 * 8 * (512 + 1)),
        (SamplingParams { logprobs: Some(20), ..params(0.0) }, 2, 2 * 8 * (1 + 2 + 20)),
    ];
    let sent = |ranks, variants: &[&SamplingParams]| {
        on_ranks(ranks, |comm| {
            let mut sampler = Sampler::new(vocabulary, comm.clone(), Isa::detect());
            let rows_of: Vec<_> = variants.iter().map(|params| row(params, &[], 3)).collect();
            sampler.sample_rows(&part(&*comm, &rows), &rows_of).expect("no rank is lost");
            let entries = comm.ledger().entries();
            let bytes = entries.iter().map(|entry| entry.payload_bytes).sum::<u64>();
            (bytes, entries.iter().map(|entry| entry.calls).sum::<u64>())
        })
    };
    for (params, ranks, limit) in &cases {
        let found = sent(*ranks, &[params]);
        assert!(found.iter().all(|(bytes, _)| bytes == limit), "{params:?}: {found:?}");
    }
    // All rows of a step share their exchanges: two of candidates (the second for the flattest
    // distribution), the masses between them, and the log-probabilities.
    let all: Vec<_> = cases.iter().map(|(params, _, _)| params).collect();
    let found = sent(2, &all);
    assert!(found.iter().all(|(_, calls)| *calls == 4), "{found:?}");
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
            SamplingParams { min_p: 0.1, ..params(1.0) },
        ] {
            let error = sample_on(3, &logits, row(&params, &[], 8)).expect_err("a bad logit");
            let rank = index / 34;
            assert_eq!(error, SamplingError::NotFinite { rank, step: 8 }, "{params:?}");
        }
        let scored = SamplingParams { logprobs: Some(1), ..params(0.0) };
        let forced = SampleRow { forced: Some(1), ..row(&scored, &[], 8) };
        let error = sample_on(3, &logits, forced).expect_err("a bad logit");
        assert_eq!(error, SamplingError::NotFinite { rank: index / 34, step: 8 });
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
        let row = row(&params, &[21], 5);
        let error = sample_on(1, &logits, row).expect_err("nothing is possible");
        assert_eq!(error, SamplingError::NoCandidate { step: 5 }, "{params:?}");
        logits[21] = -3.0;
        assert_eq!(sample_on(1, &logits, row).expect("one is").id, 21, "{params:?}");
        logits[21] = f32::NEG_INFINITY;
    }
}

#[test]
fn a_row_without_a_token_does_not_affect_the_others() {
    let rows = [logits(100, 3), vec![f32::NAN; 100], logits(100, 4)];
    let variants = [params(1.0), params(0.0), SamplingParams { top_p: 0.5, ..params(1.0) }];
    let alone: Vec<_> =
        [0, 2].map(|index| sample_on(1, &rows[index], row(&variants[index], &[], 9))).into();
    let found = on_ranks(3, |comm| {
        let mut sampler = Sampler::new(100, comm.clone(), Isa::detect());
        let of = |index| SampleRow { row: index, ..row(&variants[index], &[], 9) };
        let empty = SampleRow { mask: Some(&[]), ..of(2) };
        let rows_of = [of(0), of(1), empty, of(2)];
        sampler.sample_rows(&part(&*comm, &rows), &rows_of).expect("no rank is lost")
    });
    for found in found {
        assert_eq!((&found[0], &found[3]), (&alone[0], &alone[1]));
        assert_eq!(found[1], Err(SamplingError::NotFinite { rank: 0, step: 9 }));
        assert_eq!(found[2], Err(SamplingError::NoCandidate { step: 9 }));
    }
}

#[test]
fn a_lost_rank_is_an_error() {
    let mut group = ThreadComm::group(2);
    let (second, first) = (group.remove(1), group.remove(0));
    second.abort("gone");
    let comm: Arc<dyn Communicator> = Arc::new(first);
    let mut sampler = Sampler::new(4, comm.clone(), Isa::detect());
    let error = sampler
        .sample_rows(&part(&*comm, &[vec![1.0; 4]]), &[row(&params(0.0), &[], 0)])
        .expect_err("the other rank is gone");
    assert!(matches!(error, CommError::PeerFailed { .. }), "{error}");
}
