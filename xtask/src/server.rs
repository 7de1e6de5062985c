//! A running `qwen3 serve`, and requests to it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process::Job;

const START_DEADLINE: Duration = Duration::from_secs(120);
const REQUEST_DEADLINE: Duration = Duration::from_secs(120);

/// A running server. It ends with this value, all of its ranks included.
pub struct Server {
    job: Job,
    /// Its address, for example `http://127.0.0.1:8000`.
    pub url: String,
}

impl Server {
    /// Starts `command`, which runs `qwen3 serve`, and waits until the model is loaded.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut job = Job::start(command.stdout(Stdio::piped()))?;
        let pipe = job.take_stdout().context("the server has no standard output")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            // It reads until the server ends, so that the server can write.
            BufReader::new(pipe).lines().map_while(Result::ok).for_each(|line| {
                sender.send(line).ok();
            });
        });
        let until = Instant::now() + START_DEADLINE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line = lines.recv_timeout(left).context("the server does not get ready")?;
            if let Some(rest) = line.strip_prefix("ready at ") {
                let url = rest.split(' ').next().unwrap_or_default().to_owned();
                return Ok(Self { job, url });
            }
        }
    }

    /// Posts JSON and returns the answer's JSON.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let address = self.url.trim_start_matches("http://");
        let mut stream = TcpStream::connect(address).context("the server does not answer")?;
        stream.set_read_timeout(Some(REQUEST_DEADLINE))?;
        let body = body.to_string();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("the server's answer is not complete")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        if !head.split(' ').nth(1).is_some_and(|status| status.starts_with('2')) {
            bail!("POST {path}: {}", body.trim());
        }
        serde_json::from_str(body).with_context(|| format!("POST {path}: no JSON"))
    }

    /// The id of the process that was started.
    pub fn id(&self) -> u32 {
        self.job.id()
    }

    /// Waits until the server ends, but no longer than `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        self.job.wait(limit)
    }
}
