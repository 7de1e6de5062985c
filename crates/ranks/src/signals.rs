//! Signals of this process, handled on a thread of their own.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::error::RankError;

/// A signal that a job can handle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Signal {
    /// SIGINT: Ctrl-C.
    Interrupt,
    /// SIGTERM.
    Terminate,
    /// SIGHUP: the terminal is gone.
    Hangup,
    /// SIGUSR1.
    User1,
}

impl Signal {
    /// The name of the signal.
    pub fn name(self) -> &'static str {
        match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
            Self::Hangup => "SIGHUP",
            Self::User1 => "SIGUSR1",
        }
    }

    fn number(self) -> i32 {
        match self {
            Self::Interrupt => SIGINT,
            Self::Terminate => SIGTERM,
            Self::Hangup => SIGHUP,
            Self::User1 => SIGUSR1,
        }
    }
}

/// What happens after a handler has seen a signal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Response {
    /// The job goes on.
    Continue,
    /// The signal does what it would do without a handler: it ends the job.
    End,
}

type Handler = Box<dyn FnMut(Signal) -> Response + Send>;
type EndOfProcess = Arc<dyn Fn(Signal) + Send + Sync>;

struct State {
    /// The program's handler.
    handler: Option<Handler>,
    /// How the signal ends a process of an MPI job; elsewhere the system ends the process.
    end: Option<EndOfProcess>,
    /// The thread runs.
    started: bool,
}

static STATE: Mutex<State> = Mutex::new(State { handler: None, end: None, started: false });

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on `handler` decides what signals do in this process.
pub(crate) fn set_handler(
    handler: impl FnMut(Signal) -> Response + Send + 'static,
) -> Result<(), RankError> {
    state().handler = Some(Box::new(handler));
    start().map_err(|source| RankError::Signals { source })
}

/// From now on a signal ends this process through `end`, unless a handler lets the job continue.
#[cfg_attr(not(feature = "mpi"), allow(dead_code))]
pub(crate) fn set_end(end: impl Fn(Signal) + Send + Sync + 'static) -> Result<(), RankError> {
    state().end = Some(Arc::new(end));
    start().map_err(|source| RankError::Signals { source })
}

/// The job has ended, and its handler with it.
pub(crate) fn clear_handler() {
    state().handler = None;
}

/// Starts the thread, once per process.
fn start() -> io::Result<()> {
    let mut state = state();
    if state.started {
        return Ok(());
    }
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1])?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        signals.forever().for_each(|number| {
            handle(match number {
                SIGINT => Signal::Interrupt,
                SIGTERM => Signal::Terminate,
                SIGHUP => Signal::Hangup,
                _ => Signal::User1,
            });
        });
    })?;
    state.started = true;
    Ok(())
}

fn handle(signal: Signal) {
    let mut state = state();
    let response = state.handler.as_mut().map_or(Response::End, |handler| handler(signal));
    let end = state.end.clone();
    drop(state);
    match (response, end) {
        (Response::Continue, _) => {}
        (Response::End, Some(end)) => end(signal),
        (Response::End, None) => {
            // Fails only for signals that have no default, and these all have one.
            let _ = signal_hook::low_level::emulate_default_handler(signal.number());
        }
    }
}
