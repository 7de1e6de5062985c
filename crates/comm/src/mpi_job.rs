//! The job that `mpirun` started: which rank runs where, who lives, and how its processes get
//! memory in common.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::process;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use crate::alarm::{Ending, News, Watch};
use crate::error::CommError;
use crate::mpi_sys::{Process, World};
use crate::segment::Segment;

/// The tag of news about ranks. Groups use those from 1 on.
const NEWS: usize = 0;
/// A failed job that has not ended by itself after this long is ended by MPI.
const GRACE: Duration = Duration::from_secs(3);
/// How long news to one rank may take to leave this process, which is about to end.
const HURRY: Duration = Duration::from_millis(20);
/// So often each rank asks rank 0 for the time.
const QUESTIONS: usize = 8;
// What a message of news begins with; the rank and a reason follow.
const FAILED: u64 = 1;
const LEFT: u64 = 2;

/// Gives the words of this rank and returns those of all ranks of a group, one after the other.
pub(crate) type Gather<'a> = &'a mut dyn FnMut(&[u64]) -> Result<Vec<u64>, CommError>;

/// What a communicator of all ranks and those split from it share.
pub(crate) struct Job {
    pub world: Arc<World>,
    /// What makes a time of each rank's clock one of this rank's clock, in nanoseconds.
    pub clocks: Arc<[i64]>,
    /// For each rank, a number that it shares with the ranks of its machine.
    pub machine: Arc<[usize]>,
    /// Whether ranks of one machine may use its memory.
    pub shared: bool,
}

/// Maps one segment into all processes of `local`, which are ranks of the group behind `gather`
/// (empty: this rank wants none), the first of which creates it. Nothing if one of them could not.
///
/// The segment is a file without a name that the others open through the creator's `/proc` entry:
/// it is gone with the last process that maps it, killed or not.
pub(crate) fn share(
    local: &[usize],
    own: usize,
    words: usize,
    data: usize,
    gather: Gather<'_>,
) -> Result<Option<Arc<Segment>>, CommError> {
    // The last word has a number that nobody else's segment has.
    let nonce_at = words / 8;
    let words = words + 8;
    let nonce = nonce();
    let created = match local.first() {
        Some(&first) if first == own => Segment::create(words, data).ok(),
        _ => None,
    };
    let mut offer = [0, 0, 0, 0];
    if let Some((segment, file)) = &created {
        segment.word(nonce_at).store(nonce, Relaxed);
        offer = [process::id() as u64, file.as_raw_fd() as u64 + 1, nonce, process_space()];
    }
    let offers = gather(&offer)?;
    let mut mapped = None;
    if let Some(&first) = local.first().filter(|&&first| first != own) {
        let [id, descriptor, nonce, space] = [0, 1, 2, 3].map(|i| offers[4 * first + i]);
        let open = |path| fs::OpenOptions::new().read(true).write(true).open(path);
        // In another name space the number of the process is that of another process.
        mapped = (descriptor > 0 && space == process_space())
            .then(|| open(format!("/proc/{id}/fd/{}", descriptor - 1)).ok())
            .flatten()
            .and_then(|file| Segment::of_file(&file, words, data).ok())
            .filter(|segment| segment.word(nonce_at).load(Relaxed) == nonce);
    }
    let there = gather(&[(created.is_some() || mapped.is_some()) as u64])?;
    // Only now may the creator close its file, at the end of `created`.
    let all = local.iter().all(|&rank| there[rank] != 0);
    Ok(created.map(|(segment, _)| segment).or(mapped).filter(|_| all).map(Arc::new))
}

fn nonce() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish() | 1
}

/// Compares the clocks of all ranks, each with that of rank 0; see [`Job::clocks`]. Collective, for
/// the start.
///
/// As much is known of a clock elsewhere as the shortest of some questions takes. Clocks that drift
/// apart later (those of machines with NTP by less than a millisecond in minutes) blur what is
/// waiting and what is travel, never their sum.
pub(crate) fn clocks(world: &World) -> Result<Arc<[i64]>, CommError> {
    let receive = |from: usize| loop {
        if let Some((_, mut transfer)) = world.receive(Some(from), NEWS)? {
            while !transfer.done()? {
                thread::yield_now();
            }
            return Ok(i64::from_le_bytes(
                (*transfer.into_received()).try_into().unwrap_or_default(),
            ));
        }
        thread::yield_now();
    };
    let send = |to: usize| {
        let mut transfer =
            world.send(to, NEWS, world.buffers.with(&world.clock().to_le_bytes()))?;
        while !transfer.done()? {
            thread::yield_now();
        }
        Ok(())
    };
    let mut to_rank_0 = (i64::MAX, 0);
    for rank in 1..world.size() {
        for _ in 0..QUESTIONS {
            if world.rank() == 0 {
                receive(rank)?;
                send(rank)?;
            } else if world.rank() == rank {
                let asked = world.clock();
                send(0)?;
                let there = receive(0)?;
                let took = world.clock() - asked;
                to_rank_0 = to_rank_0.min((took, there - (asked + took / 2)));
            }
        }
    }
    let all = world.all_gather(&[to_rank_0.1 as u64])?;
    Ok(all.into_iter().map(|other| other as i64 - to_rank_0.1).collect())
}

/// The name space in which this process's id counts; zero where the system does not say.
pub(crate) fn process_space() -> u64 {
    fs::metadata("/proc/self/ns/pid").map_or(0, |space| space.ino())
}

/// The watch of a rank over those that its board does not show.
pub(crate) struct Lookout {
    world: Arc<World>,
    /// Ranks that do not see this rank's board.
    far: Vec<usize>,
    /// Processes of this machine.
    near: Vec<(usize, Process)>,
}

impl Lookout {
    /// `far`: the ranks that do not see this rank's board; `near`: processes to watch, with their
    /// ranks.
    pub(crate) fn new(world: Arc<World>, far: Vec<usize>, near: Vec<(usize, Process)>) -> Lookout {
        Lookout { world, far, near }
    }

    fn tell(&self, kind: u64, rank: usize, text: &str) {
        let news =
            [&kind.to_le_bytes()[..], &(rank as u64).to_le_bytes(), text.as_bytes()].concat();
        let news = self.world.buffers.with(&news);
        for &to in &self.far {
            // Small enough to leave at once, as a rule. One that cannot be sent has nobody to read
            // it.
            if let Ok(mut transfer) = self.world.send(to, NEWS, news.clone()) {
                let start = Instant::now();
                while matches!(transfer.done(), Ok(false)) && start.elapsed() < HURRY {
                    thread::yield_now();
                }
            }
        }
    }

    /// The news that have come from far ranks.
    fn hear(&self) -> Result<Vec<News>, CommError> {
        let mut news = Vec::new();
        while let Some((from, mut transfer)) = self.world.receive(None, NEWS)? {
            while !transfer.done()? {
                thread::yield_now();
            }
            let data = transfer.into_received();
            let word = |index: usize| {
                let bytes = data.get(8 * index..8 * index + 8)?;
                Some(u64::from_le_bytes(bytes.try_into().ok()?))
            };
            match (word(0), word(1)) {
                (Some(FAILED), Some(rank)) => {
                    let reason = String::from_utf8_lossy(&data[16..]).into_owned();
                    news.push(News::Failed { rank: rank as usize, reason, teller: Some(from) });
                }
                (Some(LEFT), Some(_)) => {
                    news.push(News::Left { rank: from });
                }
                _ => {
                    let reason = format!("it sent news of {} bytes that make no sense", data.len());
                    news.push(News::Failed { rank: from, reason, teller: None });
                }
            }
        }
        Ok(news)
    }
}

impl Watch for Lookout {
    fn failed(&self, rank: usize, reason: &str) {
        self.world.set_ending(Ending::Failed);
        let world = self.world.clone();
        // Ranks that wait fail by themselves; one that computes, or hangs elsewhere, is ended with
        // the job.
        let last_resort = move || {
            thread::sleep(GRACE);
            world.abort();
        };
        if thread::Builder::new().name("last resort".into()).spawn(last_resort).is_err() {
            self.world.abort();
        }
        // After that, since a call of MPI that another thread hangs in would keep this one, too.
        self.tell(FAILED, rank, reason);
    }

    fn left(&self, rank: usize) {
        self.tell(LEFT, rank, "");
    }

    fn close(&self, ending: Ending) {
        self.world.set_ending(ending);
    }

    fn look(&self) -> Vec<News> {
        // Who is dead is seen before what it said is read, and reported after: its own words count.
        let dead: Vec<usize> = self
            .near
            .iter()
            .filter(|(_, process)| !process.lives())
            .map(|&(rank, _)| rank)
            .collect();
        let mut news = self.hear().unwrap_or_else(|error| {
            let reason = format!("it could not ask for news: {error}");
            vec![News::Failed { rank: self.world.rank(), reason, teller: None }]
        });
        news.extend(dead.into_iter().map(|rank| {
            let reason = "its process ended without a word".to_owned();
            News::Failed { rank, reason, teller: None }
        }));
        news
    }
}
