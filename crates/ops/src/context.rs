//! The execution context of a rank's operations: instruction set, threads, communicators.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use comm::{CommError, Communicator};
use simd_kernels::Isa;

use crate::background::Background;
use crate::profile::Profile;
use crate::team::{Placement, Team};

/// The number format of activations in products with bf16 weights. It does not affect other weight
/// formats.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ActivationFormat {
    /// f32: only the sums of a product are rounded.
    #[default]
    F32,
    /// bf16, for instruction sets with bf16 dot products ([`Isa::has_bf16_dot`]): twice the rate of
    /// f32. The relative error of each activation is at most 2^-9.
    Bf16,
}

impl fmt::Display for ActivationFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl FromStr for ActivationFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err(format!("found `{text}`, expected f32 or bf16")),
        }
    }
}

/// The execution context of one rank's operations.
///
/// The ranks form a grid. The ranks of a row hold the same positions and split heads and weights.
/// The ranks of a column hold the same heads and split positions. Either group may consist of this
/// rank alone.
pub struct Context {
    /// The instruction set of the kernels.
    pub isa: Isa,
    /// The format of activations in products with bf16 weights; f32 unless set. Products panic if
    /// it is `Bf16` and the instruction set has no bf16 dot product.
    pub activations: ActivationFormat,
    /// The threads of this rank.
    pub team: Team,
    /// All ranks that share the model.
    pub comm: Arc<dyn Communicator>,
    /// The ranks that hold the same positions and split the heads (tensor parallel).
    pub heads: Arc<dyn Communicator>,
    /// The ranks that hold the same heads and split the positions (sequence parallel).
    pub positions: Arc<dyn Communicator>,
    /// The thread that calls collectives while the team computes.
    pub background: Background,
    /// The recorded time of each operation.
    pub profile: Arc<Profile>,
}

impl Context {
    /// A context with a team of `threads` threads and rows of `columns` ranks: rank `r` of `comm`
    /// is in row `r / columns` and column `r % columns`. All ranks must call it.
    ///
    /// # Errors When the groups cannot be formed, or the operating system refuses a thread.
    ///
    /// # Panics
    /// When `columns` does not divide the number of ranks.
    pub fn new(
        isa: Isa,
        comm: Arc<dyn Communicator>,
        columns: usize,
        threads: usize,
        placement: Placement,
    ) -> Result<Self, CommError> {
        let (rank, ranks) = (comm.rank(), comm.size());
        assert!(columns > 0 && ranks.is_multiple_of(columns), "{ranks} ranks in rows of {columns}");
        let group = |size: usize, color: usize| -> Result<Arc<dyn Communicator>, CommError> {
            if size == ranks { Ok(comm.clone()) } else { Ok(comm.split(color, rank)?.into()) }
        };
        let heads = group(columns, rank / columns)?;
        let positions = group(ranks / columns, rank % columns)?;
        let background = Background::new(comm.clone())?;
        let profile = Arc::new(Profile::new(Instant::now()));
        let team = Team::new(threads, placement, profile.clone())?;
        let activations = ActivationFormat::F32;
        Ok(Self { isa, activations, team, comm, heads, positions, background, profile })
    }

    /// The ranks over which the feed-forward block is split: the group that splits heads if it has
    /// several ranks, otherwise the group that splits positions.
    pub fn mlp_ranks(&self) -> &Arc<dyn Communicator> {
        if self.heads.size() > 1 { &self.heads } else { &self.positions }
    }
}
