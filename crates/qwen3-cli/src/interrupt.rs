//! Signals: Ctrl-C ends an answer, not the conversation; a rank that is told to end says where it
//! was.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::failure::CliError;

/// Whether Ctrl-C was pressed since the answer began.
static PRESSED: AtomicBool = AtomicBool::new(false);
/// Whether an answer is being written.
static ANSWERING: AtomicBool = AtomicBool::new(false);
/// Whether this process is in a conversation, which has its own use for Ctrl-C.
static CONVERSATION: AtomicBool = AtomicBool::new(false);

/// This process is a rank of a conversation: Ctrl-C, where a launcher passes it on to all of them,
/// is rank 0's affair.
pub fn converse() {
    CONVERSATION.store(true, Ordering::Release);
}

/// From now on Ctrl-C ends an answer that is being written; at the prompt it says how to leave.
pub fn watch() -> Result<(), CliError> {
    let handler = |_| {
        if ANSWERING.load(Ordering::Acquire) {
            // Twice in one answer: the first was not heard, so leave.
            if PRESSED.swap(true, Ordering::AcqRel) {
                std::process::exit(130);
            }
        } else {
            eprint!("\n(Ctrl-D leaves)\n> ");
        }
    };
    on_signals(&[SIGINT], handler).map_err(|source| CliError::Launch {
        problem: format!("cannot watch for Ctrl-C: {source}"),
    })
}

/// From now on a signal that would end this process calls `end` instead, with the signal's name.
#[cfg_attr(not(feature = "mpi"), allow(dead_code))]
pub fn before_end(end: impl Fn(&'static str) + Send + 'static) -> Result<(), CliError> {
    let handler = move |signal| match signal {
        SIGINT if CONVERSATION.load(Ordering::Acquire) => {}
        SIGINT => end("SIGINT"),
        SIGHUP => end("SIGHUP"),
        _ => end("SIGTERM"),
    };
    on_signals(&[SIGINT, SIGTERM, SIGHUP], handler).map_err(|source| CliError::Launch {
        problem: format!("cannot watch for signals: {source}"),
    })
}

fn on_signals(signals: &[i32], handler: impl Fn(i32) + Send + 'static) -> io::Result<()> {
    let mut signals = Signals::new(signals)?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || signals.forever().for_each(handler))?;
    Ok(())
}

/// An answer begins: what was pressed before does not count.
pub fn begin() {
    PRESSED.store(false, Ordering::Release);
    ANSWERING.store(true, Ordering::Release);
}

/// The answer has ended.
pub fn end() {
    ANSWERING.store(false, Ordering::Release);
}

/// Whether this answer shall stop.
pub fn pressed() -> bool {
    PRESSED.load(Ordering::Acquire)
}
