//! Accepting connections, and the deadlines of each: on headers, on idling, and on readers that
//! take nothing.
//!
//! Plain TCP and UNIX sockets carry HTTP/1.1; under TLS the client chooses between HTTP/1.1 and
//! HTTP/2. (Telling the two apart on a plain connection needs its first bytes, for which a client
//! could take any time.)

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig as TlsConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use tower::ServiceExt as _;

use crate::config::{Limits, Listen, Tls};
use crate::service::Phase;

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address is taken or not of this machine.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address or path.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// Another server answers on the UNIX socket.
    #[error("{}: another server listens on this socket", path.display())]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// The certificate or the key cannot be used.
    #[error("{}: {problem}; expected a PEM file with {expected}", path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// What was found.
        problem: String,
        /// What was expected.
        expected: &'static str,
    },
    /// The server's threads cannot start.
    #[error("cannot start the server's threads: {source}")]
    Threads {
        /// Why.
        source: io::Error,
    },
}

/// A socket that accepts connections.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(TcpListener, SocketAddr),
    /// A UNIX socket; its file is removed when the server ends.
    Unix(UnixListener, PathBuf),
}

impl Socket {
    /// Listens as `listen` says.
    pub async fn bind(listen: &Listen) -> Result<Self, ListenError> {
        match listen {
            Listen::Tcp(address) => {
                let failed = |source| ListenError::Bind { address: address.to_string(), source };
                let listener = TcpListener::bind(address).await.map_err(failed)?;
                let address = listener.local_addr().map_err(failed)?;
                Ok(Self::Tcp(listener, address))
            }
            Listen::Unix(path) => Ok(Self::Unix(bind_unix(path).await?, path.clone())),
        }
    }

    /// The address that clients connect to.
    pub fn address(&self) -> String {
        match self {
            Self::Tcp(_, address) => address.to_string(),
            Self::Unix(_, path) => path.display().to_string(),
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // The next server removes what is left.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Listens on a UNIX socket of mode 0600. A file that a dead server left is replaced.
async fn bind_unix(path: &Path) -> Result<UnixListener, ListenError> {
    use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
    let failed = |source| ListenError::Bind { address: path.display().to_string(), source };
    if tokio::net::UnixStream::connect(path).await.is_ok() {
        return Err(ListenError::SocketInUse { path: path.to_owned() });
    }
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        std::fs::remove_file(path).map_err(failed)?;
    }
    // The socket appears under its name only after it has its mode: in a folder of its own, which
    // nobody else may enter.
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let folder = path.with_file_name(name);
    let bind = || {
        use std::os::unix::fs::DirBuilderExt as _;
        std::fs::DirBuilder::new().mode(0o700).create(&folder)?;
        let inner = folder.join("socket");
        let listener = UnixListener::bind(&inner)?;
        std::fs::set_permissions(&inner, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&inner, path)?;
        Ok(listener)
    };
    let listener = bind();
    let _ = std::fs::remove_dir_all(&folder);
    listener.map_err(failed)
}

/// Reads certificate and key. HTTP/2 is offered before HTTP/1.1.
pub fn tls(files: &Tls) -> Result<TlsAcceptor, ListenError> {
    let wrong = |path: &Path, problem: String, expected| ListenError::Tls {
        path: path.to_owned(),
        problem,
        expected,
    };
    let chain = CertificateDer::pem_file_iter(&files.cert)
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
        .map_err(|error| wrong(&files.cert, error.to_string(), "certificates"))?;
    if chain.is_empty() {
        return Err(wrong(&files.cert, "found no certificate".to_owned(), "certificates"));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| wrong(&files.key, error.to_string(), "a private key"))?;
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let mut config = TlsConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| wrong(&files.key, error.to_string(), "the certificate's private key"))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Accepts connections until the server drains or fails, then waits until those that are open have
/// ended: idle ones at once, others after their answers.
pub async fn serve(
    socket: Socket,
    tls: Option<TlsAcceptor>,
    router: Router,
    limits: Arc<Limits>,
    mut phases: watch::Receiver<Phase>,
) {
    let places = Arc::new(Semaphore::new(limits.connections));
    let connections = tokio_util::task::TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = accept(&socket) => accepted,
            _ = phases.wait_for(Phase::is_end) => break,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Usually no file descriptor is left; some connection will end.
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::warn!(limit = limits.connections, "too many connections");
            continue;
        };
        let (tls, router) = (tls.clone(), router.clone());
        let (limits, phases) = (Arc::clone(&limits), phases.clone());
        connections.spawn(async move {
            let _place = place;
            match (stream, tls) {
                (Accepted::Tcp(stream), Some(tls)) => {
                    // A client that does not finish the handshake, or fails it, gets no answer.
                    let handshake = tokio::time::timeout(limits.header_time, tls.accept(stream));
                    if let Ok(Ok(stream)) = handshake.await {
                        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                        connection(stream, http2, router, &limits, phases).await;
                    }
                }
                (Accepted::Tcp(stream), None) => {
                    connection(stream, false, router, &limits, phases).await;
                }
                (Accepted::Unix(stream), _) => {
                    connection(stream, false, router, &limits, phases).await;
                }
            }
        });
    }
    drop(socket);
    connections.close();
    connections.wait().await;
}

enum Accepted {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn accept(socket: &Socket) -> io::Result<Accepted> {
    match socket {
        Socket::Tcp(listener, _) => {
            let (stream, _) = listener.accept().await?;
            // Each piece of an answer is sent at once.
            stream.set_nodelay(true)?;
            Ok(Accepted::Tcp(stream))
        }
        Socket::Unix(listener, _) => Ok(Accepted::Unix(listener.accept().await?.0)),
    }
}

/// Serves one connection until it ends, a deadline passes, or it is idle when the
/// server drains.
async fn connection<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    http2: bool,
    router: Router,
    limits: &Limits,
    mut phases: watch::Receiver<Phase>,
) {
    let activity = Arc::new(Activity::new());
    let io = TokioIo::new(Watched { stream, activity: Arc::clone(&activity) });
    let counted = Arc::clone(&activity);
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let running = Running::start(&counted);
        let router = router.clone();
        async move {
            let response = router.oneshot(request.map(Body::new)).await?;
            Ok::<_, std::convert::Infallible>(response.map(|body| Guarded { body, _held: running }))
        }
    });
    if http2 {
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.http2_streams)
            .max_header_list_size(64 << 10);
        let mut connection = std::pin::pin!(builder.serve_connection(io, service));
        let mut closing = false;
        loop {
            tokio::select! {
                _ = connection.as_mut() => break,
                end = activity.deadline(limits) => match end {
                    End::Idle if !closing => {
                        closing = true;
                        connection.as_mut().graceful_shutdown();
                    }
                    End::Idle | End::Stalled => break,
                },
                _ = phases.wait_for(Phase::is_end), if !closing => {
                    closing = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    } else {
        let mut builder = hyper::server::conn::http1::Builder::new();
        // The deadline on headers is the one of `Activity`.
        builder.timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(64 << 10);
        let mut connection = std::pin::pin!(builder.serve_connection(io, service));
        let mut closing = false;
        loop {
            tokio::select! {
                _ = connection.as_mut() => break,
                _ = activity.deadline(limits) => break,
                _ = phases.wait_for(Phase::is_end), if !closing => {
                    closing = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

/// Why a connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// No request came, or its headers took too long.
    Idle,
    /// The client takes no byte of an answer.
    Stalled,
}

/// What happens on a connection, as far as deadlines depend on it.
#[derive(Debug)]
struct Activity {
    /// Requests whose answers are not complete.
    running: AtomicUsize,
    times: Mutex<Times>,
}

#[derive(Debug)]
struct Times {
    /// When the last answer was complete, or the connection began.
    idle_since: Instant,
    /// When the first byte came since then.
    first_byte: Option<Instant>,
    /// Whether a request was answered.
    answered: bool,
    /// Since when the client takes nothing.
    stalled_since: Option<Instant>,
}

impl Activity {
    fn new() -> Self {
        let times = Times {
            idle_since: Instant::now(),
            first_byte: None,
            answered: false,
            stalled_since: None,
        };
        Self { running: AtomicUsize::new(0), times: Mutex::new(times) }
    }

    fn times(&self) -> std::sync::MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the connection is to be closed.
    async fn deadline(&self, limits: &Limits) -> End {
        loop {
            let now = Instant::now();
            let (next, end) = self.next(limits, now);
            if next <= now {
                return end;
            }
            tokio::time::sleep_until(next.into()).await;
        }
    }

    /// When to look again, or, if that time has passed, why the connection ends.
    fn next(&self, limits: &Limits, now: Instant) -> (Instant, End) {
        let times = self.times();
        if let Some(since) = times.stalled_since {
            return (since + limits.write_time, End::Stalled);
        }
        if self.running.load(Ordering::Acquire) > 0 {
            return (now + limits.write_time / 2, End::Stalled);
        }
        let end = match times.first_byte {
            Some(first_byte) => first_byte + limits.header_time,
            None if !times.answered => times.idle_since + limits.header_time,
            // Data may come at any time, and then an earlier deadline holds.
            None => {
                let idle = times.idle_since + limits.idle_time;
                if idle <= now { idle } else { idle.min(now + limits.header_time / 2) }
            }
        };
        (end, End::Idle)
    }
}

/// A request that is being answered.
struct Running(Arc<Activity>);

impl Running {
    fn start(activity: &Arc<Activity>) -> Self {
        activity.running.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(activity))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut times = self.0.times();
        times.idle_since = Instant::now();
        times.first_byte = None;
        times.answered = true;
        drop(times);
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A body that holds something until it is sent or dropped.
pub struct Guarded<G> {
    body: Body,
    _held: G,
}

impl<G> Guarded<G> {
    /// Holds `held` as long as `body`.
    pub fn new(body: Body, held: G) -> Self {
        Self { body, _held: held }
    }
}

impl<G: Unpin> hyper::body::Body for Guarded<G> {
    type Data = axum::body::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

/// A stream that tells `Activity` what happens.
struct Watched<S> {
    stream: S,
    activity: Arc<Activity>,
}

impl<S> Watched<S> {
    fn wrote<T>(&self, poll: Poll<T>) -> Poll<T> {
        let stalled_since = &mut self.activity.times().stalled_since;
        match poll {
            Poll::Ready(_) => *stalled_since = None,
            Poll::Pending => {
                stalled_since.get_or_insert_with(Instant::now);
            }
        }
        poll
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let poll = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before && self.activity.running.load(Ordering::Acquire) == 0 {
            self.activity.times().first_byte.get_or_insert_with(Instant::now);
        }
        poll
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.wrote(poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_flush(context);
        self.wrote(poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            header_time: Duration::from_secs(10),
            idle_time: Duration::from_secs(60),
            write_time: Duration::from_secs(20),
            ..Limits::default()
        }
    }

    /// Seconds until the connection is looked at, and why it would end.
    fn next(activity: &Activity, after: u64) -> (u64, End) {
        let start = activity.times().idle_since;
        let (next, end) = activity.next(&limits(), start + Duration::from_secs(after));
        (next.duration_since(start).as_secs(), end)
    }

    #[test]
    fn a_connection_without_a_request_has_the_time_of_headers() {
        let activity = Activity::new();
        assert_eq!(next(&activity, 3), (10, End::Idle));
    }

    #[test]
    fn headers_have_a_deadline_from_their_first_byte_and_idling_has_its_own() {
        let activity = Activity::new();
        activity.times().answered = true;
        // It is looked at before the end, because data may come.
        assert_eq!(next(&activity, 3), (8, End::Idle));
        assert_eq!(next(&activity, 58), (60, End::Idle));
        assert_eq!(next(&activity, 61), (60, End::Idle));
        let start = activity.times().idle_since;
        activity.times().first_byte = Some(start + Duration::from_secs(30));
        assert_eq!(next(&activity, 31), (40, End::Idle));
    }

    #[test]
    fn a_running_answer_has_no_deadline_unless_the_client_takes_nothing() {
        let activity = Arc::new(Activity::new());
        let running = Running::start(&activity);
        assert_eq!(next(&activity, 500), (510, End::Stalled));
        let start = activity.times().idle_since;
        activity.times().stalled_since = Some(start + Duration::from_secs(490));
        assert_eq!(next(&activity, 500), (510, End::Stalled));
        activity.times().stalled_since = None;
        drop(running);
        assert_eq!(activity.running.load(Ordering::Acquire), 0);
        assert!(activity.times().answered);
    }
}
