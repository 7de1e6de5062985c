//! The prompt of a command: a text, a file or token ids, read by rank 0.

use std::io::{self, IsTerminal as _, Read as _};
use std::path::PathBuf;

use clap::Args;
use qwen3_model::{Config, ModelError};
use qwen3_text::{ControlTokens, Conversation, Tokenizer};

use crate::ahead;
use crate::failure::CliError;
use crate::model_path::ModelPath;

/// Where the prompt comes from: at most one of the three, otherwise standard input.
#[derive(Args, Clone, Debug)]
#[group(multiple = false)]
pub struct PromptOptions {
    /// The prompt's text, continued as it stands; it may hold special tokens such as <|im_start|>
    #[arg(long, short = 'p', value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,

    /// A file with the prompt's text; - for standard input, which is read without any of these
    /// options, too, unless it is a terminal
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    prompt_file: Option<PathBuf>,

    /// The prompt as token ids, separated by commas; needs no tokenizer
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    tokens: Option<Vec<u32>>,
}

/// How text that a user writes is encoded.
#[derive(Args, Clone, Copy, Debug)]
pub struct TextOptions {
    /// Encode text such as <|im_start|> as plain text; without this option it becomes the token
    #[arg(long)]
    literal_special_tokens: bool,
}

impl TextOptions {
    /// What becomes of control tokens in a user's text.
    pub fn control(self) -> ControlTokens {
        if self.literal_special_tokens { ControlTokens::Literal } else { ControlTokens::Trusted }
    }
}

/// How the text of a prompt becomes tokens.
#[derive(Clone, Copy, Debug)]
pub struct PromptForm {
    /// The text is a user's message in the chat template; `Some(false)` means "do not think".
    pub chat: Option<Option<bool>>,
    /// What becomes of control tokens in the text.
    pub control: ControlTokens,
}

impl PromptForm {
    /// A text that the model continues, with its control tokens.
    pub const TEXT: Self = Self { chat: None, control: ControlTokens::Trusted };
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
        model: &ModelPath,
        config: &Config,
        form: PromptForm,
    ) -> Result<usize, CliError> {
        let context = config.context_length();
        if let Some(tokens) = &self.tokens {
            ModelError::check_tokens(tokens, config.vocab_size)?;
            self.check(context, tokens.len())?;
            return Ok(tokens.len());
        }
        let bytes = match (&self.prompt, &self.prompt_file) {
            (Some(words), _) => Some(words.len() as u64),
            (None, Some(file)) if file.as_os_str() != "-" => ahead::input(file)?,
            (None, _) if io::stdin().is_terminal() => {
                let expected = "--prompt, --prompt-file, --tokens, or text in standard input";
                return Err(CliError::option("prompt", "standard input is a terminal", expected));
            }
            (None, _) => None,
        };
        match form.chat {
            Some(enable_thinking) => {
                ahead::conversation(model, &Conversation::question("Hello", enable_thinking))?
            }
            None => model.open()?.find_tokenizer()?,
        }
        // To read the tokenizer takes a while, and is left to the time of loading where the text
        // can hardly be too long: a token has a byte at least.
        match bytes {
            Some(bytes) if bytes == 0 || bytes > context as u64 => {
                let tokens = self.read(model, form)?.tokens.len();
                self.check(context, tokens)?;
                Ok(tokens)
            }
            Some(bytes) => Ok(bytes.div_ceil(TOKEN_BYTES) as usize),
            None => Ok(TYPED_TOKENS),
        }
    }

    /// Reads and encodes the prompt.
    pub fn read(&self, model: &ModelPath, form: PromptForm) -> Result<Prompt, CliError> {
        if let Some(tokens) = &self.tokens {
            // A checkpoint of weights alone answers in ids.
            let text = model.open()?.has_tokenizer();
            let text = text.then(|| model.tokenizer()).transpose()?;
            return Ok(Prompt { tokens: tokens.clone(), text });
        }
        let words = match (&self.prompt, &self.prompt_file) {
            (Some(words), _) => words.clone(),
            (None, Some(file)) if file.as_os_str() != "-" => ahead::read_text(file)?,
            (None, _) => {
                let text = io::read_to_string(io::stdin().lock().take(ahead::TEXT_BYTES));
                let mut text = text.map_err(|source| CliError::Input { source })?;
                // A command such as echo ends its text with a line feed.
                if text.ends_with('\n') {
                    text.pop();
                }
                text
            }
        };
        let text = model.tokenizer()?;
        let tokens = match (form.chat, form.control) {
            (Some(enable_thinking), control) => {
                let chat = Conversation::question(&words, enable_thinking);
                model.template()?.prompt(&text, &chat, control)?.tokens
            }
            (None, ControlTokens::Trusted) => text.encode(&words)?,
            (None, ControlTokens::Literal) => text.encode_literal(&words)?,
        };
        if tokens.is_empty() {
            return Err(CliError::option(
                self.option(),
                "the prompt is empty",
                "at least one token, from --prompt, --prompt-file, --tokens or standard input",
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
            (None, None) if self.tokens.is_some() => "--tokens",
            (None, None) => "standard input",
        }
    }
}
