//! What ranks see when something goes wrong: a typed error that names who and why, soon, on every
//! rank.

use std::io::{BufRead as _, BufReader};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use comm::{
    Collective, CommError, Communicator, CommunicatorExt, Phase, ReduceOp, SoloComm, ThreadComm,
};

/// Longer than any machine is busy, shorter than anyone waits for a test.
const SOON: Duration = Duration::from_secs(5);

/// Runs `rank` on every rank of a group, and returns what each returned.
fn on_ranks<R: Send>(size: usize, rank: impl Fn(ThreadComm) -> R + Sync) -> Vec<R> {
    let start = Instant::now();
    let results = thread::scope(|scope| {
        let spawn = |comm| scope.spawn(|| rank(comm));
        let ranks: Vec<_> = ThreadComm::group(size).into_iter().map(spawn).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert!(start.elapsed() < SOON, "the ranks took {:?}", start.elapsed());
    results
}

#[test]
fn a_rank_that_never_comes_is_named_after_the_deadline() {
    let failed = AtomicUsize::new(0);
    let errors = on_ranks(4, |comm| {
        comm.set_timeout(Duration::from_millis(500));
        comm.ledger().set_phase(Phase::Decode);
        comm.ledger().set_layer(Some(7));
        comm.barrier().unwrap();
        // Late, but there: its communicator lives.
        while comm.rank() == 2 && failed.load(SeqCst) < 3 {
            thread::sleep(Duration::from_millis(1));
        }
        let error = comm.all_reduce(&mut [1.0; 16], ReduceOp::Sum).unwrap_err();
        failed.fetch_add(1, SeqCst);
        error
    });
    let mut timeouts = 0;
    for (rank, error) in errors.iter().enumerate() {
        match error {
            CommError::Timeout { place, rank: own, missing, waited } => {
                timeouts += 1;
                assert_eq!((*own, &missing[..]), (rank, &[2][..]));
                assert_eq!((place.collective, place.layer), (Collective::Allreduce, Some(7)));
                assert!((Duration::from_millis(500)..SOON).contains(waited), "waited {waited:?}");
                assert!(error.to_string().starts_with("Allreduce (decode, layer 7): rank "));
            }
            // Who looked later saw another's deadline pass; the late rank always does.
            CommError::PeerFailed { rank: failed, reason, .. } => {
                assert_ne!(*failed, 2);
                assert!(reason.contains("for rank 2"), "{reason}");
            }
            other => panic!("rank {rank}: {other}"),
        }
    }
    assert!(timeouts >= 1 && matches!(errors[2], CommError::PeerFailed { .. }));
}

#[test]
fn the_deadline_counts_while_a_peer_is_late_only() {
    // Eight waits, each far below the deadline, together above it.
    let results = on_ranks(2, |comm| {
        comm.set_timeout(Duration::from_millis(1500));
        for _ in 0..8 {
            if comm.rank() == 1 {
                thread::sleep(Duration::from_millis(250));
            }
            comm.barrier()?;
        }
        Ok::<_, CommError>(())
    });
    assert_eq!(results, [Ok(()), Ok(())]);
}

/// Says that the test runs in the process that is stopped.
const STOPPED: &str = "COMM_TEST_STOPPED";

#[test]
fn the_deadline_leaves_out_the_time_in_which_the_job_was_stopped() {
    if std::env::var_os(STOPPED).is_some() {
        let results = on_ranks(2, |comm| {
            comm.set_timeout(Duration::from_millis(1500));
            // With the stop longer than the deadline, without it not.
            for _ in 0..(60 * comm.rank()) {
                thread::sleep(Duration::from_millis(10));
            }
            if comm.rank() == 0 {
                println!("{STOPPED}");
            }
            comm.barrier()
        });
        return assert_eq!(results, [Ok(()), Ok(())]);
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let name = "the_deadline_leaves_out_the_time_in_which_the_job_was_stopped";
    child.args(["--exact", name, "--nocapture"]).env(STOPPED, "1").stdout(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(said.any(|line| line.contains(STOPPED)), "rank 0 never waited");
    let signal =
        |name: &str| Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    thread::sleep(Duration::from_millis(50));
    assert!(signal("-STOP").success());
    thread::sleep(Duration::from_millis(2500));
    assert!(signal("-CONT").success());
    let rest: Vec<String> = said.collect();
    assert!(
        child.wait().unwrap().success() && rest.iter().any(|line| line.contains("1 passed")),
        "{rest:#?}"
    );
}

#[test]
fn a_panic_fails_the_pending_calls_of_the_others() {
    let errors = on_ranks(3, |comm| {
        let result = catch_unwind(AssertUnwindSafe(|| {
            let comm = comm;
            comm.barrier().unwrap();
            assert_ne!(comm.rank(), 1, "as the test wants it");
            comm.all_reduce(&mut [1.0], ReduceOp::Sum)
        }));
        result.unwrap_or(Ok(()))
    });
    assert_eq!(errors[1], Ok(()), "the rank that panicked");
    for error in [&errors[0], &errors[2]] {
        let Err(CommError::PeerFailed { rank, reason, .. }) = error else { panic!("{error:?}") };
        assert_eq!(*rank, 1);
        assert!(reason.contains("panicked"), "{reason}");
    }
}

#[test]
fn a_rank_that_leaves_is_not_waited_for() {
    let results = on_ranks(3, |comm| {
        comm.barrier()?;
        if comm.rank() == 0 {
            return Ok(());
        }
        comm.recv(0, &mut [0u8])
    });
    for error in &results[1..] {
        let Err(CommError::PeerFailed { rank: 0, reason, .. }) = error else { panic!("{error:?}") };
        assert!(reason.contains("left"), "{reason}");
    }
}

#[test]
fn a_check_finds_failures_without_a_call_of_the_others() {
    let mut group = ThreadComm::group(3);
    assert_eq!(SoloComm::new().check(), Ok(()));
    assert!(group.iter().all(|comm| comm.check() == Ok(())));
    drop(group.pop());
    for comm in &group {
        let Err(CommError::PeerFailed { rank: 2, reason, .. }) = comm.check() else { panic!() };
        assert!(reason.contains("left"), "{reason}");
    }
    group[1].abort("out of memory");
    let Err(CommError::PeerFailed { rank: 1, reason, .. }) = group[0].check() else { panic!() };
    assert_eq!(reason, "out of memory");
}

#[test]
fn the_last_call_of_a_rank_that_leaves_still_counts() {
    for _ in 0..200 {
        let results = on_ranks(2, |comm| {
            if comm.rank() == 0 { comm.send(1, &[7u32]) } else { comm.recv(0, &mut [0u32]) }
        });
        assert_eq!(results, [Ok(()), Ok(())]);
    }
}

#[test]
fn a_rank_that_is_told_to_end_misses_those_only_that_are_not() {
    for others in [0, 1, 2] {
        let (told, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let until = |flag: &AtomicBool| {
            while !flag.load(SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
        };
        let errors = on_ranks(3, |comm| {
            if comm.rank() == 2 {
                let error = thread::scope(|scope| {
                    let call = scope.spawn(|| comm.barrier().unwrap_err());
                    thread::sleep(Duration::from_millis(50));
                    comm.abort("a signal");
                    told.store(true, SeqCst);
                    call.join().unwrap()
                });
                done.store(true, SeqCst);
                return Some(error);
            }
            // Busy elsewhere, when some hear of the same signal, a little later.
            until(&told);
            if comm.rank() < others {
                comm.abort("a signal");
            }
            until(&done);
            None
        });
        match &errors[2] {
            Some(CommError::PeerFailed { rank: 2, missing, .. }) => {
                assert_eq!(*missing, (others..2).collect::<Vec<_>>(), "with {others} others");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn abort_reaches_pending_and_next_calls_in_all_groups() {
    let errors = on_ranks(4, |comm| {
        let pairs = comm.split(comm.rank() / 2, 0).unwrap();
        match comm.rank() {
            0 => {
                thread::sleep(Duration::from_millis(50));
                comm.abort("config.json: 'hidden_size' is 0, expected at least 1");
                comm.abort("a later reason does not count");
                comm.barrier().unwrap_err()
            }
            1 => pairs.barrier().unwrap_err(),
            2 => pairs.recv(1, &mut [0.0f32; 4]).unwrap_err(),
            _ => {
                thread::sleep(Duration::from_millis(150));
                comm.all_gather(&[1u8], &mut [0; 4]).unwrap_err()
            }
        }
    });
    for error in errors {
        let CommError::PeerFailed { rank, reason, .. } = &error else { panic!("{error}") };
        assert_eq!(*rank, 0);
        assert_eq!(reason, "config.json: 'hidden_size' is 0, expected at least 1");
    }
}

type Call = fn(&dyn Communicator) -> Result<(), CommError>;

/// Both ranks make calls that do not match, and both have to say so.
fn mismatch(calls: [Call; 2], texts: [&str; 2]) {
    let errors = on_ranks(2, |comm| calls[comm.rank()](&comm).unwrap_err());
    for (rank, error) in errors.iter().enumerate() {
        let CommError::Mismatch { rank: own, here, peer, there, .. } = error else {
            panic!("{error}")
        };
        assert_eq!((*own, *peer), (rank, 1 - rank));
        assert_eq!((&here[..], &there[..]), (texts[rank], texts[1 - rank]));
    }
}

#[test]
fn calls_that_do_not_match_are_named_on_both_sides() {
    mismatch(
        [
            |comm| comm.all_reduce(&mut [0.0; 8], ReduceOp::Sum),
            |comm| comm.all_reduce(&mut [0.0; 9], ReduceOp::Sum),
        ],
        ["Allreduce (sum) of 8 elements as f32", "Allreduce (sum) of 9 elements as f32"],
    );
    mismatch(
        [
            |comm| comm.all_reduce(&mut [0.0; 8], ReduceOp::Sum),
            |comm| comm.all_reduce(&mut [0.0; 8], ReduceOp::Max),
        ],
        ["Allreduce (sum) of 8 elements as f32", "Allreduce (max) of 8 elements as f32"],
    );
    mismatch(
        [|comm| comm.barrier(), |comm| comm.broadcast(1, &mut [0u8; 3])],
        ["Barrier of 0 bytes", "Broadcast of 3 bytes from root 1"],
    );
    mismatch(
        [|comm| comm.broadcast(0, &mut [0u8; 3]), |comm| comm.broadcast(1, &mut [0u8; 3])],
        ["Broadcast of 3 bytes from root 0", "Broadcast of 3 bytes from root 1"],
    );
    // Large ones differ in the number of meetings they would take.
    mismatch(
        [
            |comm| comm.all_gather(&[0u8; 10], &mut [0; 20]),
            |comm| comm.all_gather(&vec![0u8; 1_000_000], &mut vec![0; 2_000_000]),
        ],
        ["Allgather of 20 bytes", "Allgather of 2000000 bytes"],
    );
}

#[test]
fn counts_that_differ_between_ranks_are_caught() {
    let errors = on_ranks(3, |comm| {
        let counts = if comm.rank() == 1 { [2, 2, 4] } else { [4, 2, 2] };
        let send = vec![0u8; counts[comm.rank()]];
        comm.all_gather_v(&send, &counts, &mut [0; 8]).unwrap_err()
    });
    for (rank, error) in errors.iter().enumerate() {
        let text = error.to_string();
        assert!(
            text.contains("calls do not match") && text.contains("rank 1"),
            "rank {rank}: {text}"
        );
    }
}

#[test]
fn a_message_of_another_length_is_refused() {
    let errors = on_ranks(2, |comm| match comm.rank() {
        0 => comm.send(1, &[0u8; 12]).err(),
        _ => comm.recv(0, &mut [0u8; 8]).err(),
    });
    let Some(CommError::Mismatch { here, peer: 0, there, .. }) = &errors[1] else {
        panic!("{errors:?}")
    };
    assert_eq!((&here[..], &there[..]), ("Recv of 8 bytes", "Send of 12 bytes"));
}

#[test]
fn arguments_that_do_not_fit_are_refused_before_anything_moves() {
    type Case = (&'static str, Call);
    let cases: [Case; 10] = [
        ("Allreduce (other): partial.len() is 3, expected residual.len() = 2", |c| {
            c.all_reduce_add(&[0.0; 3], &mut [0.0; 2])
        }),
        ("Reduce-scatter (other): counts.len() is 2, expected size() = 1", |c| {
            c.reduce_scatter(&[0.0; 3], &[1, 2], &mut [0.0])
        }),
        ("Reduce-scatter (other): send.len() is 3, expected the sum of counts = 2", |c| {
            c.reduce_scatter(&[0.0; 3], &[2], &mut [0.0; 2])
        }),
        ("Reduce-scatter (other): recv.len() is 1, expected counts[rank] = 2", |c| {
            c.reduce_scatter(&[0.0; 2], &[2], &mut [0.0])
        }),
        ("Allgather (other): recv.len() is 3, expected the sum over the ranks = 2", |c| {
            c.all_gather(&[0u8; 2], &mut [0; 3])
        }),
        ("Allgatherv (other): counts.len() is 0, expected size() = 1", |c| {
            c.all_gather_v(&[0u8; 2], &[], &mut [0; 2])
        }),
        ("Allgatherv (other): send.len() is 2, expected counts[rank] = 1", |c| {
            c.all_gather_v(&[0u8; 2], &[1], &mut [0; 1])
        }),
        ("Broadcast (other): root is 1, expected a rank below 1", |c| c.broadcast(1, &mut [0u8])),
        ("Send (other): to is 5, expected a rank below 1", |c| c.send(5, &[0u8])),
        ("Recv (other): the other end is 0, expected another rank", |c| c.recv(0, &mut [0u8])),
    ];
    for (expected, case) in cases {
        let comm = SoloComm::new();
        let error = case(&comm).unwrap_err();
        assert!(matches!(error, CommError::Argument { .. }));
        assert_eq!(error.to_string(), expected);
        assert_eq!(comm.barrier().unwrap_err(), error, "a failed rank stays failed");
    }
}
