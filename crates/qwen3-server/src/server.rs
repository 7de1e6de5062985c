//! A server's life: it listens while the model loads, answers, drains, and ends.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::access::Sites;
use crate::config::{Listen, ServerConfig};
use crate::listen::{self, ListenError, Socket};
use crate::routes;
use crate::service::{Phase, ServedModel, Service};

/// Threads that read requests and write answers. Generation needs the other cores.
const THREADS: usize = 2;

/// A server that runs on threads of its own.
pub struct Server {
    runtime: Runtime,
    service: Arc<Service>,
    address: String,
    serving: JoinHandle<()>,
}

/// Changes the phase of a server from any thread.
#[derive(Clone)]
pub struct Control {
    service: Arc<Service>,
}

impl Server {
    /// Starts to listen. Until [`Control::ready`] is called, `/health` answers 503.
    pub fn start(config: ServerConfig) -> Result<Self, ListenError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .max_blocking_threads(8)
            .thread_name("http")
            .enable_all()
            .build()
            .map_err(|source| ListenError::Threads { source })?;
        let tls = config.tls.as_ref().map(listen::tls).transpose()?;
        let socket = runtime.block_on(Socket::bind(&config.listen))?;
        let address = match &config.listen {
            Listen::Unix(path) => format!("unix:{}", path.display()),
            Listen::Tcp(_) if tls.is_some() => format!("https://{}", socket.address()),
            Listen::Tcp(_) => format!("http://{}", socket.address()),
        };
        let lower = config.allowed_hosts.iter().map(|host| host.to_ascii_lowercase());
        let sites = Sites {
            any_host: matches!(config.listen, Listen::Unix(_)),
            any_address: matches!(config.listen, Listen::Tcp(at) if !at.ip().is_loopback()),
            hosts: lower.collect(),
            origins: config.cors_origins,
        };
        let limits = Arc::new(config.limits);
        let service =
            Service::new(config.keys, sites, Arc::clone(&limits), config.page, config.log_text);
        let service = Arc::new(service);
        let router = routes::router(&service);
        let serving = runtime.spawn(listen::serve(socket, tls, router, limits, service.phases()));
        Ok(Self { runtime, service, address, serving })
    }

    /// Where clients find the server, for example `http://127.0.0.1:8000`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The server's control.
    pub fn control(&self) -> Control {
        Control { service: Arc::clone(&self.service) }
    }

    /// Waits until the server drains or has failed, whoever asked for it.
    pub fn wait_for_end(&self) -> Phase {
        let mut phases = self.service.phases();
        self.runtime.block_on(async move {
            phases.wait_for(Phase::is_end).await.map_or(Phase::Draining, |phase| phase.clone())
        })
    }

    /// Stops accepting connections and waits until all answers are sent, at most for `timeout`.
    /// Returns true if they are.
    pub fn finish(&mut self, timeout: Duration) -> bool {
        self.service.drain();
        let serving = &mut self.serving;
        self.runtime.block_on(async { tokio::time::timeout(timeout, serving).await.is_ok() })
    }

    /// Ends all threads. Connections that are open are closed.
    pub fn close(self) {
        self.runtime.shutdown_timeout(Duration::from_millis(500));
    }
}

impl Control {
    /// The model is loaded; from now on requests are answered.
    pub fn ready(&self, model: ServedModel) {
        self.service.ready(model);
    }

    /// Accepts no further request; open answers go on.
    pub fn drain(&self) {
        self.service.drain();
    }

    /// The ranks ended with an error; requests get it from now on.
    pub fn fail(&self, reason: &str) {
        self.service.fail(reason);
    }
}
