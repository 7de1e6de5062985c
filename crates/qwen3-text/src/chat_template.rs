//! A chat template, in this process or in one of its own.

use std::path::Path;

use crate::conversation::Conversation;
use crate::error::TemplateError;
use crate::process::RenderProcess;
use crate::template::{Compiled, TemplateSource};

/// How a model writes a tool call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallForm {
    /// `<tool_call>` with JSON: Qwen3.
    Json,
    /// `<tool_call>` with `<function=…>` and `<parameter=…>`: Qwen3-Coder and later models.
    Tagged,
}

impl CallForm {
    /// The form that the templates teach.
    fn of(source: &TemplateSource) -> Self {
        let tagged = |(_, text): &(String, String)| text.contains("<function=");
        if source.templates.iter().any(tagged) { Self::Tagged } else { Self::Json }
    }
}

/// A chat template that renders conversations.
#[derive(Debug)]
pub struct ChatTemplate {
    renderer: Renderer,
    call_form: CallForm,
}

#[derive(Debug)]
enum Renderer {
    Here(Box<Compiled>),
    Process(RenderProcess),
}

impl ChatTemplate {
    /// Compiles a template in this process. The work that a rendering does is limited; a template
    /// that nests values very deeply may overflow the stack all the same. `isolated` is for
    /// templates that are not trusted.
    pub fn new(source: TemplateSource) -> Result<Self, TemplateError> {
        let call_form = CallForm::of(&source);
        Ok(Self { renderer: Renderer::Here(Box::new(Compiled::new(source)?)), call_form })
    }

    /// Compiles the template in a checkpoint's folder in this process.
    pub fn open(folder: &Path) -> Result<Self, TemplateError> {
        Self::new(TemplateSource::open(folder)?)
    }

    /// Compiles and renders a template in a process of its own, which has limits on time, memory
    /// and stack. The program must call `serve_templates` first in its `main`.
    pub fn isolated(source: TemplateSource) -> Result<Self, TemplateError> {
        let call_form = CallForm::of(&source);
        Ok(Self { renderer: Renderer::Process(RenderProcess::start(source)?), call_form })
    }

    /// `isolated` with the template in a checkpoint's folder.
    pub fn open_isolated(folder: &Path) -> Result<Self, TemplateError> {
        Self::isolated(TemplateSource::open(folder)?)
    }

    /// How the model writes tool calls, as the template tells it.
    pub fn call_form(&self) -> CallForm {
        self.call_form
    }

    /// Renders a conversation to the text that the model was trained on.
    pub fn render(&self, chat: &Conversation) -> Result<String, TemplateError> {
        match &self.renderer {
            Renderer::Here(compiled) => compiled.render(chat),
            Renderer::Process(process) => process.render(chat),
        }
    }
}
