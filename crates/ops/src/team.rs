//! The threads of one rank, and the ways to divide an operation's work among them.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use comm::CommError;
use core_affinity::CoreId;
use simd_kernels::{ForkJoin, Input, MatMut, PANEL, ThreadError};
use tensor::split_range;

use crate::profile::Profile;

/// The cores that this process may use. They are listed before the first team pins a thread,
/// because a pinned thread sees only its own core.
static CORES: LazyLock<Vec<CoreId>> =
    LazyLock::new(|| core_affinity::get_core_ids().unwrap_or_default());

/// Largest number of tokens for which each thread reads only the weights that it touched first.
pub(crate) const FEW_TOKENS: usize = Input::TILE;
/// Number of pieces of a thread's panels. Threads that finish early take pieces of other threads.
pub(crate) const PIECES_PER_THREAD: usize = 8;
/// Largest number of panels in one kernel call.
const PANELS_PER_CALL: usize = 8;

/// Where the threads of a team run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// The operating system places them: right when there are more threads than cores.
    Free,
    /// Thread `i` runs on core `first + i` of those this process may use.
    Cores {
        /// Index of the first core among those the process may use.
        first: usize,
    },
}

impl Placement {
    /// The placement of rank `rank` of the `ranks` ranks on this machine, with `threads` threads
    /// each. Each thread gets a core of its own if all threads together use all cores of the
    /// process. With fewer threads the operating system places them, because only it knows which
    /// cores are idle: two jobs or containers that share a machine would otherwise both pin their
    /// threads to the first cores.
    pub fn for_rank(rank: usize, ranks: usize, threads: usize) -> Self {
        if ranks * threads == CORES.len() {
            Self::Cores { first: rank * threads }
        } else {
            Self::Free
        }
    }
}

/// A team of threads: the calling thread and `threads - 1` workers that wait for its jobs.
pub struct Team {
    pool: ForkJoin,
    profile: Arc<Profile>,
}

impl Team {
    /// Starts a team of `threads` (at least 1) threads. The calling thread is thread 0 and is
    /// placed too. `profile` records the work of all threads.
    ///
    /// # Errors When the operating system refuses a thread. The error has the thread's number.
    pub fn new(
        threads: usize,
        placement: Placement,
        profile: Arc<Profile>,
    ) -> Result<Self, CommError> {
        let cores = match placement {
            Placement::Free => Vec::new(),
            Placement::Cores { first } => CORES.iter().copied().skip(first).take(threads).collect(),
        };
        // A container may forbid pinning. Results do not depend on it.
        let pin = move |thread: usize| {
            if let Some(&core) = cores.get(thread) {
                core_affinity::set_for_current(core);
            }
        };
        let refused = |ThreadError { index, threads, source }: ThreadError| CommError::Thread {
            thread: format!("thread {index} of {threads}"),
            reason: source.to_string(),
        };
        let pool = ForkJoin::new(threads.max(1), Arc::new(pin.clone())).map_err(refused)?;
        pin(0);
        Ok(Self { pool, profile })
    }

    /// Number of threads, including the caller.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Calls `job` once for each part, part `i` on thread `i % threads`, and returns when all parts
    /// are done. Because the assignment is fixed, each thread works on the memory that it touched
    /// first.
    pub fn each<P: Send>(&self, parts: Vec<P>, job: impl Fn(P) + Sync) {
        let threads = self.threads();
        if parts.len() <= 1 || threads == 1 {
            return self.profile.thread(0, || parts.into_iter().for_each(job));
        }
        let slots: Vec<_> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
        self.pool.run(&|thread| {
            self.profile.thread(thread, || {
                for part in slots.iter().skip(thread).step_by(threads).filter_map(take) {
                    job(part);
                }
            });
        });
    }

    /// Calls `job` once for each part. Thread `i` first runs `parts[i]` in order, then takes parts
    /// that other threads have not begun, from the end of their lists. It suits work bound by
    /// arithmetic: the team does not wait for a thread whose core also runs another program.
    ///
    /// # Panics When `parts` has more lists than the team has threads.
    pub fn share<P: Send>(&self, parts: Vec<Vec<P>>, job: impl Fn(P) + Sync) {
        let threads = self.threads();
        assert!(parts.len() <= threads, "parts of {} threads, the team has {threads}", parts.len());
        if threads == 1 {
            return self.profile.thread(0, || parts.into_iter().flatten().for_each(job));
        }
        let slots: Vec<Vec<_>> = parts
            .into_iter()
            .map(|own| own.into_iter().map(|part| Mutex::new(Some(part))).collect())
            .collect();
        self.pool.run(&|thread| {
            self.profile.thread(thread, || {
                let own = slots.get(thread).into_iter().flatten();
                let others = (1..threads)
                    .filter_map(|i| slots.get((thread + i) % threads))
                    .flat_map(|parts| parts.iter().rev());
                own.chain(others).filter_map(take).for_each(&job);
            });
        });
    }

    /// Calls `job(part, scratch)` once for each part. The next free thread takes the next part and
    /// passes its own scratch. It suits parts of unequal cost; put the most expensive first.
    pub fn drain<P: Send, S: Send>(
        &self,
        parts: Vec<P>,
        scratch: &mut [S],
        job: impl Fn(P, &mut S) + Sync,
    ) {
        assert!(
            scratch.len() >= self.threads(),
            "{} scratches for {} threads",
            scratch.len(),
            self.threads()
        );
        if parts.len() <= 1 || self.threads() == 1 {
            return self
                .profile
                .thread(0, || parts.into_iter().for_each(|part| job(part, &mut scratch[0])));
        }
        let slots: Vec<_> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
        let scratch: Vec<_> = scratch.iter_mut().map(|one| Mutex::new(Some(one))).collect();
        let next = AtomicUsize::new(0);
        self.pool.run(&|thread| {
            let Some(scratch) = take(&scratch[thread]) else { return };
            self.profile.thread(thread, || {
                while let Some(part) =
                    slots.get(next.fetch_add(1, Ordering::Relaxed)).and_then(take)
                {
                    job(part, scratch);
                }
            });
        });
    }

    /// Splits `out` [tokens, rows] by the panels of a packed matrix with `rows` output rows, and
    /// calls `job(panels, columns)` for each part. For few tokens, where reading memory takes the
    /// time, each thread always has the same panels.
    pub fn panels(
        &self,
        rows: usize,
        out: MatMut<'_>,
        job: impl Fn(Range<usize>, MatMut<'_>) + Sync,
    ) {
        assert_eq!(out.cols(), rows, "output columns against matrix rows");
        if out.rows() <= FEW_TOKENS {
            return self.each(cut_columns(out, &self.panel_ranges(rows)), |(panels, block)| {
                job(panels, block)
            });
        }
        let (threads, pieces) = self.panel_pieces(rows, PIECES_PER_THREAD);
        let mut parts: Vec<_> = (0..self.threads()).map(|_| Vec::new()).collect();
        for (thread, part) in threads.into_iter().zip(cut_columns(out, &pieces)) {
            parts[thread].push(part);
        }
        self.share(parts, |(panels, block)| job(panels, block));
    }

    /// The [`panel_ranges`](Self::panel_ranges), each cut into up to `most` pieces, and the thread
    /// that owns each piece.
    pub(crate) fn panel_pieces(&self, rows: usize, most: usize) -> (Vec<usize>, Vec<Range<usize>>) {
        // Without other threads, pieces serve no purpose.
        let most = if self.threads() == 1 { 1 } else { most };
        let cut = |(thread, range): (usize, Range<usize>)| {
            let step = range.len().div_ceil(most).next_multiple_of(PANELS_PER_CALL);
            range
                .clone()
                .step_by(step)
                .map(move |start| (thread, start..(start + step).min(range.end)))
        };
        self.panel_ranges(rows).into_iter().enumerate().flat_map(cut).unzip()
    }

    /// The panels that each thread owns of a matrix with `rows` output rows. Empty ranges are left
    /// out.
    pub fn panel_ranges(&self, rows: usize) -> Vec<Range<usize>> {
        let panels = rows.div_ceil(PANEL);
        (0..self.threads())
            .map(|i| split_range(panels, self.threads(), i))
            .filter(|r| !r.is_empty())
            .collect()
    }

    /// Cuts `0..items` into at most one range per thread, at multiples of `granule`. Empty ranges
    /// are left out.
    pub fn ranges(&self, items: usize, granule: usize) -> Vec<Range<usize>> {
        (0..self.threads())
            .map(|i| tensor::split_granular(items, granule, self.threads(), i))
            .filter(|range| !range.is_empty())
            .collect()
    }
}

/// Cuts `out` into the column blocks of consecutive panel ranges.
pub(crate) fn cut_columns<'a>(
    out: MatMut<'a>,
    ranges: &[Range<usize>],
) -> Vec<(Range<usize>, MatMut<'a>)> {
    let mut rest = out;
    let mut blocks = Vec::with_capacity(ranges.len());
    for range in ranges {
        let width = ((range.end - range.start) * PANEL).min(rest.cols());
        let (block, tail) = rest.split_cols(width);
        blocks.push((range.clone(), block));
        rest = tail;
    }
    blocks
}

fn take<P>(slot: &Mutex<Option<P>>) -> Option<P> {
    slot.lock().expect("no job runs while a slot is locked").take()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_done_takes_what_others_have_left() {
        let team = Team::new(3, Placement::Free, Arc::new(Profile::new(std::time::Instant::now())))
            .unwrap();
        // Part 0 ends only after all other parts, so another thread has to take part 1 from thread
        // 0.
        let done = AtomicUsize::new(0);
        team.share(vec![vec![0, 1], vec![2, 3, 4], vec![]], |part| {
            let start = std::time::Instant::now();
            while part == 0 && done.load(Ordering::SeqCst) < 4 {
                assert!(
                    start.elapsed().as_secs() < 60,
                    "{} of 4 other parts are done",
                    done.load(Ordering::SeqCst)
                );
                std::thread::yield_now();
            }
            done.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(done.into_inner(), 5);
    }

    #[test]
    fn pieces_are_the_ranges_of_the_threads() {
        let team = Team::new(2, Placement::Free, Arc::new(Profile::new(std::time::Instant::now())))
            .unwrap();
        for panels in [0, 1, 2, 9, 64, 130] {
            let (threads, pieces) = team.panel_pieces(panels * PANEL, PIECES_PER_THREAD);
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
            for (thread, range) in team.panel_ranges(panels * PANEL).into_iter().enumerate() {
                let own: Vec<_> = pieces
                    .iter()
                    .zip(&threads)
                    .filter(|(_, of)| **of == thread)
                    .map(|(p, _)| p)
                    .collect();
                assert!(
                    own.len() <= PIECES_PER_THREAD
                        && own.iter().rev().skip(1).all(|piece| piece.len() % PANELS_PER_CALL == 0)
                );
                assert_eq!(
                    own.iter().copied().cloned().flatten().collect::<Vec<_>>(),
                    range.collect::<Vec<_>>()
                );
            }
        }
    }

    #[test]
    fn threads_are_pinned_where_they_take_all_cores() {
        let cores = CORES.len();
        assert_eq!(Placement::for_rank(1, cores, 1), Placement::Cores { first: 1 });
        assert_eq!(Placement::for_rank(0, 1, cores), Placement::Cores { first: 0 });
        assert_eq!(Placement::for_rank(0, 1, cores + 1), Placement::Free);
        assert_eq!(Placement::for_rank(0, 1, cores - 1), Placement::Free);
    }

    #[test]
    fn a_pinned_thread_still_counts_all_cores() {
        let all = std::thread::available_parallelism().expect("Linux tells").get();
        let placement = std::thread::spawn(move || {
            let before = Placement::for_rank(0, 1, all);
            let _team =
                Team::new(1, before, Arc::new(Profile::new(std::time::Instant::now()))).unwrap();
            (before, Placement::for_rank(0, 1, all))
        });
        assert_eq!(
            placement.join().expect("no panic"),
            (Placement::Cores { first: 0 }, Placement::Cores { first: 0 })
        );
    }
}
