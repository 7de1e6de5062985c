//! Every reference case on every strategy, attention algorithm, schedule and instruction set, on 1
//! to 5 ranks as threads.

mod cases;
mod suite;
mod traffic;

use std::sync::Arc;

use cases::CASES;
use qwen3_model::ModelSource;
use qwen3_model::comm::{Communicator, EmulatedComm, Link, ThreadComm, WireFormat};
use qwen3_model::options::WeightFormat;
use qwen3_model::{Isa, LogitRows, Model, ModelOptions, ParallelStrategy, Sequence};

fn check_ranks(
    reference: &suite::Reference,
    ranks: usize,
    what: &suite::Combination,
    over: impl Fn(ThreadComm) -> Arc<dyn Communicator> + Sync,
) {
    std::thread::scope(|scope| {
        for comm in ThreadComm::group(ranks) {
            scope.spawn(|| reference.check(over(comm), what));
        }
    });
}

fn check_all(case: &str) {
    check(case, &suite::isas(), &[None, Some(WeightFormat::F32)]);
}

fn check(case: &str, isas: &[Isa], weights: &[Option<WeightFormat>]) {
    let reference = suite::Reference::read(case);
    for ranks in 1..=5 {
        for &isa in isas {
            for &weights in weights {
                for what in suite::combinations(&reference, ranks, isa, weights, 1 + ranks % 2) {
                    check_ranks(&reference, ranks, &what, |comm| Arc::new(comm));
                    if what.goes_in_halves() && ranks > 1 {
                        check_ranks(&reference, ranks, &what, |comm| {
                            let free = Link::from_us_gb_s(0.0, 1e6);
                            Arc::new(
                                EmulatedComm::new(Arc::new(comm), free, 2)
                                    .expect("two nodes of ranks"),
                            )
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn dense_tied_bf16() {
    check_all("dense-tied-bf16");
}

#[test]
fn dense_untied_f32() {
    check_all("dense-untied-f32");
}

#[test]
fn dense_uneven_bf16() {
    check_all("dense-uneven-bf16");
}

#[test]
fn dense_sharded_f16() {
    check_all("dense-sharded-f16");
}

#[test]
fn dense_yarn_bf16() {
    check_all("dense-yarn-bf16");
}

#[test]
fn moe_bf16() {
    check_all("moe-bf16");
}

#[test]
fn hybrid_bundled() {
    check(suite::HYBRIDS[0], &suite::isas(), &[None]);
}

#[test]
fn hybrids_beside_the_workspace() {
    for case in &suite::HYBRIDS[1..] {
        if cases::folder(case).is_dir() {
            check(case, &[Isa::detect(), Isa::scalar()], &[None]);
        } else {
            eprintln!("{case} is not checked: {} is absent", cases::folder(case).display());
        }
    }
}

/// What shorter sums cost: the contract for ranks on several machines, whose default is bf16, is
/// 1e-2 of the largest logit. Q8 does not keep it, and where experts are chosen it may choose
/// others; it is there for those who ask for it.
#[test]
fn sums_in_bf16_keep_logits_within_a_hundredth() {
    for (wire, cases, most) in
        [(WireFormat::Bf16, &CASES[..], 1e-2), (WireFormat::Q8, &CASES[..5], 5e-2)]
    {
        let mut worst = 0.0f32;
        for case in cases {
            let reference = suite::Reference::read(case);
            for ranks in 2..=5 {
                for strategy in [ParallelStrategy::Heads, ParallelStrategy::Sequence] {
                    let options = ModelOptions { strategy, ..ModelOptions::new(suite::isas()[0]) };
                    let distances = std::thread::scope(|scope| {
                        let ranks = ThreadComm::group(ranks).into_iter().map(|comm| {
                            comm.set_wire(wire);
                            scope.spawn(|| {
                                let model = Model::load(
                                    &ModelSource::open(&reference.folder).expect("a model"),
                                    Arc::new(comm),
                                    &options,
                                    &|_| (),
                                )
                                .unwrap();
                                let mut cache = Sequence::new(&model, reference.input_ids.len())
                                    .expect("memory");
                                let mut rows = Vec::new();
                                // Two passes: of split positions, those of the second meet keys on
                                // all ranks.
                                for part in reference
                                    .input_ids
                                    .chunks(reference.input_ids.len().div_ceil(2))
                                {
                                    let logits =
                                        cache.forward(&model, part, LogitRows::All).unwrap();
                                    rows.extend_from_slice(
                                        model.gather_logits(&logits).unwrap().as_slice().unwrap(),
                                    );
                                }
                                reference.distance(&rows)
                            })
                        });
                        let ranks: Vec<_> = ranks.collect();
                        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
                    });
                    println!(
                        "{case} {strategy} {ranks} ranks, wire {}: {:.1e}",
                        wire.name(),
                        distances[0]
                    );
                    for distance in distances {
                        assert!(
                            distance <= most,
                            "{case} {strategy} {ranks} ranks, {wire:?}: {distance}"
                        );
                        worst = worst.max(distance);
                    }
                }
            }
        }
        println!("worst with wire {}: {worst:.1e}", wire.name());
        assert!(
            worst > 1e-4,
            "{wire:?}: {worst} is no more than rounding of f32: nothing was shortened"
        );
    }
}
