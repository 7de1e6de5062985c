//! Running the built program with a deadline, on the bundled model or on a changed copy of it.

#![allow(dead_code, reason = "each test file is a crate of its own and takes what it needs")]

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// No call of these tests takes a tenth of this; a hung rank does.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a run of the program left.
#[derive(Debug)]
pub struct Run {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

/// The bundled model.
pub const AUSTEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");

/// The JSON of a file.
pub fn read_json(path: impl AsRef<Path>) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The program with arguments, cut off from any launcher that runs the tests.
pub fn program<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen3"));
    command.args(args);
    // No calibration of whoever runs the tests.
    command.env("XDG_CONFIG_HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/no-configuration"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if ["OMPI_", "PMI", "SLURM_", "MV2_"].iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name.as_ref());
        }
    }
    command
}

/// Runs a command with `input`; panics if it is not done by the deadline.
pub fn run_with(command: Command, input: impl AsRef<[u8]>) -> Run {
    let input = input.as_ref().to_owned();
    // A program that stops early leaves its input unread.
    run_while(command, move |mut stdin| drop(stdin.write_all(&input)))
}

/// Runs a command while a thread does `typing` into its standard input; panics if it is not done by
/// the deadline.
pub fn run_while(command: Command, typing: impl FnOnce(ChildStdin) + Send + 'static) -> Run {
    run_read(command, typing, |_| ())
}

/// [`run_while`] that reads standard output only after `hold`.
pub fn run_read(
    mut command: Command,
    typing: impl FnOnce(ChildStdin) + Send + 'static,
    hold: impl FnOnce(&ChildStdout) + Send + 'static,
) -> Run {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let stdin = child.stdin.take().unwrap();
    thread::spawn(move || typing(stdin));
    let collect = |from: &mut dyn Read| {
        let mut text = String::new();
        from.read_to_string(&mut text).expect("the program writes UTF-8");
        text
    };
    let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let stdout = thread::spawn(move || {
        hold(&stdout);
        collect(&mut stdout)
    });
    let stderr = thread::spawn(move || collect(&mut stderr));
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > DEADLINE {
            let _ = child.kill();
            panic!("{command:?} hangs; stderr: {}", stderr.join().unwrap());
        }
        thread::sleep(Duration::from_millis(5));
    };
    Run {
        success: status.success(),
        stdout: stdout.join().unwrap(),
        stderr: without_progress(&stderr.join().unwrap()),
    }
}

/// Standard error without the lines that tell every few seconds how far a slow machine is.
fn without_progress(stderr: &str) -> String {
    let is_progress = |line: &str| {
        ["loading: ", "scoring: ", "writing: "].iter().any(|verb| line.starts_with(verb))
            && line.contains(" of ")
            && line.ends_with(" s")
    };
    stderr.split_inclusive('\n').filter(|line| !is_progress(line.trim_end())).collect()
}

/// Runs the program without input.
pub fn run<S: AsRef<OsStr>>(args: &[S]) -> Run {
    run_with(program(args), "")
}

/// Runs the program, which has to succeed, and reads the one JSON object that it prints.
pub fn json<S: AsRef<OsStr>>(args: &[S]) -> Value {
    let run = run(args);
    assert!(run.success, "{run:?}");
    assert_eq!(run.stderr, "", "nothing is wrong, so nothing is said");
    assert_eq!(run.stdout.lines().count(), 1, "{run:?}");
    serde_json::from_str(&run.stdout).expect("the line is JSON")
}

/// The keys of an object, in order.
pub fn keys(object: &Value) -> Vec<&str> {
    object.as_object().expect("an object").keys().map(String::as_str).collect()
}

/// Asserts that a run failed with exactly one line, which starts with `error: ` and holds each of
/// `words`.
pub fn assert_one_line(run: &Run, words: &[&str]) {
    assert!(!run.success, "it should fail: {run:?}");
    assert_eq!(run.stdout, "", "nothing but the error: {run:?}");
    assert_eq!(run.stderr.lines().count(), 1, "one line: {run:?}");
    assert!(run.stderr.starts_with("error: ") && run.stderr.ends_with('\n'), "{run:?}");
    assert!(!run.stderr.contains("panicked") && !run.stderr.contains("internal error"), "{run:?}");
    for word in words {
        assert!(run.stderr.contains(word), "{word:?} is missing: {run:?}");
    }
}

/// A copy of the bundled model to break.
pub struct Copy {
    dir: tempfile::TempDir,
}

impl Copy {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "model.safetensors",
        ] {
            fs::copy(format!("{AUSTEN}/{name}"), dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    /// The copy's folder.
    pub fn path(&self) -> &str {
        self.dir.path().to_str().unwrap()
    }

    /// A file of the copy.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Changes `config.json`.
    pub fn config(&self, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let mut config = read_json(self.file("config.json"));
        change(config.as_object_mut().unwrap());
        fs::write(self.file("config.json"), config.to_string()).unwrap();
    }

    /// Rewrites the header of the weights.
    pub fn header(&self, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let bytes = fs::read(self.file("model.safetensors")).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        change(header.as_object_mut().unwrap());
        let header = header.to_string();
        let mut changed = (header.len() as u64).to_le_bytes().to_vec();
        changed.extend_from_slice(header.as_bytes());
        changed.extend_from_slice(&bytes[8 + len..]);
        fs::write(self.file("model.safetensors"), changed).unwrap();
    }
}
