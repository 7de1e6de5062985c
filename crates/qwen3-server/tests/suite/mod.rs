//! A server with the bundled model on thread ranks, and a small HTTP/1.1 client.

mod answers;
mod lifecycle;
mod pooling;
mod schemas;
mod structure;

use std::io::{BufReader, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use engine::{Engine, EngineConfig, EngineHandle, KvMemory};
use qwen3_model::comm::{Communicator, SoloComm, ThreadComm};
use qwen3_model::generation_config::eos_token_ids;
use qwen3_model::pooling::Scorer;
use qwen3_model::{Config, Isa, Model, ModelOptions, ModelSource};
use qwen3_server::{
    Control, Expected, Listen, PoolingModel, SamplingDefaults, ServedModel, Server, ServerConfig,
};
use qwen3_text::{ChatTemplate, ControlTokens, Tokenizer};
use serde_json::{Value, json};

/// No request of these tests takes so long on a machine that works.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Tests of one program take turns: ranks of several servers would wait for each other's cores.
static ONE_SERVER: Mutex<()> = Mutex::new(());

/// A server with its ranks.
pub struct Running {
    _turn: MutexGuard<'static, ()>,
    pub server: Option<Server>,
    pub engine: EngineHandle,
    pub address: String,
    ranks: Vec<JoinHandle<()>>,
}

/// A server on this machine that takes any free port.
pub fn config() -> ServerConfig {
    ServerConfig::new(Listen::Tcp(([127, 0, 0, 1], 0).into()))
}

/// A small engine.
pub fn small() -> EngineConfig {
    EngineConfig {
        kv_memory: KvMemory::Positions(8192),
        max_sequences: 16,
        ..EngineConfig::default()
    }
}

/// Starts a server over `ranks` thread ranks.
pub fn start(ranks: usize, config: ServerConfig, engine: &EngineConfig) -> Running {
    // A test that failed has ended its server, too.
    let turn = ONE_SERVER.lock().unwrap_or_else(PoisonError::into_inner);
    let server = Server::start(config).expect("the server listens");
    let control = server.control();
    let (sender, receiver) = std::sync::mpsc::channel();
    let comms: Vec<Arc<dyn Communicator>> = match ranks {
        1 => vec![Arc::new(SoloComm::new())],
        _ => ThreadComm::group(ranks).into_iter().map(|comm| Arc::new(comm) as _).collect(),
    };
    let threads = comms.into_iter().map(|comm| {
        let (sender, config) = (sender.clone(), engine.clone());
        thread::spawn(move || {
            let source = source();
            let options = ModelOptions { threads: 1, ..ModelOptions::new(isa()) };
            let model = Model::load(&source, comm, &options, &|_| ()).expect("the model loads");
            let eos = eos_token_ids(&source, model.config()).expect("the model ends texts");
            let engine = Engine::new(model, &config).expect("the engine starts");
            if let Some(handle) = engine.handle() {
                sender.send((handle, eos)).expect("somebody waits");
            }
            // The error of a test that ends ranks is one of its answers.
            let _ = engine.run();
        })
    });
    let ranks = threads.collect();
    let (handle, eos) = receiver.recv().expect("rank 0 has an engine");
    ready(&control, handle.clone(), eos);
    let address = server.address().trim_start_matches("http://").to_owned();
    Running { _turn: turn, server: Some(server), engine: handle, address, ranks }
}

fn isa() -> Isa {
    Isa::from_env().expect("SIMD_KERNELS_ISA names an instruction set of this machine")
}

fn source() -> Arc<ModelSource> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen");
    ModelSource::open(path).expect("the bundled model opens")
}

fn ready(control: &Control, engine: EngineHandle, eos_token_ids: Vec<u32>) {
    let source = source();
    let config = Config::read(&source).expect("a configuration");
    control.ready(ServedModel {
        name: "austen".to_owned(),
        engine,
        tokenizer: Tokenizer::open(source.folder()).expect("the bundled model has a tokenizer"),
        template: ChatTemplate::open(source.folder()).ok(),
        control_tokens: ControlTokens::Literal,
        eos_token_ids,
        defaults: SamplingDefaults::default(),
        expected: Expected { bytes_per_token: Some(4096), steps_per_second: None },
        pooling: PoolingModel {
            embeds: true,
            hidden_size: config.hidden_size,
            // The tokens of "a" and "b" stand for the answers.
            scorer: Ok(Scorer::read(&source, &config, Some([65, 64])).expect("two rows")),
        },
    });
}

impl Running {
    /// Sends a request and reads the whole response.
    pub fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let mut stream = self.connect();
        send(&mut stream, method, path, headers, body);
        Answer::read(&mut BufReader::new(stream))
    }

    /// Posts JSON.
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, "", &body.to_string())
    }

    /// Posts JSON and expects success.
    pub fn ok(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    }

    /// A connection.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("the server accepts connections");
        stream.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
        stream
    }

    /// Starts a request whose answer the caller reads, or not.
    pub fn begin(&self, path: &str, body: &Value) -> TcpStream {
        let mut stream = self.connect();
        send(&mut stream, "POST", path, "", &body.to_string());
        stream
    }

    /// Waits until `done` holds for the engine's counters.
    pub fn wait(&self, what: &str, done: impl Fn(&engine::Stats) -> bool) {
        let until = Instant::now() + TIMEOUT;
        while !done(&self.engine.stats()) {
            assert!(Instant::now() < until, "{what}: {:?}", self.engine.stats());
            thread::yield_now();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.engine.shutdown();
        for rank in self.ranks.drain(..) {
            // A panic of a rank has been printed.
            let _ = rank.join();
        }
        if let Some(server) = self.server.take() {
            server.close();
        }
    }
}

/// Writes a request, after whose answer the server closes the connection.
pub fn send(stream: &mut TcpStream, method: &str, path: &str, headers: &str, body: &str) {
    let host = stream.peer_addr().expect("the stream is connected");
    let host = if headers.contains("host:") { String::new() } else { format!("host: {host}\r\n") };
    let kind = if body.is_empty() { "" } else { "content-type: application/json\r\n" };
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\n{host}{kind}content-length: {length}\r\n\
         connection: close\r\n{headers}\r\n"
    );
    // A server that refuses a body may close before it is written.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
}

/// A response.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    /// Reads a response with a length, or in chunks.
    pub fn read(reader: &mut impl std::io::BufRead) -> Self {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a status line");
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status line: {line:?}"));
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).expect("a header");
            match line.trim_end().split_once(": ") {
                Some((name, value)) => headers.push((name.to_lowercase(), value.to_owned())),
                None => break,
            }
        }
        let mut answer = Self { status, headers, body: String::new() };
        let mut body = Vec::new();
        if answer.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = chunk(reader) {
                body.extend(chunk);
            }
        } else if let Some(length) = answer.header("content-length") {
            body.resize(length.parse().expect("a length"), 0);
            reader.read_exact(&mut body).expect("the whole body");
        }
        answer.body = String::from_utf8(body).expect("UTF-8");
        answer
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| &**value)
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The data of server-sent events, without the mark of the end.
    pub fn events(&self) -> Vec<Value> {
        let data = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]")
            .map(|data| serde_json::from_str(data).unwrap_or_else(|_| panic!("{data}")))
            .collect()
    }
}

/// A chunk of a chunked body; `None` for the last, or where the body is cut.
fn chunk(reader: &mut impl std::io::BufRead) -> Option<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let length = usize::from_str_radix(line.trim(), 16).ok()?;
    let mut data = vec![0; length + 2];
    reader.read_exact(&mut data).ok()?;
    data.truncate(length);
    (length > 0).then_some(data)
}

/// A chat request with a greedy answer.
pub fn chat(question: &str, max_tokens: usize) -> Value {
    json!({
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "chat_template_kwargs": {"enable_thinking": false},
    })
}

/// The object with further fields.
pub fn with(mut object: Value, fields: Value) -> Value {
    if let (Value::Object(object), Value::Object(mut fields)) = (&mut object, fields) {
        object.append(&mut fields);
    }
    object
}
