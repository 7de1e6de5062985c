//! The conformance suite on one rank and on threads.

mod conformance;

use std::thread;

use comm::{SoloComm, ThreadComm};

fn on_threads(size: usize) {
    for check in conformance::checks() {
        let ranks = ThreadComm::group(size).into_iter().map(|comm| {
            let run = move || conformance::run(check, &comm);
            thread::Builder::new().name(format!("rank of '{}'", check.0)).spawn(run).unwrap()
        });
        let failed =
            ranks.collect::<Vec<_>>().into_iter().filter_map(|rank| rank.join().err()).count();
        assert_eq!(failed, 0, "ranks of {size} failed in '{}'", check.0);
    }
}

#[test]
fn solo() {
    for check in conformance::checks() {
        conformance::run(check, &SoloComm::new());
    }
}

#[test]
fn one_thread() {
    on_threads(1);
}

#[test]
fn two_threads() {
    on_threads(2);
}

#[test]
fn three_threads() {
    on_threads(3);
}

#[test]
fn four_threads() {
    on_threads(4);
}

#[test]
fn five_threads() {
    on_threads(5);
}

#[test]
fn seven_threads() {
    on_threads(7);
}
