//! Meetings in shared memory: everyone writes, everyone meets, everyone reads.
//!
//! Step k, on every rank:
//!
//! ```text
//! write the own outbox [k mod 2]
//! publish: header, then flag = k
//! wait until every flag >= k; compare the headers
//! read the outboxes [k mod 2] of all; write the own result area [k mod 2]
//! read the result areas [(k - 1) mod 2] of all
//! ```
//!
//! No second wait is needed before an area is used again. A rank that writes an area in step k + 2
//! has met all others in step k + 1; each of them came there after it had done with step k, the
//! last that read the outboxes of step k. (Result areas: written after the meeting of step k, read
//! after that of k + 1, by ranks that come to step k + 2 only afterwards; written again after the
//! meeting of step k + 2.) That holds whichever rank writes an area in step k + 2: two ranks take
//! turns with theirs.
//!
//! The borrows spell this out: an outbox is lent out before [`Exchange::meet`], what others wrote
//! after it. Processes that share the memory are trusted to run this same code: what they say of
//! their program is compared at setup.

use std::sync::Arc;
#[cfg(any(feature = "mpi", test))]
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::time::Duration;

use crate::call::Call;
use crate::error::CommError;
use crate::segment::{LINE, Segment};

/// Bytes of an outbox.
pub(crate) const OUTBOX: usize = 256 << 10;
/// Bytes of a result area: enough for a third of an outbox in the widest encoding, since two ranks
/// need none.
pub(crate) const RESULT: usize = 96 << 10;

/// Words of a rank's control block: two cache lines, so that ranks do not disturb each other.
const CONTROL: usize = LINE / 8;
// In a control block: the flag, two headers of three words, the travel before the last meeting that
// came after any (nanoseconds above the low bits of that meeting's step), the mark that a rank
// holds its end, and the count of what the rank has moved between machines.
const FLAG: usize = 0;
const HEADERS: usize = 1;
const TRAVEL: usize = 7;
const CLAIMED: usize = 8;
const PROGRESS: usize = 9;
const STEP_BITS: u32 = 20;

/// Bytes of words and of data that the meetings of `size` ranks take, at the front of a segment.
pub(crate) fn extent(size: usize) -> (usize, usize) {
    (size * CONTROL * 8, size * 2 * (OUTBOX + RESULT))
}

/// One rank's end.
pub(crate) struct Exchange {
    segment: Arc<Segment>,
    rank: usize,
    size: usize,
    step: u64,
    broken: bool,
}

impl Exchange {
    /// The end of `rank`. Each end can be taken once; the segment is zeroed and laid out by
    /// [`extent`].
    pub(crate) fn new(segment: Arc<Segment>, rank: usize, size: usize) -> Exchange {
        assert!(rank < size, "rank {rank} of {size}");
        let claimed = segment.word(rank * CONTROL + CLAIMED).swap(1, AcqRel);
        assert_eq!(claimed, 0, "the end of rank {rank} is taken already");
        Exchange { segment, rank, size, step: 1, broken: false }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    fn flag(&self, rank: usize) -> u64 {
        self.segment.word(rank * CONTROL + FLAG).load(Acquire)
    }

    /// Where `rank` writes in `step`. Two ranks change places from one use of an area to the next:
    /// each writes what it was the last to read, which its core has already and need not take back
    /// from the other's. That halves the lines that move, and the time. Of more ranks nobody has
    /// the lines for itself, so that nothing would be gained.
    #[inline]
    fn area(&self, rank: usize, step: u64) -> usize {
        let place = if self.size == 2 { rank ^ (step >> 1 & 1) as usize } else { rank };
        (2 * place + (step & 1) as usize) * (OUTBOX + RESULT)
    }

    /// What this rank brings to the coming meeting.
    pub(crate) fn outbox(&mut self) -> &mut [u8] {
        assert!(!self.broken, "a failed exchange is used again");
        // SAFETY: see the module: the peers have done with this outbox, and will not look before
        // `meet`, which cannot be called while the slice lives; this rank has one end only.
        unsafe { self.segment.data_mut(self.area(self.rank, self.step), OUTBOX) }
    }

    /// Meets the others and makes sure that they are in the same call.
    #[inline]
    pub(crate) fn meet(&mut self, call: &mut Call<'_>) -> Result<Met<'_>, CommError> {
        assert!(!self.broken, "a failed exchange is used again");
        let step = self.step;
        let headers = HEADERS + 3 * (step & 1) as usize;
        let control = self.rank * CONTROL;
        for (index, value) in call.site.header.words().into_iter().enumerate() {
            self.segment.word(control + headers + index).store(value, Relaxed);
        }
        let travelled = std::mem::take(&mut call.travelled).as_nanos() as u64;
        if travelled > 0 {
            let travel = travelled << STEP_BITS | step & ((1 << STEP_BITS) - 1);
            self.segment.word(control + TRAVEL).store(travel, Relaxed);
        }
        self.segment.word(control + FLAG).store(step, Release);
        for peer in (0..self.size).filter(|&peer| peer != self.rank) {
            let waited = call.waited;
            let come =
                call.wait(|| Ok(self.flag(peer) >= step), || self.late(step), || self.moved());
            call.waited = waited + (call.waited - waited).saturating_sub(self.travel(peer, step));
            let result = match come {
                Ok(()) => call.site.compare(peer, self.header(peer, headers)),
                Err(error) => Err(self.first_mismatch(call, headers).unwrap_or(error)),
            };
            if let Err(error) = result {
                self.broken = true;
                return Err(error);
            }
        }
        self.step += 1;
        Ok(Met { exchange: self })
    }

    fn header(&self, peer: usize, headers: usize) -> [u64; 3] {
        [0, 1, 2].map(|index| self.segment.word(peer * CONTROL + headers + index).load(Relaxed))
    }

    /// How long `peer`, who has come to the meeting of `step`, was on the way for its neighbours
    /// before.
    #[inline]
    fn travel(&self, peer: usize, step: u64) -> Duration {
        let travel = self.segment.word(peer * CONTROL + TRAVEL).load(Relaxed);
        let of_this_step = (travel ^ step) & ((1 << STEP_BITS) - 1) == 0;
        Duration::from_nanos(if of_this_step { travel >> STEP_BITS } else { 0 })
    }

    /// Where this rank counts what it moves for its neighbours between meetings: while the count
    /// changes, they have patience.
    #[cfg(any(feature = "mpi", test))]
    pub(crate) fn progress(&self) -> &AtomicU64 {
        self.segment.word(self.rank * CONTROL + PROGRESS)
    }

    /// What all ranks have moved so.
    fn moved(&self) -> u64 {
        (0..self.size)
            .map(|rank| self.segment.word(rank * CONTROL + PROGRESS).load(Relaxed))
            .fold(0, u64::wrapping_add)
    }

    fn late(&self, step: u64) -> Vec<usize> {
        (0..self.size).filter(|&peer| self.flag(peer) < step).collect()
    }

    /// Among those who came to a meeting that failed, the first who is in another call.
    #[cold]
    fn first_mismatch(&self, call: &Call<'_>, headers: usize) -> Option<CommError> {
        (0..self.size)
            .filter(|&peer| self.flag(peer) >= self.step)
            .find_map(|peer| call.site.compare(peer, self.header(peer, headers)).err())
    }
}

/// A meeting that took place; ends when the next one is prepared.
pub(crate) struct Met<'a> {
    exchange: &'a mut Exchange,
}

impl Met<'_> {
    pub(crate) fn rank(&self) -> usize {
        self.exchange.rank
    }

    /// The step of this meeting; `exchange.step` is already that of the next.
    fn step(&self) -> u64 {
        self.exchange.step - 1
    }

    /// What `rank` brought to this meeting.
    #[inline]
    pub(crate) fn outbox(&self, rank: usize) -> &[u8] {
        assert!(rank < self.exchange.size, "rank {rank} of {}", self.exchange.size);
        // SAFETY: see the module: `rank` has published this outbox and writes it again only after
        // this rank comes to the next meeting, for which this borrow has to end.
        unsafe { self.exchange.segment.data(self.exchange.area(rank, self.step()), OUTBOX) }
    }

    /// The outboxes of this meeting, and the result area of this rank, which the others can read
    /// after the next.
    #[inline]
    pub(crate) fn outboxes_and_result<'b>(
        &'b mut self,
    ) -> (impl Fn(usize) -> &'b [u8], &'b mut [u8]) {
        let (step, rank, size) = (self.step(), self.exchange.rank, self.exchange.size);
        let exchange = &*self.exchange;
        let start = self.exchange.area(rank, step) + OUTBOX;
        // SAFETY: see the module: the peers have done with this area and look at it again only
        // after the next meeting, for which this borrow has to end; outboxes and result areas do
        // not overlap.
        let result = unsafe { exchange.segment.data_mut(start, RESULT) };
        let outbox = move |peer: usize| {
            assert!(peer < size, "rank {peer} of {size}");
            // SAFETY: as in `outbox`.
            unsafe { exchange.segment.data(exchange.area(peer, step), OUTBOX) }
        };
        (outbox, result)
    }

    /// What `rank` left in its result area after the meeting before this one.
    #[inline]
    pub(crate) fn previous_result(&self, rank: usize) -> &[u8] {
        assert!(rank < self.exchange.size, "rank {rank} of {}", self.exchange.size);
        let start = self.exchange.area(rank, self.step() - 1) + OUTBOX;
        // SAFETY: see the module: `rank` wrote this before it came to this meeting, and writes it
        // again only after this rank comes to the next.
        unsafe { self.exchange.segment.data(start, RESULT) }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::alarm::Alarm;
    use crate::call::{Header, Site};
    use crate::error::Place;
    use crate::ledger::{Collective, Phase};

    fn barrier(rank: usize, alarm: &Alarm, timeout: Duration) -> Call<'_> {
        let place = Place { collective: Collective::Barrier, phase: Phase::Other, layer: None };
        Call {
            site: Site { place, header: Header::new(Collective::Barrier, 0), rank, world: &[0, 1] },
            alarm,
            timeout,
            spin: true,
            background: false,
            progress: None,
            waited: Duration::ZERO,
            travelled: Duration::ZERO,
        }
    }

    #[test]
    fn who_waits_for_a_rank_that_brought_data_from_far_does_not_count_that_way_as_waiting() {
        let (words, data) = extent(2);
        let segment = Arc::new(Segment::private(words, data));
        let alarm = Alarm::new(Arc::new(Segment::private(Alarm::board_bytes(2), 0)), None);
        // Rank 0 comes late to all meetings, and says of the second that an hour of it was the way.
        let waits = |rank: usize| {
            let mut exchange = Exchange::new(segment.clone(), rank, 2);
            [0, 3600, 0].map(|seconds| {
                let travelled = Duration::from_secs(seconds * u64::from(rank == 0));
                let mut call = Call { travelled, ..barrier(rank, &alarm, Duration::from_secs(60)) };
                if rank == 0 {
                    // The other has published its step: it waits already, or is about to.
                    while exchange.flag(1) < exchange.step {
                        thread::yield_now();
                    }
                    thread::sleep(Duration::from_millis(50));
                }
                exchange.meet(&mut call).unwrap();
                assert_eq!(call.travelled, Duration::ZERO, "it is told once");
                call.waited
            })
        };
        let waited = thread::scope(|scope| {
            let other = scope.spawn(|| waits(1));
            waits(0);
            other.join().unwrap()
        });
        assert_eq!(waited[1], Duration::ZERO, "{waited:?}");
    }

    #[test]
    fn a_rank_that_moves_something_for_its_neighbours_is_waited_for() {
        const PATIENCE: Duration = Duration::from_secs(2);
        let (words, data) = extent(2);
        let segment = Arc::new(Segment::private(words, data));
        let alarm = Alarm::new(Arc::new(Segment::private(Alarm::board_bytes(2), 0)), None);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut mover = Exchange::new(segment.clone(), 0, 2);
                for _ in 0..30 {
                    thread::sleep(PATIENCE / 20);
                    mover.progress().fetch_add(1, Relaxed);
                }
                mover.meet(&mut barrier(0, &alarm, PATIENCE)).map(drop).unwrap();
            });
            let mut waiter = Exchange::new(segment.clone(), 1, 2);
            let mut call = barrier(1, &alarm, PATIENCE);
            waiter.meet(&mut call).map(drop).unwrap();
            assert!(call.waited > PATIENCE, "{:?}", call.waited);
            // Of what was moved before nothing counts.
            let late = waiter.meet(&mut barrier(1, &alarm, PATIENCE / 20)).map(drop).unwrap_err();
            assert!(matches!(late, CommError::Timeout { .. }), "{late}");
        });
    }
}
