//! The chat template of a checkpoint, rendered as Hugging Face transformers renders it.

use std::fs;
use std::path::Path;

use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use crate::conversation::Conversation;
use crate::error::{TemplateError, kind, read_json, read_text};
use crate::python;

/// The templates of a checkpoint and the special tokens they may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, Value)>,
    has_tool_use: bool,
}

impl ChatTemplate {
    /// Finds the templates as transformers does: `chat_template.jinja` and
    /// `additional_chat_templates/*.jinja` where they exist, else `chat_template` of
    /// `tokenizer_config.json`, one text or a list of named ones.
    pub fn open(dir: &Path) -> Result<Self, TemplateError> {
        let path = dir.join("tokenizer_config.json");
        let config = match read_json(&path)? {
            Some(Json::Object(config)) => config,
            Some(other) => {
                let problem = format!("found {}, expected an object", kind(&other));
                return Err(TemplateError::Json { path, problem });
            }
            None => Map::new(),
        };
        let mut sources = template_files(dir)?;
        if sources.is_empty() {
            sources = templates_of_config(&path, &config)?;
        }
        if sources.is_empty() {
            return Err(TemplateError::Missing { dir: dir.to_owned() });
        }
        let has = |name: &str| sources.iter().any(|(found, _)| found == name);
        if !has("default") {
            return Err(TemplateError::NoDefault {
                dir: dir.to_owned(),
                found: sources.into_iter().map(|(name, _)| name).collect(),
            });
        }
        let has_tool_use = has("tool_use");
        let mut environment = environment();
        for (name, source) in sources {
            let source = without_generation_tags(&source);
            environment
                .add_template_owned(name.clone(), source)
                .map_err(|source| TemplateError::Syntax { dir: dir.to_owned(), name, source })?;
        }
        Ok(Self { environment, special_tokens: special_tokens(&config), has_tool_use })
    }

    /// The conversation as the text that the model was trained on.
    pub fn render(&self, chat: &Conversation) -> Result<String, TemplateError> {
        let name = if chat.tools.is_some() && self.has_tool_use { "tool_use" } else { "default" };
        let mut variables = self.special_tokens.clone();
        let mut set = |name: &str, value: Value| variables.push((name.to_owned(), value));
        set("messages", Value::from_serialize(&chat.messages));
        set("tools", Value::from_serialize(&chat.tools));
        set("documents", Value::from(()));
        set("add_generation_prompt", Value::from(chat.add_generation_prompt));
        if let Some(thinking) = chat.enable_thinking {
            set("enable_thinking", Value::from(thinking));
        }
        self.environment
            .get_template(name)
            .and_then(|template| template.render(Value::from_iter(variables)))
            .map_err(|source| TemplateError::Render { source })
    }
}

/// Jinja as transformers sets it up: trimmed blocks, loop controls, Python's methods, texts and
/// `json.dumps`, two functions.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(python::print);
    environment.add_filter("tojson", python::tojson);
    environment.add_filter("string", python::string);
    environment.add_test("iterable", python::is_iterable);
    environment.add_test("sequence", python::is_sequence);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
        use std::fmt::Write as _;
        let mut text = String::new();
        write!(text, "{}", chrono::Local::now().format(&format)).map_err(|_| {
            let message = format!("strftime_now: unknown format {format:?}");
            Error::new(ErrorKind::InvalidOperation, message)
        })?;
        Ok(text)
    });
    environment
}

/// `{% generation %}` marks the assistant's words for training. It adds nothing to the text, and
/// minijinja takes no new tags, so it becomes a condition that holds.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|at| start + at) else {
            break;
        };
        let tag = &rest[start + 2..end];
        out.push_str(&rest[..start + 2]);
        match tag.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", " if true ")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", " endif ")),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// `(name, source)` of the template files of a folder; none without `chat_template.jinja`.
fn template_files(dir: &Path) -> Result<Vec<(String, String)>, TemplateError> {
    let mut sources = Vec::new();
    let Some(source) = read_text(&dir.join("chat_template.jinja"))? else {
        return Ok(sources);
    };
    sources.push(("default".to_owned(), source));
    let Ok(entries) = fs::read_dir(dir.join("additional_chat_templates")) else {
        return Ok(sources);
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|extension| extension == "jinja")
            && let Some(name) = path.file_stem().and_then(|stem| stem.to_str())
            && let Some(source) = read_text(&path)?
        {
            sources.push((name.to_owned(), source));
        }
    }
    Ok(sources)
}

/// `(name, source)` of the field `chat_template`.
fn templates_of_config(
    path: &Path,
    config: &Map<String, Json>,
) -> Result<Vec<(String, String)>, TemplateError> {
    let wrong = |problem: String| TemplateError::Json {
        path: path.to_owned(),
        problem: format!("field chat_template: {problem}"),
    };
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(Json::String(source)) => Ok(vec![("default".to_owned(), source.clone())]),
        Some(Json::Array(list)) => list
            .iter()
            .map(|item| {
                let text = |field: &str| item.get(field).and_then(Json::as_str).map(str::to_owned);
                text("name").zip(text("template")).ok_or_else(|| {
                    wrong(format!("found {}, expected name and template", kind(item)))
                })
            })
            .collect(),
        Some(other) => Err(wrong(format!("found {}, expected a text or a list", kind(other)))),
    }
}

/// `bos_token` and its like, which a template may print; a text, or an object with `content`.
fn special_tokens(config: &Map<String, Json>) -> Vec<(String, Value)> {
    let content = |token: &Json| match token {
        Json::String(text) => Some(text.clone()),
        other => other.get("content")?.as_str().map(str::to_owned),
    };
    config
        .iter()
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, token)| Some((name.clone(), Value::from(content(token)?))))
        .collect()
}
