//! The program on MPI ranks: the answers of one rank, and one line when it fails.

mod program;

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use program::{Run, austen, program, run_with};
use serde_json::Value;

/// The program on two processes, also where there are fewer cores, and for root, as in a container.
fn mpirun(args: &[&str]) -> Command {
    let program = program(args);
    let mut command = Command::new(std::env::var_os("MPIRUN").unwrap_or_else(|| "mpirun".into()));
    command.args(["-n", "2"]).arg(program.get_program()).args(args);
    for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"] {
        command.env(name, "1");
    }
    command.env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
    command
}

/// Asserts that the program said one line that holds each of `words`; the launcher adds its own, which start otherwise.
fn assert_one_error(run: &Run, words: &[&str]) {
    assert!(!run.success && run.stdout.is_empty(), "{run:?}");
    let lines: Vec<&str> = run.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 1, "{run:?}");
    assert!(!run.stderr.contains("panicked"), "{run:?}");
    for word in words {
        assert!(lines[0].contains(word), "{word:?} is missing: {run:?}");
    }
}

#[test]
fn two_processes_answer_as_one() {
    let expected: Value = serde_json::from_str(&fs::read_to_string(austen().join("expected.json")).unwrap()).unwrap();
    let case = &expected[0];
    let model = austen();
    let args = ["generate", "--json", "--kv", "f32", "--chat", "--no-thinking", "--model", model.to_str().unwrap()];
    for strategy in ["heads", "sequence"] {
        let mut args = args.to_vec();
        args.extend(["--prompt", case["prompt"].as_str().unwrap(), "--strategy", strategy]);
        let run = run_with(mpirun(&args), "");
        assert!(run.success && run.stderr.is_empty(), "{run:?}");
        let found: Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!(found["ids"], case["greedy_ids"]);
    }
}

#[test]
fn a_failure_is_one_line() {
    let model = austen();
    let model = model.to_str().unwrap();
    let failed = |args: &[&str]| run_with(mpirun(args), "");
    assert_one_error(&failed(&["generate", "--model", "nowhere", "--prompt", "x"]), &["nowhere"]);
    assert_one_error(&failed(&["generate", "--model", model, "--prompt", ""]), &["--prompt", "empty"]);
    assert_one_error(&failed(&["generate", "--model", model, "--tokens", "4096"]), &["4096"]);
    assert_one_error(&failed(&["generate", "--model", model, "--prompt", "x", "--strategy", "both"]), &["both"]);
    assert_one_error(&failed(&["generate", "--model", model, "--prompt", "x", "--ranks", "2"]), &["--ranks"]);
    assert_one_error(&failed(&["perplexity", "--model", model, "--file", "nowhere.txt"]), &["nowhere.txt"]);
}

#[test]
fn a_killed_rank_ends_the_other() {
    let model = austen();
    let args = ["bench", "--model", model.to_str().unwrap(), "--reps", "1000000", "--threads", "1"];
    let mut launcher = mpirun(&args).spawn().unwrap();
    let ranks = |launcher: u32| -> Vec<String> {
        let found = Command::new("pgrep").args(["-P", &launcher.to_string(), "qwen3"]).output().unwrap();
        String::from_utf8(found.stdout).unwrap().lines().map(str::to_owned).collect()
    };
    let start = Instant::now();
    let found = loop {
        let found = ranks(launcher.id());
        if found.len() == 2 {
            break found;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no ranks: {found:?}");
        thread::sleep(Duration::from_millis(20));
    };
    // Long enough to be loaded and computing, short enough not to be done.
    thread::sleep(Duration::from_secs(1));
    assert!(launcher.try_wait().unwrap().is_none(), "the bench ended by itself");
    assert!(Command::new("kill").args(["-KILL", &found[1]]).status().unwrap().success());
    let killed = Instant::now();
    let status = loop {
        if let Some(status) = launcher.try_wait().unwrap() {
            break status;
        }
        assert!(killed.elapsed() < Duration::from_secs(5), "the other rank still runs");
        thread::sleep(Duration::from_millis(20));
    };
    assert!(!status.success());
}
