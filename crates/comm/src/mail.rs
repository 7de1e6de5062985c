//! Messages in shared memory: for each ordered pair of ranks a ring of chunks, with one writer and
//! one reader.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::segment::{LINE, Segment};

/// Bytes of a chunk.
const CHUNK: usize = 32 << 10;
/// Chunks of a ring.
const DEPTH: usize = 4;
/// Words of a ring: a line that the sender writes, a line that the receiver writes.
const WORDS: usize = 2 * LINE / 8;
// The sender's line: chunks published so far, then the length of the message of each chunk in the
// ring.
const SENT: usize = 0;
const LENGTHS: usize = 1;
// The receiver's line: chunks taken so far.
const TAKEN: usize = LINE / 8;

/// Bytes of words and of data that the rings of `size` ranks take.
pub(crate) fn extent(size: usize) -> (usize, usize) {
    (size * size * WORDS * 8, size * size * DEPTH * CHUNK)
}

/// One rank's rings.
pub(crate) struct Mail {
    segment: Arc<Segment>,
    first_word: usize,
    first_byte: usize,
    rank: usize,
    size: usize,
    /// Not to be used by two threads at once: each ring has one writer and one reader.
    one_thread: PhantomData<Cell<()>>,
}

/// A message on its way out.
pub(crate) struct Outgoing<'a> {
    pub to: usize,
    pub data: &'a [u8],
    pub chunks: usize,
}

/// A message on its way in.
pub(crate) struct Incoming<'a> {
    pub from: usize,
    pub data: &'a mut [u8],
    pub chunks: usize,
}

/// The message in the ring has another length than the buffer: its length in bytes.
pub(crate) struct WrongLength(pub usize);

/// Chunks of a message: an empty one takes one too.
fn chunks(bytes: usize) -> usize {
    bytes.div_ceil(CHUNK).max(1)
}

impl Mail {
    /// The rings of `rank`, behind `before` bytes of words and of data in a zeroed segment. To be
    /// made once for each rank, which [`Exchange::new`](crate::exchange::Exchange::new) guards.
    pub(crate) fn new(
        segment: Arc<Segment>,
        before: (usize, usize),
        rank: usize,
        size: usize,
    ) -> Mail {
        Mail {
            segment,
            first_word: before.0 / 8,
            first_byte: before.1,
            rank,
            size,
            one_thread: PhantomData,
        }
    }

    fn ring(&self, from: usize, to: usize) -> usize {
        assert!(from < self.size && to < self.size, "ranks {from}, {to} of {}", self.size);
        from * self.size + to
    }

    fn chunk(&self, ring: usize, number: u64) -> usize {
        self.first_byte + (ring * DEPTH + number as usize % DEPTH) * CHUNK
    }

    /// Puts as many chunks into the ring as it has room for; true when the message is out.
    pub(crate) fn push(&self, message: &mut Outgoing<'_>) -> bool {
        let ring = self.ring(self.rank, message.to);
        let word = |index| self.segment.word(self.first_word + ring * WORDS + index);
        let total = chunks(message.data.len());
        while message.chunks < total {
            let sent = word(SENT).load(Relaxed);
            if sent - word(TAKEN).load(Acquire) == DEPTH as u64 {
                return false;
            }
            let start = message.chunks * CHUNK;
            let part = &message.data[start..message.data.len().min(start + CHUNK)];
            // SAFETY: this rank is the ring's only writer, on one thread at a time; the receiver
            // has given this chunk back (`TAKEN`) and reads it again only when `SENT` has passed
            // it.
            let chunk = unsafe { self.segment.data_mut(self.chunk(ring, sent), CHUNK) };
            chunk[..part.len()].copy_from_slice(part);
            word(LENGTHS + sent as usize % DEPTH).store(message.data.len() as u64, Relaxed);
            word(SENT).store(sent + 1, Release);
            message.chunks += 1;
        }
        true
    }

    /// Takes what has come; true when the message is complete.
    pub(crate) fn pull(&self, message: &mut Incoming<'_>) -> Result<bool, WrongLength> {
        let ring = self.ring(message.from, self.rank);
        let word = |index| self.segment.word(self.first_word + ring * WORDS + index);
        let total = chunks(message.data.len());
        while message.chunks < total {
            let taken = word(TAKEN).load(Relaxed);
            if word(SENT).load(Acquire) == taken {
                return Ok(false);
            }
            let length = word(LENGTHS + taken as usize % DEPTH).load(Relaxed) as usize;
            if length != message.data.len() {
                return Err(WrongLength(length));
            }
            let start = message.chunks * CHUNK;
            let part = &mut message.data[start..length.min(start + CHUNK)];
            // SAFETY: the sender has published this chunk (`SENT`) and writes it again only when it
            // is given back (`TAKEN`); this rank is the ring's only reader, on one thread at a
            // time.
            let chunk = unsafe { self.segment.data(self.chunk(ring, taken), CHUNK) };
            part.copy_from_slice(&chunk[..part.len()]);
            word(TAKEN).store(taken + 1, Release);
            message.chunks += 1;
        }
        Ok(true)
    }
}
