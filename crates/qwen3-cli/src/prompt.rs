//! The prompt of a command: a text, a file or token ids, read by rank 0.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use qwen3_model::{Config, ModelError};
use qwen3_text::{ChatTemplate, Conversation, Tokenizer};

use crate::ahead;
use crate::failure::CliError;

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

/// Bytes of a token of a usual text, more or less.
const TOKEN_BYTES: u64 = 4;
/// Tokens of a prompt of which nothing is known yet.
const TYPED_TOKENS: usize = 512;

/// A prompt, and the tokenizer for the answer where the checkpoint has one.
pub struct Prompt {
    /// At least one token.
    pub tokens: Vec<u32>,
    /// Absent only where the user gave ids.
    pub text: Option<Tokenizer>,
}

impl PromptOptions {
    /// Whether the model can take the prompt, as far as that is known before it is loaded, and
    /// about how many tokens it has. The options are those of `read`.
    pub fn look(
        &self,
        model: &Path,
        config: &Config,
        chat: Option<Option<bool>>,
    ) -> Result<usize, CliError> {
        let context = config.context_length();
        if let Some(tokens) = &self.tokens {
            ModelError::check_tokens(tokens, config.vocab_size)?;
            self.check(context, tokens.len())?;
            return Ok(tokens.len());
        }
        let bytes = match (&self.prompt, &self.prompt_file) {
            (Some(words), _) => Some(words.len() as u64),
            (None, file) => {
                file.as_deref().and_then(|file| ahead::input(file).transpose()).transpose()?
            }
        };
        match chat {
            Some(enable_thinking) => {
                ahead::conversation(model, &Conversation::question("Hello", enable_thinking))?
            }
            None => drop(Tokenizer::find(model)?),
        }
        // To read the tokenizer takes a while, and is left to the time of loading where the text
        // can hardly be too long: a token has a byte at least.
        match bytes {
            Some(bytes) if bytes == 0 || bytes > context as u64 => {
                let tokens = self.read(model, chat)?.tokens.len();
                self.check(context, tokens)?;
                Ok(tokens)
            }
            Some(bytes) => Ok(bytes.div_ceil(TOKEN_BYTES) as usize),
            None => Ok(TYPED_TOKENS),
        }
    }

    /// Reads the prompt. With `chat` it is a user's message in the chat template, `Some(false)`
    /// being "do not think".
    pub fn read(&self, model: &Path, chat: Option<Option<bool>>) -> Result<Prompt, CliError> {
        if let Some(tokens) = &self.tokens {
            // A checkpoint of weights alone answers in ids.
            let text = model.join("tokenizer.json").is_file();
            let text = text.then(|| Tokenizer::open(model)).transpose()?;
            return Ok(Prompt { tokens: tokens.clone(), text });
        }
        let words = match (&self.prompt, &self.prompt_file) {
            (Some(words), _) => words.clone(),
            (None, Some(file)) => {
                fs::read_to_string(file).map_err(|source| CliError::file(file, source))?
            }
            (None, None) => unreachable!("clap requires one of the three"),
        };
        let text = Tokenizer::open(model)?;
        let tokens = match chat {
            Some(enable_thinking) => {
                let chat = Conversation::question(&words, enable_thinking);
                text.encode_rendered(&ChatTemplate::open(model)?.render(&chat)?)?
            }
            None => text.encode(&words)?,
        };
        if tokens.is_empty() {
            return Err(CliError::option(
                self.option(),
                "the prompt is empty",
                "at least one token",
            ));
        }
        let text = Some(text);
        Ok(Prompt { tokens, text })
    }

    /// Whether a prompt of `tokens` tokens fits the context.
    pub fn check(&self, context: usize, tokens: usize) -> Result<(), CliError> {
        if tokens <= context {
            return Ok(());
        }
        let expected = format!("at most {context}, the model's context");
        Err(CliError::option(self.option(), format!("the prompt has {tokens} tokens"), expected))
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
