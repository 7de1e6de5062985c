//! Errors of chat templates and chat files, and reading the files.

use std::fs;
use std::path::{Path, PathBuf};

use minijinja::Error;
use serde_json::Value as Json;

/// Why a chat template or a conversation cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file that exists cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not the JSON it should be.
    #[error("{}: {problem}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },
    /// The checkpoint has no template.
    #[error(
        "{}: no chat template; expected chat_template.jinja, or chat_template in tokenizer_config.json",
        dir.display()
    )]
    Missing {
        /// The checkpoint's folder.
        dir: PathBuf,
    },
    /// The checkpoint has several templates, none of which is the default.
    #[error("{}: chat templates {found:?}; expected one named \"default\"", dir.display())]
    NoDefault {
        /// The checkpoint's folder.
        dir: PathBuf,
        /// The names that are there.
        found: Vec<String>,
    },
    /// The template does not parse.
    #[error("{}: chat template {name:?}: {source}", dir.display())]
    Syntax {
        /// The checkpoint's folder.
        dir: PathBuf,
        /// The template's name.
        name: String,
        /// Where and why.
        source: Error,
    },
    /// The template refuses the conversation or fails on it.
    #[error("the chat template fails on this conversation: {source}")]
    Render {
        /// Where and why.
        source: Error,
    },
}

/// The text of a file, or `None` where there is no such file.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>, TemplateError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TemplateError::Read { path: path.to_owned(), source }),
    }
}

/// The JSON of a file, or `None` where there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Json>, TemplateError> {
    let Some(text) = read_text(path)? else {
        return Ok(None);
    };
    serde_json::from_str(&text).map(Some).map_err(|error| TemplateError::Json {
        path: path.to_owned(),
        problem: format!("not JSON: {error}"),
    })
}

/// The kind of a JSON value in words, for messages.
pub(crate) fn kind(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "true or false",
        Json::Number(_) => "a number",
        Json::String(_) => "a text",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}
