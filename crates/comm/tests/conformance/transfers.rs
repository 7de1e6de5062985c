//! Gather, broadcast, messages, barrier.

use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comm::{Communicator, CommunicatorExt};

use super::{Check, bytes, values};

pub const CHECKS: &[Check] = &[
    ("all_gather puts blocks in rank order", all_gather),
    ("all_gather_v takes any counts", all_gather_v),
    ("broadcast works from every root", broadcast),
    ("messages of any size keep their order", messages),
    ("all ranks may send and receive at once", exchange),
    ("nobody leaves a barrier early", barrier),
];

/// Bytes: none, one, odd ones, around a chunk, and many chunks.
const SIZES: [usize; 9] = [0, 1, 7, 4096, 32_767, 32_769, 131_072, 131_073, 1_500_001];

fn all_gather(comm: &dyn Communicator) {
    for (round, len) in SIZES.into_iter().enumerate() {
        let mut recv = vec![0xee; len * comm.size()];
        comm.all_gather_bytes(&bytes(comm.rank(), round, len), &mut recv).unwrap();
        for rank in 0..comm.size() {
            assert!(
                recv[rank * len..][..len] == bytes(rank, round, len),
                "block {rank} of {len} bytes"
            );
        }
    }
    let mut ids = vec![0u32; 2 * comm.size()];
    comm.all_gather(&[comm.rank() as u32, 7], &mut ids).unwrap();
    assert!(ids.chunks(2).enumerate().all(|(rank, pair)| pair == [rank as u32, 7]));
}

fn all_gather_v(comm: &dyn Communicator) {
    let size = comm.size();
    for round in 0..9 {
        let counts: Vec<usize> =
            (0..size).map(|r| [0, 3, 70_001, 1, 0, 512][(r + round) % 6]).collect();
        let mut recv = vec![f32::NAN; counts.iter().sum()];
        let send = values(comm.rank(), round, counts[comm.rank()]);
        comm.all_gather_v(&send, &counts, &mut recv).unwrap();
        let expected: Vec<f32> = (0..size).flat_map(|r| values(r, round, counts[r])).collect();
        assert!(recv == expected, "round {round}, counts {counts:?}");
    }
    let nothing: [u8; 0] = [];
    comm.all_gather_v(&nothing, &vec![0; size], &mut []).unwrap();
}

fn broadcast(comm: &dyn Communicator) {
    for (round, len) in SIZES.into_iter().enumerate() {
        for root in 0..comm.size() {
            let expected = bytes(root, round, len);
            let mut buf = if comm.rank() == root { expected.clone() } else { vec![0xee; len] };
            comm.broadcast(root, &mut buf).unwrap();
            assert!(buf == expected, "{len} bytes from root {root}");
        }
    }
}

fn messages(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    if size == 1 {
        return;
    }
    // Everyone to everyone, in an order in which one of the two always receives.
    for low in 0..size {
        for high in low + 1..size {
            for (from, to) in [(low, high), (high, low)] {
                for (round, len) in SIZES.into_iter().enumerate() {
                    if rank == from {
                        comm.send(to, &bytes(from, round, len)).unwrap();
                    } else if rank == to {
                        let mut buf = vec![0xee; len];
                        comm.recv(from, &mut buf).unwrap();
                        assert!(buf == bytes(from, round, len), "{len} bytes from {from} to {to}");
                    }
                }
            }
        }
    }
    // Messages from two ranks do not mix: the receiver chooses.
    if size >= 3 {
        match rank {
            0 => {
                let mut got = [0u32; 4];
                for i in 0..2 {
                    comm.recv(2, &mut got[2 * i..2 * i + 1]).unwrap();
                    comm.recv(1, &mut got[2 * i + 1..2 * i + 2]).unwrap();
                }
                assert_eq!(got, [20, 10, 21, 11]);
            }
            1 | 2 => {
                for i in 0..2 {
                    comm.send(0, &[10 * rank as u32 + i]).unwrap();
                }
            }
            _ => {}
        }
    }
}

fn exchange(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    for (round, len) in SIZES.into_iter().enumerate() {
        for shift in 0..size {
            let (to, from) = ((rank + shift) % size, (rank + size - shift) % size);
            // Each rank's message has its own length, but a rank knows what its neighbour sends.
            let length = |rank: usize| len + if shift == 0 { 0 } else { rank };
            let mut recv = vec![0xee; length(from)];
            comm.send_recv(to, &bytes(rank, round, length(rank)), from, &mut recv).unwrap();
            assert!(recv == bytes(from, round, length(from)), "{len} bytes, shift {shift}");
        }
    }
}

fn barrier(comm: &dyn Communicator) {
    // The ranks of a test share a clock, as threads and as processes.
    let now = || {
        SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock past 1970").as_micros() as u64
    };
    for late in 0..comm.size() {
        if comm.rank() == late {
            thread::sleep(Duration::from_millis(40));
        }
        let came = now();
        comm.barrier().unwrap();
        let left = now();
        let all = comm.all_gather_one(came).unwrap();
        assert!(
            all.iter().all(|came| *came <= left),
            "left at {left}, before {late} or another came: {all:?}"
        );
    }
}
