//! The threads of one rank, and the ways in which an operation shares its work among them.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use core_affinity::CoreId;
use simd_kernels::{ForkJoin, MatMut, PANEL};
use tensor::split_range;

use crate::profile::Profile;

/// The cores that this process may use, listed before its first team pins a thread, which then sees its own only.
static CORES: LazyLock<Vec<CoreId>> = LazyLock::new(|| core_affinity::get_core_ids().unwrap_or_default());

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
    /// for each thread where there are enough, otherwise free.
    pub fn for_rank(rank: usize, ranks: usize, threads: usize) -> Self {
        if ranks * threads <= CORES.len() { Self::Cores { first: rank * threads } } else { Self::Free }
    }
}

/// A team of threads: the calling thread and `threads - 1` workers that wait for it.
pub struct Team {
    pool: ForkJoin,
    profile: Arc<Profile>,
}

impl Team {
    /// Starts a team of `threads` (at least 1) threads; the caller is thread 0 and is placed too. Their work
    /// is recorded in `profile`.
    pub fn new(threads: usize, placement: Placement, profile: Arc<Profile>) -> Self {
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
        let pool = ForkJoin::new(threads.max(1), Arc::new(pin.clone()));
        pin(0);
        Self { pool, profile }
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

    /// Calls `job(part, scratch)` once for each part, each on whichever thread is free next, with
    /// that thread's scratch; for parts of unequal cost, the most expensive first.
    pub fn drain<P: Send, S: Send>(&self, parts: Vec<P>, scratch: &mut [S], job: impl Fn(P, &mut S) + Sync) {
        assert!(scratch.len() >= self.threads(), "{} scratches for {} threads", scratch.len(), self.threads());
        if parts.len() <= 1 || self.threads() == 1 {
            return self.profile.thread(0, || parts.into_iter().for_each(|part| job(part, &mut scratch[0])));
        }
        let slots: Vec<_> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
        let scratch: Vec<_> = scratch.iter_mut().map(|one| Mutex::new(Some(one))).collect();
        let next = AtomicUsize::new(0);
        self.pool.run(&|thread| {
            let Some(scratch) = take(&scratch[thread]) else { return };
            self.profile.thread(thread, || {
                while let Some(part) = slots.get(next.fetch_add(1, Ordering::Relaxed)).and_then(take) {
                    job(part, scratch);
                }
            });
        });
    }

    /// Splits `out` [tokens, rows] by the panels of a packed matrix with `rows` output rows: thread
    /// `i` calls `job(panels, columns)` for its panels, always the same ones.
    pub fn panels(&self, rows: usize, out: MatMut<'_>, job: impl Fn(Range<usize>, MatMut<'_>) + Sync) {
        assert_eq!(out.cols(), rows, "output columns against matrix rows");
        self.each(cut_columns(out, &self.panel_ranges(rows)), |(panels, block)| job(panels, block));
    }

    /// The panels of a matrix with `rows` output rows that each thread owns; none is empty.
    pub fn panel_ranges(&self, rows: usize) -> Vec<Range<usize>> {
        let panels = rows.div_ceil(PANEL);
        (0..self.threads()).map(|i| split_range(panels, self.threads(), i)).filter(|r| !r.is_empty()).collect()
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
pub(crate) fn cut_columns<'a>(out: MatMut<'a>, ranges: &[Range<usize>]) -> Vec<(Range<usize>, MatMut<'a>)> {
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
    fn a_pinned_thread_still_counts_all_cores() {
        let all = std::thread::available_parallelism().expect("Linux tells").get();
        let placement = std::thread::spawn(move || {
            let before = Placement::for_rank(0, 1, all);
            let _team = Team::new(1, before, Arc::new(Profile::new(std::time::Instant::now())));
            (before, Placement::for_rank(0, 1, all))
        });
        assert_eq!(placement.join().expect("no panic"), (Placement::Cores { first: 0 }, Placement::Cores { first: 0 }));
    }
}
