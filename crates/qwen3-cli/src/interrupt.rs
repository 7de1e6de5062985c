//! Ctrl-C: ends an answer, not the conversation.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::CliError;

/// Whether Ctrl-C was pressed since the answer began.
static PRESSED: AtomicBool = AtomicBool::new(false);
/// Whether an answer is being written.
static ANSWERING: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C ends an answer that is being written; at the prompt it says how to leave.
pub fn watch() -> Result<(), CliError> {
    let handler = || {
        if ANSWERING.load(Ordering::Acquire) {
            // Twice in one answer: the first was not heard, so leave.
            if PRESSED.swap(true, Ordering::AcqRel) {
                std::process::exit(130);
            }
        } else {
            eprint!("\n(Ctrl-D leaves)\n> ");
        }
    };
    ctrlc::set_handler(handler)
        .map_err(|source| CliError::Launch { problem: format!("cannot watch for Ctrl-C: {source}") })
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
