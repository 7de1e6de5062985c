//! Collectives between ranks that are threads of a process or MPI processes, with a ledger of every byte.

mod communicator;
mod error;
mod ledger;
mod wire;
// Unsafe: memory that several ranks see, and the two protocols that hand its regions around.
mod alarm;
mod call;
mod endpoint;
mod exchange;
mod group;
mod mail;
mod segment;
mod solo;
mod threads;
mod transport;

pub use communicator::{Communicator, CommunicatorExt, ReduceOp};
pub use error::{CommError, Place};
pub use ledger::{Collective, Entry, Ledger, Phase};
pub use solo::SoloComm;
pub use threads::ThreadComm;
pub use wire::{UnknownWireFormat, WireFormat};
