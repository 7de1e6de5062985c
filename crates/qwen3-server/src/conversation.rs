//! A conversation that is continued: what the chat, responses and messages APIs have in common.

use std::sync::Arc;

use engine::TokenConstraint;
use qwen3_text::{AnswerOptions, Calls, Grammar, Guide, Tool};
use serde_json::Value;

use crate::access::Permit;
use crate::answer::{Answer, Job};
use crate::config::Limits;
use crate::error::ApiError;
use crate::gate::Caller;
use crate::plan;
use crate::prompt::{Chat, tool_json};
use crate::protocol::chat::Function;
use crate::protocol::sampling::SamplingFields;
use crate::service::{ServedModel, Service};
use crate::structure::{self, Guided, Structure};
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
    /// A structure that the answer must have, and the field that asks for it.
    pub structure: Option<(&'static str, Structure)>,
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
        let guide = match self.grammar(service.model()?) {
            Some((param, grammar)) => Some(structure::compile(service, param, grammar).await?),
            None => None,
        };
        let limits = Arc::clone(&service.limits);
        service.encode(move |model| self.job(model, guide, &limits, permit.as_deref())).await
    }

    /// The grammar that the answer follows, and the field that asks for it. Calls that are asked
    /// for come before a structure; where both are possible, the model chooses.
    fn grammar(&mut self, model: &ServedModel) -> Option<(&'static str, Grammar)> {
        let form = model.template.as_ref()?.call_form();
        let named = match &self.tool_choice {
            ToolChoice::Named(name) => Some(name),
            _ => None,
        };
        let called =
            self.chat.tools.iter().filter(|tool| named.is_none_or(|name| tool.name == *name));
        let forced = matches!(self.tool_choice, ToolChoice::Required | ToolChoice::Named(_));
        let strict = self.chat.tools.iter().any(|tool| tool.strict == Some(true));
        let tools = called.map(|tool| Tool {
            name: tool.name.clone(),
            // Beside strict tools, arguments of others are as the model likes.
            parameters: match &tool.parameters {
                Some(fields) if forced || !strict || tool.strict == Some(true) => {
                    Value::Object(fields.clone())
                }
                Some(_) => serde_json::json!({"type": "object"}),
                None => Value::Null,
            },
        });
        let calls = Calls { form, tools: tools.collect(), one: self.one_call || named.is_some() };
        match self.structure.take() {
            _ if forced => Some(("tool_choice", Grammar::Calls(calls))),
            Some((param, structure)) => {
                let grammar = match structure.grammar() {
                    Grammar::JsonSchema(schema) if !calls.tools.is_empty() => {
                        Grammar::CallsOrJson(calls, schema)
                    }
                    grammar => grammar,
                };
                Some((param, grammar))
            }
            None if strict && model.tokenizer.added_token("<tool_call>").is_some() => {
                Some(("tools", Grammar::CallsInText(calls)))
            }
            None => None,
        }
    }

    /// What the engine computes, and how it is read.
    fn job(
        self,
        model: &ServedModel,
        guide: Option<Guide>,
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
        let thinks = !closed && !continues;
        let budget = self.thinking_budget.filter(|_| thinks);
        if guide.is_some() || budget.is_some() {
            let constraint = || -> Box<dyn TokenConstraint> {
                match guide.clone().map(|guide| Box::new(Guided::new(guide)) as _) {
                    Some(guided) if !thinks => guided,
                    inner => {
                        Box::new(ThinkingGate::new(&model.tokenizer, in_thinking, budget, inner))
                    }
                }
            };
            request.constraints = (0..request.n).map(|_| constraint()).collect();
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
