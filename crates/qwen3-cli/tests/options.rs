//! Ways to give options and prompts, and what a wrong command line gives.

mod program;

use std::io::{Read as _, Write as _};
use std::process::{Output, Stdio};

use program::{AUSTEN, program, read_json};

/// What the program does with `args`, `input` and variables of the environment.
fn output(args: &[&str], input: &str, variables: &[(&str, &str)]) -> Output {
    let mut command = program(args);
    command.envs(variables.iter().copied());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A program that does not read its input has closed it.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The standard output of a run that succeeds without a message.
fn stdout(args: &[&str], input: &str, variables: &[(&str, &str)]) -> String {
    let output = output(args, input, variables);
    assert!(output.status.success() && output.stderr.is_empty(), "{args:?}: {output:?}");
    text(&output.stdout)
}

#[test]
fn a_prompt_comes_from_options_files_and_standard_input() {
    let case = &read_json(format!("{AUSTEN}/expected.json"))[0];
    let prompt = case["prompt"].as_str().unwrap();
    let base = ["generate", "--chat", "--no-thinking", "--kv", "f32", "--max-new-tokens", "8"];
    let long = stdout(&[&base[..], &["--model", AUSTEN, "--prompt", prompt]].concat(), "", &[]);
    let short = ["generate", "--chat", "--no-thinking", "--kv", "f32", "-n", "8", "-t", "1"];
    let short = [&short[..], &["-m", AUSTEN]].concat();
    assert_eq!(stdout(&[&short[..], &["-p", prompt]].concat(), "", &[]), long);
    // A line feed at the end, as echo writes it, is not part of the prompt.
    for (args, input) in [
        (&[][..], format!("{prompt}\n")),
        (&["--prompt-file", "-"], prompt.to_owned()),
        (&["--prompt-file", "/dev/stdin"], prompt.to_owned()),
    ] {
        assert_eq!(stdout(&[&short[..], args].concat(), &input, &[]), long, "{args:?}");
    }
    let alias = ["generate", "-m", AUSTEN, "--max-tokens", "1", "--prompt", "- milk"];
    assert!(!stdout(&alias, "", &[]).is_empty());
    let empty = output(&["generate", "-m", AUSTEN], "", &[]);
    assert_eq!(empty.status.code(), Some(1));
    assert!(text(&empty.stderr).starts_with("error: standard input: the prompt is empty"));
}

#[test]
fn options_come_from_the_environment_and_the_command_line_wins() {
    let bench = ["bench", "--json", "--prompt-len", "4", "--gen-len", "0", "--reps", "1"];
    let variables =
        [("QWEN3_MODEL", AUSTEN), ("QWEN3_RANKS", "2"), ("QWEN3_THREADS", "1"), ("QWEN3_KV", "q8")];
    let found = |args: &[&str]| -> serde_json::Value {
        serde_json::from_str(&stdout(&[&bench[..], args].concat(), "", &variables)).unwrap()
    };
    let of_environment = found(&[]);
    assert_eq!(of_environment["ranks"], 2);
    assert_eq!(of_environment["kv"], "q8");
    let of_line = found(&["--ranks", "1", "--kv", "f32"]);
    assert_eq!((&of_line["ranks"], &of_line["kv"]), (&1.into(), &"f32".into()));
    assert!(found(&["--ranks", "auto"])["ranks"].as_u64().unwrap() >= 1);
    let wrong = output(&bench, "", &[("QWEN3_MODEL", AUSTEN), ("QWEN3_RANKS", "many")]);
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn a_wrong_command_line_has_status_2_and_the_usage() {
    for (args, words, usage) in [
        (&["generate", "-m", "x", "--frobnicate"][..], "--frobnicate", "qwen3 generate"),
        (&["chat", "-m", "x", "--ranks", "0"], "--ranks", ""),
        (&["tokenize", "-m", "x"], "--text", "qwen3 tokenize"),
        (&["frob"], "frob", "qwen3"),
    ] {
        let output = output(args, "", &[]);
        let line = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {line}");
        assert!(line.starts_with("error: ") && line.lines().count() == 1, "{line}");
        assert!(line.contains(words) && line.contains(usage), "{line}");
        assert!(usage.is_empty() || line.contains("(Usage: qwen3"), "{line}");
    }
    // A failure of the work has another status.
    assert_eq!(output(&["generate", "-m", "nowhere", "-p", "x"], "", &[]).status.code(), Some(1));
}

#[test]
fn more_threads_than_cores_are_a_warning() {
    let cores = std::thread::available_parallelism().unwrap().get();
    let run = |threads: usize| {
        let threads = threads.to_string();
        let args = ["generate", "-m", AUSTEN, "-p", "x", "-n", "1", "-t", &threads];
        let output = output(&args, "", &[]);
        assert!(output.status.success(), "{output:?}");
        text(&output.stderr)
    };
    assert_eq!(run(cores), "");
    let (threads, warning) = (cores + 1, run(cores + 1));
    let expected =
        format!("warning: {threads} threads share the {cores} cores that this process may use\n");
    assert_eq!(warning, expected);
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let ids = vec!["7"; 200].join(",");
    for ranks in ["1", "2"] {
        let mut command = program(&["generate", "-m", AUSTEN, "--tokens", &ids, "--ignore-eos"]);
        command.args(["-n", "3000", "--ranks", ranks, "-t", "1"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        out.read_exact(&mut [0; 8]).unwrap();
        drop(out);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{ranks}: {output:?}");
    }
}

#[test]
fn the_version_names_the_build_and_the_help_has_examples() {
    let version = stdout(&["--version"], "", &[]);
    assert!(version.starts_with(&format!("qwen3 {} (", env!("CARGO_PKG_VERSION"))), "{version}");
    assert!(version.contains("sources "), "{version}");
    if cfg!(feature = "mpi") {
        assert!(version.contains("MPI") && !version.contains("without MPI"), "{version}");
    } else {
        assert!(version.ends_with("without MPI)\n"), "{version}");
    }
    let git = std::process::Command::new("git")
        .args(["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "--is-inside-work-tree"])
        .output();
    if git.is_ok_and(|git| git.status.success()) {
        assert!(version.contains("(commit "), "{version}");
    }
    let help = stdout(&["--help"], "", &[]);
    assert!(help.contains("Examples:\n  qwen3 generate -m models/austen"), "{help}");
    let examples = &help[help.find("Examples:").unwrap()..];
    assert!(examples.lines().all(|line| line.chars().count() <= 100), "{help}");
}

#[test]
fn shells_get_completions() {
    for (shell, words) in
        [("bash", "complete -F _qwen3"), ("zsh", "#compdef qwen3"), ("fish", "complete -c qwen3")]
    {
        let script = stdout(&["completions", shell], "", &[]);
        assert!(script.contains(words) && script.contains("perplexity"), "{shell}");
    }
}
