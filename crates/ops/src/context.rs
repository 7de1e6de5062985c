//! What every operation needs besides its data: the instruction set, the team and the other ranks.

use std::sync::Arc;
use std::time::Instant;

use comm::Communicator;
use simd_kernels::Isa;

use crate::profile::Profile;
use crate::team::{Placement, Team};

/// The surroundings of one rank's operations.
pub struct Context {
    /// The instruction set of the kernels.
    pub isa: Isa,
    /// The threads of this rank.
    pub team: Team,
    /// The ranks that share the work.
    pub comm: Arc<dyn Communicator>,
    /// What the operations took.
    pub profile: Arc<Profile>,
}

impl Context {
    /// Surroundings with a team of `threads`.
    pub fn new(isa: Isa, comm: Arc<dyn Communicator>, threads: usize, placement: Placement) -> Self {
        let profile = Arc::new(Profile::new(Instant::now()));
        Self { isa, team: Team::new(threads, placement, profile.clone()), comm, profile }
    }

    /// This rank's number, from 0.
    pub fn rank(&self) -> usize {
        self.comm.rank()
    }

    /// How many ranks share the work.
    pub fn ranks(&self) -> usize {
        self.comm.size()
    }
}
