//! Payloads between ranks that share no memory, as messages over MPI.
//!
//! Every message says what call it belongs to, so that calls that do not match are found wherever
//! they meet. Nothing blocks inside MPI: all transfers are started and asked about in turn, against
//! the deadline.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use crate::buffer::{Buffer, LONGEST};
use crate::call::{Call, Header, Site};
use crate::error::CommError;
use crate::group::steps;
use crate::ledger::Collective;
use crate::mpi_job::Job;
use crate::mpi_sys::{Transfer, World};
use crate::transport::{Step, carry};
use crate::wire::{WIRE_GROUP, WireFormat};

/// A message begins with: the three words of the header, the length of the whole payload, when it
/// was sent by the sender's clock.
pub(crate) const HEAD: usize = 5 * 8;
/// Whole groups in each format of the wire: 9 of f32, 18 of bf16, 32 of q8.
const GRANULE: usize = WIRE_GROUP * WireFormat::Q8.encoded_bytes(WIRE_GROUP);
/// Bytes of payload in one message, whole groups in each format of the wire; longer payloads go in
/// pieces, which are encoded, on their way and added at the same time.
pub(crate) const PIECE: usize = (LONGEST - HEAD) / GRANULE * GRANULE;

/// One rank's end of a group.
pub(crate) struct Messages {
    world: Arc<World>,
    clocks: Arc<[i64]>,
    /// The rank in MPI's world of each rank.
    members: Vec<usize>,
    rank: usize,
    /// The tag of collectives; that of messages of the program is the next.
    tag: usize,
}

/// A payload on its way to one rank: all its pieces.
pub(crate) struct Sending<'m> {
    to: usize,
    tag: usize,
    /// Those that have not left yet.
    pieces: VecDeque<Transfer<'m>>,
}

/// A payload on its way in.
pub(crate) struct Receiving<'m> {
    group: &'m Messages,
    from: usize,
    /// Whether the program sends it, and not a part of a collective.
    user: bool,
    /// Bytes that it has to have.
    length: usize,
    /// Bytes that came.
    come: usize,
    /// Pieces that are still to begin.
    ahead: usize,
    /// Pieces that have begun, in order.
    pieces: VecDeque<Transfer<'m>>,
    /// When it was sent, by the clock of this rank.
    pub sent: i64,
}

/// When a part of a call began, and how long the call had waited before.
#[derive(Clone, Copy)]
pub(crate) struct Begun {
    clock: i64,
    waited: Duration,
}

/// The payload of a message that came.
pub(crate) struct Piece<'m>(Buffer<'m>);

impl Deref for Piece<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0[HEAD..]
    }
}

impl Messages {
    /// The end of `rank` among `members`. `tag` and the one after it are this group's own.
    pub(crate) fn new(job: &Job, members: Vec<usize>, rank: usize, tag: usize) -> Self {
        Messages { world: job.world.clone(), clocks: job.clocks.clone(), members, rank, tag }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.members.len()
    }

    pub(crate) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.size()).filter(move |&peer| peer != rank)
    }

    /// Starts to send the same to some ranks: `fill` writes what begins at a byte of the payload.
    /// Returns the pieces, too.
    pub(crate) fn start<'m>(
        &'m self,
        header: Header,
        to: impl Iterator<Item = usize>,
        length: usize,
        fill: impl Fn(usize, &mut [u8]),
    ) -> Result<(Vec<Sending<'m>>, Vec<Arc<Buffer<'m>>>), CommError> {
        let mut sending: Vec<_> = to.map(|to| self.sending(to, header)).collect();
        let mut pieces = Vec::new();
        for range in steps(length, PIECE) {
            let piece = self.piece(header, length, range.len(), |piece| fill(range.start, piece));
            self.push(&piece, &mut sending)?;
            pieces.push(piece);
        }
        Ok((sending, pieces))
    }

    /// Starts a message that the program sends, not a part of a collective.
    pub(crate) fn start_message(&self, to: usize, data: &[u8]) -> Result<Sending<'_>, CommError> {
        let header = Header::new(Collective::Send, data.len());
        let fill = |at, piece: &mut [u8]| read_at(data, at, piece);
        Ok(self.start(header, std::iter::once(to), data.len(), fill)?.0.remove(0))
    }

    /// A payload to which [`push`](Self::push) adds pieces.
    pub(crate) fn sending(&self, to: usize, header: Header) -> Sending<'_> {
        let user = header.collective == Collective::Send;
        Sending { to, tag: self.tag + usize::from(user), pieces: VecDeque::new() }
    }

    /// A piece of `bytes` of a payload of `length`, as it travels.
    pub(crate) fn piece(
        &self,
        header: Header,
        length: usize,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Arc<Buffer<'_>> {
        let mut piece = self.world.buffers.of(HEAD + bytes);
        fill(&mut piece[HEAD..]);
        let [kind, count, detail] = header.words();
        let head = [kind, count, detail, length as u64, self.world.clock() as u64];
        for (bytes, word) in piece.chunks_exact_mut(8).zip(head) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Arc::new(piece)
    }

    /// Sends the next piece of some payloads.
    pub(crate) fn push<'m>(
        &'m self,
        piece: &Arc<Buffer<'m>>,
        to: &mut [Sending<'m>],
    ) -> Result<(), CommError> {
        for sending in to {
            sending.pieces.push_back(self.world.send(
                self.members[sending.to],
                sending.tag,
                piece.clone(),
            )?);
        }
        Ok(())
    }

    /// Expects a part of a collective, of `length` bytes.
    pub(crate) fn expect(&self, from: usize, length: usize) -> Receiving<'_> {
        let ahead = length.div_ceil(PIECE).max(1);
        Receiving {
            group: self,
            from,
            user: false,
            length,
            come: 0,
            ahead,
            pieces: VecDeque::new(),
            sent: 0,
        }
    }

    /// Expects a message that the program sends.
    pub(crate) fn expect_message(&self, from: usize, length: usize) -> Receiving<'_> {
        Receiving { user: true, ..self.expect(from, length) }
    }

    /// A part of a call begins in which this rank receives.
    pub(crate) fn begin(&self, call: &Call<'_>) -> Begun {
        Begun { clock: self.world.clock(), waited: call.waited }
    }

    /// That part is over, and the last of its messages was sent at `sent`: from then on they were
    /// on their way, and this rank waited for no other.
    pub(crate) fn settle(&self, call: &mut Call<'_>, begun: Begun, sent: Option<i64>) {
        if let Some(sent) = sent {
            let late = Duration::from_nanos((sent - begun.clock).max(0) as u64);
            call.waited = call.waited.min(begun.waited + late);
        }
    }

    /// Waits until what was started is sent and what is expected has come. `take` gets every piece:
    /// its sender, the byte of the payload where it begins, the piece.
    pub(crate) fn finish<'m>(
        &'m self,
        call: &mut Call<'_>,
        sending: Vec<Sending<'m>>,
        receiving: impl Iterator<Item = Receiving<'m>>,
        mut take: impl FnMut(usize, usize, Piece<'m>) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        enum Way<'m> {
            Out(Sending<'m>),
            In(Receiving<'m>),
        }
        let begun = self.begin(call);
        let mut sent = None;
        let ins = receiving.map(|message| (message.from, Way::In(message)));
        let outs = sending.into_iter().map(|message| (message.to, Way::Out(message)));
        carry(call, ins.chain(outs).collect(), |site, way| match way {
            Way::Out(message) => message.advance(),
            Way::In(message) => {
                let from = message.from;
                let step = message.advance(site, |at, piece| take(from, at, piece))?;
                if step.done {
                    sent = sent.max(Some(message.sent));
                }
                Ok(step)
            }
        })?;
        self.settle(call, begun, sent);
        Ok(())
    }
}

pub(crate) fn read_at(from: &[u8], at: usize, piece: &mut [u8]) {
    piece.copy_from_slice(&from[at..at + piece.len()]);
}

pub(crate) fn copy_at(into: &mut [u8], at: usize, piece: &[u8]) {
    into[at..at + piece.len()].copy_from_slice(piece);
}

impl Sending<'_> {
    /// Sees how far the message is.
    pub(crate) fn advance(&mut self) -> Result<Step, CommError> {
        let mut moved = false;
        while let Some(piece) = self.pieces.front_mut() {
            if !piece.done()? {
                return Ok(Step { moved, done: false });
            }
            self.pieces.pop_front();
            moved = true;
        }
        Ok(Step { moved, done: true })
    }
}

impl<'m> Receiving<'m> {
    /// Takes what has come of a message that `site` expects.
    fn advance(
        &mut self,
        site: Site<'_>,
        mut take: impl FnMut(usize, Piece<'m>) -> Result<(), CommError>,
    ) -> Result<Step, CommError> {
        let (from, tag) = (self.group.members[self.from], self.group.tag + usize::from(self.user));
        // All that is on its way is let in, so that pieces need not wait for the ways of each
        // other.
        while self.ahead > 0
            && let Some((_, piece)) = self.group.world.receive(Some(from), tag)?
        {
            self.pieces.push_back(piece);
            self.ahead -= 1;
        }
        let mut moved = false;
        while let Some(piece) = self.pieces.front_mut() {
            if !piece.done()? {
                return Ok(Step { moved, done: false });
            }
            let piece = self.pieces.pop_front().expect("the front").into_received();
            moved = true;
            let word = |index: usize| {
                let bytes = piece.get(8 * index..8 * index + 8);
                bytes.map_or(u64::MAX, |bytes| {
                    u64::from_le_bytes(bytes.try_into().expect("8 bytes"))
                })
            };
            let there = [word(0), word(1), word(2)];
            if !self.user {
                site.compare(self.from, there)?;
            }
            if word(3) != self.length as u64
                || piece.len() != HEAD + PIECE.min(self.length - self.come)
            {
                return Err(site.mismatch(self.from, there));
            }
            if self.come == 0 {
                // Nothing comes before it is sent, whatever clocks say.
                let sent = (word(4) as i64).saturating_add(self.group.clocks[from]);
                self.sent = sent.min(self.group.world.clock());
            }
            let at = self.come;
            self.come += piece.len() - HEAD;
            take(at, Piece(piece))?;
        }
        Ok(Step { moved, done: self.ahead == 0 })
    }

    /// Takes what has come into its place in `data`.
    pub(crate) fn advance_into(
        &mut self,
        site: Site<'_>,
        data: &mut [u8],
    ) -> Result<Step, CommError> {
        self.advance(site, |at, piece| {
            copy_at(data, at, &piece);
            Ok(())
        })
    }
}
