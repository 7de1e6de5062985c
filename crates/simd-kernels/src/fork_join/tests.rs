//! The team under every number of threads, after every kind of pause, with panics, nesting and
//! several callers.

use super::*;

fn team(threads: usize) -> ForkJoin {
    ForkJoin::new(threads, Arc::new(|_| ())).expect("threads")
}

fn message(result: thread::Result<()>) -> String {
    let payload = result.expect_err("a panic should have come through");
    payload
        .downcast_ref::<&str>()
        .map(|text| text.to_string())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .expect("a message")
}

#[test]
fn each_index_runs_once_on_its_own_thread() {
    for threads in [1, 2, 3, 16, 64] {
        let team = team(threads);
        assert_eq!(team.threads(), threads);
        let ids: Vec<_> = (0..threads).map(|_| Mutex::new(None)).collect();
        let counts: Vec<_> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
        for run in 1..=200 {
            team.run(&|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
                let id = thread::current().id();
                assert_eq!(*lock(&ids[i]).get_or_insert(id), id, "thread {i} changed");
            });
            for (i, count) in counts.iter().enumerate() {
                assert_eq!(count.load(Ordering::Relaxed), run, "thread {i} of {threads}");
            }
        }
    }
}

#[test]
fn runs_after_every_kind_of_pause() {
    let team = team(3);
    let total = AtomicUsize::new(0);
    // Long enough to find the workers spinning, yielding, about to sleep, and asleep.
    for micros in [0, 5, 15, 25, 100, 900, 990, 1000, 1010, 1100, 3000] {
        for _ in 0..20 {
            thread::sleep(Duration::from_micros(micros));
            team.run(&|i| {
                total.fetch_add(1 + i, Ordering::Relaxed);
            });
        }
    }
    assert_eq!(total.load(Ordering::Relaxed), 11 * 20 * (1 + 2 + 3));
}

#[test]
fn an_idle_team_sleeps() {
    let team = team(4);
    team.run(&|_| ());
    let deadline = Instant::now() + Duration::from_secs(10);
    while team.shared.rest.0.sleepers.load(Ordering::SeqCst) < 3 {
        assert!(Instant::now() < deadline, "workers are awake long after {YIELD:?} without work");
        thread::sleep(Duration::from_millis(1));
    }
    team.run(&|_| ());
}

#[test]
fn a_caller_that_finishes_early_sleeps_and_wakes() {
    let team = team(2);
    for _ in 0..20 {
        let done = AtomicBool::new(false);
        team.run(&|i| {
            if i == 1 {
                thread::sleep(Duration::from_millis(3));
                done.store(true, Ordering::Relaxed);
            }
        });
        assert!(done.load(Ordering::Relaxed));
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_team_lives_on() {
    for threads in [1, 2, 5] {
        let team = team(threads);
        for bad in 0..threads {
            let finished = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.run(&|i| {
                    assert!(i != bad, "job {i} fails");
                    finished.fetch_add(1, Ordering::Relaxed);
                });
            }));
            assert_eq!(message(result), format!("job {bad} fails"));
            assert_eq!(finished.load(Ordering::Relaxed), threads - 1);
        }
        team.run(&|_| ());
    }
}

#[test]
fn payloads_that_panic_when_dropped_do_not_stop_the_team() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let team = team(4);
        let result = catch_unwind(AssertUnwindSafe(|| team.run(&|_| std::panic::panic_any(Bomb))));
        let is_bomb = result.as_ref().is_err_and(|payload| payload.is::<Bomb>());
        std::mem::forget(result);
        team.run(&|_| ());
        sender.send(is_bomb).expect("the test waits");
    });
    assert_eq!(receiver.recv_timeout(Duration::from_secs(10)), Ok(true));
}

#[test]
fn a_panic_at_the_start_reaches_the_constructor() {
    let result = catch_unwind(|| {
        drop(ForkJoin::new(3, Arc::new(|i| assert!(i != 2, "thread {i} cannot start"))));
    });
    assert_eq!(message(result), "thread 2 cannot start");
}

#[test]
fn a_run_inside_a_run_panics_but_another_team_may_run() {
    for threads in [1, 2] {
        let (outer, inner) = (team(threads), team(threads));
        let result = catch_unwind(AssertUnwindSafe(|| outer.run(&|_| outer.run(&|_| ()))));
        assert_eq!(message(result), format!("a job runs its own team of {threads} threads"));
        let calls = AtomicUsize::new(0);
        outer.run(&|_| {
            inner.run(&|_| {
                calls.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(calls.load(Ordering::Relaxed), threads * threads);
    }
}

#[test]
fn callers_take_turns() {
    let team = team(2);
    let (busy, total) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..100 {
                    team.run(&|_| {
                        assert!(busy.fetch_add(1, Ordering::SeqCst) < 2);
                        total.fetch_add(1, Ordering::Relaxed);
                        busy.fetch_sub(1, Ordering::SeqCst);
                    });
                }
            });
        }
    });
    assert_eq!(total.load(Ordering::Relaxed), 3 * 100 * 2);
}

#[test]
fn dropping_joins_the_threads() {
    let alive = Arc::new(());
    let held = Arc::clone(&alive);
    let team = ForkJoin::new(
        4,
        Arc::new(move |_| {
            let _ = &held;
        }),
    )
    .expect("threads");
    team.run(&|_| ());
    drop(team);
    assert_eq!(Arc::strong_count(&alive), 1, "a thread still holds its start callback");
}

#[test]
fn a_core_is_taken_after_two_turns_and_for_a_time() {
    let now = Instant::now();
    assert!(!is_taken());
    note_turn(now);
    assert!(!is_taken(), "a single turn may be the host's");
    note_turn(now);
    assert!(is_taken());
    let long_ago = now.checked_sub(2 * TAKEN).expect("the machine has been up for a while");
    TURNS.set([Some(long_ago), Some(now)]);
    assert!(!is_taken(), "the first of two turns was long ago");
}
