//! The collectives of ranks that share no memory, over messages.
//!
//! Sums go straight from everyone to everyone and are added in rank order, so that all ranks get
//! the same bits: small ones as a whole (one latency), larger ones in parts that are summed by one
//! rank each and then gathered (two latencies, and as few bytes as possible). Recursive doubling
//! would need log2(n) latencies for both.

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::ops::Range;

use crate::call::Call;
use crate::communicator::ReduceOp;
use crate::error::CommError;
use crate::group::{BLOCK, elements, fold_all, fold_block, part, steps};
use crate::messages::{HEAD, Messages, PIECE, Piece, Sending, copy_at, read_at};
use crate::transport::{Collectives, Counts, Reduction};
use crate::wire::{Fold, WireFormat};

/// A sum goes as a whole while what that adds to the bytes of each rank costs less than a latency:
/// this is latency times bandwidth, between 1 GbE (5 KB), 10 GbE (17 KB) and a machine's own
/// memory.
const WHOLE: usize = 12 << 10;

impl Messages {
    /// Finishes what makes sums, of `count` elements from each of the others: `take` gets the range
    /// of elements that a piece has, and that piece of each of them, in the order of the ranks.
    fn finish_rows<'m>(
        &'m self,
        call: &mut Call<'_>,
        sending: Vec<Sending<'m>>,
        (wire, count): (WireFormat, usize),
        mut take: impl FnMut(Range<usize>, &[Piece<'m>]) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let mut come: Vec<VecDeque<Piece>> = self.others().map(|_| VecDeque::new()).collect();
        let mut ranges = steps(count, elements(wire, PIECE));
        let receiving = self.others().map(|peer| self.expect(peer, wire.encoded_bytes(count)));
        self.finish(call, sending, receiving, |peer, _, piece| {
            come[peer - usize::from(peer > self.rank())].push_back(piece);
            if come.iter().any(VecDeque::is_empty) {
                return Ok(());
            }
            let pieces: Vec<Piece> = come.iter_mut().filter_map(VecDeque::pop_front).collect();
            take(ranges.next().expect("a range for every piece"), &pieces)
        })
    }

    fn sum_wholes(&self, call: &mut Call<'_>, data: Reduction<'_>) -> Result<(), CommError> {
        let (own, length) = (data.own(), data.len());
        let encode = |at, piece: &mut [u8]| encode_at(data.wire, own, at, piece);
        let (sending, pieces) =
            self.start(call.site.header, self.others(), data.wire.encoded_bytes(length), encode)?;
        let Reduction { input, output, op, wire } = data;
        let mut pieces = pieces.iter();
        self.finish_rows(call, sending, (wire, length), |range, others| {
            let own = pieces.next().expect("as many as each of the others sends");
            let of = |rank: usize| match rank.cmp(&self.rank()) {
                Ordering::Less => &others[rank][..],
                Ordering::Equal => &own[HEAD..],
                Ordering::Greater => &others[rank - 1][..],
            };
            fold_all(wire, op, self.size(), of, &mut output[range], input.is_some());
            Ok(())
        })
    }

    fn sum_parts(&self, call: &mut Call<'_>, data: Reduction<'_>) -> Result<(), CommError> {
        let Reduction { input, output, op, wire } = data;
        let (length, header) = (output.len(), call.site.header);
        let size = self.size();
        let parts: Vec<_> = (0..size).map(|peer| part(&(0..length), size, peer)).collect();
        let counts: Vec<usize> = parts.iter().map(|part| part.len()).collect();
        let mine = parts[self.rank()].clone();
        let last = if input.is_some() { Fold::Add } else { Fold::Set };
        let sending = self.start_parts(call, input.unwrap_or(output), &counts, wire)?;
        let mut results: Vec<_> = self.others().map(|to| self.sending(to, header)).collect();
        let bytes = wire.encoded_bytes(mine.len());
        self.finish_rows(call, sending, (wire, mine.len()), |range, others| {
            let start = mine.start + range.start;
            let piece = self.piece(header, bytes, wire.encoded_bytes(range.len()), |piece| {
                for block in steps(range.len(), BLOCK) {
                    let place = start + block.start..start + block.end;
                    let piece = &mut piece[wire.encoded_bytes(block.start)..];
                    let own = &input.unwrap_or(output)[place.clone()];
                    let mut sum = [0.0; BLOCK];
                    let sum = &mut sum[..own.len()];
                    self.fold(wire, op, own, others, block.start, sum);
                    wire.encode(sum, piece);
                    wire.decode(piece, &mut output[place], last);
                }
            });
            self.push(&piece, &mut results)
        })?;
        let receiving =
            self.others().map(|peer| self.expect(peer, wire.encoded_bytes(counts[peer])));
        self.finish(call, results, receiving, |peer, at, piece| {
            let part = &mut output[parts[peer].clone()];
            decode_at(wire, &piece, part, at, last);
            Ok(())
        })
    }

    /// Starts to send each of the others its block of `values`.
    fn start_parts(
        &self,
        call: &Call<'_>,
        values: &[f32],
        counts: &[usize],
        wire: WireFormat,
    ) -> Result<Vec<Sending<'_>>, CommError> {
        let mut all = Vec::with_capacity(self.size());
        let mut rest = values;
        for (peer, &count) in counts.iter().enumerate() {
            let (block, after) = rest.split_at(count);
            rest = after;
            if peer != self.rank() {
                let encode = |at, piece: &mut [u8]| encode_at(wire, block, at, piece);
                let to = std::iter::once(peer);
                all.append(
                    &mut self.start(call.site.header, to, wire.encoded_bytes(count), encode)?.0,
                );
            }
        }
        Ok(all)
    }

    /// Combines the own block with those that begin at the element `start` of the pieces of the
    /// others.
    fn fold(
        &self,
        wire: WireFormat,
        op: ReduceOp,
        own: &[f32],
        others: &[Piece<'_>],
        start: usize,
        sum: &mut [f32],
    ) {
        let other = |peer: usize| {
            &others[peer - usize::from(peer > self.rank())][wire.encoded_bytes(start)..]
        };
        fold_block(wire, op, (self.rank(), own), self.size(), other, sum);
    }
}

impl Collectives for Messages {
    fn all_reduce(&mut self, call: &mut Call<'_>, data: Reduction<'_>) -> Result<(), CommError> {
        let size = self.size();
        let bytes = data.wire.encoded_bytes(data.len());
        if (size - 1) * (size - 2) * bytes <= WHOLE * size {
            self.sum_wholes(call, data)
        } else {
            self.sum_parts(call, data)
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
        let sending = self.start_parts(call, send, counts, wire)?;
        let own = &send[counts[..self.rank()].iter().sum()..][..recv.len()];
        self.finish_rows(call, sending, (wire, recv.len()), |range, others| {
            for block in steps(range.len(), BLOCK) {
                let place = range.start + block.start..range.start + block.end;
                self.fold(
                    wire,
                    ReduceOp::Sum,
                    &own[place.clone()],
                    others,
                    block.start,
                    &mut recv[place],
                );
            }
            Ok(())
        })
    }

    fn all_gather(
        &mut self,
        call: &mut Call<'_>,
        send: &[u8],
        counts: Counts<'_>,
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        let (sending, _) =
            self.start(call.site.header, self.others(), send.len(), |at, piece| {
                read_at(send, at, piece)
            })?;
        copy_at(recv, counts.start(self.rank()), send);
        let receiving = self.others().map(|peer| self.expect(peer, counts.of(peer)));
        self.finish(call, sending, receiving, |peer, at, piece| {
            copy_at(recv, counts.start(peer) + at, &piece);
            Ok(())
        })
    }

    /// From the root to everyone: one latency, and an error names the root, not a rank halfway down
    /// a tree.
    fn broadcast(
        &mut self,
        call: &mut Call<'_>,
        root: usize,
        buf: &mut [u8],
    ) -> Result<(), CommError> {
        if self.rank() == root {
            let (sending, _) =
                self.start(call.site.header, self.others(), buf.len(), |at, piece| {
                    read_at(buf, at, piece)
                })?;
            self.finish(call, sending, std::iter::empty(), |_, _, _| Ok(()))
        } else {
            self.finish(
                call,
                vec![],
                std::iter::once(self.expect(root, buf.len())),
                |_, at, piece| {
                    copy_at(buf, at, &piece);
                    Ok(())
                },
            )
        }
    }

    /// Everyone tells everyone: one latency, and an error names who is missing.
    fn barrier(&mut self, call: &mut Call<'_>) -> Result<(), CommError> {
        let (sending, _) = self.start(call.site.header, self.others(), 0, |_, _| ())?;
        self.finish(call, sending, self.others().map(|peer| self.expect(peer, 0)), |_, _, _| Ok(()))
    }

    fn send_recv(
        &mut self,
        call: &mut Call<'_>,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, &mut [u8])>,
    ) -> Result<(), CommError> {
        let sending = send.map(|(to, data)| self.start_message(to, data)).transpose()?;
        let (from, data) = recv.unzip();
        let data = data.unwrap_or_default();
        let receiving = from.map(|from| self.expect_message(from, data.len()));
        self.finish(call, sending.into_iter().collect(), receiving.into_iter(), |_, at, piece| {
            copy_at(data, at, &piece);
            Ok(())
        })
    }
}

/// Encodes what begins at byte `at` of all `values` as they travel.
fn encode_at(wire: WireFormat, values: &[f32], at: usize, piece: &mut [u8]) {
    let values = &values[elements(wire, at)..];
    wire.encode(&values[..values.len().min(elements(wire, PIECE))], piece);
}

/// Decodes a piece that begins at byte `at` into its place among all values.
fn decode_at(wire: WireFormat, piece: &[u8], values: &mut [f32], at: usize, fold: Fold) {
    let values = &mut values[elements(wire, at)..];
    let count = values.len().min(elements(wire, PIECE));
    wire.decode(piece, &mut values[..count], fold);
}
