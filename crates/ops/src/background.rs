//! A second thread of each rank, which calls collectives while the team computes.

use std::any::Any;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use comm::{Activity, CommError, Communicator};

type Job = Box<dyn FnOnce() + Send>;

/// Runs communication calls on a second thread, in the order of submission. All ranks must submit
/// the same calls in the same order.
///
/// The thread starts before the team pins the calling thread to a core. A thread started later
/// would inherit that core; started first, it can run on a core that the team leaves free. It
/// sleeps while there are no calls. A group of one rank has no second thread.
pub struct Background {
    comm: Arc<dyn Communicator>,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// The future result of a call on the second thread.
#[must_use = "a call has failed or not, which only its result tells"]
pub struct Pending<T>(Receiver<thread::Result<T>>);

impl Background {
    /// The second thread of this rank of `comm`.
    ///
    /// # Errors When the operating system refuses a thread.
    pub fn new(comm: Arc<dyn Communicator>) -> Result<Self, CommError> {
        if comm.size() == 1 {
            return Ok(Self { comm, jobs: None, thread: None });
        }
        let (jobs, todo) = mpsc::channel::<Job>();
        let name = format!("calls of rank {}", comm.rank());
        let thread =
            thread::Builder::new().name(name).spawn(move || todo.into_iter().for_each(|job| job()));
        let refused = |source: io::Error| {
            let thread = format!("the thread for background calls of rank {}", comm.rank());
            CommError::Thread { thread, reason: source.to_string() }
        };
        let thread = thread.map_err(refused)?;
        Ok(Self { comm, jobs: Some(jobs), thread: Some(thread) })
    }

    /// Submits `call`, which owns its buffers and returns them. The ledger attributes the call to
    /// the calling thread's current activity. The calling thread must not use the same communicator
    /// before it has the result.
    pub fn start<T: Send + 'static>(
        &self,
        comm: &Arc<dyn Communicator>,
        call: impl FnOnce(&dyn Communicator) -> T + Send + 'static,
    ) -> Pending<T> {
        let comm = comm.clone();
        let activity = Activity { background: true, ..comm.ledger().activity() };
        let (sender, result) = mpsc::sync_channel(1);
        let job = move || {
            // The closure is dropped, with its clone of the communicator, before the result is
            // sent. The thread that waits therefore holds the last reference to the communicator.
            let result =
                panic::catch_unwind(AssertUnwindSafe(move || activity.during(|| call(&*comm))));
            // Sending fails only if the thread that waited has panicked; then the result is not
            // needed.
            let _ = sender.send(result);
        };
        match &self.jobs {
            Some(jobs) => jobs
                .send(Box::new(job))
                .expect("no job unwinds into the thread, which ends after the last one"),
            None => job(),
        }
        Pending(result)
    }
}

impl<T> Pending<T> {
    /// Waits for the result. A panic of the call continues on the calling thread.
    pub fn wait(self) -> T {
        let result = self.0.recv().unwrap_or_else(|_| -> thread::Result<T> {
            Err(Box::new("the thread that makes calls is gone") as Box<dyn Any + Send>)
        });
        result.unwrap_or_else(|payload| panic::resume_unwind(payload))
    }
}

impl Drop for Background {
    /// Waits until all submitted calls have run. If this thread is panicking, it aborts the
    /// communicator first: otherwise the other ranks would wait for this one, and the submitted
    /// calls for them.
    fn drop(&mut self) {
        if thread::panicking() {
            let thread = thread::current();
            self.comm
                .abort(&format!("it panicked (thread '{}')", thread.name().unwrap_or("unnamed")));
        }
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use comm::{CommunicatorExt, Phase, ReduceOp, ThreadComm};

    use super::*;

    /// Runs `rank` on each of two ranks and returns what they returned, or that they panicked.
    fn on_two_ranks<R: Send>(
        rank: impl Fn(Arc<dyn Communicator>, Background) -> R + Sync,
    ) -> Vec<thread::Result<R>> {
        let run = |comm: ThreadComm| {
            let comm: Arc<dyn Communicator> = Arc::new(comm);
            let background = Background::new(comm.clone()).unwrap();
            rank(comm, background)
        };
        thread::scope(|scope| {
            let ranks: Vec<_> =
                ThreadComm::group(2).into_iter().map(|comm| scope.spawn(|| run(comm))).collect();
            ranks.into_iter().map(|rank| rank.join()).collect()
        })
    }

    fn sum(
        values: Vec<f32>,
    ) -> impl FnOnce(&dyn Communicator) -> Result<Vec<f32>, CommError> + Send {
        move |comm| {
            let mut values = values;
            comm.all_reduce(&mut values, ReduceOp::Sum).map(|()| values)
        }
    }

    #[test]
    fn calls_are_made_in_order_and_count_where_they_were_handed_over() {
        let results = on_two_ranks(|comm, background| {
            let ledger = comm.ledger();
            ledger.set_phase(Phase::Prefill);
            let first = background.start(&comm, sum(vec![1.0; 1000]));
            let second = background.start(&comm, |comm| {
                let mut all = [0; 2];
                comm.all_gather(&[comm.rank()], &mut all).map(|()| (all, comm.ledger().activity()))
            });
            ledger.set_phase(Phase::Decode);
            ledger.set_layer(Some(9));
            let (all, activity) = second.wait().unwrap();
            assert_eq!(activity, Activity { phase: Phase::Prefill, layer: None, background: true });
            assert_eq!((first.wait().unwrap(), all), (vec![2.0; 1000], [0, 1]));
            ledger.entries().iter().map(|entry| (entry.phase, entry.calls)).collect::<Vec<_>>()
        });
        for result in results {
            assert_eq!(result.unwrap(), [(Phase::Prefill, 1), (Phase::Prefill, 1)]);
        }
    }

    #[test]
    fn errors_and_panics_come_back_and_the_thread_goes_on() {
        let results = on_two_ranks(|comm, background| {
            let panics = background.start(&comm, |_| -> usize { panic!("as the test wants it") });
            let payload = panic::catch_unwind(AssertUnwindSafe(|| panics.wait())).unwrap_err();
            assert_eq!(payload.downcast_ref::<&str>(), Some(&"as the test wants it"));
            assert_eq!(background.start(&comm, sum(vec![1.0])).wait(), Ok(vec![2.0]));
            let length = 1 + comm.rank();
            background.start(&comm, sum(vec![1.0; length])).wait().unwrap_err()
        });
        for result in results {
            assert!(matches!(result.unwrap(), CommError::Mismatch { .. }));
        }
    }

    #[test]
    fn what_was_handed_over_is_made_before_the_end() {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let results = on_two_ranks(|comm, background| {
            for _ in 0..3 {
                drop(background.start(&comm, |comm| {
                    comm.barrier().unwrap();
                    MADE.fetch_add(1, Ordering::Relaxed);
                }));
            }
        });
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(MADE.load(Ordering::Relaxed), 6);
    }

    #[test]
    fn a_rank_that_panics_is_not_waited_for_and_waits_for_nobody() {
        let start = Instant::now();
        let results = on_two_ranks(|comm, background| {
            if comm.rank() == 0 {
                // Nobody answers this one.
                drop(background.start(&comm, |comm| comm.recv(1, &mut [0u8])));
                thread::sleep(Duration::from_millis(20));
                panic!("as the test wants it");
            }
            background.start(&comm, |comm| comm.barrier()).wait().unwrap_err()
        });
        assert!(results[0].is_err());
        let Ok(CommError::PeerFailed { rank: 0, reason, .. }) = &results[1] else {
            panic!("{:?}", results[1])
        };
        assert!(reason.contains("panicked"), "{reason}");
        assert!(start.elapsed() < Duration::from_secs(5), "took {:?}", start.elapsed());
    }
}
