//! Settings of a server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::access::Keys;
use crate::body::BodyLimits;

/// Where the server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A UNIX socket, which only this user may use (mode 0600).
    Unix(PathBuf),
}

/// Certificate and private key, both as PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The certificate chain.
    pub cert: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// Settings of a server.
#[derive(Debug)]
pub struct ServerConfig {
    /// Where it listens.
    pub listen: Listen,
    /// Encrypts connections.
    pub tls: Option<Tls>,
    /// Who may use it.
    pub keys: Keys,
    /// Names in `Host` headers that are accepted besides those of this machine.
    pub allowed_hosts: Vec<String>,
    /// Web pages of these origins may use the server.
    pub cors_origins: Vec<String>,
    /// Serves the web page at `/`.
    pub page: bool,
    /// Logs prompts and answers.
    pub log_text: bool,
    /// Limits on clients.
    pub limits: Limits,
}

impl ServerConfig {
    /// A server for this machine's users, without keys.
    pub fn new(listen: Listen) -> Self {
        Self {
            listen,
            tls: None,
            keys: Keys::default(),
            allowed_hosts: Vec::new(),
            cors_origins: Vec::new(),
            page: true,
            log_text: false,
            limits: Limits::default(),
        }
    }
}

/// Limits on what clients send and how long they take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Limits of a request's body.
    pub body: BodyLimits,
    /// Longest time between the first byte of a request and the end of its headers, and from a new
    /// connection to the first byte.
    pub header_time: Duration,
    /// Longest time that a connection stays open between requests.
    pub idle_time: Duration,
    /// Longest time that a client takes no byte of an answer.
    pub write_time: Duration,
    /// Open connections; further ones are closed at once.
    pub connections: usize,
    /// Concurrent HTTP/2 streams of a connection.
    pub http2_streams: u32,
    /// Largest `n`.
    pub n: usize,
    /// Longest answer in tokens that a request may ask for; the context is a limit anyway.
    pub max_tokens: usize,
    /// Stop texts of a request.
    pub stop_strings: usize,
    /// Longest stop text or forbidden text in bytes.
    pub stop_bytes: usize,
    /// Prompts of a request for text completions.
    pub prompts: usize,
    /// Longest time to render and encode a prompt.
    pub tokenization_time: Duration,
    /// Time between comments in a stream that has no events.
    pub ping: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: BodyLimits::default(),
            header_time: Duration::from_secs(10),
            idle_time: Duration::from_secs(75),
            write_time: Duration::from_secs(20),
            connections: 4096,
            http2_streams: 64,
            n: 128,
            max_tokens: usize::MAX,
            stop_strings: 16,
            stop_bytes: 1024,
            prompts: 128,
            tokenization_time: Duration::from_secs(10),
            ping: Duration::from_secs(5),
        }
    }
}
