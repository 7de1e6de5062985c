//! The ledger: calls, payload bytes, seconds and waiting per collective and phase.

use std::cell::Cell as ThreadCell;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The kinds of communication that the ledger tells apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Collective {
    /// Every rank gets the elementwise sum or maximum.
    Allreduce,
    /// Every rank gets the blocks of all ranks, all of one size.
    Allgather,
    /// Every rank gets the blocks of all ranks, each of its own size.
    Allgatherv,
    /// Every rank gets its share of the elementwise sum.
    ReduceScatter,
    /// Every rank gets the root's data.
    Broadcast,
    /// One message to one rank.
    Send,
    /// One message from one rank.
    Recv,
    /// Nobody leaves before everybody has come.
    Barrier,
    /// The ranks agree on smaller groups.
    Split,
}

impl Collective {
    /// All kinds, in the order in which the ledger lists them.
    pub const ALL: [Collective; 9] = [
        Collective::Allreduce,
        Collective::Allgather,
        Collective::Allgatherv,
        Collective::ReduceScatter,
        Collective::Broadcast,
        Collective::Send,
        Collective::Recv,
        Collective::Barrier,
        Collective::Split,
    ];

    /// The name as reports print it: `"Allreduce"`, `"Reduce-scatter"`.
    pub fn name(self) -> &'static str {
        match self {
            Collective::Allreduce => "Allreduce",
            Collective::Allgather => "Allgather",
            Collective::Allgatherv => "Allgatherv",
            Collective::ReduceScatter => "Reduce-scatter",
            Collective::Broadcast => "Broadcast",
            Collective::Send => "Send",
            Collective::Recv => "Recv",
            Collective::Barrier => "Barrier",
            Collective::Split => "Split",
        }
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What the program is doing while it communicates.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Phase {
    /// Reading and placing weights.
    Load,
    /// Reading the prompt.
    Prefill,
    /// Writing one token after the other.
    Decode,
    /// Everything else.
    Other,
}

impl Phase {
    /// All phases, in the order in which the ledger lists them.
    pub const ALL: [Phase; 4] = [Phase::Load, Phase::Prefill, Phase::Decode, Phase::Other];

    /// The name as reports print it, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Load => "load",
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
            Phase::Other => "other",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a thread is doing while it communicates: where its calls count, and where they fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Activity {
    /// The phase under which they count.
    pub phase: Phase,
    /// The decoder layer that their errors name.
    pub layer: Option<usize>,
    /// Whether other threads of the rank compute meanwhile: then a call that waits leaves its core
    /// to them.
    pub background: bool,
}

thread_local! {
    static ACTIVITY: ThreadCell<Option<Activity>> = const { ThreadCell::new(None) };
}

impl Activity {
    /// Does `work` on this thread, whose calls have this activity whatever their ledgers say
    /// meanwhile: for calls that one thread makes for another.
    pub fn during<R>(self, work: impl FnOnce() -> R) -> R {
        struct Restore(Option<Activity>);
        impl Drop for Restore {
            fn drop(&mut self) {
                ACTIVITY.set(self.0);
            }
        }
        let _restore = Restore(ACTIVITY.replace(Some(self)));
        work()
    }
}

/// One line of the ledger: everything one rank did of one kind in one phase.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Entry {
    /// The kind of communication.
    pub collective: Collective,
    /// The phase that was set when it began.
    pub phase: Phase,
    /// Finished calls, whether or not they succeeded.
    pub calls: u64,
    /// Bytes of payload: the whole input of an Allreduce, Reduce-scatter or Broadcast (as encoded
    /// for the wire), the whole result of an Allgather or Allgatherv, the message of a Send or
    /// Recv.
    pub payload_bytes: u64,
    /// Wall-clock time inside the calls.
    pub seconds: f64,
    /// The part of `seconds` in which this rank only waited for a slower one: the rest is the
    /// data's way. Over messages that begins when the last rank has sent, by clocks that were
    /// compared at the start. Where one rank of a machine exchanges messages for the others, its
    /// way counts as theirs.
    pub wait_seconds: f64,
}

/// One call of its own, as a trace shows it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TracedCall {
    /// The kind of communication.
    pub collective: Collective,
    /// When it began.
    pub start: Instant,
    /// How long it took.
    pub length: Duration,
    /// The part of `length` in which this rank only waited for a slower one.
    pub waited: Duration,
    /// As in [`Entry`].
    pub payload_bytes: u64,
    /// Whether the rank computed meanwhile.
    pub background: bool,
}

#[derive(Default, Debug)]
struct Cell {
    calls: AtomicU64,
    payload_bytes: AtomicU64,
    nanos: AtomicU64,
    wait_nanos: AtomicU64,
}

const NO_LAYER: usize = usize::MAX;

/// Counts what one rank communicates; a communicator and all that is split from it share one.
///
/// The counters are relaxed atomics in a fixed table: recording a call allocates nothing and takes
/// no lock, unless calls are traced one by one.
#[derive(Debug)]
pub struct Ledger {
    cells: [[Cell; Phase::ALL.len()]; Collective::ALL.len()],
    phase: AtomicU8,
    layer: AtomicUsize,
    tracing: AtomicBool,
    traced: Mutex<Vec<TracedCall>>,
}

impl Default for Ledger {
    fn default() -> Self {
        Ledger {
            cells: Default::default(),
            phase: AtomicU8::new(Phase::Other as u8),
            layer: AtomicUsize::new(NO_LAYER),
            tracing: AtomicBool::new(false),
            traced: Mutex::default(),
        }
    }
}

impl Ledger {
    /// From now on calls count under `phase`. A new ledger stands at [`Phase::Other`].
    pub fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Relaxed);
    }

    /// The phase under which calls count now.
    pub fn phase(&self) -> Phase {
        self.activity().phase
    }

    /// The decoder layer that error messages name from now on, if any.
    pub fn set_layer(&self, layer: Option<usize>) {
        self.layer.store(layer.unwrap_or(NO_LAYER), Relaxed);
    }

    /// The decoder layer that error messages name now.
    pub fn layer(&self) -> Option<usize> {
        self.activity().layer
    }

    /// What the calling thread is doing: what was set here, or what it does
    /// [`during`](Activity::during) something else.
    #[inline]
    pub fn activity(&self) -> Activity {
        ACTIVITY.get().unwrap_or_else(|| Activity {
            phase: Phase::ALL[self.phase.load(Relaxed) as usize],
            layer: Some(self.layer.load(Relaxed)).filter(|&layer| layer != NO_LAYER),
            background: false,
        })
    }

    /// The lines with at least one call, by phase, then by kind.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for phase in Phase::ALL {
            for collective in Collective::ALL {
                let cell = &self.cells[collective as usize][phase as usize];
                let calls = cell.calls.load(Relaxed);
                if calls > 0 {
                    entries.push(Entry {
                        collective,
                        phase,
                        calls,
                        payload_bytes: cell.payload_bytes.load(Relaxed),
                        seconds: cell.nanos.load(Relaxed) as f64 * 1e-9,
                        wait_seconds: cell.wait_nanos.load(Relaxed) as f64 * 1e-9,
                    });
                }
            }
        }
        entries
    }

    /// Sets all counters to zero; phase and layer stay.
    pub fn reset(&self) {
        for cell in self.cells.iter().flatten() {
            for counter in [&cell.calls, &cell.payload_bytes, &cell.nanos, &cell.wait_nanos] {
                counter.store(0, Relaxed);
            }
        }
    }

    /// Starts or stops to keep each call by itself.
    pub fn trace(&self, on: bool) {
        self.tracing.store(on, Relaxed);
    }

    /// The calls that were traced so far, in the order in which they ended; they are forgotten.
    pub fn take_traced(&self) -> Vec<TracedCall> {
        std::mem::take(&mut *self.traced.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds one call, which ends now.
    pub(crate) fn record(
        &self,
        collective: Collective,
        activity: Activity,
        payload_bytes: usize,
        total: Duration,
        waited: Duration,
    ) {
        let cell = &self.cells[collective as usize][activity.phase as usize];
        cell.calls.fetch_add(1, Relaxed);
        cell.payload_bytes.fetch_add(payload_bytes as u64, Relaxed);
        cell.nanos.fetch_add(total.as_nanos() as u64, Relaxed);
        if self.tracing.load(Relaxed) {
            let start = Instant::now().checked_sub(total).unwrap_or_else(Instant::now);
            let call = TracedCall {
                collective,
                start,
                length: total,
                waited: waited.min(total),
                payload_bytes: payload_bytes as u64,
                background: activity.background,
            };
            self.traced.lock().unwrap_or_else(PoisonError::into_inner).push(call);
        }
        if !waited.is_zero() {
            cell.wait_nanos.fetch_add(waited.min(total).as_nanos() as u64, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_kinds_and_phases_apart_and_reset_clears_them() {
        let ledger = Ledger::default();
        assert_eq!((ledger.phase(), ledger.layer()), (Phase::Other, None));
        ledger.set_layer(Some(0));
        assert_eq!(ledger.layer(), Some(0));
        let at = |phase| Activity { phase, ..ledger.activity() };
        let (ms, us) = (Duration::from_millis(1), Duration::from_micros(1));
        ledger.record(Collective::Allreduce, at(Phase::Prefill), 4096, ms, us);
        ledger.record(Collective::Allreduce, at(Phase::Decode), 100, ms, us);
        ledger.record(Collective::Allreduce, at(Phase::Decode), 50, ms, ms * 9);
        let entries = ledger.entries();
        assert_eq!(entries.len(), 2);
        assert_eq!((entries[0].phase, entries[0].payload_bytes), (Phase::Prefill, 4096));
        assert_eq!((entries[1].calls, entries[1].payload_bytes), (2, 150));
        assert!((entries[1].seconds - 2e-3).abs() < 1e-12);
        assert!(
            (entries[1].wait_seconds - 1.001e-3).abs() < 1e-12,
            "waiting never exceeds the call"
        );
        ledger.reset();
        assert!(ledger.entries().is_empty());
        assert_eq!(ledger.layer(), Some(0));
    }

    #[test]
    fn calls_are_kept_one_by_one_only_while_traced() {
        let ledger = Ledger::default();
        let us = Duration::from_micros(1);
        let record =
            |bytes| ledger.record(Collective::Allreduce, ledger.activity(), bytes, 5 * us, 9 * us);
        record(1);
        ledger.trace(true);
        let before = Instant::now();
        record(2);
        ledger.trace(false);
        record(3);
        let calls = ledger.take_traced();
        assert_eq!(calls.len(), 1);
        assert_eq!((calls[0].payload_bytes, calls[0].length, calls[0].waited), (2, 5 * us, 5 * us));
        assert!(calls[0].start + calls[0].length >= before, "it ended when it was recorded");
        assert!(ledger.take_traced().is_empty());
        assert_eq!(ledger.entries()[0].calls, 3);
    }

    #[test]
    fn an_activity_holds_for_one_thread_and_while_it_lasts() {
        let ledger = Ledger::default();
        ledger.set_phase(Phase::Decode);
        let before = ledger.activity();
        let errand = Activity { phase: Phase::Prefill, layer: Some(3), background: true };
        errand.during(|| {
            ledger.set_layer(Some(4));
            assert_eq!(ledger.activity(), errand);
            std::thread::scope(|scope| {
                let other = scope.spawn(|| ledger.activity()).join().unwrap();
                assert_eq!(other, Activity { layer: Some(4), ..before });
            });
            before.during(|| assert_eq!(ledger.activity(), before));
            assert_eq!((ledger.phase(), ledger.layer()), (Phase::Prefill, Some(3)));
        });
        assert_eq!((ledger.phase(), ledger.layer()), (Phase::Decode, Some(4)));
    }
}
