//! Signals of a job, in child processes of this test: a handler belongs to a whole process.

use std::env;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output};
use std::sync::mpsc;
use std::time::Duration;

use ranks::{Failure, JobOptions, Rank, Response, Signal, run_in_threads};
use rustix::process::{Signal as Number, getpid, kill_process};

const CHILD: &str = "RANKS_TEST_CHILD";

/// Runs `test` of this file in a process of its own; `None` in that process.
fn in_child(test: &str) -> Option<Output> {
    if env::var_os(CHILD).is_some() {
        return None;
    }
    let mut child = Command::new(env::current_exe().unwrap());
    Some(child.args(["--exact", test, "--nocapture"]).env(CHILD, "1").output().unwrap())
}

fn job(work: impl Fn(&Rank) -> Result<(), Failure> + Send + Sync) -> Result<(), Failure> {
    run_in_threads(&JobOptions { ranks: 2, ..JobOptions::default() }, work)
}

/// The first SIGTERM of a server lets it finish its requests; the second ends the process.
#[test]
fn a_handler_continues_or_ends_the_job() {
    if let Some(output) = in_child("a_handler_continues_or_ends_the_job") {
        assert_eq!(output.status.signal(), Some(Number::TERM.as_raw()), "{output:?}");
        return;
    }
    let ended = job(|rank| {
        let (send, signals) = mpsc::channel();
        let mut terminations = 0;
        rank.on_signals(move |signal| {
            terminations += i32::from(signal == Signal::Terminate);
            if terminations == 2 {
                return Response::End;
            }
            send.send(signal).unwrap();
            Response::Continue
        })?;
        rank.agree(if rank.is_root() { receive(&signals) } else { Ok(()) })
    });
    panic!("the second SIGTERM did not end the process: {ended:?}");
}

fn receive(signals: &mpsc::Receiver<Signal>) -> Result<(), io::Error> {
    let expected = [
        (Number::INT, Signal::Interrupt),
        (Number::USR1, Signal::User1),
        (Number::HUP, Signal::Hangup),
        (Number::TERM, Signal::Terminate),
    ];
    for (number, signal) in expected {
        kill_process(getpid(), number)?;
        assert_eq!(signals.recv_timeout(Duration::from_secs(10)).unwrap(), signal);
    }
    kill_process(getpid(), Number::TERM)?;
    // Only the end of the process ends this.
    _ = signals.recv_timeout(Duration::from_secs(10));
    Ok(())
}

#[test]
fn after_the_job_signals_do_what_they_did_before() {
    if let Some(output) = in_child("after_the_job_signals_do_what_they_did_before") {
        assert_eq!(output.status.signal(), Some(Number::INT.as_raw()), "{output:?}");
        return;
    }
    job(|rank| Ok(rank.on_signals(|_| Response::Continue)?)).unwrap();
    kill_process(getpid(), Number::INT).unwrap();
    std::thread::sleep(Duration::from_secs(10));
    panic!("SIGINT did not end the process");
}
