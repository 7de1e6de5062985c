//! A tool call in tags: `<function=name><parameter=key>…</parameter></function>`.

use super::{AnswerEvent, CALL_END, FUNCTION, held};
use crate::json::Json;

const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";
/// The end of a value with the line break that belongs to the tag.
const VALUE_END: &str = "\n</parameter>";
const FUNCTION_END: &str = "</function>";

/// Reads a call tag by tag.
#[derive(Debug)]
pub(super) struct TaggedCall {
    at: At,
    function: String,
    parameters: usize,
}

#[derive(Debug)]
enum At {
    Function,
    Body,
    /// In a value; `text` if it is a JSON string and therefore handed out in pieces.
    Value {
        text: bool,
        key: String,
        begun: bool,
    },
}

impl TaggedCall {
    /// A call at its tag `<function=`.
    pub(super) fn new() -> Self {
        Self { at: At::Function, function: String::new(), parameters: 0 }
    }

    /// Takes what can be read from `pending`. Returns the events and, at the end of the call,
    /// whether it is complete.
    pub(super) fn push(
        &mut self,
        pending: &mut String,
        index: usize,
        tools: &[Json],
    ) -> (Vec<AnswerEvent>, Option<bool>) {
        let mut events = Vec::new();
        let mut json = String::new();
        let mut ended = None;
        while ended.is_none() {
            match &mut self.at {
                At::Function => {
                    let Some((name, rest)) = pending.split_once('>') else {
                        break;
                    };
                    let name = name.strip_prefix(FUNCTION).unwrap_or(name).trim().to_owned();
                    *pending = rest.to_owned();
                    events.push(AnswerEvent::CallStart { index, name: name.clone() });
                    json.push('{');
                    (self.function, self.at) = (name, At::Body);
                }
                At::Body => {
                    // Anything before the next tag is no part of the call.
                    let rest = pending.find('<').map_or("", |at| &pending[at..]).to_owned();
                    *pending = rest;
                    if pending.starts_with(PARAMETER) {
                        let Some((key, rest)) = pending.split_once('>') else {
                            break;
                        };
                        let key = key[PARAMETER.len()..].trim().to_owned();
                        *pending = rest.to_owned();
                        json.push_str(if self.parameters > 0 { ", " } else { "" });
                        json.push_str(&quoted(&key));
                        json.push_str(": ");
                        self.parameters += 1;
                        let text = is_text(tools, &self.function, &key);
                        json.push_str(if text { "\"" } else { "" });
                        self.at = At::Value { text, key, begun: false };
                    } else if let Some(rest) = pending.strip_prefix(FUNCTION_END) {
                        *pending = rest.to_owned();
                        json.push('}');
                        ended = Some(true);
                    } else if pending.starts_with(CALL_END) {
                        json.push('}');
                        ended = Some(true);
                    } else {
                        let tags = [PARAMETER, FUNCTION_END, CALL_END];
                        if tags.iter().any(|tag| tag.starts_with(pending.as_str())) {
                            break;
                        }
                        pending.remove(0);
                    }
                }
                At::Value { text, key, begun } => {
                    if !*begun {
                        // The line break after the tag belongs to the tag.
                        if pending.is_empty() {
                            break;
                        }
                        if pending.starts_with('\n') {
                            // Unless it is the one before the closing tag of an empty value.
                            pending.remove(0);
                        }
                        *begun = true;
                    }
                    if let Some((value, rest)) = pending.split_once(PARAMETER_END) {
                        let value = value.strip_suffix('\n').unwrap_or(value);
                        if *text {
                            json.push_str(&escaped(value));
                            json.push('"');
                        } else {
                            json.push_str(&typed(tools, &self.function, key, value));
                        }
                        *pending = rest.to_owned();
                        self.at = At::Body;
                    } else {
                        if *text {
                            let tags = [VALUE_END, PARAMETER_END];
                            let kept = held(pending, &tags, |_| false, false);
                            let ready: String = pending.drain(..pending.len() - kept).collect();
                            json.push_str(&escaped(&ready));
                        }
                        break;
                    }
                }
            }
        }
        if !json.is_empty() {
            events.push(AnswerEvent::CallArguments { index, json });
        }
        (events, ended)
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The inside of a JSON string.
fn escaped(text: &str) -> String {
    let quoted = quoted(text);
    quoted[1..quoted.len() - 1].to_owned()
}

/// The schema of a tool's parameter.
fn schema<'t>(tools: &'t [Json], function: &str, key: &str) -> Option<&'t Json> {
    let functions = tools.iter().map(|tool| tool.get("function").unwrap_or(tool));
    let mut named =
        functions.filter(|tool| tool.get("name").and_then(Json::as_str) == Some(function));
    let parameters = named.next()?;
    parameters
        .get("parameters")
        .or_else(|| parameters.get("input_schema"))?
        .get("properties")?
        .get(key)
}

/// The names of the JSON types that a schema allows; empty if it does not say.
fn types(schema: &Json) -> Vec<&str> {
    match schema.get("type") {
        Some(Json::String(name)) => vec![name],
        Some(Json::Array(names)) => names.iter().filter_map(Json::as_str).collect(),
        _ => {
            let choices = ["anyOf", "oneOf"].iter().find_map(|name| schema.get(name));
            match choices {
                Some(Json::Array(choices)) => choices.iter().flat_map(types).collect(),
                _ => Vec::new(),
            }
        }
    }
}

/// Whether a parameter is always a JSON string: its schema says so, or there is none.
fn is_text(tools: &[Json], function: &str, key: &str) -> bool {
    match schema(tools, function, key) {
        Some(schema) => types(schema) == ["string"],
        None => true,
    }
}

/// A value that is not always a string: JSON if it parses as one of the types that the schema
/// allows, else a string.
fn typed(tools: &[Json], function: &str, key: &str, value: &str) -> String {
    let allowed = schema(tools, function, key).map(types).unwrap_or_default();
    let parsed = match value.trim() {
        // Python's words, which models write too.
        "True" => Ok(Json::Bool(true)),
        "False" => Ok(Json::Bool(false)),
        "None" => Ok(Json::Null),
        text => Json::parse(text),
    };
    let kind = |json: &Json| match json {
        Json::Null => "null",
        Json::Bool(_) => "boolean",
        Json::Number(text) if text.contains(['.', 'e', 'E']) => "number",
        Json::Number(_) => "integer",
        Json::String(_) => "string",
        Json::Array(_) => "array",
        Json::Object(_) => "object",
    };
    match parsed {
        Ok(Json::String(_)) | Err(_) => quoted(value),
        Ok(json) => {
            let kind = kind(&json);
            let fits = allowed.is_empty()
                || allowed.contains(&kind)
                || (kind == "integer" && allowed.contains(&"number"))
                || !allowed.contains(&"string");
            if fits { json.to_string() } else { quoted(value) }
        }
    }
}
