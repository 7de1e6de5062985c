//! `qwen3 embed`: vectors of texts.

use std::path::PathBuf;

use clap::Args;
use qwen3_model::Config;
use qwen3_model::pooling::{check_dimensions, embedding, is_embedding_model};
use qwen3_text::{embedding_tokens, instructed};
use ranks::{Failure, Rank};
use serde_json::json;

use crate::failure::CliError;
use crate::options::{EngineOptions, LaunchOptions};
use crate::pooling::{self, Pooled, TokenList};
use crate::prompt::TextOptions;

/// Print the embeddings of texts: vectors of length 1, whose products say how near the texts are
///
/// The output is {"embeddings":[[…]],"prompt_tokens":N}. An embedding is the last token's hidden
/// state after the final norm, divided by its norm. <|endoftext|> is appended to each text.
#[derive(Args, Clone, Debug)]
pub struct EmbedArgs {
    #[command(flatten)]
    engine: EngineOptions,

    #[command(flatten)]
    input: EmbedInput,

    /// Write each text as a query for this task; documents need none
    #[arg(long, value_name = "TASK", conflicts_with = "tokens")]
    instruct: Option<String>,

    /// Keep only the first D numbers of each vector, and give these the length 1
    #[arg(long, value_name = "D")]
    dimensions: Option<usize>,

    #[command(flatten)]
    text_options: TextOptions,

    /// Print everything in one line; without this option each embedding has a line
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

/// The texts.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
struct EmbedInput {
    /// The texts (repeatable)
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    text: Vec<String>,

    /// A file with one text per line
    #[arg(long, value_name = "F")]
    file: Option<PathBuf>,

    /// A text as token ids separated by commas, to which nothing is appended (repeatable); needs
    /// no tokenizer
    #[arg(long, value_name = "IDS", num_args = 1..)]
    tokens: Vec<TokenList>,
}

impl EmbedArgs {
    /// Runs the command on this rank.
    pub fn run(&self, rank: &Rank) -> Result<(), Failure> {
        let rows = pooling::hidden_states(rank, &self.engine, "text", || {
            let tokens = self.tokens()?;
            let count: usize = tokens.iter().map(Vec::len).sum();
            Ok((tokens, count))
        })?;
        let text = rows.map(|Pooled { rows, value: count }| {
            let rows: Vec<_> =
                rows.into_iter().map(|row| embedding(row, self.dimensions)).collect();
            self.shown(&rows, count)
        });
        rank.print_and_agree(&text.unwrap_or_default())
    }

    /// The ids of all texts, after everything that can be wrong without the weights was checked.
    fn tokens(&self) -> Result<Vec<Vec<u32>>, CliError> {
        let source = self.engine.model.open()?;
        let config = Config::read(&source)?;
        is_embedding_model(&source, &config)?;
        if let Some(dimensions) = self.dimensions {
            check_dimensions(dimensions, config.hidden_size)?;
        }
        if !self.input.tokens.is_empty() {
            return Ok(self.input.tokens.iter().map(|list| list.0.clone()).collect());
        }
        let texts = match &self.input.file {
            Some(file) => pooling::lines(file)?,
            None => self.input.text.clone(),
        };
        let tokenizer = self.engine.model.tokenizer()?;
        let tokens = |text: &String| {
            let query = self.instruct.as_ref().map(|task| instructed(task, text));
            let text = query.as_ref().unwrap_or(text);
            Ok(embedding_tokens(&tokenizer, text, self.text_options.control())?)
        };
        texts.iter().map(tokens).collect()
    }

    fn shown(&self, rows: &[Vec<f32>], count: usize) -> String {
        if self.json {
            return format!("{}\n", json!({ "embeddings": rows, "prompt_tokens": count }));
        }
        let lines: Vec<_> = rows.iter().map(|row| json!(row).to_string()).collect();
        format!("{{\"embeddings\":[\n{}\n],\"prompt_tokens\":{count}}}\n", lines.join(",\n"))
    }
}
