//! `qwen3 logits`: the logits of every token of a prompt, as a safetensors file.

use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use qwen3_model::comm::CommunicatorExt as _;
use qwen3_model::tensor::{CheckpointWriter, TensorSpec, WriteError};
use qwen3_model::{KvFormat, LogitRows, Logits, Model, WeightFormat};
use ranks::{Failure, Rank};

use crate::ahead;
use crate::failure::CliError;
use crate::options::{EngineOptions, LaunchOptions};
use crate::output_file::part_of;
use crate::plan::Workload;
use crate::prompt::PromptOptions;
use crate::session::{self, Loaded};

/// Write the logits of every token of a prompt: a safetensors file with `logits`, f32 [tokens,
/// vocabulary]
#[derive(Args, Clone, Debug)]
pub struct LogitsArgs {
    #[command(flatten)]
    engine: EngineOptions,

    #[command(flatten)]
    prompt: PromptOptions,

    /// The file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

/// Floats of logits that rank 0 holds at once, more or less: 64 MB.
const BLOCK: usize = 1 << 24;

impl LogitsArgs {
    /// Runs the command on this rank.
    pub fn run(&self, rank: &Rank) -> Result<(), Failure> {
        let (prompt, dir) = (self.prompt.clone(), self.engine.model.clone());
        let length = ahead::look(rank, &self.engine, |config| {
            ahead::output(part_of(&self.output).as_deref().unwrap_or(&self.output))?;
            prompt.look(&dir, config, None)
        })?;
        let read = move || Ok(prompt.read(&dir, None)?.tokens);
        let (Loaded { model, .. }, tokens) = session::load_with(
            rank,
            &self.engine,
            Workload { kv: KvFormat::F32, prompt: length, generate: 0 },
            read,
        )?;
        let tokens = rank.broadcast(|| Ok(tokens.expect("rank 0 read the prompt")))?;
        self.prompt
            .check(model.config().context_length(), tokens.len())
            .map_err(Failure::agreed)?;

        let vocab_size = model.config().vocab_size;
        // Who reads a pipe may take any time.
        let mut output = rank.without_deadline(|| {
            rank.on_root(|| Ok(Output::create(&self.output, tokens.len(), vocab_size)?))
        })?;
        let mut cache = model.new_cache(tokens.len());
        for chunk in
            tokens.chunks(model.pass_tokens(self.engine.chunk).min((BLOCK / vocab_size).max(1)))
        {
            let logits =
                model.forward(&mut cache, chunk, LogitRows::All).map_err(Failure::agreed)?;
            let rows = collect(rank, &model, logits)?;
            rank.agree_after(|| {
                Ok(output.as_mut().map_or(Ok(()), |output| output.write(&rows))?)
            })?;
        }
        rank.agree_after(|| Ok(output.map_or(Ok(()), Output::finish)?))
    }
}

/// The whole rows [rows, vocabulary] on rank 0, nothing on the others.
fn collect(rank: &Rank, model: &Model, logits: Logits) -> Result<Vec<f32>, Failure> {
    let comm = rank.comm();
    let ends = comm.all_gather_one(logits.vocab.end as u64)?;
    let (rows, vocab_size) = (logits.values.nrows(), model.config().vocab_size);
    let own: Vec<f32> = logits.values.iter().copied().collect();
    if !rank.is_root() {
        comm.send(0, &own)?;
        return Ok(Vec::new());
    }
    let mut all = vec![0.0; rows * vocab_size];
    let mut place = |from: usize, to: usize, block: &[f32]| {
        for row in 0..rows {
            let width = to - from;
            all[row * vocab_size + from..][..width].copy_from_slice(&block[row * width..][..width]);
        }
    };
    place(0, logits.vocab.end, &own);
    for peer in 1..comm.size() {
        let (from, to) = (ends[peer - 1] as usize, ends[peer] as usize);
        let mut block = vec![0.0_f32; rows * (to - from)];
        comm.recv(peer, &mut block)?;
        place(from, to, &block);
    }
    Ok(all)
}

/// A safetensors file in the making: its header is known before its numbers. One that is not
/// finished is removed.
struct Output {
    path: PathBuf,
    /// What it is called until then; nothing once it is finished, and where the name belongs to a
    /// device or a pipe.
    part: Option<PathBuf>,
    /// Nothing before its start and after its end.
    file: Option<CheckpointWriter>,
}

impl Output {
    /// Starts a file beside `path`; it takes that name when it is whole.
    fn create(path: &Path, rows: usize, cols: usize) -> Result<Self, CliError> {
        let mut output = Self { path: path.to_owned(), part: part_of(path), file: None };
        let logits = TensorSpec {
            name: "logits".to_owned(),
            format: WeightFormat::F32,
            shape: vec![rows, cols],
        };
        let file = CheckpointWriter::create(output.part.as_deref().unwrap_or(path), &[logits], &[]);
        output.file = Some(file.map_err(|error| output.failed(error))?);
        Ok(output)
    }

    fn write(&mut self, values: &[f32]) -> Result<(), CliError> {
        let file = self.file.as_mut().expect("only the end takes it");
        file.write("logits", values).map_err(|error| self.failed(error))
    }

    fn finish(mut self) -> Result<(), CliError> {
        let file = self.file.take().expect("there is one end");
        file.finish().map_err(|error| self.failed(error))?;
        if let Some(part) = &self.part {
            std::fs::rename(part, &self.path)
                .map_err(|source| CliError::file(&self.path, source))?;
        }
        self.part = None;
        Ok(())
    }

    /// The error under the name that the user gave, which the writer may not know.
    fn failed(&self, error: WriteError) -> CliError {
        let source = match error {
            WriteError::Io { source, .. } => source,
            error => io::Error::other(error),
        };
        CliError::file(&self.path, source)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some(part) = &self.part {
            // Why it is not finished is said elsewhere; on a full disk its space is needed.
            std::fs::remove_file(part).ok();
        }
    }
}
