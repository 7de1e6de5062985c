//! Split, the ledger, and calls of all kinds in a row.

use std::thread;
use std::time::Duration;

use comm::{Collective, Communicator, CommunicatorExt, Phase, ReduceOp};

use super::{Check, bytes, same_everywhere, values};

pub const CHECKS: &[Check] = &[
    ("rank and size are consistent", identity),
    ("split forms groups by color, ordered by key", split),
    ("a machine's ranks have its number", machine),
    ("groups of groups work, and outlive their parents", nested),
    ("the ledger counts calls, bytes and waiting", ledger),
    ("calls of all kinds follow each other", in_a_row),
];

fn identity(comm: &dyn Communicator) {
    assert!(comm.rank() < comm.size());
    assert!(["solo", "threads", "mpi"].contains(&comm.transport()));
    assert!((1..=comm.size()).contains(&comm.machines()));
    let mut ranks = vec![usize::MAX; comm.size()];
    comm.all_gather(&[comm.rank()], &mut ranks).unwrap();
    assert!(ranks.iter().copied().eq(0..comm.size()));
}

fn split(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    for colors in 1..=3 {
        let color = rank % colors;
        // Falling keys: the order in the group is the reverse.
        let part = comm.split(color, size - rank).unwrap();
        let members: Vec<usize> = (0..size).rev().filter(|r| r % colors == color).collect();
        assert_eq!(part.size(), members.len());
        assert_eq!(members[part.rank()], rank);
        assert_eq!(part.transport(), comm.transport());
        let mut sum = vec![rank as f32, 1.0];
        part.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        assert_eq!(sum, [members.iter().sum::<usize>() as f32, members.len() as f32]);
        let mut gathered = vec![0; members.len()];
        part.all_gather(&[rank], &mut gathered).unwrap();
        assert_eq!(gathered, members);
        let mut big = values(rank, colors, 100_000);
        part.all_reduce(&mut big, ReduceOp::Sum).unwrap();
        assert!(same_everywhere(&*part, &big));
        // Equal keys: the order of the parent.
        let same = comm.split(color, 0).unwrap();
        assert_eq!(same.rank(), rank / colors);
        comm.barrier().unwrap();
    }
}

fn machine(comm: &dyn Communicator) {
    let mut all = comm.all_gather_one(comm.machine()).unwrap();
    let here = comm.split(comm.machine(), 0).unwrap();
    assert_eq!((here.machines(), here.machine()), (1, comm.machine()));
    assert_eq!(here.size(), all.iter().filter(|&&machine| machine == comm.machine()).count());
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), comm.machines());
}

fn nested(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    let halves = comm.split(rank % 2, rank).unwrap();
    let quarters = halves.split(halves.rank() % 2, 0).unwrap();
    drop(halves);
    let members: Vec<usize> = (0..size).filter(|r| r % 4 == rank % 4).collect();
    assert_eq!((quarters.rank(), quarters.size()), (rank / 4, members.len()));
    let mut buf = bytes(members[0], 0, 300_000);
    if quarters.rank() != 0 {
        buf.fill(0);
    }
    quarters.broadcast(0, &mut buf).unwrap();
    assert!(buf == bytes(members[0], 0, 300_000));
    let alone = comm.split(rank, 0).unwrap();
    assert_eq!((alone.rank(), alone.size(), alone.machines()), (0, 1, 1));
    let mut one = [3.0];
    alone.all_reduce_add(&[4.0], &mut one).unwrap();
    assert_eq!(one, [7.0]);
}

fn ledger(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    let ledger = comm.ledger();
    comm.barrier().unwrap();
    ledger.reset();
    ledger.set_phase(Phase::Prefill);
    comm.all_reduce(&mut [0.0; 100], ReduceOp::Sum).unwrap();
    comm.all_reduce_add(&[0.0; 100], &mut [0.0; 100]).unwrap();
    comm.all_gather(&[0u16; 3], &mut vec![0u16; 3 * size]).unwrap();
    comm.all_gather_v(&[0u8; 2], &vec![2; size], &mut vec![0u8; 2 * size]).unwrap();
    comm.reduce_scatter(&vec![0.0; size], &vec![1; size], &mut [0.0]).unwrap();
    comm.broadcast(0, &mut [0u64; 2]).unwrap();
    comm.send_recv((rank + 1) % size, &[1u8; 5], (rank + size - 1) % size, &mut [0; 5]).unwrap();
    ledger.set_phase(Phase::Load);
    // A group's calls stand in the same ledger.
    let part = comm.split(0, rank).unwrap();
    part.barrier().unwrap();
    ledger.set_phase(Phase::Other);
    let lines: Vec<_> = ledger
        .entries()
        .iter()
        .map(|e| (e.phase, e.collective, e.calls, e.payload_bytes))
        .collect();
    let gathered = |bytes: usize| (size * bytes) as u64;
    let expected = [
        (Phase::Load, Collective::Barrier, 1, 0),
        (Phase::Load, Collective::Split, 1, 0),
        (Phase::Prefill, Collective::Allreduce, 2, 800),
        (Phase::Prefill, Collective::Allgather, 1, gathered(6)),
        (Phase::Prefill, Collective::Allgatherv, 1, gathered(2)),
        (Phase::Prefill, Collective::ReduceScatter, 1, gathered(4)),
        (Phase::Prefill, Collective::Broadcast, 1, 16),
        (Phase::Prefill, Collective::Send, 1, 5),
        (Phase::Prefill, Collective::Recv, 1, 5),
    ];
    assert_eq!(lines, expected);
    assert!(ledger.entries().iter().all(|e| e.wait_seconds <= e.seconds));

    // Whoever comes early waits; whoever comes last does not.
    let late = Duration::from_millis(400);
    comm.barrier().unwrap();
    ledger.reset();
    if rank == size - 1 {
        thread::sleep(late);
    }
    comm.all_reduce(&mut [1.0; 8], ReduceOp::Sum).unwrap();
    let entry = ledger.entries()[0];
    assert_eq!(entry.collective, Collective::Allreduce);
    let waited_long = entry.wait_seconds > late.as_secs_f64() / 2.0;
    assert_eq!(
        waited_long,
        rank != size - 1,
        "rank {rank} of {size} waited {} s",
        entry.wait_seconds
    );
}

fn in_a_row(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    let mut state = 12345u32;
    let mut random = |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % below
    };
    for round in 0..400 {
        let len = [0, 1, 64, 1000, 5000, 40_000][random(6)] + random(3);
        match random(7) {
            0 | 1 => {
                let mut buf: Vec<f32> = (0..len).map(|i| (i % 100 + rank) as f32).collect();
                comm.all_reduce(&mut buf, ReduceOp::Sum).unwrap();
                let ranks = size * (size - 1) / 2;
                assert!(
                    (0..len).all(|i| buf[i] == (i % 100 * size + ranks) as f32),
                    "round {round}"
                );
            }
            2 => {
                let mut recv = vec![0; len * size];
                comm.all_gather(&bytes(rank, round, len), &mut recv).unwrap();
                assert!(
                    (0..size).all(|r| recv[r * len..][..len] == bytes(r, round, len)),
                    "round {round}"
                );
            }
            3 => {
                let root = random(size);
                let mut buf = if rank == root { bytes(root, round, len) } else { vec![0; len] };
                comm.broadcast(root, &mut buf).unwrap();
                assert!(buf == bytes(root, round, len), "round {round}");
            }
            4 => {
                let mut recv = vec![0.0; len];
                let send: Vec<f32> = (0..len * size).map(|i| (i % 50 + rank) as f32).collect();
                comm.reduce_scatter(&send, &vec![len; size], &mut recv).unwrap();
                let ranks = size * (size - 1) / 2;
                let expected = |i: usize| ((rank * len + i) % 50 * size + ranks) as f32;
                assert!((0..len).all(|i| recv[i] == expected(i)), "round {round}");
            }
            5 => {
                let (to, from) = ((rank + 1) % size, (rank + size - 1) % size);
                let mut recv = vec![0; len];
                comm.send_recv(to, &bytes(rank, round, len), from, &mut recv).unwrap();
                assert!(recv == bytes(from, round, len), "round {round}");
            }
            _ => comm.barrier().unwrap(),
        }
    }
}
