//! `qwen3 tokenize`: a text or a conversation as the model sees it.

use std::path::PathBuf;

use clap::Args;
use qwen3_text::{ControlTokens, Conversation, Prompt};
use ranks::Rank;
use serde_json::json;

use crate::failure::CliError;
use crate::model_path::ModelPath;
use crate::prompt::TextOptions;

/// Show the token ids of a text, or of a conversation as the chat template writes it
#[derive(Args, Clone, Debug)]
pub struct TokenizeArgs {
    /// Folder of the checkpoint; tokenizer.json and the chat template are all it needs
    #[arg(long, value_name = "MODEL")]
    model: ModelPath,

    #[command(flatten)]
    input: Input,

    #[command(flatten)]
    text: TextOptions,

    /// Print one JSON object: {"text","ids"}
    #[arg(long)]
    json: bool,
}

#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
struct Input {
    /// The text
    #[arg(long, value_name = "T")]
    text: Option<String>,

    /// A JSON file with messages and, optionally, tools, add_generation_prompt,
    /// continue_final_message and variables of the chat template such as enable_thinking
    #[arg(long, value_name = "FILE")]
    chat: Option<PathBuf>,
}

impl TokenizeArgs {
    /// Runs the command on rank 0.
    pub fn run(&self, rank: &Rank) -> Result<(), CliError> {
        let control = self.text.control();
        let Prompt { text, tokens: ids } = match (&self.input.text, &self.input.chat) {
            (Some(text), _) => {
                let tokenizer = self.model.tokenizer()?;
                let tokens = match control {
                    ControlTokens::Trusted => tokenizer.encode(text)?,
                    ControlTokens::Literal => tokenizer.encode_literal(text)?,
                };
                Prompt { text: text.clone(), tokens }
            }
            (None, Some(file)) => {
                let chat = Conversation::open(file)?;
                let template = self.model.template()?;
                // Rendering first finds a template that fails before the tokenizer is read, which
                // takes longer.
                template.render(&chat)?;
                template.prompt(&self.model.tokenizer()?, &chat, control)?
            }
            (None, None) => unreachable!("clap requires one of the two"),
        };
        if self.json {
            return Ok(rank.print(&format!("{}\n", json!({ "text": text, "ids": ids })))?);
        }
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        Ok(rank.print(&format!("{text}\n{}\n", ids.join(",")))?)
    }
}
