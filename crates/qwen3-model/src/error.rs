//! Why a model cannot be loaded or run.

use std::path::PathBuf;

use checkpoint::CheckpointError;
use comm::CommError;
use ops::kernels::KvMemoryError;
use ops::schedule::MlpSchedule;

use crate::batch::BatchError;
use crate::fields::ConfigError;

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// `config.json` does not describe a model that this crate runs.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A collective failed.
    #[error("{0}")]
    Comm(#[from] CommError),
    /// Another rank failed to load its share.
    #[error("rank {rank} could not load its share of the model")]
    PeerLoad {
        /// The lowest rank that failed.
        rank: usize,
    },
    /// A rank works with another `config.json`, and would compute something else.
    #[error(
        "rank {rank} has another configuration than rank 0, expected the same checkpoint on all ranks"
    )]
    OtherConfig {
        /// The lowest such rank.
        rank: usize,
    },
    /// A rank has the weights of another model of the same shape.
    #[error(
        "rank {rank} has other weights than rank 0 in the first rows of matrices, expected the same checkpoint on all ranks"
    )]
    OtherWeights {
        /// The lowest such rank.
        rank: usize,
    },
    /// Ranks round differently, and one would choose other experts than another for the same token.
    #[error(
        "rank {rank} computes with other instructions than rank 0, expected the same for a mixture of experts (avx2, avx2-vnni and avx512 are)"
    )]
    OtherIsa {
        /// The lowest such rank.
        rank: usize,
    },
    /// A rank was told to use other activations than rank 0.
    #[error("rank {rank} has other activations than rank 0, expected f32 or bf16 on all ranks")]
    OtherActivations {
        /// The lowest such rank.
        rank: usize,
    },
    /// A rank has no dot products of bf16, which the option asks for.
    #[error(
        "rank {rank} computes without AVX512-BF16, expected it on all ranks for activations in bf16"
    )]
    NoBf16Dot {
        /// The lowest such rank.
        rank: usize,
    },
    /// A grid of another size than the number of ranks.
    #[error("grid tp={tp},sp={sp} has {} ranks, expected {ranks}", tp * sp)]
    Grid {
        /// Ranks that split weights.
        tp: usize,
        /// Ranks that split positions.
        sp: usize,
        /// Ranks there are.
        ranks: usize,
    },
    /// Whole experts on ranks, with a schedule that exchanges parts of experts or splits nothing.
    #[error("whole experts on ranks need the feed-forward schedule fused, found {schedule}")]
    ExpertSchedule {
        /// The schedule.
        schedule: MlpSchedule,
    },
    /// Whole experts on ranks, of a model without experts.
    #[error("{}: found a dense model, expected a mixture of experts to lay whole experts on ranks", file.display())]
    NoExperts {
        /// Its `config.json`.
        file: PathBuf,
    },
    /// A recurrent state goes from token to token, so that ranks cannot split a sequence.
    #[error(
        "{}: found a model with a gated delta rule and {ranks} ranks that split positions, \
         expected ranks that split heads only (strategy heads)",
        file.display()
    )]
    HybridPositions {
        /// Its `config.json`.
        file: PathBuf,
        /// Ranks that split positions.
        ranks: usize,
    },
    /// A token is not in the vocabulary.
    #[error("token {index} has id {id}, expected an id below the vocabulary size {vocab_size}")]
    TokenOutOfRange {
        /// Its place among the tokens given, from 0.
        index: usize,
        /// The id found.
        id: u32,
        /// Tokens of the vocabulary.
        vocab_size: usize,
    },
    /// Logits or a hidden state are not finite.
    #[error("the numbers of token {token} of sequence {sequence} are not finite: {cause}")]
    NotFinite {
        /// The sequence.
        sequence: u64,
        /// The position of the token in its sequence.
        token: usize,
        /// What may have overflowed, and what to do.
        cause: &'static str,
    },
    /// The batch does not fit the model or the arena.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// There is no memory for keys and values.
    #[error(transparent)]
    Memory(#[from] KvMemoryError),
    /// The sequence would grow beyond its capacity.
    #[error("{tokens} tokens do not fit: {cached} of {capacity} positions are taken")]
    ContextFull {
        /// Tokens to add.
        tokens: usize,
        /// Positions taken.
        cached: usize,
        /// Positions in all.
        capacity: usize,
    },
}

impl ModelError {
    /// Whether every id is in a vocabulary of `vocab_size` tokens; the error is
    /// [`TokenOutOfRange`](Self::TokenOutOfRange).
    pub fn check_tokens(tokens: &[u32], vocab_size: usize) -> Result<(), Self> {
        match tokens.iter().enumerate().find(|(_, id)| **id as usize >= vocab_size) {
            Some((index, &id)) => Err(Self::TokenOutOfRange { index, id, vocab_size }),
            None => Ok(()),
        }
    }
}
