//! Grammars of answers: JSON schemas, regular expressions, choices, Lark grammars and tool calls,
//! compiled to masks over the vocabulary.
//!
//! The crate `llguidance` compiles a grammar and follows it. `$ref` is resolved inside the document
//! only: nothing is ever fetched. Compilation is bounded in the size of the grammar, in its work
//! and in time.

mod call;
mod schema;

use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory, regex_to_lark};
use serde_json::Value;

use crate::error::printable;
use crate::tokenizer::Tokenizer;
pub use call::{Calls, Tool};

/// Largest grammar in bytes of its text.
pub const MAX_GRAMMAR_BYTES: usize = 1 << 20;
/// Longest compilation, and longest time that a compilation waits for others.
pub const MAX_COMPILE_TIME: Duration = Duration::from_millis(1000);
/// Most compilations at the same time. One that exceeds its time cannot be interrupted and keeps
/// its place until it ends.
const MAX_COMPILATIONS: usize = 2;
/// Stack of a compilation in bytes: schemas nest, and the compiler follows them recursively.
const STACK_BYTES: usize = 64 << 20;

/// What an answer may be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON that follows a schema.
    JsonSchema(Value),
    /// A text that a regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text that a grammar in the Lark notation of `llguidance` allows.
    Lark(String),
    /// Calls of tools, and nothing else.
    Calls(Calls),
    /// Calls of tools, or JSON that follows a schema.
    CallsOrJson(Calls, Value),
    /// Any text with calls of tools in it.
    CallsInText(Calls),
}

/// Why an answer cannot follow a grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The vocabulary cannot be used.
    #[error("the vocabulary cannot be used for grammars: {}", printable(problem))]
    Vocabulary {
        /// What was found and what was expected.
        problem: String,
    },
    /// The grammar is too large.
    #[error("the grammar has {bytes} bytes, expected at most {limit}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// A schema nests too deep.
    #[error("the schema nests more than {limit} levels deep")]
    Depth {
        /// The limit.
        limit: usize,
    },
    /// A reference leaves the document.
    #[error(
        "$ref {} is not supported, expected a reference inside of the schema (#/...)",
        printable(reference)
    )]
    Reference {
        /// The reference.
        reference: String,
    },
    /// The grammar is wrong, is too complex, or uses what is not supported.
    #[error("the grammar does not compile: {}", printable(problem))]
    Compile {
        /// The compiler's reason.
        problem: String,
    },
    /// The compilation took too long.
    #[error("the grammar takes more than {} ms to compile", limit.as_millis())]
    Time {
        /// The limit.
        limit: Duration,
    },
    /// Other compilations run.
    #[error("{running} grammars are being compiled, expected fewer")]
    Busy {
        /// Their number.
        running: usize,
    },
    /// A compiled grammar cannot go on.
    #[error("the grammar does not go on: {}", printable(problem))]
    Step {
        /// The reason.
        problem: String,
    },
}

/// Compiles grammars for one tokenizer. Clones share the vocabulary.
#[derive(Clone)]
pub struct Grammars {
    factory: Arc<ParserFactory>,
    special: Arc<[String]>,
    running: Arc<Running>,
}

struct Vocabulary {
    trie: TokTrie,
    tokenizer: Tokenizer,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let ids = std::str::from_utf8(bytes).ok();
        let ids = ids.and_then(|text| self.tokenizer.encode_literal(text).ok());
        ids.unwrap_or_else(|| self.trie.greedy_tokenize(bytes))
    }
}

impl Grammars {
    /// Prepares the vocabulary. `eos_token_ids` end an answer where the grammar lets it end. The
    /// text of a grammar never matches a control token.
    pub fn new(tokenizer: &Tokenizer, eos_token_ids: &[u32]) -> Result<Self, GrammarError> {
        let wrong = |problem: String| GrammarError::Vocabulary { problem };
        let size = tokenizer.vocabulary_size() as u32;
        let Some(&eos) = eos_token_ids.first() else {
            return Err(wrong("no token ends an answer".to_owned()));
        };
        if let Some(id) = eos_token_ids.iter().find(|id| **id >= size) {
            return Err(wrong(format!("{id} ends an answer, expected an id below {size}")));
        }
        let mut words: Vec<_> = (0..size).map(|id| tokenizer.token_bytes(id).to_vec()).collect();
        for token in tokenizer.added() {
            if let Some(word) = words.get_mut(token.id as usize) {
                *word = [&[TokTrie::SPECIAL_TOKEN_MARKER], token.content.as_bytes()].concat();
            }
        }
        let trie = TokTrie::from(&TokRxInfo::new(size, eos), &words).with_eos_tokens(eos_token_ids);
        let env: TokEnv = Arc::new(Vocabulary { trie, tokenizer: tokenizer.clone() });
        let mut factory =
            ParserFactory::new_simple(&env).map_err(|error| wrong(error.to_string()))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_lexer_states = 50_000;
        limits.precompute_large_lexemes = false;
        limits.verbose_errors = false;
        let special = tokenizer.added().iter().map(|token| token.content.clone()).collect();
        Ok(Self { factory: Arc::new(factory), special, running: Arc::default() })
    }

    /// Compiles a grammar on a thread of its own. Waits at most `MAX_COMPILE_TIME` for other
    /// compilations, and then at most as long for this one.
    pub fn compile(&self, grammar: &Grammar) -> Result<Guide, GrammarError> {
        let text = self.lark(grammar)?;
        let place = Place::take(&self.running)?;
        let factory = Arc::clone(&self.factory);
        let (sender, receiver) = mpsc::sync_channel(1);
        let work = move || {
            let mut matcher = Matcher::new(factory.create_parser(TopLevelGrammar::from_lark(text)));
            // The first mask shows what the compiler leaves for later.
            let first = matcher.compute_mask_or_eos();
            let result = match (matcher.get_error(), first) {
                (Some(problem), _) => Err(failed(&problem)),
                (None, Ok(mask)) if mask.is_zero() => Err(failed("it allows no text")),
                (None, _) => Ok(Guide { matcher, mask: None }),
            };
            drop(place);
            // The send fails if `compile` has returned because the time was over.
            let _ = sender.send(result);
        };
        thread::Builder::new()
            .name("grammar".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(work)
            .map_err(|error| failed(&format!("no thread for it: {error}")))?;
        match receiver.recv_timeout(MAX_COMPILE_TIME) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Err(GrammarError::Time { limit: MAX_COMPILE_TIME })
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(failed("the compiler failed")),
        }
    }

    /// The grammar in Lark notation.
    fn lark(&self, grammar: &Grammar) -> Result<String, GrammarError> {
        let text = match grammar {
            Grammar::JsonSchema(schema) => format!("start: {}\n", schema::node(schema)?),
            Grammar::Regex(regex) => format!("start: /{}/\n", regex_to_lark(regex, "")),
            Grammar::Choice(texts) => {
                let texts: Vec<_> = texts.iter().map(|text| literal(text)).collect();
                format!("start: {}\n", texts.join(" | "))
            }
            Grammar::Lark(text) => text.clone(),
            Grammar::Calls(calls) => format!("start: calls\n{}", calls.rules(&self.special)?),
            // A text cannot contain the tag of a call, which is a token of its own.
            Grammar::CallsInText(calls) => format!(
                "start: TEXT? (call TEXT?){}\nTEXT: /(?s:.+)/\n{}",
                if calls.one { "?" } else { "*" },
                calls.rules(&self.special)?
            ),
            Grammar::CallsOrJson(calls, schema) => {
                format!("start: calls | {}\n{}", schema::node(schema)?, calls.rules(&self.special)?)
            }
        };
        match text.len() {
            bytes if bytes > MAX_GRAMMAR_BYTES => {
                Err(GrammarError::TooLarge { bytes, limit: MAX_GRAMMAR_BYTES })
            }
            _ => Ok(text),
        }
    }
}

/// The compiler's reason without the excerpt of the grammar, which follows on further lines.
fn failed(problem: &str) -> GrammarError {
    GrammarError::Compile { problem: problem.lines().next().unwrap_or_default().to_owned() }
}

/// How many compilations run.
#[derive(Default)]
struct Running {
    count: Mutex<usize>,
    ended: Condvar,
}

/// A place among the compilations that run.
struct Place(Arc<Running>);

impl Place {
    fn take(running: &Arc<Running>) -> Result<Self, GrammarError> {
        let count = running.count.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |count: &mut usize| *count >= MAX_COMPILATIONS;
        let waited = running.ended.wait_timeout_while(count, MAX_COMPILE_TIME, full);
        let (mut count, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *count >= MAX_COMPILATIONS {
            return Err(GrammarError::Busy { running: *count });
        }
        *count += 1;
        Ok(Self(Arc::clone(running)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.ended.notify_one();
    }
}

/// A text as a literal of the Lark notation. A string of JSON is one.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// A compiled grammar at one place of an answer. Clones go on independently.
#[derive(Clone)]
pub struct Guide {
    matcher: Matcher,
    mask: Option<SimpleVob>,
}

impl Guide {
    /// The tokens that may come next: bit `id % 32` of word `id / 32`. They include the ids that
    /// end an answer where it may end. `None` where nothing may follow.
    pub fn mask(&mut self) -> Result<Option<&[u32]>, GrammarError> {
        if self.matcher.is_stopped() && self.matcher.get_error().is_none() {
            return Ok(None);
        }
        let mask = self.matcher.compute_mask_or_eos();
        let mask = mask.map_err(|error| GrammarError::Step { problem: error.to_string() })?;
        Ok(Some(self.mask.insert(mask).as_slice()))
    }

    /// Takes a token that the mask allowed.
    pub fn accept(&mut self, token: u32) -> Result<(), GrammarError> {
        let taken = self.matcher.consume_token(token);
        taken.map_err(|error| GrammarError::Step { problem: error.to_string() })
    }
}

#[cfg(test)]
mod tests;
