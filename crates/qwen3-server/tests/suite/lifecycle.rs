//! Clients that go away, read slowly or send nonsense, full queues, and the server's own end.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use super::{Answer, Running, chat, config, send, small, start, with};
use engine::EngineConfig;
use qwen3_server::{BodyLimits, Keys, Limits, Server, ServerConfig};
use serde_json::{Value, json};

/// A request whose answer takes long.
fn long(tokens: usize) -> Value {
    let fields = json!({"stream": true, "ignore_eos": true});
    with(chat("Tell me about music.", tokens), fields)
}

/// Reads until the first piece of text has come.
fn first_text(stream: TcpStream) -> BufReader<TcpStream> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.contains("\"content\":\"") || line.contains("\"content\":\"\"") {
        line.clear();
        assert!(reader.read_line(&mut line).expect("a line") > 0, "the stream ended");
    }
    reader
}

fn is_idle(stats: &engine::Stats) -> bool {
    (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
}

#[test]
fn a_client_that_goes_away_frees_its_pages() {
    let running = start(2, config(), &small());
    let reader = first_text(running.begin("/v1/chat/completions", &long(3000)));
    running.wait("the request runs", |stats| stats.running == 1);
    drop(reader);
    running.wait("its pages are free", is_idle);
    assert_eq!(running.engine.stats().cancelled_requests, 1);
    // The same without a stream: nobody reads, and nothing was sent yet.
    let whole = with(long(3000), json!({"stream": false}));
    let stream = running.begin("/v1/chat/completions", &whole);
    running.wait("the request runs", |stats| stats.running == 1);
    drop(stream);
    running.wait("its pages are free", is_idle);
}

/// llama.cpp#27604: a stream that its client left while another request's prompt was computed made
/// the server hang.
#[test]
fn a_stream_that_is_left_while_a_prompt_is_computed_disturbs_nobody() {
    let running = start(2, config(), &small());
    for _ in 0..4 {
        let reader = first_text(running.begin("/v1/chat/completions", &long(3000)));
        let prompt = "the sea and the wind ".repeat(400);
        let other = running.begin("/v1/chat/completions", &chat(&prompt, 4));
        drop(reader);
        assert_eq!(Answer::read(&mut BufReader::new(other)).status, 200);
    }
    running.wait("everything is free", is_idle);
    assert_eq!(running.request("GET", "/health", "", "").status, 200);
}

#[test]
fn a_full_queue_answers_429() {
    let limited = EngineConfig { max_sequences: 1, max_queue: 1, ..small() };
    let running = start(1, config(), &limited);
    let first = first_text(running.begin("/v1/chat/completions", &long(3000)));
    let second = running.begin("/v1/chat/completions", &long(3000));
    running.wait("one waits", |stats| stats.waiting == 1);
    let third = running.post("/v1/chat/completions", &chat("a", 4));
    assert_eq!(third.status, 429);
    assert_eq!(third.header("retry-after"), Some("1"));
    drop((first, second));
    running.wait("everything is free", is_idle);
    running.ok("/v1/chat/completions", &chat("a", 4));
}

#[test]
fn a_reader_that_takes_nothing_is_cut_off_and_blocks_nobody() {
    let limits = Limits { write_time: Duration::from_secs(2), ..Limits::default() };
    let engine = EngineConfig { stream_limit: 64, ..small() };
    let running = start(1, ServerConfig { limits, ..config() }, &engine);
    let fields = json!({"n": 8, "logprobs": true, "top_logprobs": 20});
    let mut stream = running.begin("/v1/chat/completions", &with(long(900), fields));
    running.wait("the request runs", |stats| stats.running == 8);
    running.ok("/v1/chat/completions", &chat("What is 2 + 3?", 8));
    running.wait("the slow reader's request ends", is_idle);
    // The connection is closed once its deadline has passed, with whatever was sent before.
    let mut rest = Vec::new();
    if let Err(error) = stream.read_to_end(&mut rest) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    let rest = String::from_utf8_lossy(&rest);
    assert!(rest.starts_with("HTTP/1.1 200") && !rest.contains("[DONE]"), "{} bytes", rest.len());
}

#[test]
fn broken_requests_get_an_error_of_their_own() {
    let body = BodyLimits { bytes: 4096, ..BodyLimits::default() };
    let limits = Limits { body, ..Limits::default() };
    let running = start(1, ServerConfig { limits, ..config() }, &small());
    let status =
        |path: &str, headers: &str, body: &str| running.request("POST", path, headers, body).status;
    let path = "/v1/chat/completions";
    assert_eq!(status(path, "", "{"), 400);
    assert_eq!(status(path, "", "[]"), 400);
    assert_eq!(status(path, "", "{}"), 400);
    assert_eq!(status(path, "", "{\"messages\": []}"), 400);
    assert_eq!(status(path, "", &" ".repeat(5000)), 413);
    assert_eq!(status(path, "content-encoding: gzip\r\n", "{}"), 415);
    assert_eq!(status("/v1/unknown", "", "{}"), 404);
    assert_eq!(running.request("GET", path, "", "").status, 405);
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(200), "]".repeat(200));
    assert_eq!(status(path, "", &deep), 400);
    assert_eq!(status(path, "host: evil.example\r\n", "{}"), 403);
    assert_eq!(status(path, "origin: https://evil.example\r\n", "{}"), 403);
    let named = running.request("GET", "/health", "x-request-id: a<b>\r\n", "");
    assert_eq!(named.header("x-request-id"), Some("ab"));
}

#[test]
fn only_health_and_the_page_need_no_key() {
    let keys = Keys::parse("first-secret\nsecond-secret concurrent=1").expect("keys");
    let running = start(1, ServerConfig { keys, ..config() }, &small());
    let get = |path: &str, headers: &str| running.request("GET", path, headers, "").status;
    assert_eq!((get("/health", ""), get("/", "")), (200, 200));
    for path in ["/v1/models", "/metrics", "/version", "/openapi.json", "/unknown"] {
        assert_eq!(get(path, ""), 401, "{path}");
    }
    let first = "authorization: Bearer first-secret\r\n";
    let second = "x-api-key: second-secret\r\n";
    assert_eq!((get("/v1/models", first), get("/v1/models", second)), (200, 200));
    let metrics = running.request("GET", "/metrics", first, "").body;
    assert!(
        metrics.lines().any(|line| line == "qwen3_expected_bytes_per_token{} 4096"),
        "{metrics}"
    );
    assert!(!metrics.contains("\nqwen3_limit_steps_per_second"), "nobody measured it: {metrics}");
    // A prefix that one key's request left is not found by another's.
    let prompt = "the sea and the wind ".repeat(60);
    let cached = |headers: &str| {
        let body = chat(&prompt, 2).to_string();
        let answer = running.request("POST", "/v1/chat/completions", headers, &body).json();
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number")
    };
    assert_eq!(cached(first), 0);
    assert!(cached(first) >= 128);
    assert_eq!(cached(second), 0);
    // A second request of a key that allows one at a time.
    let mut stream = running.connect();
    send(&mut stream, "POST", "/v1/chat/completions", second, &long(3000).to_string());
    let reader = first_text(stream);
    assert_eq!(get("/v1/models", second), 429);
    drop(reader);
    running.wait("everything is free", is_idle);
}

#[test]
fn requests_fail_while_the_model_loads() {
    let server = Server::start(config()).expect("the server listens");
    let address = server.address().trim_start_matches("http://").to_owned();
    let get = |path: &str| {
        let mut stream = TcpStream::connect(&address).expect("a connection");
        send(&mut stream, "GET", path, "", "");
        Answer::read(&mut BufReader::new(stream))
    };
    let health = get("/health");
    assert_eq!((health.status, health.json()), (503, json!({"status": "loading"})));
    let models = get("/v1/models");
    assert_eq!((models.status, models.header("retry-after")), (503, Some("5")));
    server.close();
}

#[test]
fn a_drained_server_finishes_its_answers_and_accepts_no_more() {
    let mut running = start(2, config(), &small());
    let mut reader = first_text(running.begin("/v1/chat/completions", &long(60)));
    assert_eq!(running.request("POST", "/drain", "", "").status, 202);
    let mut server = running.server.take().expect("a server");
    let finished = thread::spawn(move || {
        let in_time = server.finish(Duration::from_secs(60));
        server.close();
        in_time
    });
    let mut rest = String::new();
    reader.read_to_string(&mut rest).expect("the answer");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert!(finished.join().expect("the server ends"));
    assert!(TcpStream::connect(&running.address).is_err());
}

#[test]
fn open_requests_get_an_error_when_the_engine_ends() {
    let running = start(2, config(), &small());
    let mut streamed = first_text(running.begin("/v1/chat/completions", &long(3000)));
    let whole = with(long(3000), json!({"stream": false}));
    let whole = running.begin("/v1/chat/completions", &whole);
    running.wait("both run", |stats| stats.running == 2);
    running.engine.shutdown();
    let mut rest = String::new();
    streamed.read_to_string(&mut rest).expect("the end of the stream");
    assert!(rest.contains("data: {\"error\":{\"message\":\"the engine ended"), "{rest}");
    assert!(!rest.contains("[DONE]"));
    assert_eq!(Answer::read(&mut BufReader::new(whole)).status, 503);
}

/// Numbers that look random and are the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// One client of the mixed load.
fn client(running: &Running, seed: u64) {
    let mut numbers = Numbers(seed);
    for _ in 0..12 {
        match numbers.below(6) {
            0 => drop(first_text(running.begin("/v1/chat/completions", &long(400)))),
            1 => {
                let prompt = "sea ".repeat(5000);
                assert_eq!(running.post("/v1/chat/completions", &chat(&prompt, 4)).status, 400);
            }
            2 => {
                let mut stream = running.connect();
                let broken = [&b"POST / HTTP/1.1\r\nhost: "[..], b"\x00\xff\r\n\r\n", b"GET"];
                let _ = stream.write_all(broken[numbers.below(3) as usize]);
            }
            3 => {
                let mut reader = first_text(running.begin("/v1/chat/completions", &long(30)));
                let mut rest = String::new();
                reader.read_to_string(&mut rest).ok();
            }
            _ => {
                let (a, b) = (numbers.below(9), numbers.below(9));
                let question = format!("What is {a} + {b}?");
                running.ok("/v1/chat/completions", &chat(&question, 8));
            }
        }
    }
}

#[test]
fn nothing_is_lost_or_kept_after_a_mixed_load() {
    let limits = Limits { header_time: Duration::from_secs(30), ..Limits::default() };
    let running = start(2, ServerConfig { limits, ..config() }, &small());
    let files = || std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    running.ok("/v1/chat/completions", &chat("a", 2));
    let before = files();
    let idle: Vec<TcpStream> = (0..200).map(|_| running.connect()).collect();
    thread::scope(|scope| {
        for seed in 1..=4 {
            let running = &running;
            scope.spawn(move || client(running, seed));
        }
    });
    running.wait("everything is free", is_idle);
    running.ok("/v1/chat/completions", &chat("a", 2));
    drop(idle);
    // The server closes its ends when it has seen that the clients' are closed.
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while files() > before + 8 && std::time::Instant::now() < until {
        thread::yield_now();
    }
    assert!(files() <= before + 8, "{} files, {before} before", files());
}
