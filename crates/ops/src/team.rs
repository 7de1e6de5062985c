//! The threads of one rank, and the ways in which an operation shares its work among them.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use comm::CommError;
use core_affinity::CoreId;
use simd_kernels::{ForkJoin, Input, MatMut, PANEL, ThreadError};
use tensor::split_range;

use crate::profile::Profile;

/// The cores that this process may use, listed before its first team pins a thread, which then sees
/// its own only.
static CORES: LazyLock<Vec<CoreId>> =
    LazyLock::new(|| core_affinity::get_core_ids().unwrap_or_default());

/// Tokens up to which each thread keeps to the weights that it touched first.
pub(crate) const FEW_TOKENS: usize = Input::TILE;
/// Pieces of a thread's panels, from which other threads can take when they are done.
pub(crate) const PIECES: usize = 8;
/// Panels that kernels take together, at most.
const TOGETHER: usize = 8;

/// Where the threads of a team run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Wherever the system puts them: right when there are more threads than cores.
    Free,
    /// Thread `i` on the `first + i`-th core this process may use.
    Cores {
        /// Index of the first core among those the process may use.
        first: usize,
    },
}

impl Placement {
    /// The placement of rank `rank` of `ranks` on this machine with `threads` threads each: a core
    /// for each thread where together they take all of the process's cores, otherwise free. With
    /// fewer threads nobody knows which cores are idle but the system: two jobs, or two containers
    /// with a share of the machine, would otherwise meet on the first ones.
    pub fn for_rank(rank: usize, ranks: usize, threads: usize) -> Self {
        if ranks * threads == CORES.len() {
            Self::Cores { first: rank * threads }
        } else {
            Self::Free
        }
    }
}

/// A team of threads: the calling thread and `threads - 1` workers that wait for it.
pub struct Team {
    pool: ForkJoin,
    profile: Arc<Profile>,
}

impl Team {
    /// Starts a team of `threads` (at least 1) threads; the caller is thread 0 and is placed too.
    /// Their work is recorded in `profile`.
    ///
    /// # Errors
    /// When the operating system refuses a thread, with its number.
    pub fn new(
        threads: usize,
        placement: Placement,
        profile: Arc<Profile>,
    ) -> Result<Self, CommError> {
        let cores = match placement {
            Placement::Free => Vec::new(),
            Placement::Cores { first } => CORES.iter().copied().skip(first).take(threads).collect(),
        };
        // A refused pin (a container may forbid it) costs speed, not correctness.
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

    /// Number of threads, the caller among them.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Calls `job` once for each part, part `i` on thread `i % threads`; returns when all are done.
    /// The fixed assignment keeps each thread on the memory that it touched first.
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

    /// Calls `job` once for each part: `parts[i]` in their order on thread `i`, which then takes
    /// what the others have not begun, their last parts first. For arithmetic, which a thread whose
    /// core another program slows down would else hold up.
    ///
    /// # Panics
    /// When there are parts of more threads than the team has.
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

    /// Calls `job(part, scratch)` once for each part, each on whichever thread is free next, with
    /// that thread's scratch; for parts of unequal cost, the most expensive first.
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

    /// Splits `out` [tokens, rows] by the panels of a packed matrix with `rows` output rows: thread
    /// `i` calls `job(panels, columns)` for its panels, always the same ones for few tokens, whose
    /// time is that of the memory.
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
        let (threads, pieces) = self.panel_pieces(rows, PIECES);
        let mut parts: Vec<_> = (0..self.threads()).map(|_| Vec::new()).collect();
        for (thread, part) in threads.into_iter().zip(cut_columns(out, &pieces)) {
            parts[thread].push(part);
        }
        self.share(parts, |(panels, block)| job(panels, block));
    }

    /// As [`panel_ranges`](Self::panel_ranges), each range in up to `most` pieces; and the thread
    /// of each piece.
    pub(crate) fn panel_pieces(&self, rows: usize, most: usize) -> (Vec<usize>, Vec<Range<usize>>) {
        // Nobody takes from a thread that is alone.
        let most = if self.threads() == 1 { 1 } else { most };
        let cut = |(thread, range): (usize, Range<usize>)| {
            let step = range.len().div_ceil(most).next_multiple_of(TOGETHER);
            range
                .clone()
                .step_by(step)
                .map(move |start| (thread, start..(start + step).min(range.end)))
        };
        self.panel_ranges(rows).into_iter().enumerate().flat_map(cut).unzip()
    }

    /// The panels of a matrix with `rows` output rows that each thread owns; none is empty.
    pub fn panel_ranges(&self, rows: usize) -> Vec<Range<usize>> {
        let panels = rows.div_ceil(PANEL);
        (0..self.threads())
            .map(|i| split_range(panels, self.threads(), i))
            .filter(|r| !r.is_empty())
            .collect()
    }

    /// Cuts `0..items` into at most one range a thread, at multiples of `granule`; none is empty.
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
        // The first thread's first part ends when all others have: some thread has to take its
        // second one.
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
            let (threads, pieces) = team.panel_pieces(panels * PANEL, PIECES);
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
            for (thread, range) in team.panel_ranges(panels * PANEL).into_iter().enumerate() {
                let own: Vec<_> = pieces
                    .iter()
                    .zip(&threads)
                    .filter(|(_, of)| **of == thread)
                    .map(|(p, _)| p)
                    .collect();
                assert!(
                    own.len() <= PIECES
                        && own.iter().rev().skip(1).all(|piece| piece.len() % TOGETHER == 0)
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
