//! One call in progress: what it is, how it waits, and when it gives up.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use crate::alarm::Alarm;
use crate::communicator::ReduceOp;
use crate::error::{CommError, Place};
use crate::ledger::Collective;
use crate::wire::WireFormat;

/// A waiting rank looks this often before it offers its core to others: ten to twenty microseconds.
const SPINS: u32 = 300;
/// After this long it sleeps between looks: nobody who waits for a person burns a core.
const YIELDING: Duration = Duration::from_millis(10);
/// At least this long where the rank's own threads need the core: an offer of the core is taken up
/// only in part.
const NAP: Duration = Duration::from_micros(20);
/// How often it looks for ranks that left or died.
const PROBE: Duration = Duration::from_millis(50);
/// A rank that sleeps for a millisecond and wakes up after more than this was stopped, and as a
/// rule the others were, too.
const STOPPED: Duration = Duration::from_millis(100);
/// How long a rank that fails looks whether those that it waits for fail, too, and say so.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What a rank calls. Two ranks in the same call have equal headers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub collective: Collective,
    /// Operation, wire format and root, packed: zero is none, else one more than the value.
    pub options: u64,
    /// Elements, or bytes where the call is about bytes.
    pub count: u64,
    /// A digest of the counts of all ranks, where the call has them.
    pub detail: u64,
}

impl Header {
    pub(crate) fn new(collective: Collective, count: usize) -> Header {
        Header { collective, options: 0, count: count as u64, detail: 0 }
    }

    pub(crate) fn reduce(self, op: ReduceOp, wire: WireFormat) -> Header {
        let options = self.options | (1 + op as u64) << 8 | (1 + wire as u64) << 16;
        Header { options, ..self }
    }

    pub(crate) fn root(self, root: usize) -> Header {
        Header { options: self.options | (1 + root as u64) << 32, ..self }
    }

    pub(crate) fn counts(self, counts: &[usize]) -> Header {
        Header { detail: digest(counts.iter().map(|&count| count as u64)), ..self }
    }

    /// The form that travels with the data.
    #[inline]
    pub(crate) fn words(self) -> [u64; 3] {
        [self.collective as u64 | self.options, self.count, self.detail]
    }
}

/// A number by which ranks can tell whether they hold the same: FNV-1a (Fowler, Noll and Vo) over
/// the values. Equal digests of unequal values are rare, but can be made on purpose.
pub fn digest(values: impl IntoIterator<Item = u64>) -> u64 {
    values.into_iter().fold(0xcbf2_9ce4_8422_2325, |digest, value| {
        (digest ^ value).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The words of another rank's header, for a message.
struct Words([u64; 3]);

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [kind, count, detail] = self.0;
        let byte = |shift: u32| (kind >> shift & 0xff) as usize;
        match Collective::ALL.get(byte(0)) {
            Some(collective) => write!(f, "{collective}")?,
            None => write!(f, "an unknown collective ({})", byte(0))?,
        }
        match byte(8) {
            0 => {}
            1 => write!(f, " (sum)")?,
            2 => write!(f, " (max)")?,
            other => write!(f, " (operation {other})")?,
        }
        match byte(16) {
            0 => write!(f, " of {count} bytes")?,
            wire => {
                let name = WireFormat::ALL.get(wire - 1).map_or("unknown", |wire| wire.name());
                write!(f, " of {count} elements as {name}")?;
            }
        }
        if kind >> 32 != 0 {
            write!(f, " from root {}", (kind >> 32) - 1)?;
        }
        if detail != 0 {
            write!(f, ", counts #{:04x}", detail & 0xffff)?;
        }
        Ok(())
    }
}

/// Who calls what, where: enough to make an error of it.
#[derive(Clone, Copy)]
pub(crate) struct Site<'a> {
    pub place: Place,
    pub header: Header,
    /// This rank in the communicator.
    pub rank: usize,
    /// The rank in the whole job of each rank of the communicator.
    pub world: &'a [usize],
}

/// The call that a rank is in.
pub(crate) struct Call<'a> {
    pub site: Site<'a>,
    pub alarm: &'a Alarm,
    pub timeout: Duration,
    /// Whether a waiting rank may keep its core.
    pub spin: bool,
    /// Whether other threads of this rank compute meanwhile.
    pub background: bool,
    /// Where this rank counts what moves between machines, for its neighbours, who wait for it
    /// meanwhile.
    pub progress: Option<&'a AtomicU64>,
    /// Time spent waiting so far.
    pub waited: Duration,
    /// How long this rank took to bring the data of its machine to others and back, until it has
    /// told its neighbours.
    pub travelled: Duration,
}

impl Call<'_> {
    /// Waits until `ready`; `late` lists the ranks of the communicator that have not come yet. The
    /// deadline starts again whenever `progress` changes: somebody moves data that this rank waits
    /// for. It does not count time in which this process was stopped.
    #[inline]
    pub(crate) fn wait(
        &mut self,
        mut ready: impl FnMut() -> Result<bool, CommError>,
        late: impl Fn() -> Vec<usize>,
        progress: impl Fn() -> u64,
    ) -> Result<(), CommError> {
        if ready()? {
            return Ok(());
        }
        let start = Instant::now();
        // In the background each look, over messages a call of MPI, would be taken from those who
        // compute.
        if self.spin && !self.background {
            for _ in 0..SPINS {
                if ready()? {
                    self.waited += start.elapsed();
                    return Ok(());
                }
                std::hint::spin_loop();
            }
        }
        let result = self.wait_long(start, &mut ready, &late, &progress);
        self.waited += start.elapsed();
        result
    }

    #[cold]
    fn wait_long(
        &self,
        start: Instant,
        ready: &mut dyn FnMut() -> Result<bool, CommError>,
        late: &dyn Fn() -> Vec<usize>,
        progress: &dyn Fn() -> u64,
    ) -> Result<(), CommError> {
        let mut next_probe = PROBE;
        let (mut seen, mut since) = (progress(), Duration::ZERO);
        // Time in which this rank was stopped.
        let mut stopped = Duration::ZERO;
        loop {
            let awake = start.elapsed();
            let waited = awake - stopped;
            if waited < YIELDING && !self.background {
                thread::yield_now();
            } else {
                thread::sleep((waited / 200).clamp(NAP, Duration::from_millis(1)));
            }
            stopped += (start.elapsed() - awake).saturating_sub(STOPPED);
            if ready()? {
                return Ok(());
            }
            let mut failure = self.alarm.raised();
            if failure.is_none() && waited >= next_probe {
                next_probe = waited + PROBE;
                failure = self.alarm.probe().or_else(|| {
                    let departed = |rank: &usize| self.alarm.departed(self.site.world[*rank]);
                    let rank = late().into_iter().find(departed)?;
                    Some((self.site.world[rank], "it left while others still needed it".into()))
                });
            }
            if let Some((rank, reason)) = failure {
                // What the failed rank did before it failed still counts.
                if ready()? {
                    return Ok(());
                }
                let missing = if rank == self.site.world[self.site.rank] {
                    self.silent(late)
                } else {
                    vec![]
                };
                return Err(CommError::PeerFailed {
                    place: self.site.place,
                    rank,
                    reason,
                    missing,
                });
            }
            let now = progress();
            if now != seen {
                (seen, since) = (now, waited);
            }
            if waited - since >= self.timeout {
                let missing = self.in_job(late());
                let rank = self.site.world[self.site.rank];
                return Err(CommError::Timeout {
                    place: self.site.place,
                    rank,
                    missing,
                    waited: waited - since,
                });
            }
        }
    }

    /// The late ranks, in the whole job, that neither left nor failed by their own word. One signal
    /// to all ranks makes each of them the first to fail on its machine: whoever is about to say so
    /// is not missing.
    fn silent(&self, late: &dyn Fn() -> Vec<usize>) -> Vec<usize> {
        let start = Instant::now();
        loop {
            self.alarm.probe();
            let mut ranks = self.in_job(late());
            ranks.retain(|&rank| !self.alarm.gone(rank));
            if ranks.is_empty() || start.elapsed() > LAST_WORDS {
                return ranks;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ranks of the communicator as ranks of the whole job.
    fn in_job(&self, ranks: Vec<usize>) -> Vec<usize> {
        ranks.into_iter().map(|rank| self.site.world[rank]).collect()
    }

    /// The same call among other ranks: those of one machine, say. `world` and `rank` are as in
    /// [`Site`]; the part counts what moves in `progress`.
    #[cfg(feature = "mpi")]
    pub(crate) fn among<R>(
        &mut self,
        rank: usize,
        world: &[usize],
        progress: Option<&AtomicU64>,
        part: impl FnOnce(&mut Call<'_>) -> R,
    ) -> R {
        let mut call = Call { site: Site { rank, world, ..self.site }, progress, ..*self };
        let result = part(&mut call);
        (self.waited, self.travelled) = (call.waited, call.travelled);
        result
    }
}

impl Site<'_> {
    pub(crate) fn peer_failed(&self, rank: usize, reason: String) -> CommError {
        CommError::PeerFailed { place: self.place, rank, reason, missing: vec![] }
    }

    /// Fails where `peer` (a rank of the communicator) is in another call than this rank.
    #[inline]
    pub(crate) fn compare(&self, peer: usize, there: [u64; 3]) -> Result<(), CommError> {
        if there == self.header.words() { Ok(()) } else { Err(self.mismatch(peer, there)) }
    }

    #[cold]
    pub(crate) fn mismatch(&self, peer: usize, there: [u64; 3]) -> CommError {
        CommError::Mismatch {
            place: self.place,
            rank: self.world[self.rank],
            here: Words(self.header.words()).to_string(),
            peer: self.world[peer],
            there: Words(there).to_string(),
        }
    }

    #[cold]
    pub(crate) fn argument(
        &self,
        what: &'static str,
        found: usize,
        expected: impl fmt::Display,
    ) -> CommError {
        CommError::Argument { place: self.place, what, found, expected: expected.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_tell_calls_apart_and_read_well() {
        let text = |header: Header| Words(header.words()).to_string();
        let sum = Header::new(Collective::Allreduce, 1024).reduce(ReduceOp::Sum, WireFormat::F32);
        assert_eq!(text(sum), "Allreduce (sum) of 1024 elements as f32");
        let max = Header::new(Collective::Allreduce, 1024).reduce(ReduceOp::Max, WireFormat::F32);
        assert_ne!(sum.words(), max.words());
        let broadcast = Header::new(Collective::Broadcast, 12).root(3);
        assert_eq!(text(broadcast), "Broadcast of 12 bytes from root 3");
        let gather = |counts| Header::new(Collective::Allgatherv, 12).counts(counts).words();
        assert_ne!(gather(&[4, 8]), gather(&[8, 4]));
        let garbage = Words([u64::MAX, 0, 1]).to_string();
        assert!(garbage.starts_with("an unknown collective (255)"), "{garbage}");
    }
}
