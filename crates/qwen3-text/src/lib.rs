//! Text of the Qwen3 models: from a conversation to token ids, and from token ids back to text.
//!
//! The crate reads two files of a checkpoint, `tokenizer.json` and the chat template. It knows
//! nothing about weights, ranks or HTTP.
//!
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

// Modules in reading order; a module uses only those above it.
mod error;
mod file;
mod json;
mod conversation;
mod template;
mod process;
mod chat_template;
mod tokenizer;
mod detokenizer;
mod prompt;
mod pooling;
mod answer;
mod stop;
mod grammar;

pub use answer::{AnswerEvent, AnswerOptions, AnswerParser};
pub use chat_template::{CallForm, ChatTemplate};
pub use conversation::Conversation;
pub use detokenizer::Detokenizer;
pub use error::TemplateError;
pub use grammar::{Calls, Grammar, GrammarError, Grammars, Guide, Tool};
pub use json::{Json, JsonError};
pub use pooling::{PoolingTextError, RerankPrompt, embedding_tokens, instructed, yes_and_no};
pub use process::serve_templates;
pub use prompt::{ControlTokens, Prompt, PromptError};
pub use stop::{StopError, StopStrings};
pub use template::TemplateSource;
pub use tokenizer::{Tokenizer, TokenizerError};
