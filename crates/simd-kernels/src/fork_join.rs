//! A team of threads that runs one job at a time: fork, work side by side, join.
//!
//! ```text
//! run(job):  write job; epoch += 1; wake sleepers
//!            job(0)
//!            wait until served = (epoch + 1) * workers, a start being served as epoch 0
//! worker i:  loop: wait until epoch changes; read job; job(i); served += 1
//! ```
//!
//! Waiting is spinning for a few microseconds (a decode step forks again within that time), then
//! giving the core away between looks, then sleeping; a thread that has lately lost its core to
//! others leaves out the middle. Why no wake-up is lost and no job is seen twice or freed too
//! early:
//!
//! 1. *The job is visible.* The caller writes `job`, then increments `epoch` (SeqCst, so also
//!    release); a worker reads `job` only after it has seen the increment (acquire).
//! 2. *Each worker runs each job once.* A worker remembers the last epoch it served. `epoch` grows
//!    by one per run and the next run starts only after all have served this one, so a worker can
//!    be behind by at most one.
//! 3. *The job outlives its users.* `run` returns, or unwinds, only after it has read `served ==
//!    (epoch + 1) * workers` (acquire). Each worker counts (release) after its last use of the job.
//!    What it touches later is owned by an `Arc`.
//! 4. *No worker sleeps through a run.* A worker sets its `asleep` flag, then reads `epoch`; the
//!    caller increments `epoch`, then reads the flags. All four are SeqCst, so in their single
//!    order either the caller's read of the flag comes after the store (it sees the sleeper and
//!    unparks it) or the worker's read of the epoch comes after the increment (it does not sleep).
//!    An `unpark` before `park` makes `park` return at once.
//! 5. *The caller does not sleep through the end.* The same with `caller_asleep` and `served`: the
//!    caller sets the flag, then reads `served`; a worker increments `served`, then reads the flag.
//! 6. *Stale wake-ups are harmless.* Every `park` sits in a loop that looks again.
//! 7. *Runs do not overlap.* `run` holds `turn` throughout. A job that calls `run` of its own team
//!    would wait for itself; a thread-local list of the teams that the thread is working for turns
//!    that into a panic.
//!
//! A run costs two trips of a cache line between cores: `epoch` and `job` there, `served` back.
//! They are on lines of their own, `served` only ever counts up (resetting it would be a third
//! trip), and the flags of sleepers, which both sides read each time, are written only around a
//! sleep.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::error::Error;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a waiting thread keeps its core when every thread of this process can have one.
const SPIN: Duration = Duration::from_micros(20);

/// How long it goes on looking, giving the core away between looks, before it sleeps.
const YIELD: Duration = Duration::from_millis(1);

/// Threads of all teams alive in this process, callers included. With more of them than cores a
/// spinning thread only keeps another one from the work it waits for.
static TEAM_THREADS: AtomicUsize = AtomicUsize::new(0);

/// Cores that this process may use, counted when its first team starts: a thread that has been
/// pinned since sees its own only.
static CORES: LazyLock<usize> =
    LazyLock::new(|| thread::available_parallelism().map_or(1, |n| n.get()));

/// Whoever took a core for longer than this, when it was given away, computes: another program, or
/// the host of a virtual machine.
const TURN: Duration = Duration::from_micros(200);

/// After two such turns within this time a thread sleeps in place of giving its core away, until
/// the first of them is so long ago: it gets the core when it is woken, and else only after the
/// other's time slice of some milliseconds, once for each run.
const TAKEN: Duration = Duration::from_millis(100);

thread_local! {
    /// When the last two such turns of this thread ended.
    static TURNS: Cell<[Option<Instant>; 2]> = const { Cell::new([None; 2]) };
    /// The teams whose jobs this thread is running, innermost last, by the address of what they
    /// share.
    static WORKING_FOR: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// A team of threads. [`ForkJoin::run`] calls a job once on each of them and returns when all are
/// done.
///
/// Thread 0 is the caller of `run`; threads 1.. live as long as the team. Thread `i` is the same
/// operating-system thread in every run, so memory it touched first stays near it.
pub struct ForkJoin {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    turn: Mutex<()>,
}

type Job<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    call: OwnLine<Call>,
    /// Shares of all epochs so far that workers have served; starting up counts as epoch 0.
    served: OwnLine<AtomicUsize>,
    rest: OwnLine<Rest>,
}

/// What the caller tells the workers.
struct Call {
    epoch: AtomicUsize,
    /// The job of the current epoch, or `None` to end; written by the caller between runs, read by
    /// workers in one.
    job: Cell<Option<*const Job<'static>>>,
}

/// What is seldom written.
struct Rest {
    /// Whether worker `i + 1` sleeps or is about to.
    asleep: Vec<AtomicBool>,
    sleepers: AtomicUsize,
    caller_asleep: AtomicBool,
    caller: Mutex<Option<Thread>>,
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// The operating system refused a thread of a team.
#[derive(Debug)]
pub struct ThreadError {
    /// The thread.
    pub index: usize,
    /// The threads of the team.
    pub threads: usize,
    /// What the system says.
    pub source: io::Error,
}

impl fmt::Display for ThreadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot start thread {} of {}: {}", self.index, self.threads, self.source)
    }
}

impl Error for ThreadError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.source)
    }
}

/// Two cache lines, which some processors fetch together.
#[repr(align(128))]
struct OwnLine<T>(T);

// SAFETY: every field but `job` is Sync. `job` is written by the thread that holds `turn` while no
// worker reads it (all have served the last epoch) and read by workers between two SeqCst
// operations of the same run (points 1 to 3 above). The pointee is `Sync`, so all of them may call
// it.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it belongs to one thread.
unsafe impl Send for Shared {}

impl ForkJoin {
    /// Starts `threads - 1` threads (the caller of `run` is thread 0). Each calls `on_start` with
    /// its index 1.. first, which is the place to pin it to a core; the caller pins itself,
    /// afterwards: cores are counted here.
    ///
    /// # Errors
    /// When the operating system refuses a thread. None of the team is left then.
    ///
    /// # Panics
    /// When `threads` is 0; with the payload of an `on_start` that panics.
    pub fn new(
        threads: usize,
        on_start: Arc<dyn Fn(usize) + Send + Sync>,
    ) -> Result<ForkJoin, ThreadError> {
        assert!(threads > 0, "a team of 0 threads");
        TEAM_THREADS.fetch_add(threads, Ordering::Relaxed);
        LazyLock::force(&CORES);
        let shared = Arc::new(Shared {
            call: OwnLine(Call { epoch: AtomicUsize::new(0), job: Cell::new(None) }),
            served: OwnLine(AtomicUsize::new(0)),
            rest: OwnLine(Rest {
                asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
                sleepers: AtomicUsize::new(0),
                caller_asleep: AtomicBool::new(false),
                caller: Mutex::new(None),
                panicked: AtomicBool::new(false),
                panic: Mutex::new(None),
            }),
        });
        let mut team = ForkJoin { shared, workers: Vec::new(), turn: Mutex::new(()) };
        for index in 1..threads {
            let (shared, on_start) = (Arc::clone(&team.shared), Arc::clone(&on_start));
            let worker = thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || {
                    shared.serve(0, || on_start(index));
                    shared.work(index);
                })
                .map_err(|source| ThreadError { index, threads, source })?;
            team.workers.push(worker);
        }
        // A start is served as a job is, so a panic in it ends here and not in a run that waits for
        // ever.
        team.shared.join();
        if let Some(payload) = team.shared.take_panic() {
            resume_unwind(payload);
        }
        Ok(team)
    }

    /// Threads of the team, the caller of `run` included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(i)` for every `i` in `0..threads()`, each on its own thread, `job(0)` on this
    /// one, and returns when all have returned. Callers on several threads take turns.
    ///
    /// # Panics
    /// With the payload of a job that panicked, after all others have ended. When a job runs its
    /// own team.
    pub fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        let team = Arc::as_ptr(&self.shared).addr();
        let nested = WORKING_FOR.with_borrow(|teams| teams.contains(&team));
        assert!(!nested, "a job runs its own team of {} threads", self.threads());
        if self.workers.is_empty() {
            let _turn = lock(&self.turn);
            let _working = Working::enter(team);
            return job(0);
        }
        let _turn = lock(&self.turn);
        self.shared.fork(job, &self.workers);
        let own = {
            let _working = Working::enter(team);
            catch_unwind(AssertUnwindSafe(|| job(0)))
        };
        if let Err(payload) = own {
            self.shared.keep_panic(payload);
        }
        self.shared.join();
        if let Some(payload) = self.shared.take_panic() {
            resume_unwind(payload);
        }
    }
}

impl Drop for ForkJoin {
    fn drop(&mut self) {
        // After a failed start some workers may not have served epoch 0; they do before they look
        // for a job.
        self.shared.call.0.job.set(None);
        self.shared.call.0.epoch.fetch_add(1, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches all panics, so there is no result to look at.
            let _ = worker.join();
        }
        TEAM_THREADS.fetch_sub(self.shared.rest.0.asleep.len() + 1, Ordering::Relaxed);
    }
}

impl Shared {
    fn fork(&self, job: &Job<'_>, handles: &[JoinHandle<()>]) {
        let job: *const Job<'_> = job;
        // SAFETY: only the lifetime changes. `run` calls `join` before it returns or unwinds, and
        // after that no worker uses the pointer (point 3).
        let job: *const Job<'static> = unsafe { std::mem::transmute(job) };
        self.call.0.job.set(Some(job));
        self.call.0.epoch.fetch_add(1, Ordering::SeqCst);
        let rest = &self.rest.0;
        if rest.sleepers.load(Ordering::SeqCst) > 0 {
            for (asleep, handle) in rest.asleep.iter().zip(handles) {
                if asleep.load(Ordering::SeqCst) {
                    handle.thread().unpark();
                }
            }
        }
    }

    fn join(&self) {
        let target = self.served_after(self.call.0.epoch.load(Ordering::Relaxed));
        let done = || self.served.0.load(Ordering::SeqCst) == target;
        if self.look(done) {
            return;
        }
        *lock(&self.rest.0.caller) = Some(thread::current());
        self.rest.0.caller_asleep.store(true, Ordering::SeqCst);
        while !done() {
            thread::park();
        }
        self.rest.0.caller_asleep.store(false, Ordering::SeqCst);
    }

    /// What `served` is when all workers have served `epoch`.
    fn served_after(&self, epoch: usize) -> usize {
        epoch.wrapping_add(1).wrapping_mul(self.rest.0.asleep.len())
    }

    /// Keeps the first payload of a run. Another one is forgotten: to drop it may panic, before the
    /// share is counted.
    fn keep_panic(&self, payload: Box<dyn Any + Send>) {
        let mut first = lock(&self.rest.0.panic);
        if first.is_none() {
            *first = Some(payload);
        } else {
            std::mem::forget(payload);
        }
        self.rest.0.panicked.store(true, Ordering::Relaxed);
    }

    fn take_panic(&self) -> Option<Box<dyn Any + Send>> {
        // The flag was set before the worker counted its share, which `join` has seen.
        if self.rest.0.panicked.load(Ordering::Relaxed) {
            self.rest.0.panicked.store(false, Ordering::Relaxed);
            return lock(&self.rest.0.panic).take();
        }
        None
    }

    fn work(&self, index: usize) {
        let mut epoch = 0;
        loop {
            let changed = || self.call.0.epoch.load(Ordering::SeqCst) != epoch;
            if !self.look(changed) {
                let asleep = &self.rest.0.asleep[index - 1];
                self.rest.0.sleepers.fetch_add(1, Ordering::SeqCst);
                asleep.store(true, Ordering::SeqCst);
                while !changed() {
                    thread::park();
                }
                asleep.store(false, Ordering::SeqCst);
                self.rest.0.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
            epoch = epoch.wrapping_add(1);
            let Some(job) = self.call.0.job.get() else { return };
            self.serve(epoch, || {
                let _working = Working::enter(std::ptr::from_ref(self).addr());
                // SAFETY: the caller of this epoch's `run` keeps the job alive until all have
                // served it (point 3).
                unsafe { (*job)(index) }
            });
        }
    }

    /// Runs a worker's share of an epoch, which `join` waits for.
    fn serve(&self, epoch: usize, share: impl FnOnce()) {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(share)) {
            self.keep_panic(payload);
        }
        let served = self.served.0.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        if served == self.served_after(epoch)
            && self.rest.0.caller_asleep.load(Ordering::SeqCst)
            && let Some(caller) = &*lock(&self.rest.0.caller)
        {
            caller.unpark();
        }
    }

    /// Waits for `ready` without sleeping; false when it is time to sleep.
    fn look(&self, ready: impl Fn() -> bool) -> bool {
        // Most waits end here, before the first look at a clock.
        for _ in 0..32 {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        let start = Instant::now();
        let crowded = TEAM_THREADS.load(Ordering::Relaxed) > *CORES;
        while !crowded && start.elapsed() < SPIN {
            for _ in 0..16 {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        // With more threads of teams than cores it is one of them that takes the core, and gives it
        // back when it waits.
        while start.elapsed() < YIELD && (crowded || !is_taken()) {
            if ready() {
                return true;
            }
            let given = Instant::now();
            thread::yield_now();
            if !crowded && given.elapsed() > TURN {
                note_turn(Instant::now());
            }
        }
        ready()
    }
}

/// Whether others have been computing on this thread's core.
fn is_taken() -> bool {
    TURNS.get()[0].is_some_and(|turn| turn.elapsed() < TAKEN)
}

fn note_turn(end: Instant) {
    TURNS.set([TURNS.get()[1], Some(end)]);
}

/// Marks this thread as working for a team until dropped, also by unwinding.
struct Working;

impl Working {
    fn enter(team: usize) -> Working {
        WORKING_FOR.with_borrow_mut(|teams| teams.push(team));
        Working
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        WORKING_FOR.with_borrow_mut(|teams| teams.pop());
    }
}

/// Locks; a panic while a lock was held has left nothing half-done here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
