//! Collectives between ranks that are threads of a process or MPI processes, with a ledger of every
//! byte.
#![doc = ""]
#![doc = include_str!("../README.md")]

// What is counted: kinds of calls, what a thread does meanwhile, bytes, seconds.
mod ledger;

// How f32 payloads travel.
mod wire;

// What can go wrong between ranks.
mod error;

// The interface.
mod communicator;

// Memory that several ranks see. Unsafe lives here, in the two protocols on top (exchange, mail),
// and in mpi_sys.
#[allow(unsafe_code)]
mod segment;

// Who failed first, who has left.
mod alarm;

// One call: what it is, how it waits, when it gives up.
mod call;

// Meetings and messages in shared memory.
#[allow(unsafe_code)]
mod exchange;

#[allow(unsafe_code)]
mod mail;

// What a way of carrying data offers, and the one over shared memory.
mod transport;

mod group;

// How ranks lie on machines, and what calls between them cost on a link.
mod cost;

// A rank's end of any group, and the groups without MPI.
mod endpoint;

mod solo;

mod threads;

// A communicator on which calls cost what they would on a link.
mod emulate;

// Memory for messages, the functions of MPI, the job, payloads as messages over MPI, collectives of
// them, machines with several ranks, the communicator.
#[cfg(feature = "mpi")]
mod buffer;

#[cfg(feature = "mpi")]
#[allow(unsafe_code)]
mod mpi_sys;

#[cfg(feature = "mpi")]
mod mpi_job;

#[cfg(feature = "mpi")]
mod messages;

#[cfg(feature = "mpi")]
mod collectives;

#[cfg(feature = "mpi")]
mod nodes;

#[cfg(feature = "mpi")]
mod mpi_comm;

pub use call::digest;
pub use communicator::{Communicator, CommunicatorExt, ReduceOp};
pub use cost::{Cluster, InvalidLink, Link, node_of};
pub use emulate::EmulatedComm;
pub use error::{CommError, Place};
pub use ledger::{Activity, Collective, Entry, Ledger, Phase, TracedCall};
#[cfg(feature = "mpi")]
pub use mpi_comm::{MpiComm, MpiOptions, mpi_library};
pub use solo::SoloComm;
pub use threads::ThreadComm;
pub use wire::{UnknownWireFormat, WIRE_GROUP, WireFormat};
