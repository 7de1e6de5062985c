//! Collectives between ranks that are threads of a process or MPI processes, with a ledger of every byte.

mod board;
mod communicator;
mod error;
mod ledger;
mod wire;

pub use board::{SoloComm, ThreadComm};
pub use communicator::{Communicator, CommunicatorExt, ReduceOp};
pub use error::{CommError, Place};
pub use ledger::{Collective, Entry, Ledger, Phase};
pub use wire::{UnknownWireFormat, WireFormat};
