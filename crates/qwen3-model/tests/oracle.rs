//! Every reference case on every strategy, attention algorithm, schedule and instruction set, on 1 to 5 ranks as threads.

mod suite;

use std::sync::Arc;

use qwen3_model::WeightFormat;
use qwen3_model::comm::ThreadComm;

fn check_all(case: &str) {
    let reference = suite::Reference::read(case);
    for ranks in 1..=5 {
        for isa in suite::isas() {
            for weights in [None, Some(WeightFormat::F32)] {
                for what in suite::combinations(reference.mixture, ranks, isa, weights, 1 + ranks % 2) {
                    std::thread::scope(|scope| {
                        for comm in ThreadComm::group(ranks) {
                            scope.spawn(|| reference.check(Arc::new(comm), &what));
                        }
                    });
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
