//! What can go wrong in the program, and whether all ranks know of it.

use std::path::{Path, PathBuf};

use qwen3_model::comm::CommError;
use qwen3_model::{
    ConfigError, ExportError, GenerateError, ModelError, PerplexityError, SamplingError,
};

use qwen3_text::{TemplateError, TokenizerError};

/// Why a command ends early. Each message is one line.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The user's words cannot be read.
    #[error("standard input: {source}")]
    Input {
        /// Why.
        source: std::io::Error,
    },
    /// The output cannot be written.
    #[error("standard output: {source}")]
    Output {
        /// Why.
        #[from]
        source: std::io::Error,
    },
    /// An option has a value that does not fit the model, the machine or another option.
    #[error("{option}: {found}; expected {expected}")]
    Option {
        /// The option as the user writes it.
        option: &'static str,
        /// What it was.
        found: String,
        /// What would do.
        expected: String,
    },
    /// The tokenizer fails.
    #[error(transparent)]
    Text(#[from] TokenizerError),
    /// The chat template fails.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// `generation_config.json` is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No token can be chosen.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// An answer cannot be made.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A text cannot be scored.
    #[error("{}: {source}", file.display())]
    Perplexity {
        /// The text's file.
        file: PathBuf,
        /// Why.
        source: Box<PerplexityError>,
    },
    /// The model fails.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A checkpoint cannot be written.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// A collective fails.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// Another rank failed; the message is its own.
    #[error("rank {rank}: {message}")]
    Peer {
        /// The rank that failed.
        rank: usize,
        /// Its message.
        message: String,
    },
    /// Ranks cannot be started.
    #[error("{problem}")]
    Launch {
        /// What was found and what to do.
        problem: String,
    },
    /// A bug of this program.
    #[error("internal error on rank {rank}: {message}")]
    Panic {
        /// The rank.
        rank: usize,
        /// The panic's message and place.
        message: String,
    },
}

impl CliError {
    /// A file that cannot be read or written.
    pub fn file(path: &Path, source: std::io::Error) -> Self {
        Self::File { path: path.to_owned(), source }
    }

    /// A text that cannot be scored.
    pub fn perplexity(file: &Path, source: PerplexityError) -> Self {
        Self::Perplexity { file: file.to_owned(), source: Box::new(source) }
    }

    /// The failed collective behind this error, if that is what it is.
    #[cfg_attr(not(feature = "mpi"), allow(dead_code))]
    pub fn collective(&self) -> Option<&CommError> {
        match self {
            Self::Comm(error) => Some(error),
            Self::Model(ModelError::Comm(error)) => Some(error),
            Self::Generate(GenerateError::Model(ModelError::Comm(error))) => Some(error),
            Self::Perplexity { source, .. } => match &**source {
                PerplexityError::Comm(error) | PerplexityError::Model(ModelError::Comm(error)) => {
                    Some(error)
                }
                _ => None,
            },
            _ => None,
        }
    }

    /// The message on one line: libraries' messages may have several.
    pub fn line(&self) -> String {
        one_line(&self.to_string())
    }
}

/// A text with its lines joined by blanks.
pub fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

/// A command's early end on one rank.
#[derive(Debug)]
pub struct Failure {
    /// Why.
    pub error: Box<CliError>,
    /// Whether every rank ends here. If not, the others may be waiting for this one and must be
    /// told.
    pub agreed: bool,
}

impl Failure {
    /// An end that every rank comes to, with the same or its own error.
    pub fn agreed(error: CliError) -> Self {
        Self { error: Box::new(error), agreed: true }
    }
}

impl<E: Into<CliError>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        let agreed = is_known_to_all(&error);
        Self { error: Box::new(error), agreed }
    }
}

/// Whether an error of the model arises on every rank at the same time: all pass the same tokens
/// and check them before they compute, and the sampler's exchange tells all ranks what one of them
/// found.
fn is_known_to_all(error: &CliError) -> bool {
    let of_model = |error: &ModelError| {
        matches!(error, ModelError::TokenOutOfRange { .. } | ModelError::ContextFull { .. })
    };
    match error {
        CliError::Model(error) | CliError::Generate(GenerateError::Model(error)) => of_model(error),
        CliError::Sampling(_) | CliError::Generate(_) => true,
        CliError::Perplexity { source, .. } => match &**source {
            PerplexityError::Context { .. }
            | PerplexityError::TooShort { .. }
            | PerplexityError::NotFinite { .. } => true,
            PerplexityError::Model(error) => of_model(error),
            PerplexityError::Comm(_) => false,
        },
        _ => false,
    }
}
