//! A team of threads that runs one job at a time: fork, work side by side, join.
//!
//! ```text
//! run(job):  write job; pending = workers; epoch += 1; wake sleepers
//!            job(0)
//!            wait until pending = 0
//! worker i:  loop: wait until epoch changes; read job; job(i); pending -= 1
//! ```
//!
//! Waiting is spinning for a few microseconds (a decode step forks again within that time), then giving the core
//! away between looks, then sleeping. Why no wake-up is lost and no job is seen twice or freed too early:
//!
//! 1. *The job is visible.* The caller writes `job` and `pending`, then increments `epoch` (SeqCst, so also
//!    release); a worker reads `job` only after it has seen the increment (acquire).
//! 2. *Each worker runs each job once.* A worker remembers the last epoch it served. `epoch` grows by one per run
//!    and the next run starts only after `pending` has reached 0, so a worker can be behind by at most one.
//! 3. *The job outlives its users.* `run` returns, or unwinds, only after it has read `pending == 0` (acquire).
//!    Each worker decrements (release) after its last use of the job. What it touches later is owned by an `Arc`.
//! 4. *No worker sleeps through a run.* A worker sets its `asleep` flag, then reads `epoch`; the caller increments
//!    `epoch`, then reads the flags. All four are SeqCst, so in their single order either the caller's read of the
//!    flag comes after the store (it sees the sleeper and unparks it) or the worker's read of the epoch comes after
//!    the increment (it does not sleep). An `unpark` before `park` makes `park` return at once.
//! 5. *The caller does not sleep through the end.* The same with `caller_asleep` and `pending`: the caller sets the
//!    flag, then reads `pending`; the last worker decrements `pending`, then reads the flag.
//! 6. *Stale wake-ups are harmless.* Every `park` sits in a loop that looks again.
//! 7. *Runs do not overlap.* `run` holds `turn` throughout. A job that calls `run` of its own team would wait for
//!    itself; a thread-local list of the teams that the thread is working for turns that into a panic.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a waiting thread keeps its core when every thread of this process can have one.
const SPIN: Duration = Duration::from_micros(20);

/// How long it goes on looking, giving the core away between looks, before it sleeps.
const YIELD: Duration = Duration::from_millis(1);

/// Threads of all teams alive in this process, callers included. With more of them than cores a spinning thread
/// only keeps another one from the work it waits for.
static TEAM_THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The teams whose jobs this thread is running, innermost last, by the address of what they share.
    static WORKING_FOR: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// A team of threads. [`ForkJoin::run`] calls a job once on each of them and returns when all are done.
///
/// Thread 0 is the caller of `run`; threads 1.. live as long as the team. Thread `i` is the same operating-system
/// thread in every run, so memory it touched first stays near it.
pub struct ForkJoin {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    turn: Mutex<()>,
}

type Job<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    epoch: AtomicUsize,
    pending: AtomicUsize,
    /// The job of the current epoch; written by the caller between runs, read by workers during one.
    job: Cell<Option<*const Job<'static>>>,
    stop: AtomicBool,
    /// Whether worker `i + 1` sleeps or is about to; its own cache line is not worth it, sleeping is rare.
    asleep: Vec<AtomicBool>,
    sleepers: AtomicUsize,
    caller_asleep: AtomicBool,
    caller: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    cores: usize,
}

// SAFETY: every field but `job` is Sync. `job` is written by the thread that holds `turn` while no worker reads it
// (`pending == 0`) and read by workers between two SeqCst operations of the same run (points 1 to 3 above). The
// pointee is `Sync`, so all of them may call it.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it belongs to one thread.
unsafe impl Send for Shared {}

impl ForkJoin {
    /// Starts `threads - 1` threads (the caller of `run` is thread 0). Each calls `on_start` with its index 1..
    /// first, which is the place to pin it to a core; the caller pins itself.
    ///
    /// # Panics
    /// When `threads` is 0 or the operating system refuses a thread; with the payload of an `on_start` that panics.
    pub fn new(threads: usize, on_start: Arc<dyn Fn(usize) + Send + Sync>) -> ForkJoin {
        assert!(threads > 0, "a team of 0 threads");
        TEAM_THREADS.fetch_add(threads, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            pending: AtomicUsize::new(threads.max(1) - 1),
            job: Cell::new(None),
            stop: AtomicBool::new(false),
            asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            sleepers: AtomicUsize::new(0),
            caller_asleep: AtomicBool::new(false),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
            cores: thread::available_parallelism().map_or(1, |n| n.get()),
        });
        let mut team = ForkJoin { shared, workers: Vec::new(), turn: Mutex::new(()) };
        for index in 1..threads {
            let (shared, on_start) = (Arc::clone(&team.shared), Arc::clone(&on_start));
            let worker = thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || {
                    shared.serve(|| on_start(index));
                    shared.work(index);
                })
                .unwrap_or_else(|error| panic!("cannot start thread {index} of {threads}: {error}"));
            team.workers.push(worker);
        }
        // A start is served as a job is, so a panic in it ends here and not in a run that waits for ever.
        team.shared.join();
        let failed = lock(&team.shared.panic).take();
        if let Some(payload) = failed {
            resume_unwind(payload);
        }
        team
    }

    /// Threads of the team, the caller of `run` included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(i)` for every `i` in `0..threads()`, each on its own thread, `job(0)` on this one, and returns
    /// when all have returned. Callers on several threads take turns.
    ///
    /// # Panics
    /// With the payload of a job that panicked, after all others have ended. When a job runs its own team.
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
        self.shared.fork(self.workers.len(), job, &self.workers);
        let own = {
            let _working = Working::enter(team);
            catch_unwind(AssertUnwindSafe(|| job(0)))
        };
        self.shared.join();
        let theirs = lock(&self.shared.panic).take();
        if let Some(payload) = own.err().or(theirs) {
            resume_unwind(payload);
        }
    }
}

impl Drop for ForkJoin {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches all panics, so there is no result to look at.
            let _ = worker.join();
        }
        TEAM_THREADS.fetch_sub(self.shared.asleep.len() + 1, Ordering::Relaxed);
    }
}

impl Shared {
    fn fork(&self, workers: usize, job: &Job<'_>, handles: &[JoinHandle<()>]) {
        let job: *const Job<'_> = job;
        // SAFETY: only the lifetime changes. `run` calls `join` before it returns or unwinds, and after that no
        // worker uses the pointer (point 3).
        let job: *const Job<'static> = unsafe { std::mem::transmute(job) };
        self.job.set(Some(job));
        self.pending.store(workers, Ordering::Relaxed);
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            for (asleep, handle) in self.asleep.iter().zip(handles) {
                if asleep.load(Ordering::SeqCst) {
                    handle.thread().unpark();
                }
            }
        }
    }

    fn join(&self) {
        let done = || self.pending.load(Ordering::SeqCst) == 0;
        if self.look(done) {
            return;
        }
        *lock(&self.caller) = Some(thread::current());
        self.caller_asleep.store(true, Ordering::SeqCst);
        while !done() {
            thread::park();
        }
        self.caller_asleep.store(false, Ordering::SeqCst);
    }

    fn work(&self, index: usize) {
        let mut served = 0;
        loop {
            let changed = || self.epoch.load(Ordering::SeqCst) != served;
            if !self.look(changed) {
                let asleep = &self.asleep[index - 1];
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                asleep.store(true, Ordering::SeqCst);
                while !changed() {
                    thread::park();
                }
                asleep.store(false, Ordering::SeqCst);
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
            served = served.wrapping_add(1);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            let job = self.job.get().expect("an epoch has a job");
            self.serve(|| {
                let _working = Working::enter(std::ptr::from_ref(self).addr());
                // SAFETY: the caller of this epoch's `run` keeps the job alive until `pending` is 0 (point 3).
                unsafe { (*job)(index) }
            });
        }
    }

    /// Runs a worker's share of something that `join` waits for.
    fn serve(&self, share: impl FnOnce()) {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(share)) {
            lock(&self.panic).get_or_insert(payload);
        }
        if self.pending.fetch_sub(1, Ordering::SeqCst) == 1
            && self.caller_asleep.load(Ordering::SeqCst)
            && let Some(caller) = &*lock(&self.caller)
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
        let crowded = TEAM_THREADS.load(Ordering::Relaxed) > self.cores;
        while !crowded && start.elapsed() < SPIN {
            for _ in 0..16 {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        while start.elapsed() < YIELD {
            if ready() {
                return true;
            }
            thread::yield_now();
        }
        ready()
    }
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
