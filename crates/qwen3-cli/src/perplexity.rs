//! `qwen3 perplexity`: how well the model predicts a text.

use std::path::PathBuf;

use clap::Args;
use qwen3_model::options::KvFormat;
use qwen3_model::perplexity::{PerplexityError, perplexity};
use ranks::{Failure, Rank};
use serde_json::json;

use crate::ahead;
use crate::failure::CliError;
use crate::options::{EngineOptions, LaunchOptions};
use crate::plan::Workload;
use crate::progress::{Progress, Unit};
use crate::session::{self, Loaded};

/// Measure how well the model predicts a text, in windows that do not see each other
#[derive(Args, Clone, Debug)]
pub struct PerplexityArgs {
    #[command(flatten)]
    engine: EngineOptions,

    /// The text
    #[arg(long, value_name = "TXT")]
    file: PathBuf,

    /// Tokens of a window; each is scored from its second token on
    #[arg(long, value_name = "N", default_value_t = 512)]
    context: usize,

    /// Print one JSON object: {"file","context","tokens","scored","perplexity"}
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

impl PerplexityArgs {
    /// Runs the command on this rank.
    pub fn run(&self, rank: &Rank) -> Result<(), Failure> {
        let (file, path) = (self.file.clone(), self.engine.model.clone());
        ahead::look(rank, &self.engine, |config| {
            let (found, context_length) = (self.context, config.context_length());
            if !(2..=context_length).contains(&found) {
                return Err(CliError::perplexity(
                    &file,
                    PerplexityError::Context { found, context_length },
                ));
            }
            ahead::input(&file)?;
            path.open()?.find_tokenizer()?;
            Ok(())
        })?;
        let read = move || {
            let text = ahead::read_text(&file)?;
            Ok(path.tokenizer()?.encode(&text)?)
        };
        let (Loaded { model, .. }, tokens) = session::load_with(
            rank,
            &self.engine,
            Workload { kv: KvFormat::F32, prompt: self.context, generate: 0 },
            read,
        )?;
        let tokens = rank.broadcast(|| Ok(tokens.expect("rank 0 read the text")))?;
        let progress = Progress::new(rank, "scoring", Unit::Count("tokens"));
        let chunk = self.engine.chunk;
        let found = perplexity(&model, &tokens, self.context, chunk, &mut |done| {
            progress.update(done as u64, tokens.len() as u64)
        });
        drop(progress);
        let found =
            found.map_err(|error| Failure::agreed(CliError::perplexity(&self.file, error)))?;
        let text = if self.json {
            let object = json!({
                "file": self.file.display().to_string(),
                "context": self.context,
                "tokens": found.tokens,
                "scored": found.scored,
                "perplexity": found.perplexity,
            });
            format!("{object}\n")
        } else {
            let (scored, tokens) = (found.scored, found.tokens);
            format!(
                "perplexity {:.4} ({scored} of {tokens} tokens scored, windows of {})\n",
                found.perplexity, self.context
            )
        };
        rank.print_and_agree(&text)
    }
}
