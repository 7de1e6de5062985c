//! The collectives of ranks that share memory: threads of a process, or processes of a machine.
//!
//! Small sums are formed in one shot: everyone writes its input, everyone meets, everyone adds all
//! inputs in rank order. Large ones go in chunks; two ranks stay with the one shot, which moves as
//! few bytes as anything could, more ranks each add one part of a chunk and gather the parts at the
//! next meeting, so that a chunk costs one meeting, and one more at the end.

use std::ops::Range;
use std::sync::Arc;
#[cfg(feature = "mpi")]
use std::sync::atomic::AtomicU64;

use crate::call::{Call, Header, Site};
use crate::communicator::ReduceOp;
use crate::error::CommError;
use crate::exchange::{self, Exchange, OUTBOX, RESULT};
use crate::ledger::Collective;
use crate::mail::{self, Incoming, Mail, Outgoing, WrongLength};
use crate::segment::Segment;
use crate::transport::{Collectives, Counts, Reduction, Step, carry};
use crate::wire::{Fold, WIRE_GROUP, WireFormat};

/// One shot while all inputs but the own and one more are at most this long: what reading
/// everything costs over reading a part is then less than a second meeting.
const ONE_SHOT: usize = 32 << 10;
/// Bytes of a chunk of a one-shot sum, of a gather and of a broadcast: it stays in the cache
/// nearest to the cores.
const CHUNK: usize = 128 << 10;
/// Elements that are added up before the next are looked at; they stay in the first-level cache.
pub(crate) const BLOCK: usize = 1024;

/// One rank's end of a group in shared memory.
pub(crate) struct Group {
    exchange: Exchange,
    mail: Mail,
    /// What this rank put into its outbox, where it has to look at it once more.
    own: Vec<u8>,
}

/// Bytes of words and of data in the segment of a group of `size` ranks.
pub(crate) fn extent(size: usize) -> (usize, usize) {
    let (meetings, rings) = (exchange::extent(size), mail::extent(size));
    (meetings.0 + rings.0, meetings.1 + rings.1)
}

/// The largest number of elements, in whole groups, whose encoding fits into `bytes`.
pub(crate) fn elements(wire: WireFormat, bytes: usize) -> usize {
    bytes / wire.encoded_bytes(WIRE_GROUP) * WIRE_GROUP
}

/// `0..len` in steps of `step`; one empty step where there is nothing, since ranks meet all the
/// same.
pub(crate) fn steps(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len.div_ceil(step).max(1)).map(move |i| i * step..len.min((i + 1) * step))
}

/// Part `index` of `range`, cut into whole groups of elements, the first parts one longer.
pub(crate) fn part(range: &Range<usize>, parts: usize, index: usize) -> Range<usize> {
    let groups = range.len().div_ceil(WIRE_GROUP);
    let cut = |i: usize| {
        let before = groups / parts * i + i.min(groups % parts);
        range.start + (before * WIRE_GROUP).min(range.len())
    };
    cut(index)..cut(index + 1)
}

impl Group {
    /// The end of `rank`; each can be taken once. The segment is zeroed and laid out by [`extent`].
    pub(crate) fn new(segment: Arc<Segment>, rank: usize, size: usize) -> Group {
        let exchange = Exchange::new(segment.clone(), rank, size);
        let mail = Mail::new(segment, exchange::extent(size), rank, size);
        Group { exchange, mail, own: Vec::new() }
    }

    pub(crate) fn rank(&self) -> usize {
        self.exchange.rank()
    }

    pub(crate) fn size(&self) -> usize {
        self.exchange.size()
    }

    /// Where this rank counts what it moves for the others from elsewhere.
    #[cfg(feature = "mpi")]
    pub(crate) fn progress(&self) -> &AtomicU64 {
        self.exchange.progress()
    }

    fn one_shot(&mut self, call: &mut Call<'_>, data: Reduction<'_>) -> Result<(), CommError> {
        let Reduction { input, output, op, wire } = data;
        let (rank, size) = (self.rank(), self.size());
        for chunk in steps(output.len(), elements(wire, CHUNK)) {
            let input = input.map(|input| &input[chunk.clone()]);
            let output = &mut output[chunk];
            let outbox = self.exchange.outbox();
            wire.encode(input.unwrap_or(output), outbox);
            // The sum of two is the same in either order, and the own input is at hand.
            let plain = size == 2 && wire == WireFormat::F32 && op == ReduceOp::Sum;
            if !plain {
                // A copy, since to look at the outbox itself would take its lines back from the
                // rank that reads them.
                self.own.clear();
                self.own.extend_from_slice(&outbox[..wire.encoded_bytes(output.len())]);
            }
            let met = self.exchange.meet(call)?;
            if plain {
                let other = met.outbox(1 - rank);
                match input {
                    None => wire.decode(other, output, Fold::Add),
                    Some(own) => add_sum(output, own, other),
                }
            } else {
                let of = |peer| if peer == rank { &self.own[..] } else { met.outbox(peer) };
                fold_all(wire, op, size, of, output, input.is_some());
            }
        }
        Ok(())
    }

    fn two_shots(&mut self, call: &mut Call<'_>, data: Reduction<'_>) -> Result<(), CommError> {
        let Reduction { input, output, op, wire } = data;
        let (rank, size) = (self.rank(), self.size());
        let room = OUTBOX.min((RESULT - wire.encoded_bytes(WIRE_GROUP)) * size);
        let add = input.is_some();
        let mut previous: Option<Range<usize>> = None;
        let chunks = steps(output.len(), elements(wire, room)).map(Some);
        for chunk in chunks.chain([None]) {
            let at = |chunk: &Range<usize>, index: usize| wire.encoded_bytes(index - chunk.start);
            if let Some(chunk) = &chunk {
                let outbox = self.exchange.outbox();
                for peer in (0..size).filter(|&peer| peer != rank) {
                    let part = part(chunk, size, peer);
                    let start = at(chunk, part.start);
                    wire.encode(&input.unwrap_or(output)[part], &mut outbox[start..]);
                }
            }
            let mut met = self.exchange.meet(call)?;
            if let Some(chunk) = &chunk {
                let mine = part(chunk, size, rank);
                let start = at(chunk, mine.start);
                let (outbox, result) = met.outboxes_and_result();
                for block in steps(mine.len(), BLOCK) {
                    let mut sum = [0.0; BLOCK];
                    let sum = &mut sum[..block.len()];
                    let place = mine.start + block.start..mine.start + block.end;
                    let skip = start + wire.encoded_bytes(block.start);
                    let own = &input.unwrap_or(output)[place.clone()];
                    fold_block(wire, op, (rank, own), size, |peer| &outbox(peer)[skip..], sum);
                    let result = &mut result[wire.encoded_bytes(block.start)..];
                    wire.encode(sum, result);
                    let last = if add { Fold::Add } else { Fold::Set };
                    wire.decode(result, &mut output[place], last);
                }
            }
            if let Some(chunk) = &previous {
                for peer in (0..size).filter(|&peer| peer != rank) {
                    let last = if add { Fold::Add } else { Fold::Set };
                    let values = &mut output[part(chunk, size, peer)];
                    wire.decode(met.previous_result(peer), values, last);
                }
            }
            previous = chunk;
        }
        Ok(())
    }

    /// Moves a message on.
    pub(crate) fn push(&self, message: &mut Outgoing<'_>) -> Step {
        let before = message.chunks;
        let done = self.mail.push(message);
        Step { moved: message.chunks != before, done }
    }

    /// Moves a message on that `site` expects from its rank `peer`.
    pub(crate) fn pull(
        &self,
        site: Site<'_>,
        peer: usize,
        message: &mut Incoming<'_>,
    ) -> Result<Step, CommError> {
        let before = message.chunks;
        match self.mail.pull(message) {
            Ok(done) => Ok(Step { moved: message.chunks != before, done }),
            Err(WrongLength(length)) => {
                Err(site.mismatch(peer, Header::new(Collective::Send, length).words()))
            }
        }
    }
}

impl Collectives for Group {
    fn all_reduce(&mut self, call: &mut Call<'_>, data: Reduction<'_>) -> Result<(), CommError> {
        let others = self.size() - 2;
        if others * data.wire.encoded_bytes(data.len()) <= ONE_SHOT {
            self.one_shot(call, data)
        } else {
            self.two_shots(call, data)
        }
    }

    fn reduce_scatter(
        &mut self,
        call: &mut Call<'_>,
        send: &[f32],
        counts: &[usize],
        recv: &mut [f32],
        wire: WireFormat,
    ) -> Result<(), CommError> {
        let (rank, size) = (self.rank(), self.size());
        let room = OUTBOX / size;
        let largest = counts.iter().copied().max().unwrap_or(0);
        for step in steps(largest, elements(wire, room)) {
            let cut = |count: usize| step.start.min(count)..step.end.min(count);
            let outbox = self.exchange.outbox();
            let mut start = 0;
            let mut own: &[f32] = &[];
            for (peer, &count) in counts.iter().enumerate() {
                let values = &send[start..start + count][cut(count)];
                if peer == rank {
                    own = values;
                } else {
                    wire.encode(values, &mut outbox[peer * room..]);
                }
                start += count;
            }
            let met = self.exchange.meet(call)?;
            let recv = &mut recv[cut(counts[rank])];
            for block in steps(recv.len(), BLOCK) {
                let skip = rank * room + wire.encoded_bytes(block.start);
                let others = |peer| &met.outbox(peer)[skip..];
                fold_block(
                    wire,
                    ReduceOp::Sum,
                    (rank, &own[block.clone()]),
                    size,
                    others,
                    &mut recv[block],
                );
            }
        }
        Ok(())
    }

    fn all_gather(
        &mut self,
        call: &mut Call<'_>,
        send: &[u8],
        counts: Counts<'_>,
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        let (rank, size) = (self.rank(), self.size());
        let start = counts.start(rank);
        recv[start..start + send.len()].copy_from_slice(send);
        for step in steps(counts.largest(), CHUNK) {
            let cut = |count: usize| step.start.min(count)..step.end.min(count);
            let own = &send[cut(send.len())];
            self.exchange.outbox()[..own.len()].copy_from_slice(own);
            let met = self.exchange.meet(call)?;
            let mut start = 0;
            for peer in 0..size {
                let count = counts.of(peer);
                if peer != rank {
                    let into = &mut recv[start..start + count][cut(count)];
                    into.copy_from_slice(&met.outbox(peer)[..into.len()]);
                }
                start += count;
            }
        }
        Ok(())
    }

    fn broadcast(
        &mut self,
        call: &mut Call<'_>,
        root: usize,
        buf: &mut [u8],
    ) -> Result<(), CommError> {
        for step in steps(buf.len(), CHUNK) {
            let part = &mut buf[step];
            if root == self.rank() {
                self.exchange.outbox()[..part.len()].copy_from_slice(part);
            }
            let met = self.exchange.meet(call)?;
            if root != met.rank() {
                part.copy_from_slice(&met.outbox(root)[..part.len()]);
            }
        }
        Ok(())
    }

    fn barrier(&mut self, call: &mut Call<'_>) -> Result<(), CommError> {
        self.exchange.meet(call).map(drop)
    }

    fn send_recv(
        &mut self,
        call: &mut Call<'_>,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, &mut [u8])>,
    ) -> Result<(), CommError> {
        let out = send.map(|(to, data)| (to, Way::Out(Outgoing { to, data, chunks: 0 })));
        let into = recv.map(|(from, data)| (from, Way::In(Incoming { from, data, chunks: 0 })));
        carry(call, out.into_iter().chain(into).collect(), |site, way| match way {
            Way::Out(message) => Ok(self.push(message)),
            Way::In(message) => self.pull(site, message.from, message),
        })
    }
}

/// A message out or in.
enum Way<'a> {
    Out(Outgoing<'a>),
    In(Incoming<'a>),
}

/// How the input of the `index`-th rank joins those before it.
fn fold(op: ReduceOp, index: usize) -> Fold {
    match op {
        _ if index == 0 => Fold::Set,
        ReduceOp::Sum | ReduceOp::ExactSum => Fold::Add,
        ReduceOp::Max => Fold::Max,
    }
}

/// Combines a block of the inputs of all ranks in rank order: `own` is that of this rank, with its
/// number, and is rounded as if it had travelled; those of the others are encoded. All start at a
/// multiple of [`WIRE_GROUP`].
pub(crate) fn fold_block<'a>(
    wire: WireFormat,
    op: ReduceOp,
    own: (usize, &[f32]),
    size: usize,
    other: impl Fn(usize) -> &'a [u8],
    sum: &mut [f32],
) {
    for peer in 0..size {
        if peer == own.0 {
            wire.fold_rounded(own.1, sum, fold(op, peer));
        } else {
            wire.decode(other(peer), sum, fold(op, peer));
        }
    }
}

/// Combines the inputs of all ranks in rank order, rounds the result as if it had travelled, and
/// puts it into `output` or adds it.
pub(crate) fn fold_all<'a>(
    wire: WireFormat,
    op: ReduceOp,
    size: usize,
    input: impl Fn(usize) -> &'a [u8],
    output: &mut [f32],
    add: bool,
) {
    let mut sum = [0.0; BLOCK];
    for block in steps(output.len(), BLOCK) {
        let skip = wire.encoded_bytes(block.start);
        let output = &mut output[block];
        let sum = &mut sum[..output.len()];
        for rank in 0..size {
            wire.decode(&input(rank)[skip..], sum, fold(op, rank));
        }
        wire.fold_rounded(sum, output, if add { Fold::Add } else { Fold::Set });
    }
}

/// `output += own + other`.
fn add_sum(output: &mut [f32], own: &[f32], other: &[u8]) {
    for ((output, own), other) in output.iter_mut().zip(own).zip(other.chunks_exact(4)) {
        *output += own + f32::from_ne_bytes([other[0], other[1], other[2], other[3]]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_range_in_whole_groups() {
        for len in [0, 1, 31, 32, 33, 100, 1000, 4096] {
            for parts in 1..8 {
                let range = 5..5 + len;
                let mut end = 5;
                for index in 0..parts {
                    let part = part(&range, parts, index);
                    assert_eq!(part.start, end);
                    assert!((part.start - 5).is_multiple_of(WIRE_GROUP) || part.is_empty());
                    end = part.end;
                }
                assert_eq!(end, range.end);
            }
        }
    }

    #[test]
    fn steps_cover_a_length_and_there_is_always_one() {
        assert_eq!(steps(0, 4).collect::<Vec<_>>(), vec![0..0; 1]);
        assert_eq!(steps(9, 4).collect::<Vec<_>>(), [0..4, 4..8, 8..9]);
        assert_eq!(steps(8, 4).collect::<Vec<_>>(), [0..4, 4..8]);
    }
}
