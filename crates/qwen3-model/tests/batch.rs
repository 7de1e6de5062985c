//! Passes over several sequences: each gets what it gets alone, and batches that do not fit are
//! refused.

use std::path::Path;
use std::sync::Arc;

use comm::ThreadComm;
use qwen3_model::ModelSource;
use qwen3_model::batch::BatchError;
use qwen3_model::options::KvFormat;
use qwen3_model::presets::Preset;
use qwen3_model::synth::{SynthOptions, synthesize};
use qwen3_model::{
    Batch, Isa, Model, ModelError, ModelOptions, Output, PAGE_POSITIONS, PageId, ParallelStrategy,
    Span, Wanted,
};

/// The numeric contract, relative to the largest logit.
const TOLERANCE: f32 = 2e-4;
/// Pages of each rank's arena.
const PAGES: usize = 24;

fn folder(preset: Preset) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    // The fourth layer of a hybrid model is the first with attention.
    let layers = if preset == Preset::TinyHybrid { 4 } else { 2 };
    let options = SynthOptions { preset, layers: Some(layers), seed: 5 };
    synthesize(folder.path(), &options, &mut |_| ()).expect("written");
    folder
}

fn on_ranks<T: Send>(
    dir: &Path,
    ranks: usize,
    options: ModelOptions,
    job: impl Fn(&Model) -> T + Sync,
) -> Vec<T> {
    let run = |comm: ThreadComm| {
        job(&Model::load(
            &ModelSource::open(dir).expect("a model"),
            Arc::new(comm),
            &options,
            &|_| (),
        )
        .expect("the model loads"))
    };
    std::thread::scope(|scope| {
        let group = ThreadComm::group(ranks).into_iter();
        let threads: Vec<_> = group.map(|comm| scope.spawn(|| run(comm))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// Token `index` of a sequence.
fn token(sequence: usize, index: usize) -> u32 {
    ((index * 31 + sequence * 57 + index * index % 13) % 500) as u32
}

/// Page i of a sequence of a job whose positions `ranks` ranks split: each sequence has its own
/// block of pages on each rank, in descending order.
fn pages(sequence: usize, positions: usize, ranks: usize) -> Vec<PageId> {
    let page = |index: usize| PageId((sequence * 4 + 3 - index / ranks) as u32);
    (0..positions.div_ceil(PAGE_POSITIONS)).map(page).collect()
}

/// A batch in which each of `spans`, a sequence and its positions, wants its last row's logits and
/// its first row's hidden state (its logits where it is the last row, too).
fn batch(spans: &[(usize, std::ops::Range<usize>)], ranks: usize) -> Batch {
    let mut batch = Batch::default();
    for (sequence, positions) in spans {
        let first = batch.tokens.len();
        batch.tokens.extend(positions.clone().map(|index| token(*sequence, index)));
        let last = positions.len() - 1;
        let hidden = (last > 0).then_some((0, Wanted::Hidden));
        batch.spans.push(Span {
            sequence: *sequence as u64,
            start: positions.start,
            tokens: first..batch.tokens.len(),
            pages: pages(*sequence, positions.end, ranks),
            slot: *sequence,
            first_rank: sequence % ranks,
            generated: positions.len() == 1,
            wanted: hidden.into_iter().chain([(last, Wanted::Logits)]).collect(),
        });
    }
    batch
}

/// Rows of logits, and of hidden states.
type Rows = (Vec<Vec<f32>>, Vec<Vec<f32>>);

/// The wanted rows of passes over such batches.
fn run(model: &Model, ranks: usize, passes: &[&[(usize, std::ops::Range<usize>)]]) -> Vec<Rows> {
    let mut arena = model.new_arena(PAGES, PAGES).expect("memory");
    let mut workspace = model.new_workspace();
    let pass = |spans: &&[(usize, std::ops::Range<usize>)]| {
        let batch = batch(spans, ranks);
        let Output { logits, hidden } =
            model.forward(&mut arena, &batch, &mut workspace).expect("a pass");
        let logits = model.gather_logits(&logits).expect("all ranks");
        let rows = |of: ndarray::Array2<f32>| of.outer_iter().map(|row| row.to_vec()).collect();
        (rows(logits), rows(hidden))
    };
    passes.iter().map(pass).collect()
}

fn assert_close(found: &[f32], expected: &[f32], label: &str) {
    let most = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    assert_eq!(found.len(), expected.len(), "{label}");
    assert!(most > 0.0, "{label}");
    for (found, expected) in found.iter().zip(expected) {
        let off = (found - expected).abs();
        assert!(off <= TOLERANCE * most, "{label}: {found}, expected {expected} of {most}");
    }
}

#[test]
fn sequences_get_together_what_they_get_alone() {
    // Chunks of prompts and single tokens; sequences that pause; pages that fill.
    let passes: &[&[(usize, std::ops::Range<usize>)]] = &[
        &[(0, 0..120), (1, 0..1), (2, 0..5)],
        &[(1, 1..2), (0, 120..121), (2, 5..6)],
        &[(3, 0..200), (0, 121..130), (1, 2..3)],
        &[(0, 130..131), (1, 3..4), (2, 6..7), (3, 200..201), (4, 0..1)],
        &[(4, 1..270)],
        &[(4, 270..271), (3, 201..202)],
    ];
    let grid = |tp, sp| (tp * sp, ParallelStrategy::Grid { tp, sp });
    let splits = [
        (1, ParallelStrategy::Heads),
        (2, ParallelStrategy::Heads),
        (3, ParallelStrategy::Heads),
        (2, ParallelStrategy::Sequence),
        (3, ParallelStrategy::Sequence),
        (5, ParallelStrategy::Sequence),
        grid(2, 2),
        grid(2, 3),
        grid(3, 2),
    ];
    for preset in [Preset::Tiny, Preset::TinyMoe, Preset::TinyHybrid] {
        let folder = folder(preset);
        let expected = on_ranks(folder.path(), 1, ModelOptions::new(Isa::scalar()), |model| {
            let alone = |spans: &&[(usize, std::ops::Range<usize>)]| {
                let of = |(sequence, positions): &(usize, std::ops::Range<usize>)| {
                    // All of the sequence at once.
                    let whole = [(*sequence, 0..positions.end)];
                    let mut logits = run(model, 1, &[&whole]).pop().expect("a pass").0;
                    let hidden = (positions.len() > 1).then(|| {
                        let first =
                            [(*sequence, 0..positions.start), (*sequence, positions.clone())];
                        let first = if positions.start == 0 { &first[1..] } else { &first[..] };
                        let passes: Vec<_> = first.iter().map(std::slice::from_ref).collect();
                        run(model, 1, &passes).pop().expect("a pass").1.remove(0)
                    });
                    (logits.remove(0), hidden)
                };
                spans.iter().map(of).collect::<Vec<_>>()
            };
            passes.iter().map(alone).collect::<Vec<_>>()
        });
        for (ranks, strategy) in splits {
            let (_, sp) = strategy.grid(ranks);
            if preset == Preset::TinyHybrid && sp > 1 {
                continue;
            }
            let options = ModelOptions {
                strategy,
                threads: 1 + ranks % 2,
                ..ModelOptions::new(Isa::detect())
            };
            for found in on_ranks(folder.path(), ranks, options, |model| run(model, sp, passes)) {
                for ((spans, found), expected) in passes.iter().zip(found).zip(&expected[0]) {
                    let label = format!("{preset}, {ranks} ranks, {strategy}, {spans:?}");
                    let (logits, hidden): (Vec<_>, Vec<_>) = expected.iter().cloned().unzip();
                    assert_eq!(found.0.len(), logits.len(), "{label}");
                    for (found, expected) in found.0.iter().zip(&logits) {
                        assert_close(found, expected, &label);
                    }
                    let hidden: Vec<_> = hidden.into_iter().flatten().collect();
                    assert_eq!(found.1.len(), hidden.len(), "{label}");
                    for (found, expected) in found.1.iter().zip(&hidden) {
                        assert_close(found, expected, &label);
                    }
                }
            }
        }
    }
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let folder = folder(Preset::Tiny);
    on_ranks(folder.path(), 1, ModelOptions::new(Isa::detect()), |model| {
        let mut arena = model.new_arena(PAGES, 0).expect("memory");
        let mut workspace = model.new_workspace();
        let good = || batch(&[(1, 0..3), (2, 0..1)], 1);
        let mut fails = |change: &dyn Fn(&mut Batch)| {
            let mut batch = good();
            change(&mut batch);
            match model.forward(&mut arena, &batch, &mut workspace) {
                Err(ModelError::Batch(error)) => error,
                other => panic!("expected a refused batch, found {other:?}"),
            }
        };
        let vocab_size = model.config().vocab_size;
        assert_eq!(
            fails(&|batch| batch.tokens[3] = vocab_size as u32),
            BatchError::TokenOutOfRange {
                sequence: 2,
                index: 0,
                id: vocab_size as u32,
                vocab_size
            }
        );
        for tokens in [3..3, 2..4, 3..9, 0..1] {
            assert_eq!(
                fails(&|batch| batch.spans[1].tokens = tokens.clone()),
                BatchError::Tokens { sequence: 2, found: tokens.clone(), expected: 3, tokens: 4 }
            );
        }
        assert_eq!(
            fails(&|batch| batch.tokens.push(1)),
            BatchError::Rest { found: 4, expected: 5 }
        );
        let context_length = model.config().context_length();
        assert_eq!(
            fails(&|batch| batch.spans[0].start = context_length),
            BatchError::Context { sequence: 1, end: context_length + 3, context_length }
        );
        assert_eq!(
            fails(&|batch| batch.spans[0].start = usize::MAX),
            BatchError::Context { sequence: 1, end: usize::MAX, context_length }
        );
        assert_eq!(
            fails(&|batch| batch.spans[0].start = 126),
            BatchError::Pages { sequence: 1, found: 1, expected: 2, end: 129 }
        );
        let page = PageId(PAGES as u32);
        assert_eq!(
            fails(&|batch| batch.spans[1].pages[0] = page),
            BatchError::NoSuchPage { sequence: 2, index: 0, page, pages: PAGES }
        );
        assert_eq!(
            fails(&|batch| batch.spans[1].first_rank = 1),
            BatchError::FirstRank { sequence: 2, found: 1, ranks: 1 }
        );
        let page = good().spans[0].pages[0];
        assert_eq!(
            fails(&|batch| batch.spans[1].pages[0] = page),
            BatchError::SharedPage { sequence: 2, page, other: 1 }
        );
        // Also where the other one only reads it, or the same sequence has it twice.
        assert_eq!(
            fails(&|batch| {
                batch.spans[1].start = PAGE_POSITIONS;
                batch.spans[1].pages.insert(0, page);
            }),
            BatchError::SharedPage { sequence: 1, page, other: 2 }
        );
        assert_eq!(
            fails(&|batch| batch.spans[0].pages.push(page)),
            BatchError::SharedPage { sequence: 1, page, other: 1 }
        );
        for wanted in [vec![(3, Wanted::Logits)], vec![(1, Wanted::Logits), (1, Wanted::Hidden)]] {
            let index = wanted[0].0;
            assert_eq!(
                fails(&|batch| batch.spans[0].wanted = wanted.clone()),
                BatchError::Wanted { sequence: 1, index, tokens: 3 }
            );
        }
        let other = ModelOptions { kv: KvFormat::F16, ..ModelOptions::new(Isa::detect()) };
        let found = on_ranks(folder.path(), 1, other, |model| {
            let mut arena = model.new_arena(PAGES, 0).expect("memory");
            let bytes = arena.pages.page_bytes();
            (model.page_bytes() == bytes).then_some(()).expect("the model's own pages");
            arena.pages.copy_page(PageId(0), PageId(1));
            bytes
        })[0];
        let mut arena =
            on_ranks(folder.path(), 1, other, |model| model.new_arena(PAGES, 0).expect("memory"));
        let error = model.forward(&mut arena[0], &good(), &mut workspace);
        let expected = BatchError::Arena { found, expected: model.page_bytes() };
        assert!(matches!(error, Err(ModelError::Batch(error)) if error == expected));
        assert!(matches!(model.new_arena(usize::MAX / 2, 0), Err(ModelError::Memory(_))));

        // Nothing was computed, and the workspace is as good as new. No tokens are a batch too.
        let output =
            model.forward(&mut model.new_arena(PAGES, 0).expect("memory"), &good(), &mut workspace);
        assert_eq!(output.expect("a good batch").logits.values.nrows(), 2);
        let mut arena = model.new_arena(0, 0).expect("nothing");
        let output = model.forward(&mut arena, &Batch::default(), &mut workspace);
        assert_eq!(output.expect("an empty batch").logits.values.dim(), (0, vocab_size));
    });
}

/// The slots of recurrent states, and states of other tokens than those before a span.
#[test]
fn states_that_do_not_fit_are_refused() {
    let folder = folder(Preset::TinyHybrid);
    on_ranks(folder.path(), 1, ModelOptions::new(Isa::detect()), |model| {
        let mut arena = model.new_arena(PAGES, 3).expect("memory");
        let mut workspace = model.new_workspace();
        let mut forward = |batch: &Batch| match model.forward(&mut arena, batch, &mut workspace) {
            Ok(_) => None,
            Err(ModelError::Batch(error)) => Some(error),
            Err(error) => panic!("{error}"),
        };
        let error = BatchError::NoSuchSlot { sequence: 3, found: 3, slots: 3 };
        assert_eq!(forward(&batch(&[(3, 0..2)], 1)), Some(error));
        let mut shared = batch(&[(1, 0..2), (2, 0..2)], 1);
        shared.spans[1].slot = 1;
        let error = BatchError::SharedSlot { sequence: 2, slot: 1, other: 1 };
        assert_eq!(forward(&shared), Some(error));
        assert_eq!(forward(&batch(&[(1, 0..5)], 1)), None);
        let error = BatchError::States { sequence: 1, slot: 1, found: Some(5), expected: 4 };
        assert_eq!(forward(&batch(&[(1, 4..6)], 1)), Some(error.clone()));
        assert!(error.to_string().contains("have seen 5 tokens, expected the 4"), "{error}");
        assert_eq!(forward(&batch(&[(1, 5..6)], 1)), None);
        // A first token begins again.
        assert_eq!(forward(&batch(&[(1, 0..2)], 1)), None);
    });
}

#[test]
fn a_hybrid_model_splits_no_positions() {
    let folder = folder(Preset::TinyHybrid);
    let strategy = ParallelStrategy::Sequence;
    let options = ModelOptions { strategy, ..ModelOptions::new(Isa::detect()) };
    std::thread::scope(|scope| {
        let folder = folder.path();
        for comm in ThreadComm::group(2) {
            scope.spawn(move || {
                let source = ModelSource::open(folder).expect("a model");
                let error = Model::load(&source, Arc::new(comm), &options, &|_| ()).err();
                let text = error.expect("refused").to_string();
                assert!(text.contains("expected ranks that split heads only"), "{text}");
            });
        }
    });
}
