//! The collectives of ranks that share no memory: messages over MPI.
//!
//! Every message says what call it belongs to, so that calls that do not match are found wherever they meet.
//! Nothing blocks inside MPI: all transfers are started and asked about in turn, against the deadline.
//!
//! Sums go straight from everyone to everyone and are added in rank order, so that all ranks get the same bits:
//! small ones as a whole (one latency), larger ones in parts that are summed by one rank each and then gathered
//! (two latencies, and as few bytes as possible). Recursive doubling would need log2(n) latencies for both.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::call::{Call, Header, Site};
use crate::communicator::ReduceOp;
use crate::error::CommError;
use crate::group::{fold, fold_all, fold_values, part};
use crate::ledger::Collective;
use crate::mpi_job::Job;
use crate::mpi_sys::{Transfer, World};
use crate::transport::{Counts, Reduction, Step, carry};
use crate::wire::{Fold, WireFormat};

/// Bytes of payload in one MPI message; longer ones go in pieces.
const PIECE: usize = 4 << 20;
/// The first piece begins with: the three words of the header, the length of the whole, when it was sent by the sender's clock.
const HEAD: usize = 5 * 8;
/// A sum goes as a whole while what that adds to the bytes of each rank costs less than a latency: this is
/// latency times bandwidth, between 1 GbE (5 KB), 10 GbE (17 KB) and a machine's own memory.
const WHOLE: usize = 12 << 10;

/// One rank's end of a group.
pub(crate) struct Messages {
    world: Arc<World>,
    clocks: Arc<[i64]>,
    /// The rank in MPI's world of each rank.
    members: Vec<usize>,
    rank: usize,
    /// The tag of collectives; that of messages is the next.
    tag: usize,
}

/// A message on its way out: all its pieces.
pub(crate) struct Sending<'m>(Vec<Transfer<'m>>);

/// When a part of a call began, and how long the call had waited before.
#[derive(Clone, Copy)]
pub(crate) struct Begun {
    clock: i64,
    waited: Duration,
}

/// A message on its way in.
pub(crate) struct Receiving<'m> {
    group: &'m Messages,
    peer: usize,
    tag: usize,
    transfer: Option<Transfer<'m>>,
    /// The length, once the first piece is there.
    length: Option<usize>,
    /// When it was sent, by the clock of this rank.
    pub sent: i64,
    pub payload: Vec<u8>,
}

impl Messages {
    /// The end of `rank` among `members`. `tag` and the one after it are this group's own.
    pub(crate) fn new(job: &Job, members: Vec<usize>, rank: usize, tag: usize) -> Self {
        Messages { world: job.world.clone(), clocks: job.clocks.clone(), members, rank, tag }
    }

    fn size(&self) -> usize {
        self.members.len()
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.size()).filter(move |&peer| peer != rank)
    }

    /// Starts a message that the program sends, not a part of a collective.
    pub(crate) fn start_message(&self, to: usize, data: &[u8]) -> Result<Sending<'_>, CommError> {
        self.start(Header::new(Collective::Send, data.len()).words(), to, data, true)
    }

    /// Starts a message; `user`: one that the program sends.
    fn start(&self, words: [u64; 3], to: usize, payload: &[u8], user: bool) -> Result<Sending<'_>, CommError> {
        let tag = self.tag + user as usize;
        let (first, rest) = payload.split_at(payload.len().min(PIECE));
        let mut data = Vec::with_capacity(HEAD + first.len());
        for word in [words[0], words[1], words[2], payload.len() as u64, self.world.clock() as u64] {
            data.extend(word.to_le_bytes());
        }
        data.extend(first);
        let pieces = std::iter::once(data).chain(rest.chunks(PIECE).map(<[u8]>::to_vec));
        pieces.map(|piece| self.world.send(self.members[to], tag, piece)).collect::<Result<_, _>>().map(Sending)
    }

    /// Expects a message of `peer`.
    pub(crate) fn expect(&self, peer: usize, user: bool) -> Receiving<'_> {
        let tag = self.tag + user as usize;
        Receiving { group: self, peer, tag, transfer: None, length: None, sent: 0, payload: Vec::new() }
    }

    /// A part of a call begins in which this rank receives.
    pub(crate) fn begin(&self, call: &Call<'_>) -> Begun {
        Begun { clock: self.world.clock(), waited: call.waited }
    }

    /// That part is over, and the last of its messages was sent at `sent`: from then on they were on their way, and this
    /// rank waited for no other.
    pub(crate) fn settle(&self, call: &mut Call<'_>, begun: Begun, sent: impl Iterator<Item = i64>) {
        if let Some(sent) = sent.max() {
            let late = Duration::from_nanos((sent - begun.clock).max(0) as u64);
            call.waited = call.waited.min(begun.waited + late);
        }
    }

    /// Sends to some ranks while it receives from others; returns what came, in the order of `recvs`, where each
    /// has the rank and the length that it has to have.
    fn swap(
        &self,
        call: &mut Call<'_>,
        sends: &[(usize, &[u8])],
        recvs: &[(usize, usize)],
    ) -> Result<Vec<Vec<u8>>, CommError> {
        let begun = self.begin(call);
        let words = call.site.header.words();
        let mut sending = Vec::with_capacity(sends.len());
        for &(to, payload) in sends {
            sending.push((to, self.start(words, to, payload, false)?));
        }
        let mut receiving: Vec<_> = recvs.iter().map(|&(from, _)| self.expect(from, false)).collect();
        let mut pulls: Vec<_> = receiving
            .iter_mut()
            .zip(recvs)
            .map(|(receiving, &(peer, length))| {
                let advance = move |site: Site<'_>| {
                    receiving.advance(|there, total| {
                        site.compare(peer, there)?;
                        if total == length { Ok(()) } else { Err(site.mismatch(peer, there)) }
                    })
                };
                (peer, advance)
            })
            .collect();
        let mut pushes: Vec<_> =
            sending.iter_mut().map(|(to, sending)| (*to, move |_: Site<'_>| sending.advance())).collect();
        let pulls = pulls.iter_mut().map(|(peer, advance)| (*peer, advance as _));
        let pushes = pushes.iter_mut().map(|(peer, advance)| (*peer, advance as _));
        carry(call, pulls.chain(pushes))?;
        self.settle(call, begun, receiving.iter().map(|message| message.sent));
        Ok(receiving.into_iter().map(|receiving| receiving.payload).collect())
    }

    pub(crate) fn all_reduce(&self, call: &mut Call<'_>, data: Reduction<'_>) -> Result<(), CommError> {
        let size = self.size();
        let bytes = data.wire.encoded_bytes(data.len());
        if (size - 1) * (size - 2) / size * bytes <= WHOLE {
            self.sum_wholes(call, data)
        } else {
            self.sum_parts(call, data)
        }
    }

    fn sum_wholes(&self, call: &mut Call<'_>, data: Reduction<'_>) -> Result<(), CommError> {
        let Reduction { op, wire, .. } = data;
        let mut own = vec![0; wire.encoded_bytes(data.len())];
        wire.encode(data.own(), &mut own);
        let sends: Vec<_> = self.others().map(|peer| (peer, &own[..])).collect();
        let recvs: Vec<_> = self.others().map(|peer| (peer, own.len())).collect();
        let mut all = self.swap(call, &sends, &recvs)?;
        all.insert(self.rank, own);
        fold_all(wire, op, self.size(), |rank| &all[rank], data.output, data.input.is_some());
        Ok(())
    }

    fn sum_parts(&self, call: &mut Call<'_>, data: Reduction<'_>) -> Result<(), CommError> {
        let (rank, size) = (self.rank, self.size());
        let Reduction { op, wire, .. } = data;
        let parts: Vec<_> = (0..size).map(|peer| part(&(0..data.len()), size, peer)).collect();
        let mine = parts[rank].clone();
        let counts: Vec<usize> = parts.iter().map(|part| part.len()).collect();
        let mut sum = vec![0.0; mine.len()];
        self.scatter(call, data.own(), &counts, &mut sum, op, wire)?;
        let mut result = vec![0; wire.encoded_bytes(mine.len())];
        wire.encode(&sum, &mut result);
        let sends: Vec<_> = self.others().map(|peer| (peer, &result[..])).collect();
        let recvs: Vec<_> = self.others().map(|peer| (peer, wire.encoded_bytes(counts[peer]))).collect();
        let mut all = self.swap(call, &sends, &recvs)?;
        all.insert(rank, result);
        let last = if data.input.is_some() { Fold::Add } else { Fold::Set };
        for (part, bytes) in parts.into_iter().zip(&all) {
            wire.decode(bytes, &mut data.output[part], last);
        }
        Ok(())
    }

    /// A reduce-scatter with any operation.
    fn scatter(
        &self,
        call: &mut Call<'_>,
        send: &[f32],
        counts: &[usize],
        recv: &mut [f32],
        op: ReduceOp,
        wire: WireFormat,
    ) -> Result<(), CommError> {
        let mut start = 0;
        let blocks: Vec<Vec<u8>> = counts
            .iter()
            .map(|&count| {
                let mut block = vec![0; wire.encoded_bytes(count)];
                wire.encode(&send[start..start + count], &mut block);
                start += count;
                block
            })
            .collect();
        let sends: Vec<_> = self.others().map(|peer| (peer, &blocks[peer][..])).collect();
        let length = wire.encoded_bytes(recv.len());
        let recvs: Vec<_> = self.others().map(|peer| (peer, length)).collect();
        let mut others = VecDeque::from(self.swap(call, &sends, &recvs)?);
        let start: usize = counts[..self.rank].iter().sum();
        for peer in 0..self.size() {
            if peer == self.rank {
                fold_values(fold(op, peer), &send[start..start + recv.len()], recv);
            } else if let Some(block) = others.pop_front() {
                wire.decode(&block, recv, fold(op, peer));
            }
        }
        Ok(())
    }

    pub(crate) fn reduce_scatter(
        &self,
        call: &mut Call<'_>,
        send: &[f32],
        counts: &[usize],
        recv: &mut [f32],
        wire: WireFormat,
    ) -> Result<(), CommError> {
        self.scatter(call, send, counts, recv, ReduceOp::Sum, wire)
    }

    pub(crate) fn all_gather(
        &self,
        call: &mut Call<'_>,
        send: &[u8],
        counts: Counts<'_>,
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        let sends: Vec<_> = self.others().map(|peer| (peer, send)).collect();
        let recvs: Vec<_> = self.others().map(|peer| (peer, counts.of(peer))).collect();
        let mut all = VecDeque::from(self.swap(call, &sends, &recvs)?);
        let mut start = 0;
        for peer in 0..self.size() {
            let into = &mut recv[start..start + counts.of(peer)];
            start += into.len();
            if peer == self.rank {
                into.copy_from_slice(send);
            } else if let Some(block) = all.pop_front() {
                into.copy_from_slice(&block);
            }
        }
        Ok(())
    }

    /// From the root to everyone: one latency, and an error names the root, not a rank halfway down a tree.
    pub(crate) fn broadcast(&self, call: &mut Call<'_>, root: usize, buf: &mut [u8]) -> Result<(), CommError> {
        if self.rank == root {
            let sends: Vec<_> = self.others().map(|peer| (peer, &*buf)).collect();
            self.swap(call, &sends, &[]).map(drop)
        } else {
            let came = self.swap(call, &[], &[(root, buf.len())])?;
            buf.copy_from_slice(&came[0]);
            Ok(())
        }
    }

    /// Everyone tells everyone: one latency, and an error names who is missing.
    pub(crate) fn barrier(&self, call: &mut Call<'_>) -> Result<(), CommError> {
        let sends: Vec<_> = self.others().map(|peer| (peer, &[][..])).collect();
        let recvs: Vec<_> = self.others().map(|peer| (peer, 0)).collect();
        self.swap(call, &sends, &recvs).map(drop)
    }

    pub(crate) fn send_recv(
        &self,
        call: &mut Call<'_>,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, &mut [u8])>,
    ) -> Result<(), CommError> {
        let begun = self.begin(call);
        let mut out = match send {
            Some((to, data)) => Some((to, self.start_message(to, data)?)),
            None => None,
        };
        let mut into = recv.map(|(from, data)| (self.expect(from, true), data));
        let (to, from) = (out.as_ref().map(|m| m.0), into.as_ref().map(|m| m.0.peer));
        let mut push = |_: Site<'_>| out.as_mut().expect("a message to send").1.advance();
        let mut pull = |site: Site<'_>| {
            let (message, data) = into.as_mut().expect("a message to receive");
            message.advance_into(site, data)
        };
        carry(
            call,
            [to.map(|to| (to, &mut push as _)), from.map(|from| (from, &mut pull as _))].into_iter().flatten(),
        )?;
        self.settle(call, begun, into.iter().map(|(message, _)| message.sent));
        Ok(())
    }

    /// The rank in MPI's world of each rank.
    pub(crate) fn members(&self) -> &[usize] {
        &self.members
    }
}

impl Sending<'_> {
    /// Sees how far the message is.
    pub(crate) fn advance(&mut self) -> Result<Step, CommError> {
        let mut moved = false;
        while let Some(piece) = self.0.last_mut() {
            if !piece.done()? {
                return Ok(Step { moved, done: false });
            }
            self.0.pop();
            moved = true;
        }
        Ok(Step { moved, done: true })
    }
}

impl Receiving<'_> {
    /// Takes what has come; `accept` looks at the words and the length in the head.
    fn advance(&mut self, accept: impl Fn([u64; 3], usize) -> Result<(), CommError>) -> Result<Step, CommError> {
        let mut moved = false;
        let from = self.group.members[self.peer];
        loop {
            if self.length.is_some_and(|length| self.payload.len() >= length) {
                return Ok(Step { moved, done: true });
            }
            if self.transfer.is_none() {
                self.transfer = self.group.world.receive(Some(from), self.tag)?.map(|(_, transfer)| transfer);
            }
            match self.transfer.take() {
                None => return Ok(Step { moved, done: false }),
                Some(mut transfer) => {
                    if !transfer.done()? {
                        self.transfer = Some(transfer);
                        return Ok(Step { moved, done: false });
                    }
                    let data = transfer.into_data();
                    moved = true;
                    if self.length.is_some() {
                        self.payload.extend(data);
                        continue;
                    }
                    let word = |index: usize| {
                        let bytes = data.get(8 * index..8 * index + 8);
                        bytes.map_or(u64::MAX, |bytes| u64::from_le_bytes(bytes.try_into().expect("8 bytes")))
                    };
                    let length = usize::try_from(word(3)).unwrap_or(usize::MAX);
                    accept([word(0), word(1), word(2)], length)?;
                    self.length = Some(length);
                    // Nothing comes before it is sent, whatever clocks say.
                    let sent = (word(4) as i64).saturating_add(self.group.clocks[from]);
                    self.sent = sent.min(self.group.world.clock());
                    self.payload = data;
                    self.payload.drain(..HEAD.min(self.payload.len()));
                }
            }
        }
    }

    /// Takes what has come of a message that `site` expects from its rank `peer`, and fills `data` at the end.
    pub(crate) fn advance_into(&mut self, site: Site<'_>, data: &mut [u8]) -> Result<Step, CommError> {
        let peer = self.peer;
        let step =
            self.advance(|there, length| if length == data.len() { Ok(()) } else { Err(site.mismatch(peer, there)) })?;
        if step.done {
            data.copy_from_slice(&self.payload);
        }
        Ok(step)
    }
}
