//! Errors of chat templates and chat files, and their texts without control characters.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Why a chat template or a conversation cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file cannot be read.
    #[error("{}: {source}", printable(&path.display().to_string()))]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file, or a text that stands for one, does not hold what it should.
    #[error("{}: {}", printable(origin), printable(problem))]
    Content {
        /// The file, or the name the caller gave.
        origin: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// The checkpoint has no template.
    #[error(
        "{}: no chat template; expected chat_template.jinja, or chat_template in \
         tokenizer_config.json",
        printable(origin)
    )]
    Missing {
        /// The checkpoint.
        origin: String,
    },
    /// The checkpoint has several templates, none of which is the default.
    #[error("{}: chat templates {found:?}; expected one named \"default\"", printable(origin))]
    NoDefault {
        /// The checkpoint.
        origin: String,
        /// The names that are there.
        found: Vec<String>,
    },
    /// The template does not compile.
    #[error("{}: chat template {name:?}: {}", printable(origin), printable(problem))]
    Syntax {
        /// The checkpoint.
        origin: String,
        /// The template's name.
        name: String,
        /// Where and why.
        problem: String,
    },
    /// The template refuses the conversation or fails on it.
    #[error("the chat template fails on this conversation: {}", printable(problem))]
    Render {
        /// Where and why.
        problem: String,
    },
    /// The template needs more time, memory or stack than a template may use.
    #[error("the chat template exceeds its limits: {}", printable(problem))]
    Limit {
        /// Which limit, and its value.
        problem: String,
    },
    /// The process that renders the template cannot be started or does not answer.
    #[error("the process that renders the chat template: {}", printable(problem))]
    Process {
        /// The cause.
        problem: String,
    },
}

impl TemplateError {
    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn content(origin: &str, problem: impl Into<String>) -> Self {
        Self::Content { origin: origin.to_owned(), problem: problem.into() }
    }
}

/// Longest text of a file or template that an error message repeats, in bytes.
const MAX_QUOTE: usize = 2000;

/// A text on one line, without characters that control a terminal or the direction of writing.
/// They become escapes as in Rust: `\u{1b}`. A long text is cut.
pub(crate) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if out.len() > MAX_QUOTE {
            out.push('…');
            break;
        }
        match c {
            '\n' | '\r' | '\t' => out.push(' '),
            c if c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
            {
                let _ = write!(out, "{}", c.escape_unicode());
            }
            c => out.push(c),
        }
    }
    out
}
