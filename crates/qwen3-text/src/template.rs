//! The chat template of a checkpoint, rendered as Hugging Face transformers renders it.

mod arguments;
mod filters;
mod methods;
mod python;
mod source;

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};

use crate::conversation::Conversation;
use crate::error::TemplateError;
use crate::file;
use crate::json::Json;
use arguments::refused;

/// Largest template or `tokenizer_config.json`, in bytes.
const MAX_FILE: u64 = 16 << 20;
/// Work that a template may do, in the engine's units: an instruction costs one, 64 bytes of data
/// cost one. The published templates use about 3,000 for a conversation of 20 messages.
const FUEL: u64 = 5_000_000;

/// The templates of a checkpoint as text, and the special tokens they may name.
#[derive(Clone, Debug, Default)]
pub struct TemplateSource {
    /// The checkpoint's name in error messages.
    pub origin: String,
    /// Names and sources. `default` is used unless `tool_use` exists and there are tools.
    pub templates: Vec<(String, String)>,
    /// Variables such as `eos_token`.
    pub special_tokens: Vec<(String, String)>,
}

impl TemplateSource {
    /// Finds the templates as transformers does: `template`, the text of `chat_template.jinja`, if
    /// there is one, else the field `chat_template` of `config`, the text of
    /// `tokenizer_config.json`: one template or a list of named ones. `origin` names the checkpoint
    /// in error messages.
    pub fn new(
        origin: &str,
        template: Option<&str>,
        config: Option<&str>,
    ) -> Result<Self, TemplateError> {
        let path = format!("{origin}/tokenizer_config.json");
        let config = match config {
            Some(text) => Json::parse(text)
                .map_err(|error| TemplateError::content(&path, error.to_string()))?,
            None => Json::Object(Default::default()),
        };
        let Json::Object(_) = config else {
            let problem = format!("found {}, expected an object", config.kind());
            return Err(TemplateError::content(&path, problem));
        };
        let templates = match template {
            Some(source) => vec![("default".to_owned(), source.to_owned())],
            None => templates_of_config(&path, &config)?,
        };
        Ok(Self { origin: origin.to_owned(), templates, special_tokens: special_tokens(&config) })
    }

    /// Reads `chat_template.jinja`, `additional_chat_templates/*.jinja` and
    /// `tokenizer_config.json` in a checkpoint's folder, as far as they exist.
    pub fn open(folder: &Path) -> Result<Self, TemplateError> {
        let config = read(&folder.join("tokenizer_config.json"))?;
        let template = read(&folder.join("chat_template.jinja"))?;
        let origin = folder.display().to_string();
        let mut found = Self::new(&origin, template.as_deref(), config.as_deref())?;
        if template.is_some()
            && let Ok(entries) = folder.join("additional_chat_templates").read_dir()
        {
            for path in entries.flatten().map(|entry| entry.path()) {
                if path.extension().is_some_and(|extension| extension == "jinja")
                    && let Some(name) = path.file_stem().and_then(|stem| stem.to_str())
                    && let Some(source) = read(&path)?
                {
                    found.templates.push((name.to_owned(), source));
                }
            }
        }
        Ok(found)
    }

    /// Checks that there is a default template.
    pub(crate) fn check(&self) -> Result<(), TemplateError> {
        let origin = self.origin.clone();
        if self.templates.is_empty() {
            return Err(TemplateError::Missing { origin });
        }
        if self.templates.iter().any(|(name, _)| name == "default") {
            return Ok(());
        }
        let found = self.templates.iter().map(|(name, _)| name.clone()).collect();
        Err(TemplateError::NoDefault { origin, found })
    }
}

/// The text of a file, or `None` if there is no such file.
fn read(path: &Path) -> Result<Option<String>, TemplateError> {
    match file::read_text(path, MAX_FILE) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TemplateError::read(path, source)),
    }
}

/// `(name, source)` of the field `chat_template`.
fn templates_of_config(path: &str, config: &Json) -> Result<Vec<(String, String)>, TemplateError> {
    let wrong =
        |problem: String| TemplateError::content(path, format!("field chat_template: {problem}"));
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(Json::String(source)) => Ok(vec![("default".to_owned(), source.clone())]),
        Some(Json::Array(list)) => list
            .iter()
            .map(|item| {
                let text = |field: &str| item.get(field).and_then(Json::as_str).map(str::to_owned);
                text("name").zip(text("template")).ok_or_else(|| {
                    wrong(format!("found {}, expected name and template", item.kind()))
                })
            })
            .collect(),
        Some(other) => Err(wrong(format!("found {}, expected a text or a list", other.kind()))),
    }
}

/// `bos_token` and the like, which a template may print: a text, or an object with `content`.
fn special_tokens(config: &Json) -> Vec<(String, String)> {
    let Json::Object(entries) = config else {
        return Vec::new();
    };
    let content =
        |token: &Json| token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned);
    entries
        .iter()
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, token)| Some((name.clone(), content(token)?)))
        .collect()
}

/// A compiled template in this process.
#[derive(Debug)]
pub(crate) struct Compiled {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
    has_tool_use: bool,
}

impl Compiled {
    pub(crate) fn new(source: TemplateSource) -> Result<Self, TemplateError> {
        source.check()?;
        let mut environment = environment();
        let has_tool_use = source.templates.iter().any(|(name, _)| name == "tool_use");
        for (name, template) in source.templates {
            environment.add_template_owned(name.clone(), source::prepare(&template)).map_err(
                |error| TemplateError::Syntax {
                    origin: source.origin.clone(),
                    name,
                    problem: error.to_string(),
                },
            )?;
        }
        Ok(Self { environment, special_tokens: source.special_tokens, has_tool_use })
    }

    pub(crate) fn render(&self, chat: &Conversation) -> Result<String, TemplateError> {
        let name = if chat.tools.is_some() && self.has_tool_use { "tool_use" } else { "default" };
        let tokens = self.special_tokens.iter();
        let mut variables: Vec<(String, Value)> =
            tokens.map(|(name, token)| (name.clone(), Value::from(token.as_str()))).collect();
        let mut set = |name: &str, value: Value| variables.push((name.to_owned(), value));
        set("documents", Value::from(()));
        for (name, value) in &chat.variables {
            set(name, value.to_value());
        }
        let mut messages: Vec<Json> = chat.messages.iter().map(normalized).collect();
        let tag = chat.continue_final_message.then(|| mark_end(&mut messages)).transpose()?;
        set("messages", messages.iter().map(Json::to_value).collect());
        set(
            "tools",
            match &chat.tools {
                Some(tools) => tools.iter().map(Json::to_value).collect(),
                None => Value::from(()),
            },
        );
        set("add_generation_prompt", Value::from(chat.add_generation_prompt));
        let text = self
            .environment
            .get_template(name)
            .and_then(|template| template.render(Value::from_pairs(variables)))
            .map_err(|error| match error.kind() {
                ErrorKind::OutOfFuel => {
                    TemplateError::Limit { problem: "it does too much work".to_owned() }
                }
                _ => TemplateError::Render { problem: error.to_string() },
            })?;
        match tag {
            Some(tag) => cut_at(text, &tag),
            None => Ok(text),
        }
    }
}

/// Fields of a message that hold the thinking, the first that is set counts.
const THINKING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message as transformers hands it to a template: without fields that are null, and with the
/// thinking under each of its names.
fn normalized(message: &Json) -> Json {
    let Json::Object(fields) = message else {
        return message.clone();
    };
    let mut fields = fields.clone();
    fields.retain(|_, value| !value.is_null());
    if let Some(thinking) = THINKING.iter().find_map(|name| fields.get(*name)).cloned() {
        for name in THINKING {
            fields.insert(name.to_owned(), thinking.clone());
        }
    }
    Json::Object(fields)
}

/// Appends a mark to the text of the last message and returns the mark.
fn mark_end(messages: &mut [Json]) -> Result<String, TemplateError> {
    let mark = "CONTINUE_FINAL_MESSAGE_TAG ".to_owned();
    let problem = "continue_final_message: the last message has no text content".to_owned();
    let content = messages.last_mut().and_then(|message| match message {
        Json::Object(fields) => fields.get_mut("content"),
        _ => None,
    });
    let text = match content {
        Some(Json::String(text)) => Some(text),
        Some(Json::Array(parts)) => parts.iter_mut().rev().find_map(|part| match part {
            Json::Object(fields) => match fields.get_mut("text") {
                Some(Json::String(text)) => Some(text),
                _ => None,
            },
            _ => None,
        }),
        _ => None,
    };
    match text {
        Some(text) => {
            text.push_str(&mark);
            Ok(mark)
        }
        None => Err(TemplateError::Render { problem }),
    }
}

/// The rendered text up to the mark. A template that strips the message strips the mark's blank,
/// and then blanks before the mark would have gone too.
fn cut_at(mut text: String, mark: &str) -> Result<String, TemplateError> {
    let Some(at) = text.rfind(mark.trim()) else {
        let problem =
            "continue_final_message: the template does not print the last message".to_owned();
        return Err(TemplateError::Render { problem });
    };
    let stripped = !text[at..].starts_with(mark);
    text.truncate(at);
    if stripped {
        text.truncate(text.trim_end_matches(methods::is_space).len());
    }
    Ok(text)
}

/// Jinja as transformers sets it up: trimmed blocks, loop controls, Python's methods, texts and
/// `json.dumps`, and two functions.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("Jinja's own delimiters are valid"));
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(python::print);
    filters::register(&mut environment);
    environment.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
        Err(refused(python::text(&message)?))
    });
    environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
        use std::fmt::Write as _;
        if format.len() > 256 {
            return Err(refused("strftime_now: the format is longer than 256 bytes"));
        }
        let mut text = String::new();
        write!(text, "{}", chrono::Local::now().format(&format)).map_err(|_| {
            let message = format!("strftime_now: unknown format {format:?}");
            Error::new(ErrorKind::InvalidOperation, message)
        })?;
        Ok(text)
    });
    environment
}
