//! A conversation that is continued: what the chat, responses and messages APIs have in common.

use std::sync::Arc;

use qwen3_text::AnswerOptions;

use crate::access::Permit;
use crate::answer::{Answer, Job};
use crate::config::Limits;
use crate::error::ApiError;
use crate::gate::Caller;
use crate::plan;
use crate::prompt::{Chat, tool_json};
use crate::protocol::chat::Function;
use crate::protocol::sampling::{SamplingFields, StructuredOutputs};
use crate::service::{ServedModel, Service};
use crate::thinking::ThinkingGate;

/// Whether and which function is called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// The model decides.
    #[default]
    Auto,
    /// No call.
    None,
    /// At least one call.
    Required,
    /// A call of this function.
    Named(String),
}

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

/// A conversation to be continued.
#[derive(Clone, Debug, Default)]
pub struct Continuation {
    /// The conversation.
    pub chat: Chat,
    /// How tokens are chosen.
    pub sampling: SamplingFields,
    /// Whether the model thinks; `None` leaves it to the template.
    pub thinking: Option<bool>,
    /// Most tokens of thinking.
    pub thinking_budget: Option<usize>,
    /// Whether and which function is called.
    pub tool_choice: ToolChoice,
    /// Allows at most one call.
    pub one_call: bool,
    /// A structure that the answer must have.
    pub structure: Option<Structure>,
}

impl Continuation {
    /// Removes tools that may not be called, and checks a named one.
    fn settle_tools(&mut self) -> Result<(), ApiError> {
        match &self.tool_choice {
            ToolChoice::None => self.chat.tools.clear(),
            ToolChoice::Auto => {}
            ToolChoice::Required if self.chat.tools.is_empty() => {
                let message = "tool_choice is required, but there are no tools";
                return Err(ApiError::param("tool_choice", message));
            }
            ToolChoice::Required => {}
            ToolChoice::Named(name) => {
                if !self.chat.tools.iter().any(|tool: &Function| tool.name == *name) {
                    let message = format!("tool_choice names {name:?}, which is not in tools");
                    return Err(ApiError::param("tool_choice", message));
                }
            }
        }
        Ok(())
    }

    /// Encodes the conversation and checks all limits.
    pub async fn prepare(
        mut self,
        service: &Arc<Service>,
        permit: Option<Arc<Permit>>,
    ) -> Result<Job, ApiError> {
        self.settle_tools()?;
        if let Some(thinking) = self.thinking {
            let variables = &mut self.chat.variables;
            variables.entry("enable_thinking").or_insert(thinking.into());
        }
        // Both need a grammar that the tokens follow.
        let grammar = match (&self.structure, &self.tool_choice) {
            (Some(_), _) => Some("response_format"),
            (_, ToolChoice::Required | ToolChoice::Named(_)) => Some("tool_choice"),
            _ => None,
        };
        if let Some(param) = grammar {
            let message = format!("{param} is supported only with values that need no grammar");
            return Err(ApiError::unsupported(param, message));
        }
        let limits = Arc::clone(&service.limits);
        service.encode(move |model| self.job(model, &limits, permit.as_deref())).await
    }

    /// What the engine computes, and how it is read.
    fn job(
        self,
        model: &ServedModel,
        limits: &Limits,
        permit: Option<&Permit>,
    ) -> Result<Job, ApiError> {
        let tools = self.chat.tools.iter().map(|tool| tool_json(tool).into()).collect();
        let continues = self.chat.continue_final_message;
        let prompt = self.chat.prompt(model)?;
        let mut parse = AnswerOptions::for_prompt(&prompt.text, tools);
        // An answer that has begun does not begin to think.
        parse.thinking &= !continues;
        let closed = prompt.text.trim_end().ends_with("</think>");
        let in_thinking = parse.in_thinking;
        let (mut request, stops) =
            plan::request(model, limits, permit, &self.sampling, prompt.tokens)?;
        if let Some(budget) = self.thinking_budget.filter(|_| !closed && !continues) {
            let gate = || ThinkingGate::new(&model.tokenizer, in_thinking, Some(budget), None);
            request.constraints = (0..request.n).map(|_| Box::new(gate()) as _).collect();
        }
        Ok(Job { request, stops, parse: Some(parse), one_call: self.one_call })
    }

    /// Encodes the conversation and submits it. Returns the prompt's ids with the answer.
    pub async fn submit(
        self,
        service: &Arc<Service>,
        caller: &Caller,
    ) -> Result<(Answer, Vec<u32>), ApiError> {
        let job = self.prepare(service, caller.permit.clone()).await?;
        let prompt = job.request.prompt.clone();
        let answer = Answer::submit(service, service.model()?, &caller.record, job)?;
        Ok((answer, prompt))
    }
}
