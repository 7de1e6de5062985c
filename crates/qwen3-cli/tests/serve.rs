//! `qwen3 serve`: the same answers as `generate`, and how the server ends.

mod program;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use program::{AUSTEN, program, run};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

/// A running server; killed with this value.
struct Serving {
    child: Child,
    address: String,
}

impl Serving {
    fn start(more: &[&str]) -> Self {
        let args = ["serve", "--model", AUSTEN, "--port", "0", "--kv-memory", "16M"];
        let mut command = program(&[&args[..], more].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("the program starts");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.find_map(|line| {
            let line = line.expect("the program writes UTF-8");
            let rest = line.strip_prefix("ready at http://")?.to_owned();
            Some(rest.split(' ').next().unwrap_or_default().to_owned())
        });
        // It is read on, so that the program can write.
        thread::spawn(move || lines.for_each(drop));
        Self { child, address: ready.expect("the server gets ready") }
    }

    fn begin(&self, path: &str, body: &Value) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).expect("the server listens");
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let body = body.to_string();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n{body}",
            self.address,
            body.len()
        )
        .unwrap();
        stream
    }

    fn signal(&self, kind: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([kind, &id]).status().unwrap().success());
    }

    fn end(&mut self) -> ExitStatus {
        let until = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "the server does not end");
            thread::yield_now();
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn long() -> Value {
    json!({"prompt": "The sea", "max_tokens": 3000, "ignore_eos": true, "temperature": 0,
        "stream": true})
}

#[test]
fn greedy_answers_are_those_of_generate_and_sigterm_ends_well() {
    let prompt = "It is a truth universally acknowledged, that";
    let args = ["generate", "--model", AUSTEN, "--prompt", prompt, "--max-new-tokens", "24"];
    let generated = run(&[&args[..], &["--json", "--threads", "1"]].concat());
    let generated: Value = serde_json::from_str(&generated.stdout).expect("JSON");
    for ranks in ["1", "2", "3"] {
        let mut serving = Serving::start(&["--ranks", ranks, "--threads", "1"]);
        let request = json!({"prompt": prompt, "max_tokens": 24, "temperature": 0,
            "return_token_ids": true});
        let mut answer = String::new();
        serving.begin("/v1/completions", &request).read_to_string(&mut answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").expect("an answer");
        let answer: Value = serde_json::from_str(body).expect("JSON");
        assert_eq!(answer["choices"][0]["token_ids"], generated["ids"], "{ranks} ranks");
        assert_eq!(answer["choices"][0]["text"], generated["text"]);
        serving.signal("-TERM");
        assert!(serving.end().success());
    }
}

#[test]
fn a_second_sigterm_ends_the_server_at_once() {
    let mut serving = Serving::start(&["--threads", "1"]);
    let mut open = BufReader::new(serving.begin("/v1/completions", &long()));
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(open.read_line(&mut line).unwrap() > 0, "the stream begins");
    }
    serving.signal("-TERM");
    // No further connection is accepted, while the open answer goes on.
    let until = Instant::now() + DEADLINE;
    while TcpStream::connect(&serving.address).is_ok() {
        assert!(Instant::now() < until, "the server still listens");
    }
    assert!(open.read_line(&mut line).unwrap() > 0, "the answer goes on");
    serving.signal("-TERM");
    assert!(!serving.end().success());
}

#[test]
fn a_server_for_others_needs_a_key() {
    let args = ["serve", "--model", AUSTEN, "--port", "0", "--host", "0.0.0.0"];
    let refused = run(&args);
    assert!(!refused.success);
    assert!(refused.stderr.contains("--insecure"), "{}", refused.stderr);
}
