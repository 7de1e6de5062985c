//! What every communicator does, whatever carries its data: one suite for all of them.
//!
//! Each check runs on all ranks of a group at once and asserts. All data come from a generator that
//! every rank can run for every other rank, so that each knows what it has to get.

mod groups;
mod sums;
mod transfers;

use std::time::Duration;

use comm::{Communicator, CommunicatorExt};

/// A name and what to run on every rank.
pub type Check = (&'static str, fn(&dyn Communicator));

/// The whole suite.
pub fn checks() -> Vec<Check> {
    [sums::CHECKS, transfers::CHECKS, groups::CHECKS].concat()
}

/// Runs one check on this rank's end of a group; no check may outlast its deadline by much.
pub fn run(check: Check, comm: &dyn Communicator) {
    comm.set_timeout(Duration::from_secs(30));
    (check.1)(comm);
}

/// Lengths around the borders of groups of 32, blocks of 1024, one-shot sums, and chunks.
const LENGTHS: [usize; 17] =
    [0, 1, 2, 5, 31, 32, 33, 100, 1023, 1024, 1025, 4097, 8192, 21_845, 65_536, 70_001, 300_007];

/// The input of `rank` in round `round`: of mixed sign and size, so that the order of additions
/// shows.
fn values(rank: usize, round: usize, len: usize) -> Vec<f32> {
    let mut state =
        (rank as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (round as u64) << 20 | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let mantissa = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            mantissa * [1.0, 64.0, 1.0 / 64.0, 1024.0][(state & 3) as usize]
        })
        .collect()
}

fn bytes(rank: usize, round: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + rank * 31 + round * 17 + (i >> 8)) as u8).collect()
}

/// Whether every rank holds the same bits.
fn same_everywhere(comm: &dyn Communicator, values: &[f32]) -> bool {
    let digest = values.iter().fold(0xcbf2_9ce4_8422_2325, |digest: u64, value| {
        (digest ^ value.to_bits() as u64).wrapping_mul(0x0100_0000_01b3)
    });
    comm.all_gather_one(digest).unwrap().iter().all(|&other| other == digest)
}

/// Fails where `got` is further from the exact sum than rounding explains: with `ranks - 1`
/// additions in any order the error is below `(ranks - 1) * epsilon * sum of absolute values`, plus
/// `step` for what the wire rounds (relative to the largest absolute value seen at that place or in
/// its group).
fn assert_sum(got: &[f32], inputs: &[Vec<f32>], step: f64) {
    for (i, got) in got.iter().enumerate() {
        let group = i / 32 * 32..got_end(i, inputs[0].len());
        let exact: f64 = inputs.iter().map(|input| input[i] as f64).sum();
        let total: f64 = inputs.iter().map(|input| input[i].abs() as f64).sum();
        let mut bound = inputs.len() as f64 * f32::EPSILON as f64 * total;
        if step > 0.0 {
            let largest = |input: &Vec<f32>| {
                input[group.clone()].iter().fold(0.0, |largest: f64, v| largest.max(v.abs() as f64))
            };
            // Each input is rounded, and once or twice the sum, which is at most the sum of the
            // largest.
            bound += 4.0 * step * inputs.iter().map(largest).sum::<f64>();
        }
        let error = (*got as f64 - exact).abs();
        assert!(
            error <= bound,
            "element {i} is {got}, expected {exact}: off by {error:e} > {bound:e}"
        );
    }
}

fn got_end(i: usize, len: usize) -> usize {
    (i / 32 * 32 + 32).min(len)
}
