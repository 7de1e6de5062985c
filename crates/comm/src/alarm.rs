//! The alarm of a job: who failed first and why, and who has left.

use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::thread;
use std::time::{Duration, Instant};

use crate::segment::Segment;

/// A rank that has left waits at most this long for the others.
const FAREWELL: Duration = Duration::from_secs(10);
const QUIET: u64 = 0;
const WRITING: u64 = 1;
const RAISED: u64 = 2;
/// Words of the reason, 8 bytes each; longer reasons are cut.
const REASON_WORDS: usize = 128;
// The board: state, rank, length of the reason, the reason, one word per rank that says whether it
// left or failed.
const STATE: usize = 0;
const RANK: usize = 1;
const LENGTH: usize = 2;
const REASON: usize = 3;
const GONE: usize = REASON + REASON_WORDS;
// Bits of a rank's word.
const LEFT: u64 = 1;
const FAILED: u64 = 2;

/// Notices what the board cannot: other machines, dead processes.
pub(crate) trait Watch: Send + Sync {
    /// Tells the ranks that do not see the board that `rank` failed, and sees to it that the job
    /// ends.
    fn failed(&self, rank: usize, reason: &str);
    /// Tells the ranks that do not see the board that `rank`, this one, has left.
    fn left(&self, rank: usize);
    /// Nothing will be asked any more.
    fn close(&self, ending: Ending);
    /// News that the board does not show. Waiting ranks ask some times a second.
    fn look(&self) -> Vec<News>;
}

/// How a job ends for a rank that has left.
#[cfg_attr(not(feature = "mpi"), allow(dead_code))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ending {
    /// It has failed, or may have.
    Failed,
    /// Some ranks still work.
    Early,
    /// All have left.
    Together,
}

/// What a watch has found. Threads need none: what they do is on the board at once.
#[cfg_attr(not(feature = "mpi"), allow(dead_code))]
pub(crate) enum News {
    /// A rank failed. `teller`: a rank that told all others, and fails with it.
    Failed { rank: usize, reason: String, teller: Option<usize> },
    /// A rank has left.
    Left { rank: usize },
}

/// The alarm of a job, on a board that the ranks of one memory share.
pub(crate) struct Alarm {
    board: Arc<Segment>,
    watch: Option<Box<dyn Watch>>,
}

impl Alarm {
    /// Bytes of the board for a job of `size` ranks.
    pub(crate) fn board_bytes(size: usize) -> usize {
        8 * (GONE + size)
    }

    pub(crate) fn new(board: Arc<Segment>, watch: Option<Box<dyn Watch>>) -> Alarm {
        Alarm { board, watch }
    }

    /// Fails the job in the name of `rank`, unless it has failed before.
    pub(crate) fn raise(&self, rank: usize, reason: &str) {
        if self.post(rank, reason)
            && let Some(watch) = &self.watch
        {
            watch.failed(rank, reason);
        }
    }

    /// Puts a failure on the board; false if there was one, which stays.
    fn post(&self, rank: usize, reason: &str) -> bool {
        let state = self.board.word(STATE);
        if state.compare_exchange(QUIET, WRITING, AcqRel, Relaxed).is_err() {
            return false;
        }
        let mut length = reason.len().min(8 * REASON_WORDS);
        while !reason.is_char_boundary(length) {
            length -= 1;
        }
        for (index, chunk) in reason.as_bytes()[..length].chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.board.word(REASON + index).store(u64::from_le_bytes(word), Relaxed);
        }
        self.board.word(RANK).store(rank as u64, Relaxed);
        self.board.word(LENGTH).store(length as u64, Relaxed);
        state.store(RAISED, Release);
        true
    }

    /// Who failed, and why.
    #[inline]
    pub(crate) fn raised(&self) -> Option<(usize, String)> {
        if self.board.word(STATE).load(Acquire) == RAISED { Some(self.read()) } else { None }
    }

    #[cold]
    fn read(&self) -> (usize, String) {
        let length = (self.board.word(LENGTH).load(Relaxed) as usize).min(8 * REASON_WORDS);
        let mut text: Vec<u8> = (0..length.div_ceil(8))
            .flat_map(|index| self.board.word(REASON + index).load(Relaxed).to_le_bytes())
            .collect();
        text.truncate(length);
        let rank = self.board.word(RANK).load(Relaxed) as usize;
        (rank, String::from_utf8_lossy(&text).into_owned())
    }

    /// Puts on the board what it does not show yet, and returns a failure if there is one.
    pub(crate) fn probe(&self) -> Option<(usize, String)> {
        for news in self.watch.as_ref()?.look() {
            match news {
                News::Failed { rank, reason, teller: Some(teller) } => {
                    self.post(rank, &reason);
                    self.mark(teller, FAILED);
                }
                // A process may end once its rank has left.
                News::Failed { rank, .. } if self.departed(rank) => {}
                News::Failed { rank, reason, teller: None } => self.raise(rank, &reason),
                News::Left { rank } => self.mark(rank, LEFT),
            }
        }
        self.raised()
    }

    /// Says that `rank`, this one of `size`, will make no further call. Processes then wait a while
    /// for the others, since to finalize MPI while one of them fails can hang the launcher.
    fn depart(&self, rank: usize, size: usize) {
        self.mark(rank, LEFT);
        let Some(watch) = &self.watch else { return };
        if self.raised().is_none() {
            watch.left(rank);
        }
        let start = Instant::now();
        let all_left = || (0..size).all(|rank| self.departed(rank));
        while self.raised().is_none()
            && self.probe().is_none()
            && start.elapsed() < FAREWELL
            && !all_left()
        {
            thread::sleep(Duration::from_micros(200));
        }
        watch.close(match self.raised() {
            Some(_) => Ending::Failed,
            None if all_left() => Ending::Together,
            None => Ending::Early,
        });
    }

    fn mark(&self, rank: usize, how: u64) {
        self.board.word(GONE + rank).fetch_or(how, AcqRel);
    }

    /// Whether `rank` said that it leaves.
    pub(crate) fn departed(&self, rank: usize) -> bool {
        self.board.word(GONE + rank).load(Acquire) & LEFT != 0
    }

    /// Whether `rank` said that it leaves or fails.
    pub(crate) fn gone(&self, rank: usize) -> bool {
        self.board.word(GONE + rank).load(Acquire) != 0
    }
}

/// One rank's place in the job, shared by its communicators. When the last one goes, the rank has
/// left.
pub(crate) struct Membership {
    pub alarm: Alarm,
    /// The rank in the whole job.
    pub rank: usize,
    /// The ranks of the whole job.
    pub size: usize,
}

impl Membership {
    /// Fails the job in the name of this rank, unless it has failed before.
    pub(crate) fn fail(&self, reason: &str) {
        self.alarm.raise(self.rank, reason);
        self.alarm.mark(self.rank, FAILED);
    }

    /// To be called when a communicator is dropped: a panic on the way is a failure of the rank.
    pub(crate) fn check_panic(&self) {
        if thread::panicking() {
            let thread = thread::current();
            let name = thread.name().unwrap_or("unnamed");
            self.fail(&format!("it panicked (thread '{name}')"));
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.alarm.depart(self.rank, self.size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_stays_and_long_reasons_are_cut_at_a_character() {
        let board = Arc::new(Segment::private(Alarm::board_bytes(3), 0));
        let alarm = Alarm::new(board.clone(), None);
        let other = Alarm::new(board, None);
        assert_eq!(alarm.raised(), None);
        let reason = format!("x{}", "é".repeat(600));
        alarm.raise(1, &reason);
        other.raise(2, "later");
        let (rank, text) = other.raised().unwrap();
        assert_eq!((rank, text.len()), (1, 1023));
        assert!(reason.starts_with(&text));
        assert!(!other.departed(2));
        alarm.depart(2, 3);
        assert!(other.departed(2) && !other.departed(0));
    }

    #[test]
    fn the_watch_hears_how_the_job_ends() {
        struct Ended(Arc<std::sync::Mutex<Vec<Ending>>>);
        impl Watch for Ended {
            fn failed(&self, _: usize, _: &str) {}
            fn left(&self, _: usize) {}
            fn close(&self, ending: Ending) {
                self.0.lock().unwrap().push(ending);
            }
            fn look(&self) -> Vec<News> {
                Vec::new()
            }
        }
        let endings = Arc::new(std::sync::Mutex::new(Vec::new()));
        let board = Arc::new(Segment::private(Alarm::board_bytes(2), 0));
        let alarm = Alarm::new(board, Some(Box::new(Ended(endings.clone()))));
        alarm.mark(1, LEFT);
        alarm.depart(0, 2);
        alarm.raise(1, "it stumbled");
        alarm.depart(0, 2);
        assert_eq!(*endings.lock().unwrap(), [Ending::Together, Ending::Failed]);
    }
}
