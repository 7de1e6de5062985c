//! What `embed` and `rerank` share: inputs, and a batch of prompts through the engine.

use std::collections::VecDeque;
use std::path::Path;
use std::str::FromStr;

use engine::{EngineConfig, Event, KvMemory, Pooling, Request, Stream};
use qwen3_model::options::KvFormat;
use qwen3_model::pooling::{PoolingError, Scorer};
use qwen3_model::{Config, ModelError, ModelSource, PAGE_POSITIONS};
use qwen3_text::{Tokenizer, yes_and_no};
use ranks::{Failure, Rank};

use crate::ahead;
use crate::client;
use crate::failure::CliError;
use crate::options::EngineOptions;
use crate::plan::Workload;
use crate::progress::{Progress, Unit};
use crate::session;

/// Requests that are with the engine at the same time.
const TOGETHER: usize = 256;
/// Positions for which there are pages beside those of the longest prompt.
const POSITIONS: usize = 4096;

/// Token ids separated by commas.
#[derive(Clone, Debug)]
pub struct TokenList(pub Vec<u32>);

impl FromStr for TokenList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let id = |part: &str| {
            let found = part.trim();
            found.parse().map_err(|_| format!("found {found:?}, expected ids such as 1,2,3"))
        };
        text.split(',').map(id).collect::<Result<_, _>>().map(Self)
    }
}

/// What rank 0 has after the engine ran.
pub struct Pooled<T> {
    /// A hidden state for each prompt, `[prompts][hidden_size]`.
    pub rows: Vec<Vec<f32>>,
    /// What the command read beside the prompts.
    pub value: T,
}

/// What scores a reranker's documents; `tokenizer` has the ids of its answers unless `rerank.json`
/// of the model states them.
///
/// # Errors
/// When the model is no reranker, or its answers are not single tokens.
pub fn scorer(
    source: &ModelSource,
    config: &Config,
    tokenizer: Option<&Tokenizer>,
) -> Result<Scorer, CliError> {
    let (answers, problem) = match tokenizer.map(yes_and_no).transpose() {
        Ok(answers) => (answers, None),
        Err(problem) => (None, Some(problem)),
    };
    match (Scorer::read(source, config, answers), problem) {
        (Err(PoolingError::NoAnswers { .. }), Some(problem)) => Err(problem.into()),
        (scorer, _) => Ok(scorer?),
    }
}

/// The lines of a file, at least one.
pub fn lines(file: &Path) -> Result<Vec<String>, CliError> {
    let lines: Vec<_> = ahead::read_text(file)?.lines().map(str::to_owned).collect();
    if lines.is_empty() {
        let found = format!("{} has no line", file.display());
        return Err(CliError::option("--file", found, "one text per line"));
    }
    Ok(lines)
}

/// The hidden states of the last tokens of `prompts`, in their order, computed by all ranks; the
/// value is on rank 0, where `read` reads the prompts and checks what else the command needs.
/// `read` runs before the model is loaded. All ranks call this together.
///
/// # Errors
/// Those of `read`, a prompt that the model cannot take (named by `noun` and its number from 1),
/// and those of loading and computing.
pub fn hidden_states<T: Send>(
    rank: &Rank,
    engine: &EngineOptions,
    noun: &str,
    read: impl FnOnce() -> Result<(Vec<Vec<u32>>, T), CliError>,
) -> Result<Option<Pooled<T>>, Failure> {
    let config =
        ahead::look(rank, engine, |config| Ok((config.vocab_size, config.context_length())));
    let (vocab_size, context) = config?;
    let checked = || {
        let (prompts, value) = read()?;
        for (index, prompt) in prompts.iter().enumerate() {
            let number = index + 1;
            if let Err(error) = ModelError::check_tokens(prompt, vocab_size) {
                let problem = format!("{noun} {number}: {error}");
                return Err(CliError::Usage { problem }.into());
            }
            if prompt.len() > context {
                let found = prompt.len();
                let problem = format!(
                    "{noun} {number} has {found} tokens, expected at most {context}, the length \
                     of the context"
                );
                return Err(CliError::Usage { problem }.into());
            }
        }
        Ok((prompts, value))
    };
    let input = rank.without_deadline(|| rank.on_root(checked))?;
    let rounded = |prompt: &Vec<u32>| prompt.len().next_multiple_of(PAGE_POSITIONS);
    let (longest, positions) = rank.broadcast(|| {
        let (prompts, _) = input.as_ref().expect("rank 0 read them");
        let longest = prompts.iter().map(rounded).max().unwrap_or(1);
        let total: usize = prompts.iter().map(rounded).sum();
        Ok((longest, total.min(longest + POSITIONS)))
    })?;
    let work = Workload { kv: KvFormat::F32, prompt: longest, generate: 0 };
    let loaded = session::load(rank, engine, work)?;
    let config = EngineConfig {
        // Pages of one sequence alternate between ranks that split positions.
        kv_memory: KvMemory::Positions(positions + PAGE_POSITIONS * rank.comm().size()),
        max_queued_tokens: usize::MAX,
        step_rows: engine.chunk,
        ..EngineConfig::default()
    };
    let shown = Progress::new(rank, "computing", Unit::Count("texts"));
    let (_, rows) = client::serve(rank, loaded.model, &config, |handle| {
        let (prompts, value) = input.expect("rank 0 read them");
        let total = prompts.len() as u64;
        let mut prompts = prompts.into_iter();
        let mut pending: VecDeque<Stream> = VecDeque::new();
        let mut rows = Vec::new();
        loop {
            for prompt in prompts.by_ref().take(TOGETHER - pending.len()) {
                let pooling = Some(Pooling::LastToken);
                pending.push_back(handle.submit(Request { pooling, ..Request::new(prompt, 0) })?);
            }
            let Some(stream) = pending.pop_front() else { return Ok(Pooled { rows, value }) };
            rows.push(hidden(&stream)?);
            shown.update(rows.len() as u64, total);
        }
    })?;
    Ok(rows)
}

/// The hidden state that a request asked for.
fn hidden(stream: &Stream) -> Result<Vec<f32>, CliError> {
    while let Some(event) = stream.recv_blocking() {
        match event {
            Event::Hidden(row) => return Ok(row),
            Event::Failed(error) => return Err(error.into()),
            _ => {}
        }
    }
    Err(CliError::EngineEnded)
}
