//! `qwen3 serve`: an HTTP server over all ranks.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::Duration;

use clap::Args;
use qwen3_model::generation_config::{GenerationConfig, eos_token_ids};
use qwen3_model::options::KvFormat;
use qwen3_model::pooling::is_embedding_model;
use qwen3_model::{Config, ModelError, ModelSource};
use qwen3_server::engine::{Engine, EngineConfig, EngineHandle, KvMemory};
use qwen3_server::{
    Control, Expected, Keys, Limits, Listen, LogFormat, Phase, PoolingModel, SamplingDefaults,
    ServedModel, Server, ServerConfig, Tls, notify, start_logging,
};
use qwen3_text::{ChatTemplate, ControlTokens, TemplateError, Tokenizer};
use ranks::{Failure, Neighbours, Rank, Response, Signal};

use crate::ahead;
use crate::failure::CliError;
use crate::memory;
use crate::model_path::ModelPath;
use crate::options::{EngineOptions, LaunchOptions, positive};
use crate::plan::{self, Workload};
use crate::pooling::scorer;
use crate::session::{self, Loaded};

/// The variable of the environment that may hold the only key.
const KEY_VARIABLE: &str = "QWEN3_API_KEY";
/// How long open requests have to receive the error after which all ranks end.
const ERROR_TIMEOUT: Duration = Duration::from_secs(1);

/// Answer requests over HTTP, in the forms of OpenAI's and Anthropic's APIs, with a web page
///
/// The server listens on this machine only, unless --host says otherwise. Keys come from a file or
/// from the variable QWEN3_API_KEY. SIGTERM, SIGUSR1 and POST /drain let open answers finish and
/// then end the server; a second SIGTERM ends it at once. Under mpirun or srun, rank 0 listens.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    #[command(flatten)]
    engine: EngineOptions,

    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1", help_heading = "Serving")]
    host: String,

    /// Port to listen on; 0 takes any that is free
    #[arg(long, default_value_t = 8000, help_heading = "Serving")]
    port: u16,

    /// Listen on a UNIX socket instead, which only this user may use
    #[arg(long, value_name = "PATH", conflicts_with_all = ["host", "port", "tls_cert"], help_heading = "Serving")]
    unix_socket: Option<PathBuf>,

    /// Name of the model in requests [default: the name of its folder]
    #[arg(long, value_name = "NAME", help_heading = "Serving")]
    served_model_name: Option<String>,

    /// File with a key per line, then limits: KEY [name=TEXT] [concurrent=N] [per-minute=N]
    #[arg(long, value_name = "FILE", help_heading = "Serving")]
    api_key_file: Option<PathBuf>,

    /// Further names by which clients reach the server (repeatable)
    #[arg(long, value_name = "HOST", help_heading = "Serving")]
    allowed_host: Vec<String>,

    /// Allow web pages of this origin, such as `https://app.example`, to use the server
    /// (repeatable)
    #[arg(long, value_name = "ORIGIN", help_heading = "Serving")]
    cors_origin: Vec<String>,

    /// Sequences that run together [default: 64; with a hybrid model fewer, if the recurrent states
    /// of 64 need more than a quarter of the free memory]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Serving")]
    max_sequences: Option<usize>,

    /// Requests that may wait; further ones get the status 429
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = positive, help_heading = "Serving")]
    max_queue: usize,

    /// Memory for keys and values on each rank, for example 8G [default: what --max-sequences of
    /// full length need, at most half of the free memory]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Serving")]
    kv_memory: Option<usize>,

    /// Encrypt connections with this certificate chain (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key", help_heading = "Serving")]
    tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert", help_heading = "Serving")]
    tls_key: Option<PathBuf>,

    /// How many seconds open answers have to finish when the server is told to end
    #[arg(long, value_name = "SECONDS", default_value_t = 30, help_heading = "Serving")]
    drain_timeout: u64,

    /// Do not serve the web page
    #[arg(long, help_heading = "Serving")]
    no_page: bool,

    /// Allow other machines to use the server without a key
    #[arg(long, help_heading = "Serving")]
    insecure: bool,

    /// Encode control tokens such as <|im_end|> inside messages as tokens, as transformers does;
    /// a message can then pose as another role's
    #[arg(long, help_heading = "Serving")]
    trust_special_tokens: bool,

    /// Write the log as JSON, an object per line
    #[arg(long, help_heading = "Serving")]
    log_json: bool,

    /// Log the text of prompts
    #[arg(long, help_heading = "Serving")]
    log_prompts: bool,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

/// What rank 0 reads while the model loads.
struct Texts {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    defaults: SamplingDefaults,
    pooling: PoolingModel,
}

impl ServeArgs {
    /// Runs the command on this rank.
    pub fn run(&self, rank: &Rank) -> Result<(), Failure> {
        ahead::look(rank, &self.engine, |_| Ok(self.engine.model.open()?.find_tokenizer()?))?;
        let server = rank.on_root(|| Ok(self.start()?))?;
        let control = server.as_ref().map(Server::control);
        self.handle_signals(rank, control.clone())?;
        if let Some(server) = &server {
            rank.print(&format!("listening on {}; the model loads\n", server.address()))?;
        }
        let path = self.engine.model.clone();
        let work = Workload { kv: KvFormat::F16, prompt: 512, generate: 512 };
        let (Loaded { model, .. }, texts) =
            session::load_with(rank, &self.engine, work, move || Texts::read(&path))?;
        let weights = model.weight_bytes();
        let eos =
            rank.on_root(|| Ok(eos_token_ids(&*self.engine.model.open()?, model.config())?))?;
        let config = self.engine_config(rank, &model)?;
        let model_options = *model.options();
        let states = model.state_bytes() * (config.max_sequences + config.state_snapshots);
        let engine = Engine::new(model, &config)?;
        let served = match (engine.handle(), texts, eos, control) {
            (Some(handle), Some(texts), Some(eos), Some(control)) => {
                let expected = plan::expected(rank, &self.engine, &model_options);
                control.ready(self.served(handle.clone(), texts, eos, expected));
                Some((handle, control))
            }
            _ => None,
        };
        let mut supervisor = None;
        let mut failed = None;
        if let (Some(server), Some((handle, control))) = (server, served) {
            rank.print(&self.ready_line(rank, &server, &handle, (weights, states)))?;
            let _ = notify("READY=1");
            let timeout = Duration::from_secs(self.drain_timeout);
            let supervise = move || supervise(server, &handle, timeout);
            let thread = thread::Builder::new().name("supervisor".to_owned()).spawn(supervise);
            let work = "the end of the server";
            supervisor = Some(thread.map_err(|source| CliError::Thread { work, source })?);
            failed = Some(control);
        }
        let result = engine.run();
        if let (Err(error), Some(control)) = (&result, failed) {
            control.fail(&error.to_string());
        }
        if let Some(supervisor) = supervisor {
            // It waits no longer than the timeouts say.
            let _ = supervisor.join();
        }
        result?;
        Ok(())
    }

    /// Starts to listen, on rank 0.
    fn start(&self) -> Result<Server, CliError> {
        start_logging(if self.log_json { LogFormat::Json } else { LogFormat::Text });
        let listen = match &self.unix_socket {
            Some(path) => Listen::Unix(path.clone()),
            None => Listen::Tcp(self.address()?),
        };
        let keys = self.keys()?;
        if let Listen::Tcp(address) = listen
            && !address.ip().is_loopback()
            && keys.is_empty()
            && !self.insecure
        {
            let expected = "a key (--api-key-file), or --insecure to let everybody use the server";
            return Err(CliError::option("--host", address.ip(), expected));
        }
        let tls = self.tls_cert.clone().zip(self.tls_key.clone());
        let config = ServerConfig {
            tls: tls.map(|(cert, key)| Tls { cert, key }),
            keys,
            allowed_hosts: self.allowed_host.clone(),
            cors_origins: self.cors_origin.clone(),
            page: !self.no_page,
            log_text: self.log_prompts,
            limits: Limits::default(),
            ..ServerConfig::new(listen)
        };
        Ok(Server::start(config)?)
    }

    fn address(&self) -> Result<SocketAddr, CliError> {
        let wrong = |found: String| CliError::option("--host", found, "an address of this machine");
        let mut addresses = (&*self.host, self.port)
            .to_socket_addrs()
            .map_err(|error| wrong(format!("{} ({error})", self.host)))?;
        addresses.next().ok_or_else(|| wrong(self.host.clone()))
    }

    fn keys(&self) -> Result<Keys, CliError> {
        let (origin, text) = match (&self.api_key_file, std::env::var(KEY_VARIABLE)) {
            (Some(path), _) => {
                let text = std::fs::read_to_string(path);
                (path.clone(), text.map_err(|source| CliError::file(path, source))?)
            }
            (None, Ok(key)) => (PathBuf::from(KEY_VARIABLE), key),
            (None, Err(_)) => return Ok(Keys::default()),
        };
        Keys::parse(&text)
            .map_err(|error| CliError::Usage { problem: format!("{}: {error}", origin.display()) })
    }

    /// On rank 0 signals drain the server, and a second SIGTERM or Ctrl-C ends it at once.
    /// Launchers send signals to all ranks, or to one; the others pass theirs on and keep
    /// computing.
    fn handle_signals(&self, rank: &Rank, control: Option<Control>) -> Result<(), Failure> {
        let hosts_and_ids = rank.broadcast(|| Ok((host_name(), process::id())))?;
        let mut asked = false;
        rank.on_signals(move |signal| match (&control, signal) {
            (_, Signal::Hangup) => Response::End,
            (Some(control), Signal::User1) => {
                control.drain();
                Response::Continue
            }
            (Some(_), _) if asked => Response::End,
            (Some(control), _) => {
                asked = true;
                control.drain();
                Response::Continue
            }
            (None, _) => {
                if hosts_and_ids.0 == host_name()
                    && let Some(id) = rustix::process::Pid::from_raw(hosts_and_ids.1 as i32)
                {
                    // As SIGUSR1, which does not count as a second SIGTERM. If rank 0 is gone, its
                    // loss ends this rank.
                    let _ = rustix::process::kill_process(id, rustix::process::Signal::USR1);
                }
                Response::Continue
            }
        })?;
        Ok(())
    }

    fn engine_config(
        &self,
        rank: &Rank,
        model: &qwen3_model::Model,
    ) -> Result<EngineConfig, Failure> {
        // Ranks of one machine share its memory.
        let ranks = Neighbours::find(rank)?.count.max(1);
        let free = memory::available(Path::new("/")).unwrap_or(usize::MAX) / ranks;
        let EngineConfig { max_sequences, state_snapshots, .. } = EngineConfig::default();
        // A quarter of it for the states of sequences, an eighth for snapshots.
        let states = |part: usize| (free / part).checked_div(model.state_bytes());
        let most = states(4).unwrap_or(max_sequences).clamp(1, max_sequences);
        let max_sequences = self.max_sequences.unwrap_or(most);
        let state_snapshots = states(8).unwrap_or(0).min(state_snapshots);
        let bytes = match self.kv_memory {
            Some(bytes) => bytes,
            None => {
                let context = model.config().context_length();
                let pages = context.div_ceil(qwen3_model::PAGE_POSITIONS) * max_sequences;
                pages.saturating_mul(model.page_bytes()).min(free / 2)
            }
        };
        Ok(EngineConfig {
            kv_memory: KvMemory::Bytes(bytes),
            touch: true,
            max_sequences,
            state_snapshots,
            max_queue: self.max_queue,
            step_rows: self.engine.chunk,
            steps_file: Some(std::env::temp_dir().join(format!("qwen3-steps-{}", process::id()))),
            ..EngineConfig::default()
        })
    }

    fn served(
        &self,
        engine: EngineHandle,
        texts: Texts,
        eos: Vec<u32>,
        expected: Expected,
    ) -> ServedModel {
        ServedModel {
            expected,
            name: self.name(),
            engine,
            tokenizer: texts.tokenizer,
            template: texts.template,
            control_tokens: if self.trust_special_tokens {
                ControlTokens::Trusted
            } else {
                ControlTokens::Literal
            },
            eos_token_ids: eos,
            defaults: texts.defaults,
            pooling: texts.pooling,
        }
    }

    fn name(&self) -> String {
        let folder = || {
            let path = self.engine.model.path();
            let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
            // A folder's name may have dots, as in Qwen3-0.6B.
            let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
            name.map_or_else(|| "qwen3".into(), |name| name.to_string_lossy().into())
        };
        self.served_model_name.clone().unwrap_or_else(folder)
    }

    fn ready_line(
        &self,
        rank: &Rank,
        server: &Server,
        engine: &EngineHandle,
        (weights, states): (usize, usize),
    ) -> String {
        let limits = engine.limits();
        let mib = |bytes: usize| bytes >> 20;
        let positions = limits.pages * limits.page_positions;
        let states = match mib(states) {
            0 => String::new(),
            states => format!(", {states} MiB of recurrent states"),
        };
        format!(
            "{} on {} rank(s): {} MiB of weights{states} and {} MiB of keys and values on rank 0; \
             {} sequences of full length ({}) fit, {} may run together\n\
             ready at {}{}\n",
            self.name(),
            rank.comm().size(),
            mib(weights),
            mib(limits.page_bytes * limits.pages),
            positions / limits.context_length.max(1),
            limits.context_length,
            limits.sequences,
            server.address(),
            if self.no_page { "" } else { " (the web page is there, too)" },
        )
    }
}

impl Texts {
    fn read(path: &ModelPath) -> Result<Self, CliError> {
        let config = GenerationConfig::read(&*path.open()?)?;
        let template = match path.template() {
            Ok(template) => Some(template),
            // Base models continue text only.
            Err(CliError::Template(TemplateError::Missing { .. })) => None,
            Err(error) => return Err(error),
        };
        let defaults = SamplingDefaults::default();
        let greedy = config.do_sample == Some(false);
        let temperature = config.temperature.unwrap_or(defaults.temperature);
        let tokenizer = path.tokenizer()?;
        Ok(Self {
            pooling: pooling(&*path.open()?, &tokenizer)?,
            tokenizer,
            template,
            defaults: SamplingDefaults {
                temperature: if greedy { 0.0 } else { temperature },
                top_k: config.top_k.unwrap_or(defaults.top_k),
                top_p: config.top_p.unwrap_or(defaults.top_p),
                min_p: config.min_p.unwrap_or(defaults.min_p),
                repetition_penalty: config
                    .repetition_penalty
                    .unwrap_or(defaults.repetition_penalty),
            },
        })
    }
}

/// What the model does with hidden states. A language model that cannot answer "yes" or "no" with
/// one token ranks nothing.
fn pooling(source: &ModelSource, tokenizer: &Tokenizer) -> Result<PoolingModel, CliError> {
    let config = Config::read(source).map_err(ModelError::from)?;
    let embeds = config.has_head || is_embedding_model(source, &config)?;
    let scorer = match scorer(source, &config, Some(tokenizer)) {
        _ if embeds && !config.has_head => Err("it is an embedding model".to_owned()),
        Err(CliError::PoolingText(error)) => Err(error.to_string()),
        scorer => Ok(scorer?),
    };
    Ok(PoolingModel { embeds, hidden_size: config.hidden_size, scorer })
}

/// Ends the engine once the server has drained, or the server once the engine has failed.
fn supervise(mut server: Server, engine: &EngineHandle, drain_timeout: Duration) {
    let failed = matches!(server.wait_for_end(), Phase::Failed(_));
    let _ = notify("STOPPING=1");
    if !server.finish(if failed { ERROR_TIMEOUT } else { drain_timeout }) && !failed {
        eprintln!("warning: some answers took longer than --drain-timeout and are cut");
    }
    engine.shutdown();
    server.close();
}

/// The name of this machine.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Bytes, with K, M, G or T for powers of 1024.
fn size(text: &str) -> Result<usize, String> {
    let expected = || "expected a size above 0, such as 512M or 8G".to_owned();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &*text[digits.len()..].to_ascii_uppercase() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(expected()),
    };
    let number: f64 = digits.parse().map_err(|_| expected())?;
    let bytes = number * (1u64 << shift) as f64;
    if bytes >= 1.0 && bytes < usize::MAX as f64 { Ok(bytes as usize) } else { Err(expected()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("1.5K"), Ok(1536));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        for wrong in ["", "0", "-1G", "8X", "G", "1e400"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
