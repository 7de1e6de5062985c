//! `qwen3 rerank`: how well documents answer a query.

use std::path::PathBuf;

use clap::Args;
use qwen3_model::Config;
use qwen3_model::pooling::Scorer;
use qwen3_text::RerankPrompt;
use ranks::{Failure, Rank};
use serde_json::json;

use crate::failure::CliError;
use crate::options::{EngineOptions, LaunchOptions};
use crate::pooling::{self, Pooled, TokenList};
use crate::prompt::TextOptions;

/// Print the probability that each document answers a query, one per line, in the order given
///
/// The model is a reranker: one that answers "yes" or "no" (Qwen3-Reranker), or a sequence
/// classification with score.weight.
#[derive(Args, Clone, Debug)]
pub struct RerankArgs {
    #[command(flatten)]
    engine: EngineOptions,

    /// The query
    #[arg(long, value_name = "Q", required_unless_present = "tokens")]
    query: Option<String>,

    #[command(flatten)]
    input: RerankInput,

    /// What a document has to do for the query [default: Given a web search query, retrieve
    /// relevant passages that answer the query]
    #[arg(long, value_name = "I", conflicts_with = "tokens")]
    instruct: Option<String>,

    #[command(flatten)]
    text_options: TextOptions,

    /// Print {"scores":[…],"prompt_tokens":N}
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

/// The documents.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
struct RerankInput {
    /// The documents (repeatable)
    #[arg(long, value_name = "D", num_args = 1..)]
    document: Vec<String>,

    /// A file with one document per line
    #[arg(long, value_name = "F")]
    file: Option<PathBuf>,

    /// A whole prompt as token ids separated by commas, in place of a query and a document
    /// (repeatable)
    #[arg(long, value_name = "IDS", num_args = 1.., conflicts_with = "query")]
    tokens: Vec<TokenList>,
}

impl RerankArgs {
    /// Runs the command on this rank.
    pub fn run(&self, rank: &Rank) -> Result<(), Failure> {
        let rows = pooling::hidden_states(rank, &self.engine, "document", || {
            let (tokens, scorer) = self.prompts()?;
            let count: usize = tokens.iter().map(Vec::len).sum();
            Ok((tokens, (scorer, count)))
        })?;
        let text = rows.map(|Pooled { rows, value: (scorer, count) }| {
            let scores: Vec<_> = rows.iter().map(|row| scorer.probability(row)).collect();
            if self.json {
                return format!("{}\n", json!({ "scores": scores, "prompt_tokens": count }));
            }
            scores.iter().map(|score| format!("{score:.6}\n")).collect()
        });
        rank.print_and_agree(&text.unwrap_or_default())
    }

    /// The ids of all prompts, and what scores them.
    fn prompts(&self) -> Result<(Vec<Vec<u32>>, Scorer), CliError> {
        let source = self.engine.model.open()?;
        let config = Config::read(&source)?;
        let Some(query) = &self.query else {
            let tokenizer = source.has_tokenizer();
            let tokenizer = tokenizer.then(|| self.engine.model.tokenizer()).transpose()?;
            let scorer = pooling::scorer(&source, &config, tokenizer.as_ref())?;
            let prompts = self.input.tokens.iter().map(|list| list.0.clone()).collect();
            return Ok((prompts, scorer));
        };
        if query.trim().is_empty() {
            return Err(CliError::option("--query", "an empty text", "a question or a search"));
        }
        let (option, documents) = match &self.input.file {
            Some(file) => ("--file", pooling::lines(file)?),
            None => ("--document", self.input.document.clone()),
        };
        if let Some(index) = documents.iter().position(|text| text.trim().is_empty()) {
            let found = format!("document {} is empty", index + 1);
            return Err(CliError::option(option, found, "a text"));
        }
        let tokenizer = self.engine.model.tokenizer()?;
        let scorer = pooling::scorer(&source, &config, Some(&tokenizer))?;
        let prompt = RerankPrompt::new(&tokenizer, self.instruct.as_deref())?;
        let control = self.text_options.control();
        let tokens =
            documents.iter().map(|document| prompt.tokens(&tokenizer, query, document, control));
        Ok((tokens.collect::<Result<_, _>>()?, scorer))
    }
}
