//! Allreduce and reduce-scatter.

use comm::{Collective, Communicator, CommunicatorExt, Phase, ReduceOp, WIRE_GROUP, WireFormat};

use super::{Check, LENGTHS, assert_sum, same_everywhere, values};

pub const CHECKS: &[Check] = &[
    ("all_reduce adds, with the same bits on every rank", all_reduce_adds),
    ("all_reduce adds in rank order where memory is shared", all_reduce_keeps_rank_order),
    ("all_reduce finds the largest", all_reduce_finds_the_largest),
    ("all_reduce_add adds the sum to the residual", all_reduce_add),
    ("a sum has the same bits in messages of any length", sums_do_not_depend_on_the_message),
    ("calls that follow each other at once stay apart", quick_succession),
    ("reduce_scatter gives each rank its block", reduce_scatter),
    ("narrow wires round no more than they say", narrow_wires),
];

fn all_inputs(comm: &dyn Communicator, round: usize, len: usize) -> Vec<Vec<f32>> {
    (0..comm.size()).map(|rank| values(rank, round, len)).collect()
}

fn all_reduce_adds(comm: &dyn Communicator) {
    // The last one goes over messages in several pieces, of parts too.
    for (round, len) in LENGTHS.into_iter().chain([800_011]).enumerate() {
        let inputs = all_inputs(comm, round, len);
        // Room in front: the slice need not be aligned to more than an element.
        let mut room = vec![f32::NAN; len + 1];
        let buf = &mut room[1..];
        buf.copy_from_slice(&inputs[comm.rank()]);
        comm.all_reduce(buf, ReduceOp::Sum).unwrap();
        assert_sum(buf, &inputs, 0.0);
        assert!(same_everywhere(comm, buf), "ranks disagree at length {len}");
        assert!(room[0].is_nan());
    }
}

fn all_reduce_keeps_rank_order(comm: &dyn Communicator) {
    if comm.transport() == "mpi" {
        return; // Between machines halves of the ranks are added first; the bits are the same all the same.
    }
    for (round, len) in LENGTHS.into_iter().enumerate() {
        let mut expected = values(0, round, len);
        for rank in 1..comm.size() {
            expected.iter_mut().zip(values(rank, round, len)).for_each(|(sum, v)| *sum += v);
        }
        let mut buf = values(comm.rank(), round, len);
        comm.all_reduce(&mut buf, ReduceOp::Sum).unwrap();
        assert_eq!(buf, expected, "at length {len}");
    }
}

fn all_reduce_finds_the_largest(comm: &dyn Communicator) {
    for (round, len) in LENGTHS.into_iter().enumerate() {
        let inputs = all_inputs(comm, round, len);
        let mut buf = inputs[comm.rank()].clone();
        if len > 1 {
            buf[0] = if comm.rank() == 0 { 3.5 } else { f32::NAN };
            buf[1] = if comm.rank().is_multiple_of(2) { -0.0 } else { 0.0 };
        }
        comm.all_reduce(&mut buf, ReduceOp::Max).unwrap();
        for (i, got) in buf.iter().enumerate() {
            let expected = match i {
                0 if len > 1 => 3.5,
                1 => 0.0,
                _ => inputs.iter().fold(f32::MIN, |m, input| m.max(input[i])),
            };
            assert_eq!(*got, expected, "element {i} of {len}");
        }
        assert!(same_everywhere(comm, &buf), "ranks disagree at length {len}");
    }
}

fn all_reduce_add(comm: &dyn Communicator) {
    for (round, len) in LENGTHS.into_iter().enumerate() {
        let partial = values(comm.rank(), round, len);
        let start = values(1000, round, len);
        let mut residual = start.clone();
        comm.all_reduce_add(&partial, &mut residual).unwrap();
        assert_eq!(partial, values(comm.rank(), round, len), "the input stays");
        let mut sum = partial;
        comm.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        for (i, got) in residual.iter().enumerate() {
            assert_eq!(*got, start[i] + sum[i], "element {i} of {len}");
        }
    }
}

/// Nothing but the calls themselves keeps a fast rank from writing what a slow one still reads:
/// here each is now fast, now slow.
fn quick_succession(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    let (mut sum, mut all) = (vec![0.0; 3000], vec![0.0; 500 * size]);
    for round in 0..600 {
        if (round + 5 * rank) % 7 == 0 {
            std::thread::sleep(std::time::Duration::from_micros(1));
        }
        let (value, len) = ((round % 100) as f32, [1, 500, 3000][round % 3]);
        sum[..len].fill(value + rank as f32);
        comm.all_reduce(&mut sum[..len], [ReduceOp::Sum, ReduceOp::Max][round / 3 % 2]).unwrap();
        let last = (size - 1) as f32;
        let expected = [size as f32 * (value + last / 2.0), value + last][round / 3 % 2];
        assert!(sum[..len].iter().all(|sum| *sum == expected), "call {round}");
        if round % 5 == 0 {
            comm.all_gather(&[value - rank as f32; 500], &mut all).unwrap();
            assert!(
                (0..size * 500).all(|i| all[i] == value - (i / 500) as f32),
                "the gather after call {round}"
            );
        }
    }
}

/// A row of whole groups, alone and at any place of a long message.
fn sums_do_not_depend_on_the_message(comm: &dyn Communicator) {
    const WIDTH: usize = 3 * WIRE_GROUP;
    const ROWS: usize = 700;
    let all = values(comm.rank(), 1, ROWS * WIDTH);
    for wire in WireFormat::ALL {
        comm.set_wire(wire);
        let mut alone = all.clone();
        for row in alone.chunks_mut(WIDTH).step_by(37) {
            comm.all_reduce(row, ReduceOp::Sum).unwrap();
        }
        for rows in [2, 75, ROWS] {
            let mut together = all[..rows * WIDTH].to_vec();
            comm.all_reduce(&mut together, ReduceOp::Sum).unwrap();
            let mut residual = vec![1.0; rows * WIDTH];
            comm.all_reduce_add(&all[..rows * WIDTH], &mut residual).unwrap();
            for row in (0..rows).step_by(37) {
                let row = row * WIDTH..(row + 1) * WIDTH;
                assert_eq!(together[row.clone()], alone[row.clone()], "{wire}, {rows} rows");
                assert!(
                    residual[row.clone()].iter().zip(&alone[row]).all(|(r, x)| *r == 1.0 + x),
                    "{wire}, {rows} rows, added"
                );
            }
        }
    }
    comm.set_wire(WireFormat::F32);
}

/// Uneven counts with zeros among them.
fn counts(size: usize, round: usize) -> Vec<usize> {
    (0..size).map(|r| [0, 1, 37, 1000, 9001, 30_000, 3][(r * 3 + round) % 7] * (r + 1)).collect()
}

fn reduce_scatter(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    let all_empty = vec![0; size];
    for (round, counts) in (0..7).map(|round| counts(size, round)).chain([all_empty]).enumerate() {
        let len = counts.iter().sum();
        let start: usize = counts[..rank].iter().sum();
        let mut recv = vec![f32::NAN; counts[rank]];
        comm.reduce_scatter(&values(rank, round, len), &counts, &mut recv).unwrap();
        let inputs: Vec<Vec<f32>> = (0..size)
            .map(|r| values(r, round, len)[start..start + counts[rank]].to_vec())
            .collect();
        assert_sum(&recv, &inputs, 0.0);
    }
}

fn narrow_wires(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    for (wire, step) in [(WireFormat::Bf16, 1.0 / 256.0), (WireFormat::Q8, 0.501 / 127.0)] {
        comm.set_wire(wire);
        for (round, len) in LENGTHS.into_iter().enumerate() {
            let inputs = all_inputs(comm, round, len);
            let mut buf = inputs[rank].clone();
            comm.ledger().set_phase(Phase::Decode);
            comm.ledger().reset();
            comm.all_reduce(&mut buf, ReduceOp::Sum).unwrap();
            let entry = comm.ledger().entries()[0];
            assert_eq!((entry.collective, entry.phase), (Collective::Allreduce, Phase::Decode));
            assert_eq!(entry.payload_bytes, wire.encoded_bytes(len) as u64);
            comm.ledger().set_phase(Phase::Other);
            assert_sum(&buf, &inputs, if size == 1 { 0.0 } else { step });
            assert!(same_everywhere(comm, &buf), "ranks disagree at length {len} as {wire}");

            let mut exact = inputs[rank].clone();
            comm.ledger().reset();
            comm.all_reduce(&mut exact, ReduceOp::ExactSum).unwrap();
            assert_eq!(comm.ledger().entries()[0].payload_bytes, 4 * len as u64);
            assert_sum(&exact, &inputs, 0.0);

            let mut residual = vec![1.0; len];
            comm.all_reduce_add(&inputs[rank], &mut residual).unwrap();
            assert!(residual.iter().zip(&buf).all(|(sum, value)| *sum == 1.0 + value));

            let counts: Vec<usize> = (0..size)
                .map(|r| if r == 0 { len - len / size * (size - 1) } else { len / size })
                .collect();
            let start: usize = counts[..rank].iter().sum();
            let mut recv = vec![f32::NAN; counts[rank]];
            comm.ledger().reset();
            comm.reduce_scatter(&inputs[rank], &counts, &mut recv).unwrap();
            // Blocks are encoded each by itself.
            let bytes: usize = counts.iter().map(|&count| wire.encoded_bytes(count)).sum();
            assert_eq!(comm.ledger().entries()[0].payload_bytes, bytes as u64);
            let exact = |i: usize| inputs.iter().map(|input| input[start + i] as f64).sum::<f64>();
            // Groups begin where a rank's block begins: the bound takes the largest value of all.
            let largest = inputs.iter().flatten().fold(0.0, |m: f64, v| m.max(v.abs() as f64));
            for (i, got) in recv.iter().enumerate() {
                let bound = size as f64 * step * largest + 1e-3;
                assert!((*got as f64 - exact(i)).abs() <= bound, "element {i} as {wire}");
            }
            // The maximum travels as it is.
            let mut max = vec![1.0 / 3.0 + rank as f32];
            comm.all_reduce(&mut max, ReduceOp::Max).unwrap();
            assert_eq!(max, [1.0 / 3.0 + (size - 1) as f32]);
        }
    }
    comm.set_wire(WireFormat::F32);
}
