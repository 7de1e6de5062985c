//! The ways to split the feed-forward block over the ranks.

use std::fmt;
use std::str::FromStr;

/// The feed-forward block computes `(silu(x · Wgateᵀ) ⊙ (x · Wupᵀ)) · Wdownᵀ`. The schedules give
/// the same answer and differ in what is split and exchanged. T is the number of tokens, H the
/// hidden size, I the intermediate size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpSchedule {
    /// Gate, up and activation stay split; 1 Allreduce of T·H·4 bytes.
    Fused,
    /// Gate and up are gathered; 2 Allgatherv of T·I·4 bytes and 1 Allreduce of T·H·4.
    Naive,
    /// Gate, up, activation and result are gathered; 3 Allgather of T·I·4 bytes and 1 of T·H·4.
    Gathered,
    /// Every rank holds all weights; no collective.
    Local,
}

/// How the experts of a mixture are distributed over the ranks that split the feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ExpertSplit {
    /// Each rank has a part of every expert, cut as the schedule cuts a dense block. The ranks have
    /// equal work for every choice of the router.
    #[default]
    Inside,
    /// Each rank has a contiguous share of whole experts and computes the visits to these. The
    /// partial sums of `Fused` are then sums over experts instead of columns. The other schedules
    /// exchange parts of experts and do not support this split.
    Ranks,
}

impl fmt::Display for ExpertSplit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Inside => "inside",
            Self::Ranks => "ranks",
        })
    }
}

impl FromStr for ExpertSplit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "inside" => Ok(Self::Inside),
            "ranks" => Ok(Self::Ranks),
            _ => Err(format!("found `{text}`, expected inside or ranks")),
        }
    }
}

impl fmt::Display for MlpSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fused => "fused",
            Self::Naive => "naive",
            Self::Gathered => "gathered",
            Self::Local => "local",
        })
    }
}

impl FromStr for MlpSchedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "fused" => Ok(Self::Fused),
            "naive" => Ok(Self::Naive),
            "gathered" => Ok(Self::Gathered),
            "local" => Ok(Self::Local),
            _ => Err(format!("found `{text}`, expected fused, naive, gathered or local")),
        }
    }
}
