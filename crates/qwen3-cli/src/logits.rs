//! `qwen3 logits`: the logits of every token of a prompt, as a safetensors file.

use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use qwen3_model::checkpoint::{CheckpointWriter, TensorSpec, WriteError};
use qwen3_model::comm::CommunicatorExt as _;
use qwen3_model::options::{KvFormat, WeightFormat};
use qwen3_model::{LogitRows, Logits, Model, Sequence};
use ranks::{Failure, Rank};

use crate::ahead;
use crate::failure::CliError;
use crate::options::{EngineOptions, LaunchOptions};
use crate::output_file::OutputFile;
use crate::plan::Workload;
use crate::prompt::{PromptForm, PromptOptions};
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
        let (prompt, path) = (self.prompt.clone(), self.engine.model.clone());
        let form = PromptForm::TEXT;
        let length = ahead::look(rank, &self.engine, |config| {
            self.check_output()?;
            prompt.look(&path, config, form)
        })?;
        let read = move || Ok(prompt.read(&path, form)?.tokens);
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
        let mut cache = Sequence::new(&model, tokens.len())?;
        for chunk in
            tokens.chunks(model.pass_tokens(self.engine.chunk).min((BLOCK / vocab_size).max(1)))
        {
            let logits = cache.forward(&model, chunk, LogitRows::All).map_err(Failure::agreed)?;
            let rows = collect(rank, &model, logits)?;
            rank.agree_after(|| {
                Ok(output.as_mut().map_or(Ok(()), |output| output.write(&rows))?)
            })?;
        }
        rank.agree_after(|| Ok(output.map_or(Ok(()), Output::finish)?))
    }
}

impl LogitsArgs {
    /// Checks that the output can be written, and is no file of the model.
    fn check_output(&self) -> Result<(), CliError> {
        let source = self.engine.model.open()?;
        let model = source.folder();
        // An existing file in the folder, or a file to which a link in the folder leads.
        let is_in = |place: &Path| {
            let paths = self.output.canonicalize().ok().zip(place.canonicalize().ok());
            paths.is_some_and(|(output, place)| output.starts_with(place))
        };
        let files = model.read_dir().into_iter().flatten().flatten();
        if self.output.is_file()
            && (is_in(model) || files.map(|entry| entry.path()).any(|file| is_in(&file)))
        {
            let found = format!("{} is a file of the model", self.output.display());
            return Err(CliError::option("--output", found, "another file"));
        }
        OutputFile::check(&self.output)
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

/// A safetensors file that is being written: its header is known before its numbers.
struct Output {
    path: PathBuf,
    file: OutputFile,
    writer: CheckpointWriter,
}

impl Output {
    /// Starts the file `path` with the logits [rows, cols].
    fn create(path: &Path, rows: usize, cols: usize) -> Result<Self, CliError> {
        let logits = TensorSpec {
            name: "logits".to_owned(),
            format: WeightFormat::F32,
            shape: vec![rows, cols],
        };
        let file = OutputFile::create(path)?;
        let writer = CheckpointWriter::create(file.written_path(), &[logits], &[])
            .map_err(|error| file_error(path, error))?;
        Ok(Self { path: path.to_owned(), file, writer })
    }

    fn write(&mut self, values: &[f32]) -> Result<(), CliError> {
        self.writer.write("logits", values).map_err(|error| file_error(&self.path, error))
    }

    fn finish(self) -> Result<(), CliError> {
        self.writer.finish().map_err(|error| file_error(&self.path, error))?;
        self.file.finish()
    }
}

/// The error under the name that the user gave, which the writer does not know.
fn file_error(path: &Path, error: WriteError) -> CliError {
    let source = match error {
        WriteError::Io { source, .. } => source,
        error => io::Error::other(error),
    };
    CliError::file(path, source)
}
