//! Child processes that cannot outlive their deadline, and none of whose descendants can.
//!
//! `mpirun` puts its ranks into process groups of their own, so killing one group would leave the
//! others running. Each job therefore carries a mark in its environment, which every descendant
//! inherits; whoever carries the mark when the job is over is found through `/proc` and killed. The
//! job stays in the terminal's process group, so Ctrl-C reaches it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};

const MARK: &str = "XTASK_JOB";
/// What a terminated job gets to clean up after itself before it is killed.
const GRACE: Duration = Duration::from_secs(3);

/// How a job ended.
pub struct Finished {
    /// The exit status; `None` when the deadline passed.
    pub status: Option<ExitStatus>,
    /// What it wrote to standard output (it was shown as it came, unless the job was silent).
    pub stdout: String,
    /// Wall-clock time it took, with the look at what it left behind.
    pub elapsed: Duration,
    /// When it closed its standard output, at the latest by ending: the time of a program that is
    /// measured.
    pub closed: Duration,
    /// Descendants that were still running after the job itself had ended, and had to be killed.
    pub left_behind: usize,
}

impl Finished {
    /// Whether it ended in time with status 0 and left nothing behind.
    pub fn ok(&self) -> bool {
        self.status.is_some_and(|status| status.success()) && self.left_behind == 0
    }

    /// Why it is not [`ok`](Self::ok), in a few words.
    pub fn reason(&self) -> String {
        match self.status {
            None => format!("hung: killed after {:.0} s", self.elapsed.as_secs_f64()),
            Some(status) if !status.success() => status.to_string(),
            Some(_) if self.left_behind > 0 => {
                format!("left {} processes running", self.left_behind)
            }
            Some(_) => "ok".to_owned(),
        }
    }
}

/// What happens to a job's output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Standard output is shown line by line, standard error as it is.
    Shown,
    /// Standard output is collected; standard error goes where the command sends it.
    Collected,
    /// Standard output is collected; standard error is dropped.
    Silent,
}

/// Runs `command` without input until it ends or `deadline` passes; afterwards none of its
/// descendants runs.
pub fn run(command: &mut Command, deadline: Duration, output: Output) -> Result<Finished> {
    command.stdout(Stdio::piped());
    if output == Output::Silent {
        command.stderr(Stdio::null());
    }
    let mut job = Job::start(command)?;
    let pipe = job.child.stdout.take().context("the child has no standard output")?;
    let started = job.started;
    let reader = thread::spawn(move || (collect(pipe, output), started.elapsed()));

    let status = job.wait(deadline.saturating_sub(job.started.elapsed()))?;
    if status.is_none() {
        signal(job.child.id(), Signal::TERM);
        job.wait(GRACE)?;
    } else {
        // Daemons of a launcher need a moment to notice that the job is over.
        let settled = Instant::now() + GRACE;
        while !job.processes().is_empty() && Instant::now() < settled {
            thread::sleep(Duration::from_millis(20));
        }
    }
    let left_behind = job.end()?;
    let (stdout, closed) = reader.join().unwrap_or_default();
    Ok(Finished { status, stdout, elapsed: started.elapsed(), closed, left_behind })
}

/// Runs a program that has to end well. What it and its launcher say on standard error goes to a
/// file in `folder`, and is part of the error where the program, which `name` stands for, fails.
pub fn answer(
    command: &mut Command,
    name: &str,
    folder: &Path,
    deadline: Duration,
) -> Result<Finished> {
    let said = folder.join("stderr");
    // No pipe: a launcher's daemon may hold it open.
    let log =
        fs::File::create(&said).with_context(|| format!("cannot write {}", said.display()))?;
    let finished = run(command.stderr(log), deadline, Output::Collected)?;
    if !finished.ok() {
        let text = String::from_utf8_lossy(&fs::read(&said).unwrap_or_default()).into_owned();
        // MPICH's launcher complains on standard output.
        bail!("{name}: {}\n{}{}", finished.reason(), finished.stdout, text.trim_end());
    }
    Ok(finished)
}

/// A process with its descendants; none of them outlives this value.
pub struct Job {
    child: Child,
    mark: String,
    started: Instant,
}

impl Job {
    /// Starts `command` without input.
    pub fn start(command: &mut Command) -> Result<Job> {
        static JOBS: AtomicU32 = AtomicU32::new(0);
        let mark = format!("{}-{}", std::process::id(), JOBS.fetch_add(1, Ordering::Relaxed));
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.env(MARK, &mark).stdin(Stdio::null()).spawn();
        Ok(Job {
            child: child.with_context(|| format!("cannot start {name}"))?,
            mark,
            started: Instant::now(),
        })
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its standard output, if that is a pipe and nobody has taken it.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits until the process itself ends, but no longer than `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        wait(&mut self.child, Instant::now() + limit)
    }

    /// The running processes: this one and its descendants. Empty where there is no `/proc`.
    pub fn processes(&self) -> Vec<u32> {
        marked(&self.mark)
    }

    /// Kills what still runs; returns how many that were.
    fn end(&mut self) -> Result<usize> {
        let killed = kill_marked(&self.mark);
        self.child.kill().ok();
        self.child.wait()?;
        Ok(killed)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.end().ok();
    }
}

fn wait(child: &mut Child, until: Instant) -> Result<Option<ExitStatus>> {
    // Short sleeps first: most jobs of `setup` end within milliseconds.
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= until {
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn collect(pipe: impl std::io::Read, output: Output) -> String {
    let mut reader = BufReader::new(pipe);
    let mut all = String::new();
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        if output == Output::Shown {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(&line).and_then(|()| stdout.flush()).ok();
        }
        all.push_str(&String::from_utf8_lossy(&line));
        line.clear();
    }
    all
}

/// Kills every process that carries the mark, again and again until a look finds none; returns how
/// many it saw.
fn kill_marked(mark: &str) -> usize {
    let mut seen = std::collections::BTreeSet::new();
    // A process can fork between the look and the signal; its child is found by the next look.
    for _ in 0..100 {
        let pids = marked(mark);
        if pids.is_empty() {
            break;
        }
        for &pid in &pids {
            signal(pid, Signal::KILL);
        }
        seen.extend(pids);
        thread::sleep(Duration::from_millis(10));
    }
    seen.len()
}

/// Running processes whose environment carries the mark. Empty where there is no `/proc`.
fn marked(mark: &str) -> Vec<u32> {
    let entry = format!("{MARK}={mark}");
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .filter_map(|process| process.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            // Unreadable: another user's process, or one that has just ended.
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environ| {
                environ.split(|&b| b == 0).any(|variable| variable == entry.as_bytes())
            })
        })
        .collect()
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may have ended meanwhile; there is nothing to do then.
        kill_process(pid, signal).ok();
    }
}

/// The full path of `program` in the folders of `PATH` and then in `further` ones.
pub fn find_program(program: &str, further: &[std::path::PathBuf]) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(further.iter().cloned())
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn status_and_output_come_back() {
        let finished =
            run(&mut shell("echo one; echo two; exit 7"), Duration::from_secs(30), Output::Silent)
                .unwrap();
        assert_eq!(finished.stdout, "one\ntwo\n");
        assert_eq!(finished.status.unwrap().code(), Some(7));
        assert!(!finished.ok());
        assert!(finished.reason().contains('7'), "{}", finished.reason());
    }

    #[test]
    fn a_program_is_timed_to_its_end_and_not_to_the_look_at_it() {
        let timed = |script: &str| {
            run(&mut shell(script), Duration::from_secs(30), Output::Silent).unwrap()
        };
        // What it leaves behind keeps the job, but not its output.
        let finished = timed("sleep 0.2; sleep 1000 >/dev/null & exit 0");
        assert!(finished.closed >= Duration::from_millis(200), "{:?}", finished.closed);
        assert!(
            finished.closed + GRACE / 2 < finished.elapsed,
            "{:?} of {:?}",
            finished.closed,
            finished.elapsed
        );
    }

    #[test]
    fn what_a_failing_program_says_is_in_its_error() {
        let folder = tempfile::tempdir().unwrap();
        let answer = |script: &str| {
            answer(&mut shell(script), "a program", folder.path(), Duration::from_secs(30))
        };
        let error = answer("echo half; echo no such model >&2; exit 7").err().unwrap().to_string();
        assert_eq!(error, "a program: exit status: 7\nhalf\nno such model");
        assert_eq!(answer("echo all; echo a warning >&2").unwrap().stdout, "all\n");
    }

    #[test]
    fn a_hung_job_dies_with_its_descendants() {
        // The grandchild ignores the polite signal, and the shell that started it waits for it.
        let script =
            "(trap '' TERM; echo $$; sleep 1000 & wait) & (trap '' TERM; sleep 1000); wait";
        let started = Instant::now();
        let finished = run(&mut shell(script), Duration::from_millis(300), Output::Silent).unwrap();
        assert!(finished.status.is_none());
        assert!(finished.reason().starts_with("hung"), "{}", finished.reason());
        assert!(finished.left_behind >= 1, "{} killed", finished.left_behind);
        assert!(started.elapsed() < Duration::from_secs(30), "took {:?}", started.elapsed());
    }

    #[test]
    fn a_job_that_leaves_a_process_behind_is_not_ok() {
        let finished = run(
            &mut shell("sleep 1000 >/dev/null & exit 0"),
            Duration::from_secs(30),
            Output::Silent,
        )
        .unwrap();
        assert!(finished.status.unwrap().success());
        assert!(!finished.ok());
        assert_eq!(finished.left_behind, 1);
        assert_eq!(finished.reason(), "left 1 processes running");
    }
}
