//! The prompt of a command: a text, a file or token ids, read by rank 0.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use qwen3_model::Model;
use serde_json::json;

use crate::failure::{CliError, Failure};
use crate::options::misfit;
use crate::template::{ChatTemplate, Conversation};
use crate::text::Text;

/// Where the prompt comes from; exactly one of the three.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct PromptOptions {
    /// The prompt's text, continued as it stands; it may hold special tokens such as <|im_start|>
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,

    /// A file with the prompt's text
    #[arg(long, value_name = "F")]
    prompt_file: Option<PathBuf>,

    /// The prompt as token ids, separated by commas; needs no tokenizer
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    tokens: Option<Vec<u32>>,
}

/// A prompt, and the tokenizer for the answer where the checkpoint has one.
pub struct Prompt {
    /// At least one token.
    pub tokens: Vec<u32>,
    /// Absent only where the user gave ids.
    pub text: Option<Text>,
}

impl PromptOptions {
    /// Reads the prompt. With `chat` it is a user's message in the chat template, `Some(false)` being "do not think".
    pub fn read(&self, model: &Path, chat: Option<Option<bool>>) -> Result<Prompt, CliError> {
        if let Some(tokens) = &self.tokens {
            // A checkpoint of weights alone answers in ids.
            let text = model.join("tokenizer.json").is_file();
            let text = text.then(|| Text::open(model)).transpose()?;
            return Ok(Prompt { tokens: tokens.clone(), text });
        }
        let words = match (&self.prompt, &self.prompt_file) {
            (Some(words), _) => words.clone(),
            (None, Some(file)) => fs::read_to_string(file).map_err(|source| CliError::file(file, source))?,
            (None, None) => unreachable!("clap requires one of the three"),
        };
        let text = Text::open(model)?;
        let tokens = match chat {
            Some(enable_thinking) => {
                let message = json!({ "role": "user", "content": words });
                let chat = Conversation::new(vec![message], enable_thinking);
                text.encode_rendered(&ChatTemplate::open(model)?.render(&chat)?)?
            }
            None => text.encode(&words)?,
        };
        if tokens.is_empty() {
            return Err(misfit(self.option(), "the prompt is empty", "at least one token"));
        }
        let text = Some(text);
        Ok(Prompt { tokens, text })
    }

    /// Whether the model can take a prompt of `tokens` tokens; every rank gets the same answer.
    pub fn check(&self, model: &Model, tokens: usize) -> Result<(), Failure> {
        let context = model.config().context_length();
        if tokens <= context {
            return Ok(());
        }
        let expected = format!("at most {context}, the model's context");
        let error = misfit(self.option(), format!("the prompt has {tokens} tokens"), expected);
        Err(Failure::agreed(error))
    }

    /// The option that holds the prompt, for messages.
    fn option(&self) -> &'static str {
        match (&self.prompt, &self.prompt_file) {
            (Some(_), _) => "--prompt",
            (None, Some(_)) => "--prompt-file",
            (None, None) => "--tokens",
        }
    }
}
