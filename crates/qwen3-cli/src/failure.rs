//! What can go wrong in the program.

use std::path::{Path, PathBuf};

use engine::{EngineError, RequestError, SubmitError};
use qwen3_model::ModelError;
use qwen3_model::checkpoint::{DocumentError, OpenError};
use qwen3_model::config::ConfigError;
use qwen3_model::perplexity::PerplexityError;
use qwen3_model::pooling::PoolingError;
use qwen3_model::shards::ExportError;
use ranks::RankError;

use crate::memory::Needed;

use qwen3_text::{PoolingTextError, PromptError, TemplateError, TokenizerError};

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
    /// The system refuses a thread.
    #[error("cannot start a thread for {work}: {source}")]
    Thread {
        /// What the thread is for.
        work: &'static str,
        /// What the system reported.
        source: std::io::Error,
    },
    /// The user's words cannot be read.
    #[error("standard input: {source}")]
    Input {
        /// Why.
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
    /// `--model` is not a model.
    #[error("--model: {0}")]
    Open(#[from] OpenError),
    /// A file of the model cannot be read.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// A conversation has no prompt.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// `generation_config.json` is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A text cannot be scored.
    #[error("{}: {source}", file.display())]
    Perplexity {
        /// The text's file.
        file: PathBuf,
        /// Why.
        source: Box<PerplexityError>,
    },
    /// The model does not pool, or its scores cannot be read.
    #[error(transparent)]
    Pooling(#[from] PoolingError),
    /// A text to embed or to rank cannot be encoded.
    #[error(transparent)]
    PoolingText(#[from] PoolingTextError),
    /// The model fails.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The engine fails, or a rank is lost.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine refuses a request.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// A request fails.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The engine ended while an answer was expected.
    #[error("the engine ended before the answer")]
    EngineEnded,
    /// A sequence of a batch gets another answer than alone.
    #[error(
        "sequence {sequence} of {count}: its logits differ by {distance} from those that it gets \
         alone (the largest is {largest}), so that no time is reported"
    )]
    Batch {
        /// The sequence.
        sequence: usize,
        /// Sequences of the batch.
        count: usize,
        /// The largest difference of a logit.
        distance: f32,
        /// The largest logit.
        largest: f32,
    },
    /// The model does not fit.
    #[error(
        "{ranks} rank(s) here need {} MiB (each {} of weights, {} of keys, values and states, {} of \
         activations), but {} MiB of {of} are free; expected more of it, a smaller format \
         (--weights q8 or q4, --kv q8), or more machines",
        total >> 20, needed.weights >> 20, needed.cache >> 20, needed.activations >> 20, free >> 20
    )]
    Memory {
        /// Of one rank.
        needed: Needed,
        /// Ranks that count.
        ranks: usize,
        /// Bytes of all of them.
        total: usize,
        /// Bytes that are free.
        free: usize,
        /// Of what.
        of: &'static str,
    },
    /// Requests of a file have failed; each has its own message.
    #[error("{errors} of {requests} requests failed")]
    Requests {
        /// Those that failed.
        errors: u64,
        /// All of them.
        requests: u64,
    },
    /// A model cannot be downloaded.
    #[cfg(feature = "pull")]
    #[error(transparent)]
    Pull(#[from] crate::pull::PullError),
    /// A checkpoint cannot be written.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The server cannot listen.
    #[error(transparent)]
    Listen(#[from] qwen3_server::ListenError),
    /// The job of ranks fails.
    #[error("{0}")]
    Rank(#[from] RankError),
    /// The command line is wrong.
    #[error("{problem}")]
    Usage {
        /// What was found and what was expected.
        problem: String,
    },
}

impl CliError {
    /// A file that cannot be read or written.
    pub fn file(path: &Path, source: std::io::Error) -> Self {
        Self::File { path: path.to_owned(), source }
    }

    /// A value that an option, or a variable of the environment, cannot have.
    pub fn option(option: &'static str, found: impl ToString, expected: impl ToString) -> Self {
        Self::Option { option, found: found.to_string(), expected: expected.to_string() }
    }

    /// A text that cannot be scored.
    pub fn perplexity(file: &Path, source: PerplexityError) -> Self {
        Self::Perplexity { file: file.to_owned(), source: Box::new(source) }
    }
}
