//! Answers of a given structure: grammars that the chosen tokens follow.

use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use engine::{ConstraintError, Next, TokenConstraint};
use qwen3_text::{Grammar, GrammarError, Guide};
use serde_json::json;

use crate::error::ApiError;
use crate::protocol::sampling::StructuredOutputs;
use crate::service::Service;

/// A structure that the answer must have.
#[derive(Clone, Debug, PartialEq)]
pub enum Structure {
    /// A JSON object.
    JsonObject,
    /// JSON that follows a schema.
    JsonSchema(serde_json::Value),
    /// A text that a regular expression matches.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text that a grammar in Lark's notation allows.
    Grammar(String),
}

impl Structure {
    /// The grammar of the answer.
    pub fn grammar(self) -> Grammar {
        match self {
            Self::JsonObject => Grammar::JsonSchema(json!({"type": "object"})),
            Self::JsonSchema(schema) => Grammar::JsonSchema(schema),
            Self::Regex(regex) => Grammar::Regex(regex),
            Self::Choice(texts) => Grammar::Choice(texts),
            Self::Grammar(text) => Grammar::Lark(text),
        }
    }

    /// The structure that `structured_outputs` asks for.
    pub fn of(fields: StructuredOutputs) -> Result<Self, ApiError> {
        let wrong = |message: String| ApiError::param("structured_outputs", message);
        let mut found = Vec::new();
        if let Some(schema) = fields.json {
            let schema = match schema {
                serde_json::Value::String(text) => serde_json::from_str(&text)
                    .map_err(|error| wrong(format!("json is not JSON: {error}")))?,
                schema => schema,
            };
            found.push(Self::JsonSchema(schema));
        }
        found.extend(fields.regex.map(Self::Regex));
        found.extend(fields.choice.map(Self::Choice));
        found.extend(fields.grammar.map(Self::Grammar));
        let count = found.len();
        match (count, found.pop()) {
            (1, Some(Self::Choice(texts))) if texts.is_empty() => {
                Err(wrong("choice is empty, expected at least one text".to_owned()))
            }
            (1, Some(structure)) => Ok(structure),
            _ => Err(wrong(format!(
                "found {count} structures, expected one of json, regex, choice and grammar"
            ))),
        }
    }
}

/// Compiles the grammar that `param` asks for. Compilations run beside everything else and have a
/// limit on time of their own, so they delay no other request.
pub async fn compile(
    service: &Arc<Service>,
    param: &'static str,
    grammar: Grammar,
) -> Result<Guide, ApiError> {
    let shared = Arc::clone(service);
    let task = tokio::task::spawn_blocking(move || shared.grammars()?.compile(&grammar));
    let failed = |_| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "compiling a grammar failed");
    match task.await.map_err(failed)? {
        Ok(guide) => Ok(guide),
        Err(error @ GrammarError::Busy { .. }) => {
            Err(ApiError::too_many(error.to_string(), Duration::from_secs(1)))
        }
        Err(error) => Err(ApiError::param(param, format!("{param}: {error}"))),
    }
}

/// Lets one sequence take only tokens that follow a grammar.
pub struct Guided {
    guide: Guide,
    last: Option<u32>,
}

impl Guided {
    /// A rule for an answer that begins with the next token.
    pub fn new(guide: Guide) -> Self {
        Self { guide, last: None }
    }
}

impl TokenConstraint for Guided {
    fn next(&mut self) -> Result<Next<'_>, ConstraintError> {
        let token = self.last;
        match self.guide.mask() {
            Ok(mask) => Ok(mask.map_or(Next::Stop, Next::Mask)),
            Err(error) => Err(ConstraintError { token, reason: error.to_string() }),
        }
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.last = Some(token);
        let failed =
            |error: GrammarError| ConstraintError { token: Some(token), reason: error.to_string() };
        self.guide.accept(token).map_err(failed)
    }
}
