//! Ctrl-C in a conversation ends an answer, not the program.

use std::sync::atomic::{AtomicBool, Ordering};

use ranks::{Rank, RankError, Response, Signal};

/// Ctrl-C was pressed since the answer began.
static PRESSED: AtomicBool = AtomicBool::new(false);
/// An answer is being written.
static ANSWERING: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C ends an answer that is being written; at the prompt it says how to leave. A
/// launcher sends SIGINT to every rank; rank 0 alone acts on it.
pub fn handle(rank: &Rank) -> Result<(), RankError> {
    let root = rank.is_root();
    rank.on_signals(move |signal| {
        if signal != Signal::Interrupt {
            return Response::End;
        }
        if root && ANSWERING.load(Ordering::Acquire) {
            // The second time in one answer: the model did not stop after the first.
            if PRESSED.swap(true, Ordering::AcqRel) {
                std::process::exit(130);
            }
        } else if root {
            eprint!("\n(Ctrl-D leaves)\n> ");
        }
        Response::Continue
    })
}

/// An answer begins: earlier signals do not count.
pub fn begin() {
    PRESSED.store(false, Ordering::Release);
    ANSWERING.store(true, Ordering::Release);
}

/// The answer has ended.
pub fn end() {
    ANSWERING.store(false, Ordering::Release);
}

/// True if this answer shall stop.
pub fn pressed() -> bool {
    PRESSED.load(Ordering::Acquire)
}
